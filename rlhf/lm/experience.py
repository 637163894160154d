"""From completions to Experience: log-probs, values, KL-shaped rewards, advantages."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.advantages import AdvantageEstimate, gae
from rlhf.group_advantages import group_normalized_advantages
from rlhf.kl import kl_estimate
from rlhf.lm.batching import micro_batches
from rlhf.lm.config import AlgorithmConfig
from rlhf.lm.logprobs import packs, policy_output
from rlhf.lm.models import Roles
from rlhf.masking import fill_masked, masked_mean, masked_sum, masked_whiten
from rlhf.rewards import rewards_at_last_action

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Sequences:
    """B prompts, left-padded to P tokens, each followed by its completion, right-padded to T."""

    sequence_ids: Tensor  # [B, P + T] int64
    attention_mask: Tensor  # [B, P + T] bool: prompt and completion tokens
    action_mask: Tensor  # [B, T] bool: tokens the policy chose

    def __getitem__(self, rows: Tensor) -> "Sequences":
        """These rows without the columns in which all of them are padding."""
        picked = Sequences(self.sequence_ids[rows], self.attention_mask[rows], self.action_mask[rows])
        prompt = picked.attention_mask.shape[1] - picked.action_mask.shape[1]
        used = picked.attention_mask.any(0).nonzero()
        first, length = int(used.min()), int(picked.action_mask.any(0).nonzero().max()) + 1
        columns = slice(min(first, prompt - 1), prompt + length)
        return Sequences(
            picked.sequence_ids[:, columns], picked.attention_mask[:, columns], picked.action_mask[:, :length]
        )

    def __len__(self) -> int:
        return len(self.action_mask)

    @property
    def lengths(self) -> Tensor:
        """[B] int64: tokens of prompt and completion."""
        return self.attention_mask.sum(-1)

    def to(self, device: torch.device) -> "Sequences":
        return Sequences(self.sequence_ids.to(device), self.attention_mask.to(device), self.action_mask.to(device))


class Predictions(NamedTuple):
    """What the roles say of the completions before any update, [B, T] float32 each, 0 in masked slots."""

    log_probs: Tensor
    entropy: Tensor
    ref_log_probs: Tensor | None
    values: Tensor | None


@dataclass(frozen=True)
class Experience:
    """One round's data, the same on every process. All but the sequences are [B, T] float32, 0 in masked slots."""

    # What happened
    sequences: Sequences
    rewards: Tensor  # per-token reward: the score on the last action, minus the KL penalty on each
    # Under the weights that made it
    old_log_probs: Tensor
    ref_log_probs: Tensor | None
    old_values: Tensor | None
    # What the update aims at
    advantages: Tensor
    returns: Tensor | None  # the critic's targets

    def __getitem__(self, rows: Tensor) -> "Experience":
        """These rows, cut to the longest completion among them."""
        sequences = self.sequences[rows]
        length = sequences.action_mask.shape[1]

        def cut(x: Tensor) -> Tensor:
            return x[rows, :length]

        return Experience(
            sequences=sequences,
            rewards=cut(self.rewards),
            old_log_probs=cut(self.old_log_probs),
            ref_log_probs=None if self.ref_log_probs is None else cut(self.ref_log_probs),
            old_values=None if self.old_values is None else cut(self.old_values),
            advantages=cut(self.advantages),
            returns=None if self.returns is None else cut(self.returns),
        )

    def __len__(self) -> int:
        return len(self.sequences)


