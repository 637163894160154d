"""Collecting one round: prompts to scored completions, each process its share, then everything to everyone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from rlhf.lm.config import SamplingConfig, TrainerConfig
from rlhf.lm.dynamic_sampling import Batch, has_signal, refill
from rlhf.lm.experience import Predictions, Sequences, predict, with_value_mask
from rlhf.lm.generation import Completions, Engine
from rlhf.lm.models import Roles
from rlhf.lm.rewards import RewardFunction, Row, Scores, name_of, score
from rlhf.lm.tasks import Task, pad_left, tokenize_prompts
from rlhf.rewards import overlong_penalty
from rlhf.run.seeding import draw_seeds, generator_for

OVERLONG = "overlong"  # the penalty's name among the rewards


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

    batch: Batch
    predictions: Predictions
    reward_names: list[str]  # [K] of the batch's components
    group_ids: Tensor  # [B] int64
    texts: list[tuple[Row, str, float]]  # (row, completion, score) of the local sequences
    tokens: int  # chosen in all draws
    draws: int  # times that prompts_per_step prompts were drawn: more than 1 with dynamic sampling
    without_signal: float  # share of all groups drawn whose scores are all equal; 0 for single samples


@dataclass(frozen=True)
class Sampler:
    """What turns prompts into scored completions."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    sampling: SamplingConfig
    accelerator: Accelerator

    def complete(
        self, prompts: PromptSet, indices: Sequence[int], *, width: int, seeds: Tensor | None
    ) -> tuple[Sequences, Completions, list[str]]:
        """Completions [b, T] of prompts[indices], with their prompts (padded to `width`), and as texts."""
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
        return sequences, completions, texts


def collect(
    sampler: Sampler,
    roles: Roles,
    prompts: PromptSet,
    reward_functions: Sequence[RewardFunction],
    config: TrainerConfig,
    *,
    reward_weights: Sequence[float] | None,
    first_draw: int,
) -> Rollout:
    """Complete and score the next prompts; with `refill_rounds`, go on until enough groups have signal.

    What is drawn depends on (seed, draw) and a sequence's place in it, not on the number of processes.

    Args:
        first_draw: draws so far, over all rounds; decides which prompts are next.
    Returns:
        The round of all processes, the same on each but for `texts`.
    Raises:
        InputError: as `rewards.score`.
    """
    accelerator, optimization = sampler.accelerator, config.optimization
    samples = optimization.samples_per_prompt
    batches: list[Batch] = []
    texts: list[tuple[Row, str, float]] = []
    for draw in range(first_draw, first_draw + 1 + config.algorithm.refill_rounds):
        batch, new_texts = _draw(sampler, prompts, reward_functions, reward_weights, config, draw)
        batches.append(batch)
        texts += new_texts
        if sum(int(has_signal(x.totals, samples).sum()) for x in batches) >= optimization.prompts_per_step:
            break
    batch = refill(batches, samples_per_prompt=samples) if len(batches) > 1 else batches[0]

    share = len(batch.scores) // accelerator.num_processes
    mine = torch.arange(share, device=accelerator.device) + accelerator.process_index * share
    local = with_value_mask(batch.sequences, config.algorithm)[mine]
    predictions = predict(
        roles,
        local,
        temperature=sampler.sampling.temperature,
        micro_batch_tokens=optimization.micro_batch_tokens,
        autocast=accelerator.autocast,
        share_prompts=optimization.share_prompts,
        with_actor=config.needs_old_log_probs,
    )
    drawn = torch.cat([has_signal(x.totals, samples) for x in batches])
    return Rollout(
        batch=batch,
        predictions=_gather_predictions(predictions, batch.action_mask.shape[1], accelerator),
        reward_names=[*map(name_of, reward_functions), *([OVERLONG] if config.algorithm.overlong_buffer else [])],
        group_ids=torch.arange(len(batch.scores), device=accelerator.device) // samples,
        texts=texts,
        tokens=sum(int(x.action_mask.sum()) for x in batches),
        draws=len(batches),
        without_signal=float((~drawn).float().mean()) if samples > 1 else 0.0,
    )


