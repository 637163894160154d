"""Stable-Baselines3: [T, N] without masks; value loss without 1/2; truncation bootstraps through the reward."""

from typing import Any

import torch
from torch import Tensor

from golden_adapters.common import (
    Adapter,
    Outputs,
    chosen_log_probs,
    everywhere,
    fraction,
    gradients,
    mean,
    standardized,
)
from golden_adapters.control import by_env, gae_from_starts
from rlhf.advantages import n_step_returns
from rlhf.algorithm import AlgorithmConfig
from rlhf.kl import kl_estimate
from rlhf.losses import categorical_entropy, clipped_surrogate_loss, reinforce_loss
from rlhf.objective import critic_loss


def gae_with_truncation(x: Any, p: Any) -> Outputs:
    terminated, truncated = x.terminated.bool(), x.truncated.bool() & ~x.terminated.bool()
    # Its buffer holds the bootstrap in the reward, ours apart: the same returns.
    in_buffer = x.rewards + p.gamma * torch.where(truncated, x.terminal_values, 0.0)
    done_before = torch.cat([x.first_episode_start[None].bool(), (x.terminated.bool() | x.truncated.bool())[:-1]])
    estimate = by_env(x, p, terminated, truncated, x.terminal_values.detach().clone())
    return {**estimate, "buffer_rewards": in_buffer, "episode_starts": done_before.to(x.rewards.dtype)}


def n_step_samples(x: Any, p: Any) -> Outputs:
    """Its parts of an n-step target, each from ours: rewards alone, then V = 1 and V = t alone."""
    steps = torch.arange(len(x.rewards), dtype=x.rewards.dtype)
    cut = x.truncated.bool() | (steps == len(steps) - 1)  # the newest stored step counts as cut off
    mask, ended = everywhere(x.rewards), x.terminated.bool()

    def target(rewards: Tensor, state_values: Tensor, gamma: float, terminated: Tensor, truncated: Tensor) -> Tensor:
        ends = {"terminated": terminated, "truncated": truncated, "bootstrap_values": state_values[1:]}
        return n_step_returns(rewards, state_values[:-1], mask, n=p.n_steps, gamma=gamma, **ends)[:-1]

    zeros, ones = torch.zeros(len(steps) + 1).to(steps), torch.ones(len(steps) + 1).to(steps)
    nowhere = torch.zeros_like(ended)
    discounts = target(zeros[1:], ones, p.gamma, nowhere, cut | ended)
    return {
        "rewards": target(x.rewards, zeros, p.gamma, ended, cut),
        "discounts": discounts,
        "dones": (target(zeros[1:], ones, p.gamma, ended, cut) != discounts).to(steps.dtype),
        "next_obs_index": target(zeros[1:], torch.arange(len(steps) + 1).to(steps), 1.0, nowhere, cut | ended),
    }


def ppo_update(x: Any, p: Any) -> Outputs:
    advantages, mask = x.advantages.detach(), everywhere(x.advantages)
    if p.normalize_advantage and len(advantages) > 1:
        advantages = standardized(advantages)
    terms = clipped_surrogate_loss(
        x.log_prob, x.old_log_prob, advantages, mask, clip_low=p.clip_range, clip_high=p.clip_range
    )
    policy = mean(terms.loss)
    algorithm = AlgorithmConfig(value_clip=p.clip_range_vf, convention="stable_baselines3")
    value = mean(critic_loss(algorithm, x.values, x.returns, mask, old_values=x.old_values).loss)
    entropy = mean(x.entropy) if p.analytic_entropy else -mean(x.log_prob)
    total = policy + p.vf_coef * value - p.ent_coef * entropy
    backwards = kl_estimate(x.old_log_prob, x.log_prob, mask, estimator="k3")
    outside = (terms.ratio - 1).abs() > p.clip_range  # also where the gradient is not clipped
    return {
        "policy_loss": policy, "value_loss": value, "entropy_loss": -entropy, "loss": total,
        "approx_kl": mean(backwards), "clip_fraction": fraction(outside, mask, total),
        **gradients(total, grad_log_prob=x.log_prob, grad_values=x.values),
        **(gradients(total, grad_entropy=x.entropy) if p.analytic_entropy else {}),
    }  # fmt: skip


def a2c_update(x: Any, p: Any) -> Outputs:
    advantages, mask = x.advantages.detach(), everywhere(x.advantages)
    if p.normalize_advantage:
        advantages = standardized(advantages)
    policy = mean(reinforce_loss(x.log_prob, advantages, mask))
    algorithm = AlgorithmConfig(value_clip=None, convention="stable_baselines3")
    value = mean(critic_loss(algorithm, x.values, x.returns, mask).loss)
    entropy = mean(x.entropy) if p.analytic_entropy else -mean(x.log_prob)
    total = policy + p.vf_coef * value - p.ent_coef * entropy
    return {
        "policy_loss": policy, "value_loss": value, "entropy_loss": -entropy,
        **gradients(total, grad_log_prob=x.log_prob, grad_values=x.values, grad_entropy=x.entropy),
    }  # fmt: skip


def categorical(x: Any, p: Any) -> Outputs:
    log_prob = chosen_log_probs(x.logits[None], x.actions[None])[0]
    entropy = categorical_entropy(x.logits, everywhere(x.logits[..., 0]))
    both = log_prob.sum() + 0.5 * entropy.sum()
    name = "grad_logits_of_sum_logprob_plus_half_sum_entropy"
    return {"log_prob": log_prob, "entropy": entropy, **gradients(both, **{name: x.logits})}


ADAPTERS: dict[str, Adapter] = {
    "RolloutBuffer.compute_returns_and_advantage": gae_from_starts("episode_starts", "dones"),
    "OnPolicyAlgorithm.collect_rollouts": gae_with_truncation,
    "NStepReplayBuffer._get_samples": n_step_samples,
    "PPO.train": ppo_update,
    "A2C.train": a2c_update,
    "CategoricalDistribution": categorical,
}
OUT_OF_SCOPE = {
    "DiagGaussianDistribution": "continuous actions: we have categorical policies only",
    "SquashedDiagGaussianDistribution": "continuous actions: we have categorical policies only",
    "*#explained_variance": "a diagnostic of the values before the update, no loss",
}
