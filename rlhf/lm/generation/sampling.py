"""Drawing tokens: temperature, truncation, and inversion of the cumulative distribution.

Each token takes one uniform number, so that a request's randomness is a short vector that follows it wherever it is
batched. Sums over a large vocabulary are made of blocks of 128 float32 terms, added up in float64: one pass, and the
error of the cumulative distribution stays near that of the float32 probabilities themselves.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.lm.generation.protocol import Truncation
from rlhf.lm.logprobs import widen

BLOCK = 128  # tokens summed at once; vocabularies are mostly padded to multiples of it
CANDIDATES = 512  # most likely tokens looked at before the whole vocabulary is sorted for top-p


class Choice(NamedTuple):
    """One token for each of n rows."""

    tokens: Tensor  # [n] int64
    sampler_log_probs: Tensor  # [n] float32, nats: over what truncation left
    untruncated_log_probs: Tensor  # [n] float32, nats; the same tensor without truncation


def draw_uniforms(seeds: Tensor, count: int) -> Tensor:
    """[B, count] float64 in [0, 1): row b a function of seeds[b] alone."""
    generator = torch.Generator()
    uniforms = torch.empty(len(seeds), count, dtype=torch.float64)
    for row, seed in zip(uniforms, seeds.tolist(), strict=True):
        torch.rand(count, dtype=torch.float64, generator=generator.manual_seed(seed), out=row)
    return uniforms


def choose(
    logits: Tensor, uniforms: Tensor | None, *, temperature: float, truncation: Truncation, may_wait: bool = True
) -> Choice:
    """One token per row.

    Args:
        logits: [n, V] float.
        uniforms: [n] float64 in [0, 1); None takes the most likely token.
        temperature: > 0. truncation: see `Truncation`.
        may_wait: the host may wait for the device to look at numbers, which saves work.
    """
    logits = widen(logits)
    probs = (logits if temperature == 1 else logits / temperature).softmax(-1)
    if truncation.is_off:
        tokens = logits.argmax(-1) if uniforms is None else invert(probs, uniforms)
        log_probs = probs.gather(-1, tokens[:, None]).log().squeeze(-1).float()
        return Choice(tokens, log_probs, log_probs)
    kept = probs.masked_fill(probs < lowest_kept(probs, truncation, may_wait=may_wait), 0.0)
    tokens = logits.argmax(-1) if uniforms is None else invert(kept, uniforms)
    chosen = probs.gather(-1, tokens[:, None])
    truncated = chosen / kept.sum(-1, keepdim=True)
    return Choice(tokens, truncated.log().squeeze(-1).float(), chosen.log().squeeze(-1).float())


def invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first token at which the cumulative weight exceeds that share of the total. [n, V] >= 0, [n] -> [n] int64.

    Never a token of weight 0, whatever the rounding.
    """
    size = weights.shape[-1]
    if size < 16 * BLOCK:
        return _first_above(weights.double().cumsum(-1), uniforms[:, None], relative=True).squeeze(-1)
    if size % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -size % BLOCK))
    blocks = weights.unflatten(-1, (-1, BLOCK))
    cumulative = blocks.sum(-1).double().cumsum(-1)
    block = _first_above(cumulative, uniforms[:, None], relative=True)
    before = torch.where(block > 0, cumulative.gather(-1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)
    place = _first_above(inside, uniforms[:, None] * cumulative[:, -1:] - before, relative=False)
    return (block * BLOCK + place).squeeze(-1).clamp_(max=size - 1)


def _first_above(cumulative: Tensor, targets: Tensor, *, relative: bool) -> Tensor:
    """[n, 1] first index whose cumulative weight exceeds the target, below the total by at least one rounding; the
    last one where weights are NaN."""
    total = cumulative[:, -1:]
    targets = targets * total if relative else targets
    below = torch.nextafter(total, torch.zeros_like(total))
    found = torch.searchsorted(cumulative, torch.minimum(targets, below), right=True)
    return found.clamp_(max=cumulative.shape[-1] - 1)


def lowest_kept(probs: Tensor, truncation: Truncation, *, may_wait: bool = True) -> Tensor:
    """[n, 1] the least probability that truncation keeps; probs: [n, V]."""
    lowest = truncation.min_p * probs.amax(-1, keepdim=True)
    if 0 < truncation.top_k < probs.shape[-1]:
        last = probs.topk(truncation.top_k, dim=-1).values[:, -1:]
        lowest = torch.maximum(lowest, last)
        probs = torch.where(probs >= last, probs, 0.0)
    if truncation.top_p < 1:
        lowest = torch.maximum(lowest, _last_of_mass(probs, truncation.top_p, may_wait=may_wait))
    return lowest


def _last_of_mass(weights: Tensor, share: float, *, may_wait: bool) -> Tensor:
    """[n, 1] the least of the fewest largest weights that make up this share of the total."""
    needed = share * weights.sum(-1, keepdim=True, dtype=torch.float64)
    for count in (CANDIDATES, weights.shape[-1]) if may_wait else (weights.shape[-1],):
        ranked = weights.topk(min(count, weights.shape[-1]), dim=-1).values
        cumulative = ranked.cumsum(-1, dtype=torch.float64)
        if may_wait and bool((cumulative[:, -1:] >= needed).all()):
            break
    last = (cumulative < needed).sum(-1, keepdim=True).clamp(max=ranked.shape[-1] - 1)
    return ranked.gather(-1, last)
