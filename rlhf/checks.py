"""Argument checks whose errors say what was given, what is allowed and what to do.

They read shapes and types only, never values on a device, so they cost no synchronisation.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class InputError(ValueError):
    """Something the user gave is wrong. Programs print it as one line, without a traceback."""


def _described(tensors: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())


def check_same_shape(**tensors: Tensor | None) -> None:
    """Raise InputError unless all given tensors (None is skipped) have one shape; names each and its shape."""
    given = {name: x for name, x in tensors.items() if x is not None}
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise InputError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if len({x.shape for x in given.values()}) > 1:
        raise InputError(f"shapes must be equal, got {_described(given)}")


def check_float(**tensors: Tensor | None) -> None:
    """Raise InputError unless all given tensors (None is skipped) are floating point."""
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise InputError(f"{name} must be floating point, got {x.dtype}; convert it with .float()")


def check_mask(**masks: Tensor) -> None:
    """Raise InputError unless all masks are boolean tensors."""
    for name, x in masks.items():
        if not isinstance(x, Tensor):
            raise InputError(f"{name} must be a bool tensor, got {type(x).__name__}")
        if x.dtype != torch.bool:
            meaning = " (True where the policy acted)" if name == "action_mask" else ""
            raise InputError(f"{name} must be bool{meaning}, got {x.dtype}; convert it with .bool()")


def check_time_axis(**tensors: Tensor) -> None:
    """Raise InputError unless all tensors have a time axis, the last one, of at least one step."""
    for name, x in tensors.items():
        if x.ndim == 0 or x.shape[-1] == 0:
            raise InputError(f"{name} must be [..., T] with T >= 1 (time last), got {list(x.shape)}")


def check_range(
    name: str,
    value: float,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raise InputError unless low <= value <= high (an open end excludes its bound; NaN is never in range)."""
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (above and below):
        left, right = "(" if low_open or low == -math.inf else "[", ")" if high_open or high == math.inf else "]"
        raise InputError(f"{name} must be in {left}{low:g}, {high:g}{right}, got {value!r}")


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise InputError unless value is one of those allowed."""
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def brief(error: BaseException) -> str:
    """Type and first line of an error of somebody else's, with its cause's, for a message of ours."""
    if isinstance(error, StopIteration):  # of datasets, where a file has no line
        return "it is empty"
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if error.__cause__ is None else f"{text}; {brief(error.__cause__)}"
