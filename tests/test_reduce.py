"""Reductions by hand, and the rule they exist for: the gradient does not depend on how the batch was cut."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_losses import LOSSES, Batch, TinyModel, random_data
from torch import Tensor

from rlhf.checks import InputError
from rlhf.reduce import Reduction, count, fixed_length, reduce, sequence_mean, sequence_sum, token_mean

F64 = torch.float64
REDUCTIONS = list(get_args(Reduction))
every_reduction = pytest.mark.parametrize("how", REDUCTIONS)
ROWS = 6
LENGTH = 10


def reduced(per_token: Tensor, mask: Tensor, how: Any, denominator: Tensor | float) -> Tensor:
    return reduce(per_token, mask, how=how, denominator=denominator, length=LENGTH if how == "fixed_length" else None)


# ------------------------------------------------------------------------------------------------------------ by hand
# Rows of 3, 1 and 0 tokens; masked slots hold numbers that would show.
PER_TOKEN = torch.tensor([[1.0, 2.0, 99.0, 6.0], [99.0, 5.0, 99.0, 99.0], [99.0, 99.0, 99.0, 99.0]], dtype=F64)
MASK = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
BY_HAND = {
    "token_mean": (4, (1 + 2 + 6 + 5) / 4, [[1 / 4, 1 / 4, 0, 1 / 4], [0, 1 / 4, 0, 0], [0] * 4]),
    "sequence_mean": (2, ((1 + 2 + 6) / 3 + 5) / 2, [[1 / 6, 1 / 6, 0, 1 / 6], [0, 1 / 2, 0, 0], [0] * 4]),
    "sequence_sum": (2, ((1 + 2 + 6) + 5) / 2, [[1 / 2, 1 / 2, 0, 1 / 2], [0, 1 / 2, 0, 0], [0] * 4]),
    "fixed_length": (2, (1 + 2 + 6 + 5) / (2 * LENGTH), [[0.05, 0.05, 0, 0.05], [0, 0.05, 0, 0], [0] * 4]),
}


@pytest.mark.parametrize(("how", "denominator", "value", "weights"), [(how, *row) for how, row in BY_HAND.items()])
def test_by_hand(how: Any, denominator: int, value: float, weights: list[list[float]]) -> None:
    assert count(MASK, how=how).tolist() == denominator
    per_token = PER_TOKEN.clone().requires_grad_()
    result = reduced(per_token, MASK, how, denominator)
    assert result.item() == pytest.approx(value, rel=1e-12)
    gradient = torch.autograd.grad(result, per_token)[0]
    torch.testing.assert_close(gradient, torch.tensor(weights, dtype=F64), rtol=1e-12, atol=0)


def test_names_are_the_functions() -> None:
    for denominator in (3, 2.5, torch.tensor(7)):
        for how, direct in [
            ("token_mean", token_mean(PER_TOKEN, MASK, denominator=denominator)),
            ("sequence_mean", sequence_mean(PER_TOKEN, MASK, denominator=denominator)),
            ("sequence_sum", sequence_sum(PER_TOKEN, MASK, denominator=denominator)),
            ("fixed_length", fixed_length(PER_TOKEN, MASK, denominator=denominator, length=LENGTH)),
        ]:
            assert torch.equal(reduced(PER_TOKEN, MASK, how, denominator), direct)


@every_reduction
@given(st.floats(1, 1e6), st.floats(1, 100))
def test_inverse_to_the_denominator(how: Any, denominator: float, factor: float) -> None:
    result, larger = (reduced(PER_TOKEN, MASK, how, d) for d in (denominator, factor * denominator))
    torch.testing.assert_close(factor * larger, result, rtol=1e-12, atol=0)


@every_reduction
@pytest.mark.parametrize("denominator", [0, 0.2, torch.tensor(0)])
def test_a_denominator_below_one_counts_as_one(how: Any, denominator: Tensor | float) -> None:
    torch.testing.assert_close(reduced(PER_TOKEN, MASK, how, denominator), reduced(PER_TOKEN, MASK, how, 1))


@pytest.mark.parametrize("length", [1, 2, 1000])
def test_fixed_length_is_the_one_given_even_where_sequences_are_longer(length: int) -> None:
    result = fixed_length(PER_TOKEN, MASK, denominator=2, length=length)
    assert result.item() == pytest.approx(14 / (2 * length), rel=1e-12)


def test_sequence_sum_is_the_log_probability_of_whole_sequences() -> None:
    """A loss linear in log pi, one advantage per sequence: the policy gradient of the sequence as one action."""
    log_probs = PER_TOKEN.clone().requires_grad_()
    advantages = torch.tensor([[2.0], [-3.0], [5.0]], dtype=F64)
    by_token = sequence_sum(-advantages * log_probs, MASK, denominator=2)
    whole = -(advantages.squeeze(-1) * (log_probs * MASK).sum(-1)).sum() / 2
    actual, expected = (torch.autograd.grad(x, log_probs)[0] for x in (by_token, whole))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("length", [1, 7])
def test_fixed_length_is_sequence_sum_over_a_constant(length: int) -> None:
    per_length = sequence_sum(PER_TOKEN, MASK, denominator=2) / length
    torch.testing.assert_close(fixed_length(PER_TOKEN, MASK, denominator=2, length=length), per_length)


def test_token_mean_of_games_needs_no_batch_axis() -> None:
    assert token_mean(torch.tensor([1.0, 3.0]), torch.tensor([True, True]), denominator=2) == 2


def test_equal_lengths_make_token_and_sequence_mean_alike() -> None:
    per_token, mask = PER_TOKEN[:2], torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0]]).bool()
    tokens, sequences = (reduced(per_token, mask, how, count(mask, how=how)) for how in REDUCTIONS[:2])
    torch.testing.assert_close(tokens, sequences)


@every_reduction
def test_an_empty_step_gives_zero_with_zero_gradient(how: Any) -> None:
    per_token = torch.full((2, 3), torch.nan, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert count(mask, how=how) == 0
    result = reduced(per_token, mask, how, count(mask, how=how))
    assert result == 0
    assert (torch.autograd.grad(result, per_token)[0] == 0).all()


@every_reduction
@given(st.integers(0, 3), st.integers(0, 5))
def test_empty_rows_and_padding_count_for_nothing(how: Any, rows: int, steps: int) -> None:
    per_token = torch.nn.functional.pad(PER_TOKEN, (0, steps, 0, rows), value=torch.nan)
    mask = torch.nn.functional.pad(MASK, (0, steps, 0, rows))
    assert count(mask, how=how) == count(MASK, how=how)
    denominator = count(mask, how=how)
    torch.testing.assert_close(
        reduced(per_token, mask, how, denominator), reduced(PER_TOKEN, MASK, how, denominator), rtol=1e-12, atol=0
    )


def test_long_and_short_sequences_weigh_as_the_names_say() -> None:
    """Gradient of a sequence of 8 tokens beside one of 2, in total over its tokens."""
    mask = torch.arange(8) < torch.tensor([[8], [2]])
    shares = {}
    for how in REDUCTIONS:
        per_token = torch.ones(2, 8, dtype=F64, requires_grad=True)
        total = reduced(per_token, mask, how, count(mask, how=how))
        shares[how] = torch.autograd.grad(total, per_token)[0].sum(-1).tolist()
    assert shares["token_mean"] == pytest.approx([0.8, 0.2])
    assert shares["sequence_mean"] == pytest.approx([0.5, 0.5])
    assert shares["sequence_sum"] == pytest.approx([8 / 2, 2 / 2])
    assert shares["fixed_length"] == pytest.approx([0.8 / 2, 0.2 / 2])


# --------------------------------------------------------------------------------------------------- split invariance
DATA = random_data(ROWS)
MODEL = TinyModel()
partitions = st.lists(st.integers(0, 3), min_size=ROWS, max_size=ROWS)


def rows_of(data: Batch, rows: Tensor) -> Batch:
    return {key: x[rows] for key, x in data.items()}


def accumulated(name: str, how: Any, parts: list[Tensor], *, mean_of_means: bool = False) -> list[Tensor]:
    """Gradients summed over micro-batches, each with its own forward pass."""
    denominator = count(DATA["action_mask"], how=how)
    gradients = [torch.zeros_like(parameter) for parameter in MODEL.parameters()]
    for rows in parts:
        part = rows_of(DATA, rows)
        own = count(part["action_mask"], how=how) * len(parts)
        loss = reduced(
            LOSSES[name](MODEL.outputs(part)), part["action_mask"], how, own if mean_of_means else denominator
        )
        gradients = [sum_ + new for sum_, new in zip(gradients, MODEL.gradients(loss), strict=True)]
    return gradients


def parts_of(assignment: list[int]) -> list[Tensor]:
    chosen = torch.tensor(assignment)
    return [(chosen == part).nonzero().squeeze(-1) for part in chosen.unique()]


@every_reduction
@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=12)
@given(partitions)
@example(list(range(ROWS)))
def test_any_split_into_micro_batches_gives_the_same_gradient(name: str, how: Any, assignment: list[int]) -> None:
    whole = accumulated(name, how, [torch.arange(ROWS)])
    for gradient, expected in zip(accumulated(name, how, parts_of(assignment)), whole, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


@every_reduction
@pytest.mark.parametrize("name", LOSSES)
def test_a_mean_of_micro_batch_means_would_not(name: str, how: Any) -> None:
    """So the test above can fail. (Row 0 is empty: micro-batches differ in sequences as well as in tokens.)"""
    parts = [torch.tensor(rows) for rows in ([0, 1], [2, 3, 4], [5])]
    whole = accumulated(name, how, [torch.arange(ROWS)])
    wrong = accumulated(name, how, parts, mean_of_means=True)
    difference = max((a - b).abs().max().item() for a, b in zip(wrong, whole, strict=True))
    assert difference > 1e-3


@every_reduction
def test_splitting_along_time_changes_no_token_weight(how: Any) -> None:
    """A packed row may be cut anywhere for the reductions that weigh tokens; a sequence mean needs whole sequences."""
    per_token, denominator = PER_TOKEN, count(MASK, how=how)
    whole = reduced(per_token, MASK, how, denominator)
    halves = sum(reduced(x, m, how, denominator) for x, m in zip(per_token.split(2, 1), MASK.split(2, 1), strict=True))
    assert torch.allclose(halves, whole) == (how != "sequence_mean")


# ------------------------------------------------------------------------------------------------------ bad arguments
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "name": (lambda: reduce(PER_TOKEN, MASK, how="mean", denominator=1), "how must be .*got 'mean'"),
    "count's name": (lambda: count(MASK, how="mean"), "how must be .*got 'mean'"),
    "no length": (lambda: reduce(PER_TOKEN, MASK, how="fixed_length", denominator=1), "needs length"),
    "length": (lambda: fixed_length(PER_TOKEN, MASK, denominator=1, length=0), r"length must be in \[1, inf\)"),
    "shapes": (lambda: token_mean(PER_TOKEN, MASK[:2], denominator=1), r"\[3, 4\].*\[2, 4\]"),
    "rows": (lambda: sequence_mean(PER_TOKEN, MASK[0], denominator=1), r"\[3, 4\].*\[4\]"),
    "sum's rows": (lambda: sequence_sum(PER_TOKEN, MASK[0], denominator=1), r"\[3, 4\].*\[4\]"),
    "mask": (lambda: token_mean(PER_TOKEN, MASK.double(), denominator=1), "mask must be bool"),
    "count's mask": (lambda: count(MASK.long(), how="token_mean"), "action_mask must be bool"),
    "type": (lambda: token_mean(PER_TOKEN.long(), MASK, denominator=1), "must be floating point"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
