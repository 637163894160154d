"""A policy's score over whole, fresh episodes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pong.config import GameConfig
from pong.env import AtariEnvs
from pong.network import ActorCritic
from pong.rollout import Collector, Episode
from rlhf.run import generator_for

_MOST_ENVS = 20
_STEPS = 128  # between looks at who has finished


class Evaluation(NamedTuple):
    """Scores of whole episodes, in no order."""

    episodes: list[Episode]

    def summary(self) -> dict[str, Any]:
        scores = np.array([episode.score for episode in self.episodes])
        steps = np.array([episode.steps for episode in self.episodes])
        return {
            "episodes": len(scores),
            "mean_score": float(scores.mean()),
            "std_score": float(scores.std(ddof=1)) if len(scores) > 1 else 0.0,
            "lowest_score": float(scores.min()),
            "highest_score": float(scores.max()),
            "mean_steps": float(steps.mean()),
        }


def evaluate(
    network: ActorCritic,
    game: GameConfig,
    *,
    episodes: int,
    seed: int,
    threads: int,
    greedy: bool = False,
    on_progress: Callable[[int, float], None] = lambda done, mean: None,
) -> Evaluation:
    """Play `episodes` fresh episodes.

    Every environment plays the same number of them (one more for the first few): taking whichever end first would
    favour short ones.

    Args:
        network: the policy; acts by sampling, as in training, or greedily.
        seed: of games and actions; training uses none of the same.
        threads: of the emulator.
        on_progress: called with the number of episodes that are done and their mean score.
    """
    count = min(episodes, _MOST_ENVS)
    halves = [half for half in (count // 2, count - count // 2) if half > 0]
    evaluation_mark = 1  # training's seeds are (seed, 0, group)
    groups = [
        AtariEnvs(game, seed=(seed, evaluation_mark, index), count=half, threads=threads)
        for index, half in enumerate(halves)
    ]
    collector = Collector(groups, network, steps=_STEPS, stack=game.stack)
    wanted = np.full(count, episodes // count)
    wanted[: episodes % count] += 1
    done: list[Episode] = []
    collector.reset()
    index = 0
    while wanted.any():
        rollout = collector.collect(None if greedy else generator_for(seed, "evaluation", index))
        for episode in rollout.episodes:
            if wanted[episode.env] > 0:
                wanted[episode.env] -= 1
                done.append(episode)
        if done:
            on_progress(len(done), sum(episode.score for episode in done) / len(done))
        index += 1
    collector.close()
    return Evaluation(done)
