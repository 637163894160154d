"""Log-probabilities of all outcomes of a categorical distribution, and expectations of what is made of them."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def masked_log_softmax(logits: Tensor, action_mask: Tensor) -> Tensor:
    """log softmax of logits [..., V] where action_mask [...] is True, uniform elsewhere, with exactly 0 gradient."""
    return torch.where(action_mask.unsqueeze(-1), logits, 0.0).log_softmax(-1)


def expected_log(log_p: Tensor, x: Tensor) -> Tensor:
    """sum p x over the outcomes, of an x that is log p plus a constant, as log p and log(p / q) are.

    Args:
        log_p: [..., V] log-probabilities, of which p sums to 1 whatever they are computed from.
        x: [..., V] with its gradient; finite where p is 0.
    Returns:
        [...].
    """
    expectation: Tensor = _ExpectedLog.apply(log_p, x)
    return expectation


class _ExpectedLog(torch.autograd.Function):
    """Keeps its arguments, not p. sum p dx = sum dp = 0, so nothing goes back to x; second derivatives do."""

    generate_vmap_rule = True

    @staticmethod
    def forward(log_p: Tensor, x: Tensor) -> Tensor:
        return log_p.exp().mul_(x).sum(-1)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        log_p, x = ctx.saved_tensors  # type: ignore[attr-defined]
        return log_p.exp() * x * grad.unsqueeze(-1), None

    @staticmethod
    def jvp(ctx: FunctionCtx, log_p_tangent: Tensor, x_tangent: Tensor) -> Tensor:
        log_p, x = ctx.saved_tensors  # type: ignore[attr-defined]
        return (log_p.exp() * x * log_p_tangent).sum(-1)
