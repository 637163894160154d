"""Rewards: sums over what applies, the penalty's formula, and the place of a score."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.advantages import monte_carlo_returns
from rlhf.checks import InputError
from rlhf.rewards import (
    Moments,
    combine_rewards,
    overlong_penalty,
    rewards_at_last_action,
    rewards_at_turn_ends,
    shape_scores,
)

F64 = torch.float64


# --------------------------------------------------------------------------------------------------------- components
@given(st.lists(st.lists(st.floats(-4, 4) | st.just(math.nan), min_size=3, max_size=3), min_size=1, max_size=5))
def test_combined_is_the_weighted_sum_of_what_applies(rows: list[list[float]]) -> None:
    weights = [1.0, -0.5, 2.0]
    combined = combine_rewards(torch.tensor(rows, dtype=F64), weights)
    for score, row in zip(combined.tolist(), rows, strict=True):
        terms = [weight * x for weight, x in zip(weights, row, strict=True) if not math.isnan(x)]
        assert score == pytest.approx(sum(terms), abs=1e-12) if terms else math.isnan(score)


def test_combining_takes_weights_of_any_kind_and_keeps_the_type() -> None:
    components = torch.tensor([[1.0, 2.0], [math.nan, 4.0]], requires_grad=True)
    for weights in ([1.0, 0.5], (1, 0.5), torch.tensor([1.0, 0.5], dtype=F64)):
        combined = combine_rewards(components, weights)
        assert combined.tolist() == [2.0, 2.0]
        assert combined.dtype == torch.float32
        assert not combined.requires_grad


# ------------------------------------------------------------------------------------------------------------- length
def test_overlong_penalty_by_hand() -> None:
    """DAPO's own numbers, a budget of 20,480 whose last 4,096 are the buffer."""
    lengths = torch.tensor([0, 1, 16384, 16385, 18432, 20479, 20480, 20481, 10**6])
    penalty = overlong_penalty(lengths, max_length=20480, buffer=4096)
    assert penalty.tolist() == [0, 0, 0, -1 / 4096, -0.5, -4095 / 4096, -1, -1, -1]
    assert torch.equal(overlong_penalty(lengths, max_length=20480, buffer=4096, scale=0.25), 0.25 * penalty)


@given(st.integers(1, 30), st.integers(0, 30), st.floats(0, 3))
def test_overlong_penalty_falls_in_even_steps(buffer: int, free: int, scale: float) -> None:
    penalty = overlong_penalty(torch.arange(free + buffer + 5), max_length=free + buffer, buffer=buffer, scale=scale)
    steps = penalty.diff()
    assert (steps[:free] == 0).all()
    torch.testing.assert_close(steps[free : free + buffer], torch.full((buffer,), -scale / buffer), rtol=0, atol=1e-6)
    assert (steps[free + buffer :] == 0).all()
    assert penalty.dtype == torch.float32


# -------------------------------------------------------------------------------------------------------------- place
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()


def test_scores_stand_on_the_last_action() -> None:
    rewards = rewards_at_last_action(torch.tensor([1.0, 2.0, 3.0, math.nan]), MASK)
    assert rewards.tolist() == [[0, 0, 0, 1], [0, 0, 2, 0], [0, 3, 0, 0], [0, 0, 0, 0]]


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4), st.floats(-3, 3))
def test_every_action_leads_to_the_score(rows: list[list[bool]], score: float) -> None:
    mask = torch.tensor(rows)
    rewards = rewards_at_last_action(torch.full((len(rows),), score, dtype=F64), mask)
    assert torch.equal(monte_carlo_returns(rewards, mask), torch.where(mask, rewards.new_tensor(score), 0.0))
    assert torch.equal(rewards.sum(-1), torch.where(mask.any(-1), rewards.new_tensor(score), 0.0))
    assert rewards.dtype == F64


def test_any_leading_axes() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    flat = rewards_at_last_action(scores, MASK)
    assert not flat.requires_grad
    assert torch.equal(rewards_at_last_action(scores.view(2, 2), MASK.view(2, 2, 4)).view(4, 4), flat)
    assert torch.equal(rewards_at_last_action(scores[1], MASK[1]), flat[1])


# -------------------------------------------------------------------------------------------------------------- turns
TURNS = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [0, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0]]).bool()
PER_TURN = torch.tensor([[1.0, 2.0, 3.0], [4.0, math.nan, math.nan], [math.nan] * 3], dtype=F64)


def test_each_turns_score_stands_on_its_last_action() -> None:
    expected = [[0, 1, 0, 2, 0, 0, 3], [0, 0, 0, 0, 0, 4, 0], [0] * 7]
    assert rewards_at_turn_ends(PER_TURN, TURNS).tolist() == expected
    assert rewards_at_turn_ends(PER_TURN[0], TURNS[0]).tolist() == expected[0]


def test_a_turn_is_credited_with_what_later_turns_earn() -> None:
    returns = monte_carlo_returns(rewards_at_turn_ends(PER_TURN, TURNS), TURNS, gamma=0.5)
    third, second = 3.0, 2 + 0.25 * 3  # a gap is no step
    assert returns[0].tolist() == [0.5 * (1 + 0.5 * second), 1 + 0.5 * second, 0, second, 0, 0.5 * third, third]


