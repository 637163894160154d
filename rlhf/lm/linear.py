"""Linear layers in float32 at a processor's full speed.

torch leaves their products to MKL, which uses 512-bit instructions on Intel's processors alone. oneDNN, which torch
carries too, for convolutions and bfloat16, uses them on all: 2.3 times as fast on an AMD EPYC of 2024
(`benchmarks/linear.py`). The results are the same to float32's rounding.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

WORTH = 2**20  # multiplications; of fewer, preparing oneDNN's call takes longer than it saves
PLAIN = (Tensor, nn.Parameter)  # not what only looks like a matrix: quantised, or spread over devices


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, by whichever library is faster: [..., K], [N, K], [N] -> [..., N].

    Gradients are those of `torch.nn.functional.linear`, but cannot be differentiated again.
    """
    if not _is_faster(x, weight):
        return F.linear(x, weight, bias)
    is_differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return _Linear.apply(x, weight, bias) if is_differentiated else _product(x, weight, bias)


def speed_up(*models: nn.Module) -> list[nn.Linear]:
    """Linear layers compute by `linear` from now on, and so do those of a copy: the layers that did not before.

    Nothing changes where MKL is as fast.
    """
    if not onednn_is_faster():
        return []
    layers = [
        module
        for model in models
        for module in model.modules()
        if type(module) is nn.Linear and "forward" not in module.__dict__
    ]
    for layer in layers:
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    return layers


@contextmanager
def sped_up(model: nn.Module) -> Iterator[None]:
    """Within: as after `speed_up`."""
    layers = speed_up(model)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@cache
def onednn_is_faster() -> bool:
    """An AMD processor with 512-bit instructions. Found by name, not by measuring, so that a run can be repeated."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _vendor()
    )


def _vendor() -> str:
    described = Path("/proc/cpuinfo")
    if not described.is_file():
        return platform.processor()
    with described.open() as lines:
        return next((line for line in lines if line.startswith("vendor_id")), "")


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def _is_faster(x: Tensor, weight: Tensor) -> bool:
    return (
        x.numel() * len(weight) >= WORTH
        and x.dtype == weight.dtype == torch.float32
        and type(x) in PLAIN
        and type(weight) in PLAIN
        and x.device.type == "cpu"
        and onednn_is_faster()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # which chooses for itself
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = d_out.reshape(-1, len(weight))
        return (
            _product(d_out, weight.T) if wants_x else None,
            _product(rows.T, x.reshape(-1, x.shape[-1]).T) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )
