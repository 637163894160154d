"""KL divergence: per-action estimators, the exact sum, and how its coefficient adapts.

With actions drawn from pi (`log_probs`) the estimators below measure KL(pi || pi_ref). What their *gradients* do is
another matter, and it depends on where the estimate stands:

- as a reward (detached): k1's policy gradient is that of the KL; k2 and k3 are not rewards for it (k3 - k1 = r - 1 has
  mean 0 but correlates with the score function).
- as a loss term, on-policy: the gradient of k1 has mean 0 and does nothing; the gradient of k2 is the KL's; that of k3
  is the *reversed* KL's, KL(pi_ref || pi), and only near pi_ref are they alike.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from rlhf.categorical import expected_log, masked_log_softmax
from rlhf.checks import check_choice, check_float, check_mask, check_range, check_same_shape
from rlhf.masking import fill_masked, in_one_type

KLEstimator = Literal["k1", "k2", "k3", "abs"]


def kl_estimate(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    action_mask: Tensor,
    *,
    estimator: KLEstimator,
    straight_through: bool = False,
    clamp_input: float | None = None,
    clamp_output: float | None = None,
) -> Tensor:
    """Estimate of KL(pi || pi_ref) from each action drawn from pi. With d = log pi - log pi_ref:

    k1 = d (unbiased, high variance, either sign); k2 = d^2 / 2 (biased, low variance);
    k3 = exp(-d) - 1 + d (unbiased, never negative; infinite where d < -88 in float32);
    abs = |d| (biased: of first order in the distance, where the KL is of second).

    Gradients as a loss term, on-policy: k1 has 0 on average, k2 the KL's, k3 the reversed KL's, abs neither.
    `straight_through` puts k2's in their place: then k1 and k3 are unbiased in value and gradient (elsewhere called
    "k1+", "k3+"). A clamp biases the value, and the gradient, which is exactly 0 where it acts.

    Args:
        log_probs: [...] float, nats; carries the gradient.
        ref_log_probs: [...] float, nats; same actions; detached.
        action_mask: [...] bool.
        estimator: "k1", "k2", "k3" or "abs".
        straight_through: the gradient is that of k2, without clamps, whatever the value.
        clamp_input: nats, > 0; d is held within +-clamp_input. None does not clamp.
        clamp_output: nats, > 0; the estimate is held within +-clamp_output. None does not clamp.
    Returns:
        [...] nats, 0 in masked slots.
    Raises:
        InputError: shapes differ, the mask is not bool, unknown estimator, a clamp is not positive.
    Source: Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html; gradients: Tang & Munos 2025,
        arXiv:2506.09477.
    """
    check_same_shape(log_probs=log_probs, ref_log_probs=ref_log_probs, action_mask=action_mask)
    check_float(log_probs=log_probs, ref_log_probs=ref_log_probs)
    check_choice("estimator", estimator, get_args(KLEstimator))
    log_probs, ref_log_probs = in_one_type(log_probs, ref_log_probs)
    difference = fill_masked(log_probs - ref_log_probs.detach(), action_mask)
    estimate = _estimate(difference, estimator, clamp_input, clamp_output)
    if not straight_through:
        return estimate
    k2 = (difference * difference).mul_(0.5)
    return (k2 - k2.detach()).add_(estimate.detach())


def _estimate(
    difference: Tensor, estimator: KLEstimator, clamp_input: float | None, clamp_output: float | None
) -> Tensor:
    if clamp_input is not None:
        check_range("clamp_input", clamp_input, low=0, low_open=True)
        difference = difference.clamp(-clamp_input, clamp_input)
    if clamp_output is not None:
        check_range("clamp_output", clamp_output, low=0, low_open=True)
        # Every estimate is larger than c where |d| > c + 1, so this changes none; but no exp overflows, whose gradient
        # would be 0 * inf.
        difference = difference.clamp(-clamp_output - 1, clamp_output + 1)
    if estimator == "k1":
        estimate = difference
    elif estimator == "k2":
        estimate = (difference * difference).mul_(0.5)
    elif estimator == "k3":
        estimate = torch.expm1(-difference) + difference
    else:
        estimate = difference.abs()
    return estimate if clamp_output is None else estimate.clamp(-clamp_output, clamp_output)


def exact_kl(logits: Tensor, ref_logits: Tensor, action_mask: Tensor) -> Tensor:
    """KL(pi || pi_ref) of two categorical distributions, summed over all V outcomes.

    Args:
        logits: [..., V] float, unnormalised; carries the gradient.
        ref_logits: [..., V] float; detached. -inf in both marks an outcome that neither can produce.
        action_mask: [...] bool.
    Returns:
        [...] nats, 0 in masked slots. Infinite where pi can do what pi_ref cannot.
    Raises:
        InputError: shapes differ or do not fit the mask, which must be bool.
    """
    check_same_shape(logits=logits, ref_logits=ref_logits)
    check_float(logits=logits, ref_logits=ref_logits)
    check_same_shape(logits_without_last_axis=logits[..., 0], action_mask=action_mask)
    check_mask(action_mask=action_mask)
    logits, ref_logits = in_one_type(logits, ref_logits)
    log_p = masked_log_softmax(logits, action_mask)
    log_ratio = log_p - masked_log_softmax(ref_logits.detach(), action_mask)
    # 0 log 0 = 0, in the gradient too. Behind autograd's back: p, which is 0 there, is a factor of every derivative.
    log_ratio.detach().masked_fill_(log_p < math.log(torch.finfo(log_p.dtype).tiny), 0.0)
    return expected_log(log_p, log_ratio)


def adapt_kl_coef_proportionally(
    kl_coef: float, observed_kl: float, *, target_kl: float, horizon: float, num_samples: float
) -> float:
    """The next coefficient: moved in proportion to the relative error, which is clipped to +-20 %.

    kl_coef * (1 + clip(observed_kl / target_kl - 1, -0.2, 0.2) * num_samples / horizon).

    Args:
        kl_coef: the coefficient used so far, dimensionless, >= 0.
        observed_kl: nats, same unit as target_kl (per sequence in the source); a negative estimate is allowed.
        target_kl: nats, > 0.
        horizon: number of samples over which a constant error of 20 % changes the coefficient by about 20 %, > 0.
        num_samples: samples seen since the last call, 0 < num_samples <= horizon.
    Raises:
        InputError: an argument is out of range or observed_kl is not finite.
    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """
    _check_adaptation(kl_coef, observed_kl, target_kl)
    check_range("horizon", horizon, low=0, low_open=True)
    check_range("num_samples", num_samples, low=0, high=horizon, low_open=True)
    error = min(max(observed_kl / target_kl - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_samples / horizon)


def adapt_kl_coef_by_doubling(kl_coef: float, observed_kl: float, *, target_kl: float) -> float:
    """The next coefficient of KL-PPO: doubled above 1.5 * target_kl, halved below target_kl / 1.5, else unchanged.

    Args:
        kl_coef: the coefficient used so far, dimensionless, >= 0.
        observed_kl: nats per action, KL(pi_old || pi) after the update.
        target_kl: nats per action, > 0.
    Raises:
        InputError: an argument is out of range or observed_kl is not finite.
    Source: Schulman et al. 2017, arXiv:1707.06347, section 4.
    """
    _check_adaptation(kl_coef, observed_kl, target_kl)
    if observed_kl > 1.5 * target_kl:
        return kl_coef * 2
    if observed_kl < target_kl / 1.5:
        return kl_coef / 2
    return kl_coef


def _check_adaptation(kl_coef: float, observed_kl: float, target_kl: float) -> None:
    check_range("kl_coef", kl_coef, low=0)
    check_range("target_kl", target_kl, low=0, low_open=True)
    check_range("observed_kl", observed_kl, low_open=True, high_open=True)
