"""Completions of one prompt in one forward that reads the prompt once: fewer tokens through every layer, forward and
backward, and the same states and gradients to rounding.

    one row:    prompt A | prompt B | completion A1 | completion A2 | completion B1 | ...      no padding
    attention:  prompts by themselves; each completion over its own prompt's keys and its own

The row goes through the model as one packed sequence with positions counted along each prompt and completion. Only the
attention has to know: its function, registered with transformers' AttentionInterface, gathers queries, keys and values
into padded blocks for two calls of the device's attention kernel. No block is larger than the unshared one would be.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from rlhf.checks import InputError
from rlhf.lm.attention import attending_through, ungrouped

NAME = "rlhf_shared_prompts"


@dataclass(frozen=True)
class SharedRow:
    """U different prompts (at most P tokens) and B completions (at most C tokens) as one row of N tokens.

    Blocks name tokens by their place in the row; what is padding in a block names token 0 and is looked at by nobody.
    """

    input_ids: Tensor  # [1, N] int64
    position_ids: Tensor  # [1, N] int64, from 0 in each sequence
    states: Tensor  # [A] int64: the token before each of the A actions
    prompts: Tensor  # [U, P] int64, right-padded
    completions: Tensor  # [B, C] int64, right-padded: queries
    keys: Tensor  # [B, P + C] int64: what the completions look at
    is_key: Tensor  # [B, P + C] bool: no padding
    query_positions: Tensor  # [B, C] int64, in the sequence
    key_positions: Tensor  # [B, P + C] int64
    back: Tensor  # [N] int64: each token's place in the two blocks' results, [U * P + B * C]
    masks: dict[Any, tuple[Tensor | None, Tensor]] = field(default_factory=dict)  # of all layers: see `_masks`


def share_prompts(sequence_ids: Tensor, attention_mask: Tensor, action_mask: Tensor) -> SharedRow:
    """Lay out padded sequences; see `rlhf.lm.batching.lay_out`. Prompts are the columns before the action mask's, and
    equal if the same columns hold the same tokens."""
    columns = action_mask.shape[1]
    prompt_mask, completion_mask = attention_mask[:, :-columns], attention_mask[:, -columns:]
    groups = prompt_groups(sequence_ids, attention_mask, columns)
    count = int(groups.max()) + 1
    first = torch.zeros(count, dtype=torch.int64, device=groups.device)
    first[groups] = torch.arange(len(groups), device=groups.device)  # whichever of a group's rows: all hold its prompt
    ids, mask = sequence_ids[:, :-columns][first], prompt_mask[first]
    prompt_lengths, lengths = mask.sum(-1), completion_mask.sum(-1)
    starts = torch.cat([prompt_lengths, lengths]).cumsum(0) - torch.cat([prompt_lengths, lengths])
    prompt_starts, completion_starts = starts[:count], starts[count:]

    longest = (max(int(x.max()), 1) for x in (prompt_lengths, lengths))
    in_prompt, in_completion = (torch.arange(n, device=groups.device) for n in longest)
    is_prompt, is_completion = in_prompt < prompt_lengths[:, None], in_completion < lengths[:, None]
    prompts = torch.where(is_prompt, prompt_starts[:, None] + in_prompt, 0)
    completions = torch.where(is_completion, completion_starts[:, None] + in_completion, 0)

    before = prompt_lengths[groups][:, None]
    # The token before a slot: of its completion, or for the first one the prompt's last.
    at = completion_mask.cumsum(-1) - completion_mask.int()
    last = (prompt_starts + prompt_lengths - 1)[groups]
    previous = torch.where(at > 0, completion_starts[:, None] + at - 1, last[:, None])
    return SharedRow(
        input_ids=torch.cat([ids[mask], sequence_ids[:, -columns:][completion_mask]])[None],
        position_ids=torch.cat([(mask.cumsum(-1) - 1)[mask], (before + at)[completion_mask]])[None],
        states=previous[action_mask],
        prompts=prompts,
        completions=completions,
        keys=torch.cat([prompts[groups], completions], -1),
        is_key=torch.cat([is_prompt[groups], is_completion], -1),
        query_positions=before + in_completion,
        key_positions=torch.cat([in_prompt.expand(len(groups), -1), before + in_completion], -1),
        back=torch.cat([is_prompt.flatten(), is_completion.flatten()]).nonzero().squeeze(-1),
    )


def prompt_groups(sequence_ids: Tensor, attention_mask: Tensor, columns: int) -> Tensor:
    """[B] int64, equal for sequences whose tokens before the last `columns` columns are the same: 0, 1, ..."""
    kept = torch.where(attention_mask[:, :-columns], sequence_ids[:, :-columns], -1)
    return kept.unique(dim=0, return_inverse=True)[1]


# -- attention --------------------------------------------------------------------------------------------------------


class _Forward(threading.local):
    """The one in progress, in this thread."""

    row: tuple[nn.Module, SharedRow] | None = None


_current = _Forward()


@contextmanager
def attending(model: nn.Module, row: SharedRow) -> Iterator[None]:
    """Within: the model's attention takes its tokens to be this row."""
    outer = _current.row
    with attending_through(model, NAME):
        try:
            _current.row = (model, row)
            yield
        finally:
            _current.row = outer


