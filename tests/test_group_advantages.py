"""Advantages of whole sequences against their definitions, in loops over plain numbers, and against exact gradients.

The exact ones enumerate everything that a group of samples can be: expectations are sums, with no noise to allow for.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.checks import InputError
from rlhf.group_advantages import (
    best_of_group_advantages,
    decoupled_group_advantages,
    group_normalized_advantages,
    leave_one_out_advantages,
    length_weighted_advantages,
    mean_normalized_advantages,
)

F64 = torch.float64
NUMBER = st.floats(-4, 4)

Estimator = Callable[[Tensor, Tensor], Tensor]


def some_lengths(scores: Tensor) -> Tensor:
    return 1 + (torch.arange(scores.numel()) * 7).view_as(scores) % 5


ESTIMATORS: dict[str, Estimator] = {
    "normalised": group_normalized_advantages,
    "centred": lambda scores, ids: group_normalized_advantages(scores, ids, divide_by_std=False),
    "leave one out": leave_one_out_advantages,
    "leave one out / std": lambda scores, ids: leave_one_out_advantages(scores, ids, divide_by_std=True),
    "by length": lambda scores, ids: length_weighted_advantages(scores, some_lengths(scores), ids),
    "by mean": mean_normalized_advantages,
    "best": best_of_group_advantages,
    "best / std": lambda scores, ids: best_of_group_advantages(scores, ids, divide_by_std=True),
    "decoupled": lambda scores, ids: decoupled_group_advantages(
        torch.stack([scores, scores.square()], -1), ids, [1.0, 0.5]
    ),
}
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)


def close(actual: Tensor, wanted: Tensor | float, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(wanted, dtype=actual.dtype).expand_as(actual),
                               rtol=tolerance, atol=tolerance)  # fmt: skip


@st.composite
def scored_groups(draw: st.DrawFn, scores: st.SearchStrategy[float] = NUMBER) -> tuple[Tensor, Tensor]:
    """Scores [B] and group ids: sizes 1 to 4, any numbering, interleaved."""
    ids = draw(st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=4, unique=True))
    members = draw(st.permutations([i for i in ids for _ in range(draw(st.integers(1, 4)))]))
    values = draw(st.lists(scores, min_size=len(members), max_size=len(members)))
    return torch.tensor(values, dtype=F64), torch.tensor(members)


ROUND = st.integers(-64, 64).map(lambda k: k / 16)  # exactly representable, so equal or clearly different


# ------------------------------------------------------------------------------------------------- common to all
@every_estimator
@given(scored_groups(), st.randoms(use_true_random=False))
def test_group_numbering_and_order_do_not_matter(name: str, case: tuple[Tensor, Tensor], random: Any) -> None:
    scores, ids = case
    advantages = ESTIMATORS[name](scores, ids)
    renamed = {group: 7 - 3 * k for k, group in enumerate(random.sample(ids.unique().tolist(), ids.unique().numel()))}
    close(ESTIMATORS[name](scores, torch.tensor([renamed[i] for i in ids.tolist()])), advantages)
    if name != "by length":  # whose lengths stay where they are
        order = torch.tensor(random.sample(range(len(ids)), len(ids)))
        close(ESTIMATORS[name](scores[order], ids[order]), advantages[order])


@every_estimator
@given(scored_groups())
def test_groups_do_not_touch(name: str, case: tuple[Tensor, Tensor]) -> None:
    """What a group gets is what it gets alone."""
    scores, ids = case
    advantages = ESTIMATORS[name](scores, ids)
    for group in ids.unique():
        own = ids == group
        if name == "by length":
            alone = length_weighted_advantages(scores[own], some_lengths(scores)[own], ids[own])
        else:
            alone = ESTIMATORS[name](scores[own], ids[own])
        close(advantages[own], alone)


@every_estimator
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("score", [0.1, 0.0, -1 / 3, 5000.1, 1e18])
def test_equal_scores_and_single_members_give_exactly_zero(name: str, dtype: torch.dtype, score: float) -> None:
    for size in [1, 2, 3, 5, 7, 8, 10, 16, 31, 64, 100]:
        ids = torch.arange(4).repeat_interleave(size)
        scores = torch.full((4 * size,), score, dtype=dtype)
        advantages = ESTIMATORS[name](scores, ids)
        assert advantages.dtype == dtype
        assert (advantages == 0).all()


@every_estimator
def test_a_broken_score_is_not_hidden(name: str) -> None:
    """NaN among the scores is a fault upstream; zeros would look like a group without signal."""
    scores, ids = torch.tensor([0.0, math.nan, 1.0, 0.0, 1.0]), torch.tensor([0, 0, 0, 1, 1])
    advantages = ESTIMATORS[name](scores, ids)
    if name != "decoupled":  # where NaN has a meaning
        assert advantages[:3].isnan().any()
    assert torch.equal(advantages[3:], ESTIMATORS[name](scores, ids.clone())[3:])
    assert torch.isfinite(advantages[3:]).all()


@every_estimator
def test_results_are_detached_and_inputs_untouched(name: str) -> None:
    scores = torch.tensor([0.0, 1.0, 3.0], requires_grad=True)
    assert not ESTIMATORS[name](scores, torch.tensor([3, 3, 3])).requires_grad
    assert scores.tolist() == [0, 1, 3]


@every_estimator
def test_no_sequences_no_advantages(name: str) -> None:
    assert ESTIMATORS[name](torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


SHIFTED = [name for name in ESTIMATORS if name not in ("by mean", "decoupled")]


@pytest.mark.parametrize("name", SHIFTED)
@given(scored_groups(ROUND), st.floats(1e-2, 1e2), st.floats(-1e2, 1e2))
def test_an_offset_changes_nothing_and_a_factor_all_or_nothing(
    name: str, case: tuple[Tensor, Tensor], a: float, b: float
) -> None:
    scores, ids = case
    advantages = ESTIMATORS[name](scores, ids)
    close(ESTIMATORS[name](scores + 2.0 ** round(b / 10), ids), advantages, 1e-9)
    scaled = ESTIMATORS[name](a * scores, ids)
    if name == "leave one out / std":  # without a std the difference stays in score units
        free = ((scaled - advantages).abs() < 1e-9) | ((scaled - a * advantages).abs() < 1e-9 * (1 + a))
        assert free.all()
    else:
        close(scaled, advantages if name in ("normalised", "best / std") else a * advantages, 1e-9)


# ------------------------------------------------------------------------------------------------- normalised
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("epsilon", [0.0, 1e-4])
@given(scored_groups(ROUND))
def test_group_advantages_by_their_formula(ddof: int, epsilon: float, case: tuple[Tensor, Tensor]) -> None:
    scores, ids = case
    normalised = group_normalized_advantages(scores, ids, ddof=ddof, epsilon=epsilon)
    centred = group_normalized_advantages(scores, ids, divide_by_std=False)
    for i, (score, group) in enumerate(zip(scores.tolist(), ids.tolist(), strict=True)):
        group_scores = scores[ids == group].tolist()
        mean = sum(group_scores) / len(group_scores)
        squares = sum((s - mean) ** 2 for s in group_scores)
        std = math.sqrt(squares / max(len(group_scores) - ddof, 1))
        close(centred[i], score - mean)
        close(normalised[i], (score - mean) / (std + epsilon) if std > 0 else 0.0)


@pytest.mark.parametrize("ddof", [0, 1])
@given(scored_groups(ROUND))
def test_groups_with_signal_have_mean_zero_and_std_one(ddof: int, case: tuple[Tensor, Tensor]) -> None:
    scores, ids = case
    advantages = group_normalized_advantages(scores, ids, ddof=ddof)
    for group in ids.unique():
        own, own_scores = advantages[ids == group], scores[ids == group]
        close(own.mean(), 0.0)
        if len(own_scores.unique()) > 1:
            close(own.std(correction=ddof), 1.0)
            assert torch.equal(own.argsort(stable=True), own_scores.argsort(stable=True))
        else:
            assert (own == 0).all()


@given(scored_groups(ROUND), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
def test_group_advantages_ignore_scale_and_offset(case: tuple[Tensor, Tensor], a: float, b: float) -> None:
    scores, ids = case
    # b shifts scores of 1/16 and more; its rounding, 1e-13, is all that may be seen.
    close(group_normalized_advantages(a * scores, ids), group_normalized_advantages(scores, ids))
    close(group_normalized_advantages(scores + b, ids), group_normalized_advantages(scores, ids), 1e-9)


@pytest.mark.parametrize("size", [2, 4, 16])
@pytest.mark.parametrize("offset", [0.0, 0.1, 5000.0, -16384.0])
@pytest.mark.parametrize("spread", [1.0, 1e-2, 2**-9])
def test_float32_digits_survive_offsets(size: int, offset: float, spread: float) -> None:
    scores = offset + spread * torch.randn(size, generator=torch.Generator().manual_seed(size))
    ids = torch.zeros(size, dtype=torch.int64)
    exact = group_normalized_advantages(scores.double(), ids)  # of the rounded float32 scores: no rounding is charged
    torch.testing.assert_close(group_normalized_advantages(scores, ids).double(), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("tiny", [1e-10, 1e-20, 1e-30, 1e-37])
@pytest.mark.parametrize("ddof", [0, 1])
def test_tiny_differences_are_normalised_like_any_other(dtype: torch.dtype, tiny: float, ddof: int) -> None:
    """Down to the smallest normal float32: their squares are far below it."""
    advantages = group_normalized_advantages(torch.tensor([0.0, tiny], dtype=dtype), torch.zeros(2).long(), ddof=ddof)
    half = math.sqrt(1 / 2) if ddof else 1.0
    close(advantages, torch.tensor([-half, half], dtype=dtype), 1e-6)


@pytest.mark.parametrize("huge", [1e20, 1e38])
def test_huge_differences_are_normalised_like_any_other(huge: float) -> None:
    advantages = group_normalized_advantages(torch.tensor([-huge, huge]), torch.zeros(2).long(), ddof=0)
    close(advantages, torch.tensor([-1.0, 1.0]), 1e-6)


SUBNORMAL = torch.tensor([0.0, 1e-45]).double(), torch.tensor([0, 0])


@given(scored_groups(st.floats(-1e6, 1e6) | st.floats(5000, 5000.001) | st.floats(-1e-37, 1e-37)))
@example(SUBNORMAL)
def test_group_advantages_are_never_nan(case: tuple[Tensor, Tensor]) -> None:
    scores, ids = case
    for dtype in (torch.float32, F64):
        for options in ({}, {"ddof": 0}, {"divide_by_std": False}):
            assert torch.isfinite(group_normalized_advantages(scores.to(dtype), ids, **options)).all()


# ------------------------------------------------------------------------------------------------- leave one out
def others_of(scores: Tensor, ids: Tensor, i: int) -> list[float]:
    return [s for j, s in enumerate(scores.tolist()) if j != i and ids[j] == ids[i]]


@given(scored_groups(ROUND))
def test_leave_one_out_by_its_definition(case: tuple[Tensor, Tensor]) -> None:
    scores, ids = case
    advantages = leave_one_out_advantages(scores, ids)
    divided = leave_one_out_advantages(scores, ids, divide_by_std=True, epsilon=1e-3)
    for i, score in enumerate(scores.tolist()):
        others = others_of(scores, ids, i)
        baseline = sum(others) / len(others) if others else score
        close(advantages[i], score - baseline)
        squares = sum((other - baseline) ** 2 for other in others)
        std = math.sqrt(squares / (len(others) - 1)) if len(set(others)) > 1 else None
        close(divided[i], score - baseline if std is None else (score - baseline) / (std + 1e-3))


@given(scored_groups(ROUND))
def test_leave_one_out_is_the_centred_score_times_n_over_n_minus_one(case: tuple[Tensor, Tensor]) -> None:
    scores, ids = case
    size = (ids[:, None] == ids).sum(-1)
    centred = group_normalized_advantages(scores, ids, divide_by_std=False)
    close(leave_one_out_advantages(scores, ids), centred * size / (size - 1).clamp(min=1))


@given(NUMBER, NUMBER)
def test_leave_one_out_of_two_is_their_difference(a: float, b: float) -> None:
    advantages = leave_one_out_advantages(torch.tensor([a, b], dtype=F64), torch.tensor([5, 5]))
    close(advantages, torch.tensor([a - b, b - a], dtype=F64))


@given(scored_groups(ROUND), st.data())
def test_a_score_is_not_in_its_own_baseline(case: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    """Raised by 1, its advantage rises by 1; that of its group falls by 1 / (n - 1)."""
    scores, ids = case
    i = data.draw(st.integers(0, len(ids) - 1))
    raised = scores.clone()
    raised[i] += 1
    change = leave_one_out_advantages(raised, ids) - leave_one_out_advantages(scores, ids)
    size = int((ids == ids[i]).sum())
    expected = (ids == ids[i]).to(F64) * (-1 / max(size - 1, 1))
    expected[i] = 1.0 if size > 1 else 0.0
    close(change, expected)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("score", [0.1, -1 / 3, 5000.1])
@pytest.mark.parametrize("size", [3, 5, 8, 31, 100])
def test_others_that_agree_have_no_std(dtype: torch.dtype, score: float, size: int) -> None:
    """The odd one's difference stays as it is, for one that is better as for one that is worse."""
    for odd in (score - 1, score + 1):
        scores = torch.full((size,), score, dtype=dtype)
        scores[0] = odd
        divided = leave_one_out_advantages(scores, torch.zeros(size, dtype=torch.int64), divide_by_std=True)
        close(divided[0], scores[0] - scores[1], 1e-6)
        # Of the others, each sees the odd one among n - 2 like itself: off the mean by 1 / sqrt(n - 1) of a std.
        close(divided[1:], math.copysign(1 / math.sqrt(size - 1), score - odd), 1e-5)


