"""Estimators and losses in the forms in which other libraries publish them, written anew from their formulas."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Results = tuple[Tensor, ...]


def gae_batch_first(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Results:
    """TRL's PPO, OpenRLHF: columns of [B, T] from the last to the first, collected and stacked."""
    collected, last = [], torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        next_values = values[:, t + 1] if t < rewards.shape[1] - 1 else 0.0
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        last = delta + gamma * lam * last
        collected.append(last)
    found = torch.stack(collected[::-1], dim=1)
    return found, found + values


def gae_time_first(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Results:
    """CleanRL, Stable-Baselines3: rows of [T, N], each assigned to its place, with a flag that says what goes on."""
    found, last = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    done = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[0])):
        last_step = t == rewards.shape[0] - 1
        goes_on = 1.0 - done[t if last_step else t + 1]
        next_values = torch.zeros_like(last) if last_step else values[t + 1]
        delta = rewards[t] + gamma * next_values * goes_on - values[t]
        found[t] = last = delta + gamma * lam * goes_on * last
    return found, found + values


def scan_loop(x: Tensor, decay: Tensor) -> Results:
    y, following = torch.empty_like(x), torch.zeros_like(x[..., 0])
    for t in reversed(range(x.shape[-1])):
        following = x[..., t] + decay[..., t] * following
        y[..., t] = following
    return (y,)


def mean_of(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def whitened(x: Tensor, mask: Tensor) -> Results:
    """verl, TRL's PPO: masked mean, unbiased masked variance, reciprocal root."""
    mean = mean_of(x, mask)
    variance = mean_of((x - mean) ** 2, mask)
    count = mask.sum()
    return ((x - mean) * torch.rsqrt(variance * count / (count - 1) + 1e-8) * mask,)


def group_loop(scores: Tensor, group_ids: Tensor) -> Results:
    """verl's GRPO: scores sorted into lists by their prompt, statistics list by list, then one score at a time."""
    members: dict[int, list[Tensor]] = {}
    for i in range(len(scores)):
        members.setdefault(int(group_ids[i]), []).append(scores[i])
    mean = {group: torch.stack(each).mean() for group, each in members.items()}
    std = {group: torch.stack(each).std() for group, each in members.items()}
    found = torch.empty_like(scores)
    for i in range(len(scores)):
        group = int(group_ids[i])
        found[i] = (scores[i] - mean[group]) / std[group]
    return (found,)


def surrogate(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Results:
    """TRL's PPO, verl: the larger of two losses, averaged under the mask, and the share clipped."""
    ratio = torch.exp(log_probs - old)
    plain, clipped = -advantages * ratio, -advantages * torch.clamp(ratio, 0.8, 1.2)
    return mean_of(torch.max(plain, clipped), mask), mean_of((clipped > plain).float(), mask)


def clipped_value(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> Results:
    near = torch.clamp(values, old - 0.2, old + 0.2)
    return (0.5 * mean_of(torch.max((values - returns) ** 2, (near - returns) ** 2), mask),)


def k3(log_probs: Tensor, ref: Tensor, mask: Tensor) -> Results:
    difference = ref - log_probs
    return (mean_of(torch.exp(difference) - 1 - difference, mask),)


def entropy(logits: Tensor) -> Results:
    """TRL, verl: logsumexp minus the mean logit."""
    return ((torch.logsumexp(logits, -1) - (torch.softmax(logits, -1) * logits).sum(-1)).mean(),)


def dpo(chosen: Tensor, rejected: Tensor, ref: Tensor, mask: Tensor) -> Results:
    lead = ((chosen - ref) * mask).sum(-1) - ((rejected - ref) * mask).sum(-1)
    return (-logsigmoid(0.1 * lead).mean(),)


# ---- The contests ----------------------------------------------------------------------------------------------------
