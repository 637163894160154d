"""The plain policy gradient on Atari Pong: REINFORCE with reward-to-go, no critic. Where to start reading.

    python -m pong.train_pg                       # reward-to-go
    python -m pong.train_pg --advantage episode   # the textbook's first form: every step gets the whole return
    python -m pong.train_pg --baseline            # with a critic's value subtracted

Every option and its default: python -m pong.train_pg --help.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from pong.config import PongConfig, preset
from pong.trainer import PongTrainer
from rlhf.run import reporting_errors


@dataclass(frozen=True)
class _Choice:
    """What decides the other options' defaults."""

    game: str = "pong"
    """Any ALE game, in snake case."""


def defaults(game: str = "pong") -> PongConfig:
    """The game's fast preset with REINFORCE in PPO's place, and rollouts so long that most returns are known.

    Nothing holds its steps back, so they are few and large, each from thousands of actions, and the entropy counts for
    more: from small minibatches the policy soon takes one action for ever.
    """
    fast = preset("fast", game)
    algorithm = replace(
        fast.algorithm, advantage="mc", loss="reinforce", baseline=False, entropy_coef=0.05, final_entropy_coef=0.01
    )
    optimization = replace(
        fast.optimization,
        rollout_steps=256,
        minibatch_size=2048,
        learning_rate=2e-3,
        final_learning_rate=2e-4,
    )
    run = replace(fast.run, run_dir=Path(f"runs/{game}_pg"))
    return replace(fast, algorithm=algorithm, optimization=optimization, run=run)


def parse(args: list[str], description: str | None) -> PongConfig:
    """The config that a command line asks for: a game's defaults, and single options over them."""
    choice, rest = tyro.cli(_Choice, args=args, return_unknown_args=True, add_help=False)
    return tyro.cli(
        tyro.conf.OmitArgPrefixes[PongConfig], args=rest, default=defaults(choice.game), description=description
    )


if __name__ == "__main__":
    with reporting_errors():
        PongTrainer(parse(sys.argv[1:], __doc__)).train()
