"""Linear layers at a CPU's full speed, by oneDNN, which torch carries beside MKL (`benchmarks/linear.py`).

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

WORTH = 2**21  # multiplications; of fewer, preparing oneDNN's call takes longer than it saves
# In inference mode the matrix decides alone, by its numbers, so that a row's result hardly depends on how many others
# there are; smaller ones are multiplied by a row before oneDNN has begun.
STEADY_FROM = 2**16
PACKED_FROM = {torch.float32: 2**17, torch.bfloat16: 1}  # numbers; bfloat16 is oneDNN's in any case
PLAIN = (Tensor, nn.Parameter)  # not what only looks like a matrix: quantised, or spread over devices


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, by whichever library is faster: [..., K], [N, K], [N] -> [..., N].

    Gradients are those of `torch.nn.functional.linear`, but cannot be differentiated again, nor forwards.
    """
    if torch.compiler.is_compiling() or not _is_faster(x, weight, bias):  # what is compiled chooses for itself
        return F.linear(x, weight, bias)
    is_differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return _Linear.apply(x, weight, bias) if is_differentiated else _product(x, weight, bias)


class FastLinear(nn.Linear):
    """A linear layer that computes by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


LINEAR = (nn.Linear, FastLinear)  # layers that do no more than multiply


def speed_up(*models: nn.Module) -> list[nn.Linear]:
    """Linear layers on an AMD processor compute by `linear` from now on; returns those that did not before."""
    if not onednn_is_faster():
        return []
    layers = [
        module
        for model in models
        for module in model.modules()
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and "forward" not in module.__dict__
    ]
    for layer in layers:
        layer.__class__ = FastLinear
    return layers


@contextmanager
def sped_up(model: nn.Module) -> Iterator[None]:
    """Within: as after `speed_up`."""
    layers = speed_up(model)
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Within, in inference mode: linear layers multiply by copies of their present weights, in oneDNN's own layout.
    Where memory runs out, they do not."""
    layers = [layer for layer in _linear_layers(model) if _is_packable(layer)]
    try:
        try:
            for layer in layers:
                layout = torch.ops.mkldnn._reorder_linear_weight.default(layer.weight)
                layer.forward = partial(_forward_packed, layer, layout)  # type: ignore[method-assign]
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):
                raise
            _unpack(layers)
        yield
    finally:
        _unpack(layers)


def _unpack(layers: list[nn.Linear]) -> None:
    for layer in layers:
        layer.__dict__.pop("forward", None)


def packed_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """What the copies take on a CPU, if the model computes in this type."""
    sizes = [layer.weight.numel() for layer in _linear_layers(model)]
    return dtype.itemsize * sum(size for size in sizes if _gains_from_packing(dtype, size))


def _linear_layers(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear) and type(module) in LINEAR]


def _is_packable(layer: nn.Linear) -> bool:
    """Not where somebody else has changed how it computes."""
    dtype = layer.weight.dtype
    is_cast = torch.is_autocast_enabled("cpu") and dtype != torch.get_autocast_dtype("cpu")  # every time
    is_ours = "forward" not in layer.__dict__ and not layer._forward_pre_hooks
    gains = _gains_from_packing(dtype, layer.weight.numel())
    return is_ours and not is_cast and gains and _fits(layer.weight, layer.bias)


def _gains_from_packing(dtype: torch.dtype, numbers: int) -> bool:
    if numbers < PACKED_FROM.get(dtype, numbers + 1):
        return False
    return onednn_is_faster() if dtype == torch.float32 else has_bfloat16()


@cache
def has_bfloat16() -> bool:
    """Whether the processor has instructions for it, and torch multiplies such matrices by oneDNN."""
    if not torch.backends.mkldnn.is_available() or not torch.cpu._is_avx512_bf16_supported():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


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


def _forward_packed(layer: nn.Linear, layout: Tensor, x: Tensor) -> Tensor:
    if x.dtype != layout.dtype and not torch.is_autocast_enabled("cpu"):
        return F.linear(x, layer.weight, layer.bias)  # says what is wrong
    return _product(x.to(layout.dtype), layout, layer.bias)


def _is_faster(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    is_steady = torch.is_inference_mode_enabled()
    return (
        (weight.numel() >= STEADY_FROM and x.numel() > 0 if is_steady else x.numel() * len(weight) >= WORTH)
        and x.dtype == weight.dtype == torch.float32
        and _fits(weight, bias)
        and type(x) in PLAIN
        and x.device.type == "cpu"
        and x.shape[-1] == weight.shape[1]
        and onednn_is_faster()
        and not torch.is_autocast_enabled("cpu")
    )


def _fits(weight: Tensor, bias: Tensor | None) -> bool:
    """What oneDNN is not asked about: it would read past the end."""
    if type(weight) not in PLAIN or weight.device.type != "cpu" or weight.dim() != 2:
        return False
    return bias is None or (
        bias.device.type == "cpu"
        and bias.dtype == weight.dtype
        and bias.shape == (len(weight),)
        and bias.is_contiguous()
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if _missing(x.numel() // x.shape[-1]) == 0:
        return _multiplied(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    return _multiplied(_lengthened(rows), weight, bias)[: len(rows)].view(*x.shape[:-1], -1)


def _multiplied(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(rows, weight, bias, "none", [], "")
    return product


def _lengthened(rows: Tensor) -> Tensor:
    """With rows of zeros up to a round number."""
    missing = _missing(len(rows))
    if missing == 0:
        return rows
    longer = rows.new_empty(len(rows) + missing, rows.shape[1])
    longer[: len(rows)] = rows
    longer[len(rows) :] = 0
    return longer


def _missing(rows: int) -> int:
    """To a round number. oneDNN makes a program for each number of rows, which takes milliseconds and splits the free
    memory, and keeps the last 1,024."""
    return -rows % (1 if rows <= 8 else 8 if rows <= 32 else 16 if rows <= 64 else 32)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wants_x, wants_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        d_rows = d_out.reshape(-1, d_out.shape[-1])
        longer = _lengthened(d_rows)
        d_x = d_weight = None
        if weight is not None:
            d_x = _multiplied(longer, weight.T)[: len(d_rows)].view(*d_out.shape[:-1], -1)
        if x is not None:
            d_weight = _multiplied(longer.T, _lengthened(x.reshape(-1, x.shape[-1])).contiguous().T)
        return d_x, d_weight, d_rows.sum(0) if ctx.needs_input_grad[2] else None
