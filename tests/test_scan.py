"""The scan against the recurrence written as a loop."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.checks import InputError
from rlhf.scan import reverse_linear_scan, reverse_linear_scan_

AROUND_POWERS_OF_2 = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 255, 256, 257, 4095, 4096, 4097]


def loop(x: Tensor, decay: Tensor) -> Tensor:
    y, ys = torch.zeros_like(x[..., 0]), []
    for t in reversed(range(x.shape[-1])):
        y = x[..., t] + decay[..., t] * y
        ys.append(y)
    return torch.stack(ys[::-1], -1)


def random_pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    decay = torch.rand(*shape, generator=generator, dtype=torch.float64)
    decay[torch.rand(*shape, generator=generator) < 0.4] = 1.0  # long memory, as in gaps and for gamma = 1
    return x.to(dtype), decay.to(dtype)


@pytest.mark.parametrize("steps", AROUND_POWERS_OF_2)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_loop_around_powers_of_2(steps: int, dtype: torch.dtype, tolerance: float) -> None:
    x, decay = random_pair(3, steps, dtype=dtype)
    result = reverse_linear_scan(x, decay)
    assert result.dtype == dtype
    torch.testing.assert_close(result, loop(x, decay), rtol=tolerance, atol=tolerance)


number = st.floats(-3, 3)


@given(st.lists(st.tuples(number, number), min_size=1, max_size=70))
def test_equals_the_loop_for_any_values_and_decays(steps: list[tuple[float, float]]) -> None:
    x, decay = torch.tensor(steps, dtype=torch.float64).T
    expected = loop(x, decay)
    scale = loop(x.abs(), decay.abs()).max().item()  # decays beyond 1 grow: compare in units of what was summed
    torch.testing.assert_close(reverse_linear_scan(x, decay), expected, rtol=1e-12, atol=1e-12 * (1 + scale))


@pytest.mark.parametrize("shape", [(40,), (0, 40), (2, 0, 3), (2, 3, 40)])
def test_leading_axes_are_independent_rows(shape: tuple[int, ...]) -> None:
    x, decay = random_pair(*shape)
    torch.testing.assert_close(reverse_linear_scan(x, decay), loop(x, decay), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [40, 300])
def test_closed_forms(steps: int) -> None:
    ones = torch.ones(steps, dtype=torch.float64)
    to_go = torch.arange(steps, 0, -1, dtype=torch.float64)
    torch.testing.assert_close(reverse_linear_scan(ones, ones), to_go, rtol=0, atol=0)
    geometric = (1 - 0.9**to_go) / (1 - 0.9)
    torch.testing.assert_close(reverse_linear_scan(ones, 0.9 * ones), geometric, rtol=1e-12, atol=0)


@pytest.mark.parametrize("cut", [0, 5, 15, 16, 31, 38])
def test_exact_zero_decay_cuts(cut: int) -> None:
    """Bit for bit: no rounding residue of the episode that follows reaches the one before."""
    x, decay = random_pair(2, 40)
    decay[..., cut] = 0.0
    before = reverse_linear_scan(x, decay)[..., : cut + 1]
    x[..., cut + 1 :] = 1e30
    assert torch.equal(reverse_linear_scan(x, decay)[..., : cut + 1], before)
    assert torch.equal(before[..., cut], x[..., cut])


@pytest.mark.parametrize("steps", [1, 5, 16, 17, 35])
def test_gradients_in_both_arguments(steps: int) -> None:
    x, decay = random_pair(2, steps)
    decay[0, steps // 2] = 0.0
    assert torch.autograd.gradcheck(reverse_linear_scan, (x.requires_grad_(), decay.requires_grad_()))


def test_gradients_of_the_gradient() -> None:
    x, decay = random_pair(2, 6)
    assert torch.autograd.gradgradcheck(reverse_linear_scan, (x.requires_grad_(), decay.requires_grad_()))


def test_inputs_stay_and_the_trailing_underscore_overwrites_them() -> None:
    x, decay = random_pair(3, 37)
    before = x.clone(), decay.clone()
    y = reverse_linear_scan(x, decay)
    assert torch.equal(x, before[0])
    assert torch.equal(decay, before[1])
    assert reverse_linear_scan_(x, decay) is x
    assert torch.equal(x, y)


def test_arguments_may_be_views_of_one_number() -> None:
    one = torch.tensor(1.0, dtype=torch.float64)
    expected = torch.arange(40, 0, -1, dtype=torch.float64).expand(2, 40)
    assert torch.equal(reverse_linear_scan(one.expand(2, 40), one.expand(2, 40)), expected)


def test_float32_error_is_small_over_long_sequences() -> None:
    """A few ulps of the sum of magnitudes, not a number that grows with T."""
    x, decay = random_pair(8, 4096)
    error = reverse_linear_scan(x.float(), decay.float()).double() - loop(x.float().double(), decay.float().double())
    assert (error.abs() / loop(x.abs(), decay)).max() < 1e-6


class OperatorCount(TorchDispatchMode):
    """Counts operators that launch a kernel: everything but views."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (list, tuple)) else [result]
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        if not all(x.untyped_storage().data_ptr() in inputs for x in outputs):
            self.launched.append(str(func))
        return result


def test_few_kernels_for_long_sequences() -> None:
    x, decay = random_pair(256, 4096, dtype=torch.float32)
    with OperatorCount() as counter:
        reverse_linear_scan(x, decay)
    with OperatorCount() as loop_counter:
        loop(x[:2], decay[:2])
    assert len(loop_counter.launched) > 8000  # the counter does count
    assert len(counter.launched) <= 40  # three for each halving of 4,096, and two copies


@pytest.mark.parametrize(
    ("x", "decay", "message"),
    [
        (torch.zeros(3), torch.zeros(4), r"x \[3\], decay \[4\]"),
        (torch.zeros(2, 3), torch.zeros(3), r"x \[2, 3\], decay \[3\]"),
        (torch.zeros(2, 0), torch.zeros(2, 0), r"x must be \[..., T\]"),
        (torch.tensor(1.0), torch.tensor(1.0), r"x must be \[..., T\]"),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(3), "x must be floating point"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.bool), "decay must be floating point"),
    ],
)
def test_bad_arguments_are_named(x: Tensor, decay: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        reverse_linear_scan(x, decay)


@pytest.mark.parametrize(("x_type", "decay_type"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
@pytest.mark.parametrize("steps", [4, 40])
def test_result_has_the_type_of_x(x_type: torch.dtype, decay_type: torch.dtype, steps: int) -> None:
    x, decay = random_pair(steps)
    assert reverse_linear_scan(x.to(x_type), decay.to(decay_type)).dtype == x_type
