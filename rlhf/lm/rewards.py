"""Reward functions, verifiers and reward models: completions to one score per sequence."""

import re
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.checks import InputError, brief, check_range

# (prompts, completions, **columns) -> one score per completion. Prompts and completions are plain text; every other
# column of the task's rows comes as a keyword, one value per completion.
RewardFunction = Callable[..., Sequence[float]]

Row = dict[str, Any]


class Scores(NamedTuple):
    """total [B] float32 (weighted sum) and each component [B] by name, unweighted."""

    total: Tensor
    components: dict[str, Tensor]


def score(
    functions: Sequence[RewardFunction],
    rows: Sequence[Row],
    completions: Sequence[str],
    *,
    weights: Sequence[float] | None = None,
) -> Scores:
    """Call each reward function on all completions.

    Args:
        functions: each `(prompts, completions, **columns) -> list of float`.
        rows: [B] the row each completion answers; its "prompt" is passed as `prompts`, the rest as columns.
        completions: [B] texts.
        weights: one per function; all 1 if None.
    Raises:
        InputError: a function raises, returns another number of scores, or one that is not a finite number.
    """
    weights = [1.0] * len(functions) if weights is None else weights
    if len(weights) != len(functions):
        raise InputError(f"there must be one weight per reward function, got {len(weights)} for {len(functions)}")
    for weight in weights:
        check_range("every reward weight", weight, low_open=True, high_open=True)
    names = rows[0].keys()
    for row in rows:
        if row.keys() != names:
            raise InputError(f"all rows must have the same columns, got {sorted(names)} and {sorted(row)}")
    columns = {key: [row[key] for row in rows] for key in names if key != "prompt"}
    prompts = [row["prompt"] for row in rows]
    components: dict[str, Tensor] = {}
    total = torch.zeros(len(rows))
    for function, weight in zip(functions, weights, strict=True):
        name = name_of(function)
        if name in components:
            raise InputError(f"two reward functions are named {name!r}: give one of them another __name__")
        components[name] = _checked(name, _called(name, function, prompts, completions, columns), completions)
        total += weight * components[name]
    return Scores(total, components)


def name_of(function: RewardFunction) -> str:
    """What a reward function is called in metrics and errors."""
    return getattr(function, "__name__", type(function).__name__)


def _called(
    name: str, function: RewardFunction, prompts: list[str], completions: Sequence[str], columns: dict[str, list[Any]]
) -> Any:
    try:
        return function(prompts=prompts, completions=list(completions), **columns)
    except Exception as error:
        raise InputError(
            f"reward function {name!r} raised {brief(error)}. It is called as {name}(prompts=[...], "
            f"completions=[...], {', '.join(f'{key}=[...]' for key in columns)}) and returns one number per completion"
        ) from error


def _checked(name: str, returned: Any, completions: Sequence[str]) -> Tensor:
    values = returned.tolist() if hasattr(returned, "tolist") else returned  # tensors, numpy arrays
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise InputError(
            f"reward function {name!r} returned {str(returned)[:80]}: it must return a list of numbers, one for each "
            "completion"
        )
    if len(values) != len(completions):
        raise InputError(f"reward function {name!r} returned {len(values)} scores for {len(completions)} completions")
    for value, completion in zip(values, completions, strict=True):
        if not _is_score(value):
            raise InputError(
                f"reward function {name!r} returned {value!r} for the completion {completion[:80]!r}: every score must "
                "be a finite number; return 0.0 for what cannot be judged"
            )
    return torch.tensor([float(value) for value in values])


def _is_score(value: Any) -> bool:
    is_number = isinstance(value, Real) or (isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex())
    return is_number and abs(float(value)) <= torch.finfo(torch.float32).max


class RewardModel:
    """A sequence classifier with one label as a reward function: its score of prompt + completion.

    Args:
        model: e.g. AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).
        tokenizer: the model's own; it need not be the actor's.
        batch_size: texts scored at once.
    """

    __name__ = "reward_model"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 64) -> None:
        if model.config.num_labels != 1:
            raise InputError(f"a reward model has num_labels=1, got {model.config.num_labels}")
        self.model = model.eval()
        self.model.config.pad_token_id = tokenizer.pad_token_id  # where the classifier looks for a text's last token
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        scores: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            part = texts[start : start + self.batch_size]
            # Padded on the right, tokens keep their positions: a score must not depend on the texts beside it.
            batch = self.tokenizer(part, padding=True, padding_side="right", return_tensors="pt")
            batch = {key: batch[key].to(self.model.device) for key in ("input_ids", "attention_mask")}
            scores += self.model(**batch).logits[:, 0].float().tolist()
        return scores


def exact_answer(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1.0 where the completion, stripped, is the answer to the letter, else 0.0."""
    return [float(completion.strip() == right) for completion, right in zip(completions, answer, strict=True)]


# Parsing is a computer algebra system's work. What would keep it busy is refused before it begins: long numbers,
# factorials, exponents of more than two digits or that are no plain number or letter.
_LONGEST_ANSWER = 400  # characters
_DANGEROUS = re.compile(r"\d{40,}|\d\s*!|\^(?!\s*(\{\s*)?-?(\d{1,2}|[a-zA-Z])(?![\w^.]))|\)\s*\^\s*\{?\s*\d\d")
_EXCLAMATION = re.compile(r"!(?=[\s\"').*]|$)")
_SECONDS = 1  # for parsing and for comparing, each


def math_answer(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1.0 where math-verify finds the completion's final answer equal to `answer`, else 0.0.

    The final answer is the last \\boxed{...}, or what math-verify finds in the last 400 characters. Main thread only:
    the time limit is a signal's.
    """
    from math_verify import parse, verify  # loads sympy: only a run on mathematics should pay that second

    scores = []
    for completion, right in zip(completions, answer, strict=True):
        text = final_answer(completion)
        parsed = [] if _DANGEROUS.search(text) else parse(text, parsing_timeout=_SECONDS)
        scores.append(float(bool(parsed) and verify(parse(right), parsed, timeout_seconds=_SECONDS)))
    return scores


def final_answer(completion: str) -> str:
    """Where the answer stands, without the marks that prose puts around mathematics: **bold** and "18!"."""
    boxed = completion.rfind("\\boxed")
    text = completion[boxed:][:_LONGEST_ANSWER] if boxed >= 0 else completion[-_LONGEST_ANSWER:]
    return _EXCLAMATION.sub(".", text.replace("**", " "))
