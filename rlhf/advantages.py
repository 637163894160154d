"""Advantage and return estimators, each of them one reverse linear scan (`rlhf.scan`) over masked steps.

Common to all, with time the last axis:

- `action_mask` [..., T] marks the steps at which the policy acted. Other slots, padding as well as gaps between actions
  (the tokens a tool returned), are no steps of the decision process: they are neither discounted nor credited, the
  estimate carries through gaps, and whatever they hold, NaN included, changes nothing. Results are 0 there.
- What follows an action is worth 0 if the step `terminated`; `bootstrap_values` at that step if it was `truncated`
  (both flags: terminated); the value of the row's next action otherwise. After the row's last action there is nothing:
  to continue a rollout window beyond its edge, flag its last step truncated and give V(next state) in
  `bootstrap_values`. In either case nothing is carried back across the end of the episode.
- Nothing here is differentiated: results are detached, in the rewards' type, at least float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.checks import InputError, check_float, check_mask, check_range, check_same_shape, check_time_axis
from rlhf.masking import fill_masked, in_one_type, masked_whiten
from rlhf.scan import reverse_linear_scan_


class AdvantageEstimate(NamedTuple):
    """advantages [..., T] in reward units, and returns = advantages + values, the value function's targets."""

    advantages: Tensor
    returns: Tensor


class VTraceEstimate(NamedTuple):
    """advantages [..., T] in reward units, importance weight included, and the value function's targets [..., T]."""

    advantages: Tensor
    targets: Tensor


class _Steps(NamedTuple):
    """The decision process under a mask."""

    rewards: Tensor  # [..., T] plus gamma * V of the next state where the episode was cut off; 0 in gaps; a copy
    ended: Tensor | None  # [..., T] bool: the last action of an episode; None if no flags were given
    action_mask: Tensor  # [..., T] bool


def monte_carlo_returns(
    rewards: Tensor,
    action_mask: Tensor,
    *,
    gamma: float = 1.0,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
) -> Tensor:
    """Discounted reward-to-go, G_t = r_t + gamma * G_{t+1}.

    Args:
        rewards: [..., T] float, reward units.
        action_mask: [..., T] bool.
        gamma: 0 <= gamma <= 1, discount per action.
        terminated, truncated: [..., T] bool or None (nowhere); see the module.
        bootstrap_values: [..., T] float, V of the state after the step; read only where truncated.
    Returns:
        [..., T], 0 in masked slots.
    Raises:
        InputError: shapes differ, a mask is not bool, gamma is out of range, truncated without bootstrap_values.
    Source: Sutton & Barto 2018, eq. 3.9; reward-to-go: Williams 1992, REINFORCE.
    """
    steps = _steps(rewards, None, action_mask, gamma, terminated, truncated, bootstrap_values)
    return _carry(steps, steps.rewards, gamma)


def episode_returns(
    rewards: Tensor,
    action_mask: Tensor,
    *,
    gamma: float = 1.0,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
) -> Tensor:
    """The whole episode's discounted return R(tau), discounted from its first step, at each of its steps.

    REINFORCE before reward-to-go; unbiased too, with more variance. Arguments, shapes and errors are those of
    `monte_carlo_returns`.
    Source: Sutton & Barto 2018, section 13.3.
    """
    steps = _steps(rewards, None, action_mask, gamma, terminated, truncated, bootstrap_values)
    to_go = _carry(steps, steps.rewards, gamma)
    # An episode starts at an action whose predecessor, if any, does not continue. Forwards in time, that is backwards
    # along flipped rows: what continues is carried through gaps, then each start's return through its episode.
    continued = _through_gaps_(_continues(steps).flip(-1).to(to_go.dtype), action_mask.flip(-1)) > 0
    starts = action_mask.flip(-1) & ~torch.nn.functional.pad(continued[..., 1:], (0, 1))
    kept = to_go.flip(-1).masked_fill_(~starts, 0.0)
    del to_go
    kept = reverse_linear_scan_(kept, (~starts).to(kept.dtype)).flip(-1)
    return kept.masked_fill_(~action_mask, 0.0)


