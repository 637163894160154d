"""What an algorithm's data chooses among the core's functions: advantages, policy loss, KL term, value loss.

In somebody else's training loop:

    algorithm = PRESETS["grpo"].algorithm
    advantages = estimate_advantages(algorithm, action_mask, scores=scores, group_ids=group_ids).advantages
    loss = policy_loss(algorithm, log_probs, old_log_probs, advantages, action_mask).loss
    denominator = loss_denominator(algorithm, action_mask)                  # of the whole optimizer step
    reduce(loss, action_mask, how=algorithm.reduction, denominator=denominator).backward()
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf import losses
from rlhf.advantages import gae, monte_carlo_returns
from rlhf.algorithm import OF_GROUPS, AlgorithmConfig
from rlhf.checks import InputError, check_mask, check_same_shape
from rlhf.group_advantages import (
    best_of_group_advantages,
    decoupled_group_advantages,
    group_normalized_advantages,
    keep_lone_scores,
    leave_one_out_advantages,
    length_weighted_advantages,
    mean_normalized_advantages,
)
from rlhf.kl import kl_estimate
from rlhf.losses import SurrogateTerms, ValueTerms, clipped_surrogate_loss, importance_weighted_loss, reinforce_loss
from rlhf.masking import fill_masked, masked_sum, masked_whiten
from rlhf.policy_losses import cispo_loss, gspo_loss, sampler_importance_weights, sapo_loss
from rlhf.reduce import count
from rlhf.rewards import rewards_at_last_action


class Estimate(NamedTuple):
    """advantages [B, T], 0 in masked slots; returns [B, T], the critic's targets, with gae alone: of the actions, or of
    all of `algorithm.numbers.value_mask(action_mask)` if that is more."""

    advantages: Tensor
    returns: Tensor | None


def estimate_advantages(
    algorithm: AlgorithmConfig,
    action_mask: Tensor,
    *,
    scores: Tensor,
    group_ids: Tensor,
    token_rewards: Tensor | None = None,
    values: Tensor | None = None,
    greedy_scores: Tensor | None = None,
    components: Tensor | None = None,
    weights: Tensor | Sequence[float] | None = None,
    is_trained: Tensor | None = None,
) -> Estimate:
    """Advantages by the algorithm's estimator, whitened if it says so. The whole batch: groups and whitening span it.

    A completion cut off at the length limit was judged as it stands: it counts as ended, like one that stopped.

    Args:
        action_mask: [B, T] bool.
        scores: [B] float, one verdict per sequence.
        group_ids: [B] int64, equal for samples of one prompt.
        token_rewards: [B, T] float, rewards per action beside the score, such as minus KL to the reference.
        values: [B, T] float, the critic's (gae), wherever `algorithm.numbers.value_mask(action_mask)` is; None: 0.
        greedy_scores: [B] float, score of the greedy completion of each one's prompt (greedy_baseline).
        components, weights: [B, K] each reward function's verdicts and [K] their weights (decoupled).
        is_trained: [B] bool; the others get 0 and are left out of whitening. None: all are trained on.
    Raises:
        InputError: shapes differ, or something that the estimator needs is missing.
    """
    check_mask(action_mask=action_mask)
    check_same_shape(scores=scores, group_ids=group_ids, action_mask_without_time=action_mask[:, 0])
    token_rewards = scores.new_zeros(action_mask.shape) if token_rewards is None else token_rewards
    returns: Tensor | None = None
    if algorithm.advantage in OF_GROUPS:
        totals = scores.detach() + masked_sum(token_rewards.detach(), action_mask, dim=-1)
        per_sequence = _compare(algorithm, totals, group_ids, action_mask, components, weights)
        if algorithm.numbers.keeps_lone_scores:
            per_sequence = keep_lone_scores(per_sequence, totals, group_ids)
        advantages = fill_masked(per_sequence[:, None].expand(action_mask.shape), action_mask)
    else:
        if algorithm.center_in_groups:
            centred = group_normalized_advantages(scores, group_ids, divide_by_std=False)
            kept = algorithm.numbers.keeps_lone_scores
            scores = keep_lone_scores(centred, scores, group_ids) if kept else centred
        scores = scores.to(token_rewards)
        advantages, returns = _follow(algorithm, scores, token_rewards, action_mask, values, greedy_scores)
    if is_trained is not None:
        action_mask = action_mask & is_trained[:, None]
        advantages = fill_masked(advantages, action_mask)
        returns = None if returns is None else fill_masked(returns, algorithm.numbers.value_mask(action_mask))
    if algorithm.whitens:
        advantages = masked_whiten(advantages, action_mask, **algorithm.numbers.whitening())
    return Estimate(advantages, returns)


def _follow(
    algorithm: AlgorithmConfig,
    scores: Tensor,
    token_rewards: Tensor,
    action_mask: Tensor,
    values: Tensor | None,
    greedy_scores: Tensor | None,
) -> Estimate:
    """Advantages action by action, from the rewards that follow each."""
    numbers = algorithm.numbers
    valued = numbers.value_mask(action_mask) if algorithm.advantage == "gae" else action_mask
    rewards = fill_masked(token_rewards, action_mask) + rewards_at_last_action(scores, valued)
    if algorithm.whiten_rewards:
        rewards = masked_whiten(rewards, valued, shift_mean=False, **numbers.whitening())
    steps, gamma = numbers.steps(valued), algorithm.gamma
    if algorithm.advantage == "gae":
        values = torch.zeros_like(rewards) if values is None else fill_masked(values, valued)
        found = gae(rewards, values, steps, gamma=gamma, gae_lambda=algorithm.gae_lambda)
        return Estimate(fill_masked(found.advantages, action_mask), fill_masked(found.returns, valued))
    to_go = fill_masked(monte_carlo_returns(rewards, steps, gamma=gamma), action_mask)
    if algorithm.advantage == "reward_to_go":
        return Estimate(to_go, None)
    if greedy_scores is None:
        raise InputError("advantage='greedy_baseline' needs greedy_scores: those of each prompt's greedy answer")
    check_same_shape(greedy_scores=greedy_scores, action_mask_without_time=action_mask[:, 0])
    return Estimate(fill_masked(to_go - greedy_scores.detach().to(to_go)[:, None], action_mask), None)


def _compare(
    algorithm: AlgorithmConfig,
    totals: Tensor,
    group_ids: Tensor,
    action_mask: Tensor,
    components: Tensor | None,
    weights: Tensor | Sequence[float] | None,
) -> Tensor:
    """[B] advantages of whole sequences, each compared with the others of its group."""
    by_std, ddof, epsilon = algorithm.divide_by_std, algorithm.numbers.group_ddof, algorithm.numbers.group_epsilon
    if algorithm.advantage == "group":
        return group_normalized_advantages(totals, group_ids, divide_by_std=by_std, ddof=ddof, epsilon=epsilon)
    if algorithm.advantage == "leave_one_out":
        return leave_one_out_advantages(totals, group_ids, divide_by_std=by_std, epsilon=epsilon)
    if algorithm.advantage == "length_weighted":
        return length_weighted_advantages(totals, action_mask.sum(-1), group_ids)
    if algorithm.advantage == "mean_normalized":
        return mean_normalized_advantages(totals, group_ids)
    if algorithm.advantage == "best_of_group":
        return best_of_group_advantages(totals, group_ids, divide_by_std=by_std, ddof=ddof, epsilon=epsilon)
    if components is None or weights is None:
        raise InputError("advantage='decoupled' needs components [B, K] and weights [K], one per reward function")
    return decoupled_group_advantages(components, group_ids, weights, divide_by_std=by_std, ddof=ddof, epsilon=epsilon)


def policy_loss(
    algorithm: AlgorithmConfig,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    *,
    sampler_log_probs: Tensor | None = None,
) -> SurrogateTerms:
    """The algorithm's policy loss per action, unreduced, weighed against the sampler if it says so.

    Args:
        log_probs: [B, T] float, nats; carries the gradient.
        old_log_probs: [B, T] float, nats; same actions, the actor before this update.
        advantages: [B, T] float.
        action_mask: [B, T] bool.
        sampler_log_probs: [B, T] float, nats, as the rollout engine reported them (sampler_weight).
    Returns:
        SurrogateTerms(loss, ratio, is_clipped), [B, T] each.
    Raises:
        InputError: shapes differ, the mask is not bool, or sampler_log_probs is needed and missing.
    """
    args = (log_probs, old_log_probs, advantages, action_mask)
    low, high = algorithm.clip_low, algorithm.clip_high
    if algorithm.policy_loss == "cispo":
        terms = cispo_loss(*args, clip_low=low, clip_high=high)
    elif algorithm.policy_loss == "sapo":
        positive, negative = algorithm.gate_temperature_positive, algorithm.gate_temperature_negative
        terms = sapo_loss(*args, temperature_positive=positive, temperature_negative=negative)
    elif algorithm.policy_loss == "importance":
        terms = importance_weighted_loss(*args)
    elif algorithm.policy_loss == "reinforce":
        ratio = fill_masked((log_probs - old_log_probs).detach(), action_mask).exp()
        terms = SurrogateTerms(reinforce_loss(log_probs, advantages, action_mask), ratio, torch.zeros_like(action_mask))
    else:
        assert low is not None  # the config's check
        by_sequence, numbers = algorithm.policy_loss == "gspo", algorithm.numbers
        default = numbers.sequence_dual_clip if by_sequence else numbers.dual_clip
        dual = default if algorithm.dual_clip is None else algorithm.dual_clip
        clip = gspo_loss if by_sequence else clipped_surrogate_loss
        terms = clip(*args, clip_low=low, clip_high=high, dual_clip=dual)
    if algorithm.sampler_weight == "none":
        return terms
    if sampler_log_probs is None:
        raise InputError(f"sampler_weight={algorithm.sampler_weight!r} needs sampler_log_probs: the rollout engine's")
    weights = sampler_importance_weights(
        old_log_probs, sampler_log_probs, action_mask, level=algorithm.sampler_weight,
        mode=algorithm.sampler_weight_mode, high=algorithm.sampler_weight_high, low=algorithm.sampler_weight_low,
    )  # fmt: skip
    return terms._replace(loss=terms.loss * weights)


def kl_to_reference(
    algorithm: AlgorithmConfig, log_probs: Tensor, ref_log_probs: Tensor, action_mask: Tensor
) -> Tensor:
    """The KL term of the loss per action, [B, T] nats, by the algorithm's estimator; not yet times kl_loss_coef."""
    estimator = algorithm.kl_estimator
    return kl_estimate(
        log_probs, ref_log_probs, action_mask, estimator=estimator,
        straight_through=algorithm.kl_straight_through, **algorithm.numbers.kl_clamps(estimator),
    )  # fmt: skip


