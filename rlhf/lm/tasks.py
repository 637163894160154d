"""Prompts and answers: built-in arithmetic, GSM8K, reasoning-gym. A task is rows and the verifier of their answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import load_dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.checks import InputError, brief, check_range
from rlhf.lm.config import SourceConfig, check_used
from rlhf.lm.reasoning_tasks import reasoning_entries
from rlhf.lm.rewards import RewardFunction, Row
from rlhf.lm.rows import unended
from rlhf.lm.verifier_pool import VerifierPool
from rlhf.lm.verifiers import (
    exact_answer,
    math_answer,
    math_answer_without_limit,
    reasoning_gym_answer,
    reasoning_gym_full_marks,
)
from rlhf.run.seeding import generator_for

TASKS = ("arithmetic", "gsm8k", "reasoning_gym")
# Options that every task heeds (data in that it is refused), and those of each.
_EVERY = {"task", "model", "data", "critic_from", "drop_long_prompts"}
_ASKED = {
    "instruction",
    "plain_prompts",
    "verifier_workers",
    "verifier_timeout",
    "verifier_memory_mb",
    "verifier_strict",
}
_OF_TASK = {"arithmetic": set[str](), "gsm8k": _ASKED, "reasoning_gym": _ASKED | {"task_options", "partial_credit"}}
BOXED = "Think step by step, then give the final answer as \\boxed{number}."
TAGGED = (
    "Think step by step, then give the final answer between <answer> and </answer>."  # as reasoning-gym asks for it
)


@dataclass(frozen=True)
class Task:
    """Rows with a "prompt" (text, ready for the tokenizer) and whatever columns the verifier reads."""

    name: str
    train: Sequence[Row]
    held_out: Sequence[Row]
    verifier: RewardFunction  # 1.0 right, 0.0 wrong, where the metric is accuracy
    metric: str = "accuracy"  # what the verifier's mean on held-out prompts is called; another name is no percentage
    add_special_tokens: bool = True  # False where the prompt's text holds them already, as a chat template's does


def load_task(source: SourceConfig, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The task that the source names.

    Args:
        source: task (one of TASKS), data and what else concerns them.
        tokenizer: its chat template renders questions put to a pretrained model.
    Raises:
        InputError: unknown task, missing or unreadable data, a row without a needed column, no chat template.
    """
    name, data = source.task, source.data
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    check_used(source, _EVERY | _OF_TASK[name], by=f"task {name!r}")
    if name == "gsm8k":
        return gsm8k(
            data,
            tokenizer,
            plain_prompts=source.plain_prompts,
            verifier=math_verifier(source),
            instruction=source.instruction,
        )
    if name == "reasoning_gym":
        return reasoning_gym(source, tokenizer)
    if data is not None:
        raise InputError(f"task 'arithmetic' makes its own problems and takes no data, got {data!r}")
    return arithmetic()


