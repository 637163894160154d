"""Rewards from scores: several components as one score, a penalty for length, a score's place among the actions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.checks import InputError, check_float, check_mask, check_range, check_same_shape, check_time_axis


def combine_rewards(components: Tensor, weights: Tensor | Sequence[float]) -> Tensor:
    """The weighted sum of the components that apply to each sequence.

    To normalise each component within its group first, see `rlhf.group_advantages.decoupled_group_advantages`.

    Args:
        components: [B, K] float, one column per reward function. NaN: not applicable; it adds nothing, and the weights
            of the others stay as they are.
        weights: [K], score units per unit of the component.
    Returns:
        [B] scores; NaN where no component applies, since there is no verdict.
    Raises:
        InputError: components are not [B, K] floats or weights not [K].
    """
    check_float(components=components)
    if components.ndim != 2:
        raise InputError(f"components must be [B, K], one column per component, got {list(components.shape)}")
    components = components.detach()
    weights = torch.as_tensor(weights, dtype=components.dtype, device=components.device)
    check_same_shape(one_row_of_components=components.new_empty(components.shape[1:]), weights=weights)
    applies = ~components.isnan()
    total = torch.where(applies, components * weights, 0.0).sum(-1)
    return torch.where(applies.any(-1), total, torch.nan)


def overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int, scale: float = 1.0) -> Tensor:
    """DAPO's soft overlong punishment, to be added to the score.

    0 up to max_length - buffer actions, from there in a straight line to -scale at max_length, and -scale beyond.

    Args:
        lengths: [B] int64, actions in each sequence, `action_mask.sum(-1)`.
        max_length, buffer: actions, 1 <= buffer <= max_length.
        scale: score units, >= 0.
    Returns:
        [B] score units, in [-scale, 0], torch's default float type.
    Raises:
        InputError: lengths are not integers or a number is out of range.
    Source: Yu et al. 2025 (DAPO), arXiv:2503.14476, eq. 13.
    """
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise InputError(f"lengths must be integers, got {lengths.dtype}")
    check_range("buffer", buffer, low=1, high=max_length)
    check_range("scale", scale, low=0)
    return scale * ((max_length - buffer - lengths).clamp(min=-buffer, max=0) / buffer)


def rewards_at_last_action(scores: Tensor, action_mask: Tensor) -> Tensor:
    """Each sequence's score as the reward of its last action; all other rewards are 0.

    Args:
        scores: [...] float, one verdict per sequence.
        action_mask: [..., T] bool. A row without an action has no reward.
    Returns:
        [..., T] score units, scores' dtype.
    Raises:
        InputError: shapes do not fit, or the mask is not bool.
    """
    check_float(scores=scores)
    check_mask(action_mask=action_mask)
    check_time_axis(action_mask=action_mask)
    check_same_shape(scores=scores, action_mask_without_time=action_mask[..., 0])
    steps = torch.arange(action_mask.shape[-1], device=action_mask.device)
    last = torch.where(action_mask, steps, -1).amax(-1, keepdim=True)  # -1: no action in this row
    return torch.where(steps == last, scores.detach().unsqueeze(-1), 0.0)


def rewards_at_turn_ends(turn_scores: Tensor, action_mask: Tensor) -> Tensor:
    """Each turn's score as the reward of its last action; all other rewards are 0.

    A turn is a run of actions; what stands between two turns, somebody else's tokens, is False in the mask. Estimators
    carry values and advantages over such gaps, so that a turn is credited with what later turns earn.

    Args:
        turn_scores: [..., K] float, in order; columns beyond a row's last turn are padding and may hold anything.
        action_mask: [..., T] bool, at most K turns in a row.
    Returns:
        [..., T] score units, turn_scores' dtype.
    Raises:
        InputError: shapes do not fit, the mask is not bool, or a row has more than K turns.
    """
    check_float(turn_scores=turn_scores)
    check_mask(action_mask=action_mask)
    check_time_axis(action_mask=action_mask)
    check_same_shape(turn_scores_without_turns=turn_scores[..., 0], action_mask_without_time=action_mask[..., 0])
    starts = action_mask & ~torch.nn.functional.pad(action_mask[..., :-1], (1, 0))
    ends = action_mask & ~torch.nn.functional.pad(action_mask[..., 1:], (0, 1))
    turns = starts.long().cumsum(-1)  # from 1
    if int(turns.max()) > turn_scores.shape[-1]:
        raise InputError(
            f"action_mask has rows of {int(turns.max())} turns but turn_scores only {turn_scores.shape[-1]} columns: "
            "give one score for each run of actions"
        )
    return torch.where(ends, turn_scores.detach().gather(-1, (turns - 1).clamp(min=0)), 0.0)