def td0_returns(
    rewards: Tensor,
    values: Tensor,
    action_mask: Tensor,
    *,
    gamma: float = 1.0,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
) -> Tensor:
    """One-step targets r_t + gamma * V(s_{t+1}); minus the values they are the TD(0) advantage.

    Args:
        rewards: [..., T] float, reward units.
        values: [..., T] float, V(s_t).
        Others as in `monte_carlo_returns`.
    Returns:
        [..., T], 0 in masked slots.
    Raises:
        InputError: as in `monte_carlo_returns`.
    Source: Sutton & Barto 2018, eq. 6.2.
    """
    steps = _steps(rewards, values, action_mask, gamma, terminated, truncated, bootstrap_values)
    return _carry(steps, steps.rewards, gamma, worth=_filled(values, steps), weight=0.0)


def n_step_returns(
    rewards: Tensor,
    values: Tensor,
    action_mask: Tensor,
    *,
    n: int,
    gamma: float = 1.0,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
) -> Tensor:
    """n rewards, then the value: sum_{k<n} gamma^k r_{t+k} + gamma^n V(s_{t+n}); shorter where the episode ends.

    n = 1 is `td0_returns`; n of at least the episode's length is `monte_carlo_returns`. Takes n passes.

    Args:
        n: number of rewards, at least 1.
        Others as in `td0_returns`.
    Returns:
        [..., T], 0 in masked slots.
    Raises:
        InputError: n < 1, or as in `monte_carlo_returns`.
    Source: Sutton & Barto 2018, eq. 7.1.
    """
    check_range("n", n, low=1)
    steps = _steps(rewards, values, action_mask, gamma, terminated, truncated, bootstrap_values)
    following, rewards, flat = _next_action(steps), steps.rewards, _filled(values, steps).flatten()
    del steps
    flat = torch.nn.functional.pad(flat, (0, 1))  # a 0 at the end for what follows nothing
    returns = flat[:-1].view_as(rewards)
    for _ in range(min(n, rewards.shape[-1])):
        torch.add(rewards, flat.index_select(0, following).view_as(returns), alpha=gamma, out=returns)
    return returns


def td_lambda_returns(
    rewards: Tensor,
    values: Tensor,
    action_mask: Tensor,
    *,
    td_lambda: float,
    gamma: float = 1.0,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
) -> Tensor:
    """lambda-returns, G_t = r_t + gamma * ((1 - lambda) V(s_{t+1}) + lambda G_{t+1}).

    lambda = 0 is `td0_returns`, lambda = 1 `monte_carlo_returns`; minus the values they are `gae`'s advantages.

    Args:
        td_lambda: 0 <= td_lambda <= 1.
        Others as in `td0_returns`.
    Returns:
        [..., T], 0 in masked slots.
    Raises:
        InputError: td_lambda is out of range, or as in `monte_carlo_returns`.
    Source: Sutton & Barto 2018, eq. 12.2 in recursive form.
    """
    check_range("td_lambda", td_lambda, low=0, high=1)
    steps = _steps(rewards, values, action_mask, gamma, terminated, truncated, bootstrap_values)
    worth = _filled(values, steps).mul_(1 - td_lambda)
    return _carry(steps, steps.rewards, gamma, worth=worth, weight=td_lambda)


def gae(
    rewards: Tensor,
    values: Tensor,
    action_mask: Tensor,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
) -> AdvantageEstimate:
    """Generalised advantage estimation: A_t = delta_t + gamma lambda A_{t+1}.

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t). lambda = 1 is Monte Carlo minus the value, lambda = 0 TD(0).

    Args:
        rewards: [..., T] float, reward units.
        values: [..., T] float, V(s_t); detached.
        action_mask: [..., T] bool.
        gamma, gae_lambda: each in [0, 1], per action.
        terminated, truncated: [..., T] bool or None (nowhere); see the module.
        bootstrap_values: [..., T] float, V of the state after the step; read only where truncated.
    Returns:
        AdvantageEstimate(advantages [..., T], returns [..., T]), 0 in masked slots.
    Raises:
        InputError: shapes differ, a mask is not bool, a coefficient is out of range, truncated without
            bootstrap_values.
    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16.
    """
    check_range("gae_lambda", gae_lambda, low=0, high=1)
    steps = _steps(rewards, values, action_mask, gamma, terminated, truncated, bootstrap_values)
    values = _filled(values, steps)
    # In place from here on: a fresh buffer costs more than the arithmetic that fills it.
    advantages = _carry(steps, steps.rewards.sub_(values), gamma, worth=values, weight=gae_lambda)
    return AdvantageEstimate(advantages, values.add_(advantages))


