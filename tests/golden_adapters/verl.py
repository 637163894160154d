"""verl, estimators: 0/1 float masks, rewards per token; whitened over the mask; groups of one keep their score."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from golden_adapters.common import (
    Adapter,
    Outputs,
    adaptive_coefficient,
    at,
    entropy_of,
    everywhere,
    gradients,
    kl_of,
    log_probs_of,
    mean_of,
    softly_whitened,
    var_of,
    whiten_of,
)
from golden_adapters.verl_losses import LOSSES, NO_LOSSES, reduced
from rlhf.advantages import gae, monte_carlo_returns, reinforce_plus_plus_advantages
from rlhf.conventions import CONVENTIONS
from rlhf.group_advantages import (
    best_of_group_advantages,
    decoupled_group_advantages,
    group_normalized_advantages,
    keep_lone_scores,
    leave_one_out_advantages,
    length_weighted_advantages,
)
from rlhf.kl import adapt_kl_coef_proportionally, kl_estimate
from rlhf.losses import categorical_entropy
from rlhf.masking import masked_mean, masked_whiten
from rlhf.rewards import rewards_at_last_action

Grouped = Callable[[Tensor, Tensor, Tensor, Any], Tensor]  # of scores, group ids, mask, parameters


def gae_of_tokens(x: Any, p: Any) -> Outputs:
    mask = x.response_mask.bool()
    estimate = gae(x.token_level_rewards, x.values, mask, gamma=p.gamma, gae_lambda=p.lam)
    return {"advantages": at(softly_whitened(estimate.advantages, mask), mask), "returns": at(estimate.returns, mask)}


def reinforce_plus_plus(x: Any, p: Any) -> Outputs:
    mask = x.response_mask.bool()
    returns = monte_carlo_returns(x.token_level_rewards, mask, gamma=p.gamma)
    advantages = softly_whitened(returns, mask)
    if returns.dtype == torch.float32:  # which does not resolve the 1e-8: ours as it is
        advantages = reinforce_plus_plus_advantages(x.token_level_rewards, mask, gamma=p.gamma)
    return {"advantages": at(advantages, mask), "returns": at(returns, mask)}


def remax(x: Any, p: Any) -> Outputs:
    mask = x.response_mask.bool()
    returns = monte_carlo_returns(x.token_level_rewards, mask)
    return {"returns": at(returns, mask), "advantages": at(returns - x.reward_baselines[:, None], mask)}


def keeping_lone_scores(advantages: Tensor, scores: Tensor, ids: Tensor) -> Tensor:
    return keep_lone_scores(advantages, scores, ids) if CONVENTIONS["verl"].keeps_lone_scores else advantages


def outcome(grouped: Grouped, *, lone_scores: bool = True) -> Adapter:
    """Scores are summed rewards; one advantage for all tokens of a row."""

    def adapter(x: Any, p: Any) -> Outputs:
        scores, mask = x.token_level_rewards.sum(-1), x.response_mask.bool()
        advantages = grouped(scores, x.index, mask, p)
        if lone_scores:
            advantages = keeping_lone_scores(advantages, scores, x.index)
        return {"advantages": at(advantages[:, None].expand_as(mask), mask)}

    return adapter


def grpo(scores: Tensor, ids: Tensor, mask: Tensor, p: Any) -> Tensor:
    return group_normalized_advantages(scores, ids, divide_by_std=p.norm_adv_by_std_in_grpo, epsilon=p.epsilon)


def leave_one_out(scores: Tensor, ids: Tensor, mask: Tensor, p: Any) -> Tensor:
    return leave_one_out_advantages(scores, ids)


def opo(scores: Tensor, ids: Tensor, mask: Tensor, p: Any) -> Tensor:
    return length_weighted_advantages(scores, mask.sum(-1), ids)


def gpg(scores: Tensor, ids: Tensor, mask: Tensor, p: Any) -> Tensor:
    """Centred, times batch size over the number of scores that are not 0."""
    scale = len(scores) / scores.count_nonzero().clamp(min=1)
    return scale * group_normalized_advantages(scores, ids, divide_by_std=False) / p.f_norm


def gpg_outcome(x: Any, p: Any) -> Outputs:
    """The raw score of a group of one is scaled too."""
    scores, mask = x.token_level_rewards.sum(-1), x.response_mask.bool()
    scale = len(scores) / scores.count_nonzero().clamp(min=1)
    advantages = keeping_lone_scores(gpg(scores, x.index, mask, p), scores * scale / p.f_norm, x.index)
    return {"advantages": at(advantages[:, None].expand_as(mask), mask)}


def pass_at_k(scores: Tensor, ids: Tensor, mask: Tensor, p: Any) -> Tensor:
    divide = p.config["norm_adv_by_std_in_grpo"]
    return best_of_group_advantages(scores, ids, divide_by_std=divide, epsilon=p.epsilon)


def gdpo(x: Any, p: Any) -> Outputs:
    scores, mask = x.token_level_rewards.sum(-1), x.response_mask.bool()
    normalized = decoupled_group_advantages(scores[:, None], x.index, [1.0], epsilon=p.epsilon)
    advantages = keeping_lone_scores(normalized, scores, x.index)
    return {"advantages": masked_whiten(advantages[:, None].expand_as(mask), mask)}


def reinforce_plus_plus_baseline(x: Any, p: Any) -> Outputs:
    scores, mask = x.token_level_rewards.sum(-1), x.response_mask.bool()
    centred = group_normalized_advantages(scores, x.index, divide_by_std=False)
    rewards = rewards_at_last_action(keeping_lone_scores(centred, scores, x.index), mask)
    return {"advantages": reinforce_plus_plus_advantages(rewards, mask)}


def rewards_minus_kl(x: Any, p: Any) -> Outputs:
    kl = kl_estimate(x.old_log_prob, x.ref_log_prob, everywhere(x.old_log_prob), estimator="k1")
    return {"token_level_rewards": x.token_level_scores - p.kl_ratio * kl}


def clamps(estimator: str, p: Any) -> dict[str, float | None]:
    return CONVENTIONS["verl"].kl_clamps(estimator)


def kl_penalty_in_reward(x: Any, p: Any) -> Outputs:
    """The controller sees the mean over rows of each row's mean."""
    mask = x.response_mask.bool()
    estimator: Any = {"kl": "k1", "low_var_kl": "k3"}[p.kl_penalty]
    kl = kl_estimate(x.old_log_probs, x.ref_log_prob, mask, estimator=estimator, **clamps(estimator, p))
    observed = masked_mean(kl, mask, dim=-1).mean().item()
    after = adapt_kl_coef_proportionally(
        p.init_kl_coef, observed, target_kl=p.target_kl, horizon=p.horizon, num_samples=len(mask)
    )
    rewards = x.token_level_scores - p.init_kl_coef * kl
    return {"token_level_rewards": rewards, "kl_coef_after": torch.tensor(after, dtype=torch.float64)}


