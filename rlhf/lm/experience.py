"""From completions to Experience: log-probs, values, KL-shaped rewards, advantages."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.algorithm import AlgorithmConfig
from rlhf.kl import kl_estimate
from rlhf.lm.batching import SHARING_PAYS, LayoutKind, Prompts, micro_batches, shared_tokens
from rlhf.lm.logprobs import can_share_prompts, output_head, packs, policy_output
from rlhf.lm.models import Roles
from rlhf.lm.shared_prompts import prompt_groups
from rlhf.masking import fill_masked, masked_mean, masked_sum
from rlhf.objective import estimate_advantages
from rlhf.rewards import rewards_at_last_action

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Sequences:
    """B prompts, left-padded to P tokens, each followed by its completion, right-padded to T."""

    sequence_ids: Tensor  # [B, P + T] int64
    attention_mask: Tensor  # [B, P + T] bool: prompt and completion tokens
    action_mask: Tensor  # [B, T] bool: tokens the policy chose
    # [B, T] bool: slots before which the critic is asked, see `Convention.value_mask`; None: the actions
    value_mask: Tensor | None = None

    @property
    def valued(self) -> Tensor:
        return self.action_mask if self.value_mask is None else self.value_mask

    def __getitem__(self, rows: Tensor) -> "Sequences":
        """These rows without the columns in which all of them are padding."""
        attention_mask, valued = self.attention_mask[rows], self.valued[rows]
        prompt = self.attention_mask.shape[1] - self.action_mask.shape[1]
        used, chosen = attention_mask.any(0).nonzero(), valued.any(0).nonzero()
        first = int(used.min()) if len(used) else prompt  # of no rows
        length = int(chosen.max()) + 1 if len(chosen) else 1
        columns = slice(min(first, prompt - 1), prompt + length)
        return Sequences(
            self.sequence_ids[rows, columns],
            attention_mask[:, columns],
            self.action_mask[rows, :length],
            None if self.value_mask is None else valued[:, :length],
        )

    def __len__(self) -> int:
        return len(self.action_mask)

    @property
    def lengths(self) -> Tensor:
        """[B] int64: tokens of prompt and completion."""
        return self.attention_mask.sum(-1)

    def prompts(self) -> Prompts:
        """With which prompt each begins."""
        columns = self.action_mask.shape[1]
        groups = prompt_groups(self.sequence_ids, self.attention_mask, columns)
        return Prompts(groups, self.attention_mask[:, :-columns].sum(-1))

    def to(self, device: torch.device) -> "Sequences":
        moved = (self.sequence_ids.to(device), self.attention_mask.to(device), self.action_mask.to(device))
        return Sequences(*moved, None if self.value_mask is None else self.value_mask.to(device))


class Predictions(NamedTuple):
    """What the roles say of the completions before any update, [B, T] float32 each, 0 in masked slots. The actor's are
    None until the update where nobody needs them before (`TrainerConfig.needs_old_log_probs`)."""

    log_probs: Tensor | None
    entropy: Tensor | None
    ref_log_probs: Tensor | None
    values: Tensor | None


def with_value_mask(sequences: Sequences, algorithm: AlgorithmConfig) -> Sequences:
    """The same, with the slots before which the algorithm's convention asks the critic. The whole round: a slot after
    the last action is one that the longest completion leaves."""
    if algorithm.critic == "none" or algorithm.numbers.terminal_reward == "last_action":
        return sequences
    return replace(sequences, value_mask=algorithm.numbers.value_mask(sequences.action_mask))


@dataclass(frozen=True)
class Experience:
    """One round's data, the same on every process. All but the sequences are [B, T] float32, 0 in masked slots: values
    and returns outside the value mask, the others outside the action mask."""

    # What happened
    sequences: Sequences
    rewards: Tensor  # per-token reward: what is given per token minus the KL penalty, the score on the last action
    # Under the weights that made it, as the rollout engine says and as the actor does
    sampler_log_probs: Tensor | None
    old_log_probs: Tensor | None  # None: those of the update's own forward
    ref_log_probs: Tensor | None
    old_values: Tensor | None
    # What the update aims at
    advantages: Tensor
    returns: Tensor | None  # the critic's targets

    def __getitem__(self, rows: Tensor) -> "Experience":
        """These rows, cut to the longest completion among them."""
        sequences = self.sequences[rows]
        length = sequences.action_mask.shape[1]
        return self._changed(sequences, lambda x: x[rows, :length])

    def without_actions_of(self, rows: Tensor) -> "Experience":
        """The same with nothing to learn from these rows ([B] bool)."""
        kept, before = ~rows[:, None], self.sequences
        valued = None if before.value_mask is None else before.value_mask & kept
        sequences = replace(before, action_mask=before.action_mask & kept, value_mask=valued)
        return self._changed(sequences, lambda x: torch.where(kept, x, 0.0))

    def _changed(self, sequences: Sequences, change: Callable[[Tensor], Tensor]) -> "Experience":
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sequences"}
        changed: dict[str, Any] = {name: None if x is None else change(x) for name, x in columns.items()}
        return Experience(sequences, **changed)

    def __len__(self) -> int:
        return len(self.sequences)


class Plan(NamedTuple):
    """Micro-batches, the same for all roles, and how their tokens lie; None: as each model likes best."""

    parts: list[Tensor]  # [b] int64 rows each
    layout: LayoutKind | None


def plan_micro_batches(
    roles: Roles, sequences: Sequences, *, tokens: int | None, share: bool, autocast: Autocast
) -> Plan:
    """Cut sequences by a budget of tokens; see `micro_batches`.

    Args:
        share: compute each prompt once for its completions in a micro-batch, where `prompts_to_share` finds it worth it
            and the budget leaves enough of them together.
    """
    lengths, prompts = sequences.lengths, prompts_to_share(roles, sequences, autocast) if share else None
    if prompts is not None:
        parts = micro_batches(lengths, tokens=tokens, packed=True, prompts=prompts)
        if shared_tokens(prompts, parts) >= SHARING_PAYS * int(lengths.sum()):
            return Plan(parts, "shared")
    with autocast():
        packed = packs(roles.actor)
    return Plan(micro_batches(lengths, tokens=tokens, packed=packed), None)


def prompts_to_share(roles: Roles, sequences: Sequences, autocast: Autocast) -> Prompts | None:
    """The prompts, if enough of their tokens could be shared and every role's model can do it."""
    if not len(sequences):
        return None
    prompts = sequences.prompts()
    if shared_tokens(prompts, [torch.arange(len(sequences))]) < SHARING_PAYS * int(sequences.lengths.sum()):
        return None
    with autocast():
        can_share = all(can_share_prompts(trunk) for trunk in roles.trunks())
        return prompts if can_share and output_head(roles.actor) is not None else None


