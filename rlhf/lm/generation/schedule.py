"""Which request sits in which slot: plain Python, no tensors but those of the requests."""

from collections import deque
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedConfig

from rlhf.checks import InputError
from rlhf.lm.attention import check_rope, positions


class Requests(NamedTuple):
    """What is to be completed, with equal prompts found."""

    prompts: list[list[int]]  # the different ones, in order of first appearance
    prompt_of: list[int]  # [B] index of each request's prompt
    limits: list[int]  # [B] tokens it may have
    columns: int  # of the longest prompt and its longest completion

    @classmethod
    def of(cls, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int | Tensor) -> "Requests":
        """From padded prompts; see `Engine.generate`.

        Raises:
            InputError: a prompt or a completion would have no token.
        """
        rows = zip(prompt_ids.tolist(), prompt_mask.tolist(), strict=True)
        tokens = [tuple(token for token, is_kept in zip(*row, strict=True) if is_kept) for row in rows]
        limits = max_new_tokens.tolist() if isinstance(max_new_tokens, Tensor) else [max_new_tokens] * len(tokens)
        if not tokens or not all(tokens) or len(limits) != len(tokens) or min(limits) < 1:
            raise InputError(
                f"each request needs at least one prompt token and one new token, got {len(tokens)} prompts, "
                f"{sum(not row for row in tokens)} of them empty, and limits {limits[:8]}"
            )
        index: dict[tuple[int, ...], int] = {}
        prompt_of = [index.setdefault(row, len(index)) for row in tokens]
        columns = max(len(row) + limit for row, limit in zip(tokens, limits, strict=True))
        return cls([list(row) for row in index], prompt_of, limits, columns)

    def check_fit(self, model_config: PreTrainedConfig) -> None:
        """
        Raises:
            InputError: a prompt and its completion are longer than the model can read.
        """
        limit = positions(model_config)
        if limit is not None and self.columns > limit:
            raise InputError(
                f"the longest prompt and its completion have {self.columns} tokens, more than the model's {limit} "
                "positions: shorten the prompts or pass a smaller --max-new-tokens"
            )
        check_rope(model_config, self.columns)

    def prefill_batches(self, prompts: list[int], max_tokens: int) -> list[list[int]]:
        """Prompts of similar length together: at most a quarter of a row is padding, and max_tokens bounds a batch."""
        batches: list[list[int]] = []
        longest = 0
        for prompt in sorted(prompts, key=lambda p: -len(self.prompts[p])):
            length = len(self.prompts[prompt]) - 1
            if length == 0:
                continue
            if batches and 4 * length >= 3 * longest and (len(batches[-1]) + 1) * longest <= max_tokens:
                batches[-1].append(prompt)
            else:
                batches.append([prompt])
                longest = length
        return batches


class Admission(NamedTuple):
    """Slots that got a new request, and where their prompts come from."""

    slots: list[int]
    copies: list[tuple[int, int, list[int]]]  # prompt, the slot that holds it, the slots that want it
    reads: dict[int, list[int]]  # prompt -> the slots that want it; no slot holds it


class Schedule:
    """Slots 0 to running - 1 are at work, whenever `admit` and `compact` have been called since the last `free`."""

    def __init__(self, requests: Requests, slots: int) -> None:
        self.requests = requests
        order = sorted(range(len(requests.prompt_of)), key=requests.prompt_of.__getitem__)  # equal prompts in a row
        self._waiting = deque(order)
        self._free = list(range(slots))
        self.request_of = [-1] * slots
        self._holds = [-1] * slots  # the prompt at the start of each slot's columns
        self._step = 0
        self._started = [0] * slots  # the step before its first
        self._ends = [0] * slots  # the step that makes its last token
        self._offset = [0] * slots  # column = offset + step
        self.running = 0
        self.longest = 0  # the highest column the next step writes
        self._next_end = 0

    def admit(self) -> Admission:
        """Give free slots to waiting requests."""
        count = min(len(self._free), len(self._waiting))
        chosen = [self._waiting.popleft() for _ in range(count)]
        free_holders: dict[int, list[int]] = {}
        for slot in self._free:
            free_holders.setdefault(self._holds[slot], []).append(slot)
        slots: list[int] = []
        rest = []
        for request in chosen:  # first those whose prompt a free slot still holds
            holders = free_holders.get(self.requests.prompt_of[request])
            if holders:
                slots.append(holders.pop())
                self._seat(slots[-1], request)
            else:
                rest.append(request)
        taken = set(slots)
        self._free = [slot for slot in self._free if slot not in taken]
        # No free slot holds a prompt of the rest, so that none of the holders found here is about to be overwritten.
        holder = dict(zip(self._holds, range(len(self._holds)), strict=True))
        wanted: dict[int, list[int]] = {}
        for request, slot in zip(rest, self._free, strict=False):
            wanted.setdefault(self.requests.prompt_of[request], []).append(slot)
            self._seat(slot, request)
        slots += self._free[: len(rest)]
        del self._free[: len(rest)]
        copies = [(prompt, holder[prompt], targets) for prompt, targets in wanted.items() if prompt in holder]
        reads = {prompt: targets for prompt, targets in wanted.items() if prompt not in holder}
        if count:
            self._refresh()
        return Admission(slots, copies, reads)

    def _seat(self, slot: int, request: int) -> None:
        prompt = self.requests.prompt_of[request]
        self.request_of[slot], self._holds[slot] = request, prompt
        self._started[slot] = self._step
        self._ends[slot] = self._step + self.requests.limits[request]
        self._offset[slot] = len(self.requests.prompts[prompt]) - 1 - self._step

    def _refresh(self) -> None:
        live = [slot for slot, request in enumerate(self.request_of) if request >= 0]
        self.running = len(live)
        self._longest_offset = max((self._offset[slot] for slot in live), default=0)
        self._next_end = min((self._ends[slot] for slot in live), default=0)
        self.longest = self._longest_offset + self._step

    def advance(self, tokens: list[int], eos: frozenset[int]) -> list[int]:
        """A step was made: the slots that it ended."""
        self._step += 1
        self.longest += 1
        if self._step < self._next_end and eos.isdisjoint(tokens):
            return []
        return [slot for slot, token in enumerate(tokens) if token in eos or self._ends[slot] == self._step]

    def length_of(self, slot: int) -> int:
        return self._step - self._started[slot]

    def free(self, slots: list[int]) -> None:
        for slot in slots:
            self.request_of[slot] = -1
        self._free = sorted([*self._free, *slots])
        self._refresh()

    def compact(self) -> list[tuple[int, int]]:
        """Move the last running slots into free ones before them: (from, to), to be done at once."""
        moves = []
        gaps = [slot for slot in self._free if slot < self.running]
        last = [slot for slot in range(self.running, len(self.request_of)) if self.request_of[slot] >= 0]
        for source, target in zip(last, gaps, strict=True):
            for column in (self.request_of, self._holds, self._started, self._ends, self._offset):
                column[target] = column[source]
            self.request_of[source] = -1
            moves.append((source, target))
        if moves:
            moved = {target for _, target in moves}
            self._free = sorted([*(s for s in self._free if s not in moved), *(source for source, _ in moves)])
        return moves
