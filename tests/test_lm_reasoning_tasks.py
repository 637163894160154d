"""Tasks of reasoning-gym: who trains on what, who judges it, and one error where something is not there."""

import sys
import types
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any

import pytest
from test_lm_tasks import with_template
from tiny import tokenizer

from rlhf.checks import InputError
from rlhf.lm.config import SourceConfig
from rlhf.lm.reasoning_tasks import reasoning_entries
from rlhf.lm.tasks import load_task
from rlhf.lm.verifier_pool import VerifierPool
from rlhf.lm.verifiers import reasoning_gym_full_marks


@dataclass
class SquareConfig:
    largest: int = 50
    signed: bool = False
    seed: int | None = None
    size: int = 500


def squares(largest: int, signed: bool, seed: int, size: int) -> list[dict[str, Any]]:
    """Entry i is a function of seed + i, as in most of reasoning-gym's tasks."""
    assert largest > 0, "largest must be positive"
    numbers = [(seed + i) * 7919 % largest for i in range(size)]
    return [{"question": f"{n}^2", "answer": str(n * n), "metadata": {"n": n, "signed": signed}} for n in numbers]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reasoning-gym with one task."""
    gym = types.ModuleType("reasoning_gym")
    gym.factory = types.SimpleNamespace(  # type: ignore[attr-defined]
        DATASETS={"squares": (None, SquareConfig)},
        create_dataset=lambda name, **options: squares(**{"largest": 50, "signed": False} | options),
    )
    monkeypatch.setitem(sys.modules, "reasoning_gym", gym)


def source(**options: Any) -> SourceConfig:
    return SourceConfig(model="m", task="reasoning_gym", **options)


@pytest.mark.usefixtures("stand_in")
def test_no_question_is_in_both_and_held_out_ones_come_once() -> None:
    train, held_out = reasoning_entries("squares")
    questions = [entry["question"] for entry in held_out]
    assert len(questions) == len(set(questions)) == 10, "a fifth of 50"
    trained = {entry["question"] for entry in train}
    assert not trained & set(questions)
    assert len(trained) == 40
    assert len(train) == 8000, "the other four fifths of what was drawn"


@pytest.mark.usefixtures("stand_in")
def test_many_questions_leave_500_held_out() -> None:
    train, held_out = reasoning_entries("squares", ["largest=1000003", "size=3000"])
    assert (len(train), len(held_out)) == (3000, 500)
    assert not {entry["question"] for entry in train} & {entry["question"] for entry in held_out}


@pytest.mark.usefixtures("stand_in")
def test_options_are_read_as_what_they_are() -> None:
    entries, _ = reasoning_entries("squares", ["largest=100", "signed=True", "seed=3", "size=200"])
    assert entries[0]["metadata"]["signed"] is True
    others, _ = reasoning_entries("squares", ["largest=100", "signed=false", "seed=4", "size=200"])
    assert others[0]["metadata"]["signed"] is False
    assert entries[0]["question"] != others[0]["question"]


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        (None, [], r"needs --data, the name of one of reasoning-gym's tasks: it has squares"),
        ("square", [], r"no task 'square': did you mean squares\?"),
        ("chess", [], "no task 'chess': it has squares"),
        ("squares", ["smallest=3"], "smallest=3: .*names largest, signed, seed, size"),
        ("squares", ["largest"], "largest: .*takes name=value"),
        ("squares", ["largest=0"], "refuses --task-options largest=0: .*largest must be positive"),
        ("squares", ["largest=many"], "refuses --task-options largest=many"),
        ("squares", ["size=-1"], "size is a whole number"),
        ("squares", ["seed=x"], "seed is a whole number"),
        ("squares", ["largest=3"], "has 3 questions with these options, too few"),
    ],
)
def test_what_it_refuses(name: str | None, options: list[str], problem: str) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        reasoning_entries(name, options)
    assert "\n" not in str(caught.value)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(InputError, match="pip install reasoning-gym"):
        load_task(source(data="lcm"), with_template())


def test_options_belong_to_the_task_that_has_them() -> None:
    with pytest.raises(InputError, match=r"--task-options \('size=3',\) does nothing in task 'arithmetic'"):
        load_task(SourceConfig(task_options=("size=3",)), tokenizer)
    with pytest.raises(InputError, match="'reasoning_gym' needs a pretrained model"):
        SourceConfig(task="reasoning_gym", data="lcm")


@pytest.mark.usefixtures("stand_in")
def test_the_question_is_put_as_gsm8ks_are() -> None:
    first = load_task(source(data="squares"), with_template()).train[0]["prompt"]
    instruction = "Think step by step, then give the final answer between <answer> and </answer>."
    assert first == f"[user] 2^2\n{instruction}\n[assistant]"
    own = load_task(source(data="squares", instruction="The number alone."), with_template()).train[0]["prompt"]
    assert own == "[user] 2^2\nThe number alone.\n[assistant]"
    bare = load_task(source(data="squares", instruction=""), with_template()).train[0]["prompt"]
    assert bare == "[user] 2^2\n[assistant]"
    plain = load_task(source(data="squares", plain_prompts=True), tokenizer)
    assert plain.train[0]["prompt"] == "Question: 2^2\nAnswer:"
    assert plain.add_special_tokens
    with pytest.raises(InputError, match=r"no chat template.*--plain-prompts"):
        load_task(source(data="squares"), tokenizer)


def test_reasoning_gym_itself_in_a_pool() -> None:
    """lcm up to 12: every answer is right, the pool's workers say so, and a part of the marks is kept or not."""
    pytest.importorskip("reasoning_gym")
    options: dict[str, Any] = {"data": "lcm", "task_options": ("max_value=12",), "verifier_workers": 1}
    task = load_task(source(**options), with_template())
    assert task.metric == "accuracy"
    assert isinstance(task.verifier, VerifierPool)
    rows = task.held_out
    assert all(row["answer"] == str(lcm(*row["metadata"]["numbers"])) for row in rows)
    assert all(max(row["metadata"]["numbers"]) <= 12 for row in (*task.train, *rows))
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in task.train}

    row = next(row for row in rows if len(row["answer"]) == 2)
    right = row["answer"]
    completions = [
        f"<answer>{right}</answer>",
        f"It is \\boxed{{{right}}}, not 1.",
        f"1? So {right}.",
        "x",
        f"{right}0",
    ]
    columns = {name: [row[name]] * len(completions) for name in ("answer", "metadata")}
    assert task.verifier(["q"] * 5, completions, **columns) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert sum(task.verifier.take_counts().values()) == 0
    task.verifier.close()

    graded = load_task(source(**options | {"verifier_workers": 0}, partial_credit=True), with_template())
    assert graded.metric == "score"
    assert graded.verifier(["q"] * 5, completions, **columns) == pytest.approx([1.0, 1.0, 1.0, 0.0, 2 / 3])


def test_the_scorer_is_configured_as_the_task_is() -> None:
    """Six decimal places are asked for: an answer that is off in the fourth is right by the default's two alone."""
    pytest.importorskip("reasoning_gym")
    options = ("size=10", "min_num_decimal_places=6", "max_num_decimal_places=6")
    entries, _ = reasoning_entries("decimal_arithmetic", options)
    columns = {name: [entry[name] for entry in entries] for name in ("answer", "metadata")}
    for shift, score in ((0.0, 1.0), (4e-4, 0.0)):
        completions = [f"<answer>{float(entry['answer']) + shift:.6f}</answer>" for entry in entries]
        assert reasoning_gym_full_marks([""] * len(entries), completions, **columns) == [score] * len(entries)


def test_the_same_problems_in_every_process(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    first, second = (reasoning_entries("products", ["size=50"]) for _ in range(2))
    assert first == second