def critic_loss(
    algorithm: AlgorithmConfig, values: Tensor, returns: Tensor, value_mask: Tensor, *, old_values: Tensor | None = None
) -> ValueTerms:
    """The value loss per state, unreduced; not yet times value_coef.

    Args:
        values, returns, old_values: [B, T] float, reward units; see `rlhf.losses.value_loss`.
        value_mask: [B, T] bool, `algorithm.numbers.value_mask(action_mask)`.
    """
    width, numbers = algorithm.value_clip, algorithm.numbers
    if width is not None and numbers.value_clip_replaces:
        if old_values is None:
            raise InputError("value_clip needs old_values: the critic's values before this update")
        change = values - old_values.detach()
        terms = losses.value_loss(old_values.detach() + change.clamp(-width, width), returns, value_mask)
        terms = terms._replace(is_clipped=(change.detach().abs() > width) & value_mask)
    else:
        terms = losses.value_loss(values, returns, value_mask, old_values=old_values, value_clip=width)
    return terms._replace(loss=numbers.value_loss_factor * terms.loss)


def loss_denominator(algorithm: AlgorithmConfig, mask: Tensor) -> Tensor:
    """[] what the loss of an optimizer step is divided by: `rlhf.reduce.count` as the convention counts.

    Args:
        mask: [B, T] bool, of the whole optimizer step: the actions, or for `critic_loss` the value mask.
    """
    found = count(mask, how=algorithm.reduction)
    if algorithm.numbers.counts_empty_rows and algorithm.reduction != "token_mean":
        found = torch.full_like(found, len(mask))
    epsilon = algorithm.numbers.count_epsilon
    return found.double() + epsilon if epsilon else found  # float32 would not hold the sum
