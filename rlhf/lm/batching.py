"""Which sequences share a forward, and how their tokens lie in it.

A padded slot costs as much as a token. Sorted by length and cut by a budget of tokens, sequences of about one length
share a micro-batch; packed one behind the other into a single row, they need no padding at all; and a prompt that
several completions share need stand there only once.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlhf.lm.shared_prompts import SharedRow, share_prompts

# padded: each sequence fills its row from the left, prompt and completion without a gap, padding behind them. No token
#     sees what comes after it, so there is no attention mask, and attention takes its fast path for causal masks.
# packed: all sequences in one row, positions restarted at each. transformers keeps them apart, told by the positions
#     alone: by sequence lengths with flash attention, by blocks with FlexAttention, by a dense mask otherwise.
# shared: all prompts, each once, then all completions, in one row; attention tells them apart (rlhf.lm.shared_prompts).
# given: as the caller padded them, with an attention mask.
LayoutKind = Literal["packed", "padded", "shared", "given"]

CPU_TOKENS, GPU_TOKENS = 1024, 8192  # per micro-batch. The first is measured (docs/benchmarks.md, Updates)
SHARING_PAYS = 0.1  # of all tokens: the least that sharing prompts has to save


class Layout(NamedTuple):
    """Tokens as a trunk takes them, and where to find the states that matter."""

    input_ids: Tensor  # [R, L] int64
    position_ids: Tensor | None  # [R, L] int64; None: 0, 1, ... in each row
    attention_mask: Tensor | None  # [R, L] int64
    states: Tensor  # [N] int64 into [R * L]: the token before each of the N actions, in the action mask's order
    shared: SharedRow | None = None  # which tokens attention has to show to which


def lay_out(sequence_ids: Tensor, attention_mask: Tensor, action_mask: Tensor, kind: LayoutKind) -> Layout:
    """Arrange padded sequences for a forward. Padding may stand anywhere and hold anything; each action needs a token
    of its own sequence before it.

    Args:
        sequence_ids: [B, W] int64.
        attention_mask: [B, W] bool: tokens, not padding.
        action_mask: [B, T] bool, of the last T columns: actions, which are tokens too, or slots right after a token.
    """
    if kind == "shared":
        row = share_prompts(sequence_ids, attention_mask, action_mask)
        return Layout(row.input_ids, row.position_ids, None, row.states, row)
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


class Prompts(NamedTuple):
    """With which prompt each of n sequences begins."""

    groups: Tensor  # [n] int64, equal for equal prompts
    lengths: Tensor  # [n] int64, tokens of the prompt


def micro_batches(lengths: Tensor, *, tokens: int | None, packed: bool, prompts: Prompts | None = None) -> list[Tensor]:
    """Cut sequences into micro-batches, longest first, so that what is too large for memory shows at once.

    Args:
        lengths: [n] int, tokens of each sequence.
        tokens: at most so many in a micro-batch, padding included; a sequence longer than that stands alone. None:
            1,024 on a CPU, where more only adds padding; 8,192 elsewhere.
        packed: whether sequences are packed, so that there is no padding to count.
        prompts: sequences with one prompt stay together as far as the budget allows, and it counts once; None: no
            prompt is shared. (Implies packed.)
    Returns:
        [b] int64 indices into lengths each; together every index once.
    """
    if tokens is None:
        tokens = CPU_TOKENS if lengths.device.type == "cpu" else GPU_TOKENS
    if prompts is not None:
        return _with_shared_prompts(lengths, prompts, tokens)
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


def _with_shared_prompts(lengths: Tensor, prompts: Prompts, tokens: int) -> list[Tensor]:
    """Groups by their longest sequence; one that would fit a micro-batch is not cut to fill the one before."""
    parts: list[list[int]] = []
    left = 0
    for rows, prompt, completions in _groups(lengths, prompts):
        if prompt + sum(completions) > left:
            parts.append([])
            left = tokens
        cost = prompt  # of the group in this micro-batch, before its first completion
        for row, completion in zip(rows, completions, strict=True):
            if parts[-1] and cost + completion > left:
                parts.append([])
                left, cost = tokens, prompt
            parts[-1].append(row)
            left -= cost + completion
            cost = 0
    return [torch.tensor(part, device=lengths.device) for part in parts]


def _groups(lengths: Tensor, prompts: Prompts) -> list[tuple[list[int], int, list[int]]]:
    """For each prompt its sequences, longest first, its tokens, and those of each completion; longest prompt and
    completion together first."""
    columns = [x.tolist() for x in (lengths, *prompts)]
    groups: dict[int, list[int]] = {}
    for row in lengths.argsort(descending=True, stable=True).tolist():
        groups.setdefault(columns[1][row], []).append(row)
    return [
        (rows, columns[2][rows[0]], [columns[0][row] - columns[2][row] for row in rows]) for rows in groups.values()
    ]


def shared_tokens(prompts: Prompts, parts: list[Tensor]) -> int:
    """What micro-batches with shared prompts need not compute: prompt tokens beyond the first of each prompt."""
    saved = 0
    for part in parts:
        lengths = prompts.lengths[part].tolist()
        saved += sum(lengths) - sum(dict(zip(prompts.groups[part].tolist(), lengths, strict=True)).values())
    return saved


def deal(lengths: Tensor, prompts: Prompts | None, processes: int) -> list[Tensor]:
    """Sequences to processes, so that all have about the same to do.

    Args:
        prompts: sequences with one prompt go to one process; None: each by itself.
    Returns:
        [n] int64 indices for each process, together every index once.
    """
    if prompts is None:
        order = lengths.argsort(descending=True, stable=True)
        return [order[process::processes] for process in range(processes)]
    shares: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    costs = [(prompt + sum(completions), rows) for rows, prompt, completions in _groups(lengths, prompts)]
    for cost, rows in sorted(costs, key=lambda x: -x[0]):
        lightest = loads.index(min(loads))
        loads[lightest] += cost
        shares[lightest] += rows
    return [torch.tensor(share, dtype=torch.int64, device=lengths.device) for share in shares]