def test_one_turn_is_the_last_action() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    scores = torch.tensor([2.0, 3.0])
    assert torch.equal(rewards_at_turn_ends(scores[:, None], mask), rewards_at_last_action(scores, mask))


# ------------------------------------------------------------------------------------------------------ bad arguments
X, L = torch.zeros(2, 3), torch.tensor([1, 2])
BAD: dict[str, tuple[Callable[[], Tensor], str]] = {
    "component type": (lambda: combine_rewards(X.long(), [1.0] * 3), "components must be floating point"),
    "one column": (lambda: combine_rewards(X[0], [1.0] * 3), r"components must be \[B, K\].* got \[3\]"),
    "weights": (lambda: combine_rewards(X, [1.0] * 2), r"one_row_of_components \[3\], weights \[2\]"),
    "lengths": (lambda: overlong_penalty(L.float(), max_length=8, buffer=2), "lengths must be integers"),
    "mask for lengths": (lambda: overlong_penalty(L.bool(), max_length=8, buffer=2), "lengths must be integers"),
    "no buffer": (lambda: overlong_penalty(L, max_length=8, buffer=0), r"buffer must be in \[1, 8\], got 0"),
    "long buffer": (lambda: overlong_penalty(L, max_length=8, buffer=9), r"buffer must be in \[1, 8\], got 9"),
    "scale": (lambda: overlong_penalty(L, max_length=8, buffer=2, scale=-1.0), "scale must be in"),
    "scores": (lambda: rewards_at_last_action(L, X.bool()), "scores must be floating point"),
    "score per step": (lambda: rewards_at_last_action(X, X.bool()), r"scores \[2, 3\], action_mask_without_time \[2\]"),
    "mask": (lambda: rewards_at_last_action(X[:, 0], X), "action_mask must be bool"),
    "too many turns": (lambda: rewards_at_turn_ends(PER_TURN[:, :2], TURNS), "rows of 3 turns .* only 2 columns"),
    "score per row": (lambda: rewards_at_turn_ends(PER_TURN[:2], TURNS), r"turn_scores_without_turns \[2\]"),
    "no time": (lambda: rewards_at_last_action(X[:, 0], X[:, :0].bool()), r"action_mask must be \[..., T\]"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


# ------------------------------------------------------------------------------------------- a reward model's scores
BATCHES = st.lists(st.lists(st.floats(-1e3, 1e3), max_size=5), min_size=1, max_size=6)


@given(BATCHES)
def test_moments_of_batches_are_those_of_all_numbers_at_once(batches: list[list[float]]) -> None:
    moments = Moments()
    for batch in batches:
        moments = moments.including(torch.tensor(batch, dtype=F64))
    together = torch.tensor([x for batch in batches for x in batch], dtype=F64)
    assert moments.count == len(together)
    if len(together):
        assert moments.mean == pytest.approx(float(together.mean()), abs=1e-9)
        spread = float((together - together.mean()).square().sum())
        assert moments.squares == pytest.approx(spread, rel=1e-9, abs=1e-6)


def test_a_shift_far_from_zero_costs_no_precision() -> None:
    moments = (
        Moments()
        .including(torch.tensor([1e9, 1e9 + 1], dtype=F64))
        .including(torch.tensor([1e9 + 2, 1e9 + 3], dtype=F64))
    )
    assert moments.std == pytest.approx(1.25**0.5, rel=1e-9)


ENDED = torch.tensor([True, True, False, True])


def test_scores_normalised_by_their_own_moments_have_mean_zero_and_std_one() -> None:
    scores = torch.tensor([3.0, -1.0, 10.0, 4.0], dtype=F64)
    moments = Moments().including(scores)
    shaped = shape_scores(scores, torch.ones(4, dtype=torch.bool), moments=moments)
    assert float(shaped.mean()) == pytest.approx(0, abs=1e-12)
    assert float(shaped.std(correction=0)) == pytest.approx(1, abs=1e-12)
    affine = shape_scores(5 * scores - 7, ENDED | True, moments=Moments().including(5 * scores - 7))
    torch.testing.assert_close(affine, shaped)  # blind to the reward model's origin and unit


def test_equal_scores_become_zero() -> None:
    scores = torch.full((4,), 2.5)
    assert shape_scores(scores, ENDED, moments=Moments().including(scores)).eq(0).all()


def test_the_penalty_comes_after_clipping_and_hits_what_did_not_end() -> None:
    scores = torch.tensor([9.0, -9.0, 9.0, 0.5])
    assert shape_scores(scores, ENDED, clip=2.0, missing_eos_penalty=1.0).tolist() == [2.0, -2.0, 1.0, 0.5]
    assert torch.equal(shape_scores(scores, ENDED), scores)


def test_shaping_takes_sensible_numbers_alone() -> None:
    scores = torch.zeros(4)
    with pytest.raises(InputError, match="clip"):
        shape_scores(scores, ENDED, clip=0.0)
    with pytest.raises(InputError, match="missing_eos_penalty"):
        shape_scores(scores, ENDED, missing_eos_penalty=-1.0)
    with pytest.raises(InputError, match="is_finished"):
        shape_scores(scores, torch.ones(3, dtype=torch.bool))
