"""How losses per token become one number, whose gradient does not depend on how the batch was cut.

Every reduction divides by a `denominator` that the caller counts once, over the whole optimizer step: all of its
micro-batches, on all ranks. The sum of the micro-batches' results is then the whole batch's result. A mean taken inside
a micro-batch and averaged again would weigh tokens by the company they happen to keep.

    denominator = count(action_mask, how="token_mean")              # the step's mask, summed over ranks
    for part in micro_batches:
        reduce(losses[part], action_mask[part], how="token_mean", denominator=denominator).backward()
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from rlhf.checks import InputError, check_choice, check_mask, check_range
from rlhf.masking import masked_mean

Reduction = Literal["token_mean", "sequence_mean", "sequence_sum", "fixed_length"]


def reduce(
    per_token: Tensor,
    action_mask: Tensor,
    *,
    how: Reduction,
    denominator: Tensor | float,
    length: int | None = None,
) -> Tensor:
    """Reduce by name: `token_mean`, `sequence_mean`, `sequence_sum` or `fixed_length` (which alone takes `length`)."""
    if how == "token_mean":
        return token_mean(per_token, action_mask, denominator=denominator)
    if how == "sequence_mean":
        return sequence_mean(per_token, action_mask, denominator=denominator)
    if how == "sequence_sum":
        return sequence_sum(per_token, action_mask, denominator=denominator)
    check_choice("how", how, get_args(Reduction))
    if length is None:
        raise InputError("how='fixed_length' needs length, the number of tokens every sequence counts as")
    return fixed_length(per_token, action_mask, denominator=denominator, length=length)


def count(action_mask: Tensor, *, how: Reduction) -> Tensor:
    """What this mask adds to the denominator, [] int64: tokens for token_mean, else sequences with any token."""
    check_mask(action_mask=action_mask)
    check_choice("how", how, get_args(Reduction))
    return action_mask.sum() if how == "token_mean" else action_mask.any(-1).sum()


def token_mean(per_token: Tensor, action_mask: Tensor, *, denominator: Tensor | float) -> Tensor:
    """Sum over all tokens / denominator: every token weighs the same, long sequences weigh more.

    Args:
        per_token: [..., T] float. action_mask: [..., T] bool.
        denominator: action tokens in the whole optimizer step; below 1 it counts as 1 (an empty step gives 0).
    Returns:
        [] per_token's unit.
    Source: Yu et al. 2025 (DAPO), arXiv:2503.14476, section 3.3.
    """
    return masked_mean(per_token, action_mask, denominator=denominator)


def sequence_mean(per_token: Tensor, action_mask: Tensor, *, denominator: Tensor | float) -> Tensor:
    """Sum over sequences of each one's token mean / denominator: every sequence weighs the same.

    Args:
        per_token: [B, T] float. action_mask: [B, T] bool; a row without a token counts for nothing.
        denominator: sequences with any token in the whole optimizer step; below 1 it counts as 1.
    Returns:
        [] per_token's unit.
    Source: Shao et al. 2024 (GRPO), arXiv:2402.03300, eq. 3.
    """
    means = masked_mean(per_token, action_mask, dim=-1)
    return masked_mean(means, torch.ones_like(means, dtype=torch.bool), denominator=denominator)


def sequence_sum(per_token: Tensor, action_mask: Tensor, *, denominator: Tensor | float) -> Tensor:
    """Sum over all tokens / denominator, which counts sequences: the mean over sequences of each one's token sum.

    With `log_probs` in the loss, that is the log-probability of the whole sequence: the policy gradient as derived for
    whole episodes. Gradients grow with the length; `fixed_length` is the same divided by a constant.

    Args:
        per_token: [B, T] float. action_mask: [B, T] bool; a row without a token counts for nothing.
        denominator: sequences with any token in the whole optimizer step; below 1 it counts as 1.
    Returns:
        [] per_token's unit.
    Source: Williams 1992, REINFORCE, episodic form; Ahmadian et al. 2024 (RLOO), arXiv:2402.14740, section 3.
    """
    return masked_mean(per_token, action_mask, denominator=denominator)


def fixed_length(per_token: Tensor, action_mask: Tensor, *, denominator: Tensor | float, length: int) -> Tensor:
    """Sum over all tokens / (denominator * length): a token weighs the same in every batch, however long others are.

    Args:
        per_token: [B, T] float. action_mask: [B, T] bool.
        denominator: sequences with any token in the whole optimizer step; below 1 it counts as 1.
        length: tokens, a constant such as the limit on new tokens, >= 1.
    Returns:
        [] per_token's unit.
    Source: Liu et al. 2025 (Dr. GRPO), arXiv:2503.20783, section 3.2.
    """
    check_range("length", length, low=1)
    return masked_mean(per_token, action_mask, denominator=denominator) / length
