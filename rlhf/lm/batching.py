"""Which sequences share a forward, and how their tokens lie in it.

A padded slot costs as much as a token. Sorted by length and cut by a budget of tokens, sequences of about one length
share a micro-batch; packed one behind the other into a single row, they need no padding at all.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

# padded: each sequence fills its row from the left, prompt and completion without a gap, padding behind them. No token
#     sees what comes after it, so there is no attention mask, and attention takes its fast path for causal masks.
# packed: all sequences in one row, positions restarted at each. transformers keeps them apart, told by the positions
#     alone: by sequence lengths with flash attention, by blocks with FlexAttention, by a dense mask otherwise.
# given: as the caller padded them, with an attention mask.
LayoutKind = Literal["packed", "padded", "given"]

CPU_TOKENS, GPU_TOKENS = 1024, 8192  # per micro-batch. The first is measured (docs/benchmarks.md, Updates)


class Layout(NamedTuple):
    """Tokens as a trunk takes them, and where to find the states that matter."""

    input_ids: Tensor  # [R, L] int64
    position_ids: Tensor | None  # [R, L] int64; None: 0, 1, ... in each row
    attention_mask: Tensor | None  # [R, L] int64
    states: Tensor  # [N] int64 into [R * L]: the token before each of the N actions, in the action mask's order


def lay_out(sequence_ids: Tensor, attention_mask: Tensor, action_mask: Tensor, kind: LayoutKind) -> Layout:
    """Arrange padded sequences for a forward. Padding may stand anywhere and hold anything; each action needs a token
    of its own sequence before it.

    Args:
        sequence_ids: [B, W] int64.
        attention_mask: [B, W] bool: tokens, not padding.
        action_mask: [B, T] bool, of the last T columns: actions, which are tokens too, or slots right after a token.
    """
    places = attention_mask.cumsum(-1) - 1  # of each token in its sequence
    width = sequence_ids.shape[1]
    if kind == "given":
        starts = torch.arange(len(sequence_ids), device=places.device)[:, None] * width
        before = starts + torch.arange(width, device=places.device) - 1
        states = before[:, width - action_mask.shape[1] :][action_mask]
        return Layout(sequence_ids, places.clamp(min=0), attention_mask.long(), states)
    lengths = attention_mask.sum(-1)
    if kind == "packed":
        starts = lengths.cumsum(0) - lengths
        input_ids = sequence_ids[attention_mask][None]
        position_ids = places[attention_mask][None]
    else:
        longest = int(lengths.max())
        starts = torch.arange(len(lengths), device=places.device) * longest
        first = sequence_ids.gather(1, attention_mask.int().argmax(-1, keepdim=True))
        input_ids = first.repeat(1, longest)  # padding by a token of the text: some models warn at the sight of others
        input_ids[torch.arange(longest, device=places.device) < lengths[:, None]] = sequence_ids[attention_mask]
        position_ids = None
    before = starts[:, None] + places - attention_mask.int()  # the last token before each slot
    return Layout(input_ids, position_ids, None, before[:, width - action_mask.shape[1] :][action_mask])


def micro_batches(lengths: Tensor, *, tokens: int | None, packed: bool) -> list[Tensor]:
    """Cut sequences into micro-batches, longest first, so that what is too large for memory shows at once.

    Args:
        lengths: [n] int, tokens of each sequence.
        tokens: at most so many in a micro-batch, padding included; a sequence longer than that stands alone. None:
            1,024 on a CPU, where more only adds padding; 8,192 elsewhere.
        packed: whether sequences are packed, so that there is no padding to count.
    Returns:
        [b] int64 indices into lengths each; together every index once.
    """
    if tokens is None:
        tokens = CPU_TOKENS if lengths.device.type == "cpu" else GPU_TOKENS
    order = lengths.argsort(descending=True, stable=True)
    sizes: list[int] = []
    used = longest = 0
    for length in lengths[order].tolist():
        cost = length if packed else max(longest, length)
        if not sizes or used + cost > tokens:
            sizes.append(0)
            used, longest, cost = 0, length, length
        sizes[-1] += 1
        used += cost
    return list(order.split(sizes)) if sizes else []
