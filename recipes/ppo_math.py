"""PPO with an actor, a critic and a reference on mathematics.

    accelerate launch recipes/ppo_math.py                       # no download: a small model learns to add, on a CPU
    accelerate launch recipes/ppo_math.py --model <folder or hub id> --task gsm8k --data <folder or hub id>

Every option: python recipes/ppo_math.py --help
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from transformers import PreTrainedModel

from rlhf.lm.config import AlgorithmConfig, OptimizationConfig, RunConfig, SamplingConfig, TrainerConfig
from rlhf.lm.embedded import build_taught_model, build_tokenizer
from rlhf.lm.models import load_actor, load_tokenizer
from rlhf.lm.tasks import load_task
from rlhf.lm.trainer import Trainer
from rlhf.run import reporting_errors

# Without --model: 132 thousand parameters, three-digit addition.
EMBEDDED = TrainerConfig(
    sampling=SamplingConfig(max_prompt_tokens=8, max_new_tokens=5),
    algorithm=AlgorithmConfig(gae_lambda=0.95, kl_reward_coef=0.01),
    optimization=OptimizationConfig(
        steps=200,
        prompts_per_step=256,
        samples_per_prompt=1,
        epochs=2,
        minibatches=2,
        micro_batch_size=128,
        learning_rate=1e-3,
    ),
    run=RunConfig(run_dir=Path("runs/ppo_math"), eval_every=10, eval_prompts=512),
)

# With --model: small steps, long completions.
PRETRAINED = TrainerConfig(
    sampling=SamplingConfig(max_prompt_tokens=512, max_new_tokens=256),
    algorithm=AlgorithmConfig(gae_lambda=1.0, kl_reward_coef=0.01),
    optimization=OptimizationConfig(
        steps=200,
        prompts_per_step=64,
        samples_per_prompt=4,
        epochs=1,
        minibatches=4,
        micro_batch_size=8,
        learning_rate=1e-6,
        critic_learning_rate=5e-6,
        warmup_steps=10,
    ),
    run=RunConfig(run_dir=Path("runs/ppo_math"), eval_prompts=128),
)


@dataclass(frozen=True)
class Args:
    """PPO with an actor, a critic and a reference on mathematics."""

    config: Annotated[TrainerConfig, tyro.conf.OmitArgPrefixes]
    model: str | None = None
    """Folder or hub id of a pretrained model; without it a small one is made and taught on the spot."""
    task: str = "arithmetic"
    """arithmetic or gsm8k."""
    data: str | None = None
    """For gsm8k: a folder with train.jsonl and test.jsonl, or a hub id."""
    plain_prompts: bool = False
    """Ask in plain text: for pretrained models without a chat template."""


def main(args: Args) -> None:
    tokenizer = build_tokenizer() if args.model is None else load_tokenizer(args.model)
    task = load_task(args.task, data=args.data, tokenizer=tokenizer, plain_prompts=args.plain_prompts)

    def make_actor() -> PreTrainedModel:
        if args.model is not None:
            return load_actor(args.model)
        return build_taught_model(args.config.run.seed, tokenizer, task)

    Trainer(args.config, tokenizer=tokenizer, task=task, make_actor=make_actor).train()


if __name__ == "__main__":
    has_model = any(word.split("=")[0] == "--model" for word in sys.argv)
    with reporting_errors():
        main(tyro.cli(Args, default=Args(config=PRETRAINED if has_model else EMBEDDED)))
