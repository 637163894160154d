"""Losses per action, unreduced. `rlhf.reduce` turns them into one number.

All take `action_mask` and give exactly 0, with exactly 0 gradient, where it is False: padding may hold anything. A mask
applied only after the loss would come too late, since 0 * NaN and 0 * inf are NaN in the backward pass. Where every
slot is an action (a game), pass `torch.ones_like(x, dtype=torch.bool)`.

Floats may be of any type; each loss is computed and returned in the one that holds all of its inputs, at least float32.

More ways to weigh or clip the ratio are in `rlhf.policy_losses`, losses of pairs in `rlhf.preference_losses`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.categorical import expected_log, masked_log_softmax
from rlhf.checks import InputError, check_float, check_mask, check_range, check_same_shape
from rlhf.masking import fill_masked, in_one_type


class SurrogateTerms(NamedTuple):
    """loss [...], ratio [...] (detached; 1 in masked slots), is_clipped bool [...] (False in masked slots)."""

    loss: Tensor
    ratio: Tensor
    is_clipped: Tensor


class ActorCriticTerms(NamedTuple):
    """policy_loss [...] and value_loss [...] of one-step actor-critic."""

    policy_loss: Tensor
    value_loss: Tensor


class ValueTerms(NamedTuple):
    """loss [...] and is_clipped bool [...]: where the clipped prediction's error was the larger one."""

    loss: Tensor
    is_clipped: Tensor


def reinforce_loss(
    log_probs: Tensor, returns: Tensor, action_mask: Tensor, *, baseline: Tensor | None = None
) -> Tensor:
    """The policy gradient's loss, -(returns - baseline) * log pi(a|s): on-policy, no ratio.

    With `monte_carlo_returns` it is REINFORCE with reward-to-go; with a value as baseline or with ready advantages
    (`gae`, group-normalised) it is the vanilla policy gradient on them.

    Args:
        log_probs: [...] float, nats; carries the gradient.
        returns: [...] float, reward units; detached.
        action_mask: [...] bool.
        baseline: [...] float, reward units, or None for 0; must not depend on the action; detached.
    Returns:
        [...], 0 in masked slots.
    Raises:
        InputError: shapes differ or the mask is not bool.
    Source: Williams 1992, REINFORCE; Sutton & Barto 2018, eq. 13.11.
    """
    check_same_shape(log_probs=log_probs, returns=returns, baseline=baseline, action_mask=action_mask)
    check_float(log_probs=log_probs, returns=returns, baseline=baseline)
    log_probs, returns = in_one_type(log_probs, returns)
    advantages = returns.detach() if baseline is None else returns.detach() - baseline.detach()
    return fill_masked(advantages, action_mask).neg_() * fill_masked(log_probs, action_mask)


def actor_critic_loss(log_probs: Tensor, values: Tensor, td_targets: Tensor, action_mask: Tensor) -> ActorCriticTerms:
    """One-step actor-critic: the TD error drives both, -delta * log pi and 0.5 * delta^2, delta = target - V(s).

    Args:
        log_probs: [...] float, nats; carries the actor's gradient.
        values: [...] float, V(s) of the critic being trained; carries the critic's gradient.
        td_targets: [...] float, `td0_returns`; detached (semi-gradient).
        action_mask: [...] bool.
    Returns:
        ActorCriticTerms(policy_loss [...], value_loss [...]), 0 in masked slots.
    Raises:
        InputError: shapes differ or the mask is not bool.
    Source: Sutton & Barto 2018, section 13.5 (undiscounted form: without the factor gamma^t).
    """
    policy_loss = reinforce_loss(log_probs, td_targets, action_mask, baseline=values)
    return ActorCriticTerms(policy_loss, value_loss(values, td_targets, action_mask).loss)


