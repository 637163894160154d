"""NeMo-RL: 0/1 float masks; divides by count + 1e-8; leave-one-out mean and std are its default for groups."""

import math
from typing import Any

import torch
from torch import Tensor

from golden_adapters.common import (
    Adapter,
    Outputs,
    Skip,
    at,
    everywhere,
    gradients,
    kl_of,
    mean,
    mean_of,
    row_softening,
    softly_whitened,
    var_of,
)
from rlhf.advantages import gae
from rlhf.algorithm import AlgorithmConfig
from rlhf.conventions import CONVENTIONS
from rlhf.group_advantages import group_normalized_advantages, leave_one_out_advantages
from rlhf.kl import kl_estimate
from rlhf.losses import clipped_surrogate_loss, importance_weighted_loss, reinforce_loss, value_loss
from rlhf.masking import masked_mean, masked_sum, masked_var, masked_whiten
from rlhf.objective import loss_denominator
from rlhf.policy_losses import cispo_loss, gspo_loss, sampler_importance_weights
from rlhf.preference_losses import bradley_terry_loss, dpo_loss
from rlhf.reduce import sequence_mean, token_mean
from rlhf.rewards import combine_rewards, overlong_penalty, rewards_at_last_action

# ---------------------------------------------------------------------------------------------------------- advantages
CONVENTION = CONVENTIONS["nemo_rl"]


def gae_of_tokens(x: Any, p: Any) -> Outputs:
    mask = x.mask.bool()
    estimate = gae(x.token_level_rewards, x.values, mask, gamma=p.gae_gamma, gae_lambda=p.gae_lambda)
    return {"advantages": at(estimate.advantages, mask), "returns": at(estimate.returns, mask)}


def gae_of_scores(x: Any, p: Any) -> Outputs:
    """Scores at the last action, minus the KL; lambda for the values and, with alpha, one per length for the policy."""
    mask = x.mask.bool()
    rewards = rewards_at_last_action(x.rewards, mask)
    if p.use_kl_in_reward:
        kind = p.reference_policy_kl_type
        kl = kl_estimate(x.logprobs, x.reference_logprobs, mask, estimator=kind, **CONVENTION.kl_clamps(kind))
        rewards = rewards - p.reference_policy_kl_penalty * kl.detach()
    lam_values = getattr(p, "gae_lambda_value", None) or p.gae_lambda
    lam = getattr(p, "gae_lambda_policy", None) or p.gae_lambda
    alpha = getattr(p, "length_adaptive_alpha", 0.0)
    lams = [max(0.0, 1 - 1 / (alpha * max(int(n), 1))) if alpha else lam for n in mask.sum(-1)]
    rows = [
        gae(r, v, m, gamma=p.gae_gamma, gae_lambda=row_lambda).advantages
        for r, v, m, row_lambda in zip(rewards, x.values, mask, lams, strict=True)
    ]
    advantages = torch.stack(rows)
    if p.normalize_advantages:
        advantages = softly_whitened(advantages, mask)
    returns = gae(rewards, x.values, mask, gamma=p.gae_gamma, gae_lambda=lam_values).returns
    return {"advantages": at(advantages, mask), "returns": at(returns, mask)}


def reinforce_plus_plus(x: Any, p: Any) -> Outputs:
    """The score at every token, undiscounted and without reward-to-go; whitened with ddof 0 and no epsilon."""
    mask, scores = x.mask.bool(), x.rewards.detach()
    if p.minus_baseline:
        scores = group_normalized_advantages(scores, x.prompt_ids[:, 0], divide_by_std=False)
    rewards = scores[:, None].expand(mask.shape)
    if p.use_kl_in_reward:
        kl = kl_estimate(
            x.logprobs_policy.detach(), x.logprobs_reference, mask,
            estimator=p.reference_policy_kl_type, **CONVENTION.kl_clamps(p.reference_policy_kl_type),
        )  # fmt: skip
        rewards = rewards - p.reference_policy_kl_penalty * kl
    return {"advantages": at(masked_whiten(rewards, mask, ddof=0, epsilon=0.0), mask)}


def grpo(x: Any, p: Any) -> Outputs:
    compare = leave_one_out_advantages if p.use_leave_one_out_baseline else group_normalized_advantages
    return {
        "advantages": compare(
            x.rewards, x.prompt_ids[:, 0], divide_by_std=p.normalize_rewards, epsilon=CONVENTION.group_epsilon
        )
    }


def gdpo(x: Any, p: Any) -> Outputs:
    """Leave-one-out within each component, which our GDPO does not offer; then as ours."""
    components = [
        leave_one_out_advantages(rewards, x.prompt_ids[:, 0], divide_by_std=True, epsilon=CONVENTION.group_epsilon)
        for rewards in (x.reward_a, x.reward_b)
    ]
    total = combine_rewards(torch.stack(components, -1), p.reward_weights)
    return {"advantages": masked_whiten(total, everywhere(total))}