def vtrace(
    rewards: Tensor,
    values: Tensor,
    log_probs: Tensor,
    behavior_log_probs: Tensor,
    action_mask: Tensor,
    *,
    gamma: float = 1.0,
    vtrace_lambda: float = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    advantage_rho_clip: float = 1.0,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
) -> VTraceEstimate:
    """Targets for V of another policy pi than mu, which acted: v_t = V(s_t) + rho_t delta_t + gamma c_t (v - V)_{t+1}.

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t), rho_t = min(rho_clip, pi / mu), c_t = vtrace_lambda min(c_clip, pi / mu).
    Advantages are min(advantage_rho_clip, pi / mu) (q_t - V(s_t)), q_t = r_t + gamma (V + vtrace_lambda (v - V))_{t+1}.
    They include the ratio: their loss is `reinforce_loss`, without a second one.

    On-policy, with no clip below 1, the targets are `td_lambda_returns`. `rho_clip` decides whose V is learnt (pi's if
    infinite, nearer mu's the smaller it is), `c_clip` how far corrections reach back; far above 1, c_t may overflow.

    Args:
        rewards: [..., T] float, reward units.
        values: [..., T] float, V(s_t); detached.
        log_probs, behavior_log_probs: [..., T] float, nats; of the same actions under pi and mu; detached.
        action_mask: [..., T] bool.
        gamma, vtrace_lambda: each in [0, 1], per action.
        rho_clip, c_clip, advantage_rho_clip: dimensionless, > 0, math.inf for none; rho_clip >= c_clip in the source.
        terminated, truncated: [..., T] bool or None (nowhere); see the module.
        bootstrap_values: [..., T] float, V of the state after the step; read only where truncated.
    Returns:
        VTraceEstimate(advantages [..., T], targets [..., T]), 0 in masked slots.
    Raises:
        InputError: shapes differ, a mask is not bool, a number is out of range, or truncated lacks bootstrap_values.
    Source: Espeholt et al. 2018 (IMPALA), arXiv:1802.01561, eq. 1 and section 4.2; lambda: remark 2.
    """
    check_range("vtrace_lambda", vtrace_lambda, low=0, high=1)
    for name, bound in (("rho_clip", rho_clip), ("c_clip", c_clip), ("advantage_rho_clip", advantage_rho_clip)):
        check_range(name, bound, low=0, low_open=True)
    check_same_shape(log_probs=log_probs, behavior_log_probs=behavior_log_probs, action_mask=action_mask)
    check_float(log_probs=log_probs, behavior_log_probs=behavior_log_probs)
    steps = _steps(rewards, values, action_mask, gamma, terminated, truncated, bootstrap_values)
    delta, following = steps.rewards, _filled(values, steps)
    delta.sub_(following)
    _add_next_(delta, _through_gaps_(following, action_mask), steps, gamma)
    delta.masked_fill_(~action_mask, 0.0)
    del following
    log_probs, behavior_log_probs = in_one_type(log_probs, behavior_log_probs)
    ratio = fill_masked((log_probs - behavior_log_probs).detach(), action_mask).exp_().to(delta.dtype)
    weight = ratio.clamp(max=c_clip).mul_(gamma * vtrace_lambda).masked_fill_(~_continues(steps), 0.0)
    weight.masked_fill_(~action_mask, 1.0)  # gaps pass on what they are given
    correction = reverse_linear_scan_(ratio.clamp(max=rho_clip).mul_(delta), weight)  # v_t - V(s_t); gaps: the next one
    del weight
    _add_next_(delta, correction, steps, gamma * vtrace_lambda)  # now q_t - V(s_t)
    advantages = ratio.clamp_(max=advantage_rho_clip).mul_(delta).masked_fill_(~action_mask, 0.0)
    return VTraceEstimate(advantages, correction.masked_fill_(~action_mask, 0.0).add_(_filled(values, steps)))


def reinforce_plus_plus_advantages(
    rewards: Tensor, action_mask: Tensor, *, gamma: float = 1.0, ddof: int = 1, epsilon: float = 1e-8
) -> Tensor:
    """Reward-to-go, whitened over all actions of the batch; no value function, no groups.

    REINFORCE++ has minus the KL to the reference in every reward (`kl_estimate(estimator="k1")`) and the score in the
    last (`rewards_at_last_action`). REINFORCE++-baseline is the same with scores centred within their groups,
    `group_normalized_advantages(divide_by_std=False)`. Returns that are all equal give exactly 0.

    Args:
        rewards: [..., T] float, reward units; the whole batch, of all ranks.
        action_mask: [..., T] bool.
        gamma: 0 <= gamma <= 1, discount per action.
        ddof, epsilon: of `masked_whiten`; epsilon in reward units squared.
    Returns:
        [..., T], dimensionless, 0 in masked slots.
    Raises:
        InputError: as in `monte_carlo_returns`; ddof or epsilon is negative.
    Source: Hu et al. 2025 (REINFORCE++), arXiv:2501.03262.
    """
    returns = monte_carlo_returns(rewards, action_mask, gamma=gamma)
    return masked_whiten(returns, action_mask, ddof=ddof, epsilon=epsilon)