def importance_weighted_loss(
    log_probs: Tensor, behavior_log_probs: Tensor, advantages: Tensor, action_mask: Tensor
) -> SurrogateTerms:
    """Off-policy policy gradient: -r * A with r = pi(a|s) / mu(a|s), unclipped. The gradient goes through r.

    Unbiased per step for actions drawn from mu (given its state distribution); its variance grows with the ratio's.

    Args:
        log_probs: [...] float, nats; carries the gradient.
        behavior_log_probs: [...] float, nats; same actions, policy that drew them; detached.
        advantages: [...] float, reward units; detached.
        action_mask: [...] bool.
    Returns:
        SurrogateTerms(loss [...], ratio [...], is_clipped all False).
    Raises:
        InputError: shapes differ or the mask is not bool.
    Source: Degris et al. 2012, arXiv:1205.4839; Schulman et al. 2015, arXiv:1502.05477 (TRPO).
    """
    log_ratio, advantages = _log_ratio(log_probs, behavior_log_probs, advantages, action_mask)
    ratio, weights = log_ratio.detach().exp(), fill_masked(advantages, action_mask).neg_()
    return SurrogateTerms(_weighted_(log_ratio, weights), ratio, torch.zeros_like(action_mask))


def clipped_surrogate_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> SurrogateTerms:
    """PPO's clipped surrogate for each action: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = pi / pi_old.

    The minimum leaves r free upwards where A < 0. `dual_clip` = c bounds it there: -max(min(...), c A).

    Args:
        log_probs: [...] float, nats; carries the gradient.
        old_log_probs: [...] float, nats; same actions, policy that collected them; detached.
        advantages: [...] float, reward units (none once normalised); detached.
        action_mask: [...] bool.
        clip_low, clip_high: dimensionless, 0 < clip_low < 1, clip_high > 0.
        dual_clip: the ratio above which an action with A < 0 is clipped, > 1 (the source: 3); None never clips it.
    Returns:
        SurrogateTerms(loss [...], ratio [...], is_clipped bool [...]: a clipped branch was taken, no gradient).
    Raises:
        InputError: shapes differ, the mask is not bool or a bound is out of range; names both.
    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; separate bounds: Yu et al. 2025 (DAPO), arXiv:2503.14476;
        dual clip: Ye et al. 2020, arXiv:1912.09729, eq. 5.
    """
    check_range("clip_low", clip_low, low=0, high=1, low_open=True, high_open=True)
    check_range("clip_high", clip_high, low=0, low_open=True)
    if dual_clip is not None:
        check_range("dual_clip", dual_clip, low=1, low_open=True)
    log_ratio, advantages = _log_ratio(log_probs, old_log_probs, advantages, action_mask)
    ratio = log_ratio.detach().exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    is_dual = None if dual_clip is None else (advantages < 0) & (ratio > dual_clip)
    if dual_clip is not None and is_dual is not None:
        bounded.masked_fill_(is_dual, dual_clip)
    bounded.mul_(advantages)
    is_clipped = bounded < ratio * advantages
    if is_dual is not None:
        is_clipped |= is_dual
    is_clipped &= action_mask
    # A clipped action has no gradient: its ratio, which may have overflowed, is kept out of the differentiated exp.
    # There it counts as 1, and the bound stands in the other factor.
    weights = torch.where(is_clipped, bounded, advantages)
    del bounded, is_dual
    weights.neg_().masked_fill_(~action_mask, 0.0)
    return SurrogateTerms(_weighted_(log_ratio, weights, is_clipped), ratio, is_clipped)


def kl_penalized_surrogate_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    *,
    kl_coef: float,
    kl: Tensor | None = None,
) -> SurrogateTerms:
    """KL-PPO: -r A + kl_coef * KL(pi_old || pi). Adapt `kl_coef` with `rlhf.kl.adapt_kl_coef_by_doubling`.

    Args:
        log_probs: [...] float, nats; carries the gradient.
        old_log_probs: [...] float, nats; same actions, policy that collected them; detached.
        advantages: [...] float, reward units; detached.
        action_mask: [...] bool.
        kl_coef: reward units per nat, >= 0.
        kl: [...] float, nats, with gradient: the exact KL(pi_old || pi) of each state where the whole distribution is
            at hand. None estimates it from the action, r - 1 - log r, whose gradient is unbiased too, since the
            actions come from pi_old.
    Returns:
        SurrogateTerms(loss [...], ratio [...], is_clipped all False).
    Raises:
        InputError: shapes differ, the mask is not bool or kl_coef < 0.
    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 8.
    """
    check_range("kl_coef", kl_coef, low=0)
    check_same_shape(log_probs=log_probs, kl=kl)
    check_float(kl=kl)
    log_ratio, advantages = _log_ratio(log_probs, old_log_probs, advantages, action_mask)
    ratio, weights = log_ratio.detach().exp(), fill_masked(advantages, action_mask).neg_()
    if kl is not None:
        loss = _weighted_(log_ratio, weights).add_(fill_masked(kl, action_mask), alpha=kl_coef)
    else:
        # -r A + kl_coef (r - 1 - log r), sorted by r: one exponential to keep for the gradient instead of two.
        loss = (log_ratio.exp() * weights.add_(kl_coef)).sub_(log_ratio, alpha=kl_coef).sub_(kl_coef)
    return SurrogateTerms(loss, ratio, torch.zeros_like(action_mask))