def baseline_and_std(x: Any, p: Any) -> Outputs:
    """Score minus our advantage; samples that are not valid are left out of their group."""
    scores, ids, valid = x.rewards.detach(), x.prompt_ids[:, 0], x.valid_mask.bool()
    compare = leave_one_out_advantages if p.leave_one_out_baseline else group_normalized_advantages
    baseline = scores.clone()
    baseline[valid] -= compare(scores[valid], ids[valid], divide_by_std=False)
    others = (ids[:, None] == ids) & valid
    if p.leave_one_out_baseline:
        others &= ~torch.eye(len(ids), dtype=torch.bool)
    std = torch.stack([masked_var(scores, row).sqrt() for row in others])
    return {"baseline": at(baseline, valid), "std": at(std, valid)}


def reward_shaping(x: Any, p: Any) -> Outputs:
    if hasattr(p, "stop_properly_penalty_coef"):
        return {"rewards": torch.where(x.truncated, p.stop_properly_penalty_coef * x.rewards, x.rewards)}
    limit = p.max_response_length
    penalty = overlong_penalty(
        x.response_length, max_length=limit, buffer=p.overlong_buffer_length, scale=p.overlong_buffer_penalty
    )
    # Beyond the limit the peer's penalty keeps growing, where DAPO's stays.
    return {"rewards": at(x.rewards + penalty, x.response_length <= limit, Skip("all lengths are beyond the limit"))}


# -------------------------------------------------------------------------------------------------------------- losses
def sampler_weights(x: Any, p: Any, mask: Tensor) -> Tensor:
    args = (x.prev_logprobs, x.generation_logprobs, mask)
    high, low = p.truncated_importance_sampling_ratio, p.truncated_importance_sampling_ratio_min
    if p.truncated_importance_sampling_type == "tis":
        return sampler_importance_weights(*args, level="token", mode="truncate", high=high)
    if p.truncated_importance_sampling_type == "icepop":
        return sampler_importance_weights(*args, level="token", mode="mask", low=low, high=high)
    if p.truncated_importance_sampling_type == "seq-mask-tis":  # keeps whole sequences, weighs their tokens
        keep = sampler_importance_weights(*args, level="sequence_mean", mode="mask", low=low, high=high) > 0
        return sampler_importance_weights(*args, level="token", mode="truncate", high=math.inf) * keep
    level: Any = "sequence" if p.sequence_level_importance_ratios else "token"
    weights = sampler_importance_weights(*args, level=level, mode="truncate", high=math.inf)
    return torch.where(weights.isinf(), 0.0, weights)  # an infinite weight becomes 0


def kl_term(x: Any, p: Any, mask: Tensor) -> Tensor:
    """Weighed by a ratio with gradient, of the new policy to itself or to the sampler."""
    log_probs, ref = x.next_token_logprobs, x.reference_policy_logprobs.detach()
    held = ref + (log_probs - ref).clamp(-p.kl_input_clamp_value, p.kl_input_clamp_value)
    kl = kl_estimate(held, ref, mask, estimator=p.reference_policy_kl_type)
    kl = kl.clamp(-p.kl_output_clamp_value, p.kl_output_clamp_value)
    behavior = x.generation_logprobs if p.use_on_policy_kl_approximation else log_probs
    return -importance_weighted_loss(log_probs, behavior, torch.ones_like(kl), mask).loss * kl


def policy_loss(x: Any, p: Any) -> Outputs:
    log_probs, advantages = x.next_token_logprobs, x.advantages
    mask = (x.token_mask * x.sample_mask[:, None]).bool()
    bounds = {"clip_low": p.ratio_clip_min, "clip_high": p.ratio_clip_max}
    old = log_probs.detach() if p.force_on_policy_ratio else x.prev_logprobs
    if p.disable_ppo_ratio:
        loss = reinforce_loss(log_probs, advantages, mask)
        ratio = log_probs.detach()  # what it reports then
    elif p.use_cispo:
        loss, ratio, _ = cispo_loss(log_probs, old, advantages, mask, **bounds)
    elif p.sequence_level_importance_ratios:
        # Its mean over a sequence divides by count + 1e-8.
        softened = old + (log_probs - old.detach()) * row_softening(mask).to(log_probs.dtype)
        loss, ratio, _ = gspo_loss(softened, old, advantages, mask, **bounds, dual_clip=p.ratio_clip_c)
    else:
        loss, ratio, _ = clipped_surrogate_loss(log_probs, old, advantages, mask, **bounds, dual_clip=p.ratio_clip_c)
    clamped = ratio if p.disable_ppo_ratio else ratio.clamp(1 - p.ratio_clip_min, 1 + p.ratio_clip_max)
    if p.use_importance_sampling_correction:
        loss = loss * sampler_weights(x, p, mask)
    valid = mask[x.sample_mask.bool()]  # rows without tokens count
    tokens, rows = (
        given + CONVENTION.count_epsilon
        if given
        else loss_denominator(AlgorithmConfig(reduction=how, convention="nemo_rl"), valid)
        for given, how in ((p.global_valid_toks, "token_mean"), (p.global_valid_seqs, "sequence_mean"))
    )

    def reduced(per_token: Tensor) -> Tensor:
        if p.token_level_loss:
            return token_mean(per_token, mask, denominator=tokens)
        return sequence_mean((per_token * row_softening(mask)).to(per_token.dtype), mask, denominator=rows)

    kl = torch.zeros_like(loss.sum())
    if p.reference_policy_kl_penalty:
        kl = reduced(kl_term(x, p, mask))
    total = reduced(loss) + p.reference_policy_kl_penalty * kl
    return {
        "loss": total, **gradients(total, grad_next_token_logprobs=log_probs), "kl_penalty": kl,
        "probs_ratio": token_mean(ratio, mask, denominator=tokens),
        "probs_ratio_clamped": token_mean(clamped, mask, denominator=tokens),
    }  # fmt: skip


