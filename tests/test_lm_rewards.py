"""Scores: how they add up, what a faulty reward function is told, and which answers count as right."""

import asyncio
import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, tiny_config
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

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


def test_none_is_left_out_of_the_sum_and_nan_in_the_components() -> None:
    """The weights of the others stay as they are; a completion that nobody judges scores 0."""

    def some(completions: list[str]) -> list[float | None]:
        return [2.0, None, None]

    def others(completions: list[str]) -> list[float | None]:
        return [1.0, 3.0, None]

    found = score([some, others], [ROWS[0]] * 3, ["x"] * 3, weights=[0.5, 10.0])
    assert found.total.tolist() == [11.0, 30.0, 0.0]
    torch.testing.assert_close(found.components["some"], torch.tensor([2.0, math.nan, math.nan]), equal_nan=True)
    torch.testing.assert_close(found.components["others"], torch.tensor([1.0, 3.0, math.nan]), equal_nan=True)


def test_a_column_may_not_bear_a_name_of_the_trainers() -> None:
    with pytest.raises(InputError, match="get completions from the trainer"):
        score([length], [{"prompt": "a", "completions": "b"}], ["x"])


# -- async ----------------------------------------------------------------------------------------------------------


def meeting(name: str, barrier: asyncio.Barrier) -> Callable[..., Any]:
    async def meet(completions: list[str]) -> list[float]:
        await asyncio.wait_for(barrier.wait(), timeout=10)
        return [float(len(completion)) for completion in completions]

    meet.__name__ = name
    return meet


def test_async_functions_run_at_the_same_time() -> None:
    """Each waits for the other, which only works side by side; and both among functions that are not async."""
    barrier = asyncio.Barrier(2)
    for _ in range(2):  # on one loop: what is bound to it, such as this barrier or a client, can be used again
        found = score(
            [meeting("a", barrier), level, meeting("b", barrier)], ROWS, COMPLETIONS, weights=[1.0, 10.0, 0.5]
        )
        assert found.total.tolist() == [1 + 30 + 0.5, 3 + 40 + 1.5]
        assert list(found.components) == ["a", "level", "b"]


def test_async_callables_work_and_within_somebody_elses_loop_too() -> None:
    class Judge:
        async def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
            await asyncio.sleep(0)
            return [5.0, 6.0]

    async def notebook() -> list[float]:
        return score([Judge()], ROWS, COMPLETIONS).total.tolist()

    assert asyncio.run(notebook()) == [5, 6]
    assert list(score([Judge()], ROWS, COMPLETIONS).components) == ["Judge"]


def test_an_async_function_that_raises_is_named() -> None:
    async def broken(completions: list[str]) -> list[float]:
        raise KeyError("gold")

    async def fine(completions: list[str]) -> list[float]:
        return [1.0, 1.0]

    with pytest.raises(InputError, match="'broken' raised KeyError: 'gold'"):
        score([fine, broken], ROWS, COMPLETIONS)


# -- per token ------------------------------------------------------------------------------------------------------

IDS = [[4, 5, 1], [6, 1]]


def position(completion_ids: list[list[int]]) -> list[list[int]]:
    return [list(range(len(ids))) for ids in completion_ids]


def test_rewards_per_token_stand_beside_those_per_completion() -> None:
    def first_is(completion_ids: list[list[int]]) -> list[list[float] | None]:
        return [None, [float(id) for id in completion_ids[1]]]

    found = score([position, level, first_is], ROWS, COMPLETIONS, weights=[0.5, 2.0, 10.0], completion_ids=IDS)
    assert found.total.tolist() == [6, 8]
    assert found.token_rewards.tolist() == [[0, 0.5, 1], [60, 0.5 + 10, 0]]
    assert found.totals.tolist() == [6 + 1.5, 8 + 70.5]
    assert found.components["position"].tolist() == [3, 1], "the sum over tokens"
    assert found.components["first_is"].isnan().tolist() == [True, False]
    assert found.components["first_is"][1] == 7