def _draw(
    sampler: Sampler,
    prompts: PromptSet,
    reward_functions: Sequence[RewardFunction],
    reward_weights: Sequence[float] | None,
    config: TrainerConfig,
    draw: int,
) -> tuple[Batch, list[tuple[Row, str, float]]]:
    """The batch of all processes for `prompts_per_step` prompts; rows, texts and scores of this process."""
    accelerator, optimization, seed = sampler.accelerator, config.optimization, config.run.seed
    samples = optimization.samples_per_prompt
    chosen = prompt_indices(len(prompts), step=draw, count=optimization.prompts_per_step, seed=seed)
    width = max(len(prompts.token_ids[i]) for i in chosen)
    seeds = draw_seeds(len(chosen) * samples, generator_for(seed, "completions", draw))
    share = len(chosen) // accelerator.num_processes
    first = accelerator.process_index * share
    mine, my_seeds = chosen[first : first + share], seeds[first * samples : (first + share) * samples]

    indices = [i for i in mine for _ in range(samples)]
    sequences, completions, texts = sampler.complete(prompts, indices, width=width, seeds=my_seeds)
    rows = [prompts.rows[i] for i in indices]
    scores = _score(reward_functions, reward_weights, rows, texts, sequences, config)
    token_rewards = pad(scores.token_rewards, (0, sequences.action_mask.shape[1] - scores.token_rewards.shape[1]))
    greedy = [torch.zeros(len(rows)), torch.zeros(len(rows)), torch.ones(len(rows), dtype=torch.bool)]
    if config.algorithm.advantage == "greedy_baseline":
        answered, done, answers = sampler.complete(prompts, mine, width=width, seeds=None)
        found = _score(reward_functions, reward_weights, [prompts.rows[i] for i in mine], answers, answered, config)
        columns_of_greedy = (found.total, found.token_rewards.sum(-1), done.is_finished)
        greedy = [x.repeat_interleave(samples) for x in columns_of_greedy]
    columns = (completions.is_finished, scores.total, torch.stack(list(scores.components.values()), -1), *greedy)
    batch = Batch(
        _gather_padded(sequences.sequence_ids, sampler.tokenizer.pad_token_id, accelerator),
        _gather_padded(sequences.attention_mask, False, accelerator),
        _gather_padded(sequences.action_mask, False, accelerator),
        _gather_padded(completions.sampler_log_probs, 0.0, accelerator),
        _gather_padded(completions.untruncated_log_probs, 0.0, accelerator),
        _gather_padded(token_rewards.to(accelerator.device), 0.0, accelerator),
        *(accelerator.gather(x.to(accelerator.device)) for x in columns),
    )
    return batch, list(zip(rows, texts, scores.totals.tolist(), strict=True))


def completion_ids(sequences: Sequences) -> list[list[int]]:
    """The chosen tokens of each sequence."""
    here = sequences.to(torch.device("cpu"))  # once, not for each row
    tokens = here.sequence_ids[:, -here.action_mask.shape[1] :]
    return [ids[mask].tolist() for ids, mask in zip(tokens, here.action_mask, strict=True)]


def _score(
    functions: Sequence[RewardFunction],
    weights: Sequence[float] | None,
    rows: Sequence[Row],
    texts: Sequence[str],
    sequences: Sequences,
    config: TrainerConfig,
) -> Scores:
    """The functions' verdicts and, if the config wants it, the penalty on overlong completions as one more."""
    scores = score(functions, rows, texts, weights=weights, completion_ids=completion_ids(sequences))
    limit, algorithm = config.sampling.max_new_tokens, config.algorithm
    if not algorithm.overlong_buffer:
        return scores
    buffer = max(round(algorithm.overlong_buffer * limit), 1)
    lengths = sequences.action_mask.sum(-1).cpu()
    penalty = overlong_penalty(lengths, max_length=limit, buffer=buffer, scale=algorithm.overlong_scale)
    return scores._replace(total=scores.total + penalty, components=scores.components | {OVERLONG: penalty})


def prompt_indices(total: int, *, step: int, count: int, seed: int) -> list[int]:
    """`count` prompts for step 0, 1, ...: every prompt once, in random order, before any a second time."""
    first = step * count
    return [_order(total, at // total, seed)[at % total] for at in range(first, first + count)]


@lru_cache(maxsize=2)
def _order(total: int, epoch: int, seed: int) -> list[int]:
    return torch.randperm(total, generator=generator_for(seed, "prompts", epoch)).tolist()


def _gather_predictions(predictions: Predictions, length: int, accelerator: Accelerator) -> Predictions:
    """Of all processes, padded to `length` completion tokens."""

    return Predictions(
        *(None if x is None else accelerator.gather(pad(x, (0, length - x.shape[1]))) for x in predictions)
    )


def _gather_padded(x: Tensor, value: float, accelerator: Accelerator) -> Tensor:
    """Rows of all processes, padded on the right to the longest."""
    if accelerator.num_processes == 1:
        return x
    as_sent = x.to(torch.uint8) if x.dtype == torch.bool else x
    padded = accelerator.pad_across_processes(as_sent, dim=1, pad_index=value)
    return accelerator.gather(padded).to(x.dtype)
