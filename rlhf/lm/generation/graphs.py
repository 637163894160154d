"""Decoding steps as CUDA graphs: forward and sampling in one launch.

A graph is captured for a number of slots and of columns, both rounded up, and replayed while they suffice. It points at
the workspace and at the weights, which optimizers change in place, so that it sees each update; where weights were
moved, or another adapter is active, it is captured anew.
"""

import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from rlhf.checks import brief
from rlhf.lm.generation.decoding import Sampler, Workspace, decode_step
from rlhf.lm.generation.memory import is_out_of_memory


class DecodeGraphs:
    """The graphs of one engine, into one workspace at a time.

    Where the model waits for the device in its forward, which no graph can do, steps are plain from then on.

    Args:
        compile_step: compile the step first, for all slots and columns at once, so that it is compiled only once.
    """

    def __init__(self, compile_step: bool) -> None:
        self._step = torch.compile(decode_step, dynamic=False) if compile_step else decode_step
        self._is_compiled = compile_step
        self._is_refused = False
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._model_state: Hashable = None

    def begin(self, model: nn.Module, work: Workspace) -> None:
        """Before a call's first step: no slot runs; graphs of another state of the model go."""
        state = _addresses(model)
        if state != self._model_state:
            self.clear()
            self._model_state = state
        self.idle(work, 0)

    def clear(self) -> None:
        """Before the workspace goes."""
        self._graphs.clear()
        self._pool = self._model_state = None

    def idle(self, work: Workspace, running: int) -> None:
        """Slots past the running ones: their steps go to column 0 and to the result that nobody wants."""
        work.advance[running:] = 0
        work.state[:2, running:] = 0
        work.state[2, running:] = work.results

    def step(self, model: nn.Module, work: Workspace, sampler: Sampler, running: int, used: int) -> list[int]:
        """As `decode_step`; the graph's slots past the running ones are idle ones."""
        if self._is_refused:
            return decode_step(model, work, sampler, running, used).tolist()
        if self._is_compiled:
            slots, columns = work.slots, work.attention.columns
        else:
            up = 1 << (running - 1).bit_length() if running < 32 else -(-running // 32) * 32
            slots = min(up, work.slots)
            columns = min(-(-used // 128) * 128, work.attention.columns)
        key = (slots, columns, sampler.uniforms is None, sampler.temperature, sampler.truncation)
        if key not in self._graphs:
            at_once = sampler._replace(may_wait=False)
            if not self._rehearse(model, work, at_once, slots, columns):
                self._is_refused = True
                self.clear()
                return decode_step(model, work, sampler, running, used).tolist()
            self._graphs[key] = self._capture(model, work, at_once, slots, columns)
        self._graphs[key].replay()
        return work.state[0, :running].tolist()

    def _capture(
        self, model: nn.Module, work: Workspace, sampler: Sampler, slots: int, columns: int
    ) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Weights cast by autocast and cached before the capture would be gone at the replay.
        cache_enabled = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            # One pool for all: nothing in it is read after the replay that wrote it.
            with torch.cuda.graph(graph, pool=self._pool):
                self._step(model, work, sampler, slots, columns)
        finally:
            torch.set_autocast_cache_enabled(cache_enabled)
            work.attention.forget()
        self._pool = graph.pool()
        return graph

    def _rehearse(self, model: nn.Module, work: Workspace, sampler: Sampler, slots: int, columns: int) -> bool:
        """Whether the step can be captured; a warning where it cannot. The state that it advances is put back."""
        before = work.state.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(1 + self._is_compiled):  # what is compiled, chosen or loaded on first calls may wait
                    self._step(model, work, sampler, slots, columns)
                    work.state.copy_(before)
                try:
                    with _waiting_is_an_error():
                        self._step(model, work, sampler, slots, columns)
                except RuntimeError as error:
                    if is_out_of_memory(error):
                        raise
                    warnings.warn(
                        f"decoding without CUDA graphs, which this model's forward does not allow: {brief(error)}",
                        stacklevel=2,
                    )
                    return False
        finally:
            torch.cuda.current_stream().wait_stream(stream)
            work.state.copy_(before)
            work.attention.forget()
        return True


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    """Within: the host may not wait for the device. (Inside a capture it would be an error that ends the process.)"""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it does not find all that wait
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _addresses(model: nn.Module) -> Hashable:
    """Changes when weights move or adapters are switched, merged or scaled."""
    adapters = [
        f"{layer.disable_adapters} {layer.active_adapters} {layer.merged_adapters} {getattr(layer, 'scaling', None)}"
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
    ]
    return tuple(p.data_ptr() for p in model.parameters()), tuple(adapters)
