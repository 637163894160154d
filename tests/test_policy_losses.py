"""GSPO, CISPO, SAPO and the weights against the sampler: closed forms, limits, enumeration, overflow.

What holds for every loss (masked slots, gradcheck, splits) is tested in test_losses.py and test_reduce.py.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_losses import F64, OUTCOMES, acted, advantage_lists, close, logit_lists, random_data, vector
from torch import Tensor

from rlhf.checks import InputError
from rlhf.losses import clipped_surrogate_loss, importance_weighted_loss
from rlhf.masking import masked_mean
from rlhf.policy_losses import cispo_loss, gspo_loss, sampler_importance_weights, sapo_loss, token_covariance
from rlhf.reduce import count, reduce, sequence_mean

ZERO = torch.zeros(OUTCOMES, dtype=F64)
log_ratio_lists = st.lists(st.floats(-3, 3), min_size=OUTCOMES, max_size=OUTCOMES)


def gradient(total: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(total, x)[0]


@given(logit_lists, advantage_lists)
def test_at_ratio_one_all_have_reinforces_gradient(log_probs: list[float], advantages: list[float]) -> None:
    x, a = vector(*log_probs).requires_grad_(), vector(*advantages)
    arguments = (x, x.detach(), a, acted(a))
    for terms in (
        clipped_surrogate_loss(*arguments, dual_clip=3.0),
        gspo_loss(*arguments),
        cispo_loss(*arguments, clip_low=0.2, clip_high=0.2),
        sapo_loss(*arguments),
        sapo_loss(*arguments, temperature_positive=0.3, temperature_negative=7.0),
    ):
        close(gradient(terms.loss.sum(), x), -a)
        assert (terms.ratio == 1).all()
        assert not terms.ratio.requires_grad
        assert not terms.is_clipped.any()


def overflowing(loss: Callable[..., Any], log_ratio: float, advantage: float, **options: float) -> tuple[float, float]:
    """Loss and gradient of an action in float32 beside an ordinary one, which must not notice."""
    # A sequence per row, for the one that has sequences.
    log_probs = torch.tensor([[log_ratio - 1.0], [-1.0]], requires_grad=True)
    a = torch.tensor([[advantage], [1.0]])
    terms = loss(log_probs, torch.full_like(a, -1.0), a, acted(a), **options)
    slopes = gradient(terms.loss.sum(), log_probs)
    assert slopes[1] == -1
    assert terms.loss[1].isfinite()
    return terms.loss[0].item(), slopes[0].item()


# --------------------------------------------------------------------------------------------------------------- GSPO
DATA = random_data(8, 6)
LOG_PROBS = DATA["old_log_probs"] + 0.1 * DATA["returns"]
SEQUENCE_ADVANTAGES = DATA["advantages"][:, :1].expand(8, 6)


@given(advantage_lists, log_ratio_lists, st.floats(0.01, 0.9), st.floats(0.01, 2), st.sampled_from([None, 1.5]))
def test_gspo_of_one_token_per_sequence_is_ppo(
    advantages: list[float], log_ratios: list[float], clip_low: float, clip_high: float, dual_clip: float | None
) -> None:
    options: dict[str, Any] = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    x, a = vector(*log_ratios).requires_grad_(), vector(*advantages)
    column = torch.nn.functional.pad(x.unsqueeze(-1), (1, 2), value=torch.nan)
    mask = torch.tensor([False, True, False, False]).expand(OUTCOMES, 4)
    gspo = gspo_loss(column, torch.zeros_like(column), a.unsqueeze(-1).expand_as(mask), mask, **options)
    ppo = clipped_surrogate_loss(x, ZERO, a, acted(a), **options)
    for ours, theirs in zip(gspo, ppo, strict=True):
        assert torch.equal(ours[:, 1], theirs)
    assert torch.equal(gradient(gspo.loss.sum(), x), gradient(ppo.loss.sum(), x))


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "sequence_sum", "fixed_length"])
def test_gspos_gradient_is_that_of_the_sequences_own_objective(how: Any) -> None:
    """-min(s A, clip(s) A) with the gradient through s, where all tokens of a sequence have one advantage."""
    mask, x = DATA["action_mask"], LOG_PROBS.clone().requires_grad_()
    terms = gspo_loss(x, DATA["old_log_probs"], SEQUENCE_ADVANTAGES, mask, clip_low=0.03, clip_high=0.02)
    s = (((x - DATA["old_log_probs"]) * mask).sum(-1) / mask.sum(-1).clamp(min=1)).exp().unsqueeze(-1)
    literal = -torch.minimum(s * SEQUENCE_ADVANTAGES, s.clamp(0.97, 1.02) * SEQUENCE_ADVANTAGES)
    options = {"how": how, "denominator": count(mask, how=how), "length": 10 if how == "fixed_length" else None}
    ours, expected = (reduce(loss, mask, **options) for loss in (terms.loss, literal.expand_as(x)))
    close(ours, expected)
    close(gradient(ours, x), gradient(expected, x))
    assert 0 < terms.is_clipped[mask].sum() < mask.sum()
    assert torch.equal(terms.is_clipped, (literal.detach() != -s * SEQUENCE_ADVANTAGES) & mask)


def test_gspo_gradcheck() -> None:
    """Of the mean over each sequence; with advantages that differ within it, its value has another derivative."""
    mask = DATA["action_mask"]

    def objective(x: Tensor, a: Tensor) -> Tensor:
        terms = gspo_loss(x, DATA["old_log_probs"], a, mask, clip_low=0.03, clip_high=0.02)
        return sequence_mean(terms.loss, mask, denominator=7)

    x = LOG_PROBS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: objective(x, SEQUENCE_ADVANTAGES), [x])
    assert not torch.autograd.gradcheck(lambda x: objective(x, DATA["advantages"]), [x], raise_exception=False)


def test_gspos_tokens_have_their_own_advantages() -> None:
    """Gradient -s A_t by hand: s = exp((0.2 - 0.1 - 0.4) / 3); the sign of A_t decides which bound counts."""
    x = vector(-0.8, -1.1, torch.nan, -1.4).requires_grad_()
    mask, a = torch.tensor([True, True, False, True]), vector(2.0, -1.0, torch.nan, 0.5)
    s = math.exp(-0.1)
    free = gspo_loss(x, vector(-1, -1, -1, -1), a, mask, clip_low=0.2, clip_high=0.2)
    close(free.loss, vector(-2.0 * s, s, 0, -0.5 * s))
    close(gradient(free.loss.sum(), x), vector(-2.0 * s, s, 0, -0.5 * s))
    close(free.ratio, vector(s, s, 1, s))
    clipped = gspo_loss(x, vector(-1, -1, -1, -1), a, mask, clip_low=0.05, clip_high=0.2)
    close(clipped.loss, vector(-2.0 * s, 0.95, 0, -0.5 * s))
    close(gradient(clipped.loss.sum(), x), vector(-2.0 * s, 0, 0, -0.5 * s))
    assert clipped.is_clipped.tolist() == [False, True, False, False]


@given(st.permutations(range(6)))
def test_gspo_does_not_care_for_the_order_of_tokens(order: list[int]) -> None:
    inputs = (LOG_PROBS, DATA["old_log_probs"], DATA["advantages"], DATA["action_mask"])
    terms, permuted = gspo_loss(*inputs), gspo_loss(*(x[:, order] for x in inputs))
    close(permuted.loss, terms.loss[:, order])


def test_gspos_default_bounds_are_the_sources() -> None:
    x = vector(-0.01, 0.01).unsqueeze(-1)
    terms = gspo_loss(x, torch.zeros_like(x), torch.tensor([[-1.0], [1.0]], dtype=F64), acted(x))
    close(terms.loss, torch.tensor([[1 - 3e-4], [-1 - 4e-4]], dtype=F64))


def test_gspo_overflow() -> None:
    assert overflowing(gspo_loss, 100.0, 2.0, clip_high=0.5) == (-3.0, 0.0)
    assert overflowing(gspo_loss, -100.0, -2.0, clip_low=0.5) == (1.0, 0.0)
    assert overflowing(gspo_loss, 100.0, 0.0) == (0.0, 0.0)
    assert overflowing(gspo_loss, 100.0, -2.0, dual_clip=3.0) == (6.0, 0.0)


# -------------------------------------------------------------------------------------------------------------- CISPO
@given(logit_lists, logit_lists, advantage_lists)
def test_cispos_gradient_is_the_clipped_weight_times_the_score_function(
    logit_list: list[float], old_logits: list[float], advantages: list[float]
) -> None:
    """In the logits, for every action: -w A (onehot - pi)."""
    logits, a = vector(*logit_list).requires_grad_(), vector(*advantages)
    log_pi, log_old = logits.log_softmax(-1), vector(*old_logits).log_softmax(-1)
    terms = cispo_loss(log_pi, log_old, a, acted(a), clip_low=0.1, clip_high=0.3)
    weights = (log_pi - log_old).detach().exp().clamp(0.9, 1.3)
    close(terms.loss, -weights * a * log_pi)
    score = torch.eye(OUTCOMES, dtype=F64) - log_pi.detach().exp()
    close(gradient(terms.loss.sum(), logits), -((weights * a).unsqueeze(-1) * score).sum(0))
    assert torch.equal(terms.is_clipped, weights != terms.ratio)


@given(log_ratio_lists, advantage_lists)
def test_cispo_without_clipping_is_importance_weighting_in_the_gradient(
    log_ratios: list[float], advantages: list[float]
) -> None:
    x, a = vector(*log_ratios).requires_grad_(), vector(*advantages)
    terms, plain = cispo_loss(x, ZERO, a, acted(a), clip_high=1e6), importance_weighted_loss(x, ZERO, a, acted(a))
    close(gradient(terms.loss.sum(), x), gradient(plain.loss.sum(), x))
    assert not terms.is_clipped.any()
    assert torch.equal(terms.ratio, plain.ratio)


def test_cispos_bounds() -> None:
    """Ratios 1/4, 1, 4: an upper bound of 2 with and without a lower one of 1/2."""
    x, a = vector(-math.log(4), 0, math.log(4)).requires_grad_(), vector(1, 1, 1)
    for clip_low, weights, is_clipped in ((None, [0.25, 1, 2], [0, 0, 1]), (0.5, [0.5, 1, 2], [1, 0, 1])):
        terms = cispo_loss(x, torch.zeros_like(x), a, acted(a), clip_low=clip_low, clip_high=1.0)
        close(gradient(terms.loss.sum(), x), -vector(*weights))
        assert terms.is_clipped.tolist() == is_clipped


def test_cispo_overflow() -> None:
    """log pi stays in the loss; the weight is bounded on both signs of A."""
    assert overflowing(cispo_loss, 100.0, 2.0, clip_high=4.0) == (-5.0 * 2 * 99, -10.0)
    assert overflowing(cispo_loss, 100.0, -2.0, clip_high=4.0) == (5.0 * 2 * 99, 10.0)
    assert overflowing(cispo_loss, 100.0, 0.0, clip_high=4.0) == (0.0, 0.0)
    loss, slope = overflowing(cispo_loss, -100.0, 2.0, clip_high=4.0)
    assert (loss, slope) == pytest.approx((0.0, 0.0), abs=1e-37)
    assert overflowing(cispo_loss, -100.0, 2.0, clip_low=0.5, clip_high=4.0) == (101.0, -1.0)


# --------------------------------------------------------------------------------------------------------------- SAPO
temperatures = st.floats(0.1, 5)


@given(log_ratio_lists, advantage_lists, temperatures, temperatures)
def test_sapos_closed_form(log_ratios: list[float], advantages: list[float], positive: float, negative: float) -> None:
    """Gate 4 / tau sigmoid(tau (r - 1)); gradient -r A sech^2(tau (r - 1) / 2); tau by the advantage's sign."""
    x, a = vector(*log_ratios).requires_grad_(), vector(*advantages)
    terms = sapo_loss(x, ZERO, a, acted(a), temperature_positive=positive, temperature_negative=negative)
    tau, r = vector(*(positive if advantage > 0 else negative for advantage in advantages)), x.detach().exp()
    close(terms.loss, -4 / tau / (1 + (-tau * (r - 1)).exp()) * a, 1e-10)
    close(gradient(terms.loss.sum(), x), -r * a / (tau * (r - 1) / 2).cosh() ** 2, 1e-9)
    assert not terms.is_clipped.any()


