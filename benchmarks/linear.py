"""Matrix products of linear layers: torch's own against `rlhf.lm.linear`, on the CPU, by rows and size.

    taskset -c 0 python benchmarks/linear.py

Billions of operations per second of process time, best of `repeats`. Each product takes the next of twenty matrices, so
that they come from memory as a model's layers do. forward: x W^T; gradients: those of x and W together; packed: forward
by a matrix laid out before (`packed`), as generation does; layout: how many of these products laying it out takes.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from rlhf.lm.linear import has_bfloat16, linear, onednn_is_faster, packed

MATRICES = 20


@dataclass(frozen=True)
class Options:
    """What is measured."""

    rows: tuple[int, ...] = (1, 8, 64, 1024)
    sizes: tuple[tuple[int, int], ...] = ((256, 1024), (576, 1536), (896, 4864))
    """(in, out) features."""
    threads: int = 1
    repeats: int = 5


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Of one call: the fastest of `repeats` averages over about a twentieth of a second."""
    count = 1
    while (spent := timed(function, count)) < 0.05:
        count = max(count + 1, int(count * 0.06 / max(spent, 1e-4)))
    return min(timed(function, count) for _ in range(repeats)) / count


def timed(function: Callable[[], object], count: int) -> float:
    began = time.process_time()
    for _ in range(count):
        function()
    return time.process_time() - began


def forward(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> Callable[[], object]:
    following = itertools.cycle(weights)

    def once() -> None:
        with torch.inference_mode():
            product(x, next(following))

    return once


def gradients(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> Callable[[], object]:
    """The backward pass alone, of graphs that are kept."""
    x, direction = x.clone().requires_grad_(), torch.ones(len(x), len(weights[0]), dtype=x.dtype)
    graphs = itertools.cycle([(product(x, w), w) for w in (weight.clone().requires_grad_() for weight in weights)])

    def once() -> None:
        out, weight = next(graphs)
        torch.autograd.grad(out, [x, weight], direction, retain_graph=True)

    return once


def through_packed(x: Tensor, weights: list[Tensor], repeats: int) -> tuple[float, float]:
    """Seconds of a product, and of laying out one matrix."""
    layers = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype) for w in weights)
    with torch.inference_mode():
        laid_out = seconds(lambda: packed(layers).__enter__(), repeats) / len(weights)
        for layer in layers:
            layer.__dict__.pop("forward", None)
        with packed(layers):
            following: Any = itertools.cycle(layers)
            return seconds(lambda: next(following)(x), repeats), laid_out


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    print(f"oneDNN is taken for float32: {onednn_is_faster()}; for packed bfloat16: {has_bfloat16()}\n")
    titles = (
        "type",
        "rows",
        "in x out",
        "torch forward",
        "ours",
        "torch gradients",
        "ours",
        "packed forward",
        "layout",
    )
    print(f"| {' | '.join(titles)} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for dtype, (width, out), rows in itertools.product((torch.float32, torch.bfloat16), options.sizes, options.rows):
        x = torch.randn(rows, width).to(dtype)
        weights = [torch.randn(out, width).to(dtype) for _ in range(MATRICES)]
        work = 2 * rows * width * out / 1e9
        cells = [work * scale / seconds(kind(product, x, weights), options.repeats)
                 for kind, scale in ((forward, 1), (gradients, 2)) for product in (F.linear, linear)]  # fmt: skip
        product, laid_out = through_packed(x, weights, options.repeats)
        speeds = " | ".join(f"{cell:.0f}" for cell in (*cells, work / product))
        print(f"| {str(dtype)[6:]} | {rows:,} | {width} x {out} | {speeds} | {laid_out / product:.1f} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