@torch.no_grad()
def predict(
    roles: Roles, sequences: Sequences, *, temperature: float, micro_batch_tokens: int | None, autocast: Autocast
) -> Predictions:
    """One pass of each role over the sequences, some at a time: see `micro_batches`."""
    shape = sequences.action_mask.shape
    columns: list[list[Tensor]] = [[], [], [], []]
    with autocast():
        packed = packs(roles.actor)
    parts = micro_batches(sequences.lengths, tokens=micro_batch_tokens, packed=packed)
    for rows in parts:
        part = sequences[rows]
        args = (part.sequence_ids, part.attention_mask, part.action_mask)
        with autocast():
            policy = policy_output(
                roles.actor, *args, temperature=temperature, with_entropy=True, with_hidden=roles.critic_reads_actor
            )
            found = [policy.log_probs, policy.entropy, None, None]
            if roles.reference is not None:
                found[2] = policy_output(roles.reference, *args, temperature=temperature).log_probs
            if roles.critic is not None:
                found[3] = roles.critic(*args, policy.hidden)
        for column, x in zip(columns, found, strict=True):
            if x is not None:
                column.append(torch.nn.functional.pad(x, (0, shape[1] - x.shape[1])))
    place = torch.cat(parts).argsort()
    log_probs, entropy, ref_log_probs, values = (torch.cat(column)[place] if column else None for column in columns)
    assert log_probs is not None
    assert entropy is not None
    return Predictions(log_probs, entropy, ref_log_probs, values)


def build_experience(
    sequences: Sequences,
    scores: Tensor,
    group_ids: Tensor,
    predictions: Predictions,
    config: AlgorithmConfig,
    *,
    kl_reward_coef: float,
) -> Experience:
    """Shape the rewards and estimate the advantages. Needs the whole round: whitening and groups span processes.

    Args:
        scores: [B] float, one verdict per sequence.
        group_ids: [B] int64, equal for samples of one prompt.
        kl_reward_coef: the coefficient in force, reward units per nat.
    """
    mask = sequences.action_mask
    rewards = shaped_rewards(scores, predictions, mask, kl_reward_coef=kl_reward_coef)
    if config.advantage == "group":
        per_sequence = group_normalized_advantages(masked_sum(rewards, mask, dim=-1), group_ids)
        estimate = None
        advantages = fill_masked(per_sequence[:, None].expand_as(rewards), mask)
    else:
        estimate = _gae(rewards, predictions.values, mask, config)
        advantages = masked_whiten(estimate.advantages, mask) if config.whiten_advantages else estimate.advantages
    return Experience(
        sequences=sequences,
        rewards=rewards,
        old_log_probs=predictions.log_probs,
        ref_log_probs=predictions.ref_log_probs,
        old_values=predictions.values,
        advantages=advantages,
        returns=estimate.returns if estimate is not None and predictions.values is not None else None,
    )


def shaped_rewards(scores: Tensor, predictions: Predictions, mask: Tensor, *, kl_reward_coef: float) -> Tensor:
    """[B, T]: the score at each row's last action, minus kl_reward_coef times k1 at every action."""
    rewards = torch.zeros_like(predictions.log_probs)
    if predictions.ref_log_probs is not None:
        kl = kl_estimate(predictions.log_probs, predictions.ref_log_probs, mask, estimator="k1")
        rewards = rewards - kl_reward_coef * kl
    return rewards + rewards_at_last_action(scores.to(rewards), mask)


def _gae(rewards: Tensor, values: Tensor | None, mask: Tensor, config: AlgorithmConfig) -> AdvantageEstimate:
    """A completion cut off at the length limit was judged as it stands: it counts as ended, like one that stopped."""
    values = torch.zeros_like(rewards) if values is None else values
    return gae(rewards, values, mask, gamma=config.gamma, gae_lambda=config.gae_lambda)


def sequence_kl(predictions: Predictions, mask: Tensor) -> float:
    """Mean over sequences of the summed log-ratio to the reference, nats per sequence; 0 without a reference."""
    if predictions.ref_log_probs is None:
        return 0.0
    kl = kl_estimate(predictions.log_probs, predictions.ref_log_probs, mask, estimator="k1")
    return float(masked_sum(kl, mask) / len(mask))


def mean_entropy(predictions: Predictions, mask: Tensor) -> float:
    """Nats per token."""
    return float(masked_mean(predictions.entropy, mask))
