"""The plain engine: one forward of the transformers model per token, with its key-value cache."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlhf.lm.attention import evaluating
from rlhf.lm.generation.protocol import Completions, Truncation
from rlhf.lm.generation.sampling import Choice, choose, draw_uniforms
from rlhf.lm.generation.schedule import Requests
from rlhf.lm.logprobs import position_ids


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
        max_new_tokens: int | Tensor,
        temperature: float,
        seeds: Tensor | None,
        truncation: Truncation = Truncation(),  # noqa: B008 (frozen)
    ) -> Completions:
        """See `Engine.generate`.

        Raises:
            InputError: a prompt is empty or too long for the model, or the model's predictions are NaN.
        """
        Requests.of(prompt_ids, prompt_mask, max_new_tokens).check_fit(self.model.config)
        device = prompt_ids.device
        limits = torch.as_tensor(max_new_tokens, device=device).expand(len(prompt_ids))
        shape = (len(prompt_ids), int(limits.max()))
        uniforms = None if seeds is None else draw_uniforms(seeds, shape[1]).to(device)

        def draw(rows: Tensor, t: int, logits: Tensor) -> Choice:
            noise = None if uniforms is None else uniforms[rows, t]
            return choose(logits, noise, temperature=temperature, truncation=truncation)

        out = Completions(
            token_ids=prompt_ids.new_full(shape, self.pad_token_id),
            sampler_log_probs=torch.zeros(shape, device=device),
            untruncated_log_probs=torch.zeros(shape, device=device),
            action_mask=torch.zeros(shape, dtype=torch.bool, device=device),
            is_finished=torch.zeros(len(prompt_ids), dtype=torch.bool, device=device),
        )
        with evaluating(self.model):
            for rows in torch.arange(len(prompt_ids), device=device).split(self.batch_size):
                self._decode(_Running(rows, prompt_ids[rows], prompt_mask[rows]), limits, draw, out)
        out.check_numbers()
        length = int(out.action_mask.sum(-1).max())
        ids, log_probs, untruncated, mask, is_finished = out
        return Completions(
            ids[:, :length], log_probs[:, :length], untruncated[:, :length], mask[:, :length], is_finished
        )

    def _decode(
        self, running: "_Running", limits: Tensor, draw: Callable[[Tensor, int, Tensor], Choice], out: Completions
    ) -> None:
        """Fill the rows of `out`."""
        cache = DynamicCache(config=self.model.config)
        is_done = torch.zeros_like(out.is_finished)
        for t in range(out.action_mask.shape[1]):
            choice = draw(running.rows, t, self._next_logits(running, cache))
            live = ~is_done[running.rows]
            rows = running.rows[live]
            out.token_ids[rows, t] = choice.tokens[live]
            out.sampler_log_probs[rows, t] = choice.sampler_log_probs[live]
            out.untruncated_log_probs[rows, t] = choice.untruncated_log_probs[live]
            out.action_mask[rows, t] = True
            out.is_finished[rows] = torch.isin(choice.tokens[live], self.eos_token_ids)
            is_done[rows] = out.is_finished[rows] | (limits[rows] == t + 1)
            running = self._advance(running, choice.tokens, is_done[running.rows], cache)
            if running.rows.numel() == 0:
                break

    def _next_logits(self, running: "_Running", cache: DynamicCache) -> Tensor:
        positions = position_ids(running.attention_mask)[:, -running.input_ids.shape[1] :]
        with self.autocast():
            return self.model(
                input_ids=running.input_ids,
                attention_mask=running.attention_mask.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]

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
