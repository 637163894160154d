"""Collecting one round: prompts to scored completions, each process its share, then everything to everyone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.lm.config import SamplingConfig, TrainerConfig
from rlhf.lm.experience import Predictions, Sequences, predict
from rlhf.lm.generation import Engine
from rlhf.lm.models import Roles
from rlhf.lm.rewards import RewardFunction, Row, Scores, score
from rlhf.lm.tasks import Task, pad_left, tokenize_prompts
from rlhf.run.seeding import draw_seeds, generator_for


@dataclass(frozen=True)
class PromptSet:
    """Rows and their tokenized prompts."""

    rows: Sequence[Row]
    token_ids: Sequence[list[int]]

    @classmethod
    def of(
        cls, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, task: Task, config: TrainerConfig
    ) -> "PromptSet":
        """Rows of the task, tokenized; see `tokenize_prompts`."""
        limit, drop_long = config.sampling.max_prompt_tokens, config.source.drop_long_prompts
        kept, token_ids = tokenize_prompts(
            rows,
            tokenizer,
            max_prompt_tokens=limit,
            drop_long=drop_long,
            add_special_tokens=task.add_special_tokens,
        )
        return cls(kept, token_ids)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Rollout:
    """One round's completions. Tensors span all processes; texts are those of this process."""

    sequences: Sequences
    predictions: Predictions
    scores: Scores
    group_ids: Tensor  # [B] int64
    is_finished: Tensor  # [B] bool
    log_prob_gap: tuple[float, float]  # |the sampler's untruncated - recomputed| log-prob, nats: mean and max
    texts: list[tuple[Row, str, float]]  # (row, completion, score) of the local sequences


