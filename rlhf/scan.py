"""The one primitive under every estimator: a linear recurrence that runs backwards in time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.checks import check_float, check_same_shape, check_time_axis

# Steps taken one after the other before a level of blocks is closed. A scan over T steps launches about
# 2 * BLOCK * log_BLOCK(T) kernels, each over T / BLOCK elements a row: T = 4096 takes 117 instead of 8,190.
BLOCK = 16


def reverse_linear_scan(x: Tensor, decay: Tensor) -> Tensor:
    """y_t = x_t + decay_t * y_{t+1}, with y = 0 after the last step.

    Blocked along time: within every block at once, as if nothing followed it; then the same scan over the blocks'
    first elements; then each block is completed with what follows it. Work is O(T), depth O(BLOCK log T).
    Differentiable in both arguments. An exact 0 in `decay` cuts the recurrence (for finite y).

    Args:
        x: [..., T] float32 or float64, time last.
        decay: [..., T], one factor per element, at most about 1 in size (a block's product must not overflow).
    Returns:
        y: [..., T], x's dtype.
    Raises:
        InputError: shapes differ, T is 0 or a type is not floating point.
    Source: Blelloch 1990, "Prefix sums and their applications" (recurrences as scans).
    """
    check_same_shape(x=x, decay=decay)
    check_float(x=x, decay=decay)
    check_time_axis(x=x)
    decay = decay.to(x.dtype)
    steps = x.shape[-1]
    if steps <= BLOCK:
        return _scan_within(x.unbind(-1), decay.unbind(-1))[0].movedim(0, -1)

    padding = -steps % BLOCK
    blocks = (*x.shape[:-1], (steps + padding) // BLOCK, BLOCK)
    # The place within a block goes first, so that each step below works on contiguous memory.
    by_place = [
        torch.nn.functional.pad(each, (0, padding)).reshape(blocks).movedim(-1, 0).contiguous() for each in (x, decay)
    ]
    local, product = _scan_within(*(each.unbind(0) for each in by_place))

    block_firsts = reverse_linear_scan(local[0], product[0])
    following = torch.nn.functional.pad(block_firsts[..., 1:], (0, 1))
    y = torch.addcmul(local, product, following)
    return y.movedim(0, -1).flatten(-2)[..., :steps]


def _scan_within(xs: Sequence[Tensor], decays: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Step by step through a block: y, and the product of the decays from each step to the end; stacked first."""
    y, product = xs[-1], decays[-1]
    ys, products = [y], [product]
    for x_t, decay_t in zip(reversed(xs[:-1]), reversed(decays[:-1]), strict=True):
        y = torch.addcmul(x_t, decay_t, y)
        product = decay_t * product
        ys.append(y)
        products.append(product)
    return torch.stack(ys[::-1]), torch.stack(products[::-1])
