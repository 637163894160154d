"""Our numbers against those that other libraries' own functions returned for the same inputs.

`golden/PEER.json` holds the recorded cases (one per line): parameters, inputs, and the peer's outputs in float32 and
float64. Adapters below map the peer's names and layout to ours and apply the plain step by which its convention differs
(whitening afterwards, no 1/2 in the value loss, 1e-8 in a denominator, ...). A case in which a peer does something else
altogether (dual clip active, log-ratio clamped, ...) yields nothing to compare and is not kept in golden/.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.advantages import (
    gae,
    monte_carlo_returns,
    n_step_returns,
    td0_returns,
    td_lambda_returns,
)
from rlhf.group_advantages import group_normalized_advantages
from rlhf.kl import adapt_kl_coef_proportionally, kl_estimate
from rlhf.losses import SurrogateTerms, categorical_entropy, clipped_surrogate_loss, reinforce_loss, value_loss
from rlhf.masking import masked_mean, masked_var, masked_whiten
from rlhf.reduce import count, fixed_length, reduce, sequence_mean, token_mean

GOLDEN = Path(__file__).parent / "golden"
DTYPES = {"float32": torch.float32, "float64": torch.float64}

# What an adapter returns: output name -> our number, or (our number, where to compare it).
Outputs = dict[str, Tensor | tuple[Tensor, Tensor]]
Adapter = Callable[[Any, Any], Outputs]  # of inputs and parameters, both by attribute


# ------------------------------------------------------------------------------------------------------------ helpers
def everywhere(x: Tensor) -> Tensor:
    return torch.ones_like(x, dtype=torch.bool)


def mean(x: Tensor) -> Tensor:
    return token_mean(x, everywhere(x), denominator=x.numel())


def gradients(loss: Tensor, **inputs: Tensor) -> Outputs:
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values()), retain_graph=True), strict=True))


def softening(mask: Tensor) -> Tensor:
    """Of one who divides by count + 1e-8: what that does to a mean, n / (n + 1e-8)."""
    return mask.sum().double() / (mask.sum().double() + 1e-8)


def row_softening(mask: Tensor) -> Tensor:
    """The same for each row's own mean: [B, 1]."""
    rows = mask.sum(-1, keepdim=True).double()
    return rows / (rows + 1e-8)


def has_gap(mask: Tensor) -> bool:
    return bool((mask[..., 1:] & ~mask[..., :-1]).any())


