"""GRPO on mathematics: advantages from groups of samples, no critic, KL to the reference in the loss.

    accelerate launch recipes/grpo_math.py                      # no download: a small model learns to add, on a CPU
    accelerate launch recipes/grpo_math.py --model <folder or hub id> --task gsm8k --data <folder or hub id>
    accelerate launch recipes/grpo_math.py --model <folder or hub id> --task reasoning_gym --data lcm

Every option and its default: python recipes/grpo_math.py --help, or the same with --model for pretrained models.
"""

import sys
from dataclasses import replace
from pathlib import Path

import tyro
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from rlhf.lm.config import OptimizationConfig, RunConfig, SamplingConfig, TrainerConfig
from rlhf.lm.embedded import build_taught_model, build_tokenizer
from rlhf.lm.models import load_actor, load_tokenizer
from rlhf.lm.tasks import load_task
from rlhf.lm.trainer import Trainer
from rlhf.presets import PRESETS
from rlhf.run import reporting_errors

GRPO = replace(PRESETS["grpo"].algorithm, kl_loss_coef=0.01)

# Without --model: 132 thousand parameters, three-digit addition.
EMBEDDED = TrainerConfig(
    sampling=SamplingConfig(max_prompt_tokens=8, max_new_tokens=8),
    algorithm=GRPO,
    optimization=OptimizationConfig(
        steps=300,
        prompts_per_step=32,
        samples_per_prompt=8,
        epochs=2,
        minibatches=2,
        learning_rate=1e-3,
    ),
    run=RunConfig(run_dir=Path("runs/grpo_math"), eval_every=10, eval_prompts=512),
)

# With --model: small steps, long completions.
PRETRAINED = TrainerConfig(
    sampling=SamplingConfig(max_prompt_tokens=512, max_new_tokens=256, generation_batch_size=64),
    algorithm=GRPO,
    optimization=OptimizationConfig(
        steps=200,
        prompts_per_step=32,
        samples_per_prompt=8,
        epochs=1,
        minibatches=4,
        learning_rate=1e-6,
    ),
    run=RunConfig(run_dir=Path("runs/grpo_math"), eval_prompts=128),
)


def main(config: TrainerConfig) -> None:
    source = config.source
    if source.model is None:
        config.adapter.check_made()
    tokenizer = build_tokenizer() if source.model is None else load_tokenizer(source.model)
    task = load_task(source, tokenizer)

    def make_actor() -> PreTrainedModel:
        if source.model is not None:
            return load_actor(source.model, adapter=config.adapter)
        return build_taught_model(config.run.seed, tokenizer, task)

    Trainer(config, tokenizer=tokenizer, task=task, make_actor=make_actor).train()


if __name__ == "__main__":
    has_model = any(word.split("=")[0] == "--model" for word in sys.argv)
    disable_progress_bar()  # transformers' own, which would break into ours
    with reporting_errors():
        defaults = PRETRAINED if has_model else EMBEDDED
        main(tyro.cli(tyro.conf.OmitArgPrefixes[TrainerConfig], default=defaults, description=__doc__))
