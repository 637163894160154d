"""Advantages of whole sequences: each score against those of other samples of the same prompt, its group.

Common to all:

- `group_ids` [B] holds any integers, in any order; groups may differ in size. A group is to be whole: gather scores
  from all processes first.
- The result [B] is one advantage per sequence, shared by all its actions: `advantages[:, None].expand_as(action_mask)`.
- A group without signal (all scores equal, or one member, which has nothing to be compared with) gets exactly 0.
- NaN among the scores is a fault upstream and comes through; zeros would look like a group without signal.
- Nothing here is differentiated: results are detached.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.checks import InputError, check_float, check_range, check_same_shape
from rlhf.masking import in_one_type


class _Groups(NamedTuple):
    """Scores [B] in units of their group's own range, from its lowest score.

    So neither a common offset of 5,000 nor differences of 1e-30, whose squares would vanish, cost any digits.
    """

    members: Tensor  # [B] int64, groups numbered from 0
    size: Tensor  # [B] of each one's group
    lowest: Tensor  # [B] score units
    spread: Tensor  # [B] score units, highest - lowest; 1 without signal
    has_signal: Tensor  # [B] bool; scores are compared: the std of equal float32 numbers need not be 0
    above: Tensor  # [B] in [0, 1]

    def total(self, x: Tensor) -> Tensor:
        """Sum of x over each one's group, [B]."""
        return x.new_zeros(x.shape[0]).index_add(0, self.members, x)[self.members]

    def centred(self) -> Tensor:
        return self.above - self.total(self.above) / self.size

    def std(self, ddof: int) -> Tensor:
        variance = self.total(self.centred().square()) / (self.size - ddof).clamp(min=1)
        return variance.sqrt()

    def divided(self, x: Tensor, std: Tensor, epsilon: float) -> Tensor:
        """x / (std + epsilon), where epsilon is in score units and the others in those of the range."""
        return x / (std + torch.full_like(self.spread, epsilon) / self.spread)

    def where_signal(self, advantages: Tensor) -> Tensor:
        return torch.where(self.has_signal, advantages, 0.0)


def group_normalized_advantages(
    scores: Tensor, group_ids: Tensor, *, divide_by_std: bool = True, ddof: int = 1, epsilon: float = 0.0
) -> Tensor:
    """(score - group mean) / (group std + epsilon), one advantage per sequence, shared by all its tokens.

    Since groups without signal are found by comparing scores, epsilon is not needed against division by zero, and its
    default leaves the result invariant to a * score + b (a > 0).

    Args:
        scores: [B] float, one verdict per sequence.
        group_ids: [B] int64, equal for samples of the same prompt; any numbering, any order, any group sizes.
        divide_by_std: False only centres (Dr. GRPO).
        ddof: 1 for the unbiased std, 0 for the biased one.
        epsilon: added to the std, in score units.
    Returns:
        [B], dimensionless (score units if not divided).
    Raises:
        InputError: shapes differ, scores are not [B] floats, group_ids not integers, ddof not 0 or 1, epsilon < 0.
    Source: Shao et al. 2024 (GRPO), arXiv:2402.03300, section 4.1.2; without std: Liu et al. 2025, arXiv:2503.20783.
    """
    check_range("ddof", ddof, low=0, high=1)
    check_range("epsilon", epsilon, low=0)
    groups = _grouped(scores, group_ids)
    if divide_by_std:
        return groups.where_signal(groups.divided(groups.centred(), groups.std(ddof), epsilon))
    return groups.where_signal(groups.centred() * groups.spread)


def leave_one_out_advantages(
    scores: Tensor, group_ids: Tensor, *, divide_by_std: bool = False, epsilon: float = 0.0
) -> Tensor:
    """Score minus the mean of the other scores of its group (RLOO); of n members, n / (n - 1) (score - group mean).

    The baseline does not depend on the sample that it is for, so the policy gradient stays unbiased; that of the group
    mean is (n - 1) / n as large. A group of one has no others, hence no baseline: it gets 0, not its raw score, which
    would be weighed against advantages of a different kind.

    Args:
        scores, group_ids: [B]; see the module.
        divide_by_std: also divide by the unbiased std of the others. Where they all agree, or are fewer than two, there
            is none, and the difference stays in score units. Takes B * B memory.
        epsilon: added to that std, in score units.
    Returns:
        [B], score units (dimensionless where divided).
    Raises:
        InputError: shapes differ, scores are not [B] floats, group_ids not integers, epsilon < 0.
    Source: Ahmadian et al. 2024 (RLOO), arXiv:2402.14740; with std: NeMo-RL's default for GRPO.
    """
    check_range("epsilon", epsilon, low=0)
    groups = _grouped(scores, group_ids)
    difference = groups.centred() * groups.size / (groups.size - 1).clamp(min=1)
    advantages = difference * groups.spread
    if divide_by_std:
        std = _std_of_others(groups)
        advantages = torch.where(std == 0, advantages, groups.divided(difference, std, epsilon))
    return groups.where_signal(advantages)


