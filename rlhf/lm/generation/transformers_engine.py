"""The plain engine: one forward of the transformers model per token, with its key-value cache."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlhf.lm.generation.protocol import Completions
from rlhf.lm.logprobs import position_ids, widen

# Sampled by inverting the cumulative distribution: one uniform number per token, so that a request's randomness is a
# short vector that follows it wherever it is batched. Float64 keeps the error of a sum over 150,000 tokens below 1e-10.


class TransformersEngine:
    """Decodes with the model it was given, whose weights it shares: an optimizer step changes the next completion.

    Args:
        model: a causal language model.
        eos_token_ids: tokens that end a completion.
        pad_token_id: fills finished rows.
        batch_size: sequences decoded at once; bounds memory, changes no completion.
        autocast: makes the context of a forward (mixed precision as in training); none by default.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: set[int],
        pad_token_id: int,
        batch_size: int = 256,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model = model
        self.eos_token_ids = torch.tensor(sorted(eos_token_ids), device=model.device)
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size
        self.autocast = autocast

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        *,
        max_new_tokens: int,
        temperature: float,
        seeds: Tensor | None,
    ) -> Completions:
        """See `Engine.generate`."""
        uniforms = None if seeds is None else _uniforms(seeds, max_new_tokens).to(prompt_ids.device)
        parts = []
        for start in range(0, len(prompt_ids), self.batch_size):
            part = slice(start, start + self.batch_size)
            noise = None if uniforms is None else uniforms[part]
            parts.append(self._decode(prompt_ids[part], prompt_mask[part], max_new_tokens, temperature, noise))
        completions = Completions(*(torch.cat(column) for column in zip(*parts, strict=True)))
        length = int(completions.action_mask.sum(-1).max())
        ids, log_probs, mask, is_finished = completions
        return Completions(ids[:, :length], log_probs[:, :length], mask[:, :length], is_finished)

    def _decode(
        self, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int, temperature: float, uniforms: Tensor | None
    ) -> Completions:
        batch = len(prompt_ids)
        shape = (batch, max_new_tokens)
        out = Completions(
            token_ids=prompt_ids.new_full(shape, self.pad_token_id),
            sampler_log_probs=torch.zeros(shape, device=prompt_ids.device),
            action_mask=torch.zeros(shape, dtype=torch.bool, device=prompt_ids.device),
            is_finished=torch.zeros(batch, dtype=torch.bool, device=prompt_ids.device),
        )
        cache = DynamicCache(config=self.model.config)
        running = _Running(torch.arange(batch, device=prompt_ids.device), prompt_ids, prompt_mask)
        for t in range(max_new_tokens):
            log_probs = self._next_log_probs(running, cache, temperature)
            tokens = log_probs.argmax(-1) if uniforms is None else _invert(log_probs, uniforms[running.rows, t])
            chosen = log_probs.gather(-1, tokens[:, None]).squeeze(-1)
            live = ~out.is_finished[running.rows]
            rows = running.rows[live]
            out.token_ids[rows, t], out.sampler_log_probs[rows, t] = tokens[live], chosen[live].float()
            out.action_mask[rows, t] = True
            out.is_finished[rows] = torch.isin(tokens[live], self.eos_token_ids)
            running = self._advance(running, tokens, out.is_finished[running.rows], cache)
            if running.rows.numel() == 0:
                break
        return out

    def _next_log_probs(self, running: "_Running", cache: DynamicCache, temperature: float) -> Tensor:
        positions = position_ids(running.attention_mask)[:, -running.input_ids.shape[1] :]
        with self.autocast():
            logits = self.model(
                input_ids=running.input_ids,
                attention_mask=running.attention_mask.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        return (widen(logits) / temperature).log_softmax(-1)

    def _advance(self, running: "_Running", tokens: Tensor, finished: Tensor, cache: DynamicCache) -> "_Running":
        """Append the tokens; drop finished rows from batch and cache once they are half of it."""
        count = int(finished.sum())
        mask = torch.nn.functional.pad(running.attention_mask, (0, 1), value=True)
        advanced = _Running(running.rows, tokens[:, None], mask)
        if 2 * count < len(finished):
            return advanced
        keep = (~finished).nonzero().squeeze(-1)
        if keep.numel():
            cache.batch_select_indices(keep)
        return _Running(*(x[keep] for x in advanced))


class _Running(NamedTuple):
    """Rows of the batch still being decoded."""

    rows: Tensor  # [R] their index in the batch
    input_ids: Tensor  # [R, L] tokens that the cache does not hold yet
    attention_mask: Tensor  # [R, cached + L] bool


def _uniforms(seeds: Tensor, count: int) -> Tensor:
    """[B, count] float64 in [0, 1): row b a function of seeds[b] alone."""
    draws = [
        torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds.tolist()
    ]
    return torch.stack(draws)


def _invert(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """The first token at which the cumulative distribution exceeds the uniform number. [R, V], [R] -> [R]."""
    cumulative = log_probs.double().exp().cumsum(-1)
    tokens = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True).squeeze(-1)
    return tokens.clamp(max=log_probs.shape[-1] - 1)