@dataclass(frozen=True)
class Sampler:
    """What turns prompts into scored completions."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    sampling: SamplingConfig
    accelerator: Accelerator

    def complete(
        self, prompts: PromptSet, indices: Sequence[int], *, width: int, seeds: Tensor | None
    ) -> tuple[Sequences, Tensor, Tensor, list[str]]:
        """Sequences, untruncated log-probs of the sampler [b, T], is_finished [b], texts; prompts padded to `width`."""
        ids, mask = pad_left(
            [prompts.token_ids[i] for i in indices],
            width=width,
            pad_token_id=self.tokenizer.pad_token_id,
            device=self.accelerator.device,
        )
        completions = self.engine.generate(
            ids,
            mask,
            max_new_tokens=self.sampling.max_new_tokens,
            temperature=self.sampling.temperature,
            seeds=seeds,
            truncation=self.sampling.truncation,
        )
        sequences = Sequences(
            torch.cat([ids, completions.token_ids], -1),
            torch.cat([mask, completions.action_mask], -1),
            completions.action_mask,
        )
        rows = zip(completions.token_ids.tolist(), completions.action_mask.sum(-1).tolist(), strict=True)
        texts = [str(self.tokenizer.decode(ids[:length], skip_special_tokens=True)) for ids, length in rows]
        return sequences, completions.untruncated_log_probs, completions.is_finished, texts


def collect(
    sampler: Sampler,
    roles: Roles,
    prompts: PromptSet,
    reward_functions: Sequence[RewardFunction],
    *,
    step: int,
    seed: int,
    prompts_per_step: int,
    samples_per_prompt: int,
    reward_weights: Sequence[float] | None,
    scoring_batch_size: int,
) -> Rollout:
    """Complete and score this step's prompts.

    What is drawn depends on (seed, step) and a sequence's place in the round, not on the number of processes.

    Args:
        step: rounds collected so far; decides which prompts are next.
        prompts_per_step, samples_per_prompt: over all processes; B is their product.
        scoring_batch_size: sequences per forward of actor, reference and critic.
    Returns:
        The round of all processes, the same on each but for `texts`.
    Raises:
        InputError: as `rewards.score`.
    """
    accelerator = sampler.accelerator
    chosen = prompt_indices(len(prompts), step=step, count=prompts_per_step, seed=seed)
    width = max(len(prompts.token_ids[i]) for i in chosen)
    indices = [i for i in chosen for _ in range(samples_per_prompt)]
    seeds = draw_seeds(len(indices), generator_for(seed, "completions", step))
    share = len(indices) // accelerator.num_processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)

    sequences, sampler_log_probs, is_finished, texts = sampler.complete(
        prompts, indices[mine], width=width, seeds=seeds[mine]
    )
    rows = [prompts.rows[i] for i in indices[mine]]
    scores = score(reward_functions, rows, texts, weights=reward_weights)
    predictions = predict(
        roles,
        sequences,
        temperature=sampler.sampling.temperature,
        batch_size=scoring_batch_size,
        autocast=accelerator.autocast,
    )
    gap = (predictions.log_probs - sampler_log_probs).abs().float()
    count = sequences.action_mask.sum().float()
    gaps = accelerator.gather(torch.stack([gap.sum(), count, gap.max()])[None])
    device = accelerator.device
    group_ids = torch.arange(prompts_per_step, device=device).repeat_interleave(samples_per_prompt)
    return Rollout(
        sequences=_gather_sequences(sequences, sampler.tokenizer.pad_token_id, accelerator),
        predictions=_gather_predictions(predictions, accelerator),
        scores=Scores(
            accelerator.gather(scores.total.to(device)),
            {name: accelerator.gather(x.to(device)) for name, x in scores.components.items()},
        ),
        group_ids=group_ids,
        is_finished=accelerator.gather(is_finished),
        log_prob_gap=(float(gaps[:, 0].sum() / gaps[:, 1].sum()), float(gaps[:, 2].max())),
        texts=list(zip(rows, texts, scores.total.tolist(), strict=True)),
    )


def accuracy(
    sampler: Sampler, prompts: PromptSet, verifier: RewardFunction, *, count: int, seeds: Tensor | None
) -> float:
    """Share of the first `count` prompts whose completion the verifier finds right, over all processes.

    Args:
        seeds: [count] to sample; None to decode greedily.
    """
    accelerator = sampler.accelerator
    mine = list(range(count))[accelerator.process_index :: accelerator.num_processes]
    right = torch.zeros(1, device=accelerator.device)
    if mine:
        width = max(len(prompts.token_ids[i]) for i in mine)
        *_, texts = sampler.complete(prompts, mine, width=width, seeds=None if seeds is None else seeds[mine])
        right += score([verifier], [prompts.rows[i] for i in mine], texts).total.sum().to(right)
    return float(accelerator.reduce(right, reduction="sum")) / count


def prompt_indices(total: int, *, step: int, count: int, seed: int) -> list[int]:
    """`count` prompts for step 0, 1, ...: every prompt once, in random order, before any a second time."""
    first = step * count
    return [_order(total, at // total, seed)[at % total] for at in range(first, first + count)]


@lru_cache(maxsize=2)
def _order(total: int, epoch: int, seed: int) -> list[int]:
    return torch.randperm(total, generator=generator_for(seed, "prompts", epoch)).tolist()


def _gather_sequences(sequences: Sequences, pad_token_id: int, accelerator: Accelerator) -> Sequences:
    return Sequences(
        _gather_padded(sequences.sequence_ids, pad_token_id, accelerator),
        _gather_padded(sequences.attention_mask, False, accelerator),
        _gather_padded(sequences.action_mask, False, accelerator),
    )


def _gather_predictions(predictions: Predictions, accelerator: Accelerator) -> Predictions:
    def gathered(x: Tensor) -> Tensor:
        return _gather_padded(x, 0.0, accelerator)

    return Predictions(
        gathered(predictions.log_probs),
        gathered(predictions.entropy),
        None if predictions.ref_log_probs is None else gathered(predictions.ref_log_probs),
        None if predictions.values is None else gathered(predictions.values),
    )


def _gather_padded(x: Tensor, value: float, accelerator: Accelerator) -> Tensor:
    """Rows of all processes, padded on the right to the longest."""
    if accelerator.num_processes == 1:
        return x
    as_sent = x.to(torch.uint8) if x.dtype == torch.bool else x
    padded = accelerator.pad_across_processes(as_sent, dim=1, pad_index=value)
    return accelerator.gather(padded).to(x.dtype)
