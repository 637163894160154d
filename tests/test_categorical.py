"""Entropy and exact KL, as expectations of log-probabilities, against plain sums: all derivatives, by every mode."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import hessian, jacfwd, jacrev

from rlhf.categorical import masked_log_softmax
from rlhf.kl import exact_kl
from rlhf.losses import categorical_entropy

LOGITS, REF_LOGITS = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
MASK = torch.tensor([True, True, False])
Function = Callable[[Tensor], Tensor]


def plain_entropy(logits: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return -(p * p.log()).sum(-1) * MASK


def plain_kl(logits: Tensor) -> Tensor:
    p, q = logits.softmax(-1), REF_LOGITS.softmax(-1)
    return (p * (p / q).log()).sum(-1) * MASK


FUNCTIONS: dict[str, tuple[Function, Function]] = {
    "entropy": (lambda logits: categorical_entropy(logits, MASK), plain_entropy),
    "kl": (lambda logits: exact_kl(logits, REF_LOGITS, MASK), plain_kl),
}
every_function = pytest.mark.parametrize(("ours", "plain"), FUNCTIONS.values(), ids=FUNCTIONS)


@every_function
def test_value_gradient_and_curvature(ours: Function, plain: Function) -> None:
    """hessian is jacfwd of jacrev; the third derivative, by reverse mode alone, shows that none was cut off."""
    derivatives: list[Callable[[Function], Function]] = [
        lambda f: f, jacrev, jacfwd, hessian, lambda f: jacrev(jacrev(f)), lambda f: jacrev(jacrev(jacrev(f))),
    ]  # fmt: skip
    for derivative in derivatives:
        torch.testing.assert_close(derivative(ours)(LOGITS), derivative(plain)(LOGITS))


@every_function
def test_gradgradcheck(ours: Function, plain: Function) -> None:
    logits = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(ours, logits, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ours, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_of_what_cannot_happen(dtype: torch.dtype) -> None:
    """Outcomes of probability 0, by -inf or by underflow, count for nothing, though the reference excludes them too.

    Where pi can do what the reference cannot, the KL is infinite.
    """
    logits = torch.tensor([0.5, -torch.inf, 1.0, -2000.0], dtype=dtype, requires_grad=True)
    ref_logits = torch.tensor([0.1, -torch.inf, 0.3, -torch.inf], dtype=dtype)
    kl = exact_kl(logits, ref_logits, torch.tensor(True))
    possible = torch.tensor([0, 2])
    expected = exact_kl(logits[possible], ref_logits[possible], torch.tensor(True))
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (kl, expected)))
    ref_logits[0] = -torch.inf
    assert exact_kl(logits, ref_logits, torch.tensor(True)) == math.inf


def test_masked_rows_are_uniform_without_gradient() -> None:
    logits = torch.full((2, 4), torch.nan, requires_grad=True)
    log_p = masked_log_softmax(logits, torch.tensor([False, False]))
    torch.testing.assert_close(log_p.detach(), torch.full((2, 4), -math.log(4)))
    assert (torch.autograd.grad(log_p.square().sum(), logits)[0] == 0).all()
