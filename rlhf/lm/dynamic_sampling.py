"""Dynamic sampling: groups whose scores are all equal teach nothing to those who compare; later ones take their place.

Source: Yu et al. 2025 (DAPO), arXiv:2503.14476, section 3.2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf.lm.experience import Sequences


class Batch(NamedTuple):
    """Completions with their verdicts, group after group of one size, of all processes."""

    sequence_ids: Tensor  # [B, P + T] int64, as in Sequences
    attention_mask: Tensor  # [B, P + T] bool
    action_mask: Tensor  # [B, T] bool
    sampler_log_probs: Tensor  # [B, T] float32, nats: of the distribution sampled from, truncated or not
    untruncated_log_probs: Tensor  # [B, T] float32, nats: of the sampler's whole distribution
    token_rewards: Tensor  # [B, T] float32, rewards per token beside the scores, 0 in masked slots
    is_finished: Tensor  # [B] bool
    scores: Tensor  # [B] float32, the weighted sum of the verdicts on whole completions
    components: Tensor  # [B, K] float32, by reward function; NaN where it does not apply
    # Of the greedy completion of each one's prompt; 0, 0, True where nobody asked for it.
    greedy_scores: Tensor  # [B] float32, as scores
    greedy_token_rewards: Tensor  # [B] float32, their sum
    greedy_is_finished: Tensor  # [B] bool

    @property
    def sequences(self) -> Sequences:
        return Sequences(self.sequence_ids, self.attention_mask, self.action_mask)

    @property
    def totals(self) -> Tensor:
        """[B] what is trained for: score and rewards of all tokens."""
        return self.scores + self.token_rewards.sum(-1)

    def pick(self, rows: Tensor) -> "Batch":
        """These rows."""
        return Batch(*(x[rows] for x in self))


def has_signal(scores: Tensor, samples_per_prompt: int) -> Tensor:
    """[prompts] bool: whether the scores [B] of each group differ."""
    groups = scores.view(-1, samples_per_prompt)
    return (groups != groups[:, :1]).any(-1)


def refill(batches: Sequence[Batch], *, samples_per_prompt: int) -> Batch:
    """As many groups as the first batch has: those with signal in their order, then, if too few, those without."""
    joined = join(batches)
    order = torch.argsort(~has_signal(joined.totals, samples_per_prompt), stable=True)
    groups = order[: len(batches[0].scores) // samples_per_prompt]
    rows = groups[:, None] * samples_per_prompt + torch.arange(samples_per_prompt, device=groups.device)
    return joined.pick(rows.flatten())


def join(batches: Sequence[Batch]) -> Batch:
    """All rows of all batches, prompts padded on the left and completions on the right to the longest."""
    length = max(batch.action_mask.shape[1] for batch in batches)
    prompt = max(batch.sequence_ids.shape[1] - batch.action_mask.shape[1] for batch in batches)

    def widened(batch: Batch) -> Batch:
        right = length - batch.action_mask.shape[1]
        both = (prompt + length - right - batch.sequence_ids.shape[1], right)
        return batch._replace(
            sequence_ids=pad(batch.sequence_ids, both),
            attention_mask=pad(batch.attention_mask, both),
            action_mask=pad(batch.action_mask, (0, right)),
            sampler_log_probs=pad(batch.sampler_log_probs, (0, right)),
            untruncated_log_probs=pad(batch.untruncated_log_probs, (0, right)),
            token_rewards=pad(batch.token_rewards, (0, right)),
        )

    return Batch(*(torch.cat(column) for column in zip(*map(widened, batches), strict=True)))
