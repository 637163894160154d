"""Checks that span arguments, before any long work: processes, rewards, context length, resuming."""

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.checks import InputError
from rlhf.lm.attention import check_rope, positions
from rlhf.lm.config import SamplingConfig, TrainerConfig
from rlhf.lm.lora import adapter_layers
from rlhf.lm.rewards import RewardFunction, RewardModel, name_of, score
from rlhf.lm.rollout import OVERLONG
from rlhf.lm.tasks import Task
from rlhf.lm.verifier_pool import VerifierPool

ON_CPU = "ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes 2 ..."

# What a resumed run may change: where it is, what it reports, and how much memory it takes (results then agree up to
# rounding, no longer bit for bit).
MAY_CHANGE = {"run_dir", "eval_every", "eval_prompts", "checkpoint_every", "keep_checkpoints", "samples_per_log"} | {
    "log_with",
    "push_to_hub",
    "engine",
    "cuda_graphs",
    "generation_batch_size",
    "micro_batch_tokens",
    "share_prompts",
    "gradient_checkpointing",
    "compile",
    "verifier_workers",
}


def check_arguments(tokenizer: object, make_actor: object, reward_functions: object) -> None:
    """What `Trainer` was given has the right form.

    Raises:
        InputError: it has not.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(
            f"tokenizer must be one of transformers', got {type(tokenizer).__name__}: AutoTokenizer loads it"
        )
    if not callable(make_actor) or isinstance(make_actor, PreTrainedModel):
        raise InputError(f"make_actor must be a function that builds the model, got {type(make_actor).__name__}")
    if reward_functions is not None and not isinstance(reward_functions, Sequence):
        raise InputError(f"reward_functions must be a list, got {type(reward_functions).__name__}: put it into one")


def check_vocabulary(actor: PreTrainedModel, tokens: Iterable[Sequence[int]]) -> None:
    """
    Raises:
        InputError: some text has a token that the model does not.
    """
    matrix: Any = actor.get_input_embeddings()
    size, highest = len(matrix.weight), max(max(ids, default=0) for ids in tokens)
    if highest >= size:
        raise InputError(
            f"the tokenizer made token {highest} of the data, and the model has {size}: give the model's own tokenizer"
            ", or resize the model's embeddings (resize_token_embeddings)"
        )


def check_processes(config: TrainerConfig, accelerator: Accelerator) -> None:
    """The launcher started what accelerate sees, data parallel, and the prompts divide among the processes.

    Raises:
        InputError: they do not.
    """
    check_launch(accelerator)
    if accelerator.device.type == "mps":
        raise InputError("Apple's GPU has no float64, which sampling needs: give Accelerator(cpu=True)")
    seen = accelerator.num_processes
    if config.optimization.prompts_per_step % seen:
        raise InputError(
            f"prompts_per_step = {config.optimization.prompts_per_step} does not divide among {seen} processes: "
            f"make it a multiple of {seen}"
        )


def check_launch(accelerator: Accelerator) -> None:
    """The launcher started what accelerate sees, and every process holds the whole model.

    Raises:
        InputError: it is not so.
    """
    started, seen = int(os.environ.get("WORLD_SIZE", "1")), accelerator.num_processes
    if started != seen:
        raise InputError(
            f"{started} processes were launched but accelerate found no device for a group of them, so each would "
            f"train alone: without GPUs, launch with {ON_CPU}"
        )
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        print(
            "several processes were asked for, but accelerate's plain CPU launcher starts only one without MPI: this "
            f"run has one process; for more, launch with {ON_CPU}",
            file=sys.stderr,
        )
    if accelerator.distributed_type.value not in ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU"):
        raise InputError(
            f"distributed_type {accelerator.distributed_type.value} shards weights, which this trainer does not do: "
            "every process holds the whole model; choose multi-GPU or one process in `accelerate config`"
        )


def check_rewards(
    functions: Sequence[RewardFunction],
    weights: Sequence[float] | None,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Call the reward functions once, on two rows and made-up completions, so that a mistake shows before training.

    Raises:
        InputError: as `rewards.score`; there is no row, no reward function; or a pool's verifier judges nothing at all.
    """
    if not functions:
        raise InputError("there is no reward function: give at least one, or None for the task's verifier")
    if OVERLONG in map(name_of, functions):
        raise InputError(f"{OVERLONG!r} is the trainer's own penalty: give that reward function another __name__")
    if not task.train or not task.held_out:
        raise InputError(
            f"task {task.name!r} needs rows to train on and held-out rows, got {len(task.train)} and "
            f"{len(task.held_out)}"
        )
    for number, row in enumerate((*task.train, *task.held_out), start=1):
        if row.keys() != task.train[0].keys():
            raise InputError(
                f"all rows must have the same columns: the first has {sorted(task.train[0])}, row {number} (training "
                f"rows, then held-out ones) {sorted(row)}"
            )
    probe = list(task.train[:2])
    completions = ["", "0"][: len(probe)]
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in completions]
    score(functions, probe, completions, weights=weights, completion_ids=ids)
    if task.verifier not in functions:
        score([task.verifier], probe, completions, completion_ids=ids)
    for function in (*functions, task.verifier):
        if isinstance(function, VerifierPool) and sum(function.take_counts().values()) >= len(probe):
            raise InputError(f"nothing could be judged on a first try: {function.last_fault}")


