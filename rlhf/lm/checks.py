"""Checks that span arguments, before any long work: processes, rewards, context length, resuming."""

import os
import sys
from collections.abc import Sequence

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.checks import InputError
from rlhf.lm.config import SamplingConfig, TrainerConfig
from rlhf.lm.rewards import RewardFunction, name_of, score
from rlhf.lm.rollout import OVERLONG, PromptSet
from rlhf.lm.tasks import Task
from rlhf.lm.verifier_pool import VerifierPool

ON_CPU = "ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes 2 ..."

# What a resumed run may change: where it is, what it reports, and how much memory it takes (results then agree up to
# rounding, no longer bit for bit).
MAY_CHANGE = {"run_dir", "eval_every", "eval_prompts", "checkpoint_every", "keep_checkpoints", "samples_per_log"} | {
    "log_with",
    "push_to_hub",
    "engine",
    "generation_batch_size",
    "micro_batch_tokens",
    "share_prompts",
    "gradient_checkpointing",
    "compile",
    "verifier_workers",
}


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
    probe = list(task.train[:2])
    completions = ["", "0"][: len(probe)]
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in completions]
    score(functions, probe, completions, weights=weights, completion_ids=ids)
    if task.verifier not in functions:
        score([task.verifier], probe, completions, completion_ids=ids)
    for function in (*functions, task.verifier):
        if isinstance(function, VerifierPool) and sum(function.take_counts().values()) >= len(probe):
            raise InputError(f"nothing could be judged on a first try: {function.last_fault}")


def check_context(actor: PreTrainedModel, train: PromptSet, held_out: PromptSet, sampling: SamplingConfig) -> None:
    """The longest prompt and max_new_tokens fit the positions the model knows.

    Raises:
        InputError: they do not.
    """
    longest = max(len(ids) for prompts in (train, held_out) for ids in prompts.token_ids)
    limit = getattr(actor.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest >= limit:
        raise InputError(
            f"the longest prompt has {longest} tokens, as many as the model's {limit} positions or more: pass "
            f"--drop-long-prompts and a --max-prompt-tokens below {limit} that leaves room for completions"
        )
    if limit is not None and longest + sampling.max_new_tokens > limit:
        raise InputError(
            f"the longest prompt has {longest} tokens and max_new_tokens is {sampling.max_new_tokens}, together more "
            f"than the model's {limit} positions: pass --max-new-tokens {limit - longest} or less"
        )