def log_ratio_beyond(limit: float, log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> bool:
    return bool(((log_probs - old_log_probs).abs()[mask] > limit).any())


def dual_clip_active(terms: SurrogateTerms, advantages: Tensor, bound: float | None) -> bool:
    return bound is not None and bool(((advantages < 0) & (terms.ratio > bound)).any())


# ----------------------------------------------------------------------------------------------- estimators over time
def by_env(x: Any, gamma: float, lam: float, terminated: Tensor, truncated: Tensor, bootstrap: Tensor) -> Outputs:
    """Rollout arrays of the control libraries are [T, N]; the last step of the window continues into last_values."""
    bootstrap[-1] = torch.where(truncated[-1], bootstrap[-1], x.last_values)
    truncated[-1] |= ~terminated[-1]
    ends = {"terminated": terminated.T, "truncated": truncated.T, "bootstrap_values": bootstrap.T}
    estimate = gae(x.rewards.T, x.values.T, everywhere(x.rewards.T), gamma=gamma, gae_lambda=lam, **ends)
    return {"advantages": estimate.advantages.T, "returns": estimate.returns.T}


def gae_from_starts(starts: str, last: str) -> Adapter:
    def adapter(x: Any, p: Any) -> Outputs:
        terminated = torch.cat([getattr(x, starts)[1:], getattr(x, last)[None]]).bool()
        nowhere = torch.zeros_like(terminated)
        return by_env(x, p.gamma, p.gae_lambda, terminated, nowhere, torch.zeros_like(x.rewards))

    return adapter


def gae_with_truncation(x: Any, p: Any) -> Outputs:
    truncated = x.truncated.bool() & ~x.terminated.bool()
    return by_env(x, p.gamma, p.gae_lambda, x.terminated.bool(), truncated, x.terminal_values.detach().clone())


def torchrl(x: Any) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Rewards, values, mask and ends; [N, T, 1]. Without state values, those that the next values imply."""
    next_values, rewards, done = x.next_state_value[..., 0], x.reward[..., 0], x.done[..., 0].bool()
    shifted = torch.nn.functional.pad(next_values[:, :-1], (1, 0))
    values = x.state_value[..., 0] if hasattr(x, "state_value") else shifted
    window_end = torch.arange(done.shape[-1]) == done.shape[-1] - 1
    terminated = x.terminated[..., 0].bool()
    truncated = (done | window_end) & ~terminated
    ends = {"terminated": terminated, "truncated": truncated, "bootstrap_values": next_values}
    return rewards, values, everywhere(rewards), ends


def torchrl_gae(x: Any, p: Any) -> Outputs:
    rewards, values, mask, ends = torchrl(x)
    estimate = gae(rewards, values, mask, gamma=p.gamma, gae_lambda=p.lmbda, **ends)
    return {"advantage": estimate.advantages[..., None], "value_target": estimate.returns[..., None]}


def torchrl_target(returns: Callable[..., Tensor], output: str) -> Adapter:
    def adapter(x: Any, p: Any) -> Outputs:
        rewards, values, mask, ends = torchrl(x)
        lam = {"td_lambda": p.lmbda} if returns is td_lambda_returns else {}
        arguments = (rewards, mask) if returns is monte_carlo_returns else (rewards, values, mask)
        target = returns(*arguments, gamma=p.gamma, **lam, **ends)
        return {output: (target if output == "return" else target - values)[..., None]}

    return adapter


def torchrl_reward_to_go(x: Any, p: Any) -> Outputs:
    rewards, done = x.reward[..., 0], x.done[..., 0].bool()
    returns = monte_carlo_returns(rewards, everywhere(rewards), gamma=p.gamma, terminated=done)
    return {"reward_to_go": returns[..., None]}


def rlax(x: Any, values: Tensor, next_values: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """One sequence; discounts are gamma or 0, and the last step goes on into the last of the values."""
    mask, terminated = everywhere(x.r_t), x.discount_t == 0
    truncated = (torch.arange(len(mask)) == len(mask) - 1) & ~terminated
    ends = {"terminated": terminated, "truncated": truncated, "bootstrap_values": next_values}
    return (x.r_t, values, mask), {"gamma": x.discount_t.max().item(), **ends}


def rlax_gae(x: Any, p: Any) -> Outputs:
    if not hasattr(p, "lambda_"):  # one per step, an input
        return {}
    arguments, options = rlax(x, x.values[:-1], x.values[1:])
    return {"advantages": gae(*arguments, gae_lambda=p.lambda_, **options).advantages}


def rlax_target(returns: Callable[..., Tensor], name: str | None = None, ours: str = "") -> Adapter:
    def adapter(x: Any, p: Any) -> Outputs:
        (rewards, values, mask), options = rlax(x, torch.nn.functional.pad(x.v_t[:-1], (1, 0)), x.v_t)
        arguments = (rewards, mask) if returns is monte_carlo_returns else (rewards, values, mask)
        return {"returns": returns(*arguments, **({ours: getattr(p, name)} if name else {}), **options)}

    return adapter


def verl_gae(x: Any, p: Any) -> Outputs:
    mask = x.response_mask.bool()
    estimate = gae(x.token_level_rewards, x.values, mask, gamma=p.gamma, gae_lambda=p.lam)
    soft = softening(mask)
    statistics = masked_mean(estimate.advantages, mask) * soft, masked_var(estimate.advantages, mask) * soft
    whitened = masked_whiten(estimate.advantages, mask, mean=statistics[0], var=statistics[1])
    return {"advantages": (whitened, mask), "returns": (estimate.returns, mask)}


def nemo_gae(x: Any, p: Any) -> Outputs:
    mask = x.mask.bool()
    estimate = gae(x.token_level_rewards, x.values, mask, gamma=p.gae_gamma, gae_lambda=p.gae_lambda)
    return {"advantages": (estimate.advantages, mask), "returns": (estimate.returns, mask)}


def openrlhf_gae(x: Any, p: Any) -> Outputs:
    mask = x.action_mask.bool()
    if has_gap(mask):  # it values a gap at 0 and discounts through it
        return {}
    estimate = gae(x.rewards, x.values, mask, gamma=p.gamma, gae_lambda=p.lambd)
    return {"advantages": (estimate.advantages, mask), "returns": (estimate.returns, mask)}


def openrlhf_returns(x: Any, p: Any) -> Outputs:
    mask = x.action_mask.bool()
    if has_gap(mask) and p.gamma != 1:
        return {}
    return {"returns": (monte_carlo_returns(x.rewards, mask, gamma=p.gamma), mask)}


# --------------------------------------------------------------------------------------------------- group advantages
def verl_grpo(x: Any, p: Any) -> Outputs:
    """Scores are summed rewards; a group of one keeps its raw score; one advantage for all tokens of a row."""
    scores = x.token_level_rewards.sum(-1)
    scaled = p.norm_adv_by_std_in_grpo
    ours = group_normalized_advantages(scores, x.index, divide_by_std=scaled, epsilon=p.epsilon)
    alone = (x.index[:, None] == x.index).sum(-1) == 1
    mask = x.response_mask.bool()
    return {"advantages": (torch.where(alone, scores, ours)[:, None].expand_as(mask), mask)}


def consecutive_groups(scores: Tensor, size: int) -> Tensor:
    return torch.arange(len(scores)) // size


def trl_grpo(x: Any, p: Any) -> Outputs:
    if not hasattr(x, "rewards_per_func") or x.rewards_per_func.shape[1] > 1:
        return {}
    if p.scale_rewards not in ("group", "none") or p.multi_objective_aggregation != "sum_then_normalize":
        return {}
    scores = x.rewards_per_func[:, 0] * p.reward_weights[0]
    groups = consecutive_groups(scores, p.num_generations)
    scaled = p.scale_rewards == "group"
    return {"advantages": group_normalized_advantages(scores, groups, divide_by_std=scaled, epsilon=1e-4)}


def openrlhf_group_norm(x: Any, p: Any) -> Outputs:
    if p.estimator != "group_norm" or p.n_samples_per_prompt == 1:
        return {}
    groups = consecutive_groups(x.rewards, p.n_samples_per_prompt)
    mask = x.action_mask.bool()
    ours = group_normalized_advantages(x.rewards, groups, epsilon=1e-9)[:, None].expand_as(mask)
    return {"advantages": (ours, mask)}


def nemo_grpo(x: Any, p: Any) -> Outputs:
    if p.use_leave_one_out_baseline:
        return {}
    scaled = p.normalize_rewards
    ours = group_normalized_advantages(x.rewards, x.prompt_ids[:, 0], divide_by_std=scaled, epsilon=1e-6)
    return {"advantages": ours}


def prime_grpo(x: Any, p: Any) -> Outputs:
    if p.length_penalty is not None:
        return {}
    one_group = torch.zeros(len(x.rewards), dtype=torch.int64)
    return {"advantages": group_normalized_advantages(x.rewards, one_group, divide_by_std=False)}


# ------------------------------------------------------------------------------------------------------------- losses
def cleanrl_update(x: Any, p: Any) -> Outputs:
    advantages = x.advantages.detach()
    if p.norm_adv:
        if len(advantages) == 1:  # its std is NaN
            return {}
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    bounds = {"clip_low": p.clip_coef, "clip_high": p.clip_coef}
    mask = everywhere(advantages)
    policy = mean(clipped_surrogate_loss(x.new_log_prob, x.old_log_prob, advantages, mask, **bounds).loss)
    clip = {"old_values": x.old_values, "value_clip": p.clip_coef} if p.clip_vloss else {}
    value = mean(value_loss(x.new_value, x.returns, mask, **clip).loss)
    total = policy + p.vf_coef * value - p.ent_coef * x.entropy.mean()
    backwards = kl_estimate(x.old_log_prob, x.new_log_prob, mask, estimator="k3")
    return {
        "pg_loss": policy, "v_loss": value, "loss": total, "approx_kl": mean(backwards),
        **gradients(total, grad_log_prob=x.new_log_prob, grad_values=x.new_value),
    }  # fmt: skip


def sb3_update(x: Any, p: Any) -> Outputs:
    """Mean square without 1/2; with clip_range_vf it replaces the prediction, which is not our clipping."""
    if p.clip_range_vf is not None:
        return {}
    advantages, mask = x.advantages.detach(), everywhere(x.advantages)
    if p.normalize_advantage and len(advantages) > 1:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    bounds = {"clip_low": p.clip_range, "clip_high": p.clip_range}
    policy = mean(clipped_surrogate_loss(x.log_prob, x.old_log_prob, advantages, mask, **bounds).loss)
    value = 2 * mean(value_loss(x.values, x.returns, mask).loss)
    entropy = x.entropy.mean() if p.analytic_entropy else -x.log_prob.mean()
    total = policy + p.vf_coef * value - p.ent_coef * entropy
    backwards = kl_estimate(x.old_log_prob, x.log_prob, mask, estimator="k3")
    return {
        "policy_loss": policy, "value_loss": value, "loss": total, "approx_kl": mean(backwards),
        **gradients(total, grad_log_prob=x.log_prob, grad_values=x.values),
    }  # fmt: skip


def a2c_update(x: Any, p: Any) -> Outputs:
    advantages, mask = x.advantages.detach(), everywhere(x.advantages)
    if p.normalize_advantage:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    policy = mean(reinforce_loss(x.log_prob, advantages, mask))
    value = 2 * mean(value_loss(x.values, x.returns, mask).loss)
    return {
        "policy_loss": policy, "value_loss": value,
        **gradients(policy + p.vf_coef * value, grad_log_prob=x.log_prob, grad_values=x.values),
    }  # fmt: skip


def rlax_surrogate(x: Any, p: Any) -> Outputs:
    bounds = {"clip_low": p.epsilon, "clip_high": p.epsilon}
    mask = everywhere(x.advantages)
    loss = mean(clipped_surrogate_loss(x.log_prob, x.old_log_prob, x.advantages, mask, **bounds).loss)
    return {"loss": loss, **gradients(loss, grad_log_prob=x.log_prob)}


def verl_aggregate(per_token: Tensor, mask: Tensor, p: Any) -> Tensor:
    """Global counts, where given, are over all ranks, whose average is taken afterwards: hence dp_size."""
    ranks, how = getattr(p, "dp_size", 1), p.loss_agg_mode
    tokens = getattr(p, "batch_num_tokens", count(mask, how="token_mean")) / ranks
    rows = getattr(p, "global_batch_size", count(mask, how="sequence_mean")) / ranks
    if how == "token-mean":
        return token_mean(per_token, mask, denominator=tokens)
    if how == "token-sum":
        return ranks * token_mean(per_token, mask, denominator=1)
    if how == "seq-mean-token-mean":
        return sequence_mean((per_token * row_softening(mask)).to(per_token.dtype), mask, denominator=rows)
    scale = getattr(p, "loss_scale_factor", None) or mask.shape[-1]
    length = {"seq-mean-token-sum": 1, "seq-mean-token-sum-norm": scale}[how]
    return fixed_length(per_token, mask, denominator=rows, length=length)


def verl_agg_loss(x: Any, p: Any) -> Outputs:
    loss = verl_aggregate(x.loss_mat, x.loss_mask.bool(), p)
    return {"loss": loss, **gradients(loss, grad_loss_mat=x.loss_mat)}


def verl_surrogate(x: Any, p: Any) -> Outputs:
    mask = x.response_mask.bool()
    bounds = {"clip_low": p.clip_ratio_low, "clip_high": p.clip_ratio_high}
    terms = clipped_surrogate_loss(x.log_prob, x.old_log_prob, x.advantages, mask, **bounds)
    if hasattr(x, "rollout_is_weights") or dual_clip_active(terms, x.advantages, p.clip_ratio_c):
        return {}
    if log_ratio_beyond(20, x.log_prob, x.old_log_prob, mask):
        return {}
    loss = verl_aggregate(terms.loss, mask, p)
    backwards = kl_estimate(x.old_log_prob, x.log_prob, mask, estimator="k1")
    return {
        "loss": loss,
        "pg_clipfrac": masked_mean(terms.is_clipped.to(loss.dtype), mask) * softening(mask),
        "ppo_kl": masked_mean(backwards, mask) * softening(mask),
        **gradients(loss, grad_log_prob=x.log_prob),
    }


def verl_value(x: Any, p: Any) -> Outputs:
    mask = x.response_mask.bool()
    terms = value_loss(x.vpreds, x.returns, mask, old_values=x.values, value_clip=p.cliprange_value)
    loss = verl_aggregate(terms.loss, mask, p)
    return {
        "vf_loss": loss,
        "vf_clipfrac": masked_mean(terms.is_clipped.to(loss.dtype), mask) * softening(mask),
        **gradients(loss, grad_vpreds=x.vpreds),
    }


def trl_surrogate(x: Any, p: Any) -> Outputs:
    """One advantage per sequence. `grpo` averages over all rows, empty ones too; no clamps anywhere."""
    plain = p.loss_type in ("grpo", "bnpo", "dr_grpo", "dapo") and p.importance_sampling_level == "token"
    extras = (p.delta, p.off_policy_mask_threshold, p.use_vllm_is or None, p.use_bias_correction_kl or None)
    if not plain or extras != (None,) * 4 or p.top_entropy_quantile < 1 or p.steps_per_generation > 1:
        return {}
    mask, rows = x.completion_mask.bool(), len(x.completion_mask)
    advantages = x.advantages[:, None].expand_as(mask)
    bounds = {"clip_low": p.epsilon_low, "clip_high": p.epsilon_high}
    terms = clipped_surrogate_loss(x.per_token_logps, x.old_per_token_logps, advantages, mask, **bounds)
    per_token = terms.loss
    if p.beta:
        per_token = per_token + p.beta * kl_estimate(x.per_token_logps, x.ref_per_token_logps, mask, estimator="k3")
    tokens = p.num_items_in_batch or count(mask, how="token_mean")
    loss = {
        "grpo": lambda: sequence_mean(per_token, mask, denominator=rows),
        "bnpo": lambda: token_mean(per_token, mask, denominator=count(mask, how="token_mean")),
        "dr_grpo": lambda: fixed_length(per_token, mask, denominator=rows, length=p.max_completion_length),
        "dapo": lambda: token_mean(per_token, mask, denominator=tokens),
    }[p.loss_type]() / p.grad_accum
    clipped = masked_mean(terms.is_clipped.to(loss.dtype), mask)
    return {"loss": loss, "clip_ratio": clipped, **gradients(loss, grad_per_token_logps=x.per_token_logps)}


def openrlhf_reduce(per_token: Tensor, mask: Tensor, p: Any) -> Tensor:
    how: Any = "token_mean" if p.token_level_loss else "sequence_mean"
    total = getattr(p, "batch_num_tokens" if p.token_level_loss else "global_batch_size", None)
    return reduce(per_token, mask, how=how, denominator=total / p.dp_size if total else count(mask, how=how))


def openrlhf_surrogate(x: Any, p: Any) -> Outputs:
    mask = x.action_mask.bool()
    bounds = {"clip_low": p.clip_eps_low, "clip_high": p.clip_eps_high}
    terms = clipped_surrogate_loss(x.log_probs, x.old_log_probs, x.advantages, mask, **bounds)
    if p.policy_loss_type != "ppo" or p.enable_vllm_is_correction or dual_clip_active(terms, x.advantages, p.dual_clip):
        return {}
    if log_ratio_beyond(20, x.log_probs, x.old_log_probs, mask):
        return {}
    loss = openrlhf_reduce(terms.loss, mask, p)
    backwards = kl_estimate(x.old_log_probs, x.log_probs, mask, estimator="k1")
    return {
        "loss": loss,
        "clip_ratio": masked_mean(terms.is_clipped.to(loss.dtype), mask),
        "ppo_kl": masked_mean(backwards, mask),
        **gradients(loss, grad_log_probs=x.log_probs),
    }


def openrlhf_value(x: Any, p: Any) -> Outputs:
    mask = x.action_mask.bool()
    clip = {"old_values": x.old_values, "value_clip": p.clip_eps} if p.clip_eps is not None else {}
    loss = openrlhf_reduce(value_loss(x.values, x.returns, mask, **clip).loss, mask, p)
    return {"loss": loss, **gradients(loss, grad_values=x.values)}


def nemo_surrogate(x: Any, p: Any) -> Outputs:
    """Divides by count + 1e-8, or by given global counts; a sequence mean counts rows without tokens."""
    mask = (x.token_mask * x.sample_mask[:, None]).bool()
    bounds = {"clip_low": p.ratio_clip_min, "clip_high": p.ratio_clip_max}
    terms = clipped_surrogate_loss(x.next_token_logprobs, x.prev_logprobs, x.advantages, mask, **bounds)
    other = (p.disable_ppo_ratio, p.sequence_level_importance_ratios, p.use_importance_sampling_correction)
    if any((*other, p.force_on_policy_ratio, p.use_cispo, p.reference_policy_kl_penalty)):
        return {}
    if dual_clip_active(terms, x.advantages, p.ratio_clip_c):
        return {}
    if p.token_level_loss:
        loss = token_mean(terms.loss, mask, denominator=(p.global_valid_toks or mask.sum().double()) + 1e-8)
    else:
        softened = (terms.loss * row_softening(mask)).to(terms.loss.dtype)
        loss = sequence_mean(softened, mask, denominator=(p.global_valid_seqs or x.sample_mask.sum().double()) + 1e-8)
    return {"loss": loss, **gradients(loss, grad_next_token_logprobs=x.next_token_logprobs)}


def nemo_value(x: Any, p: Any) -> Outputs:
    mask = (x.token_mask * x.sample_mask[:, None]).bool()
    clip = {"old_values": x.old_values, "value_clip": p.cliprange} if p.cliprange is not None else {}
    terms = value_loss(x.logits, x.returns, mask, **clip)
    loss = p.scale * token_mean(terms.loss, mask, denominator=mask.sum().double() + 1e-8)
    return {"loss": loss, **gradients(loss, grad_values=x.logits)}


# ------------------------------------------------------------------------------------------------- KL, entropy, masks
def kl_of(log_probs: str, ref_log_probs: str, which: str, gradient: str) -> Adapter:
    """Compared where the peer does not clamp."""

    def adapter(x: Any, p: Any) -> Outputs:
        estimator = {"low_var_kl": "k3"}.get(getattr(p, which), getattr(p, which))
        if estimator not in ("k1", "k2", "k3"):
            return {}
        new, ref = getattr(x, log_probs), getattr(x, ref_log_probs)
        kl = kl_estimate(new, ref, everywhere(new), estimator=estimator)
        clamps = getattr(p, "input_clamp_value", 10.0) is not None
        free = (kl.abs() < 10) & ((new - ref).abs() < 20) if clamps else everywhere(kl)
        return {"kl": (kl, free), gradient: (gradients(kl.sum(), _=new)["_"], free)}

    return adapter


def prime_mismatch(x: Any, p: Any) -> Outputs:
    kl = kl_estimate(x.inference_logprobs, x.trainer_logprobs, everywhere(x.trainer_logprobs), estimator="k3")
    return {"mismatch_kl": kl}


def adaptive_coefficient(target: str, observed: str) -> Adapter:
    def adapter(x: Any, p: Any) -> Outputs:
        coef, after = p.init_kl_coef, []
        for kl, steps in zip(getattr(p, observed), p.n_steps, strict=True):
            coef = adapt_kl_coef_proportionally(
                coef, kl, target_kl=getattr(p, target), horizon=p.horizon, num_samples=steps
            )
            after.append(coef)
        return {"kl_coef_after_each_update": torch.tensor(after, dtype=torch.float64)}

    return adapter


def entropy_of(output: str, gradient: str | None) -> Adapter:
    def adapter(x: Any, p: Any) -> Outputs:
        entropy = categorical_entropy(x.logits, everywhere(x.logits[..., 0]))
        return {output: entropy, **(gradients(entropy.sum(), **{gradient: x.logits}) if gradient else {})}

    return adapter


def verl_entropy_loss(x: Any, p: Any) -> Outputs:
    mask = x.response_mask.bool()
    entropy = verl_aggregate(categorical_entropy(x.logits, mask), mask, p)
    return {"entropy": entropy, **gradients(entropy, grad_logits=x.logits)}


def mean_of(name: str, *, softened: bool) -> Adapter:
    """An empty mask is 0 for us and whoever adds 1e-8 to the count, NaN for others."""

    def adapter(x: Any, p: Any) -> Outputs:
        values, mask = getattr(x, name), x.mask.bool()
        rows = masked_mean(values, mask, dim=-1)
        if softened:
            soft, row_soft = softening(mask), row_softening(mask)[:, 0]
            return {"all": masked_mean(values, mask) * soft, "rows": (rows * row_soft, mask.any(-1))}
        return {"all": (masked_mean(values, mask), mask.any()), "rows": (rows, mask.any(-1))}

    return adapter


def var_of(*, softened: bool) -> Adapter:
    def adapter(x: Any, p: Any) -> Outputs:
        mask = x.mask.bool()
        if mask.sum() < 2:
            return {}
        soft = softening(mask) if softened else 1.0
        return {f"{name}biased": masked_var(x.values, mask, ddof=ddof) * soft for name, ddof in (("un", 1), ("", 0))}

    return adapter


def whiten_of(*, softened: bool) -> Adapter:
    def adapter(x: Any, p: Any) -> Outputs:
        mask = x.mask.bool()
        if mask.sum() < 2:
            return {}
        soft = softening(mask) if softened else 1.0
        statistics = {"mean": masked_mean(x.values, mask) * soft, "var": masked_var(x.values, mask) * soft}
        whitened = {
            name: masked_whiten(x.values, mask, shift_mean=shift, **statistics)
            for name, shift in (("shift", True), ("keep_mean", False))
        }
        return {name: (value, mask) for name, value in whitened.items()}

    return adapter


TORCHRL: dict[str, Adapter] = {
    **dict.fromkeys(["generalized_advantage_estimate", "vec_generalized_advantage_estimate"], torchrl_gae),
    "reward2go": torchrl_reward_to_go,
    **{f"{prefix}{name}_{kind}_estimate": torchrl_target(returns, kind)
       for prefix in ("", "vec_") for kind in ("return", "advantage")
       for name, returns in [("td0", td0_returns), ("td1", monte_carlo_returns), ("td_lambda", td_lambda_returns)]},
}  # fmt: skip
ADAPTERS: dict[str, dict[str, Adapter]] = {
    "cleanrl": {"gae loop": gae_from_starts("dones", "next_done"), "ppo update": cleanrl_update},
    "stable_baselines3": {
        "RolloutBuffer.compute_returns_and_advantage": gae_from_starts("episode_starts", "dones"),
        "OnPolicyAlgorithm.collect_rollouts": gae_with_truncation,
        "PPO.train": sb3_update,
        "A2C.train": a2c_update,
        "CategoricalDistribution": entropy_of("entropy", None),
    },
    "torchrl": TORCHRL,
    "rlax": {
        "truncated_generalized_advantage_estimation": rlax_gae,
        "n_step_bootstrapped_returns": rlax_target(n_step_returns, "n", "n"),
        "discounted_returns": rlax_target(monte_carlo_returns),
        "lambda_returns": rlax_target(td_lambda_returns, "lambda_", "td_lambda"),
        "clipped_surrogate_pg_loss": rlax_surrogate,
    },
    "verl": {
        "compute_gae_advantage_return": verl_gae,
        "compute_grpo_outcome_advantage": verl_grpo,
        "compute_policy_loss_vanilla": verl_surrogate,
        "compute_value_loss": verl_value,
        "agg_loss": verl_agg_loss,
        "kl_penalty": kl_of("logprob", "ref_logprob", "kl_penalty", "grad_logprob_of_sum"),
        "AdaptiveKLController": adaptive_coefficient("target_kl", "current_kl"),
        "compute_entropy_loss": verl_entropy_loss,
        "entropy_from_logits": entropy_of("out", "grad_logits_of_sum"),
        "masked_mean": mean_of("values", softened=True),
        "masked_var": var_of(softened=True),
        "masked_whiten": whiten_of(softened=True),
    },
    "trl": {
        "GRPOTrainer._generate_and_score_completions": trl_grpo,
        "GRPOTrainer._compute_loss": trl_surrogate,
        "entropy_from_logits": entropy_of("entropy", "grad_logits_of_sum"),
        "masked_mean": mean_of("values", softened=False),
        "masked_var": var_of(softened=False),
        "masked_whiten": whiten_of(softened=False),
    },
    "openrlhf": {
        "RemoteExperienceMaker.get_advantages_and_returns": openrlhf_gae,
        "RemoteExperienceMaker.get_cumulative_returns": openrlhf_returns,
        "RemoteExperienceMaker.compute_advantages_and_returns": openrlhf_group_norm,
        "PolicyLoss": openrlhf_surrogate,
        "ValueLoss": openrlhf_value,
        "compute_approx_kl": kl_of("log_probs", "log_probs_base", "kl_estimator", "grad_log_probs_of_sum"),
        "AdaptiveKLController": adaptive_coefficient("target", "current"),
        "compute_entropy": entropy_of("entropy", "grad_logits_of_sum"),
        "masked_mean": mean_of("tensor", softened=False),
    },
    "nemo_rl": {
        "GeneralizedAdvantageEstimator._compute_gae": nemo_gae,
        "GRPOAdvantageEstimator.compute_advantage": nemo_grpo,
        "ClippedPGLossFn": nemo_surrogate,
        "MseValueLossFn": nemo_value,
        "calculate_kl": kl_of("logprobs", "logprobs_reference", "kl_type", "grad_logprobs_of_sum"),
        "masked_mean": mean_of("values", softened=True),
        "masked_var": var_of(softened=True),
    },
    "prime_rl": {
        "GRPOAlgorithm.score_group": prime_grpo,
        "compute_entropy": entropy_of("entropy", None),
        "compute_importance_ratio_and_mismatch_kl": prime_mismatch,
    },
}


# ---------------------------------------------------------------------------------------------------------- comparing
def tolerance(peer: str, case: dict, precision: str) -> float:
    """Those of the recording's README: what the peers' own arithmetic allows."""
    if precision == "float32":
        return 2e-4 if case["scenario"] in ("huge", "large", "near_equal", "all_clipped") else 4e-5
    function = case["function"]
    if (peer, function) in [("openrlhf", "compute_approx_kl")]:
        return 4e-5  # computed in float32 regardless
    if peer == "torchrl":
        return 1e-5  # gamma passes through float32
    row_means = peer == "openrlhf" and ("seq" in case["id"] or case["function"] == "masked_mean")
    if peer == "trl" or row_means or (peer == "verl" and case["scenario"] in ("group_of_1", "mixed_sizes")):
        return 1e-6
    return 1e-9


def is_rounding(case: dict, precision: str) -> bool:
    """float32 numbers that are the peer's rounding, or its infinities."""
    return precision == "float32" and case["scenario"] in ("equal_frac", "offset", "overflow")


def tensors(inputs: dict, types: dict, dtype: torch.dtype) -> SimpleNamespace:
    kinds = {"bool": torch.bool, "int64": torch.int64, "same": dtype}
    made = {name: torch.tensor(numbers(x), dtype=kinds.get(types.get(name), dtype)) for name, x in inputs.items()}
    return SimpleNamespace(**{name: x.requires_grad_() if x.is_floating_point() else x for name, x in made.items()})


def numbers(x: Any) -> Any:
    """NaN and infinities are recorded as strings."""
    return [numbers(y) for y in x] if isinstance(x, list) else float(x)


def comparisons(peer: str, case: dict, defaults: dict) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Label, our number, the peer's number, tolerance: for each precision, variant and output that we can compare."""
    adapter = ADAPTERS[peer][case["function"]]
    for precision, recorded in case["outputs"].items():
        if is_rounding(case, precision):
            continue
        dtype = DTYPES[precision]
        params = {**defaults.get(case["function"], {}), **case.get("params", {})}
        variants = params.pop("variants", None)
        for variant in variants or [None]:
            outputs = recorded[variant] if variant else recorded
            if "raises" in outputs:
                continue
            x = tensors(case["inputs"], case.get("input_types", {}), dtype)
            p = SimpleNamespace(**params, **(variants[variant] if variants else {}))
            for name, ours in adapter(x, p).items():
                if name not in outputs:
                    continue
                value, where = ours if isinstance(ours, tuple) else (ours, everywhere(ours))
                theirs = torch.tensor(numbers(outputs[name]), dtype=torch.float64)
                if theirs.ndim == value.ndim - 1:  # a constant row recorded by its first number
                    theirs = theirs[..., None].expand_as(value)
                if case["scenario"] == "all_masked" and theirs.isnan().any():
                    continue  # dividing by a count of 0; we give 0
                label = f"{precision} {variant or ''} {name}"
                assert value.shape == theirs.shape, f"{label}: shape {list(value.shape)}, recorded {list(theirs.shape)}"
                in_float32 = case.get("output_types", {}).get(precision, {}).get(name) == "float32"
                allowed = tolerance(peer, case, "float32" if in_float32 else precision)
                yield label, value.detach().double()[where], theirs[where], allowed


def load() -> Iterator[tuple[str, dict, dict]]:
    for path in sorted(GOLDEN.glob("*.json")):
        peer = json.loads(path.read_text())
        for case in peer["cases"]:
            yield path.stem, case, peer.get("default_params", {})


CASES = [pytest.param(*found, id=f"{found[0]}/{found[1]['id']}") for found in load()]


@pytest.mark.parametrize(("peer", "case", "defaults"), CASES)
def test_peers_number(peer: str, case: dict, defaults: dict) -> None:
    compared = 0
    for label, ours, theirs, allowed in comparisons(peer, case, defaults):
        finite = theirs[theirs.isfinite()]
        scale = finite.abs().max().item() if finite.numel() else 0.0
        floor = 1e-7 if "float32" in label else 1e-12
        options = {"rtol": allowed, "atol": allowed * scale + floor, "equal_nan": True}
        torch.testing.assert_close(ours, theirs, msg=lambda m, label=label: f"{label}: {m}", **options)
        compared += 1
    assert compared > 0, "nothing was compared: the case does not belong into golden/"


def test_enough_is_compared() -> None:
    assert len(CASES) >= 150
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(ADAPTERS)