@pytest.mark.parametrize("rest", [1e-3, 1e-5, 1e-20, 1e-30])
def test_the_std_of_others_keeps_its_digits_beside_an_outlier(rest: float) -> None:
    """The outlier's others differ by little; E[x^2] - E[x]^2, or the group's squares less its own, would be noise."""
    scores = torch.tensor([0.0, rest, 2 * rest, 1.0])
    ids = torch.zeros(4, dtype=torch.int64)
    advantages = leave_one_out_advantages(scores, ids, divide_by_std=True)
    exact = leave_one_out_advantages(scores.double(), ids, divide_by_std=True)
    if rest > 1e-15:  # else their squares are below the smallest float32, and there is no std
        torch.testing.assert_close(advantages.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(advantages).all()


# ------------------------------------------------------------------------------------------------- exact gradients
def expectation_over_groups(logits: Tensor, rewards: Tensor, size: int, estimate: Estimator) -> Tensor:
    """E[mean over the group of A_i * grad log pi(a_i)], over all groups that `size` draws can give."""
    log_probs = logits.log_softmax(-1)
    total = torch.zeros((), dtype=F64)
    for actions in itertools.product(range(len(logits)), repeat=size):
        drawn = log_probs[list(actions)]
        advantages = estimate(rewards[list(actions)], torch.zeros(size, dtype=torch.int64))
        total = total + drawn.sum().exp().detach() * (advantages * drawn).mean()
    return torch.autograd.grad(total, logits)[0]


LOGITS, REWARDS = [0.3, -0.5, 1.1], torch.tensor([1.0, -2.0, 0.5], dtype=F64)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_leave_one_out_is_unbiased_and_the_group_mean_too_small(size: int) -> None:
    logits = torch.tensor(LOGITS, dtype=F64, requires_grad=True)
    gradient = torch.autograd.grad((logits.softmax(-1) * REWARDS).sum(), logits)[0]
    close(expectation_over_groups(logits, REWARDS, size, leave_one_out_advantages), gradient)
    centred = expectation_over_groups(logits, REWARDS, size, ESTIMATORS["centred"])
    close(centred, gradient * (size - 1) / size)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_best_of_group_ascends_the_expected_best(size: int) -> None:
    logits = torch.tensor(LOGITS, dtype=F64, requires_grad=True)
    p = logits.softmax(-1)
    groups = itertools.product(range(3), repeat=size)
    expected_best = sum(p[list(actions)].prod() * REWARDS[list(actions)].max() for actions in groups)
    assert isinstance(expected_best, Tensor)
    gradient = torch.autograd.grad(expected_best, logits)[0]
    close(size * expectation_over_groups(logits, REWARDS, size, best_of_group_advantages), gradient)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_mean_normalised_ascends_the_log_pass_rate(size: int) -> None:
    """Of its series -sum_k (1 - p)^k / k the first n - 1 terms: grad p times sum_{k < n} (1 - p)^(k - 1)."""
    logits = torch.tensor(LOGITS, dtype=F64, requires_grad=True)
    passes = torch.tensor([1.0, 0.0, 0.0], dtype=F64)
    rate = logits.softmax(-1)[0]
    gradient = torch.autograd.grad(rate, logits)[0]
    series = sum((1 - rate.detach()) ** (k - 1) for k in range(1, size))
    close(expectation_over_groups(logits, passes, size, mean_normalized_advantages), gradient * series)


# ------------------------------------------------------------------------------------------------- by length
@given(scored_groups(ROUND), st.data())
def test_by_length_by_its_definition(case: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    scores, ids = case
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, 50), min_size=len(ids), max_size=len(ids))))
    advantages = length_weighted_advantages(scores, lengths, ids)
    close(length_weighted_advantages(scores, 3 * lengths, ids), advantages)
    for group in ids.unique():
        own = ids == group
        if lengths[own].sum() == 0:
            continue  # no action to have an advantage
        weight = lengths[own] / lengths[own].sum(dtype=F64)
        close(advantages[own], scores[own] - (weight * scores[own]).sum() if own.sum() > 1 else 0.0)
        close((lengths[own] * advantages[own]).sum(), 0.0, 1e-9)


