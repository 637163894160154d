"""Which answers the verifiers find right, and what they may not cost."""

import subprocess
import sys
import time
import types
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.lm import verifiers
from rlhf.lm.verifiers import (
    FormatMatch,
    arguments_for,
    as_score,
    exact_answer,
    math_answer,
    math_answer_without_limit,
    numeric_answer,
    reasoning_gym_answer,
)


@pytest.mark.parametrize(
    ("completion", "right"), [("202", 1.0), (" 202\n", 1.0), ("2020", 0.0), ("", 0.0), ("2 02", 0)]
)
def test_exact_answer(completion: str, right: float) -> None:
    assert exact_answer(["107+95="], [completion], answer=["202"]) == [right]


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("So the total is \\boxed{72}.", "72", 1.0),
        ("The answer is 72.", "72", 1.0),
        ("48/2 = 24 and 48 + 24 = 72", "72", 1.0),
        ("#### 72", "72", 1.0),
        ("72.0", "72", 1.0),
        ("\\boxed{1,234}", "1234", 1.0),
        ("It costs $1,234.", "1234", 1.0),
        ("\\boxed{\\$18}", "18", 1.0),
        ("18 dollars", "18", 1.0),
        ("\\boxed{18\\text{ dollars}}", "18", 1.0),
        ("\\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("1/2", "0.5", 1.0),
        ("\\boxed{50\\%}", "50", 1.0),
        ("\\boxed{-5}", "-5", 1.0),
        ("She has \\boxed{72} apples!", "72", 1.0),
        ("Great question! First, 48/2 = 24. The answer is 72.", "72", 1.0),
        ("x " * 1000 + "\\boxed{72}", "72", 1.0),
        ("\\boxed{72}", "71", 0.0),
        ("\\boxed{5}", "-5", 0.0),
        ("\\boxed{720}", "72", 0.0),
        ("first 72, but no: \\boxed{71}", "72", 0.0),
        ("\\boxed{}", "72", 0.0),
        ("", "72", 0.0),
        ("no idea", "72", 0.0),
        ("nan", "72", 0.0),
        ("\\boxed{\\infty}", "72", 0.0),
    ],
)
def test_math_answer(completion: str, answer: str, right: float) -> None:
    assert math_answer(["q"], [completion], answer=[answer]) == [right]


@pytest.mark.parametrize(
    "completion",
    [
        "\\boxed{9^{9^{9^9}}}",
        "\\boxed{9^{9^9}^{9}}",
        "9**9**9**9",
        "\\boxed{10^{99999999}}",
        "\\boxed{10^{ {99999999}}}",
        "\\boxed{10^{+99999999}}",
        "\\boxed{2^{-9999999999}}",
        "\\boxed{9^{9\\cdot 9\\cdot 9\\cdot 9\\cdot 9\\cdot 9\\cdot 9\\cdot 9}}",
        "\\boxed{(x+y+z)^{999}}",
        "\\boxed{99999999!}",
        "\\boxed{" + "9" * 5000 + "}",
        "{" * 5000,
        "(" * 5000,
        "\\frac{" * 1000,
    ],
    ids=lambda text: text[:25],
)
def test_hostile_answers_are_wrong_and_cost_nothing(completion: str) -> None:
    math_answer(["q"], ["1"], answer=["1"])  # loads sympy
    started = time.perf_counter()
    assert math_answer(["q"], [completion], answer=["72"]) == [0.0]
    assert time.perf_counter() - started < 2


def test_verdicts_are_one_per_completion_in_order() -> None:
    completions = ["\\boxed{1}", "9^{9^{9^9}}", "\\boxed{3}", "4"]
    assert math_answer(["q"] * 4, completions, answer=["1", "2", "3", "5"]) == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "completion",
    [
        "So the total is **18** dollars. \\boxed{18}",
        "**Answer: 18**",
        "The answer is 18!",
        "In all there are 18! \\boxed{18}",
        "**Step 1**: 9 * 2 = 18\nThe final answer is $\\boxed{18}$.",
        "\\boxed{18}" + " That is how many eggs are sold." * 30,
    ],
)
def test_prose_around_the_answer_does_not_make_it_wrong(completion: str) -> None:
    assert math_answer(["q"], [completion], answer=["18"]) == [1.0]