def value_loss(
    values: Tensor,
    returns: Tensor,
    action_mask: Tensor,
    *,
    old_values: Tensor | None = None,
    value_clip: float | None = None,
) -> ValueTerms:
    """0.5 * (V - returns)^2; with `value_clip` the larger of that and 0.5 * (V_old + clip(V - V_old) - returns)^2.

    Args:
        values: [...] float, reward units; carries the gradient.
        returns: [...] float, reward units; detached.
        action_mask: [...] bool.
        old_values: [...] float, the critic's values before this update; detached; needed with value_clip.
        value_clip: half-width of the interval around old_values, reward units, > 0; None does not clip.
    Returns:
        ValueTerms(loss [...], is_clipped bool [...]).
    Raises:
        InputError: shapes differ, the mask is not bool, value_clip <= 0 or given without old_values.
    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 9; clipping: the authors' code, see Huang et al. 2022,
        "The 37 implementation details of PPO", detail 9.
    """
    check_same_shape(values=values, returns=returns, old_values=old_values, action_mask=action_mask)
    check_float(values=values, returns=returns, old_values=old_values)
    old = (values if old_values is None else old_values).detach()
    values, returns, old = in_one_type(values, returns.detach(), old)
    error = fill_masked(values - returns, action_mask)
    if value_clip is None:
        return ValueTerms((error * error).mul_(0.5), torch.zeros_like(action_mask))
    check_range("value_clip", value_clip, low=0, low_open=True)
    if old_values is None:
        raise InputError("value_clip needs old_values: the critic's values before this update")
    near = values.detach().clamp(old - value_clip, old + value_clip)
    clipped_error = near.sub_(returns)
    # A larger error than the prediction's own is one that the clip made: it has no gradient.
    is_clipped = (clipped_error.abs() > error.detach().abs()) & action_mask
    error = torch.where(is_clipped, clipped_error, error)
    return ValueTerms((error * error).mul_(0.5), is_clipped)


def categorical_entropy(logits: Tensor, action_mask: Tensor) -> Tensor:
    """Entropy of softmax(logits) in each state; subtract it, times entropy_coef, from the loss to be minimised.

    Args:
        logits: [..., V] float, unnormalised, divided by the sampling temperature; carries the gradient.
            -inf marks an outcome that cannot happen.
        action_mask: [...] bool.
    Returns:
        [...] nats, between 0 and log V; 0 in masked slots.
    Raises:
        InputError: logits do not fit the mask, which must be bool.
    """
    check_float(logits=logits)
    check_mask(action_mask=action_mask)
    check_same_shape(logits_without_last_axis=logits[..., 0], action_mask=action_mask)
    (logits,) = in_one_type(logits)
    log_p = masked_log_softmax(logits, action_mask)
    finite = log_p.clamp(min=torch.finfo(log_p.dtype).min)  # 0 log 0 = 0, in the gradient too
    return fill_masked(-expected_log(log_p, finite), action_mask)


def _log_ratio(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, action_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Arguments checked; log(pi / pi_old) with its gradient, 0 in masked slots; and the advantages, detached."""
    check_same_shape(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages, action_mask=action_mask)
    check_float(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    log_probs, old_log_probs, advantages = in_one_type(log_probs, old_log_probs, advantages)
    return fill_masked(log_probs - old_log_probs.detach(), action_mask), advantages.detach()


def _weighted_(log_ratio: Tensor, weights: Tensor, is_constant: Tensor | None = None) -> Tensor:
    """ratio * weight, the weight itself where `is_constant`; overwrites log_ratio.

    Exactly 0 where the weight is, though the ratio overflowed: inf * 0 would be NaN.
    """
    constant = weights == 0
    if is_constant is not None:
        constant |= is_constant
    ratio = log_ratio.masked_fill_(constant, 0.0).exp_()
    del constant
    return ratio * weights
