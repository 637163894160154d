"""Supervised fine-tuning on demonstrations: the first of three steps from demonstrations and preferences to a policy.

    accelerate launch recipes/sft.py                            # no download: a small model learns to describe things
    accelerate launch recipes/sft.py --model <folder or hub id> --data <file, folder or hub id>

Then recipes/reward_model.py, then recipes/ppo_preference.py, which find this one's model in runs/sft/final.
Every option and its default: python recipes/sft.py --help, or the same with --model for pretrained models.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from rlhf.checks import InputError
from rlhf.lm import embedded_preferences as embedded
from rlhf.lm.config import FitRunConfig, check_used
from rlhf.lm.data import load_demonstrations, load_splits
from rlhf.lm.models import load_actor, load_tokenizer
from rlhf.lm.sft import SFTConfig, SFTFitConfig, sft_trainer
from rlhf.run import reporting_errors

# Without --model: 136 thousand parameters, sentences about rivers and towns.
EMBEDDED = SFTConfig(
    optimization=SFTFitConfig(epochs=2, batch_size=64, micro_batch_size=64, learning_rate=2e-3),
    run=FitRunConfig(run_dir=Path("runs/sft"), eval_every=50, checkpoint_every=100),
)
DEMONSTRATIONS = 12_800

# With --model.
PRETRAINED = SFTConfig(
    optimization=SFTFitConfig(epochs=1, batch_size=64, micro_batch_size=8, learning_rate=1e-5),
    run=FitRunConfig(run_dir=Path("runs/sft"), eval_every=50),
)


def main(config: SFTConfig) -> None:
    source, seed = config.source, config.run.seed
    if (source.model is None) != (source.data is None):
        raise InputError("--model and --data belong together: without both, a small model learns made-up sentences")
    if source.model is None:
        config.adapter.check_made()
        check_used(source, {"max_tokens"}, by="this recipe without --data")
        tokenizer: PreTrainedTokenizerBase = embedded.build_tokenizer()
        train, held_out = embedded.prompts()
        splits = (
            embedded.demonstrations(train, DEMONSTRATIONS, seed=seed),
            embedded.demonstrations(held_out, config.run.eval_prompts, seed=seed + 1),
        )
    else:
        tokenizer = load_tokenizer(source.model)
        splits = load_splits(source)
    train_rows, held_out_rows = load_demonstrations(splits, tokenizer, source)

    def make_model() -> PreTrainedModel:
        if source.model is None:
            return embedded.build_model(seed, tokenizer)
        return load_actor(source.model, adapter=config.adapter)

    trainer = sft_trainer(config, tokenizer=tokenizer, train=train_rows, held_out=held_out_rows, make_model=make_model)
    found = trainer.train()
    if trainer.accelerator.is_main_process:
        print(f"held-out negative log-likelihood: {found['held_out/loss']:.4f} nats per token")


@dataclass(frozen=True)
class Choice:
    """What decides the other options' defaults."""

    model: str | None = None
    """Folder or hub id of a pretrained model; None: a small one is made on the spot."""


def parse(args: list[str]) -> SFTConfig:
    choice, rest = tyro.cli(Choice, args=args, return_unknown_args=True, add_help=False)
    defaults = EMBEDDED if choice.model is None else PRETRAINED
    defaults = replace(defaults, source=replace(defaults.source, model=choice.model))
    return tyro.cli(tyro.conf.OmitArgPrefixes[SFTConfig], args=rest, default=defaults, description=__doc__)


if __name__ == "__main__":
    disable_progress_bar()  # transformers' own, which would break into ours
    set_verbosity_error()
    with reporting_errors():
        main(parse(sys.argv[1:]))