def _steps(
    rewards: Tensor,
    values: Tensor | None,
    action_mask: Tensor,
    gamma: float,
    terminated: Tensor | None,
    truncated: Tensor | None,
    bootstrap_values: Tensor | None,
) -> _Steps:
    """Check the arguments and lay the decision process out."""
    check_same_shape(
        rewards=rewards,
        values=values,
        action_mask=action_mask,
        terminated=terminated,
        truncated=truncated,
        bootstrap_values=bootstrap_values,
    )
    check_float(rewards=rewards, values=values, bootstrap_values=bootstrap_values)
    check_mask(action_mask=action_mask)
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        if flag is not None:
            check_mask(**{name: flag})
    check_time_axis(rewards=rewards)
    check_range("gamma", gamma, low=0, high=1)
    if truncated is not None and bootstrap_values is None:
        raise InputError("truncated needs bootstrap_values: V of the state after each step, read where truncated")

    (rewards,) = in_one_type(rewards.detach())
    rewards = fill_masked(rewards, action_mask)
    ended = None if terminated is None else action_mask & terminated
    if truncated is not None and bootstrap_values is not None:
        cut_off = action_mask & truncated if ended is None else action_mask & truncated & ~ended
        rewards.add_(fill_masked(bootstrap_values.detach(), cut_off), alpha=gamma)
        ended = cut_off if ended is None else ended | cut_off
    return _Steps(rewards, ended, action_mask)


def _filled(values: Tensor, steps: _Steps) -> Tensor:
    """A copy of the values, detached, 0 in masked slots, in the rewards' type."""
    return fill_masked(values.detach(), steps.action_mask).to(steps.rewards.dtype)


def _carry(steps: _Steps, x: Tensor, gamma: float, *, weight: float = 1.0, worth: Tensor | None = None) -> Tensor:
    """y_t = x_t + gamma * (worth + weight * y)_{next action}, cut at episode ends; overwrites x, which is 0 in gaps.

    A gap holds what it passes back, gamma * (worth + weight * y) of the next action, until it is set to 0 at the end.
    So a step's factor depends on the slot after it alone: another action, which is discounted, or a gap.
    """
    if worth is not None:
        _add_next_(x, worth, steps, gamma)
    acts_next = torch.nn.functional.pad(steps.action_mask[..., 1:], (0, 1))
    decay = torch.where(acts_next, x.new_full((), gamma * weight), 1.0)
    if steps.ended is not None:
        decay.masked_fill_(steps.ended, 0.0)
    return reverse_linear_scan_(x, decay).masked_fill_(~steps.action_mask, 0.0)


def _next_action(steps: _Steps) -> Tensor:
    """Place of the next action of the same episode among all slots, their number if there is none: [slots] int32."""
    slots = steps.action_mask.numel()
    places = torch.arange(-slots, 0, dtype=torch.int32, device=steps.action_mask.device).view_as(steps.action_mask)
    places.masked_fill_(~steps.action_mask, 0)
    first_from_here = reverse_linear_scan_(places, (~steps.action_mask).int())
    following = torch.nn.functional.pad(first_from_here[..., 1:], (0, 1))
    return following.masked_fill_(~_continues(steps), 0).add_(slots).flatten()


def _through_gaps_(x: Tensor, action_mask: Tensor) -> Tensor:
    """Gaps, 0 in x, take what the row's next action holds, if there is one; overwrites x."""
    return reverse_linear_scan_(x, (~action_mask).to(x.dtype))


def _add_next_(x: Tensor, following: Tensor, steps: _Steps, scale: float) -> None:
    """x_t += scale * following_{t+1}, unless an episode ends at t."""
    after = following[..., 1:]
    if steps.ended is not None:
        after = after.masked_fill(steps.ended[..., :-1], 0.0)
    x[..., :-1].add_(after, alpha=scale)


def _continues(steps: _Steps) -> Tensor:
    """Where the row's next action, if there is one, belongs to the same episode: [..., T] bool."""
    return steps.action_mask if steps.ended is None else steps.action_mask & ~steps.ended