@given(log_ratio_lists, advantage_lists)
def test_sapos_wide_gate_is_the_plain_surrogate(log_ratios: list[float], advantages: list[float]) -> None:
    x, a = vector(*log_ratios).requires_grad_(), vector(*advantages)
    soft = sapo_loss(x, ZERO, a, acted(a), temperature_positive=1e-6, temperature_negative=1e-6)
    plain = importance_weighted_loss(x, ZERO, a, acted(a))
    close(gradient(soft.loss.sum(), x), gradient(plain.loss.sum(), x), 1e-8)


def test_sapos_default_temperatures_are_the_sources() -> None:
    x, a = vector(0.5, 0.5), vector(1.0, -1.0)
    given_ = {"temperature_positive": 1.0, "temperature_negative": 1.05}
    close(
        sapo_loss(x, torch.zeros_like(x), a, acted(a)).loss,
        sapo_loss(x, torch.zeros_like(x), a, acted(a), **given_).loss,
    )


@pytest.mark.parametrize("log_ratio", [5.0, 80.0, 88.7, 100.0, 1000.0])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_sapo_far_out_is_flat(log_ratio: float, advantage: float) -> None:
    """The open gate is 4 / tau; its derivative is 0 though the ratio is huge or infinite."""
    tau = 2.0
    options = {"temperature_positive": tau, "temperature_negative": tau}
    assert overflowing(sapo_loss, log_ratio, advantage, **options) == (-4 / tau * advantage, 0.0)
    loss, slope = overflowing(sapo_loss, -100.0, advantage, **options)
    assert loss == pytest.approx(-4 / tau / (1 + math.exp(tau)) * advantage)
    assert slope == pytest.approx(0.0, abs=1e-37)


