"""PPO on Atari Pong, from pixels, with the estimators and losses that train the language models.

    python -m pong.train_ppo                                       # minutes on two cores
    python -m pong.train_ppo --preset v5                           # the literature's protocol
    python -m pong.train_ppo --advantage mc --loss reinforce       # what each part buys: docs/pong.md
    python -m pong.train_ppo --game breakout --preset v5

--preset fast (the default) learns in minutes, but its scores are not comparable with the literature's; --preset v5 is
the ALE/Pong-v5 protocol. All other options, with that preset's defaults: python -m pong.train_ppo --preset v5 --help.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from pong.config import PongConfig, Preset, preset
from pong.trainer import PongTrainer
from rlhf.run import reporting_errors


@dataclass(frozen=True)
class _Choice:
    """What decides the other options' defaults."""

    preset: Preset = "fast"
    """fast: learns in minutes, scores not comparable with the literature's; v5: the ALE/Pong-v5 protocol."""
    game: str = "pong"
    """Any ALE game, in snake case."""


def parse(args: list[str], description: str | None) -> PongConfig:
    """The config that a command line asks for: a preset, and single options over it."""
    choice, rest = tyro.cli(_Choice, args=args, return_unknown_args=True, add_help=False)
    defaults = preset(choice.preset, choice.game)
    run = replace(defaults.run, run_dir=Path(f"runs/{choice.game}_ppo"))
    return tyro.cli(
        tyro.conf.OmitArgPrefixes[PongConfig], args=rest, default=replace(defaults, run=run), description=description
    )


if __name__ == "__main__":
    with reporting_errors():
        PongTrainer(parse(sys.argv[1:], __doc__)).train()
