"""TRL: groups are consecutive rows, 1e-4 on the std, NaN left out; no clamps; a loss's name says how it averages."""

from typing import Any

import torch
from torch import Tensor

from golden_adapters.common import (
    Adapter,
    Outputs,
    at,
    consecutive_groups,
    entropy_of,
    everywhere,
    fraction,
    gradients,
    is_dual,
    log_probs_of,
    mean,
    mean_of,
    row_by_row,
    var_of,
    whiten_of,
)
from rlhf.algorithm import AlgorithmConfig
from rlhf.conventions import CONVENTIONS
from rlhf.group_advantages import decoupled_group_advantages, leave_one_out_advantages
from rlhf.kl import kl_estimate
from rlhf.losses import SurrogateTerms, clipped_surrogate_loss, importance_weighted_loss, value_loss
from rlhf.masking import fill_masked, masked_mean, masked_sum, masked_var, masked_whiten
from rlhf.objective import estimate_advantages, loss_denominator
from rlhf.policy_losses import cispo_loss, gspo_loss, sampler_importance_weights, sapo_loss
from rlhf.preference_losses import bradley_terry_loss, dpo_loss, ipo_loss
from rlhf.reduce import count, fixed_length, sequence_mean, sequence_sum, token_mean
from rlhf.rewards import combine_rewards, rewards_at_last_action

CONVENTION = CONVENTIONS["trl"]


# ---------------------------------------------------------------------------------------------------------- advantages
def grpo_rollout(x: Any, p: Any) -> Outputs:
    return group_advantages(x, p) if hasattr(x, "rewards_per_func") else sampler_ratio(x, p)


def group_advantages(x: Any, p: Any) -> Outputs:
    components = x.rewards_per_func.detach()
    ids = consecutive_groups(components, p.num_generations)
    if p.multi_objective_aggregation == "normalize_then_sum":  # and then over the batch, 1e-4 on that std too
        total = decoupled_group_advantages(components, ids, p.reward_weights, epsilon=CONVENTION.group_epsilon)
        scored = ~components.isnan().all(-1)
        std = masked_var(total, scored).sqrt() + 1e-4
        return {"advantages": fill_masked((total - masked_mean(total, scored)) / std, scored)}
    scores = combine_rewards(components, p.reward_weights)
    # One component of the decoupled form leaves NaN out of its group, as the peer does; ours otherwise lets it through.
    by_group = p.scale_rewards == "group"
    advantages = decoupled_group_advantages(
        scores[:, None], ids, [1.0], divide_by_std=by_group, epsilon=CONVENTION.group_epsilon
    )
    if p.scale_rewards == "batch":
        advantages = advantages / (masked_var(scores, ~scores.isnan()).sqrt() + 1e-4)
    return {"advantages": advantages}


def sampler_ratio(x: Any, p: Any) -> Outputs:
    lengths = torch.tensor(p.completion_lengths)[:, None]
    mask = (torch.arange(x.old_per_token_logps.shape[-1]) < lengths) & x.tool_mask.bool()
    level, mode = p.mode.split("_")
    weights = sampler_importance_weights(
        x.old_per_token_logps, x.sampling_per_token_logps, mask, level=level, mode=mode, low=p.clip_min, high=p.clip_max
    )
    return {"ratio": at(weights, mask) if level == "token" else weights[:, :1]}


def rloo_rollout(x: Any, p: Any) -> Outputs:
    scores = x.rewards.detach()
    if p.reward_clip_range is not None:
        scores = scores.clamp(*p.reward_clip_range)
    mask = torch.arange(x.old_per_token_logps.shape[1]) < torch.tensor(p.completion_lengths)[:, None]
    kl = kl_estimate(x.old_per_token_logps, x.ref_per_token_logps, mask, estimator="k1").detach()
    scores = scores - p.beta * masked_sum(kl, mask, dim=-1)
    advantages = leave_one_out_advantages(scores, consecutive_groups(scores, p.num_generations))
    if p.normalize_advantages:  # over the batch
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-4)
    return {"advantages": advantages, "old_logps": masked_sum(x.old_per_token_logps, mask, dim=-1)}


