"""Losses of pairs: closed forms, symmetries, limits, overflow, garbage in pairs that do not count."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.checks import InputError
from rlhf.masking import masked_sum
from rlhf.preference_losses import bradley_terry_loss, dpo_loss, ipo_loss
from rlhf.reduce import token_mean

F64 = torch.float64
PAIRS = 6
numbers = st.lists(st.floats(-5, 5), min_size=PAIRS, max_size=PAIRS)
betas = st.floats(0.01, 5)


def vector(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=F64)


def close(actual: Tensor, wanted: Tensor | float, tolerance: float = 1e-11) -> None:
    wanted = torch.as_tensor(wanted, dtype=actual.dtype).expand_as(actual)
    torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss.sum(), inputs)


# Each takes four tensors: chosen, rejected (trained), and two that are not: (margin, unused) or the reference's.
Loss = Callable[..., Tensor]
LOSSES: dict[str, Loss] = {
    "bradley-terry": lambda c, r, m, _, **o: bradley_terry_loss(c, r, **o),
    "margin": lambda c, r, m, _, **o: bradley_terry_loss(c, r, margin=m, **o),
    "margin and centring": lambda c, r, m, _, **o: bradley_terry_loss(c, r, margin=m, center_coef=0.1, **o),
    "dpo": lambda *x, **o: dpo_loss(*x, beta=0.3, **o).loss,
    "smoothed dpo": lambda *x, **o: dpo_loss(*x, beta=0.3, label_smoothing=0.2, **o).loss,
    "ipo": lambda *x, **o: ipo_loss(*x, beta=0.3, **o).loss,
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def random_pairs(dtype: torch.dtype = F64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(PAIRS, generator=generator, dtype=F64).to(dtype) for _ in range(4)]
    return [x.requires_grad_() for x in pairs]


MASK = torch.tensor([1, 0, 1, 1, 0, 1]).bool()


# ----------------------------------------------------------------------------------------------------- for every loss
@every_loss
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_garbage_in_masked_pairs_changes_nothing(name: str, garbage: float, dtype: torch.dtype) -> None:
    clean = random_pairs(dtype)
    dirty = [x.detach().masked_fill(~MASK, garbage).requires_grad_() for x in clean]
    results = [LOSSES[name](*x, pair_mask=MASK) for x in (clean, dirty)]
    assert torch.equal(*results)
    assert (results[0][~MASK] == 0).all()
    slopes = [gradients(loss, *x[:2]) for loss, x in zip(results, (clean, dirty), strict=True)]
    for ours, theirs in zip(*slopes, strict=True):
        assert torch.equal(ours, theirs)
        assert (ours[~MASK] == 0).all()
        assert (ours[MASK] != 0).all()


@every_loss
def test_without_a_mask_all_pairs_count(name: str) -> None:
    pairs = random_pairs()
    whole = LOSSES[name](*pairs)
    assert torch.equal(whole, LOSSES[name](*pairs, pair_mask=torch.ones(PAIRS, dtype=torch.bool)))
    assert torch.equal(whole[MASK], LOSSES[name](*pairs, pair_mask=MASK)[MASK])
    square = LOSSES[name](*(x.view(2, 3) for x in pairs))
    assert torch.equal(square, whole.view(2, 3))  # any shape, any company


@every_loss
def test_only_the_first_two_carry_gradient_and_it_is_the_derivative(name: str) -> None:
    chosen, rejected, *rest = random_pairs()
    slopes = torch.autograd.grad(
        LOSSES[name](chosen, rejected, *rest).sum(), [chosen, rejected, *rest], allow_unused=True
    )
    assert [x is not None for x in slopes] == [True, True, False, False]
    assert torch.autograd.gradcheck(lambda c, r: LOSSES[name](c, r, *rest), [chosen, rejected])


@every_loss
@given(st.lists(st.integers(0, 2), min_size=PAIRS, max_size=PAIRS))
@example(list(range(PAIRS)))
def test_any_split_into_micro_batches_gives_the_same_gradient(name: str, assignment: list[int]) -> None:
    pairs = random_pairs()
    whole = token_mean(LOSSES[name](*pairs, pair_mask=MASK), MASK, denominator=MASK.sum())
    chosen = torch.tensor(assignment)
    parts = [chosen == part for part in chosen.unique()]
    losses = [
        token_mean(LOSSES[name](*(x[p] for x in pairs), pair_mask=MASK[p]), MASK[p], denominator=MASK.sum())
        for p in parts
    ]
    for ours, expected in zip(gradients(sum(losses), *pairs[:2]), gradients(whole, *pairs[:2]), strict=True):
        close(ours, expected, 1e-10)


# ------------------------------------------------------------------------------------------------------ Bradley-Terry
@given(numbers, numbers)
def test_bradley_terry_is_minus_the_log_of_a_probability(chosen: list[float], rejected: list[float]) -> None:
    """Of the two orders of a pair one is right: exp(-loss) sums to 1. Gradient -P(the label is wrong)."""
    c, r = vector(chosen).requires_grad_(), vector(rejected).requires_grad_()
    loss, swapped = bradley_terry_loss(c, r), bradley_terry_loss(r, c)
    close((-loss).exp() + (-swapped).exp(), 1.0)
    close((-loss).exp(), c.exp() / (c.exp() + r.exp()))
    of_chosen, of_rejected = gradients(loss, c, r)
    close(of_chosen, -(-swapped).exp())
    close(of_rejected, (-swapped).exp())


@given(numbers, numbers, numbers, st.floats(-10, 10))
def test_margin_and_shifts(chosen: list[float], rejected: list[float], margin: list[float], shift: float) -> None:
    """A margin is a handicap of the chosen answer; without centring, scores are known up to a constant."""
    c, r, m = vector(chosen), vector(rejected), vector(margin)
    with_margin = bradley_terry_loss(c, r, margin=m)
    close(with_margin, bradley_terry_loss(c - m, r))
    close(with_margin, bradley_terry_loss(c + shift, r + shift, margin=m), 1e-9)
    assert torch.equal(bradley_terry_loss(c, r, margin=torch.zeros_like(m)), bradley_terry_loss(c, r))


@given(numbers, numbers, st.floats(0.001, 1))
def test_centring_pulls_the_sum_of_a_pair_to_zero(chosen: list[float], rejected: list[float], coef: float) -> None:
    c, r = vector(chosen).requires_grad_(), vector(rejected).requires_grad_()
    centring = bradley_terry_loss(c, r, center_coef=coef) - bradley_terry_loss(c, r)
    close(centring, coef * (c + r) ** 2, 1e-9)
    for slope in gradients(centring, c, r):
        close(slope, 2 * coef * (c + r), 1e-9)
    mirrored = bradley_terry_loss(c, -c, center_coef=coef)
    assert torch.equal(mirrored, bradley_terry_loss(c, -c))


def test_bradley_terry_by_hand() -> None:
    c, r, m = vector([1.0, 0.0, math.log(3)]), vector([1.0, math.log(3), 0.0]), vector([0.0, 0.0, math.log(3)])
    close(bradley_terry_loss(c, r), vector([math.log(2), math.log(4), math.log(4 / 3)]))
    close(bradley_terry_loss(c, r, margin=m)[2], math.log(2))
    close(bradley_terry_loss(c, r, center_coef=0.5)[0], math.log(2) + 2)


@pytest.mark.parametrize("lead", [100.0, 1000.0])
def test_extreme_scores_are_finite_in_float32(lead: float) -> None:
    c, r = torch.tensor([lead, 0.0], requires_grad=True), torch.tensor([0.0, lead], requires_grad=True)
    zeros = torch.zeros(2)
    for loss in (bradley_terry_loss(c, r), dpo_loss(c, r, zeros, zeros, beta=1.0).loss):
        assert loss.tolist() == [pytest.approx(0.0, abs=1e-40), lead]
        for slope, sign in zip(gradients(loss, c, r), (-1, 1), strict=True):
            assert slope.tolist() == [pytest.approx(0.0, abs=1e-40), sign]


# -------------------------------------------------------------------------------------------------------- DPO and IPO
@given(numbers, numbers, betas, st.floats(0, 0.49))
def test_dpo_at_the_reference(chosen: list[float], rejected: list[float], beta: float, smoothing: float) -> None:
    """log 2, and a gradient of beta / 2 towards the chosen answer, less by twice the share of wrong labels."""
    c, r = vector(chosen).requires_grad_(), vector(rejected).requires_grad_()
    terms = dpo_loss(c, r, c.detach(), r.detach(), beta=beta, label_smoothing=smoothing)
    close(terms.loss, math.log(2))
    assert (torch.stack(terms[1:]) == 0).all()
    of_chosen, of_rejected = gradients(terms.loss, c, r)
    close(of_chosen, -beta / 2 * (1 - 2 * smoothing))
    close(of_rejected, beta / 2 * (1 - 2 * smoothing))


@given(numbers, numbers, numbers, numbers, betas)
def test_dpo_is_bradley_terry_on_implicit_rewards(
    chosen: list[float], rejected: list[float], ref_chosen: list[float], ref_rejected: list[float], beta: float
) -> None:
    """rewards = beta * log(pi / pi_ref); the gradient weighs a pair by how wrong they have it."""
    c, r = vector(chosen).requires_grad_(), vector(rejected).requires_grad_()
    ref_c, ref_r = vector(ref_chosen), vector(ref_rejected)
    terms = dpo_loss(c, r, ref_c, ref_r, beta=beta)
    close(terms.chosen_rewards, beta * (c - ref_c))
    close(terms.rejected_rewards, beta * (r - ref_r))
    assert not terms.chosen_rewards.requires_grad
    assert not terms.rejected_rewards.requires_grad
    close(terms.loss, bradley_terry_loss(terms.chosen_rewards, terms.rejected_rewards))
    of_chosen, of_rejected = gradients(terms.loss, c, r)
    close(of_chosen, -beta * torch.sigmoid(terms.rejected_rewards - terms.chosen_rewards))
    close(of_rejected, -of_chosen)


@given(numbers, numbers, betas, st.floats(0.01, 0.49))
def test_label_smoothing_mixes_both_labels(
    chosen: list[float], rejected: list[float], beta: float, smoothing: float
) -> None:
    """Its minimum is where the implied probability is 1 - eps, not at infinity."""
    c, r, zeros = vector(chosen), vector(rejected), torch.zeros(PAIRS, dtype=F64)
    smoothed = dpo_loss(c, r, zeros, zeros, beta=beta, label_smoothing=smoothing).loss
    one, other = (dpo_loss(*pair, zeros, zeros, beta=beta).loss for pair in ((c, r), (r, c)))
    close(smoothed, (1 - smoothing) * one + smoothing * other)
    best = torch.tensor(math.log((1 - smoothing) / smoothing) / beta, dtype=F64, requires_grad=True)
    zero = torch.zeros_like(best)
    at_minimum = dpo_loss(best, zero, zero, zero, beta=beta, label_smoothing=smoothing).loss
    close(gradients(at_minimum, best)[0], 0.0, 1e-10)


@given(numbers, numbers, betas)
def test_ipo_aims_at_a_lead(chosen: list[float], rejected: list[float], beta: float) -> None:
    """Of 1 / (2 beta) nats over the reference: zero there, a parabola around it."""
    c, r, ref = vector(chosen).requires_grad_(), vector(rejected), vector(rejected)
    terms = ipo_loss(c, r, ref, ref, beta=beta)
    distance = c - ref - 1 / (2 * beta)
    close(terms.loss, distance**2, 1e-10)
    close(gradients(terms.loss, c)[0], 2 * distance, 1e-10)
    close(terms.chosen_rewards, beta * (c - ref))
    assert (terms.rejected_rewards == 0).all()
    close(ipo_loss(ref + 1 / (2 * beta), r, ref, ref, beta=beta).loss, 0.0)


def test_from_tokens() -> None:
    """masked_sum of the tokens' log-probs: padding, NaN included, stays out of loss and gradient."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    tokens = torch.full((2, 4), -0.5, dtype=F64).masked_fill(~mask, torch.nan).requires_grad_()
    chosen, rejected = masked_sum(tokens, mask, dim=-1)
    ref = torch.tensor([-2.0, -2.0], dtype=F64)
    loss = dpo_loss(chosen, rejected, *ref, beta=0.2).loss
    close(loss, math.log(1 + math.exp(-0.2 * (-1.5 + 1.0))))
    slopes = gradients(loss, tokens)[0]
    size = 0.2 / (1 + math.exp(0.2 * (-1.5 + 1.0)))
    close(slopes, torch.tensor([[-size, -size, -size, 0], [size, size, 0, 0]], dtype=F64))