def check_actor(actor: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: SamplingConfig) -> None:
    """A transformers model without adapters, that knows the prompts' tokens and whose positions hold the longest and
    max_new_tokens.

    Raises:
        InputError: it is not.
    """
    if not isinstance(actor, PreTrainedModel) or adapter_layers(actor):
        raise InputError(
            f"make_actor must return a transformers model without adapters, got {type(actor).__name__}: return the "
            "plain model and pass a lora_rank, or merge its adapters first (merge_and_unload())"
        )
    check_vocabulary(actor, prompts)
    limit, longest_prompt = positions(actor.config), max(map(len, prompts))
    if limit is not None and longest_prompt >= limit:
        raise InputError(
            f"the longest prompt has {longest_prompt} tokens, as many as the model's {limit} positions or more: pass "
            f"--drop-long-prompts and a --max-prompt-tokens below {limit} that leaves room for completions"
        )
    if limit is not None and longest_prompt + sampling.max_new_tokens > limit:
        raise InputError(
            f"the longest prompt has {longest_prompt} tokens and max_new_tokens is {sampling.max_new_tokens}, together "
            f"more than the model's {limit} positions: pass --max-new-tokens {limit - longest_prompt} or less"
        )
    check_rope(actor.config, longest_prompt + sampling.max_new_tokens)


def check_other_models(
    config: TrainerConfig, functions: Sequence[RewardFunction], tokenizer: PreTrainedTokenizerBase, longest_prompt: int
) -> None:
    """What reads the actor's sequences beside it, as far as it can be told before anything is built.

    Raises:
        InputError: see below.
    """
    tokens = longest_prompt + config.sampling.max_new_tokens
    _check_reward_models(functions, tokenizer, tokens)
    if config.source.critic_from is not None:
        _check_critic_source(config.source.critic_from, tokenizer, tokens)


def _check_critic_source(source: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> None:
    """A critic that starts from a model of its own reads the actor's tokens as the actor does, and as many.

    Args:
        source: folder or hub id. One without a config.json (a value head alone, or nothing) has nothing to compare.
        tokens: of the longest sequence.
    Raises:
        InputError: it does not.
    """
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError):
        return
    size, limit = config.get_text_config().vocab_size, positions(config)
    advice = "give a model of the actor's own family, or --critic-from None for a critic from the actor's trunk"
    if len(tokenizer) > size:
        raise InputError(
            f"the critic {source!r} knows {size} tokens, the actor's tokenizer has {len(tokenizer)}: {advice}"
        )
    if limit is not None and tokens > limit:
        raise InputError(
            f"the critic {source!r} knows {limit} positions, and sequences may have {tokens} tokens: pass a smaller "
            f"--max-new-tokens, or {advice}"
        )
    if Path(source).is_dir() and not (Path(source) / "tokenizer_config.json").is_file():
        return  # a run's critic/ folder
    try:
        theirs = {number: token for token, number in AutoTokenizer.from_pretrained(source).get_vocab().items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # it has none
    for token, number in tokenizer.get_vocab().items():
        if theirs.get(number, token) != token:
            raise InputError(
                f"the critic {source!r} reads token {number} as {theirs[number]!r}, the actor as {token!r}: {advice}"
            )


def _check_reward_models(functions: Sequence[RewardFunction], tokenizer: PreTrainedTokenizerBase, tokens: int) -> None:
    """Reward models with the actor's vocabulary have positions for the longest sequence. (Others say so when a text is
    too long.)

    Raises:
        InputError: one has not.
    """
    for function in functions:
        if isinstance(function, RewardModel) and isinstance(function.model, PreTrainedModel):
            limit, same = positions(function.model.config), function.tokenizer.get_vocab() == tokenizer.get_vocab()
            if same and limit is not None and tokens > limit:
                raise InputError(
                    f"the reward model knows {limit} positions, and prompt and completion may have {tokens} tokens: "
                    "pass a smaller --max-prompt-tokens with --drop-long-prompts, or a smaller --max-new-tokens"
                )
