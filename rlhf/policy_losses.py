"""Policy losses that weigh or clip the probability ratio in other ways than PPO, and what they are combined with:
weights against the sampler, and the covariance by which entropy is controlled.

As in `rlhf.losses`: unreduced, exactly 0 with exactly 0 gradient where `action_mask` is False, NaN there included.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from rlhf.checks import check_choice, check_float, check_range, check_same_shape, check_time_axis
from rlhf.losses import SurrogateTerms, clipped_surrogate_loss, reinforce_loss
from rlhf.masking import fill_masked, in_one_type, masked_mean, masked_sum

WeightLevel = Literal["token", "sequence", "sequence_mean"]
WeightMode = Literal["truncate", "mask"]


def gspo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    dual_clip: float | None = None,
) -> SurrogateTerms:
    """GSPO: PPO's clip on one ratio per sequence, s = exp(mean over its tokens of log(pi / pi_old)).

    In the token form, s_t = sg(s) * pi_t / sg(pi_t) with sg the detached value: each token's gradient is -s A_t. With
    one advantage for all tokens of a sequence and a reduction that weighs them alike, that is the gradient of the
    sequence's own loss, -min(s A, clip(s) A). With one token per sequence it is PPO.

    Args:
        log_probs: [..., T] float, nats, one sequence per row; carries the gradient.
        old_log_probs: [..., T] float, nats; same actions, policy that collected them; detached.
        advantages: [..., T] float, reward units (none once normalised); detached.
        action_mask: [..., T] bool.
        clip_low, clip_high: dimensionless, 0 < clip_low < 1, clip_high > 0; a mean over tokens varies little, so they
            are far smaller than PPO's.
        dual_clip: as in `clipped_surrogate_loss`, of the sequence's ratio.
    Returns:
        SurrogateTerms(loss [..., T], ratio [..., T]: s in every slot of its sequence, is_clipped bool [..., T]).
    Raises:
        InputError: shapes differ, the mask is not bool or a bound is out of range.
    Source: Zheng et al. 2025, arXiv:2507.18071, eqs. 5, 7, 13, 14 (bounds: section 5.1).
    """
    check_same_shape(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages, action_mask=action_mask)
    check_float(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    check_time_axis(log_probs=log_probs)
    log_probs, old_log_probs, advantages = in_one_type(log_probs, old_log_probs, advantages)
    of_sequence = masked_mean((log_probs - old_log_probs).detach(), action_mask, dim=-1).unsqueeze(-1)
    # Values of the sequence's log ratio, gradient of each token's: the difference is exactly 0.
    token_form = (log_probs - log_probs.detach()).add_(of_sequence)
    return clipped_surrogate_loss(
        token_form, token_form.new_zeros(()).expand_as(token_form), advantages, action_mask,
        clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip,
    )  # fmt: skip


def cispo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    *,
    clip_high: float,
    clip_low: float | None = None,
) -> SurrogateTerms:
    """CISPO: REINFORCE with a clipped importance weight, -sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi.

    The weight is clipped and not the objective, so every action keeps a gradient, -weight * A.

    Args:
        log_probs: [...] float, nats; carries the gradient.
        old_log_probs: [...] float, nats; same actions, policy that collected them; detached.
        advantages: [...] float, reward units (none once normalised); detached.
        action_mask: [...] bool.
        clip_high: dimensionless, > 0. The source gives no number; weights of up to 5 or so (clip_high=4) are in use.
        clip_low: dimensionless, 0 < clip_low < 1, or None for no lower bound, as in the source's experiments.
    Returns:
        SurrogateTerms(loss [...], ratio [...] unclipped, is_clipped bool [...]: where the weight is not the ratio).
    Raises:
        InputError: shapes differ, the mask is not bool or a bound is out of range.
    Source: MiniMax 2025 (MiniMax-M1), arXiv:2506.13585, eqs. 4 and 5.
    """
    check_range("clip_high", clip_high, low=0, low_open=True)
    if clip_low is not None:
        check_range("clip_low", clip_low, low=0, high=1, low_open=True, high_open=True)
    check_same_shape(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages, action_mask=action_mask)
    check_float(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    log_probs, old_log_probs, advantages = in_one_type(log_probs, old_log_probs, advantages)
    ratio = fill_masked((log_probs - old_log_probs).detach(), action_mask).exp_()
    weight = ratio.clamp(0.0 if clip_low is None else 1 - clip_low, 1 + clip_high)
    is_clipped = weight != ratio
    weight = weight * advantages.detach()
    return SurrogateTerms(reinforce_loss(log_probs, weight, action_mask), ratio, is_clipped)


def sapo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    *,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> SurrogateTerms:
    """SAPO: a soft gate instead of a clip, -(4 / tau) * sigmoid(tau * (r - 1)) * A.

    tau is `temperature_positive` where A > 0, else `temperature_negative`. The gradient is that of -r A times
    sech^2(tau * (r - 1) / 2): all of it at r = 1, less and less the further r is from 1 on either side.

    Args:
        log_probs: [...] float, nats; carries the gradient.
        old_log_probs: [...] float, nats; same actions, policy that collected them; detached.
        advantages: [...] float, reward units (none once normalised); detached.
        action_mask: [...] bool.
        temperature_positive, temperature_negative: dimensionless, > 0, finite; larger means a narrower gate.
    Returns:
        SurrogateTerms(loss [...], ratio [...], is_clipped all False). The loss is -2 A / tau at r = 1.
    Raises:
        InputError: shapes differ, the mask is not bool or a temperature is out of range.
    Source: Gao et al. 2025, arXiv:2511.20347, eqs. 5 and 6.
    """
    check_range("temperature_positive", temperature_positive, low=0, low_open=True, high_open=True)
    check_range("temperature_negative", temperature_negative, low=0, low_open=True, high_open=True)
    check_same_shape(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages, action_mask=action_mask)
    check_float(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    log_probs, old_log_probs, advantages = in_one_type(log_probs, old_log_probs, advantages)
    log_ratio = fill_masked(log_probs - old_log_probs.detach(), action_mask)
    advantages = fill_masked(advantages.detach(), action_mask)
    temperature = torch.full_like(advantages, temperature_negative).masked_fill_(advantages > 0, temperature_positive)
    ratio = log_ratio.detach().exp()
    weights = advantages.div_(temperature).mul_(-4)
    # tau * r as one exponential: one tensor less to keep for the gradient. Where it overflows the gate is 1 and exactly
    # flat, so it may be capped behind autograd's back; its derivative would be 0 * inf.
    scaled = log_ratio.add_(temperature.log())
    scaled.detach().clamp_(max=math.log(torch.finfo(scaled.dtype).max) - 1)
    gate = (scaled.exp_() - temperature).sigmoid_()
    del temperature
    return SurrogateTerms(gate * weights, ratio, torch.zeros_like(action_mask))


def sampler_importance_weights(
    old_log_probs: Tensor,
    sampler_log_probs: Tensor,
    action_mask: Tensor,
    *,
    level: WeightLevel,
    mode: WeightMode,
    high: float,
    low: float | None = None,
) -> Tensor:
    """Weights pi_old / pi_sampler by which to multiply a loss whose actions another program drew; detached.

    An inference engine's probabilities differ from the trainer's by rounding, kernels or stale weights. With r the
    ratio of each token, the weight before bounding is, by `level`: "token", r; "sequence", the product of r over the
    sequence, in every slot of it (unbiased, of large variance); "sequence_mean", the geometric mean of r over it.
    By `mode`: "truncate" clamps it to [low, high]; "mask" makes it 0 outside of [low, high].

    Args:
        old_log_probs: [..., T] float, nats, of the trainer's policy before this update.
        sampler_log_probs: [..., T] float, nats; same actions, as the sampler reported them.
        action_mask: [..., T] bool; one sequence per row (for "token" any shape will do).
        level, mode: see above.
        high: dimensionless, >= 1; infinity for no upper bound.
        low: dimensionless, 0 <= low <= 1, or None for no lower bound.
    Returns:
        [..., T] dimensionless, without gradient, 0 in masked slots.
    Raises:
        InputError: shapes differ, the mask is not bool, a bound is out of range, unknown level or mode.
    Source: truncated: Ionides 2008, "Truncated importance sampling"; Yao et al. 2025, "Your efficient RL framework
        secretly brings you off-policy RL training". Masked: Ling Team 2025 (IcePop), arXiv:2510.18855.
    """
    check_choice("level", level, get_args(WeightLevel))
    check_choice("mode", mode, get_args(WeightMode))
    check_range("high", high, low=1)
    if low is not None:
        check_range("low", low, low=0, high=1)
    check_same_shape(old_log_probs=old_log_probs, sampler_log_probs=sampler_log_probs, action_mask=action_mask)
    check_float(old_log_probs=old_log_probs, sampler_log_probs=sampler_log_probs)
    old_log_probs, sampler_log_probs = in_one_type(old_log_probs, sampler_log_probs)
    log_ratio = fill_masked((old_log_probs - sampler_log_probs).detach(), action_mask)
    if level != "token":
        check_time_axis(old_log_probs=old_log_probs)
        pooled = (masked_sum if level == "sequence" else masked_mean)(log_ratio, action_mask, dim=-1)
        log_ratio = pooled.unsqueeze(-1).expand_as(log_ratio)
    ratio = log_ratio.exp()
    weights = ratio.clamp(0.0 if low is None else low, high)
    if mode == "mask":
        weights.masked_fill_(weights != ratio, 0.0)
    return weights.masked_fill_(~action_mask, 0.0)


def token_covariance(log_probs: Tensor, advantages: Tensor, action_mask: Tensor) -> Tensor:
    """Each action's part in the covariance of log-probability and advantage: (log pi - mean) * (A - mean); detached.

    To first order a natural policy gradient step lowers the entropy in proportion to its sum. Few actions carry most of
    that sum: KL-Cov penalises the log ratio of the largest, Clip-Cov drops some of them.

    The means are over all slots given: call it on a whole optimizer step, before it is cut into micro-batches.

    Args:
        log_probs: [...] float, nats.
        advantages: [...] float, reward units (none once normalised).
        action_mask: [...] bool.
    Returns:
        [...] nats * reward units, without gradient, 0 in masked slots.
    Raises:
        InputError: shapes differ or the mask is not bool.
    Source: Cui et al. 2025, arXiv:2505.22617, section 4.
    """
    check_same_shape(log_probs=log_probs, advantages=advantages, action_mask=action_mask)
    check_float(log_probs=log_probs, advantages=advantages)
    log_probs, advantages = in_one_type(log_probs.detach(), advantages.detach())
    centered = (log_probs - masked_mean(log_probs, action_mask)) * (advantages - masked_mean(advantages, action_mask))
    return fill_masked(centered, action_mask)
