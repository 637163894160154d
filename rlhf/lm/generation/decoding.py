"""One decoding step of all running slots, and everything it reads and writes, at fixed addresses."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlhf.lm.generation.attention import LayerShape, SlotAttention
from rlhf.lm.generation.protocol import Truncation
from rlhf.lm.generation.sampling import choose


class Sampler(NamedTuple):
    uniforms: Tensor | None  # [B, T] float64
    temperature: float
    truncation: Truncation
    may_wait: bool = True  # whether a step may wait for the device's numbers; one that is captured cannot


class Workspace:
    """Everything that has an address: the cache, what each slot is at, and where results go.

    Results are flat, [results + 1]: request b's t-th token is at b * T + t, and the last place takes what nobody wants.
    """

    def __init__(self, slots: int, columns: int, results: int, shapes: list[LayerShape], device: torch.device) -> None:
        self.slots, self.results, self._layer_shapes = slots, results, shapes
        self.attention = SlotAttention(slots, columns, shapes, device)
        # Row 0: the token that goes in next; row 1: its column; row 2: where its successor goes among the results.
        self.state = torch.zeros(3, slots, dtype=torch.int64, device=device)
        self.advance = torch.zeros(slots, dtype=torch.int64, device=device)  # 1 for running slots, 0 for dead ones
        self.token_ids = torch.zeros(results + 1, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(results + 1, device=device)
        self.untruncated_log_probs = torch.zeros(results + 1, device=device)
        self.uniforms = torch.zeros(results + 1, dtype=torch.float64, device=device)

    @property
    def cache_bytes(self) -> int:
        return self.slots * self.attention.columns * sum(shape.bytes_per_token for shape in self._layer_shapes)

    def fits(self, slots: int, columns: int, results: int, shapes: list[LayerShape]) -> bool:
        needed, held = slots * columns, self.slots * self.attention.columns
        return (
            shapes == self._layer_shapes
            and self.slots >= slots
            and self.attention.columns >= columns
            and self.results >= results
            and held <= 4 * needed
        )


def decode_step(model: nn.Module, work: Workspace, sampler: Sampler, running: int, used: int) -> Tensor:
    """Forward, draw, write down, advance: [running] tokens. Shapes depend on `running` and `used` alone."""
    tokens, positions, places = work.state[:, :running].unbind()
    work.attention.decode(positions, used)
    logits = model(input_ids=tokens[:, None], position_ids=positions[:, None], use_cache=False).logits[:, -1]
    uniforms = None if sampler.uniforms is None else work.uniforms.index_select(0, places)
    choice = choose(
        logits, uniforms, temperature=sampler.temperature, truncation=sampler.truncation, may_wait=sampler.may_wait
    )
    work.token_ids.index_copy_(0, places, choice.tokens)
    work.log_probs.index_copy_(0, places, choice.sampler_log_probs)
    if not sampler.truncation.is_off:
        work.untruncated_log_probs.index_copy_(0, places, choice.untruncated_log_probs)
    tokens.copy_(choice.tokens)
    work.state[1:, :running] += work.advance[:running]
    return choice.tokens
