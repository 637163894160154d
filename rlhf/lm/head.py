"""Hidden states and the output matrix to log-probs, entropy and KL, without all tokens' logits at once.

The logits of N tokens over V words are N x V numbers, for which plain autograd keeps several arrays of that size. Here
they exist for one chunk of tokens at a time; the backward pass makes them again. With p = softmax(z), z the logits:

    d log p_a / dz = onehot_a - p          dH / dz = -p (log p + H)          dKL / dz = p (log p - log q - KL)

A batch small enough is one chunk that keeps its log-softmax instead: no memory worth saving, and a matrix product less.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf.checks import InputError, check_range
from rlhf.lm.linear import linear

# Of one [n, V] array, a few of which exist at a time. On a CPU a chunk should stay in the cache (measured: docs/
# benchmarks.md, Updates); on a GPU it should be many tokens, since each chunk adds to the gradient of the whole matrix.
CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 16 * 2**20, 512 * 2**20
KEPT_BYTES = 128 * 2**20  # up to here the log-softmax is kept for the backward pass
WORDS_AT_ONCE = 1024  # whose part of a product that is added to another type's sum stays in a CPU's cache


class Head(NamedTuple):
    """What makes logits of hidden states: x = hidden @ weight.T + bias, then softcap * tanh(x / softcap) if given."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None


class TokenTerms(NamedTuple):
    """Each [N], nats, float32 or wider; with gradients to hidden states and head."""

    log_probs: Tensor
    entropy: Tensor | None
    kl: Tensor | None