@torch.no_grad()
def predict(
    roles: Roles,
    sequences: Sequences,
    *,
    temperature: float,
    micro_batch_tokens: int | None,
    autocast: Autocast,
    share_prompts: bool = True,
    with_actor: bool = True,
) -> Predictions:
    """One pass of each role over the sequences, some at a time: see `plan_micro_batches`.

    Args:
        with_actor: False leaves the actor's log-probs and entropy out; a critic that reads its states needs them.
    """
    if not with_actor and roles.reference is None and roles.critic is None:
        return Predictions(None, None, None, None)
    shape = sequences.action_mask.shape
    columns: list[list[Tensor]] = [[], [], [], []]
    parts, layout = plan_micro_batches(
        roles, sequences, tokens=micro_batch_tokens, share=share_prompts, autocast=autocast
    )
    for rows in parts:
        part = sequences[rows]
        args = (part.sequence_ids, part.attention_mask, part.action_mask)
        with autocast():
            found: list[Tensor | None] = [None] * 4
            hidden = None
            if with_actor:
                found[0], found[1], hidden = policy_output(
                    roles.actor,
                    *args,
                    temperature=temperature,
                    with_entropy=True,
                    with_hidden=roles.critic_reads_actor,
                    layout=layout,
                )
            if roles.reference is not None:
                with roles.as_reference():
                    found[2] = policy_output(roles.reference, *args, temperature=temperature, layout=layout).log_probs
            if roles.critic is not None:
                found[3] = roles.critic(part.sequence_ids, part.attention_mask, part.valued, hidden, layout=layout)
        for column, x in zip(columns, found, strict=True):
            if x is not None:
                column.append(torch.nn.functional.pad(x, (0, shape[1] - x.shape[1])))
    place = torch.cat(parts).argsort()
    return Predictions(*(torch.cat(column)[place] if column else None for column in columns))


