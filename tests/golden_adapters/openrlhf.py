"""OpenRLHF: int64 masks; a gap is a state of value 0 through which it discounts; KL in float32, clamped to +-10."""

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from golden_adapters.common import (
    Adapter,
    Outputs,
    Skip,
    adaptive_coefficient,
    at,
    consecutive_groups,
    entropy_of,
    fraction,
    gradients,
    is_dual,
    kl_of,
    log_probs_of,
    mean,
    mean_of,
    row_by_row,
)
from rlhf.advantages import gae, monte_carlo_returns
from rlhf.algorithm import AlgorithmConfig
from rlhf.conventions import CONVENTIONS
from rlhf.group_advantages import group_normalized_advantages, leave_one_out_advantages
from rlhf.kl import kl_estimate
from rlhf.losses import clipped_surrogate_loss, reinforce_loss, value_loss
from rlhf.masking import masked_mean, masked_whiten
from rlhf.objective import estimate_advantages
from rlhf.policy_losses import gspo_loss, sampler_importance_weights
from rlhf.preference_losses import bradley_terry_loss, dpo_loss, ipo_loss
from rlhf.reduce import count, reduce
from rlhf.rewards import overlong_penalty, rewards_at_last_action

CONVENTION = CONVENTIONS["openrlhf"]


# ---------------------------------------------------------------------------------------------------------- advantages
def through_gaps(mask: Tensor, **arrays: Tensor) -> tuple[Tensor, ...]:
    """Its masked slots are steps of reward and value 0."""
    return (*(torch.where(mask, array, 0.0) for array in arrays.values()), CONVENTION.steps(mask))


def gae_of_tokens(x: Any, p: Any) -> Outputs:
    mask = x.action_mask.bool()
    steps = through_gaps(mask, rewards=x.rewards, values=x.values)
    estimate = gae(*steps, gamma=p.gamma, gae_lambda=p.lambd)
    return {"advantages": estimate.advantages, "returns": estimate.returns}


def cumulative_returns(x: Any, p: Any) -> Outputs:
    return {"returns": monte_carlo_returns(*through_gaps(x.action_mask.bool(), rewards=x.rewards), gamma=p.gamma)}


def shaped_reward(x: Any, p: Any) -> Outputs:
    """Minus the KL in masked slots too; a row without an action has its score in the last column, in ours nowhere."""
    mask = x.action_mask.bool()
    scores = x.r if p.reward_clip_range is None else x.r.clamp(*p.reward_clip_range)
    reward = rewards_at_last_action(scores, mask) - max(p.kl_coef, 0) * x.kl.detach()
    return {"reward": at(reward, mask.any(-1, keepdim=True), Skip("scores of empty rows go to the last column"))}


def experience(x: Any, p: Any) -> Outputs:
    """All estimators: scores compared within groups, at the last action, minus the KL; then returns or GAE."""
    mask, size = x.action_mask.bool(), p.n_samples_per_prompt
    if size == 1 and p.estimator in ("rloo", "group_norm"):
        alone = Skip("groups of one are NaN at the peer; ours are 0")
        return {"advantages": alone, "returns": alone}
    scores, ids = x.rewards.detach(), consecutive_groups(x.rewards, size)
    if p.reward_clip_range:
        scores = scores.clamp(*p.reward_clip_range)
    if p.estimator == "rloo":
        scores = leave_one_out_advantages(scores, ids)
    elif p.estimator in ("reinforce_baseline", "dr_grpo"):
        scores = group_normalized_advantages(scores, ids, divide_by_std=False)
    elif p.estimator == "group_norm":
        scores = group_normalized_advantages(scores, ids, epsilon=CONVENTION.group_epsilon)
    reward = rewards_at_last_action(scores, mask) - p.kl_coef * x.kl.detach()
    if p.estimator == "gae" and not p.no_std_norm:  # as the trainer does by its convention
        algorithm = AlgorithmConfig(gamma=p.gamma, gae_lambda=p.lambd, convention="openrlhf")
        rewards = {"scores": scores, "token_rewards": -p.kl_coef * x.kl.detach()}
        estimate = estimate_advantages(algorithm, mask, group_ids=ids, values=x.values, **rewards)
        assert estimate.returns is not None
        return {"advantages": at(estimate.advantages, mask), "returns": at(estimate.returns, mask)}
    if p.estimator == "gae":
        steps = through_gaps(mask, rewards=reward, values=x.values)
        advantages, returns = gae(*steps, gamma=p.gamma, gae_lambda=p.lambd)
    else:
        advantages = returns = monte_carlo_returns(*through_gaps(mask, rewards=reward), gamma=p.gamma)
    if p.estimator in ("gae", "reinforce", "reinforce_baseline"):  # normalised over all actions: ddof 0, floor 1e-8
        if p.no_std_norm:
            advantages = advantages - masked_mean(advantages, mask)
        else:
            advantages = masked_whiten(advantages, mask, **CONVENTION.whitening())
    # An empty row's score is put into its last column, which moves nothing that is compared.
    return {"advantages": at(advantages, mask), "returns": at(returns, mask)}


