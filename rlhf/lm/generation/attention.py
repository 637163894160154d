"""Attention over a slot cache, for any model of transformers that goes through its AttentionInterface.

The model runs unmodified with `use_cache=False` and no mask; this attention function keeps each layer's keys and values
in [slots, kv_heads, columns, head_dim] and knows which slots a forward is about. Since no mask function is registered
under its name, transformers builds no mask either.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from rlhf.checks import InputError
from rlhf.lm.attention import attending_through, evaluating, hides_windows, ungrouped

NAME = "rlhf_slots"
REMEDY = "use the plain engine: --engine transformers"


class LayerShape(NamedTuple):
    """What one layer keeps of each token."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


class SlotAttention:
    """Keys and values of all layers, and attention over them.

    A slot's sequence starts at column 0; columns past its end hold leftovers that no query sees. Say what the next
    forward is about with `prefill` or `decode`, then run the model.

    Args:
        slots, columns: of the cache. shapes: of the layers; layers without one are added as they are met.
    """

    def __init__(self, slots: int, columns: int, shapes: list[LayerShape], device: torch.device) -> None:
        self.slots, self.columns, self.device = slots, columns, device
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for shape in shapes:
            self._add_layer(shape)
        self._is_decoding = False
        self._used = 0  # decode: columns looked at
        self._positions = torch.empty(0)  # decode: [n] column each of the first n slots writes and looks back from
        self._targets: Tensor | None = None  # prefill: [S] slots written
        self._sources: Tensor | None = None  # prefill: [S] row of the batch each of them gets
        # Shared by the layers of one forward: indices by number of heads, masks by window and dtype.
        self._rows: dict[int, Tensor] = {}
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def _add_layer(self, shape: LayerShape) -> None:
        self.keys.append(self._zeros(shape.kv_heads, shape.key_dim, shape.dtype, columns_last=False))
        columns_last = self.device.type == "cpu" and shape.dtype.itemsize >= 4  # see _attention
        self.values.append(self._zeros(shape.kv_heads, shape.value_dim, shape.dtype, columns_last))

    def _zeros(
        self, kv_heads: int, dim: int, dtype: torch.dtype, columns_last: bool, columns: int | None = None
    ) -> Tensor:
        """[slots, kv_heads, columns, dim], not garbage: what is masked is still multiplied by 0."""
        columns = columns or self.columns
        sizes = (self.slots, kv_heads) + ((dim, columns) if columns_last else (columns, dim))
        cache = torch.zeros(*sizes, dtype=dtype, device=self.device)
        return cache.transpose(2, 3) if columns_last else cache

    def shapes(self) -> list[LayerShape]:
        return [
            LayerShape(k.shape[1], k.shape[3], v.shape[3], k.dtype) for k, v in zip(self.keys, self.values, strict=True)
        ]

    def prefill(self, targets: Tensor, sources: Tensor) -> None:
        """The next forward reads prompts from their start, right-padded: slot targets[s] keeps row sources[s]."""
        self._is_decoding, self._targets, self._sources = False, targets, sources
        self._masks = {}

    def decode(self, positions: Tensor, used: int) -> None:
        """The next forward reads one token for each of the first n slots.

        Args:
            positions: [n] int64, the column it is written to; the query sees columns 0 to positions[i].
            used: all positions are below it.
        """
        self._is_decoding, self._positions, self._used = True, positions, used
        self._rows, self._masks = {}, {}

    def forget(self) -> None:
        """Indices and masks of the last forward."""
        self._rows, self._masks = {}, {}

    def grow(self, columns: int) -> None:
        """More columns for every slot. A row with few unused ones streams through a CPU twice as fast as a long one."""
        for caches in (self.keys, self.values):
            for layer, old in enumerate(caches):
                caches[layer] = self._zeros(old.shape[1], old.shape[3], old.dtype, _has_columns_last(old), columns)
                caches[layer][:, :, : self.columns] = old
        self.columns = columns

    def copy(self, sources: Tensor, targets: Tensor, used: int) -> None:
        """The first `used` columns of one slot to another, for all layers; the two sets of slots are disjoint."""
        for cache in (*self.keys, *self.values):
            part = cache[:, :, :used]
            part.index_copy_(0, targets, part.index_select(0, sources))

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """[B, heads, L, head_dim] queries, [B, kv_heads, L, head_dim] keys and values -> [B, L, heads, value_dim]."""
        if layer == len(self.keys):
            self._add_layer(LayerShape(key.shape[1], key.shape[3], value.shape[3], key.dtype))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if self._is_decoding:
            return self._attend_decoding(layer, query, key, value, scale, sliding_window, softcap)
        assert self._targets is not None
        assert self._sources is not None
        for cache, new in ((self.keys[layer], key), (self.values[layer], value)):
            cache[:, :, : new.shape[2]].index_copy_(0, self._targets, new.index_select(0, self._sources))
        length = query.shape[2]
        window = sliding_window if sliding_window is not None and sliding_window < length else None
        if softcap is not None:
            mask = self._prefill_mask(length, window, query.dtype)
            key, value = ungrouped(query, key, value)
            return _attention(query, key, value, mask, scale, softcap).transpose(1, 2)
        # Grouped keys are taken by the CPU's kernel and by flash attention, which has no float32 and no mask.
        if query.device.type != "cpu" and (query.dtype.itemsize > 2 or window is not None):
            key, value = ungrouped(query, key, value)
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if window is None else self._prefill_mask(length, window, query.dtype),
            is_causal=window is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2)

    def _attend_decoding(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        keys, values = self.keys[layer], self.values[layer]
        count, heads, _, head_dim = query.shape
        kv_heads = keys.shape[1]
        rows = self._rows.get(kv_heads)
        if rows is None:
            starts = torch.arange(count * kv_heads, device=query.device).view(count, kv_heads) * self.columns
            rows = self._rows[kv_heads] = (starts + self._positions[:, None]).view(-1)
        keys.view(-1, keys.shape[3]).index_copy_(0, rows, key.reshape(-1, keys.shape[3]))
        if _has_columns_last(values):
            values[torch.arange(count), :, self._positions] = value[:, :, 0]
        else:
            values.view(-1, values.shape[3]).index_copy_(0, rows, value.reshape(-1, values.shape[3]))
        # The queries that share keys lie along the query axis, so that the cache is read once and never repeated.
        out = _attention(
            query.reshape(count, kv_heads, heads // kv_heads, head_dim),
            keys[:count, :, : self._used],
            values[:count, :, : self._used],
            self._decode_mask(window, query.dtype),
            scale,
            softcap,
        )
        return out.reshape(count, 1, heads, values.shape[3])

    def _decode_mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[n, 1, 1, used] 0 where a query looks, -inf elsewhere."""
        window = window if window is not None and window < self._used else None
        mask = self._masks.get((window, dtype))
        if mask is None:
            columns = torch.arange(self._used, device=self.device)
            hidden = columns > self._positions[:, None]
            if window is not None:
                hidden |= columns <= self._positions[:, None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(hidden, -torch.inf)
            mask = self._masks[window, dtype] = mask[:, None, None]
        return mask

    def _prefill_mask(self, length: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """[1, 1, L, L] causal, within the window: 0 where a query looks, -inf elsewhere."""
        mask = self._masks.get((window, dtype))
        if mask is None:
            seen = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
            if window is not None:
                seen = seen.triu(1 - window)
            mask = torch.zeros(length, length, dtype=dtype, device=self.device).masked_fill_(~seen, -torch.inf)
            mask = self._masks[window, dtype] = mask[None, None]
        return mask


def _has_columns_last(cache: Tensor) -> bool:
    """Whether one number of all tokens lies together, and not all numbers of one token."""
    return cache.stride(2) < cache.stride(3)


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    """[B, heads, Q, D], [B, heads, K, D], [B, heads, K, Dv], additive mask -> [B, heads, Q, Dv].

    Written out where scores are capped, and on CPUs, where a decoding step's few queries per head are too few for the
    fused kernel's blocks (1.2 to 1.5 times slower for 2 or 3). For a sequence or two in bfloat16 that kernel would be
    faster; but which one a sequence meets must not depend on how many others run, since they round differently.
    """
    if softcap is None and query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    batch, heads = query.shape[:2]
    # Keys first, and values where their columns lie together: with few queries, MKL then reads the cache once, in
    # order, and multiplies long rows by a few columns (twice as fast for 2 queries).
    scores = torch.bmm(key.flatten(0, 1), (query * scale).flatten(0, 1).transpose(1, 2))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32)).transpose(1, 2).contiguous()
    weights = wide.unflatten(0, (batch, heads)).add_(mask).softmax(-1).to(value.dtype).flatten(0, 1)
    if _has_columns_last(value):
        out = torch.bmm(value.flatten(0, 1).transpose(1, 2), weights.transpose(1, 2)).transpose(1, 2)
    else:
        out = torch.bmm(weights, value.flatten(0, 1))
    return out.unflatten(0, (batch, heads))


class _Generation(threading.local):
    """The one in progress, in this thread."""

    attention: SlotAttention | None = None


_current = _Generation()


def _slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers."""
    active = _current.attention
    if active is None:
        raise RuntimeError(f"attention {NAME!r} was used outside a generation of the slot engine")
    if others.get("s_aux") is not None:
        raise InputError(f"the slot engine has no attention sinks, which {type(module).__name__} has: {REMEDY}")
    if attention_mask is not None or others.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise InputError(
            f"the slot engine's attention is causal and takes no other mask, {type(module).__name__} asks for one: "
            f"{REMEDY}"
        )
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int) or layer > len(active.keys):
        raise InputError(f"the slot engine cannot tell the layers of {type(module).__name__} apart: {REMEDY}")
    if torch.is_autocast_enabled(query.device.type):  # as in transformers' own; rotary embeddings widen the keys
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return active.attend(layer, query, key, value, scaling, sliding_window, softcap), None


AttentionInterface.register(NAME, _slot_attention)


@contextmanager
def attending(model: nn.Module, attention: SlotAttention) -> Iterator[None]:
    """Within: the model attends through `attention`, in eval mode. Afterwards everything is as it was."""
    outer = _current.attention
    with evaluating(model), attending_through(model, NAME):
        try:
            _current.attention = attention
            yield
        finally:
            _current.attention = outer


def has_layers_of_8_bits(model: nn.Module) -> bool:
    """bitsandbytes', which round what they are given, and on CUDA wait for the device to look for outliers in it."""
    return any(type(module).__name__ == "Linear8bitLt" for module in model.modules())


def check_supported(model: nn.Module) -> None:
    """What can be known of a model without running it.

    Raises:
        InputError: it is not a decoder whose attention can be replaced.
    """
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if inner is None:
        raise InputError(f"the slot engine drives transformers models, got {type(model).__name__}")
    name, config = type(inner).__name__, inner.config.get_text_config(decoder=True)
    if inner.config.is_encoder_decoder:
        raise InputError(f"the slot engine drives decoder-only models, {name} has an encoder: {REMEDY}")
    if not inner._supports_attention_backend:
        raise InputError(f"{name} does not take its attention from transformers' AttentionInterface: {REMEDY}")
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        raise InputError(f"{name} has layers of type {', '.join(sorted(other))}, which keep no slot cache: {REMEDY}")
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise InputError(f"the slot engine has no virtual tokens, which this adapter puts before a prompt: {REMEDY}")


@torch.no_grad()
def probe(model: nn.Module, token_ids: Tensor) -> list[LayerShape]:
    """Run a few tokens both ways: what the layers keep, and whether the slots' logits are the model's own.

    Args:
        token_ids: [1, L] int64, L >= 2.
    Raises:
        InputError: they are not.
    """
    check_supported(model)
    inner = next(m for m in model.modules() if isinstance(m, PreTrainedModel))
    name = type(inner).__name__
    if hides_windows(inner):
        raise InputError(f"{name} has a sliding window that its attention function is not told of: {REMEDY}")
    positions = torch.arange(token_ids.shape[1], device=token_ids.device)[None]
    attention = SlotAttention(1, token_ids.shape[1], [], token_ids.device)
    with attending(model, attention):
        only = torch.zeros(1, dtype=torch.int64, device=token_ids.device)
        attention.prefill(only, only)
        first = model(input_ids=token_ids[:, :-1], position_ids=positions[:, :-1], use_cache=False).logits
        attention.decode(positions[0, -1:], token_ids.shape[1])
        last = model(input_ids=token_ids[:, -1:], position_ids=positions[:, -1:], use_cache=False).logits
    layers, expected_layers = len(attention.keys), inner.config.get_text_config(decoder=True).num_hidden_layers
    if layers != expected_layers:
        raise InputError(
            f"{name} has {expected_layers} layers, of which {layers} took their attention from transformers' "
            f"AttentionInterface: {REMEDY}"
        )
    with evaluating(model):
        expected = model(
            input_ids=token_ids, attention_mask=torch.ones_like(token_ids), position_ids=positions, use_cache=False
        ).logits
    difference = torch.cat([first, last], 1).double().softmax(-1) - expected.double().softmax(-1)
    distance = float(difference.abs().sum(-1).max()) / 2
    # Rounding alone made 0.21 of a trained bfloat16 model.
    exact = all(shape.dtype.itemsize >= 4 for shape in attention.shapes()) and not has_layers_of_8_bits(model)
    if math.isnan(distance):
        raise InputError(
            f"{name}'s predictions are not numbers (NaN): look at its weights, or load it in another dtype"
        )
    if distance >= (0.01 if exact else 0.5):
        raise InputError(
            f"{name}'s predictions through the slot engine's attention differ from its own (total variation "
            f"{distance:.3f}): it does more than the causal attention, windows and caps that the engine knows; {REMEDY}"
        )
    return attention.shapes()
