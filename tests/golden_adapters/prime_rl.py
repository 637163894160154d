"""prime-rl: one packed sequence, bool mask; losses are sums, with a squared log ratio as trust region."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from golden_adapters.common import Adapter, Outputs, entropy_of, everywhere, fraction, gradients, log_probs_of
from rlhf.group_advantages import group_normalized_advantages, mean_normalized_advantages
from rlhf.kl import kl_estimate
from rlhf.losses import importance_weighted_loss, reinforce_loss
from rlhf.masking import masked_mean
from rlhf.reduce import token_mean


def one_group(rewards: Tensor) -> Tensor:
    return torch.zeros(len(rewards), dtype=torch.int64)


def grpo(x: Any, p: Any) -> Outputs:
    return {"advantages": group_normalized_advantages(x.rewards, one_group(x.rewards), divide_by_std=False)}


def max_rl(x: Any, p: Any) -> Outputs:
    return {"advantages": mean_normalized_advantages(x.rewards, one_group(x.rewards))}


def total(per_token: Tensor, mask: Tensor) -> Tensor:
    """Its losses are sums; a trainer divides later."""
    return token_mean(per_token, mask, denominator=1)


def mismatch(x: Any) -> Tensor:
    return kl_estimate(x.inference_logprobs, x.trainer_logprobs, everywhere(x.trainer_logprobs), estimator="k3")


def weighed(x: Any) -> Tensor | float:
    return x.loss_weights.detach() if hasattr(x, "loss_weights") else 1.0


def trust_region(x: Any, p: Any, per_token: Tensor, mask: Tensor) -> Tensor:
    """kl_tau * (log ratio)^2 on all loss tokens, twice k2."""
    squared = 2 * kl_estimate(x.trainer_logprobs, x.inference_logprobs, mask, estimator="k2")
    return total((per_token + p.kl_tau * squared) * weighed(x), mask)


def policy_loss(kind: str) -> Adapter:
    """-A r on the tokens whose probability moved less than a bound; the others only count in the squared log ratio."""

    def adapter(x: Any, p: Any) -> Outputs:
        log_probs, inference, advantages, mask = x.trainer_logprobs, x.inference_logprobs, x.advantages, x.loss_mask
        change = (log_probs.exp() - inference.exp()).detach()
        if kind == "ipo":
            too_far = change.abs() > p.ipo_threshold
        else:
            low, high = change < -p.dppo_mask_low, change > p.dppo_mask_high
            too_far = torch.where(advantages > 0, high, low)
        surrogate = importance_weighted_loss(log_probs, inference, advantages, mask & ~too_far).loss
        loss = trust_region(x, p, p.adv_tau * surrogate, mask) / getattr(p, "rl_scale", 1)
        metrics = {
            "masked_mismatch_kl": masked_mean(mismatch(x), mask & too_far),
            "unmasked_mismatch_kl": masked_mean(mismatch(x), mask & ~too_far),
            "is_masked": fraction(too_far, mask, loss),
        }
        if kind != "ipo":
            metrics["is_masked_low"] = fraction(too_far & low, mask, loss)
            metrics["is_masked_high"] = fraction(too_far & high, mask, loss)
            metrics["masked_advantage_positive"] = fraction(advantages > 0, mask & too_far, loss)
            metrics["masked_advantage_negative"] = fraction(advantages <= 0, mask & too_far, loss)
        named = {f"metrics.{name}": value for name, value in metrics.items()}
        return {"loss": loss, **gradients(loss, grad_trainer_logprobs=log_probs), **named}

    return adapter


def ref_kl_loss(x: Any, p: Any) -> Outputs:
    """KL to the reference as a reward, minus k1 in the place of the advantage; only lost probability is masked."""
    log_probs, mask = x.trainer_logprobs, x.loss_mask
    minus_k1 = -kl_estimate(log_probs, x.ref_logprobs, mask, estimator="k1")
    p = SimpleNamespace(kl_tau=0.001, dppo_mask_low=0.2)  # its constants: no parameters are recorded
    too_far = (log_probs.exp() - x.inference_logprobs.exp()).detach() < -p.dppo_mask_low
    surrogate = importance_weighted_loss(log_probs, x.inference_logprobs, minus_k1, mask & ~too_far).loss
    loss = trust_region(x, p, surrogate, mask)
    return {
        "loss": loss,
        **gradients(loss, grad_trainer_logprobs=log_probs),
        "metrics.ref_kl": masked_mean(minus_k1, mask),
        "metrics.ref_kl/masked_mismatch_kl": masked_mean(mismatch(x), mask & too_far),
        "metrics.ref_kl/unmasked_mismatch_kl": masked_mean(mismatch(x), mask & ~too_far),
        "metrics.ref_kl/is_masked": fraction(too_far, mask, loss),
    }


def cross_entropy(x: Any, p: Any) -> Outputs:
    per_token = reinforce_loss(x.trainer_logprobs, torch.ones_like(x.trainer_logprobs), x.loss_mask)
    loss = total(per_token * weighed(x), x.loss_mask)
    return {
        "loss": loss,
        **gradients(loss, grad_trainer_logprobs=x.trainer_logprobs),
        "metrics.nll": masked_mean(per_token, x.loss_mask),
    }


def ratio_and_mismatch(x: Any, p: Any) -> Outputs:
    mask = everywhere(x.trainer_logprobs)
    ratio = importance_weighted_loss(x.trainer_logprobs, x.inference_logprobs, x.trainer_logprobs, mask).ratio
    k1 = kl_estimate(x.trainer_logprobs, x.inference_logprobs, mask, estimator="k1")
    return {"log_ratio": k1, "ratio": ratio, "mismatch_kl": mismatch(x)}


ADAPTERS: dict[str, Adapter] = {
    "GRPOAlgorithm.score_group": grpo,
    "MaxRLAlgorithm.score_group": max_rl,
    "default_loss_fn": policy_loss("default"),
    "compute_loss": policy_loss("default"),
    "ipo_loss_fn": policy_loss("ipo"),
    "ref_kl_loss_fn": ref_kl_loss,
    "ce_loss_fn": cross_entropy,
    "compute_importance_ratio_and_mismatch_kl": ratio_and_mismatch,
    "compute_entropy": entropy_of("entropy"),
    "selective_log_softmax": log_probs_of("index", "log_probs"),
}
OUT_OF_SCOPE = {
    "GRPOAlgorithm.score_group/length_penalty": "advantages reweighted by lengths within the group: not built",
    "RAEAlgorithm.score_group": "a stateful baseline, carried from group to group",
}