@given(scored_groups(ROUND), st.integers(1, 10))
def test_by_equal_lengths_is_centred(case: tuple[Tensor, Tensor], length: int) -> None:
    scores, ids = case
    lengths = torch.full_like(ids, length)
    close(length_weighted_advantages(scores, lengths, ids), ESTIMATORS["centred"](scores, ids))


# ------------------------------------------------------------------------------------------------- by mean, best
@pytest.mark.parametrize("passed", [1, 3, 7])
def test_by_mean_of_passes_and_failures(passed: int) -> None:
    scores = (torch.arange(8) < passed).to(F64)
    advantages = mean_normalized_advantages(scores, torch.zeros(8, dtype=torch.int64))
    close(advantages[:passed], (8 - passed) / passed)
    close(advantages[passed:], -1.0)


@given(scored_groups(st.integers(1, 64).map(lambda k: k / 16)), st.floats(1e-2, 1e2))
def test_by_mean_by_its_formula(case: tuple[Tensor, Tensor], factor: float) -> None:
    scores, ids = case
    advantages = mean_normalized_advantages(scores, ids)
    for group in ids.unique():
        own = ids == group
        close(advantages[own], scores[own] / scores[own].mean() - 1)
    close(mean_normalized_advantages(factor * scores, ids), advantages)


