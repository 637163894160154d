"""The reverse linear scan, the loop over time that it replaces, and the bytes that must move, in one run.

python benchmarks/scan.py [--device cuda]
"""

import statistics
import time
from collections.abc import Callable

import torch
import tyro
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.scan import reverse_linear_scan

SHAPES = ((64, 8), (256, 128), (256, 4096))
VIEWS = ("view", "unbind", "select", "slice", "unsqueeze", "squeeze", "alias", "detach", "transpose", "split")


def plain_loop(x: Tensor, decay: Tensor) -> Tensor:
    """One step after the other, as training scripts write it."""
    y = torch.empty_like(x)
    following = torch.zeros_like(x[..., 0])
    for t in reversed(range(x.shape[-1])):
        following = x[..., t] + decay[..., t] * following
        y[..., t] = following
    return y


class CountKernels(TorchDispatchMode):
    """Operations dispatched, views left out: each is one kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += not any(word in func.__name__ for word in VIEWS)
        return func(*args, **(kwargs or {}))


def copied(x: Tensor, decay: Tensor) -> Tensor:
    """Reads two arrays and writes two: a little more than any scan has to move."""
    return torch.stack([x, decay])


def seconds(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, decay: Tensor) -> float:
    started = time.perf_counter()
    function(x, decay)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def kernels(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, decay: Tensor) -> int:
    with CountKernels() as counter:
        function(x, decay)
    return counter.count


def main(device: str = "cpu", repeats: int = 15) -> None:
    """Medians of alternating runs on the same inputs."""
    functions = (reverse_linear_scan, plain_loop, copied)
    print("| shape | scan, ms | loop, ms | loop / scan | copying the inputs, ms | kernels, scan | kernels, loop |")
    print("|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        x, decay = torch.randn(shape, device=device), torch.rand(shape, device=device)
        torch.testing.assert_close(reverse_linear_scan(x, decay), plain_loop(x, decay))
        rounds = [[1e3 * seconds(function, x, decay) for function in functions] for _ in range(repeats)]
        scan, loop, copy = (statistics.median(column) for column in zip(*rounds, strict=True))
        counts = " | ".join(str(kernels(function, x, decay)) for function in functions[:2])
        print(f"| {list(shape)} | {scan:.2f} | {loop:.2f} | {loop / scan:.1f} | {copy:.3f} | {counts} |")


if __name__ == "__main__":
    tyro.cli(main)
