"""Masked sums, means and whitening: what a masked slot holds, NaN included, reaches neither result nor gradient.

Results of arithmetic are at least float32, whatever the inputs are.
"""

import functools

import torch
from torch import Tensor

from rlhf.checks import InputError, check_float, check_mask, check_range, check_same_shape


def in_one_type(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the floating type that holds all of theirs, at least float32.

    What computes with several begins here. Sums and counts in half precision stop growing (at 256 in bfloat16), and a
    number rounded to one type differs from itself in another, so that nothing could be compared with its bound.
    """
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)
    return tuple(x.to(dtype) for x in tensors)


def fill_masked(x: Tensor, mask: Tensor, value: float = 0.0) -> Tensor:
    """x where mask is True, `value` elsewhere; the gradient of masked slots is exactly zero.

    A product with the mask would let NaN and infinity through (NaN * 0 is NaN); a selection does not.

    Args:
        x: [...] any floating type.
        mask: [...] bool.
    Raises:
        InputError: shapes differ, or the mask is not bool.
    """
    check_mask(mask=mask)
    check_same_shape(x=x, mask=mask)
    return torch.where(mask, x, value)


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of x over the True slots: [] or, with `dim`, x's shape without that axis. An empty mask gives 0."""
    check_float(x=x)
    (x,) = in_one_type(x)
    filled = fill_masked(x, mask)
    return filled.sum() if dim is None else filled.sum(dim)


def masked_mean(
    x: Tensor, mask: Tensor, dim: int | None = None, *, denominator: Tensor | float | None = None
) -> Tensor:
    """Masked sum divided by `denominator`, or by the number of True slots if none is given. An empty mask gives 0.

    Args:
        x: [...] float. mask: [...] bool.
        dim: axis to average over; all if None.
        denominator: count to divide by, for instance that of all micro-batches and ranks; below 1 it counts as 1.
    """
    total = masked_sum(x, mask, dim)
    if denominator is None:
        denominator = mask.sum() if dim is None else mask.sum(dim)
    return total / torch.as_tensor(denominator, device=x.device, dtype=total.dtype).clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, *, ddof: int = 1) -> Tensor:
    """Variance over all True slots, dividing by count - ddof; [] in x's units squared. 0 if count <= ddof."""
    check_range("ddof", ddof, low=0)
    (x,) = in_one_type(x)
    x = fill_masked(x, mask)  # first of all: the gradient of NaN squared is NaN, whatever is selected later
    deviation = x - masked_mean(x, mask)
    count = mask.sum()
    return torch.where(count > ddof, masked_sum(deviation.square(), mask) / (count - ddof).clamp(min=1), 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 one no better than a constant.

    0 where the returns do not vary.
    """
    total = masked_var(returns, mask)
    return float(1 - masked_var(returns - values, mask) / total) if total > 0 else 0.0


def masked_whiten(
    x: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    ddof: int = 1,
    epsilon: float = 1e-8,
    std_epsilon: float = 0.0,
    mean: Tensor | None = None,
    var: Tensor | None = None,
) -> Tensor:
    """(x - mean) / (sqrt(var + epsilon) + std_epsilon) over the True slots, 0 elsewhere.

    Args:
        x: [...] float. mask: [...] bool.
        shift_mean: False keeps the mean (adds it back after scaling).
        ddof: 1 for the unbiased variance, 0 for the biased one.
        epsilon: added to the variance, in x's units squared.
        std_epsilon: added to its root, in x's units.
        mean, var: [] statistics to use instead of x's own, for a batch spread over ranks; both or neither.
    Raises:
        InputError: shapes differ, the mask is not bool, only one of mean and var is given.
    Source: Huang et al. 2024, arXiv:2403.17031 (whitening of rewards and advantages).
    """
    if (mean is None) != (var is None):
        raise InputError("give both mean and var, or neither")
    check_range("epsilon", epsilon, low=0)
    check_range("std_epsilon", std_epsilon, low=0)
    check_range("ddof", ddof, low=0)
    check_mask(mask=mask)
    check_same_shape(x=x, mask=mask)
    (x,) = in_one_type(x)
    # Measured from one of its own numbers, equal numbers are exactly 0; less their rounded mean they would not be.
    first = mask.flatten().byte().argmax(0, keepdim=True) if mask.numel() else mask.flatten().long()
    origin = torch.where(mask.flatten()[first], x.detach().flatten()[first], 0.0).sum()
    x = fill_masked(x - origin, mask)
    if mean is None or var is None:
        count = mask.sum()
        mean = x.sum() / count.clamp(min=1) + origin
        x = fill_masked(x - (mean - origin), mask)
        var = torch.where(count > ddof, x.square().sum() / (count - ddof).clamp(min=1), 0.0)
    else:
        x = fill_masked(x - (mean - origin), mask)
    std = (var + epsilon).sqrt() + std_epsilon
    scaled = x / torch.where(std > 0, std, 1.0)
    return scaled if shift_mean else fill_masked(scaled + mean, mask)