def critic_loss(x: Any, p: Any) -> Outputs:
    mask = (x.token_mask * x.sample_mask[:, None]).bool()
    clip = {"old_values": x.old_values, "value_clip": p.cliprange} if p.cliprange is not None else {}
    terms = value_loss(x.logits, x.returns, mask, **clip)
    tokens = mask.sum().double() + CONVENTION.count_epsilon
    loss = p.scale * token_mean(terms.loss, mask, denominator=tokens)
    clipped = token_mean(terms.is_clipped.to(loss.dtype), mask, denominator=tokens)
    return {"loss": loss, "vf_clipfrac": clipped, **gradients(loss, grad_values=x.logits)}


def reward_model_loss(x: Any, p: Any) -> Outputs:
    """Rows alternate chosen, rejected."""
    chosen, rejected, real = x.rewards[0::2], x.rewards[1::2], x.sample_mask[0::2].bool()
    pairs = real.sum().double() + CONVENTION.count_epsilon
    loss = token_mean(bradley_terry_loss(chosen, rejected, pair_mask=real), real, denominator=pairs)
    accuracy = token_mean((chosen > rejected).to(loss.dtype), real, denominator=pairs)
    return {"loss": loss, "accuracy": accuracy, **gradients(loss, grad_rewards=x.rewards)}


def preference_loss(x: Any, p: Any) -> Outputs:
    """Rows alternate chosen, rejected; a term of likelihood of the chosen ones may be added."""
    mask = x.token_mask.bool()
    pool = masked_mean if p.preference_average_log_probs else masked_sum
    log_probs, ref = pool(x.next_token_logprobs, mask, dim=-1), pool(x.reference_logprobs, mask, dim=-1)
    answers = (log_probs[0::2], log_probs[1::2], ref[0::2], ref[1::2])
    preference = mean(dpo_loss(*answers, beta=p.reference_policy_kl_penalty).loss)
    sft_pool = masked_mean if p.sft_average_log_probs else masked_sum
    likelihood = -mean(sft_pool(x.next_token_logprobs, mask, dim=-1)[0::2])
    sft = likelihood if p.sft_loss_weight else torch.zeros_like(likelihood)
    loss = p.preference_loss_weight * preference + p.sft_loss_weight * sft
    grad = gradients(loss, grad_next_token_logprobs=x.next_token_logprobs)
    return {"loss": loss, "preference_loss": preference, "sft_loss": sft, **grad}


ADAPTERS: dict[str, Adapter] = {
    "GeneralizedAdvantageEstimator._compute_gae": gae_of_tokens,
    "GeneralizedAdvantageEstimator.compute_advantage": gae_of_scores,
    "ReinforcePlusPlusAdvantageEstimator.compute_advantage": reinforce_plus_plus,
    "GRPOAdvantageEstimator.compute_advantage": grpo,
    "GDPOAdvantageEstimator.compute_advantage": gdpo,
    "calculate_baseline_and_std_per_prompt": baseline_and_std,
    "apply_reward_shaping": reward_shaping,
    "ClippedPGLossFn": policy_loss,
    "MseValueLossFn": critic_loss,
    "PreferenceLossFn": reward_model_loss,
    "DPOLossFn": preference_loss,
    "calculate_kl": kl_of(
        "logprobs", "logprobs_reference", "kl_type",
        lambda _, p: {"clamp_input": p.input_clamp_value, "clamp_output": p.output_clamp_value},
    ),
    "masked_mean": mean_of("values", softened=True),
    "masked_var": var_of(softened=True),
}  # fmt: skip
OUT_OF_SCOPE = {
    **{
        f"ClippedPGLossFn#{name}": "a diagnostic: no loss depends on it"
        for name in ("approx_entropy", "gen_kl_error", "is_oob_ratio", "js_divergence_error", "policy_kl_error",
                     "sampling_importance_ratio", "token_mult_prob_error")
    },
}  # fmt: skip
