"""Verifiers: what a completion's answer is worth. No torch here: worker processes import this module and stay light.

Each is a reward function, `(prompts, completions, **columns) -> one score per completion`, and can run in this process
or in a `rlhf.lm.verifier_pool.VerifierPool`.
"""

import inspect
import json
import logging
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from numbers import Real
from typing import Any

_FLOAT32_MAX = 3.4028234663852886e38


def name_of(function: Callable[..., Any]) -> str:
    """What a reward function is called in metrics and errors."""
    return str(getattr(function, "__name__", type(function).__name__))


def arguments_for(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the function names, or all where it takes `**columns`.

    Raises:
        TypeError: the function needs one that is not given.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a builtin's signature cannot always be read
        return dict(given)
    missing = [
        p.name
        for p in parameters
        if p.default is p.empty
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and (p.kind == p.POSITIONAL_ONLY or p.name not in given)
    ]
    if missing:
        raise TypeError(f"it needs {', '.join(missing)}, and there is by name only {', '.join(given)}")
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        return dict(given)
    return {p.name: given[p.name] for p in parameters if p.name in given and p.kind != p.VAR_POSITIONAL}


def as_score(value: Any) -> float:
    """The number as float; of tensors and numpy values too.

    Raises:
        ValueError: it is no number, or not finite in float32.
    """
    number: Any = value.tolist() if hasattr(value, "tolist") else value
    with suppress(OverflowError):  # of an integer
        if isinstance(number, Real) and abs(float(number)) <= _FLOAT32_MAX:
            return float(number)
    raise ValueError("no finite number")


def exact_answer(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1.0 where the completion, stripped, is the answer to the letter, else 0.0."""
    return [float(completion.strip() == right) for completion, right in zip(completions, answer, strict=True)]


_NUMBER = re.compile(r"(?:(?<!\d)[-+])?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?<=\d)(?:[eE][-+]?\d{1,3})?")


def numeric_answer(prompts: list[str], completions: list[str], answer: list[Any], **_: Any) -> list[float]:
    """1.0 where the completion's last number is the answer, up to 1e-6 of it, else 0.0. "1,234.50" is one number."""
    scores = []
    for completion, right in zip(completions, answer, strict=True):
        target = float(str(right).replace(",", ""))
        found = [match[0] for match in _NUMBER.finditer(completion[-_LONGEST_ANSWER:]) if match[0]]
        value = float(found[-1].replace(",", "")) if found else float("nan")
        scores.append(float(abs(value - target) <= 1e-6 * abs(target)))
    return scores


@dataclass(frozen=True)
class FormatMatch:
    """1.0 where the whole completion matches the regular expression (`.` matches line ends too), else 0.0.

    A pattern with nested repeats, such as (a+)+, can take ages: run it in a `VerifierPool`.
    """

    pattern: str

    @property
    def __name__(self) -> str:
        return "format"

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [float(re.fullmatch(self.pattern, text, re.DOTALL) is not None) for text in completions]


def reasoning_gym_answer(
    prompts: list[str], completions: list[str], answer: list[Any], metadata: list[dict[str, Any]], **columns: Any
) -> list[float]:
    """The score in [0, 1] that the task of reasoning-gym gives to its answer.

    Rows are its entries: "answer" and "metadata", whose "source_dataset" names the task, and "task_options", if it is
    there, how the task was configured. The completion's answer is
    what the last <answer>...</answer> holds, or the last \\boxed{...}; without one it is the last number where the
    right answer is one, else the whole completion, stripped.
    """
    scores = []
    for number, completion in enumerate(completions):
        others = {key: values[number] for key, values in columns.items()}
        entry = {**others, "answer": answer[number], "metadata": metadata[number]}
        text = _reasoning_gym_text(completion, answer[number])
        options = json.dumps(metadata[number].get("task_options", {}), sort_keys=True)
        scorer = _reasoning_gym_scorer(metadata[number]["source_dataset"], options)
        scores.append(as_score(scorer(text, entry)))
    return scores


def _reasoning_gym_text(completion: str, right: Any) -> str:
    for marked in (r"<answer>(.*?)</answer>", r"\\boxed\{([^{}]*)\}"):
        found = re.findall(marked, completion, re.DOTALL)
        if found:
            return str(found[-1]).strip()
    if _NUMBER.fullmatch(str(right)):
        found = [match[0] for match in _NUMBER.finditer(completion[-_LONGEST_ANSWER:]) if match[0]]
        return found[-1] if found else ""
    return completion.strip()


def reasoning_gym_full_marks(
    prompts: list[str], completions: list[str], answer: list[Any], metadata: list[dict[str, Any]], **columns: Any
) -> list[float]:
    """1.0 where `reasoning_gym_answer` is 1, else 0.0: many tasks give part of it to what holds the answer."""
    scores = reasoning_gym_answer(prompts, completions, answer, metadata, **columns)
    return [float(score >= 1.0) for score in scores]


@cache
def _reasoning_gym_scorer(name: str, options: str) -> Callable[[str, dict[str, Any]], float]:
    """options: a JSON object."""
    from reasoning_gym.factory import create_dataset  # its tasks load much: only who uses them should wait

    scorer: Callable[[str, dict[str, Any]], float] = create_dataset(name, **json.loads(options)).score_answer
    return scorer


# Parsing is a computer algebra system's work. What would keep it busy is refused before it begins: long numbers,
# factorials, exponents of more than two digits or that are no plain number or letter.
_LONGEST_ANSWER = 400  # characters
_DANGEROUS = re.compile(r"\d{40,}|\d\s*!|\^(?!\s*(\{\s*)?-?(\d{1,2}|[a-zA-Z])(?![\w^.]))|\)\s*\^\s*\{?\s*\d\d")
_EXCLAMATION = re.compile(r"!(?=[\s\"').*]|$)")


def math_answer(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1.0 where math-verify finds the completion's final answer equal to `answer`, else 0.0.

    The final answer is the last \\boxed{...}, or what math-verify finds in the last 400 characters. Main thread only:
    the time limit, a second each for parsing and comparing, is a signal's.
    """
    return _math_scores(completions, answer, seconds=1)


def math_answer_without_limit(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """`math_answer` without its time limit: for a pool, which ends from outside what takes too long."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that nothing limits it
    return _math_scores(completions, answer, seconds=None)


def _math_scores(completions: list[str], answer: list[str], seconds: int | None) -> list[float]:
    from math_verify import verify  # loads sympy: only a run on mathematics should pay that second

    scores = []
    for completion, right in zip(completions, answer, strict=True):
        text = final_answer(completion)
        parsed = [] if _DANGEROUS.search(text) else _parsed(text, seconds)
        scores.append(float(bool(parsed) and verify(_parsed(right, seconds), parsed, timeout_seconds=seconds)))
    return scores


@lru_cache(maxsize=1024)  # the right answer is that of all samples of a prompt, and short answers come often
def _parsed(text: str, seconds: int | None) -> list[Any]:
    from math_verify import parse

    return parse(text, parsing_timeout=seconds)


def final_answer(completion: str) -> str:
    """Where the answer stands, without the marks that prose puts around mathematics: **bold** and "18!"."""
    boxed = completion.rfind("\\boxed")
    text = completion[boxed:][:_LONGEST_ANSWER] if boxed >= 0 else completion[-_LONGEST_ANSWER:]
    return _EXCLAMATION.sub(".", text.replace("**", " "))