def mean_entropy(x: Any, p: Any) -> Outputs:
    mask = x.response_mask.bool()
    entropy = reduced(categorical_entropy(x.logits, mask), mask, p)
    return {"entropy": entropy, **gradients(entropy, grad_logits=x.logits)}


ADAPTERS: dict[str, Adapter] = {
    **LOSSES,
    "compute_gae_advantage_return": gae_of_tokens,
    "compute_reinforce_plus_plus_outcome_advantage": reinforce_plus_plus,
    "compute_reinforce_plus_plus_baseline_outcome_advantage": reinforce_plus_plus_baseline,
    "compute_remax_outcome_advantage": remax,
    "compute_grpo_outcome_advantage": outcome(grpo),
    "compute_grpo_vectorized_outcome_advantage": outcome(grpo),
    "compute_rloo_outcome_advantage": outcome(leave_one_out),
    "compute_rloo_vectorized_outcome_advantage": outcome(leave_one_out, lone_scores=False),
    "compute_opo_outcome_advantage": outcome(opo),
    "compute_gpg_outcome_advantage": gpg_outcome,
    "compute_grpo_passk_outcome_advantage": outcome(pass_at_k),
    "compute_gdpo_outcome_advantage": gdpo,
    "compute_rewards": rewards_minus_kl,
    "apply_kl_penalty": kl_penalty_in_reward,
    "kl_penalty": kl_of("logprob", "ref_logprob", "kl_penalty", clamps),
    "AdaptiveKLController": adaptive_coefficient("target_kl", "current_kl"),
    "compute_entropy_loss": mean_entropy,
    "entropy_from_logits": entropy_of("out"),
    "logprobs_from_logits_naive": log_probs_of("labels", "out"),
    "logprobs_from_logits_v2": log_probs_of("labels", "out"),
    "masked_mean": mean_of("values", softened=True),
    "masked_var": var_of(softened=True),
    "masked_whiten": whiten_of(softened=True),
}
OUT_OF_SCOPE = {
    **NO_LOSSES,
    "compute_optimal_token_baseline_advantage": "a baseline per token from the policy's gradient norms: not built",
    "calculate_sum_pi_squared_from_logits": "only the optimal token baseline needs it: not built",
    "compute_grpo_vectorized_outcome_advantage/offset": "computed in float32 regardless: rounding at an offset of 300",
}