def active() -> tuple[nn.Module, SharedRow] | None:
    """What `attending` was given, for a layer that is to be computed a second time; None outside it."""
    return _current.row


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """[1, heads, N, D] queries, [1, kv_heads, N, D] keys and values -> [1, N, heads, D]."""
    active = _current.row
    if active is None:
        raise RuntimeError(f"attention {NAME!r} was used outside a forward over shared prompts")
    is_causal = others.get("is_causal") is not False and getattr(module, "is_causal", True) is not False
    if not is_causal or attention_mask is not None or others.get("s_aux") is not None or dropout:
        raise InputError(f"{type(module).__name__} asks for more than causal attention in windows, or for dropout")
    if torch.is_autocast_enabled(query.device.type):  # as in transformers' own; rotary embeddings widen the keys
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    row = active[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    prompt_mask, mask = _masks(row, sliding_window, query.dtype, written_out=softcap is not None)
    q, k, v = (x[0].transpose(0, 1).flatten(1) for x in (query, key, value))

    def block(x: Tensor, places: Tensor, like: Tensor) -> Tensor:
        # An embedding's backward is the fastest of the kernels that add up rows.
        return F.embedding(places, x).unflatten(-1, (like.shape[1], like.shape[3])).transpose(1, 2)

    of_prompts = (block(q, row.prompts, query), block(k, row.prompts, key), block(v, row.prompts, value))
    of_completions = (block(q, row.completions, query), block(k, row.keys, key), block(v, row.keys, value))
    out = torch.cat(
        [
            _attention(*of_prompts, prompt_mask, scale, softcap).transpose(1, 2).flatten(0, 1),
            _attention(*of_completions, mask, scale, softcap).transpose(1, 2).flatten(0, 1),
        ]
    )
    return F.embedding(row.back, out.flatten(1)).unflatten(-1, out.shape[1:])[None], None


AttentionInterface.register(NAME, attention)


def _masks(
    row: SharedRow, window: int | None, dtype: torch.dtype, *, written_out: bool
) -> tuple[Tensor | None, Tensor]:
    """For prompts [1, 1, P, P], None for the kernel's own causal one, and for completions [B, 1, C, P + C]: 0 where a
    query looks, -inf elsewhere."""
    key = (window, dtype, written_out)
    if key not in row.masks:
        in_prompt = torch.arange(row.prompts.shape[1], device=row.prompts.device)
        past = in_prompt[:, None] - in_prompt
        queries, keys = (
            row.query_positions[:, :, None],
            row.key_positions[:, None, :],
        )
        seen, sees = past >= 0, row.is_key[:, None] & (keys <= queries)
        if window is not None:
            seen, sees = seen & (past < window), sees & (keys > queries - window)
        needs_mask = written_out or (window is not None and window < len(in_prompt))
        row.masks[key] = (_additive(seen[None, None], dtype) if needs_mask else None, _additive(sees[:, None], dtype))
    return row.masks[key]


def _additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    sees = sees | ~sees.any(-1, keepdim=True)  # padding that sees nothing would have NaN, which a gradient of 0 keeps
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, -torch.inf)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """[b, heads, Q, D], [b, kv_heads, K, D] twice, additive mask (None: causal) -> [b, heads, Q, D]."""
    if softcap is not None or query.device.type != "cpu":
        # The CPU's kernel takes grouped ones as they are; those of GPUs that take a mask do not.
        key, value = ungrouped(query, key, value)
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
    assert mask is not None
    scores = torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap)) * softcap + mask
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype) @ value
