"""Linear layers at a processor's full speed, by oneDNN, which torch carries beside MKL (`benchmarks/linear.py`).

In float32 torch leaves their products to MKL, which uses 512-bit instructions on Intel's processors alone. oneDNN uses
them on all: 2.3 times as fast on an AMD EPYC of 2024. The results are the same to float32's rounding.

In bfloat16 torch does use oneDNN, which lays a matrix out anew for each product. Where the same one is multiplied again
and again, by few rows, as in generation, that is half of the time; `packed` does it once. The results are the same.
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
PACKED_FROM = 2**17  # numbers in a matrix; smaller ones are multiplied by a single row before oneDNN has begun
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


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Within, in inference mode: linear layers multiply by copies of their present weights, in oneDNN's own layout."""
    layers = _packable(model)
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layout = torch.ops.mkldnn._reorder_linear_weight.default(layer.weight)
            layer.forward = partial(_forward_packed, layout, layer.bias)  # type: ignore[method-assign]
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is not None:
                layer.forward = forward  # type: ignore[method-assign]
            elif "forward" in layer.__dict__:
                del layer.forward


def packed_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """What the copies take on a CPU, if the model computes in this type."""
    return dtype.itemsize * sum(layer.weight.numel() for layer in _large(model)) if _gains_from_packing(dtype) else 0


def _packable(model: nn.Module) -> list[nn.Linear]:
    """Whose `forward` is torch's or ours, not somebody else's."""
    found = ((layer, layer.__dict__.get("forward")) for layer in _large(model))
    return [
        layer
        for layer, forward in found
        if _is_packable(layer.weight) and (forward is None or getattr(forward, "func", None) is _forward)
    ]


def _large(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if type(m) is nn.Linear and m.weight.numel() >= PACKED_FROM]


def _is_packable(weight: Tensor) -> bool:
    is_cast = torch.is_autocast_enabled("cpu") and weight.dtype != torch.get_autocast_dtype("cpu")  # in every product
    return type(weight) in PLAIN and weight.device.type == "cpu" and not is_cast and _gains_from_packing(weight.dtype)


def _gains_from_packing(dtype: torch.dtype) -> bool:
    return onednn_is_faster() if dtype == torch.float32 else dtype == torch.bfloat16 and has_bfloat16()


@cache
def has_bfloat16() -> bool:
    """Whether torch multiplies bfloat16 matrices by oneDNN here."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


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


def _forward_packed(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return _product(x.to(weight.dtype), weight, bias)


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
