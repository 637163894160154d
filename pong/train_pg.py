"""The plain policy gradient on Atari Pong: REINFORCE with reward-to-go, no critic. Where to start reading.

    python -m pong.train_pg                       # reward-to-go
    python -m pong.train_pg --advantage episode   # the textbook's first form: every step gets the whole return
    python -m pong.train_pg --baseline            # with a critic's value subtracted

Every option and its default: python -m pong.train_pg --help.
"""

import sys
from dataclasses import replace
from pathlib import Path

import tyro

from pong.config import PongConfig, preset
from pong.trainer import PongTrainer
from rlhf.run import reporting_errors


def defaults() -> PongConfig:
    """The fast Pong preset with REINFORCE in PPO's place, and rollouts so long that most returns are known.

    Nothing holds its steps back, so they are few and large, each from thousands of actions, and the entropy counts for
    more: from small minibatches the policy soon takes one action for ever.
    """
    fast = preset("fast")
    algorithm = replace(
        fast.algorithm, advantage="mc", loss="reinforce", baseline=False, entropy_coef=0.05, final_entropy_coef=0.01
    )
    optimization = replace(
        fast.optimization, rollout_steps=256, minibatch_size=2048, total_steps=800_000, learning_rate=2e-3
    )
    run = replace(fast.run, run_dir=Path("runs/pong_pg"))
    return replace(fast, algorithm=algorithm, optimization=optimization, run=run)


if __name__ == "__main__":
    with reporting_errors():
        config = tyro.cli(
            tyro.conf.OmitArgPrefixes[PongConfig], args=sys.argv[1:], default=defaults(), description=__doc__
        )
        PongTrainer(config).train()