def overlong(x: Any, p: Any) -> Outputs:
    penalty = overlong_penalty(
        x.response_length, max_length=p.max_new_tokens, buffer=p.overlong_buffer_len, scale=p.overlong_penalty_factor
    )
    return {"rewards": x.rewards + penalty}


def stop_properly(x: Any, p: Any) -> Outputs:
    """A factor on the score if positive, else the score itself."""
    coef = p.stop_properly_penalty_coef
    return {"rewards": torch.where(x.truncated, coef * x.rewards if coef >= 0 else torch.tensor(coef), x.rewards)}


# -------------------------------------------------------------------------------------------------------------- losses
def reduced(per_token: Tensor, mask: Tensor, p: Any) -> Tensor:
    """Global counts, where given, are over all ranks, whose average is taken afterwards: hence dp_size."""
    how: Any = "token_mean" if p.token_level_loss else "sequence_mean"
    total = getattr(p, "batch_num_tokens" if p.token_level_loss else "global_batch_size", None)
    return reduce(per_token, mask, how=how, denominator=total / p.dp_size if total else count(mask, how=how))


def sampler_weights(x: Any, p: Any, mask: Tensor) -> Tensor:
    low, high = p.vllm_is_truncated_threshold
    args = (x.old_log_probs, x.rollout_log_probs, mask)
    if p.vllm_is_correction_type == "tis":
        return sampler_importance_weights(*args, level="token", mode="truncate", low=low, high=high)
    if p.vllm_is_correction_type == "icepop":
        return sampler_importance_weights(*args, level="token", mode="mask", low=low, high=high)
    # seq-mask-tis keeps whole sequences and weighs their tokens
    keep = sampler_importance_weights(*args, level="sequence_mean", mode="mask", low=low, high=high) > 0
    return sampler_importance_weights(*args, level="token", mode="truncate", high=math.inf) * keep


def policy_loss(x: Any, p: Any) -> Outputs:
    log_probs, old, advantages, mask = x.log_probs, x.old_log_probs, x.advantages, x.action_mask.bool()
    bounds = {"clip_low": p.clip_eps_low, "clip_high": p.clip_eps_high}
    outputs: Outputs = {"ppo_kl": masked_mean(kl_estimate(old, log_probs, mask, estimator="k1"), mask)}
    if p.policy_loss_type == "ppo":
        dual = p.dual_clip or CONVENTION.dual_clip  # its clamp of the log ratio
        terms = clipped_surrogate_loss(log_probs, old, advantages, mask, **bounds, dual_clip=dual)
    else:  # gspo against the sampler itself, if corrected
        behavior = x.rollout_log_probs if p.enable_vllm_is_correction else old
        terms = gspo_loss(log_probs, behavior, advantages, mask, **bounds, dual_clip=p.dual_clip)
        p = SimpleNamespace(**{**vars(p), "token_level_loss": False})
    per_token = terms.loss
    if p.enable_vllm_is_correction and p.policy_loss_type == "ppo":
        per_token = per_token * sampler_weights(x, p, mask)
        outputs["vllm_kl"] = masked_mean(kl_estimate(x.rollout_log_probs, old, mask, estimator="k1"), mask)
    loss = reduced(per_token, mask, p)
    outputs["clip_ratio"] = fraction(terms.is_clipped & ~is_dual(advantages, terms.ratio), mask, loss)
    return {"loss": loss, **outputs, **gradients(loss, grad_log_probs=log_probs)}


