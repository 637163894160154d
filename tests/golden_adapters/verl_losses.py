"""verl, losses: log ratio clamped to +-20, dual clip by default; aggregation by name; weights against the rollout."""

import math
from typing import Any

import torch
from torch import Tensor

from golden_adapters.common import Adapter, Outputs, fraction, gradients, is_dual, row_softening, softening
from rlhf.conventions import CONVENTIONS
from rlhf.kl import kl_estimate
from rlhf.losses import clipped_surrogate_loss, importance_weighted_loss, reinforce_loss, value_loss
from rlhf.masking import masked_mean
from rlhf.policy_losses import cispo_loss, gspo_loss, sampler_importance_weights, sapo_loss, token_covariance
from rlhf.reduce import count, fixed_length, sequence_mean, sequence_sum, token_mean


def reduced(per_token: Tensor, mask: Tensor, p: Any) -> Tensor:
    """Global counts, where given, are over all ranks, whose average is taken afterwards: hence dp_size."""
    ranks, how = getattr(p, "dp_size", 1), p.loss_agg_mode
    tokens = getattr(p, "batch_num_tokens", count(mask, how="token_mean")) / ranks
    rows = getattr(p, "global_batch_size", count(mask, how="sequence_mean")) / ranks
    if how == "token-mean":
        return token_mean(per_token, mask, denominator=tokens)
    if how == "token-sum":
        return ranks * token_mean(per_token, mask, denominator=1)
    if how == "seq-mean-token-sum":
        return sequence_sum(per_token, mask, denominator=rows)
    if how == "seq-mean-token-mean":  # each row's mean divides by count + 1e-8
        return sequence_mean((per_token * row_softening(mask)).to(per_token.dtype), mask, denominator=rows)
    length = getattr(p, "loss_scale_factor", None) or mask.shape[-1]
    return fixed_length(per_token, mask, denominator=rows, length=length)


def aggregated(x: Any, p: Any) -> Outputs:
    loss = reduced(x.loss_mat, x.loss_mask.bool(), p)
    return {"loss": loss, **gradients(loss, grad_loss_mat=x.loss_mat)}


