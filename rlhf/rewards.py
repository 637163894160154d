"""Rewards from scores: several components as one score, penalties, running normalisation, a score's place among the
actions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.checks import InputError, check_float, check_mask, check_range, check_same_shape, check_time_axis
from rlhf.masking import in_one_type


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
    (components,) = in_one_type(components.detach())
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


@dataclass(frozen=True)
class Moments:
    """Of all numbers seen so far: how many, their mean, and the sum of squared deviations from it."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def including(self, x: Tensor) -> "Moments":
        """The moments of all numbers seen and those of x, exactly as if they had come at once.

        Source: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1.
        """
        x = x.detach().double()
        count = self.count + x.numel()
        if not x.numel():
            return self
        mean = float(x.mean())
        shift = mean - self.mean
        squares = self.squares + float((x - mean).square().sum()) + shift**2 * self.count * x.numel() / count
        return Moments(count, self.mean + shift * x.numel() / count, squares)

    @property
    def std(self) -> float:
        """Biased; 1 where nothing has varied yet."""
        return (self.squares / self.count) ** 0.5 if self.squares > 0 else 1.0


def shape_scores(
    scores: Tensor,
    is_finished: Tensor,
    *,
    moments: Moments | None = None,
    clip: float | None = None,
    missing_eos_penalty: float = 0.0,
) -> Tensor:
    """A reward model's scores as PPO gets them: normalised, clipped, less a penalty for not ending; in this order.

    Args:
        scores: [B] float, score units.
        is_finished: [B] bool: the completion ended by itself.
        moments: of the run's scores, these included; the scores become (score - mean) / std. None: they stay.
        clip: > 0; held within +-clip. None: they are not.
        missing_eos_penalty: >= 0, subtracted where not finished.
    Returns:
        [B], units of std where normalised.
    Raises:
        InputError: shapes differ, is_finished is not bool or a number is out of range.
    Source: normalisation by running statistics and clipping: Zheng et al. 2023 (Secrets of RLHF I), arXiv:2307.04964,
        section 5.3.1; a low score for what does not end: Huang et al. 2024, arXiv:2403.17031, "EOS trick".
    """
    check_float(scores=scores)
    check_mask(is_finished=is_finished)
    check_same_shape(scores=scores, is_finished=is_finished)
    check_range("missing_eos_penalty", missing_eos_penalty, low=0, high_open=True)
    (scores,) = in_one_type(scores.detach())
    if moments is not None:
        scores = (scores - moments.mean) / moments.std
    if clip is not None:
        check_range("clip", clip, low=0, low_open=True)
        scores = scores.clamp(-clip, clip)
    return torch.where(is_finished, scores, scores - missing_eos_penalty)


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
