"""KL estimators: expectations, and expectations of gradients, by summing over every outcome of a small categorical."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from rlhf.checks import InputError
from rlhf.kl import KLEstimator, adapt_kl_coef_by_doubling, adapt_kl_coef_proportionally, exact_kl, kl_estimate

OUTCOMES = 5
ESTIMATORS: list[KLEstimator] = ["k1", "k2", "k3", "abs"]
EVERYWHERE = torch.ones(OUTCOMES, dtype=torch.bool)
logit_lists = st.lists(st.floats(-3, 3), min_size=OUTCOMES, max_size=OUTCOMES)


def policies(logits: list[float], ref_logits: list[float]) -> tuple[Tensor, Tensor]:
    return torch.tensor(logits, dtype=torch.float64, requires_grad=True), torch.tensor(ref_logits, dtype=torch.float64)


def enumerated(logits: Tensor, ref_logits: Tensor, estimator: KLEstimator, **options: Any) -> Tensor:
    """Expectation over the actions of pi. Probabilities are detached: actions are drawn, not differentiated."""
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    estimates = kl_estimate(log_p, log_q, EVERYWHERE, estimator=estimator, **options)
    return (log_p.exp().detach() * estimates).sum()


def kl_of(logits: Tensor, other: Tensor) -> Tensor:
    return (logits.softmax(-1) * (logits.log_softmax(-1) - other.log_softmax(-1))).sum()


def gradient(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits)[0]


def close(actual: Tensor, wanted: Tensor | float, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(
        actual, torch.as_tensor(wanted, dtype=actual.dtype).expand_as(actual), rtol=tolerance, atol=tolerance
    )


def test_estimates_by_hand() -> None:
    log_probs = torch.tensor([math.log(0.5), math.log(0.1), math.log(0.3)], dtype=torch.float64)
    ref_log_probs = torch.tensor([math.log(0.25), math.log(0.4), math.log(0.3)], dtype=torch.float64)
    mask = torch.ones(3, dtype=torch.bool)
    two, four = math.log(2), math.log(4)
    by_hand: dict[KLEstimator, list[float]] = {
        "k1": [two, -four, 0.0],
        "k2": [two**2 / 2, four**2 / 2, 0.0],
        "k3": [0.5 - 1 + two, 4 - 1 - four, 0.0],
        "abs": [two, four, 0.0],
    }
    for estimator, expected in by_hand.items():
        close(
            kl_estimate(log_probs, ref_log_probs, mask, estimator=estimator),
            torch.tensor(expected, dtype=torch.float64),
        )


@given(logit_lists, logit_lists)
def test_k1_and_k3_are_unbiased_and_k3_is_never_negative(a: list[float], b: list[float]) -> None:
    logits, ref_logits = policies(a, b)
    kl = kl_of(logits, ref_logits)
    close(enumerated(logits, ref_logits, "k1"), kl)
    close(enumerated(logits, ref_logits, "k3"), kl)
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    assert (kl_estimate(log_p, log_q, EVERYWHERE, estimator="k3") >= 0).all()


def test_k2_is_biased_by_the_third_order_only() -> None:
    logits, direction = (
        torch.tensor([0.3, -0.2, 1.0, 0.0, -1.0]).double(),
        torch.tensor([1.0, -2.0, 0.5, 0.3, 1.0]).double(),
    )
    errors = [
        (enumerated(logits, logits + step * direction, "k2") - kl_of(logits, logits + step * direction)).abs().item()
        for step in (1e-2, 1e-3)
    ]
    assert 0 < errors[1] < errors[0] / 900  # a tenth of the step, a thousandth of the bias


@given(logit_lists, logit_lists)
def test_gradients_as_a_loss_term(a: list[float], b: list[float]) -> None:
    """On-policy: k1 does nothing on average, k2 descends the KL, k3 the reversed KL."""
    logits, ref_logits = policies(a, b)
    close(gradient(enumerated(logits, ref_logits, "k1"), logits), 0.0)
    close(gradient(enumerated(logits, ref_logits, "k2"), logits), gradient(kl_of(logits, ref_logits), logits))
    close(gradient(enumerated(logits, ref_logits, "k3"), logits), gradient(kl_of(ref_logits, logits), logits))


@given(logit_lists, logit_lists)
def test_gradients_as_a_reward(a: list[float], b: list[float]) -> None:
    """The policy gradient of a detached reward, E[reward * grad log pi]: k1's is that of the KL."""
    logits, ref_logits = policies(a, b)
    log_p = logits.log_softmax(-1)
    k1 = kl_estimate(log_p, ref_logits.log_softmax(-1), EVERYWHERE, estimator="k1").detach()
    policy_gradient = gradient((log_p.exp().detach() * k1 * log_p).sum(), logits)
    close(policy_gradient, gradient(kl_of(logits, ref_logits), logits))


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_are_no_rewards_for_the_kl(estimator: str) -> None:
    logits, ref_logits = policies([0.0, 1.0, 2.0, 0.0, 1.0], [2.0, 1.0, 0.0, 0.0, -1.0])
    log_p = logits.log_softmax(-1)
    reward = kl_estimate(log_p, ref_logits.log_softmax(-1), EVERYWHERE, estimator=estimator).detach()
    policy_gradient = gradient((log_p.exp().detach() * reward * log_p).sum(), logits)
    assert (policy_gradient - gradient(kl_of(logits, ref_logits), logits)).abs().max() > 0.05


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_only_log_probs_carry_gradient(estimator: str) -> None:
    log_probs = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    ref_log_probs = torch.tensor([-1.5, -0.5], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, dtype=torch.bool)
    kl_estimate(log_probs, ref_log_probs, mask, estimator=estimator).sum().backward()
    assert log_probs.grad is not None
    assert ref_log_probs.grad is None
    fixed = ref_log_probs.detach()
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, fixed, mask, estimator=estimator), (log_probs,))