def length_weighted_advantages(scores: Tensor, lengths: Tensor, group_ids: Tensor) -> Tensor:
    """Score minus the mean score of its group, in which each counts by its length (OPO).

    The baseline of least variance, if the squared norm of grad log pi of a sequence grows as its length.

    Args:
        scores, group_ids: [B]; see the module.
        lengths: [B] int64, actions in each sequence, `action_mask.sum(-1)`.
    Returns:
        [B], score units.
    Raises:
        InputError: shapes differ, scores are not [B] floats, lengths or group_ids not integers.
    Source: Hao et al. 2025 (OPO), arXiv:2505.23585.
    """
    check_same_shape(scores=scores, lengths=lengths, group_ids=group_ids)
    _check_integers(lengths=lengths)
    groups = _grouped(scores, group_ids)
    weights = lengths.to(groups.above.dtype)
    baseline = groups.total(weights * groups.above) / groups.total(weights).clamp(min=1)
    return groups.where_signal((groups.above - baseline) * groups.spread)


def mean_normalized_advantages(scores: Tensor, group_ids: Tensor) -> Tensor:
    """(score - group mean) / group mean: of verdicts 0 and 1, the gradient of log pass rate (MaxRL), not of pass rate.

    Args:
        scores: [B] float, >= 0 (a mean near or below 0 has no meaning here).
        group_ids: [B]; see the module.
    Returns:
        [B], dimensionless.
    Raises:
        InputError: shapes differ, scores are not [B] floats, group_ids not integers.
    Source: Tajwar et al. 2026 (MaxRL), arXiv:2602.02710.
    """
    groups = _grouped(scores, group_ids)
    mean = groups.total(groups.above) / groups.size
    return groups.where_signal((groups.above - mean) / (groups.lowest / groups.spread + mean))


def best_of_group_advantages(
    scores: Tensor, group_ids: Tensor, *, divide_by_std: bool = False, ddof: int = 1, epsilon: float = 0.0
) -> Tensor:
    """What each sample adds to the best score of its group: best minus runner-up for the best one, 0 for all others.

    The leave-one-out baseline for max@k (pass@k for verdicts of 0 and 1), where k is the group's size. A shared first
    place adds nothing.

    Args:
        scores, group_ids: [B]; see the module.
        divide_by_std, ddof, epsilon: by the group's std, as in `group_normalized_advantages`.
    Returns:
        [B], score units (dimensionless if divided), never negative.
    Raises:
        InputError: as in `group_normalized_advantages`.
    Source: Tang et al. 2025, arXiv:2503.19595.
    """
    check_range("ddof", ddof, low=0, high=1)
    check_range("epsilon", epsilon, low=0)
    groups = _grouped(scores, group_ids)
    is_best = groups.above == 1
    is_alone = groups.total(is_best.to(groups.above.dtype)) == 1
    below_best = groups.above.masked_fill(is_best, 0.0)  # 0 is the lowest score
    runner_up = torch.zeros_like(below_best).scatter_reduce(0, groups.members, below_best, "amax")[groups.members]
    gain = torch.where(is_best & is_alone, 1 - runner_up, 0.0)
    if divide_by_std:
        return groups.where_signal(groups.divided(gain, groups.std(ddof), epsilon))
    return groups.where_signal(gain * groups.spread)