def arithmetic(*, digits: int = 3, train: int = 20_000, held_out: int = 512) -> Task:
    """Addition of two numbers of `digits` digits; the answer is written units first, the way carries travel.

    The problems are the same whatever the run's seed; the held-out ones are never trained on.

    Raises:
        InputError: there are not as many problems.
    """
    check_range("digits", digits, low=1)
    count = 9 * 10 ** (digits - 1)
    if train + held_out > count * count:
        raise InputError(
            f"there are {count * count} additions of {digits}-digit numbers, fewer than train + held_out = {train} + "
            f"{held_out}: ask for fewer, or for more digits"
        )
    pairs = torch.randperm(count * count, generator=generator_for(0, "problems"))[: train + held_out].tolist()
    lowest = 10 ** (digits - 1)
    rows = [addition_row(lowest + pair // count, lowest + pair % count) for pair in pairs]
    return Task("arithmetic", rows[held_out:], rows[:held_out], exact_answer)


def addition_row(a: int, b: int) -> Row:
    """{"prompt": "107+195=", "answer": "203"} for 302: the answer's digits are reversed."""
    return {"prompt": f"{a}+{b}=", "answer": str(a + b)[::-1]}


def math_verifier(source: SourceConfig | None = None) -> RewardFunction:
    """`math_answer` in worker processes that can be killed; with verifier_workers=0 in this one."""
    source = SourceConfig() if source is None else source
    if source.verifier_workers == 0:
        return math_answer
    return _pool(source, math_answer_without_limit, "math_verify", "math_answer")


def _pool(source: SourceConfig, verifier: RewardFunction, package: str, name: str) -> VerifierPool:
    return VerifierPool(
        verifier,
        workers=source.verifier_workers,
        timeout=source.verifier_timeout,
        memory_mb=source.verifier_memory_mb,
        strict=source.verifier_strict,
        preload=[package],
        name=name,
    )


def gsm8k(
    data: str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    plain_prompts: bool = False,
    verifier: RewardFunction | None = None,
    instruction: str | None = None,
) -> Task:
    """Grade-school word problems (Cobbe et al. 2021, arXiv:2110.14168); answers checked by math-verify."""
    if data is None:
        raise InputError("task 'gsm8k' needs --data: a folder with train.jsonl and test.jsonl, or a hub id")
    render = _renderer(tokenizer, plain_prompts, BOXED, instruction)
    train, test = _load_splits(data)
    return Task(
        "gsm8k",
        _gsm8k_rows(train, "train", render),
        _gsm8k_rows(test, "test", render),
        math_verifier() if verifier is None else verifier,
        add_special_tokens=plain_prompts,
    )


def reasoning_gym(source: SourceConfig, tokenizer: PreTrainedTokenizerBase) -> Task:
    """A task of reasoning-gym, judged by its own scorer: full marks alone count, or all of them with partial_credit."""
    verifier, metric = reasoning_gym_full_marks, "accuracy"
    if source.partial_credit:
        verifier, metric = reasoning_gym_answer, "score"
    render = _renderer(tokenizer, source.plain_prompts, TAGGED, source.instruction)
    train, held_out = (
        [
            {"prompt": render(entry["question"]), "answer": entry["answer"], "metadata": entry["metadata"]}
            for entry in entries
        ]
        for entries in reasoning_entries(source.data, source.task_options)
    )
    pooled = source.verifier_workers > 0
    return Task(
        f"reasoning_gym: {source.data}",
        train,
        held_out,
        _pool(source, verifier, "reasoning_gym", verifier.__name__) if pooled else verifier,
        metric,
        add_special_tokens=source.plain_prompts,
    )


def _load_splits(data: str) -> tuple[list[Row], list[Row]]:
    folder = Path(data)
    looks_local = folder.exists() or data.startswith((".", "/", "~"))
    files = {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")}
    for file in files.values():
        if looks_local and not Path(file).is_file():
            raise InputError(
                f"data file {file} does not exist: --data must be a folder with train.jsonl and test.jsonl"
            )
    try:
        splits = load_dataset("json", data_files=files) if looks_local else load_dataset(data, "main")
        return list(splits["train"]), list(splits["test"])
    except Exception as error:  # datasets raises its own, pyarrow's, the network's and builtin errors alike
        raise InputError(
            f"the data at {data!r} could not be read ({brief(error)}): give a folder whose train.jsonl and test.jsonl "
            'hold one JSON object {"question": ..., "answer": ...} a line, or a hub id'
        ) from error


def _gsm8k_rows(split: list[Row], name: str, render: Callable[[str], str]) -> list[Row]:
    rows = []
    for number, row in enumerate(split, start=1):
        for column in ("question", "answer"):
            if not isinstance(row.get(column), str):
                raise InputError(
                    f"row {number} of {name} has no text in column {column!r}, got {row.get(column)!r}: every "
                    "row needs 'question' and 'answer'"
                )
        answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
        if "####" not in row["answer"] or not answer:
            raise InputError(
                f"row {number} of {name}: 'answer' must end in '#### <number>', got {row['answer'][-40:]!r}"
            )
        rows.append({"prompt": render(row["question"]), "answer": answer})
    if not rows:
        raise InputError(f"{name} holds no rows")
    return rows


def _renderer(
    tokenizer: PreTrainedTokenizerBase, plain: bool, default: str, instruction: str | None
) -> Callable[[str], str]:
    """question -> prompt: through the chat template with the instruction (`default` if None), or plain.

    Raises:
        InputError: there is no chat template.
    """
    if not plain and tokenizer.chat_template is None:
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, which an instruction-tuned model needs "
            "for its prompts: use a model that has one, or pass --plain-prompts to ask in plain text"
        )

    def render(question: str) -> str:
        if plain:
            asked = question if instruction is None else f"{question}\n{instruction}"
            return f"Question: {asked}\nAnswer:"
        text = f"{question}\n{default if instruction is None else instruction}".rstrip()
        messages = [{"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    return render


def tokenize_prompts(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    drop_long: bool = False,
    add_special_tokens: bool = True,
) -> tuple[list[Row], list[list[int]]]:
    """The rows and their prompts' token ids; with `drop_long` without those longer than max_prompt_tokens.

    Raises:
        InputError: a prompt is empty, or too long and not to be dropped; or all are dropped.
    """
    for number, row in enumerate(rows, start=1):
        prompt = row.get("prompt")
        if not isinstance(prompt, str):
            raise InputError(
                f"row {number} must have a column prompt with text, got {type(prompt).__name__}: render messages first"
                ", with the tokenizer's apply_chat_template, and say Task(add_special_tokens=False)"
            )
    token_ids = unended([row["prompt"] for row in rows], tokenizer, add_special_tokens=add_special_tokens)
    lengths = [len(ids) for ids in token_ids]
    if min(lengths) == 0:
        raise InputError(f"row {lengths.index(0) + 1} has an empty prompt: the model needs a token to start from")
    fits = [length <= max_prompt_tokens for length in lengths]
    too_long, longest = len(rows) - sum(fits), max(lengths)
    if too_long and (not drop_long or too_long == len(rows)):
        raise InputError(
            f"{too_long} of {len(rows)} prompts are longer than max_prompt_tokens = {max_prompt_tokens}; the longest, "
            f"row {lengths.index(longest) + 1}, has {longest} tokens: pass --max-prompt-tokens {longest}"
            + ("; without them none is left" if drop_long else ", or --drop-long-prompts to leave them out")
        )
    if too_long:
        print(f"{too_long} of {len(rows)} prompts are longer than {max_prompt_tokens} tokens and left out")
    return [row for row, fit in zip(rows, fits, strict=True) if fit], [
        ids for ids, fit in zip(token_ids, fits, strict=True) if fit
    ]


def pad_left(
    token_ids: Sequence[Sequence[int]], *, width: int, pad_token_id: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """[B, width] int64 ids and [B, width] bool mask, each row's tokens at its right end."""
    padding = [width - len(ids) for ids in token_ids]
    ids = [[pad_token_id] * pad + list(row) for pad, row in zip(padding, token_ids, strict=True)]
    mask = [[False] * pad + [True] * len(row) for pad, row in zip(padding, token_ids, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
