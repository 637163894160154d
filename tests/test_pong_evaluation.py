"""Evaluation counts whole episodes, the same number of every environment, in games that training has not seen."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from pong_toys import Clockwork, NewestPixel

from pong import evaluation
from pong.config import preset
from pong.env import AtariEnvs
from pong.evaluation import evaluate
from pong.trainer import PongTrainer


@pytest.mark.parametrize("greedy", [False, True])
def test_every_environment_plays_its_share_however_long_its_episodes(
    greedy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taking whichever ends first would leave the long ones out."""
    made: list[Clockwork] = []

    def make(*args: Any, count: int, **kwargs: Any) -> Clockwork:
        made.append(Clockwork(count, length=(3, 300)[len(made)], ends="terminated"))
        return made[-1]

    monkeypatch.setattr(evaluation, "AtariEnvs", make)
    monkeypatch.setattr(evaluation, "_MOST_ENVS", 4)
    progress: list[int] = []
    found = evaluate(
        NewestPixel(torch.zeros(256)),  # type: ignore[arg-type]
        preset("fast").game,
        episodes=10,
        seed=0,
        threads=1,
        greedy=greedy,
        on_progress=lambda done, mean: progress.append(done),
    )
    assert sorted(episode.env for episode in found.episodes) == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert {(episode.env, episode.steps) for episode in found.episodes} == {(0, 3), (1, 3), (2, 300), (3, 300)}
    assert progress[-1] == 10
    summary = found.summary()
    assert summary["mean_score"] == pytest.approx((6 * 3 + 4 * 300) / 10)
    assert (summary["lowest_score"], summary["highest_score"]) == (3, 300)
    assert all(envs.closed for envs in made)


def test_the_games_are_none_of_trainings(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[tuple[int, ...]] = []

    class Recording(AtariEnvs):
        def __init__(self, *args: Any, seed: tuple[int, ...], **kwargs: Any) -> None:
            seeds.append(tuple(seed))
            super().__init__(*args, seed=seed, **kwargs)

    for module in ("pong.evaluation.AtariEnvs", "pong.trainer.AtariEnvs"):
        monkeypatch.setattr(module, Recording)
    config = preset("fast")
    config = replace(
        config,
        game=replace(config.game, max_frames_per_episode=40),
        optimization=replace(
            config.optimization, total_steps=64, envs=4, rollout_steps=16, minibatch_size=64, epochs=1
        ),
        run=replace(config.run, run_dir=tmp_path / "run", eval_episodes=2, threads=1),
    )
    PongTrainer(config).train()
    assert len(seeds) == 4  # two groups each
    assert len(set(seeds)) == 4