# ------------------------------------------------------------------------------------------------ against the sampler
# Three sequences; ratios (4, 1/2, masked), (1, 1, 1), (masked, masked, masked).
OLD = torch.tensor([[4.0, 0.5, 99.0], [1, 1, 1], [99, 99, 99]], dtype=F64).log().requires_grad_()
SAMPLER = torch.zeros(3, 3, dtype=F64).requires_grad_()
MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]]).bool()
GEOMETRIC = math.sqrt(2.0)
WEIGHTS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "token, truncated above": ({"level": "token", "mode": "truncate", "high": 3.0}, [3, 0.5]),
    "token, truncated on both sides": ({"level": "token", "mode": "truncate", "low": 0.8, "high": 3.0}, [3, 0.8]),
    "token, not truncated": ({"level": "token", "mode": "truncate", "high": math.inf}, [4, 0.5]),
    "token, masked above": ({"level": "token", "mode": "mask", "high": 3.0}, [0, 0.5]),
    "token, masked on both sides": ({"level": "token", "mode": "mask", "low": 0.8, "high": 3.0}, [0, 0]),
    "token, bounds belong to the interval": ({"level": "token", "mode": "mask", "low": 0.5, "high": 4.0}, [4, 0.5]),
    "sequence": ({"level": "sequence", "mode": "truncate", "high": 3.0}, [2, 2]),
    "sequence, truncated": ({"level": "sequence", "mode": "truncate", "high": 1.5}, [1.5, 1.5]),
    "sequence, masked": ({"level": "sequence", "mode": "mask", "high": 1.5}, [0, 0]),
    "mean": ({"level": "sequence_mean", "mode": "mask", "high": 1.5}, [GEOMETRIC, GEOMETRIC]),
    "mean, truncated": ({"level": "sequence_mean", "mode": "truncate", "high": 1.25}, [1.25, 1.25]),
    "mean, masked": ({"level": "sequence_mean", "mode": "mask", "high": 1.25}, [0, 0]),
}


