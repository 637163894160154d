"""Masked statistics against the same statistics of the selected numbers alone."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.checks import InputError
from rlhf.masking import explained_variance, fill_masked, masked_mean, masked_sum, masked_var, masked_whiten

GARBAGE = [float("nan"), float("inf"), float("-inf"), 1e30]
STATISTICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fill": fill_masked,
    "sum": masked_sum,
    "row sums": lambda x, mask: masked_sum(x, mask, 1),
    "mean": masked_mean,
    "row means": lambda x, mask: masked_mean(x, mask, -1),
    "mean over 7": lambda x, mask: masked_mean(x, mask, denominator=7),
    "var": masked_var,
    "biased var": lambda x, mask: masked_var(x, mask, ddof=0),
    "whiten": masked_whiten,
    "whiten, keep mean": lambda x, mask: masked_whiten(x, mask, shift_mean=False, ddof=0),
}


@st.composite
def masked_rows(draw: st.DrawFn, min_selected: int = 0) -> tuple[Tensor, Tensor]:
    """x [B, T] float64 and a mask with at least that many True slots."""
    rows, steps = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    cells = draw(st.lists(st.tuples(st.floats(-5, 5), st.booleans()), min_size=rows * steps, max_size=rows * steps))
    values, mask = zip(*cells, strict=True)
    mask = torch.tensor(mask)
    mask[:min_selected] = True
    return torch.tensor(values, dtype=torch.float64).view(rows, steps), mask.view(rows, steps)


def close(actual: Tensor, expected: Tensor | float) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-11, atol=1e-11)


@given(masked_rows())
def test_sums_and_means_are_those_of_the_selected_numbers(case: tuple[Tensor, Tensor]) -> None:
    x, mask = case
    chosen = x[mask].tolist()
    close(masked_sum(x, mask), sum(chosen))
    close(masked_mean(x, mask), sum(chosen) / max(len(chosen), 1))
    by_row = [row[selected].tolist() for row, selected in zip(x, mask, strict=True)]
    close(masked_sum(x, mask, -1), torch.tensor([sum(row) for row in by_row], dtype=x.dtype))
    close(masked_mean(x, mask, 1), torch.tensor([sum(row) / max(len(row), 1) for row in by_row], dtype=x.dtype))


@given(masked_rows(), st.floats(0, 50))
def test_a_given_denominator_replaces_the_count_and_is_at_least_one(case: tuple[Tensor, Tensor], count: float) -> None:
    x, mask = case
    expected = sum(x[mask].tolist()) / max(count, 1)
    close(masked_mean(x, mask, denominator=count), expected)
    close(masked_mean(x, mask, denominator=torch.tensor(count, dtype=torch.float64)), expected)


@pytest.mark.parametrize("ddof", [0, 1, 2])
@given(masked_rows())
def test_variance_is_that_of_the_selected_numbers(ddof: int, case: tuple[Tensor, Tensor]) -> None:
    x, mask = case
    chosen = x[mask].tolist()
    mean = sum(chosen) / max(len(chosen), 1)
    squares = sum((value - mean) ** 2 for value in chosen)
    close(masked_var(x, mask, ddof=ddof), squares / (len(chosen) - ddof) if len(chosen) > ddof else 0.0)


def test_variance_keeps_its_digits_beside_a_large_mean() -> None:
    """E[x^2] - E[x]^2 in float32 would give -16384 .. 16384 here."""
    x = torch.tensor([300000.0, 300000.5, 300001.0, 7.0])
    mask = torch.tensor([True, True, True, False])
    torch.testing.assert_close(masked_var(x, mask), torch.tensor(0.25), rtol=1e-3, atol=0)


@given(masked_rows(min_selected=2), st.floats(0, 1e-2))
def test_whitening_by_its_formula(case: tuple[Tensor, Tensor], epsilon: float) -> None:
    x, mask = case
    epsilon += 1e-8
    chosen = x[mask]
    z = (chosen - chosen.mean()) / (chosen.var() + epsilon).sqrt()
    z_biased = (chosen - chosen.mean()) / (chosen.var(correction=0) + epsilon).sqrt()

    def scattered(values: Tensor) -> Tensor:
        return torch.zeros_like(x).masked_scatter(mask, values)

    tolerance = {"rtol": 1e-8, "atol": 1e-8}  # rounding of a mean, over a std of 1e-4 if all numbers are equal
    torch.testing.assert_close(masked_whiten(x, mask, epsilon=epsilon), scattered(z), **tolerance)
    biased = masked_whiten(x, mask, ddof=0, epsilon=epsilon)
    torch.testing.assert_close(biased, scattered(z_biased), **tolerance)
    kept = masked_whiten(x, mask, epsilon=epsilon, shift_mean=False)
    torch.testing.assert_close(kept, scattered(z + chosen.mean()), **tolerance)


def test_whitening_gives_mean_zero_std_one() -> None:
    x = 40 + 3 * torch.randn(5, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.rand(5, 30, generator=torch.Generator().manual_seed(1)) < 0.7
    white = masked_whiten(x, mask)
    close(white[mask].mean(), 0.0)
    torch.testing.assert_close(white[mask].std().item(), 1.0, rtol=1e-8, atol=0)
    assert (white[~mask] == 0).all()
    kept = masked_whiten(x, mask, shift_mean=False)
    close(kept[mask].mean(), x[mask].mean())
    assert (kept[~mask] == 0).all()


def test_given_statistics_stand_for_the_whole_batch() -> None:
    """Halves whitened with the whole's statistics are the halves of the whitened whole."""
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = torch.rand(6, 9, generator=torch.Generator().manual_seed(3)) < 0.6
    mean, var = masked_mean(x, mask), masked_var(x, mask)
    halves = [
        masked_whiten(part, part_mask, mean=mean, var=var)
        for part, part_mask in zip(x.split(3), mask.split(3), strict=True)
    ]
    close(torch.cat(halves), masked_whiten(x, mask))
    separately = [masked_whiten(part, part_mask) for part, part_mask in zip(x.split(3), mask.split(3), strict=True)]
    assert not torch.allclose(torch.cat(separately), masked_whiten(x, mask), atol=1e-3)


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_in_masked_slots_changes_nothing(name: str, dtype: torch.dtype, garbage: float) -> None:
    """Bit for bit, in the result and in the gradient, which is exactly zero there."""
    clean = torch.randn(3, 7, generator=torch.Generator().manual_seed(4), dtype=dtype)
    mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(5)) < 0.5
    mask[2] = False  # a whole row, too
    dirty = torch.where(mask, clean, garbage)

    def result_and_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        result = STATISTICS[name](x, mask)
        (result * torch.arange(1, result.numel() + 1).view(result.shape)).sum().backward()
        assert x.grad is not None
        return result.detach(), x.grad

    result, gradient = result_and_gradient(clean)
    dirty_result, dirty_gradient = result_and_gradient(dirty)
    assert torch.equal(result, dirty_result)
    assert torch.equal(gradient, dirty_gradient)
    assert (gradient[~mask] == 0).all()
    assert result.dtype == dtype