@given(scored_groups(st.integers(-4, 4).map(float)))
def test_best_of_group_by_its_definition(case: tuple[Tensor, Tensor]) -> None:
    scores, ids = case
    advantages = best_of_group_advantages(scores, ids)
    divided = best_of_group_advantages(scores, ids, divide_by_std=True, ddof=0, epsilon=0.5)
    for i, score in enumerate(scores.tolist()):
        others = others_of(scores, ids, i)
        gain = max([score, *others]) - max(others) if others else 0.0
        close(advantages[i], gain)
        std = scores[ids == ids[i]].std(correction=0)
        close(divided[i], gain / (std + 0.5))


# ------------------------------------------------------------------------------------------------- decoupled
@st.composite
def scored_components(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[float]]:
    """Components [B, K], some of them NaN, ids [B], weights [K]."""
    ids = draw(scored_groups())[1]
    columns = draw(st.integers(1, 3))
    value = ROUND | st.just(math.nan)
    rows = draw(st.lists(st.lists(value, min_size=columns, max_size=columns), min_size=len(ids), max_size=len(ids)))
    return torch.tensor(rows, dtype=F64), ids, draw(st.lists(st.floats(-2, 2), min_size=columns, max_size=columns))


@pytest.mark.parametrize("options", [{}, {"divide_by_std": False}, {"ddof": 0, "epsilon": 1e-4}])
@given(scored_components())
def test_decoupled_is_the_weighted_sum_over_what_applies(
    options: dict, case: tuple[Tensor, Tensor, list[float]]
) -> None:
    components, ids, weights = case
    expected = torch.zeros(len(ids), dtype=F64)
    for component, weight in zip(components.unbind(-1), weights, strict=True):
        applies = ~component.isnan()
        expected[applies] += weight * group_normalized_advantages(component[applies], ids[applies], **options)
    close(decoupled_group_advantages(components, ids, weights, **options), expected)
    close(decoupled_group_advantages(components, ids, torch.tensor(weights, dtype=F64), **options), expected)


