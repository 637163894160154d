"""A reward model from preferences (Bradley-Terry), with its accuracy and calibration on held-out pairs.

    accelerate launch recipes/reward_model.py                   # after recipes/sft.py: pairs of its descriptions
    accelerate launch recipes/reward_model.py --data <file, folder or hub id> --model <folder or hub id>

Every option and its default: python recipes/reward_model.py --help, or the same with --data for data of your own.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from rlhf.checks import InputError
from rlhf.lm import embedded_preferences as embedded
from rlhf.lm.config import FitRunConfig, check_used
from rlhf.lm.data import DataConfig, load_pairs, load_splits
from rlhf.lm.models import load_actor, load_tokenizer, new_reward_model
from rlhf.lm.reward_modeling import PairFitConfig, RewardModelingConfig, plot_reliability, reward_model_trainer
from rlhf.run import reporting_errors

SFT = "runs/sft/final"  # where recipes/sft.py leaves its model

# Without --data: what a judge with a hidden taste says of the small model's descriptions.
EMBEDDED = RewardModelingConfig(
    source=DataConfig(model=SFT),
    optimization=PairFitConfig(epochs=2, batch_size=64, micro_batch_size=64, learning_rate=1e-3),
    run=FitRunConfig(run_dir=Path("runs/reward_model"), eval_every=25, eval_prompts=1200),
)
PAIRS = 5000  # asked for; those of equal taste fall away

# With --data.
PRETRAINED = RewardModelingConfig(
    source=DataConfig(model=SFT),
    optimization=PairFitConfig(epochs=1, batch_size=64, micro_batch_size=8, learning_rate=1e-5),
    run=FitRunConfig(run_dir=Path("runs/reward_model"), eval_every=50, eval_prompts=512),
)


def main(config: RewardModelingConfig) -> None:
    source, seed = config.source, config.run.seed
    if source.data is None:
        check_used(source, {"model", "max_tokens"}, by="this recipe without --data")
    if source.model == SFT and not Path(SFT).exists():
        raise InputError(f"{SFT} is not there: run recipes/sft.py first, or pass --model <folder or hub id>")
    assert source.model is not None
    model = source.model
    tokenizer = load_tokenizer(model)
    if source.data is None:
        embedded.check_vocabulary(tokenizer, model)
        splits = embedded.sampled_preferences(
            load_actor(model).eval(), tokenizer, train=PAIRS, held_out=config.run.eval_prompts, seed=seed
        )
    else:
        splits = load_splits(source)
    train, held_out = load_pairs(splits, tokenizer, source)
    trainer = reward_model_trainer(
        config,
        tokenizer=tokenizer,
        train=train,
        held_out=held_out,
        make_model=lambda: new_reward_model(model, tokenizer, adapter=config.adapter),
    )
    found = trainer.train()
    if trainer.accelerator.is_main_process:
        plot_reliability(
            trainer.held_out_sums["reliability"], trainer.folder.plots / "reliability.png", str(config.run.run_dir)
        )
        print(
            f"held-out accuracy {found['held_out/accuracy']:.1%} of {len(trainer.held_out)} pairs, "
            f"expected calibration error {found['held_out/calibration_error']:.3f}"
        )


@dataclass(frozen=True)
class Choice:
    """What decides the other options' defaults."""

    data: str | None = None
    """A .jsonl, .json or .parquet file, a folder of them, or a hub id; None: made up on the spot."""


def parse(args: list[str]) -> RewardModelingConfig:
    choice, rest = tyro.cli(Choice, args=args, return_unknown_args=True, add_help=False)
    defaults = EMBEDDED if choice.data is None else PRETRAINED
    defaults = replace(defaults, source=replace(defaults.source, data=choice.data))
    return tyro.cli(tyro.conf.OmitArgPrefixes[RewardModelingConfig], args=rest, default=defaults, description=__doc__)


if __name__ == "__main__":
    disable_progress_bar()  # transformers' own, which would break into ours
    set_verbosity_error()  # a new head is not in the file it starts from, as it says at length
    with reporting_errors():
        main(parse(sys.argv[1:]))