def test_k3_keeps_its_digits_near_the_reference() -> None:
    """exp(-d) - 1 + d cancels to noise in float32 when d is 1e-3; the true value is d^2 / 2 - d^3 / 6."""
    d = torch.tensor([1e-3, -1e-3, 1e-4])
    k3 = kl_estimate(d, torch.zeros(3), torch.ones(3, dtype=torch.bool), estimator="k3")
    torch.testing.assert_close(k3, d.square() / 2 - d**3 / 6, rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------------- straight-through, and clamps
@given(logit_lists, logit_lists)
def test_straight_through_is_unbiased_in_value_and_gradient(a: list[float], b: list[float]) -> None:
    logits, ref_logits = policies(a, b)
    kl_gradient = gradient(kl_of(logits, ref_logits), logits)
    for estimator in ESTIMATORS:
        estimate = enumerated(logits, ref_logits, estimator, straight_through=True)
        assert torch.equal(estimate, enumerated(logits, ref_logits, estimator))
        close(gradient(estimate, logits), kl_gradient)


def test_abs_has_a_value_and_a_gradient_of_its_own() -> None:
    """Neither the KL nor, on average, the gradient of the KL in either direction."""
    logits, ref_logits = policies([0.0, 1.0, 2.0, 0.0, 1.0], [2.0, 1.0, 0.0, 0.0, -1.0])
    kl, reversed_kl = kl_of(logits, ref_logits), kl_of(ref_logits, logits)
    estimate = enumerated(logits, ref_logits, "abs")
    assert estimate > kl + 0.1
    for other in (kl, reversed_kl):
        assert (gradient(enumerated(logits, ref_logits, "abs"), logits) - gradient(other, logits)).abs().max() > 0.05


DISTANCES = torch.tensor([-150.0, -11.5, -9.0, -4.0, -0.5, 0.0, 0.5, 4.0, 4.6, 10.5, 150.0], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("clamps", [(None, None), (5.0, None), (None, 10.0), (20.0, 10.0), (3.0, 100.0), (None, 0.3)])
def test_clamps_hold_input_and_output_and_stop_the_gradient(
    estimator: KLEstimator, clamps: tuple[float | None, float | None], dtype: torch.dtype
) -> None:
    def estimate(d: Tensor, **options: Any) -> Tensor:
        return kl_estimate(d, torch.zeros_like(d), torch.ones_like(d).bool(), estimator=estimator, **options)

    limits = [math.inf if clamp is None else clamp for clamp in clamps]
    d = DISTANCES.to(dtype).requires_grad_()
    clamped = estimate(d, clamp_input=clamps[0], clamp_output=clamps[1])
    plain = estimate(DISTANCES.clamp(-limits[0], limits[0]))
    if clamps != (None, None) or dtype == torch.float64 or estimator != "k3":
        torch.testing.assert_close(clamped.double(), plain.clamp(-limits[1], limits[1]), rtol=1e-6, atol=1e-7)
        acts = (DISTANCES.abs() > limits[0]) | (plain.abs() > limits[1])
        free = DISTANCES.clone().requires_grad_()
        wanted = torch.where(acts, 0.0, torch.autograd.grad(estimate(free).sum(), free)[0])
        found = torch.autograd.grad(clamped.sum(), d)[0]  # no NaN of an exp that overflowed
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-7)
        assert (found[acts] == 0).all()
    through = estimate(d, clamp_input=clamps[0], clamp_output=clamps[1], straight_through=True)
    assert torch.equal(through, clamped)
    assert torch.equal(torch.autograd.grad(through.sum(), d)[0], d.detach())  # k2's, not clamped


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("options", [{}, {"straight_through": True}, {"clamp_input": 2.0, "clamp_output": 1.0}])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_garbage_in_masked_slots_changes_nothing(estimator: KLEstimator, options: dict, garbage: float) -> None:
    """Bit for bit, in either argument, in the value and in the gradient, which is exactly 0 there."""
    generator = torch.Generator().manual_seed(0)
    log_probs, ref_log_probs = -torch.rand(2, 4, 9, generator=generator)
    mask = torch.rand(4, 9, generator=generator) < 0.6
    results = []
    for filler in (0.0, garbage):
        new = torch.where(mask, log_probs, filler).requires_grad_()
        ref = torch.where(mask, ref_log_probs, -filler)
        kl = kl_estimate(new, ref, mask, estimator=estimator, **options)
        results.append((kl.detach(), torch.autograd.grad(kl.sum(), new)[0]))
    (clean, clean_gradient), (dirty, dirty_gradient) = results
    assert torch.equal(clean, dirty)
    assert torch.equal(clean_gradient, dirty_gradient)
    assert (dirty_gradient[~mask] == 0).all()
    assert (dirty[~mask] == 0).all()


# ----------------------------------------------------------------------------------------------------------- exact KL
@given(st.lists(st.tuples(logit_lists, logit_lists), min_size=1, max_size=3))
def test_exact_kl_is_that_of_torch_distributions(rows: list[tuple[list[float], list[float]]]) -> None:
    logits, ref_logits = (torch.tensor(x, dtype=torch.float64) for x in zip(*rows, strict=True))
    mask = torch.ones(len(rows), dtype=torch.bool)
    expected = kl_divergence(Categorical(logits=logits), Categorical(logits=ref_logits))
    close(exact_kl(logits, ref_logits, mask), expected)
    close(exact_kl(logits + 3.0, ref_logits - 50.0, mask), expected)  # unnormalised
    close(exact_kl(logits, logits, mask), 0.0)
    mask[0] = False
    assert exact_kl(logits, ref_logits, mask)[0] == 0


def test_exact_kl_gradient_flows_to_logits_only() -> None:
    logits = torch.randn(2, 3, OUTCOMES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ref_logits = torch.randn(2, 3, OUTCOMES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert torch.autograd.gradcheck(lambda x: exact_kl(x, ref_logits, mask), (logits.requires_grad_(),))
    exact_kl(logits, ref_logits.requires_grad_(), mask).sum().backward()
    assert ref_logits.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_outcomes_count_for_nothing(dtype: torch.dtype) -> None:
    """-inf in both: the KL, and its gradient, over the outcomes that remain."""
    logits = torch.tensor([0.5, -torch.inf, 1.0, -torch.inf, -0.7], dtype=dtype, requires_grad=True)
    ref_logits = torch.tensor([0.1, -torch.inf, -1.0, -torch.inf, 0.4], dtype=dtype)
    remaining = torch.tensor([0, 2, 4])
    kl = exact_kl(logits, ref_logits, torch.tensor(True))
    expected = kl_of(logits[remaining], ref_logits[remaining])
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(gradient(kl, logits), gradient(expected, logits))


def test_what_only_the_reference_can_do_costs_nothing_extra() -> None:
    """pi = 0 where pi_ref > 0: 0 log 0 = 0, and the value log 2 of two halves against two quarters."""
    logits = torch.tensor([0.0, 0.0, -torch.inf, -torch.inf], requires_grad=True)
    kl = exact_kl(logits, torch.zeros(4), torch.tensor(True))
    torch.testing.assert_close(kl.item(), math.log(2), rtol=1e-6, atol=0)
    assert torch.isfinite(gradient(kl, logits)).all()


@pytest.mark.parametrize("log_odds", [0.0, -10.0, -80.0, -200.0])
def test_what_only_the_policy_can_do_is_infinitely_far(log_odds: float) -> None:
    """Even where its probability rounds to 0: infinite by the definition, or 0 in the limit, but not NaN."""
    kl = exact_kl(torch.tensor([0.0, log_odds]), torch.tensor([0.0, -torch.inf]), torch.tensor(True))
    assert not kl.isnan()
    if log_odds > -80:
        assert kl == torch.inf


# --------------------------------------------------------------------------------------------------------- adaptation
@pytest.mark.parametrize(
    ("observed", "factor"),
    [(6.0, 1.0), (6.6, 1 + 0.1 * 0.25), (5.4, 1 - 0.1 * 0.25), (7.2, 1.05), (60.0, 1.05), (1.0, 0.95), (-3.0, 0.95)],
)
def test_proportional_adaptation_in_closed_form(observed: float, factor: float) -> None:
    """Error relative to the target of 6, clipped to 20 %, over a quarter of the horizon."""
    adapted = adapt_kl_coef_proportionally(0.3, observed, target_kl=6.0, horizon=1000, num_samples=250)
    assert adapted == pytest.approx(0.3 * factor, rel=1e-12)


@given(st.floats(0, 10), st.floats(-5, 50), st.floats(1e-3, 10), st.floats(1, 1e5), st.floats(0.01, 1))
def test_proportional_adaptation_is_bounded(
    coef: float, observed: float, target: float, horizon: float, fraction: float
) -> None:
    adapted = adapt_kl_coef_proportionally(
        coef, observed, target_kl=target, horizon=horizon, num_samples=fraction * horizon
    )
    assert 0.8 * coef - 1e-12 <= adapted <= 1.2 * coef + 1e-12
    assert (adapted - coef) * (observed - target) >= 0


@pytest.mark.parametrize(
    ("observed", "expected"),
    [(0.01, 0.5), (0.0151, 1.0), (0.015, 0.5), (0.0066, 0.25), (0.0067, 0.5), (0.0, 0.25), (-0.1, 0.25), (9.0, 1.0)],
)
def test_doubling_in_closed_form(observed: float, expected: float) -> None:
    assert adapt_kl_coef_by_doubling(0.5, observed, target_kl=0.01) == expected


# ------------------------------------------------------------------------------------------------------ bad arguments
def proportionally(**changes: float) -> float:
    arguments = {"kl_coef": 0.1, "observed_kl": 1.0, "target_kl": 6.0, "horizon": 100, "num_samples": 10} | changes
    return adapt_kl_coef_proportionally(**arguments)


def doubling(**changes: float) -> float:
    return adapt_kl_coef_by_doubling(**({"kl_coef": 0.1, "observed_kl": 1.0, "target_kl": 6.0} | changes))


X, M = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "shapes": (lambda: kl_estimate(X, X[0], M, estimator="k1"), r"log_probs \[2, 3\], ref_log_probs \[3\]"),
    "mask shape": (lambda: kl_estimate(X, X, M[0], estimator="k1"), r"action_mask \[3\]"),
    "mask": (lambda: kl_estimate(X, X, M.float(), estimator="k1"), "must be bool"),
    "type": (lambda: kl_estimate(X.long(), X, M, estimator="k1"), "log_probs must be floating point"),
    "estimator": (lambda: kl_estimate(X, X, M, estimator="k4"), "'k1', 'k2', 'k3', 'abs', got 'k4'"),
    "input clamp": (lambda: kl_estimate(X, X, M, estimator="k1", clamp_input=0.0), r"clamp_input must be in \(0"),
    "output clamp": (lambda: kl_estimate(X, X, M, estimator="k3", clamp_output=-1.0), "clamp_output must be in"),
    "logits": (lambda: exact_kl(X, X[:, :2], M[:, 0]), r"logits \[2, 3\], ref_logits \[2, 2\]"),
    "logits and mask": (lambda: exact_kl(X, X, M), r"action_mask \[2, 3\]"),
    "logits' mask": (lambda: exact_kl(X, X, M[:, 0].long()), "action_mask must be bool"),
    "logits' type": (lambda: exact_kl(X.long(), X, M[:, 0]), "logits must be floating point"),
    **{f"{name} {value}": (lambda name=name, value=value: proportionally(**{name: value}), f"{name} must be")
       for name, value in [("kl_coef", -1.0), ("observed_kl", math.nan), ("observed_kl", math.inf), ("target_kl", 0.0),
                           ("horizon", 0.0), ("num_samples", 0.0), ("num_samples", 101.0)]},
    **{f"doubling, {name} {value}": (lambda name=name, value=value: doubling(**{name: value}), f"{name} must be")
       for name, value in [("kl_coef", -1.0), ("observed_kl", math.nan), ("target_kl", -1.0)]},
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