@pytest.mark.parametrize(("options", "first"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_by_hand(options: dict[str, Any], first: list[float]) -> None:
    weights = sampler_importance_weights(OLD, SAMPLER, MASK, **options)
    close(weights, torch.tensor([[*first, 0], [1, 1, 1], [0, 0, 0]], dtype=F64))
    assert not weights.requires_grad


@pytest.mark.parametrize(("options", "first"), WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_weights_ignore_masked_slots(options: dict[str, Any], first: list[float], garbage: float) -> None:
    clean = sampler_importance_weights(OLD, SAMPLER, MASK, **options)
    for old, sampler in ((garbage, 0.0), (0.0, garbage), (garbage, garbage)):
        dirty = (x.masked_fill(~MASK, value) for x, value in ((OLD, old), (SAMPLER, sampler)))
        assert torch.equal(sampler_importance_weights(*dirty, MASK, **options), clean)


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_a_faithful_sampler_has_weight_one(level: Any, mode: Any) -> None:
    weights = sampler_importance_weights(OLD, OLD, MASK, level=level, mode=mode, low=1.0, high=1.0)
    assert torch.equal(weights, MASK.to(F64))


@given(logit_lists, logit_lists, advantage_lists)
def test_unbounded_weights_are_unbiased(pi: list[float], mu: list[float], values: list[float]) -> None:
    """All sequences of two independent tokens. Their product corrects any function of the sequence, and each token's
    own weight any function of that token; the geometric mean does neither."""
    log_pi, log_mu, f = vector(*pi).log_softmax(-1), vector(*mu).log_softmax(-1), vector(*values)
    sequences = torch.tensor(list(itertools.product(range(OUTCOMES), repeat=2)))
    old, sampler = log_pi[sequences], log_mu[sequences]
    drawn = sampler.sum(-1).exp()

    def weights(level: Any) -> Tensor:
        return sampler_importance_weights(old, sampler, acted(old), level=level, mode="truncate", high=math.inf)

    of_sequence, of_token = f[sequences].prod(-1), f[sequences]
    close((drawn * weights("sequence")[:, 0] * of_sequence).sum(), (old.sum(-1).exp() * of_sequence).sum(), 1e-9)
    close((drawn.unsqueeze(-1) * weights("token") * of_token).sum(0), (old.sum(-1).exp() @ of_token), 1e-9)


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
def test_weights_do_not_overflow_within_bounds(level: Any) -> None:
    old, sampler = torch.tensor([[100.0, 100.0], [-100.0, -100.0]]), torch.zeros(2, 2)
    options = {"level": level, "low": 0.5, "high": 2.0}
    truncated = sampler_importance_weights(old, sampler, acted(old), mode="truncate", **options)
    assert truncated.tolist() == [[2, 2], [0.5, 0.5]]
    masked = sampler_importance_weights(old, sampler, acted(old), mode="mask", **options)
    assert (masked == 0).all()


def test_the_mean_does_not_grow_with_the_length() -> None:
    """The same tokens twice over: the product squares, the geometric mean stays."""
    old, sampler = vector(0.3, -0.1, 0.2), ZERO[:3]
    twice = old.repeat(2), sampler.repeat(2)
    options: dict[str, Any] = {"mode": "truncate", "high": math.inf}
    for level, power in (("sequence", 2), ("sequence_mean", 1)):
        once = sampler_importance_weights(old, sampler, acted(old), level=level, **options)
        more = sampler_importance_weights(*twice, acted(twice[0]), level=level, **options)
        close(more, once[0] ** power)
    close(masked_mean(old, acted(old)).exp(), once[0])


# --------------------------------------------------------------------------------------------------------- covariance
@given(logit_lists, advantage_lists, st.floats(-5, 5))
def test_token_covariance_averages_to_the_covariance(log_probs: list[float], advantages: list[float], x: float) -> None:
    """Of the population; shifts of either change nothing; a masked slot takes no part."""
    log_pi, a = vector(*log_probs).requires_grad_(), vector(*advantages)
    parts = token_covariance(log_pi, a, acted(a))
    close(parts.mean(), torch.cov(torch.stack([log_pi.detach(), a]), correction=0)[0, 1])
    close(token_covariance(log_pi + x, a - x, acted(a)), parts, 1e-9)
    assert not parts.requires_grad
    mask = torch.arange(OUTCOMES + 1) < OUTCOMES
    zeros, nans = (
        token_covariance(*(torch.cat([values, vector(filler)]) for values in (log_pi, a)), mask)
        for filler in (0.0, torch.nan)
    )
    assert torch.equal(zeros, nans)
    close(nans, torch.cat([parts, vector(0.0)]), 1e-10)


@given(advantage_lists)
def test_the_covariance_is_how_fast_entropy_falls(advantages: list[float]) -> None:
    """Along a natural policy gradient step, logits + eta * A: dH / d eta = -Cov under pi (weights pi, not counts).

    Repeating each action in proportion to its probability makes the function's plain means the ones under pi.
    """
    counts = torch.tensor([1, 2, 3, 4, 6])
    eta = torch.zeros((), dtype=F64, requires_grad=True)
    log_pi = (counts.to(F64).log() + eta * vector(*advantages)).log_softmax(-1)
    fall = gradient((log_pi.exp() * log_pi).sum(), eta)
    drawn = log_pi.detach().repeat_interleave(counts), vector(*advantages).repeat_interleave(counts)
    close(token_covariance(*drawn, acted(drawn[0])).mean(), fall)


# ------------------------------------------------------------------------------------------------------ bad arguments
X, Y, M = torch.zeros(2, 3), torch.zeros(3, 2), torch.ones(2, 3, dtype=torch.bool)
SCALAR, TRUE = torch.tensor(0.0), torch.tensor(True)


def weights(*tensors: Any, **options: Any) -> Tensor:
    return sampler_importance_weights(*tensors, **{"level": "token", "mode": "mask", "high": 2.0, **options})


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "gspo": (lambda: gspo_loss(X, X, Y, M), r"log_probs \[2, 3\].*advantages \[3, 2\]"),
    "gspo without time": (lambda: gspo_loss(SCALAR, SCALAR, SCALAR, TRUE), r"log_probs must be \[..., T\]"),
    "gspo's mask": (lambda: gspo_loss(X, X, X, M.long()), "must be bool"),
    "gspo's type": (lambda: gspo_loss(X.long(), X, X, M), "log_probs must be floating point"),
    "gspo's clip_low": (lambda: gspo_loss(X, X, X, M, clip_low=1.0), r"clip_low must be in \(0, 1\), got 1.0"),
    "gspo's clip_high": (lambda: gspo_loss(X, X, X, M, clip_high=0.0), r"clip_high must be in \(0, inf"),
    "gspo's dual_clip": (lambda: gspo_loss(X, X, X, M, dual_clip=0.5), r"dual_clip must be in \(1, inf"),
    "cispo": (lambda: cispo_loss(X, X, Y, M, clip_high=1.0), r"advantages \[3, 2\]"),
    "cispo's mask": (lambda: cispo_loss(X, X, X, X, clip_high=1.0), "must be bool"),
    "cispo's type": (lambda: cispo_loss(X, X, X.long(), M, clip_high=1.0), "advantages must be floating point"),
    "cispo's clip_high": (lambda: cispo_loss(X, X, X, M, clip_high=0.0), r"clip_high must be in \(0, inf"),
    "cispo's clip_low": (lambda: cispo_loss(X, X, X, M, clip_high=1.0, clip_low=1.0), r"clip_low must be in \(0, 1\)"),
    "sapo": (lambda: sapo_loss(X, Y, X, M), r"old_log_probs \[3, 2\]"),
    "sapo's mask": (lambda: sapo_loss(X, X, X, X), "must be bool"),
    "sapo's type": (lambda: sapo_loss(X, X.long(), X, M), "old_log_probs must be floating point"),
    "sapo, positive": (lambda: sapo_loss(X, X, X, M, temperature_positive=0.0), r"temperature_positive .*\(0, inf\)"),
    "sapo, negative": (lambda: sapo_loss(X, X, X, M, temperature_negative=-1.0), r"temperature_negative .*got -1.0"),
    "weights": (lambda: weights(X, Y, M), r"old_log_probs \[2, 3\], sampler_log_probs \[3, 2\]"),
    "weights' mask": (lambda: weights(X, X, X), "must be bool"),
    "weights' type": (lambda: weights(X, X.long(), M), "sampler_log_probs must be floating point"),
    "weights without time": (lambda: weights(SCALAR, SCALAR, TRUE, level="sequence"), r"must be \[..., T\]"),
    "weights' level": (lambda: weights(X, X, M, level="batch"), "level must be one of 'token', .*got 'batch'"),
    "weights' mode": (lambda: weights(X, X, M, mode="clip"), "mode must be one of 'truncate', 'mask', got 'clip'"),
    "covariance": (lambda: token_covariance(X, Y, M), r"log_probs \[2, 3\], advantages \[3, 2\]"),
    "covariance's mask": (lambda: token_covariance(X, X, X), "must be bool"),
    "covariance's type": (lambda: token_covariance(X, X.long(), M), "advantages must be floating point"),
    "high": (lambda: weights(X, X, M, high=0.9), r"high must be in \[1, inf.*got 0.9"),
    "low": (lambda: weights(X, X, M, low=1.1), r"low must be in \[0, 1\], got 1.1"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