def test_tensors_per_token_are_fine_and_a_missing_value_is_not() -> None:
    found = score([lambda **_: [torch.ones(3), torch.ones(2)]], ROWS, COMPLETIONS, completion_ids=IDS)
    assert found.token_rewards.tolist() == [[1, 1, 1], [1, 1, 0]]
    for wrong in ([[1.0], [1.0, 1.0]], [[1.0] * 3, 1.0], [[1.0] * 3, [1.0] * 3]):
        with pytest.raises(InputError, match=r"of [23] tokens: .* as many numbers as completion_ids"):
            score([lambda wrong=wrong, **_: wrong], ROWS, COMPLETIONS, completion_ids=IDS)
    for nothing in ("1", math.nan, None):
        with pytest.raises(InputError, match=f"returned {nothing!r} for the completion"):
            score([lambda nothing=nothing, **_: [[1.0, 2.0, nothing], None]], ROWS, COMPLETIONS, completion_ids=IDS)


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


def pairs_tokenizer(bos: str | None = None, **special: Any) -> PreTrainedTokenizerFast:
    """Another house's: two characters a token, other ids, so that a token may span prompt and completion."""
    texts = ["<pad>", "<s>", "<unk>", *"=+9876543210", *(a + b for a in "=+0123456789" for b in "=+0123456789")]
    backend = Tokenizer(models.WordLevel({text: i for i, text in enumerate(texts)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(".{1,2}"), "isolated")
    if bos:
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", **special)


def model_for(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_config(num_labels=1, vocab_size=len(tokenizer))
    return AutoModelForSequenceClassification.from_config(config)


def test_the_reward_models_tokenizer_may_be_another_than_the_actors() -> None:
    tokenizer = pairs_tokenizer(pad_token="<pad>")
    scorer = RewardModel(model_for(tokenizer), tokenizer)
    found = scorer(PROMPTS, ANSWERS)
    for prompt, answer, value in zip(PROMPTS, ANSWERS, found, strict=True):
        text = prompt + answer
        pairs = [text[at : at + 2] for at in range(0, len(text), 2)]
        ids = torch.tensor([[tokenizer.get_vocab()[pair] for pair in pairs]])
        assert value == pytest.approx(scorer.model(ids).logits.item(), abs=1e-5)


def test_a_first_token_that_the_template_wrote_is_not_put_there_twice() -> None:
    tokenizer = pairs_tokenizer(bos="<s>", pad_token="<pad>")
    scorer = RewardModel(model_for(tokenizer), tokenizer)
    assert scorer(["<s>1+1="], ["2"]) == scorer(["1+1="], ["2"])
    ids = torch.tensor([tokenizer("1+1=2")["input_ids"]])
    assert ids[0, 0] == tokenizer.bos_token_id
    assert scorer(["1+1="], ["2"]) == pytest.approx([scorer.model(ids).logits.item()], abs=1e-5)
    without = pairs_tokenizer(pad_token="<pad>")  # adds none, so that the template's is kept
    scorer = RewardModel(model_for(without), without)
    assert scorer(["<s>1+1="], ["2"]) != scorer(["1+1="], ["2"])


def test_a_text_of_the_reward_models_own_is_made_from_the_row() -> None:
    tokenizer = pairs_tokenizer(pad_token="<pad>")
    model = model_for(tokenizer)
    rendered = RewardModel(model, tokenizer, render=lambda completion, question: f"{question}={completion}")
    rows = {"question": ["1+1", "22+2"], "answer": ["2", "24"]}
    expected = RewardModel(model, tokenizer)(["1+1=", "22+2="], ["2", "5"])
    assert rendered(["[user] 1+1 [assistant]"] * 2, ["2", "5"], **rows) == expected


def test_a_tokenizer_that_cannot_be_the_models_is_refused() -> None:
    with pytest.raises(InputError, match="no pad token"):
        RewardModel(model_for(pairs_tokenizer()), pairs_tokenizer())
    model = AutoModelForSequenceClassification.from_config(tiny_config(num_labels=1))
    with pytest.raises(InputError, match="159 tokens but the reward model knows 15"):
        RewardModel(model, pairs_tokenizer(pad_token="<pad>"))
