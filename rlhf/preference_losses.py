"""Losses of preference pairs, unreduced: one number per pair of a chosen and a rejected answer.

A pair takes the place of an action: `pair_mask` is True where a pair is real, and the loss is exactly 0, with exactly 0
gradient, where it is False, whatever is there. Reduce with `rlhf.reduce.token_mean`, denominator = pairs of the step.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.checks import check_float, check_range, check_same_shape
from rlhf.masking import fill_masked, in_one_type


class PreferenceTerms(NamedTuple):
    """loss [...]; chosen_rewards and rejected_rewards [...]: beta * log(pi / pi_ref), detached; 0 in masked pairs."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def bradley_terry_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    margin: Tensor | None = None,
    center_coef: float = 0.0,
    pair_mask: Tensor | None = None,
) -> Tensor:
    """Reward model's loss: -log sigmoid(chosen - rejected - margin) + center_coef * (chosen + rejected)^2.

    The first term is blind to a constant added to all scores; the second, with a small coefficient, centres them at 0.

    Args:
        chosen_scores, rejected_scores: [...] float, score units (logits of the preference); carry the gradient.
        margin: [...] float, score units: how much better the chosen answer is; None for 0; detached.
        center_coef: 1 / score units squared, >= 0; 0.01 in the source.
        pair_mask: [...] bool, True where the pair is real; None where all are.
    Returns:
        [...] nats, 0 in masked pairs.
    Raises:
        InputError: shapes differ, the mask is not bool or center_coef < 0.
    Source: Bradley & Terry 1952; margin: Touvron et al. 2023 (Llama 2), arXiv:2307.09288, eq. 2; centring: Eisenstein
        et al. 2023, arXiv:2312.09244, eq. 2.
    """
    check_range("center_coef", center_coef, low=0, high_open=True)
    check_same_shape(chosen_scores=chosen_scores, rejected_scores=rejected_scores, margin=margin, pair_mask=pair_mask)
    check_float(chosen_scores=chosen_scores, rejected_scores=rejected_scores, margin=margin)
    chosen_scores, rejected_scores = in_one_type(chosen_scores, rejected_scores)
    mask = _everywhere(chosen_scores) if pair_mask is None else pair_mask
    chosen, rejected = fill_masked(chosen_scores, mask), fill_masked(rejected_scores, mask)
    lead = chosen - rejected if margin is None else chosen - rejected - fill_masked(margin.detach(), mask)
    return fill_masked(-logsigmoid(lead) + center_coef * (chosen + rejected).square(), mask)


def dpo_loss(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    ref_chosen_log_probs: Tensor,
    ref_rejected_log_probs: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    pair_mask: Tensor | None = None,
) -> PreferenceTerms:
    """DPO: -(1 - eps) log sigmoid(h) - eps log sigmoid(-h), h = beta * (log ratio of chosen - log ratio of rejected).

    `label_smoothing` = eps assumes that a share eps of the labels is the wrong way round (conservative DPO).

    Args:
        chosen_log_probs, rejected_log_probs: [...] float, nats: log pi of the whole answer, its tokens summed with
            `rlhf.masking.masked_sum(log_probs, action_mask, dim=-1)` (`masked_mean` for the length-normalised form);
            carry the gradient.
        ref_chosen_log_probs, ref_rejected_log_probs: [...] float, nats, of the frozen reference; detached.
        beta: 1 / nats, > 0: how dear it is to leave the reference.
        label_smoothing: probability, 0 <= label_smoothing < 0.5.
        pair_mask: [...] bool, True where the pair is real; None where all are.
    Returns:
        PreferenceTerms(loss [...] nats, chosen_rewards [...], rejected_rewards [...]). At the reference: log 2, 0, 0.
    Raises:
        InputError: shapes differ, the mask is not bool, beta or label_smoothing is out of range.
    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; smoothing: Mitchell 2023, "A note on DPO with noisy
        preferences & relationship to IPO", eq. 3.
    """
    check_range("beta", beta, low=0, low_open=True, high_open=True)
    check_range("label_smoothing", label_smoothing, low=0, high=0.5, high_open=True)
    answers = (chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs)
    chosen, rejected, mask = _log_ratios(*answers, pair_mask)
    h = beta * (chosen - rejected)
    loss = -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)
    return PreferenceTerms(fill_masked(loss, mask), beta * chosen.detach(), beta * rejected.detach())


def ipo_loss(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    ref_chosen_log_probs: Tensor,
    ref_rejected_log_probs: Tensor,
    *,
    beta: float,
    pair_mask: Tensor | None = None,
) -> PreferenceTerms:
    """IPO: (log ratio of chosen - log ratio of rejected - 1 / (2 beta))^2: the lead has a target, not a direction.

    Args: as in `dpo_loss`. The smaller beta, the larger the lead over the reference that is aimed at.
    Returns:
        PreferenceTerms(loss [...] nats squared, chosen_rewards [...], rejected_rewards [...]).
    Raises:
        InputError: shapes differ, the mask is not bool or beta is out of range.
    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17 (its tau is our beta).
    """
    check_range("beta", beta, low=0, low_open=True, high_open=True)
    answers = (chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs)
    chosen, rejected, mask = _log_ratios(*answers, pair_mask)
    loss = (chosen - rejected - 1 / (2 * beta)).square()
    return PreferenceTerms(fill_masked(loss, mask), beta * chosen.detach(), beta * rejected.detach())


def _log_ratios(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, pair_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """log(pi / pi_ref) of both answers with gradient, 0 in masked pairs; and the mask."""
    log_probs = {"chosen_log_probs": chosen, "rejected_log_probs": rejected}
    log_probs |= {"ref_chosen_log_probs": ref_chosen, "ref_rejected_log_probs": ref_rejected}
    check_same_shape(**log_probs, pair_mask=pair_mask)
    check_float(**log_probs)
    chosen, rejected, ref_chosen, ref_rejected = in_one_type(chosen, rejected, ref_chosen, ref_rejected)
    mask = _everywhere(chosen) if pair_mask is None else pair_mask
    return fill_masked(chosen - ref_chosen.detach(), mask), fill_masked(rejected - ref_rejected.detach(), mask), mask


def _everywhere(x: Tensor) -> Tensor:
    return torch.ones_like(x, dtype=torch.bool)