# ------------------------------------------------------------------------------------------------------ bad arguments
X, Y, M = torch.zeros(3), torch.zeros(2), torch.ones(3, dtype=torch.bool)
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "scores": (lambda: bradley_terry_loss(X, Y), r"chosen_scores \[3\], rejected_scores \[2\]"),
    "margin": (lambda: bradley_terry_loss(X, X, margin=Y), r"margin \[2\]"),
    "a number as margin": (lambda: bradley_terry_loss(X, X, margin=1.0), "margin must be a torch.Tensor, got float"),
    "center_coef": (lambda: bradley_terry_loss(X, X, center_coef=-1.0), r"center_coef must be in \[0, inf\), got -1.0"),
    "scores' type": (lambda: bradley_terry_loss(X.long(), X), "chosen_scores must be floating point"),
    "mask's shape": (lambda: bradley_terry_loss(X, X, pair_mask=M[:2]), r"pair_mask \[2\]"),
    "mask's type": (lambda: bradley_terry_loss(X, X, pair_mask=X), "mask must be bool"),
    "dpo": (lambda: dpo_loss(X, X, Y, X, beta=0.1), r"ref_chosen_log_probs \[2\]"),
    "dpo's type": (lambda: dpo_loss(X, X, X, X.long(), beta=0.1), "ref_rejected_log_probs must be floating point"),
    "dpo's mask": (lambda: dpo_loss(X, X, X, X, beta=0.1, pair_mask=M.long()), "mask must be bool"),
    "dpo's beta": (lambda: dpo_loss(X, X, X, X, beta=0.0), r"beta must be in \(0, inf\), got 0.0"),
    "smoothing": (
        lambda: dpo_loss(X, X, X, X, beta=1.0, label_smoothing=0.5),
        r"label_smoothing must be in \[0, 0.5\)",
    ),
    "ipo": (lambda: ipo_loss(X, Y, X, X, beta=0.1), r"rejected_log_probs \[2\]"),
    "ipo's beta": (lambda: ipo_loss(X, X, X, X, beta=math.inf), r"beta must be in \(0, inf\), got inf"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