@pytest.mark.parametrize("name", STATISTICS)
def test_an_empty_mask_gives_zeros_and_zero_gradient(name: str) -> None:
    x = torch.full((2, 3), 5.0, requires_grad=True)
    result = STATISTICS[name](x, torch.zeros(2, 3, dtype=torch.bool))
    result.sum().backward()
    assert x.grad is not None
    assert (result == 0).all()
    assert (x.grad == 0).all()


@pytest.mark.parametrize("name", ["mean", "row means", "var", "biased var", "whiten", "whiten, keep mean"])
def test_gradients(name: str) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0], [1, 0, 0, 0]]).bool()
    assert torch.autograd.gradcheck(lambda x: STATISTICS[name](x, mask), (x,))


def test_fill_value() -> None:
    filled = fill_masked(torch.tensor([1.0, 2.0]), torch.tensor([False, True]), -3.0)
    assert filled.tolist() == [-3.0, 2.0]


@pytest.mark.parametrize("epsilon", [0.0, 1e-8])
@pytest.mark.parametrize("value", [0.1, 0.0, 5000.0])
def test_whitening_equal_numbers_is_no_division_by_zero(value: float, epsilon: float) -> None:
    """There is no deviation to scale; rounding of the mean may leave about 1e-7 of the value over a std of 1e-4."""
    white = masked_whiten(torch.full((3, 7), value), torch.ones(3, 7, dtype=torch.bool), epsilon=epsilon)
    assert torch.isfinite(white).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, mask: fill_masked(x, mask[:, :2]), r"x \[2, 3\], mask \[2, 2\]"),
        (lambda x, mask: masked_sum(x, mask[:1]), r"x \[2, 3\], mask \[1, 3\]"),
        (lambda x, mask: masked_mean(x, mask.float()), "mask must be bool"),
        (lambda x, mask: masked_mean(x.long(), mask), "x must be floating point"),
        (lambda x, mask: masked_var(x, mask.long()), "mask must be bool"),
        (lambda x, mask: masked_var(x, mask, ddof=-1), "ddof must be in"),
        (lambda x, mask: masked_whiten(x, mask[0]), r"x \[2, 3\], mask \[3\]"),
        (lambda x, mask: masked_whiten(x, mask, epsilon=-1e-8), "epsilon must be in"),
        (lambda x, mask: masked_whiten(x, mask, mean=x.mean()), "both mean and var"),
        (lambda x, mask: masked_whiten(x, mask, var=x.var()), "both mean and var"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[Tensor, Tensor], Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))


def test_explained_variance_of_a_perfect_and_of_a_constant_critic() -> None:
    """Whatever masked slots hold."""
    returns = torch.tensor([[1.0, 2.0, 4.0, 0.0]])
    mask = torch.tensor([[True, True, True, False]])
    garbage = torch.tensor([[0.0, 0.0, 0.0, torch.nan]])
    assert explained_variance(returns + 3 + garbage, returns, mask) == pytest.approx(1)
    assert explained_variance(torch.full_like(returns, 5.0) + garbage, returns, mask) == pytest.approx(0, abs=1e-6)
    assert explained_variance(returns, torch.ones_like(returns) + garbage, mask) == 0
