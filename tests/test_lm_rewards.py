"""Scores: how they add up, what a faulty reward function is told, and which answers count as right."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, tiny_config
from transformers import AutoModelForSequenceClassification

from rlhf.checks import InputError
from rlhf.lm.embedded import build_tokenizer
from rlhf.lm.rewards import RewardModel, exact_answer, name_of, score

ROWS = [{"prompt": "a", "answer": "1", "level": 3}, {"prompt": "b", "answer": "2", "level": 4}]
COMPLETIONS = ["1", "x y"]


def length(prompts: list[str], completions: list[str], **_: Any) -> list[int]:
    return [len(completion) for completion in completions]


def level(prompts: list[str], completions: list[str], level: list[int], **_: Any) -> list[int]:
    return level


def test_scores_are_the_weighted_sum_and_components_are_as_returned() -> None:
    found = score([length, level, exact_answer], ROWS, COMPLETIONS, weights=[0.5, -1.0, 10])
    assert found.total.tolist() == [0.5 * 1 - 3 + 10, 0.5 * 3 - 4]
    assert found.total.dtype == torch.float32
    assert {name: x.tolist() for name, x in found.components.items()} == {
        "length": [1, 3],
        "level": [3, 4],
        "exact_answer": [1, 0],
    }


def test_without_weights_all_are_one() -> None:
    assert score([length, level], ROWS, COMPLETIONS).total.tolist() == [4, 7]


def test_columns_come_by_name_and_the_prompt_as_prompts() -> None:
    seen: dict[str, Any] = {}

    def spy(**given: Any) -> list[float]:
        seen.update(given)
        return [0.0, 0.0]

    score([spy], ROWS, COMPLETIONS)
    assert seen == {"prompts": ["a", "b"], "completions": COMPLETIONS, "answer": ["1", "2"], "level": [3, 4]}


def test_a_function_may_change_the_list_it_is_given() -> None:
    def greedy(completions: list[str], **_: Any) -> list[float]:
        completions.clear()
        return [1.0, 2.0]

    assert score([greedy, length], ROWS, list(COMPLETIONS)).components["length"].tolist() == [1, 3]


@pytest.mark.parametrize(
    "returned",
    [[1, 2], (1.0, 2.0), torch.tensor([1.0, 2.0]), torch.tensor([1, 2]), [torch.tensor(1.0), 2.0]],
    ids=str,
)
def test_numbers_may_come_in_any_container(returned: Any) -> None:
    assert score([lambda **_: returned], ROWS, COMPLETIONS).total.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        ([1.0], "returned 1 scores for 2 completions"),
        ([], "returned 0 scores for 2 completions"),
        ([1.0, 2.0, 3.0], "returned 3 scores for 2 completions"),
        ([1.0, math.nan], "returned nan for the completion 'x y'"),
        ([math.inf, 1.0], "returned inf for the completion '1'"),
        ([1.0, -math.inf], "returned -inf for the completion 'x y'"),
        ([1.0, "1.0"], "returned '1.0' for the completion 'x y'"),
        (torch.tensor([1.0, math.nan]), "returned nan for the completion 'x y'"),
        ([1.0, 1e300], "returned 1e\\+300 for the completion 'x y'"),  # infinite in float32
        ([1.0, [2.0]], r"returned \[2.0\]"),
        (torch.ones(2, 1), "returned"),
        ([1.0, 1j], "returned 1j"),
        (None, "returned None"),
        (1.0, "returned 1.0"),
        (torch.tensor(1.0), "returned"),
    ],
    ids=str,
)
def test_what_is_no_score_is_refused_by_name(returned: Any, problem: str) -> None:
    def my_reward(**_: Any) -> Any:
        return returned

    with pytest.raises(InputError, match=f"'my_reward' {problem}"):
        score([length, my_reward], ROWS, COMPLETIONS)


def test_the_cure_is_in_the_message() -> None:
    with pytest.raises(InputError, match=r"finite number; return 0\.0 for what cannot be judged, None where"):
        score([lambda **_: [math.nan, 0.0]], ROWS, COMPLETIONS)


def _raises(**_: Any) -> list[float]:
    raise KeyError("gold")


def _wants_another_column(prompts: list[str], completions: list[str], gold: list[str]) -> list[float]:
    return [0.0] * len(gold)


@pytest.mark.parametrize(
    ("function", "problem"), [(_raises, "KeyError: 'gold'"), (_wants_another_column, "TypeError: it needs gold")]
)
def test_a_function_that_raises_is_named_with_how_it_is_called(
    function: Callable[..., list[float]], problem: str
) -> None:
    call = rf"{function.__name__}\(prompts=\[...\], completions=\[...\], answer=\[...\], level=\[...\]\)"
    with pytest.raises(InputError, match=f"'{function.__name__}' raised {problem}") as caught:
        score([function], ROWS, COMPLETIONS)
    assert caught.match(call)
    assert caught.value.__cause__ is not None


def test_two_of_one_name_and_a_missing_weight_are_refused() -> None:
    with pytest.raises(InputError, match="two reward functions are named 'length'"):
        score([length, length], ROWS, COMPLETIONS)
    with pytest.raises(InputError, match="one weight per reward function, got 1 for 2"):
        score([length, level], ROWS, COMPLETIONS, weights=[1.0])


def test_a_weight_that_is_no_number_does_not_reach_the_scores() -> None:
    with pytest.raises(InputError, match="weight"):
        score([length], ROWS, COMPLETIONS, weights=[math.nan])


def test_a_row_without_a_column_that_others_have_is_named() -> None:
    with pytest.raises(InputError, match="level"):
        score([length], [ROWS[0], {"prompt": "b", "answer": "2"}], COMPLETIONS)


# -- reward models --------------------------------------------------------------------------------------------------


def reward_model(
    architecture: str = "llama", *, side: str = "left", batch_size: int = 64, **config: Any
) -> RewardModel:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_config(architecture, num_labels=1, **config))
    tokenizer = build_tokenizer()
    tokenizer.padding_side = side
    return RewardModel(model, tokenizer, batch_size=batch_size)


PROMPTS, ANSWERS = ["1+2=", "12345+67890=", "7+7=", "5+"], ["3", "53208", "", "5=01"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_score(architecture: str, side: str) -> None:
    scorer = reward_model(architecture, side=side)
    alone = [scorer([prompt], [answer])[0] for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    assert len(set(alone)) == len(alone)
    assert scorer(PROMPTS, ANSWERS) == pytest.approx(alone, abs=1e-4)
    scorer.batch_size = 3
    assert scorer(PROMPTS, ANSWERS) == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("pad_token_id", [None, 2])
def test_the_models_own_idea_of_padding_changes_no_score(pad_token_id: int | None) -> None:
    """The tokenizer pads; a model whose config names another pad token, or none, must be scored or refused."""
    expected = reward_model(side="right")(PROMPTS, ANSWERS)
    scorer = reward_model(side="right", pad_token_id=pad_token_id)
    assert scorer(PROMPTS, ANSWERS) == pytest.approx(expected, abs=1e-4)


def test_the_score_is_the_models_logit_of_prompt_and_completion() -> None:
    scorer = reward_model()
    ids = torch.tensor([scorer.tokenizer("1+2=3")["input_ids"]])
    assert scorer(["1+2="], ["3"], answer=["ignored"]) == pytest.approx([scorer.model(ids).logits.item()], abs=1e-6)
    assert scorer(["1+"], ["2=3"]) == scorer(["1+2="], ["3"])


def test_a_reward_model_is_a_reward_function() -> None:
    scorer = reward_model("gpt2", side="right", resid_pdrop=0.5)
    rows = [{"prompt": prompt, "answer": "7"} for prompt in PROMPTS]
    found = score([scorer, exact_answer], rows, ANSWERS, weights=[2.0, 1.0])
    assert found.components["reward_model"].tolist() == pytest.approx(scorer(PROMPTS, ANSWERS)), "and has no dropout"
    assert name_of(scorer) == "reward_model"
    other = copy.copy(scorer)
    other.__name__ = "safety"
    assert set(score([scorer, other], rows, ANSWERS).components) == {"reward_model", "safety"}


def test_a_classifier_of_several_labels_is_refused() -> None:
    model = AutoModelForSequenceClassification.from_config(tiny_config(num_labels=3))
    with pytest.raises(InputError, match="num_labels=1, got 3"):
        RewardModel(model, build_tokenizer())