def test_without_its_time_limit_math_answer_judges_the_same() -> None:
    completions = ["\\boxed{72}", "72.0", "71", "", "9^{9^{9^9}}", "It costs $72!", "(" * 500]
    columns = {"prompts": ["q"] * 7, "completions": completions, "answer": ["72"] * 7}
    assert math_answer_without_limit(**columns) == math_answer(**columns) == [1, 1, 0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("The answer is 72.", "72", 1.0),
        ("first 71, then 72", "72", 1.0),
        ("72, no: 71", "72", 0.0),
        ("1,234,567.50", "1234567.5", 1.0),
        ("-5", "5", 0.0),
        ("-5", "-5", 1.0),
        ("10-5", "5", 1.0),  # a minus between numbers is no sign
        ("x = .5", "0.5", 1.0),
        ("1e3", "1000", 1.0),
        ("1e999", "1000", 0.0),
        ("1000001", "1000000", 1.0),  # up to a millionth
        ("1000002", "1000000", 0.0),
        ("0", "0", 1.0),
        ("0.0000001", "0", 0.0),
        ("no idea", "0", 0.0),
        ("", "72", 0.0),
        ("72", 72, 1.0),  # the column may hold numbers
        ("9" * 5000, "9", 0.0),
        ("-+," * 1000, "9", 0.0),
    ],
)
def test_numeric_answer(completion: str, answer: Any, right: float) -> None:
    assert numeric_answer(["q"], [completion], answer=[answer]) == [right]


def test_format_match_is_of_the_whole_completion() -> None:
    matches = FormatMatch(r"<think>.*</think>\s*<answer>\d+</answer>")
    good = "<think>so\nit is</think>\n<answer>72</answer>"
    assert matches(["q"] * 3, [good, good + " and more", "72"]) == [1.0, 0.0, 0.0]
    assert matches.__name__ == "format"


class HalfForTrying:
    """A task of reasoning-gym, as far as the verifier looks."""

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        return 1.0 if answer == entry["answer"] else 0.5 if entry["metadata"]["difficulty"] > 1 else 0.0


def test_reasoning_gym_scores_through_the_tasks_own_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    factory = types.ModuleType("reasoning_gym.factory")
    asked: list[Any] = []
    factory.create_dataset = lambda name, **options: asked.append((name, options)) or HalfForTrying()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reasoning_gym", types.ModuleType("reasoning_gym"))
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    verifiers._reasoning_gym_scorer.cache_clear()
    metadata = [{"source_dataset": "gcd", "difficulty": level, "task_options": {"b": 1}} for level in (1, 1, 2, 1)]
    completions = ["It is <answer>3</answer>, no, <answer> 4\n</answer>", " 4 ", "5", "<answer>5</answer>"]
    found = reasoning_gym_answer(["q"] * 4, completions, answer=["4"] * 4, metadata=metadata, level=[0] * 4)
    verifiers._reasoning_gym_scorer.cache_clear()
    assert found == [1.0, 1.0, 0.5, 0.0]
    assert asked == [("gcd", {"b": 1})]


def test_reasoning_gym_itself() -> None:
    gym = pytest.importorskip("reasoning_gym")
    entries = list(gym.create_dataset("gcd", size=3, seed=0))
    columns = {key: [entry[key] for entry in entries] for key in ("answer", "metadata")}
    right = [f"<answer>{entry['answer']}</answer>" for entry in entries]
    assert reasoning_gym_answer(["q"] * 3, right, **columns) == [1.0] * 3
    assert max(reasoning_gym_answer(["q"] * 3, ["<answer>-1</answer>"] * 3, **columns)) < 1.0


def test_the_verifiers_load_no_torch() -> None:
    """Nor does what a worker runs; a worker would take seconds and hundreds of megabytes otherwise."""
    code = (
        "import sys, rlhf.lm.verifiers, rlhf.lm.verifier_worker; "
        "print(*{'torch', 'transformers', 'numpy', 'math_verify'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize("value", [1, 1.0, True, np.float32(1), np.int64(1), torch.tensor(1.0), torch.tensor([1.0])[0]])
def test_a_score_is_any_finite_number(value: Any) -> None:
    assert as_score(value) == 1.0


@pytest.mark.parametrize("value", ["1.0", None, 1j, float("nan"), float("inf"), 1e39, 10**400, [1.0], torch.ones(2)])
def test_what_is_no_score(value: Any) -> None:
    with pytest.raises(ValueError, match="finite number"):
        as_score(value)


def test_a_function_gets_what_it_names() -> None:
    given = {"prompts": 1, "completions": 2, "answer": 3}
    assert arguments_for(lambda completions: None, given) == {"completions": 2}
    assert arguments_for(lambda completions, **rest: None, given) == given
    assert arguments_for(lambda answer, *, prompts, level=4: None, given) == {"answer": 3, "prompts": 1}
    assert arguments_for(exact_answer, given) == given
    assert arguments_for(FormatMatch("x"), given) == given
    for needy in (lambda samples: None, lambda prompts, *, gold: None, lambda prompts, /: None):
        with pytest.raises(TypeError, match=r"needs (samples|gold|prompts), .* only prompts, completions, answer"):
            arguments_for(needy, given)
