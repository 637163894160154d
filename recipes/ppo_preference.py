"""PPO with four models: actor and reference from supervised fine-tuning, a learned reward, a critic made from it.

    accelerate launch recipes/ppo_preference.py                 # after recipes/sft.py and recipes/reward_model.py
    accelerate launch recipes/ppo_preference.py --data <file, folder or hub id> --model <...> --reward-model <...>

Every option and its default: python recipes/ppo_preference.py --help, or the same with --data for data of your own.
What each option does, and where it comes from: docs/rlhf.md.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from rlhf.algorithm import AlgorithmConfig, CriticKind
from rlhf.checks import InputError
from rlhf.lm import embedded_preferences as embedded
from rlhf.lm.config import OptimizationConfig, RunConfig, SamplingConfig, SourceConfig, TrainerConfig, check_used
from rlhf.lm.data import load_prompt_task
from rlhf.lm.models import load_actor, load_reward_model, load_tokenizer
from rlhf.lm.rewards import RewardModel
from rlhf.lm.tasks import Task
from rlhf.lm.trainer import Trainer
from rlhf.lm.trunk_reward import RewardOnTrunk, is_adapter
from rlhf.run import reporting_errors

SFT, REWARD_MODEL = "runs/sft/final", "runs/reward_model/final"  # where the other two recipes leave their models
SOURCE = SourceConfig(model=SFT, task="preference", reward_model=REWARD_MODEL, critic_from=REWARD_MODEL)
PPO = AlgorithmConfig(
    kl_reward_coef=0.1,
    kl_target=6.0,
    kl_horizon=5_000,
    normalize_scores=True,
    score_clip=5.0,
    missing_eos_penalty=1.0,
)

# Without --data: the small model of recipes/sft.py.
EMBEDDED = TrainerConfig(
    source=SOURCE,
    sampling=SamplingConfig(max_prompt_tokens=16, max_new_tokens=32),
    algorithm=PPO,
    optimization=OptimizationConfig(
        steps=80,
        prompts_per_step=128,
        samples_per_prompt=1,
        epochs=2,
        minibatches=2,
        learning_rate=1e-3,
        adam_epsilon=1e-5,
    ),
    run=RunConfig(run_dir=Path("runs/ppo_preference"), eval_every=10, eval_prompts=128),
)

# With --data.
PRETRAINED = TrainerConfig(
    source=SOURCE,
    sampling=SamplingConfig(max_prompt_tokens=512, max_new_tokens=128, generation_batch_size=64),
    algorithm=replace(PPO, kl_reward_coef=0.05, kl_horizon=10_000),
    optimization=OptimizationConfig(
        steps=200,
        prompts_per_step=128,
        samples_per_prompt=1,
        epochs=1,
        minibatches=4,
        learning_rate=1e-6,
        critic_learning_rate=5e-6,
        adam_epsilon=1e-5,
    ),
    run=RunConfig(run_dir=Path("runs/ppo_preference"), eval_prompts=128),
)


def main(config: TrainerConfig) -> None:
    source = config.source
    used = {"task", "model", "reward_model", "critic_from", "drop_long_prompts"}
    if source.data is not None:
        used |= {"data", "data_name", "train_split", "test_split", "plain_prompts"}
    check_used(source, used, by="this recipe" if source.data else "this recipe without --data")
    if source.task != SOURCE.task:
        raise InputError(f"--task {source.task!r} does nothing in this recipe: leave it out")
    for path, recipe in ((SFT, "sft"), (REWARD_MODEL, "reward_model")):
        if path in (source.model, source.reward_model, source.critic_from) and not Path(path).exists():
            raise InputError(f"{path} is not there: run recipes/{recipe}.py first, or name your own models")
    if source.model is None or source.reward_model is None:
        raise InputError("there must be a --model and a --reward-model")
    model, reward_tokenizer = source.model, load_tokenizer(source.reward_model)
    tokenizer = load_tokenizer(model)
    if is_adapter(source.reward_model) and config.adapter.lora_rank:  # on the actor's own trunk
        reward = RewardModel(RewardOnTrunk(source.reward_model, model), reward_tokenizer)
    else:
        reward = RewardModel(load_reward_model(source.reward_model, reward_tokenizer), reward_tokenizer)
    task = prompts(config, tokenizer, reward)

    def make_actor() -> PreTrainedModel:
        return load_actor(model, adapter=config.adapter)

    Trainer(config, tokenizer=tokenizer, task=task, make_actor=make_actor, reward_functions=[reward]).train()


def prompts(config: TrainerConfig, tokenizer: PreTrainedTokenizerBase, reward: RewardModel) -> Task:
    """Prompts, and what is reported on held-out ones: the hidden rule where there is one, else the reward model."""
    if config.source.data is None:
        embedded.check_vocabulary(tokenizer, str(config.source.model))
        return embedded.task()
    return load_prompt_task(config.source, tokenizer, verifier=reward)


@dataclass(frozen=True)
class Choice:
    """What decides the other options' defaults."""

    data: str | None = None
    """A .jsonl, .json or .parquet file, a folder of them, or a hub id; None: made up on the spot."""
    reward_model: str = REWARD_MODEL
    """A separate critic starts from it too, unless it is an adapter."""
    critic: CriticKind = "separate"
    """separate, shared or none."""


def parse(args: list[str]) -> TrainerConfig:
    choice, rest = tyro.cli(Choice, args=args, return_unknown_args=True, add_help=False)
    defaults = EMBEDDED if choice.data is None else PRETRAINED
    starts_from_it = choice.critic == "separate" and not is_adapter(choice.reward_model)
    critic_from = choice.reward_model if starts_from_it else None
    source = replace(SOURCE, data=choice.data, reward_model=choice.reward_model, critic_from=critic_from)
    defaults = replace(defaults, source=source)
    if choice.critic == "none":
        defaults = replace(defaults, optimization=replace(defaults.optimization, critic_learning_rate=None))
    rest = [*rest, "--critic", choice.critic]
    return tyro.cli(tyro.conf.OmitArgPrefixes[TrainerConfig], args=rest, default=defaults, description=__doc__)


if __name__ == "__main__":
    disable_progress_bar()  # transformers' own, which would break into ours
    set_verbosity_error()  # a new head is not in the file it starts from, as it says at length
    with reporting_errors():
        main(parse(sys.argv[1:]))