def masks(x: Any) -> tuple[Tensor, Tensor]:
    """Of the actions, and of the values, which reach one slot further where there is one: there stands the score."""
    mask = torch.arange(x.values.shape[1]) <= x.last_token_index[:, None]
    return mask, CONVENTION.value_mask(mask)


def ppo_rollout(x: Any, p: Any) -> Outputs:
    """As the trainer does by its convention."""
    mask, valued = masks(x)
    penalty = p.kl_coef * kl_estimate(x.logprobs, x.ref_logprobs, mask, estimator=p.kl_estimator).detach()
    algorithm = AlgorithmConfig(gamma=p.gamma, gae_lambda=p.lam, whiten_rewards=p.whiten_rewards, convention="trl")
    alone = torch.arange(len(mask))
    found = estimate_advantages(
        algorithm, mask, scores=x.scores, group_ids=alone, token_rewards=-penalty, values=x.values
    )
    rewards = rewards_at_last_action(x.scores, valued) - penalty
    if p.whiten_rewards:
        rewards = masked_whiten(rewards, valued, shift_mean=False)
    assert found.returns is not None
    return {
        "rewards": rewards, "values": fill_masked(x.values, valued), "returns": found.returns,
        "advantages": found.advantages,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- policy losses
def surrogate(x: Any, p: Any, advantages: Tensor, mask: Tensor) -> SurrogateTerms:
    args = (x.per_token_logps, x.old_per_token_logps, advantages, mask)
    if p.loss_type == "cispo":  # epsilon_high is the cap itself
        return cispo_loss(*args, clip_high=p.epsilon_high - 1)
    if p.loss_type == "sapo":
        return sapo_loss(
            *args, temperature_positive=p.sapo_temperature_pos, temperature_negative=p.sapo_temperature_neg
        )
    clip = gspo_loss if p.importance_sampling_level == "sequence" else clipped_surrogate_loss
    return clip(*args, clip_low=p.epsilon_low, clip_high=p.epsilon_high, dual_clip=p.delta)


def reduced(per_token: Tensor, mask: Tensor, p: Any) -> Tensor:
    """`grpo`, `sapo` and others average over all rows, empty ones too."""
    rows = loss_denominator(AlgorithmConfig(reduction="sequence_mean", convention="trl"), mask)
    counted = count(mask, how="token_mean")
    tokens = p.num_items_in_batch or counted
    if p.loss_type in ("grpo", "sapo"):
        loss = sequence_mean(per_token, mask, denominator=rows)
    elif p.loss_type == "luspo":
        loss = sequence_sum(per_token, mask, denominator=rows)
    elif p.loss_type == "dr_grpo":
        loss = fixed_length(per_token, mask, denominator=rows, length=p.max_completion_length)
    else:
        loss = token_mean(per_token, mask, denominator=counted if p.loss_type == "bnpo" else tokens)
    return loss / p.grad_accum * (p.steps_per_generation if p.loss_type == "dapo" else 1)


def kept_off_policy(advantages: Tensor, log_probs: Tensor, sampled: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """Rows with A < 0 whose mean k1 from the sampler is beyond the threshold are dropped: [B, 1]."""
    k1 = masked_mean(kl_estimate(sampled, log_probs.detach(), mask, estimator="k1"), mask, dim=-1)
    return (advantages >= 0) | (k1[:, None] <= threshold)


def policy_loss(x: Any, p: Any) -> Outputs:
    """One advantage per sequence."""
    log_probs, old, mask = x.per_token_logps, x.old_per_token_logps, x.completion_mask.bool()
    advantages = x.advantages[:, None].expand_as(mask)
    terms = surrogate(x, p, advantages, mask)
    per_token, outputs = terms.loss, {}
    if p.off_policy_mask_threshold is not None:
        sampled = x.sampling_per_token_logps
        per_token = per_token * kept_off_policy(
            x.advantages[:, None], log_probs, sampled, mask, p.off_policy_mask_threshold
        )
    if p.top_entropy_quantile < 1:
        threshold = torch.quantile(x.entropies[mask].float(), 1 - p.top_entropy_quantile)
        per_token = per_token * ((x.entropies >= threshold) & mask)
    if p.use_vllm_is:
        per_token = per_token * x.importance_sampling_ratio.detach()
    if p.beta:
        kl = kl_estimate(log_probs, x.ref_per_token_logps, mask, estimator="k3")
        if p.use_bias_correction_kl:  # weighed by the ratio, with its gradient
            kl = -importance_weighted_loss(log_probs, old, torch.ones_like(kl), mask).loss * kl
        outputs["kl"] = masked_mean(kl, mask)
        per_token = per_token + p.beta * kl
    loss = reduced(per_token, mask, p)
    clipped = terms.is_clipped & ~is_dual(advantages, terms.ratio)
    if p.importance_sampling_level == "sequence":  # sequences, not tokens
        clipped = clipped[:, :1]
    counted = everywhere(clipped) if p.importance_sampling_level == "sequence" else mask
    outputs["clip_ratio"] = fraction(clipped, counted, loss)
    outputs["cispo_clip_ratio"] = fraction(terms.is_clipped & (advantages > 0), mask, loss)  # only where A > 0
    return {"loss": loss, **outputs, **gradients(loss, grad_per_token_logps=log_probs)}


def off_policy_mask(x: Any, p: Any) -> Outputs:
    sampled, mask = x.sampling_per_token_logps, x.mask.bool()
    keep = kept_off_policy(x.advantages, x.per_token_logps, sampled, mask, p.off_policy_threshold)
    return {"keep": keep.to(x.advantages.dtype)}


def rloo_loss(x: Any, p: Any) -> Outputs:
    """One ratio per sequence, the product of its tokens'."""
    mask = x.completion_mask.bool()
    new, old = masked_sum(x.per_token_logps, mask, dim=-1), masked_sum(x.old_per_token_logps, mask, dim=-1)
    bounds = {"clip_low": p.epsilon_low, "clip_high": p.epsilon_high}
    loss = mean(clipped_surrogate_loss(new, old, x.advantages, everywhere(new), **bounds).loss)
    return {"loss": loss, **gradients(loss, grad_per_token_logps=x.per_token_logps)}


def ppo_update(x: Any, p: Any) -> Outputs:
    """Values are trained one slot further than the policy."""
    mask, with_score = masks(x)
    bounds = {"clip_low": p.cliprange, "clip_high": p.cliprange}
    terms = clipped_surrogate_loss(x.new_logprobs, x.logprobs, x.advantages, mask, **bounds)
    clip = {"old_values": x.values, "value_clip": p.cliprange_value}
    errors = value_loss(x.vpred, x.returns, with_score, **clip)
    policy = token_mean(terms.loss, mask, denominator=mask.sum())
    value = token_mean(errors.loss, with_score, denominator=with_score.sum())
    total = policy + p.vf_coef * value
    k2 = kl_estimate(x.new_logprobs, x.logprobs, mask, estimator="k2")  # its mean is over padding too
    return {
        "loss": total, "pg_loss": policy, "vf_loss": value, "approxkl": mean(k2),
        "pg_clipfrac": fraction(terms.is_clipped, mask, total),
        "vf_clipfrac": fraction(errors.is_clipped, with_score, total),
        **gradients(total, grad_new_logprobs=x.new_logprobs, grad_vpred=x.vpred),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- preferences
def reward_model_loss(x: Any, p: Any) -> Outputs:
    chosen, rejected = x.rewards_chosen, x.rewards_rejected
    center = p.center_rewards_coefficient or 0.0
    loss = mean(bradley_terry_loss(chosen, rejected, margin=getattr(x, "margin", None), center_coef=center))
    accuracy = mean((chosen > rejected).to(loss.dtype))
    return {"loss": loss, "accuracy": accuracy, **gradients(loss, grad_chosen=chosen, grad_rejected=rejected)}


def preference_loss(x: Any, p: Any) -> Outputs:
    """Chosen rows, then rejected; `ipo` and `sigmoid_norm` average log-probs, the others sum them."""
    mask = x.completion_mask[:, 1:].bool()
    n = len(mask) // 2
    weights = torch.ones_like(x.per_token_logps)
    if p.ld_alpha is not None:  # tokens beyond the shorter answer's length weigh less
        shared = mask.sum(-1).view(2, n).amin(0).repeat(2)[:, None]
        weights = torch.where(mask.cumsum(-1) <= shared, 1.0, p.ld_alpha).to(weights)

    def answers(pool: Any, weights: Tensor) -> tuple[Tensor, ...]:
        new, ref = (pool(tokens * weights, mask, dim=-1) for tokens in (x.per_token_logps, x.ref_per_token_logps))
        return new[:n], new[n:], ref[:n], ref[n:]

    chosen, rejected, ref_chosen, ref_rejected = pooled = answers(
        masked_mean if p.loss_type in ("ipo", "sigmoid_norm") else masked_sum, weights
    )
    if p.loss_type == "ipo":
        loss = mean(ipo_loss(*pooled, beta=p.beta).loss)
    elif p.loss_type == "robust":  # label smoothing made unbiased
        eps, swapped = p.label_smoothing, (rejected, chosen, ref_rejected, ref_chosen)
        both = (1 - eps) * dpo_loss(*pooled, beta=p.beta).loss - eps * dpo_loss(*swapped, beta=p.beta).loss
        loss = mean(both) / (1 - 2 * eps)
    else:
        loss = mean(dpo_loss(*pooled, beta=p.beta, label_smoothing=p.label_smoothing).loss)
    rewards = dpo_loss(*answers(masked_sum, weights), beta=p.beta)
    return {
        "loss": loss, "grad_per_token_logps": at(gradients(loss, _=x.per_token_logps)["_"], mask),
        "rewards_chosen": mean(rewards.chosen_rewards), "rewards_rejected": mean(rewards.rejected_rewards),
    }  # fmt: skip


def std_without_nan(x: Any, p: Any) -> Outputs:
    def std(row: Tensor, scored: Tensor) -> Tensor:
        return masked_var(row, scored).sqrt()

    scored = ~x.tensor.isnan()
    return {"all": std(x.tensor, scored), "rows": row_by_row(std, x.tensor, scored)}


ADAPTERS: dict[str, Adapter] = {
    "GRPOTrainer._generate_and_score_completions": grpo_rollout,
    "RLOOTrainer._generate_and_score_completions": rloo_rollout,
    "PPOTrainer.train (rewards, GAE)": ppo_rollout,
    "GRPOTrainer._compute_loss": policy_loss,
    "GRPOTrainer.get_off_policy_mask": off_policy_mask,
    "RLOOTrainer._compute_loss": rloo_loss,
    "PPOTrainer.train (update)": ppo_update,
    "RewardTrainer.compute_loss": reward_model_loss,
    "DPOTrainer._compute_loss": preference_loss,
    "selective_log_softmax": log_probs_of("index", "log_probs"),
    "entropy_from_logits": entropy_of("entropy"),
    "nanstd": std_without_nan,
    "masked_mean": mean_of("values", softened=False),
    "masked_var": var_of(softened=False),
    "masked_whiten": whiten_of(softened=False),
}
OUT_OF_SCOPE = {
    "GRPOTrainer._compute_loss/vespo": "VESPO's gamma weights: not built",
    "GRPOTrainer.get_gamma_weights": "VESPO's gamma weights: not built",
    **{
        f"DPOTrainer._compute_loss/{variant}": "a preference loss we do not build (ours: DPO, conservative DPO, IPO)"
        for variant in ("hinge", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")
    },
    "DPOTrainer._compute_loss/forward_kl": "f-divergences other than the reversed KL: not built",
}
