"""Errors must name what was given; what is allowed must pass untouched."""

import math

import pytest
import torch

from rlhf.checks import InputError, check_float, check_mask, check_range, check_same_shape, check_time_axis


def test_input_error_is_a_value_error() -> None:
    assert issubclass(InputError, ValueError)


def test_equal_shapes_pass_and_none_is_skipped() -> None:
    check_same_shape(a=torch.zeros(2, 3), b=None, c=torch.ones(2, 3, dtype=torch.bool))
    check_same_shape(a=None)


def test_unequal_shapes_name_every_tensor_and_its_shape() -> None:
    with pytest.raises(InputError, match=r"rewards \[2, 3\], values \[3, 2\], mask \[2, 3\]"):
        check_same_shape(rewards=torch.zeros(2, 3), values=torch.zeros(3, 2), mask=torch.zeros(2, 3))


def test_shapes_that_only_broadcast_are_refused() -> None:
    with pytest.raises(InputError, match="shapes must be equal"):
        check_same_shape(a=torch.zeros(2, 3), b=torch.zeros(1, 3))


@pytest.mark.parametrize("given", [[1.0, 2.0], 3.0, "text"])
def test_what_is_no_tensor_is_named(given: object) -> None:
    with pytest.raises(InputError, match=f"values must be a torch.Tensor, got {type(given).__name__}"):
        check_same_shape(rewards=torch.zeros(2), values=given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_types_pass(dtype: torch.dtype) -> None:
    check_float(x=torch.zeros(2, dtype=dtype), y=None)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_other_types_are_refused_with_the_way_out(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=rf"scores must be floating point, got {dtype}.*\.float\(\)"):
        check_float(scores=torch.zeros(2, dtype=dtype))


def test_masks_are_boolean_tensors() -> None:
    check_mask(action_mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(InputError, match="action_mask must be a bool tensor, got NoneType"):
        check_mask(action_mask=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
def test_masks_of_numbers_are_refused_with_the_way_out(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=rf"action_mask must be bool .* got {dtype}.*\.bool\(\)"):
        check_mask(action_mask=torch.ones(2, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_time_axis_must_hold_a_step(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=rf"rewards must be .* got {list(shape)}".replace("[", r"\[")):
        check_time_axis(rewards=torch.zeros(shape))


def test_an_empty_batch_has_a_time_axis() -> None:
    check_time_axis(rewards=torch.zeros(0, 3))


IN_RANGE = {
    "closed at low": (0.0, {"low": 0, "high": 1}),
    "closed at high": (1.0, {"low": 0, "high": 1}),
    "unbounded": (-1e300, {}),
    "infinity, closed": (math.inf, {"low": 0}),
    "inside open": (0.5, {"low": 0, "high": 1, "low_open": True, "high_open": True}),
}
OUT_OF_RANGE = {
    "below": (-0.1, {"low": 0, "high": 1}, r"\[0, 1\], got -0.1"),
    "above": (1.1, {"low": 0, "high": 1}, r"\[0, 1\], got 1.1"),
    "at open low": (0.0, {"low": 0, "high": 1, "low_open": True}, r"\(0, 1\], got 0.0"),
    "at open high": (1.0, {"low": 0, "high": 1, "high_open": True}, r"\[0, 1\), got 1.0"),
    "nothing above": (-1, {"low": 0}, r"\[0, inf\), got -1"),
    "nothing below": (2, {"high": 1}, r"\(-inf, 1\], got 2"),
    "infinity, open": (math.inf, {"low_open": True, "high_open": True}, r"got inf"),
    "nan, bounded": (math.nan, {"low": 0, "high": 1}, r"got nan"),
    "nan, unbounded": (math.nan, {}, r"got nan"),
}


@pytest.mark.parametrize(("value", "bounds"), IN_RANGE.values(), ids=IN_RANGE)
def test_in_range(value: float, bounds: dict) -> None:
    check_range("gamma", value, **bounds)


@pytest.mark.parametrize(("value", "bounds", "message"), OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_out_of_range(value: float, bounds: dict, message: str) -> None:
    with pytest.raises(InputError, match=f"gamma must be in .*{message}"):
        check_range("gamma", value, **bounds)