def build_experience(
    sequences: Sequences,
    scores: Tensor,
    group_ids: Tensor,
    predictions: Predictions,
    algorithm: AlgorithmConfig,
    *,
    kl_reward_coef: float,
    sampler_log_probs: Tensor | None = None,
    token_rewards: Tensor | None = None,
    greedy_scores: Tensor | None = None,
    components: Tensor | None = None,
    weights: Sequence[float] | None = None,
    is_finished: Tensor | None = None,
) -> Experience:
    """Shape the rewards and estimate the advantages. Needs the whole round: whitening and groups span processes.

    Args:
        scores: [B] float, one verdict per sequence.
        group_ids: [B] int64, equal for samples of one prompt.
        kl_reward_coef: the coefficient in force, reward units per nat.
        sampler_log_probs: [B, T] nats, as the engine reported them.
        token_rewards: [B, T] float, rewards per action beside the score and KL.
        greedy_scores, components, weights: see `rlhf.objective.estimate_advantages`.
        is_finished: [B] bool; with train_on_truncated=False the others lose their actions.
    """
    mask = sequences.action_mask
    per_token = kl_rewards(predictions, mask, kl_reward_coef=kl_reward_coef)
    if all(x is None for x in predictions):
        per_token = per_token.to(scores.dtype)
    if token_rewards is not None:
        per_token = per_token + fill_masked(token_rewards.to(per_token), mask)
    is_trained = None if algorithm.train_on_truncated else is_finished
    estimate = estimate_advantages(
        algorithm, mask, scores=scores.to(per_token), group_ids=group_ids, token_rewards=per_token,
        values=predictions.values, greedy_scores=greedy_scores, components=components, weights=weights,
        is_trained=is_trained,
    )  # fmt: skip
    experience = Experience(
        sequences=with_value_mask(sequences, algorithm),
        rewards=per_token + rewards_at_last_action(scores.to(per_token), mask),
        sampler_log_probs=sampler_log_probs,
        old_log_probs=predictions.log_probs,
        ref_log_probs=predictions.ref_log_probs,
        old_values=predictions.values,
        advantages=estimate.advantages,
        returns=estimate.returns if predictions.values is not None else None,
    )
    return experience if is_trained is None else experience.without_actions_of(~is_trained)


def kl_rewards(predictions: Predictions, mask: Tensor, *, kl_reward_coef: float) -> Tensor:
    """[B, T]: minus kl_reward_coef times k1 at every action; 0 without a reference."""
    if predictions.ref_log_probs is None or predictions.log_probs is None:
        assert predictions.log_probs is not None or kl_reward_coef == 0
        known = [x.dtype for x in predictions if x is not None]
        return torch.zeros(mask.shape, dtype=known[0] if known else torch.float32, device=mask.device)
    return -kl_reward_coef * kl_estimate(predictions.log_probs, predictions.ref_log_probs, mask, estimator="k1")


def sequence_kl(predictions: Predictions, mask: Tensor) -> float:
    """Mean over sequences of the summed log-ratio to the reference, nats per sequence; 0 without a reference."""
    if predictions.ref_log_probs is None:
        return 0.0
    assert predictions.log_probs is not None
    kl = kl_estimate(predictions.log_probs, predictions.ref_log_probs, mask, estimator="k1")
    return float(masked_sum(kl, mask) / len(mask))


def mean_entropy(predictions: Predictions, mask: Tensor) -> float:
    """Nats per token."""
    assert predictions.entropy is not None
    return float(masked_mean(predictions.entropy, mask))