@given(scored_groups(ROUND))
def test_one_component_decoupled_is_group_normalised(case: tuple[Tensor, Tensor]) -> None:
    scores, ids = case
    one = decoupled_group_advantages(scores[:, None], ids, [1.0])
    assert torch.equal(one, group_normalized_advantages(scores, ids))


def test_decoupled_tells_apart_what_adds_up_to_the_same() -> None:
    """The sums 0, 1, 1, 2 hide that the second component is rarer; and a factor on one outweighs no other."""
    components = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    ids = torch.zeros(5, dtype=torch.int64)
    summed = group_normalized_advantages(components.sum(-1), ids)
    assert summed[1] == summed[3]
    decoupled = decoupled_group_advantages(components, ids, [1.0, 1.0])
    assert decoupled[3] > decoupled[1]
    close(decoupled_group_advantages(components * torch.tensor([100.0, 1.0]), ids, [1.0, 1.0]), decoupled, 1e-6)


# ------------------------------------------------------------------------------------------------- bad arguments
S, I = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
BAD: dict[str, tuple[Callable[[], object], str]] = {
    **{f"{name}, {what}": (lambda name=name, args=args: ESTIMATORS[name](*args), message)
       for name in ESTIMATORS if name != "decoupled"
       for what, args, message in [
           ("shapes", (S, I[:2]), r"scores \[3\]"),
           ("score type", (I, I), "scores must be floating point"),
           ("id type", (S, S), "group_ids must be integers"),
           ("id bool", (S, S.bool()), "group_ids must be integers"),
           ("axes", (S.view(1, 3), I.view(1, 3)), r"scores must be \[B\].* got \[1, 3\]")]},
    **{f"{call.__name__}, {name}": (lambda call=call, name=name, x=x: call(S, I, **{name: x}), f"{name} must be in")
       for call, name, x in [
           (group_normalized_advantages, "epsilon", -1.0), (group_normalized_advantages, "ddof", 2),
           (best_of_group_advantages, "epsilon", -1.0), (best_of_group_advantages, "ddof", 2),
           (leave_one_out_advantages, "epsilon", -1.0)]},
    "lengths' type": (lambda: length_weighted_advantages(S, S, I), "lengths must be integers"),
    "lengths' shape": (lambda: length_weighted_advantages(S, I[:1], I), r"lengths \[1\]"),
    "one column": (lambda: decoupled_group_advantages(S, I, [1.0]), r"components must be \[B, K\].* got \[3\]"),
    "weights": (lambda: decoupled_group_advantages(S[:, None], I, [1.0, 2.0]),
                r"one_row_of_components \[1\], weights \[2\]"),
    "component type": (lambda: decoupled_group_advantages(I[:, None], I, [1.0]), "components must be floating point"),
    "decoupled ids": (lambda: decoupled_group_advantages(S[:, None], I[:2], [1.0]), r"group_ids \[2\]"),
    "decoupled id type": (lambda: decoupled_group_advantages(S[:, None], S, [1.0]), "group_ids must be integers"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