def critic_loss(x: Any, p: Any) -> Outputs:
    mask = x.action_mask.bool()
    clip = {"old_values": x.old_values, "value_clip": p.clip_eps} if p.clip_eps is not None else {}
    loss = reduced(value_loss(x.values, x.returns, mask, **clip).loss, mask, p)
    return {"loss": loss, **gradients(loss, grad_values=x.values)}


def sft_loss(x: Any, p: Any) -> Outputs:
    mask = x.loss_mask.bool()
    loss = reduced(reinforce_loss(x.per_token_logps, torch.ones_like(x.per_token_logps), mask), mask, p)
    return {"loss": loss, **gradients(loss, grad=x.per_token_logps)}


def reward_model_loss(x: Any, p: Any) -> Outputs:
    loss = mean(bradley_terry_loss(x.chosen_reward, x.reject_reward, margin=getattr(x, "margin", None)))
    return {"loss": loss, **gradients(loss, grad_chosen=x.chosen_reward, grad_reject=x.reject_reward)}


def log_exp_loss(x: Any, p: Any) -> Outputs:
    """log(1 + exp(rejected - chosen)) without a stable form: infinite where the exp is."""
    outputs = reward_model_loss(x, p)
    overflows = (x.reject_reward - x.chosen_reward).exp().isinf().any()
    return dict.fromkeys(outputs, Skip("the peer's exp overflows; ours is finite")) if overflows else outputs


def preference_loss(x: Any, p: Any) -> Outputs:
    answers = (x.policy_chosen_logps, x.policy_rejected_logps, x.reference_chosen_logps, x.reference_rejected_logps)
    if p.ipo:
        terms = ipo_loss(*answers, beta=p.beta)
    else:
        terms = dpo_loss(*answers, beta=p.beta, label_smoothing=p.label_smoothing)
    loss = mean(terms.loss)
    return {
        "loss": loss, "chosen_rewards": terms.chosen_rewards, "rejected_rewards": terms.rejected_rewards,
        **gradients(loss, grad_chosen=answers[0], grad_rejected=answers[1]),
    }  # fmt: skip


def approximate_kl(x: Any, p: Any) -> Outputs:
    """float32 always. Where the exp in k3 overflows, before its clamp, the peer's gradient is 0 * inf = NaN."""
    estimate = kl_of("log_probs", "log_probs_base", "kl_estimator", lambda kind, _: CONVENTION.kl_clamps(kind))
    outputs = estimate(x, p)
    gradient: Any = outputs["grad_log_probs_of_sum"]
    finite = (x.log_probs_base - x.log_probs).float().exp().isfinite() | (p.kl_estimator != "k3")
    return {**outputs, "grad_log_probs_of_sum": at(gradient, finite, Skip("the peer's exp overflows everywhere"))}


def normalized_rows(x: Any, p: Any) -> Outputs:
    def whitened(row: Tensor, mask: Tensor) -> Tensor:
        return masked_whiten(row, mask, **CONVENTION.whitening())  # its eps is a floor of the variance

    return {"out": row_by_row(whitened, x.tensor, x.mask.bool())}


ADAPTERS: dict[str, Adapter] = {
    "RemoteExperienceMaker.get_advantages_and_returns": gae_of_tokens,
    "RemoteExperienceMaker.get_cumulative_returns": cumulative_returns,
    "RemoteExperienceMaker.compute_advantages_and_returns": experience,
    "compute_reward": shaped_reward,
    "apply_overlong_penalty": overlong,
    "apply_stop_properly_penalty": stop_properly,
    "PolicyLoss": policy_loss,
    "ValueLoss": critic_loss,
    "SFTLoss": sft_loss,
    "PairWiseLoss": reward_model_loss,
    "LogExpLoss": log_exp_loss,
    "DPOLoss": preference_loss,
    "compute_approx_kl": approximate_kl,
    "AdaptiveKLController": adaptive_coefficient("target", "current"),
    "compute_entropy": entropy_of("entropy"),
    "log_probs_from_logits": log_probs_of("labels", "log_probs"),
    "masked_mean": mean_of("tensor", softened=False),
    "masked_normalize": normalized_rows,
}
OUT_OF_SCOPE: dict[str, str] = {}
