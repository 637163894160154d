"""The one primitive under every estimator: a linear recurrence that runs backwards in time."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import pad

from rlhf.checks import check_float, check_same_shape, check_time_axis


def reverse_linear_scan(x: Tensor, decay: Tensor) -> Tensor:
    """y_t = x_t + decay_t * y_{t+1}, with y = 0 after the last step.

    Pairs of steps are folded into one, then pairs of pairs: O(T) work in about 3 log2(T) kernels. Differentiable in
    both arguments. An exact 0 in `decay` cuts the recurrence (for finite y).

    Args:
        x: [..., T] float32 or float64, time last.
        decay: [..., T], one factor per element, at most about 1 in size (their products must not overflow).
    Returns:
        y: [..., T], x's dtype.
    Raises:
        InputError: shapes differ, T is 0 or a type is not floating point.
    Source: Blelloch 1990, "Prefix sums and their applications" (recurrences as scans).
    """
    check_same_shape(x=x, decay=decay)
    check_float(x=x, decay=decay)
    check_time_axis(x=x)
    y: Tensor = _Scan.apply(x, decay.to(x.dtype))
    return y


def reverse_linear_scan_(x: Tensor, decay: Tensor) -> Tensor:
    """`reverse_linear_scan` that overwrites x with y, and `decay` with products of it; takes no memory of its own.

    Arguments as there, of one type, each dense; neither is differentiated.
    """
    steps = x.shape[-1]
    strides = [2**level for level in range((steps - 1).bit_length())]
    # Upwards: every second element that is left takes in the one after it. Then x_t is the recurrence over the next
    # 2 * stride steps as if nothing followed them, and decay_t their product.
    for stride in strides:
        here, after = slice(0, steps - stride, 2 * stride), slice(stride, None, 2 * stride)
        x[..., here].addcmul_(decay[..., here], x[..., after])
        decay[..., here].mul_(decay[..., after])
    # Downwards: the elements passed over are completed with what follows them, which is complete by then.
    for stride in reversed(strides):
        here, after = slice(stride, steps - stride, 2 * stride), slice(2 * stride, None, 2 * stride)
        x[..., here].addcmul_(decay[..., here], x[..., after])
    return x


class _Scan(torch.autograd.Function):
    """The scan with its own gradient, which is a scan too; it stores y and decay, not the steps between."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, decay: Tensor) -> Tensor:
        return reverse_linear_scan_(x.clone(), decay.clone())

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], output)

    @staticmethod
    def backward(ctx: FunctionCtx, y_grad: Tensor) -> tuple[Tensor, Tensor]:
        decay, y = ctx.saved_tensors  # type: ignore[attr-defined]
        # What reaches x_t comes from y_t and, through decay_{t-1}, from x_{t-1}: the recurrence forwards in time.
        from_before = pad(decay[..., :-1], (1, 0))
        x_grad = reverse_linear_scan(y_grad.flip(-1), from_before.flip(-1)).flip(-1)
        return x_grad, pad(x_grad[..., :-1] * y[..., 1:], (0, 1))
