"""PPO with an actor, a critic and a reference on mathematics.

    accelerate launch recipes/ppo_math.py                       # no download: a small model learns to add, on a CPU
    accelerate launch recipes/ppo_math.py --model <folder or hub id> --task gsm8k --data <folder or hub id>
    accelerate launch recipes/ppo_math.py --model <folder or hub id> --task reasoning_gym --data lcm
    accelerate launch recipes/ppo_math.py --preset rloo         # any algorithm of docs/algorithms.md

Every option and its default: python recipes/ppo_math.py --help, or the same with --model or --preset before it.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from rlhf.algorithm import CriticKind
from rlhf.lm.config import OptimizationConfig, RunConfig, SamplingConfig, TrainerConfig, with_preset
from rlhf.lm.embedded import build_taught_model, build_tokenizer
from rlhf.lm.models import load_actor, load_tokenizer
from rlhf.lm.tasks import load_task
from rlhf.lm.trainer import Trainer
from rlhf.presets import PRESETS, PresetName
from rlhf.run import reporting_errors

PPO = PRESETS["ppo"].algorithm

# Without --model: 132 thousand parameters, three-digit addition.
EMBEDDED = TrainerConfig(
    sampling=SamplingConfig(max_prompt_tokens=8, max_new_tokens=8),
    algorithm=PPO,
    optimization=OptimizationConfig(
        steps=200,
        prompts_per_step=256,
        samples_per_prompt=1,
        epochs=2,
        minibatches=2,
        learning_rate=1e-3,
    ),
    run=RunConfig(run_dir=Path("runs/ppo_math"), eval_every=10, eval_prompts=512),
)

# With --model: small steps, long completions.
PRETRAINED = TrainerConfig(
    sampling=SamplingConfig(max_prompt_tokens=512, max_new_tokens=256, generation_batch_size=64),
    algorithm=replace(PPO, gae_lambda=1.0),
    optimization=OptimizationConfig(
        steps=200,
        prompts_per_step=64,
        samples_per_prompt=4,
        epochs=1,
        minibatches=4,
        learning_rate=1e-6,
        critic_learning_rate=5e-6,
    ),
    run=RunConfig(run_dir=Path("runs/ppo_math"), eval_prompts=128),
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


@dataclass(frozen=True)
class Choice:
    """What decides the other options' defaults."""

    model: str | None = None
    """Folder or hub id of a pretrained model; None: a small one is made and taught on the spot."""
    preset: PresetName | None = None
    """An algorithm by name; None: PPO."""
    critic: CriticKind | None = None
    """separate, shared or none; None: the algorithm's."""


def parse(args: list[str]) -> TrainerConfig:
    choice, rest = tyro.cli(Choice, args=args, return_unknown_args=True, add_help=False)
    defaults = EMBEDDED if choice.model is None else PRETRAINED
    defaults = replace(defaults, source=replace(defaults.source, model=choice.model))
    if choice.preset is not None:
        run = replace(defaults.run, run_dir=Path(f"runs/{choice.preset}_math"))
        defaults = replace(with_preset(defaults, choice.preset), run=run)
    if choice.critic == "none":
        defaults = replace(defaults, optimization=replace(defaults.optimization, critic_learning_rate=None))
    rest = rest if choice.critic is None else [*rest, "--critic", choice.critic]
    described = f"{__doc__}\n--preset NAME chooses the algorithm, one of: {', '.join(PRESETS)}."
    return tyro.cli(tyro.conf.OmitArgPrefixes[TrainerConfig], args=rest, default=defaults, description=described)


if __name__ == "__main__":
    disable_progress_bar()  # transformers' own, which would break into ours
    with reporting_errors():
        main(parse(sys.argv[1:]))