def arguments(x: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.log_prob, x.old_log_prob, x.advantages, x.response_mask.bool()


def outputs_of(
    per_token: Tensor, x: Any, p: Any, *, clipped: Tensor | None = None, lower: Tensor | None = None, clamp: float = 20
) -> Outputs:
    """Loss, gradient, its KL of old from new (k1, clamped like the log ratio) and clip fractions, each softened."""
    mask = x.response_mask.bool()
    if hasattr(x, "rollout_is_weights"):
        per_token = per_token * x.rollout_is_weights.detach()
    loss, soft = reduced(per_token, mask, p), softening(mask)
    k1 = kl_estimate(x.old_log_prob, x.log_prob, mask, estimator="k1").clamp(-clamp, clamp)
    nowhere = torch.zeros_like(mask)
    return {
        "loss": loss, **gradients(loss, grad_log_prob=x.log_prob), "ppo_kl": masked_mean(k1, mask) * soft,
        "pg_clipfrac": fraction(nowhere if clipped is None else clipped, mask, loss) * soft,
        "pg_clipfrac_lower": fraction(nowhere if lower is None else lower, mask, loss) * soft,
    }  # fmt: skip


def vanilla(x: Any, p: Any) -> Outputs:
    log_probs, old, advantages, mask = arguments(x)
    bounds = {"clip_low": p.clip_ratio_low, "clip_high": p.clip_ratio_high, "dual_clip": p.clip_ratio_c}
    terms = clipped_surrogate_loss(log_probs, old, advantages, mask, **bounds)
    dual = terms.is_clipped & is_dual(advantages, terms.ratio)
    return outputs_of(terms.loss, x, p, clipped=terms.is_clipped & ~dual, lower=dual)


def gspo(x: Any, p: Any) -> Outputs:
    """The sequence's log ratio is clamped above 10."""
    log_probs, old, advantages, mask = arguments(x)
    dual = CONVENTIONS["verl"].sequence_dual_clip
    bounds = {"clip_low": p.clip_ratio_low, "clip_high": p.clip_ratio_high, "dual_clip": dual}
    terms = gspo_loss(log_probs, old, advantages, mask, **bounds)
    return outputs_of(terms.loss, x, p, clipped=terms.is_clipped & ~is_dual(advantages, terms.ratio), clamp=math.inf)


def sapo(x: Any, p: Any) -> Outputs:
    terms = sapo_loss(*arguments(x), temperature_positive=p.tau_pos, temperature_negative=p.tau_neg)
    return outputs_of(terms.loss, x, p)


def cispo(x: Any, p: Any) -> Outputs:
    low = p.clip_ratio_low if p.clip_ratio_low < 1 else None
    terms = cispo_loss(*arguments(x), clip_low=low, clip_high=p.clip_ratio_high)
    return outputs_of(terms.loss, x, p, clipped=terms.is_clipped)


def policy_gradient(x: Any, p: Any) -> Outputs:
    return outputs_of(reinforce_loss(x.log_prob, x.advantages, x.response_mask.bool()), x, p, clamp=math.inf)


def bypass_mode(x: Any, p: Any) -> Outputs:
    """The sampler's log-probs as the old ones; tokens or rows too far from them are dropped."""
    log_probs, sampled, mask = x.log_prob, x.rollout_log_prob, x.response_mask.bool()
    kept = mask
    if p.rollout_rs:
        kept = accepted((log_probs - sampled).detach(), mask, p.rollout_rs, str(p.rollout_rs_threshold))
    if p.loss_type == "ppo_clip":
        bounds = {"clip_low": p.clip_ratio_low, "clip_high": p.clip_ratio_high, "dual_clip": p.clip_ratio_c}
        per_token = clipped_surrogate_loss(log_probs, sampled, x.advantages, kept, **bounds).loss
    else:
        per_token = reinforce_loss(log_probs, x.advantages, kept)
        if p.rollout_is:
            limits: Any = {"level": p.rollout_is, "mode": "truncate", "high": p.rollout_is_threshold}
            per_token = per_token * sampler_importance_weights(log_probs, sampled, mask, **limits)
    x = type(x)(**{**vars(x), "old_log_prob": sampled, "response_mask": kept})
    return outputs_of(per_token, x, p, clamp=20 if p.loss_type == "ppo_clip" else math.inf)


def kl_cov(x: Any, p: Any) -> Outputs:
    """A share of the tokens, those of largest covariance, pays |log ratio|."""
    log_probs, old, advantages, mask = arguments(x)
    covariance = torch.where(mask, token_covariance(log_probs, advantages, mask), -math.inf)
    share = max(1, int(mask.sum() * p.policy_loss["kl_cov_ratio"]))
    largest = torch.zeros_like(mask).flatten()
    largest[covariance.flatten().topk(share).indices] = True
    penalty = p.policy_loss["ppo_kl_coef"] * kl_estimate(log_probs, old, mask, estimator="abs")
    loss = importance_weighted_loss(log_probs, old, advantages, mask).loss + largest.view_as(mask) * penalty
    # It reports |log ratio|, here without sign.
    out = outputs_of(loss, x, p)
    k1 = kl_estimate(log_probs, old, mask, estimator="abs")
    return {**out, "ppo_kl": masked_mean(k1, mask) * softening(mask)}


def clip_cov(x: Any, p: Any) -> Outputs:
    """Tokens of a covariance between two bounds are dropped, unless clipped anyway."""
    log_probs, old, advantages, mask = arguments(x)
    covariance, limits = token_covariance(log_probs, advantages, mask), p.policy_loss
    bounds = {"clip_low": p.clip_ratio_low, "clip_high": p.clip_ratio_high}
    terms = clipped_surrogate_loss(log_probs, old, advantages, mask, **bounds)
    within = (covariance > limits["clip_cov_lb"]) & (covariance < limits["clip_cov_ub"])
    dropped = within & ~terms.is_clipped
    return outputs_of(terms.loss * ~dropped, x, p, clipped=dropped)


def dppo(divergence: str) -> Adapter:
    """Tokens whose probability moved too far along A are dropped; the others have a detached, bounded ratio."""

    def adapter(x: Any, p: Any) -> Outputs:
        log_probs, old, advantages, mask = arguments(x)
        new_p, old_p = log_probs.detach().exp(), old.exp()
        if divergence == "tv":
            distance = (new_p - old_p).abs()
        else:  # of two outcomes: the action or another one
            others = (1 - old_p).clamp(min=1e-8).log() - (1 - new_p).clamp(min=1e-8).log()
            distance = old_p * (old - log_probs.detach()) + (1 - old_p) * others
        up, down = (new_p > old_p) & (distance > p.clip_ratio_high), (new_p < old_p) & (distance > p.clip_ratio_low)
        too_far = torch.where(advantages > 0, up, down)
        ratio = (log_probs - old).detach().clamp(-20, 20).exp().clamp(max=p.clip_ratio_c)
        per_token = reinforce_loss(log_probs, advantages * ratio * ~too_far, mask)
        return outputs_of(per_token, x, p, clipped=too_far, lower=(advantages < 0) & (ratio == p.clip_ratio_c))

    return adapter


def correction_weights(x: Any, p: Any) -> Outputs:
    mask, log_ratio, bound = x.response_mask.bool(), x.log_ratio.detach(), p.rollout_is_threshold
    limits: dict[str, Any] = {"mode": "truncate", "high": bound}
    if isinstance(bound, str):  # LOW_HIGH: IcePop
        low, high = map(float, bound.split("_"))
        limits = {"mode": "mask", "low": low, "high": high}
    weights = sampler_importance_weights(log_ratio, torch.zeros_like(log_ratio), mask, level=p.rollout_is, **limits)
    if getattr(p, "rollout_is_batch_normalize", False):  # divided by their mean, over tokens or over rows
        if p.rollout_is == "token":
            average = masked_mean(weights, mask) * softening(mask)
        else:
            average = masked_mean(masked_mean(weights, mask, dim=-1) * row_softening(mask)[:, 0], mask.any(-1))
        weights = weights / average.clamp(min=1e-8)
    return {"weights": weights}


def accepted(log_ratio: Tensor, mask: Tensor, rules: str, thresholds: str) -> Tensor:
    """Slots that every rule accepts. LOW_HIGH bounds rollout / train, the inverse of the importance weight."""
    zeros, kept = torch.zeros_like(log_ratio), mask
    for rule, threshold in zip(rules.split(","), thresholds.split(","), strict=True):
        scope, estimator = rule.rsplit("_", 1)
        if estimator == "k1":
            low, high = map(float, threshold.split("_"))
            level: Any = {"token": "token", "seq_sum": "sequence", "seq_mean": "sequence_mean"}[scope]
            limits: Any = {"level": level, "mode": "mask", "low": low, "high": high}
            kept = kept & (sampler_importance_weights(-log_ratio, zeros, mask, **limits) > 0)
            continue
        kl = kl_estimate(-log_ratio, zeros, mask, estimator=estimator)  # type: ignore[arg-type]
        if scope == "seq_mean":
            kl = masked_mean(kl, mask, dim=-1)[:, None]
        elif scope == "seq_max":
            kl = kl.amax(-1, keepdim=True)
        kept = kept & (kl <= float(threshold))
    return kept


def rejection_mask(x: Any, p: Any) -> Outputs:
    kept = accepted(x.log_ratio.detach(), x.response_mask.bool(), p.rollout_rs, p.rollout_rs_threshold)
    return {"mask": kept.to(x.log_ratio.dtype)}


def critic_loss(x: Any, p: Any) -> Outputs:
    mask = x.response_mask.bool()
    terms = value_loss(x.vpreds, x.returns, mask, old_values=x.values, value_clip=p.cliprange_value)
    loss = reduced(terms.loss, mask, p)
    clipped = fraction(terms.is_clipped, mask, loss) * softening(mask)
    return {"vf_loss": loss, "vf_clipfrac": clipped, **gradients(loss, grad_vpreds=x.vpreds)}


LOSSES: dict[str, Adapter] = {
    "agg_loss": aggregated,
    "compute_policy_loss_vanilla": vanilla,
    "compute_policy_loss_gspo": gspo,
    "compute_policy_loss_sapo": sapo,
    "compute_policy_loss_cispo": cispo,
    "compute_policy_loss_gpg": policy_gradient,
    "compute_policy_loss_reinforce": policy_gradient,
    "compute_policy_loss_bypass_mode": bypass_mode,
    "compute_policy_loss_kl_cov": kl_cov,
    "compute_policy_loss_clip_cov": clip_cov,
    "compute_policy_loss_dppo_tv": dppo("tv"),
    "compute_policy_loss_dppo_kl": dppo("kl"),
    "compute_rollout_correction_weights": correction_weights,
    "compute_rollout_rejection_mask": rejection_mask,
    "compute_value_loss": critic_loss,
}
NO_LOSSES = {
    "compute_policy_loss_geo_mean": "GMPO's clipped geometric mean: not built",
    "compute_policy_loss_dro": "DRO's quadratic penalty: not built",
    "compute_rollout_correction_weights#mean": "a diagnostic of the weights",
    "compute_rollout_correction_weights#eff_sample_size": "a diagnostic of the weights",
}