def token_terms(
    hidden: Tensor,
    head: Head,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    reference: tuple[Tensor, Head] | None = None,
    chunk_bytes: int | None = None,
) -> TokenTerms:
    """log pi(token) for each of N hidden states; on request the entropy and the exact KL(pi || reference).

    The logits are computed in the inputs' type, or autocast's, and widened to at least float32 before anything else is
    done with them, as a model's own logits would be. Gradients of the head are summed over chunks in float32 or wider.

    Args:
        hidden: [N, H] float, the state before each token.
        head: V words. Its logits must be finite.
        token_ids: [N] int64.
        temperature: logits are divided by it, the reference's too; > 0.
        reference: (hidden [N, H'], head of the same V words); detached.
        chunk_bytes: no [n, V] array is larger, but for n = 1. None chooses by device and size.
    Raises:
        InputError: shapes do not fit, or the temperature is not positive.
    """
    check_range("temperature", temperature, low=0, low_open=True, high_open=True)
    _check_shapes(hidden, head, token_ids, reference)
    dtype = _compute_dtype(hidden, head.weight)
    differentiated = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (hidden, head.weight, head.bias)
    )
    row_bytes = len(head.weight) * widened(dtype).itemsize
    limit = chunk_bytes or (GPU_CHUNK_BYTES if hidden.is_cuda else CPU_CHUNK_BYTES)
    kept_limit = chunk_bytes or max(limit, KEPT_BYTES)
    keep = differentiated and len(hidden) * row_bytes <= kept_limit and head.softcap is None and reference is None
    ref_hidden, ref_head = (None, None) if reference is None else reference
    settings = _Settings(
        dtype=dtype,
        rows=max(1, len(hidden) if keep else limit // row_bytes),
        temperature=temperature,
        with_entropy=with_entropy,
        keep=keep,
        softcap=head.softcap,
        ref_softcap=None if ref_head is None else ref_head.softcap,
    )
    ref = (None, None, None) if ref_head is None else (ref_hidden, ref_head.weight, ref_head.bias)
    return TokenTerms(*_ChunkedTerms.apply(settings, token_ids, hidden, head.weight, head.bias, *ref))


class _Settings(NamedTuple):
    dtype: torch.dtype  # of the matrix products
    rows: int  # tokens per chunk
    temperature: float
    with_entropy: bool
    keep: bool  # the log-softmax of the only chunk, for the backward pass
    softcap: float | None
    ref_softcap: float | None


class _ChunkedTerms(torch.autograd.Function):
    """[N] log-probs, entropy or None, KL or None."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: _Settings,
        token_ids: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        log_probs = hidden.new_empty(len(hidden), dtype=widened(settings.dtype))
        entropy = torch.empty_like(log_probs) if settings.with_entropy else None
        kl = None if ref_weight is None else torch.empty_like(log_probs)
        head = _cast(weight, bias, settings.softcap, settings.dtype)
        ref_head = None if ref_weight is None else _cast(ref_weight, ref_bias, settings.ref_softcap, settings.dtype)
        log_p: Tensor | None = None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _slices(len(hidden), settings.rows):
                logits = _logits(hidden[part], head, settings)
                log_p = logits.log_softmax(-1)
                log_probs[part] = log_p.gather(-1, token_ids[part, None]).squeeze(-1)
                if entropy is None and kl is None:
                    continue
                p = torch.exp(log_p, out=logits)  # in place: fresh memory costs a CPU as much as the arithmetic
                if kl is not None and ref_head is not None and ref_hidden is not None:
                    log_q = _logits(ref_hidden[part], ref_head, settings).log_softmax(-1)
                    kl[part] = (log_p - log_q).mul_(p).sum(-1)
                if entropy is not None:
                    entropy[part] = -p.mul_(log_p).sum(-1)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        kept = log_p if settings.keep else None
        ctx.save_for_backward(token_ids, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, entropy, kl, kept)
        return log_probs, entropy, kl

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_log_probs: Tensor | None, d_entropy: Tensor | None, d_kl: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        settings: _Settings = ctx.settings
        token_ids, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, entropy, kl, kept = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[2:5]
        head = _cast(weight, bias, settings.softcap, settings.dtype)
        ref_head = None if ref_weight is None else _cast(ref_weight, ref_bias, settings.ref_softcap, settings.dtype)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight: Tensor | None = None
        d_bias: Tensor | None = None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _slices(len(hidden), settings.rows):
                logits = None if kept is not None else _logits(hidden[part], head, settings)
                log_p = kept if logits is None else logits.log_softmax(-1)
                slope = log_p.new_zeros(len(log_p), 1)  # d loss / d logits = p slope + onehot d_log_probs
                if d_log_probs is not None:
                    slope = slope - d_log_probs[part, None]
                if d_entropy is not None:
                    slope = (log_p + entropy[part, None]).mul_(-d_entropy[part, None]).add_(slope)
                if d_kl is not None and ref_head is not None:
                    log_q = _logits(ref_hidden[part], ref_head, settings).log_softmax(-1)
                    slope = (log_p - log_q).sub_(kl[part, None]).mul_(d_kl[part, None]).add_(slope)
                d_logits = log_p.exp().mul_(slope)
                if d_log_probs is not None:
                    d_logits.scatter_add_(-1, token_ids[part, None], d_log_probs[part, None])
                d_logits = _through_logits(d_logits, logits, settings)
                if d_hidden is not None:
                    d_hidden[part] = linear(d_logits.to(settings.dtype), head.weight.T)
                if wants_weight:
                    d_weight = _add_product(d_weight, d_logits.to(settings.dtype).T, hidden[part].to(settings.dtype))
                if wants_bias:
                    d_bias = d_logits.sum(0) if d_bias is None else d_bias + d_logits.sum(0)
        return None, None, d_hidden, d_weight, d_bias, None, None, None


def _slices(count: int, rows: int) -> list[slice]:
    """At least one, so that an empty batch has gradients (zeros) too."""
    return [slice(start, start + rows) for start in range(0, max(count, 1), rows)]


def _cast(weight: Tensor, bias: Tensor | None, softcap: float | None, dtype: torch.dtype) -> Head:
    return Head(weight.to(dtype), None if bias is None else bias.to(dtype), softcap)


def _logits(hidden: Tensor, head: Head, settings: _Settings) -> Tensor:
    """[n, V] at sampling temperature, at least float32."""
    logits = linear(hidden.to(settings.dtype), head.weight, head.bias)
    logits = logits.to(widened(settings.dtype))
    if head.softcap is not None:
        logits = logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits if settings.temperature == 1 else logits.div_(settings.temperature)


def _through_logits(d_logits: Tensor, logits: Tensor | None, settings: _Settings) -> Tensor:
    """From the gradient of the logits as sampled to that of hidden @ weight.T + bias, in place."""
    if settings.temperature != 1:
        d_logits.div_(settings.temperature)
    if settings.softcap is not None and logits is not None:
        bent = logits.mul_(settings.temperature / settings.softcap)  # tanh(x / softcap)
        d_logits.mul_(1 - bent.square_())
    return d_logits


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b, in place, at least float32."""
    if total is None:
        return linear(a, b.T).to(widened(a.dtype))
    if total.dtype == a.dtype:
        return total.addmm_(a, b)
    rows = WORDS_AT_ONCE if total.device.type == "cpu" else len(total)
    for part in _slices(len(total), rows):
        total[part].add_(a[part] @ b)
    return total


def widened(dtype: torch.dtype) -> torch.dtype:
    """At least float32: a bfloat16 log-softmax has two digits."""
    return torch.promote_types(dtype, torch.float32)


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's type for everything but float64, which autocast leaves alone too."""
    dtype, device = torch.promote_types(hidden.dtype, weight.dtype), hidden.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def _check_shapes(hidden: Tensor, head: Head, token_ids: Tensor, reference: tuple[Tensor, Head] | None) -> None:
    shapes = {"hidden": hidden, "head.weight": head.weight, "token_ids": token_ids}
    if reference is not None:
        shapes |= {"reference hidden": reference[0], "reference head.weight": reference[1].weight}
    fits = hidden.ndim == 2 and hidden.shape[1] == head.weight.shape[1] and token_ids.shape == hidden.shape[:1]
    if reference is not None:
        ref_hidden, ref_head = reference
        fits = (
            fits and len(ref_hidden) == len(hidden) and ref_head.weight.shape == (len(head.weight), ref_hidden.shape[1])
        )
    if not fits:
        given = ", ".join(f"{name} {list(x.shape)}" for name, x in shapes.items())
        raise InputError(f"hidden must be [N, H], head.weight [V, H] and token_ids [N], a reference alike; got {given}")