def decoupled_group_advantages(
    components: Tensor,
    group_ids: Tensor,
    weights: Tensor | Sequence[float],
    *,
    divide_by_std: bool = True,
    ddof: int = 1,
    epsilon: float = 0.0,
) -> Tensor:
    """Each reward component normalised within its group, then their weighted sum (GDPO).

    No component outweighs another by its scale, and different rewards of one total stay distinct. GDPO whitens the
    result over the batch afterwards, `masked_whiten`. One component is `group_normalized_advantages`, NaN left out.

    Args:
        components: [B, K] float, scores by component. NaN: not applicable; it is not counted in its group and adds 0.
        group_ids: [B]; see the module.
        weights: [K], dimensionless.
        divide_by_std, ddof, epsilon: as in `group_normalized_advantages`, for each component.
    Returns:
        [B], dimensionless (weighted score units if not divided).
    Raises:
        InputError: components are not [B, K] floats, weights not [K], or as in `group_normalized_advantages`.
    Source: Liu et al. 2026 (GDPO), arXiv:2601.05242.
    """
    check_float(components=components)
    if components.ndim != 2:
        raise InputError(f"components must be [B, K], one column per component, got {list(components.shape)}")
    (components,) = in_one_type(components)
    weights = torch.as_tensor(weights, dtype=components.dtype, device=components.device)
    check_same_shape(one_row_of_components=components.new_empty(components.shape[1:]), weights=weights)
    check_same_shape(one_component=components.new_empty(components.shape[:1]), group_ids=group_ids)
    _check_integers(group_ids=group_ids)
    _, members = torch.unique(group_ids, return_inverse=True)
    alone = len(members) + torch.arange(len(members), device=members.device)  # groups of one, whose advantage is 0
    total = components.new_zeros(len(members))
    for component, weight in zip(components.unbind(-1), weights, strict=True):
        missing = component.isnan()
        total = total + weight * group_normalized_advantages(
            component.masked_fill(missing, 0.0), torch.where(missing, alone, members),
            divide_by_std=divide_by_std, ddof=ddof, epsilon=epsilon,
        )  # fmt: skip
    return total


def keep_lone_scores(advantages: Tensor, scores: Tensor, group_ids: Tensor) -> Tensor:
    """The advantages, but the raw score where a group has one member: a peer's habit, see `rlhf.conventions`.

    Args:
        advantages, scores, group_ids: [B]; see the module.
    Returns:
        [B].
    Raises:
        InputError: shapes differ or group_ids are not integers.
    """
    check_same_shape(advantages=advantages, scores=scores, group_ids=group_ids)
    _check_integers(group_ids=group_ids)
    _, members, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
    return torch.where(sizes[members] == 1, scores.detach().to(advantages.dtype), advantages)


def _check_integers(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.is_floating_point() or x.dtype == torch.bool:
            raise InputError(f"{name} must be integers, got {x.dtype}")


def _grouped(scores: Tensor, group_ids: Tensor) -> _Groups:
    """Check both and measure each score within its group."""
    check_same_shape(scores=scores, group_ids=group_ids)
    check_float(scores=scores)
    if scores.ndim != 1:
        raise InputError(f"scores must be [B], one per sequence, got {list(scores.shape)}")
    _check_integers(group_ids=group_ids)
    (scores,) = in_one_type(scores.detach())
    _, members = torch.unique(group_ids, return_inverse=True)
    empty = scores.new_zeros(scores.shape[0])  # at most B groups
    lowest = empty.scatter_reduce(0, members, scores, "amin", include_self=False)[members]
    highest = empty.scatter_reduce(0, members, scores, "amax", include_self=False)[members]
    size = empty.index_add(0, members, torch.ones_like(scores))[members]
    spread = highest - lowest
    has_signal = ~(spread <= 0)  # a NaN among the scores is no lack of signal: it comes through
    spread = torch.where(has_signal, spread, 1.0)
    return _Groups(members, size, lowest, spread, has_signal, (scores - lowest) / spread)


def _std_of_others(groups: _Groups) -> Tensor:
    """Unbiased std of the rest of each one's group, [B] in units of its range.

    Exactly 0 if they agree: all of them are 0 or all are 1 then, whose mean is not rounded.
    """
    x = groups.above
    others = (groups.members[:, None] == groups.members) & ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    mean = torch.where(others, x, 0.0).sum(-1) / (groups.size - 1).clamp(min=1)
    squares = torch.where(others, x - mean[:, None], 0.0).square().sum(-1)
    return (squares / (groups.size - 2).clamp(min=1)).sqrt()
