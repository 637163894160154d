"""Floats of any type, mixed: computed in the one that holds them all, at least float32."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.advantages import gae, monte_carlo_returns, vtrace
from rlhf.group_advantages import decoupled_group_advantages, group_normalized_advantages, leave_one_out_advantages
from rlhf.kl import exact_kl, kl_estimate
from rlhf.losses import (
    categorical_entropy,
    clipped_surrogate_loss,
    importance_weighted_loss,
    kl_penalized_surrogate_loss,
    reinforce_loss,
    value_loss,
)
from rlhf.masking import masked_mean, masked_sum, masked_var, masked_whiten
from rlhf.policy_losses import cispo_loss, gspo_loss, sampler_importance_weights, sapo_loss, token_covariance
from rlhf.preference_losses import bradley_terry_loss, dpo_loss, ipo_loss
from rlhf.reduce import sequence_mean, token_mean
from rlhf.rewards import combine_rewards, shape_scores

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ROWS, STEPS = 6, 9
MASK = torch.rand(ROWS, STEPS, generator=torch.Generator().manual_seed(1)) < 0.8
GROUPS = torch.arange(ROWS) % 2


def of_rows(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda *args: function(*args, MASK, **options)


# Each with the number of [ROWS, STEPS] floats that it takes.
FUNCTIONS: dict[str, tuple[int, Callable[..., Any]]] = {
    "reinforce": (2, of_rows(reinforce_loss)),
    "importance weighted": (3, of_rows(importance_weighted_loss)),
    "clipped": (3, of_rows(clipped_surrogate_loss, dual_clip=1.5)),
    "kl penalized": (3, of_rows(kl_penalized_surrogate_loss, kl_coef=0.3)),
    "value": (2, of_rows(value_loss)),
    "value, clipped": (3, lambda v, r, old: value_loss(v, r, MASK, old_values=old, value_clip=0.1)),
    "gspo": (3, of_rows(gspo_loss, clip_low=0.1, clip_high=0.1)),
    "cispo": (3, of_rows(cispo_loss, clip_high=1.0)),
    "sapo": (3, of_rows(sapo_loss)),
    "sampler weights": (2, of_rows(sampler_importance_weights, level="sequence", mode="mask", high=5.0)),
    "covariance": (2, of_rows(token_covariance)),
    "k3": (2, of_rows(kl_estimate, estimator="k3")),
    "exact kl": (2, lambda p, q: exact_kl(p, q, MASK[:, 0])),
    "entropy": (1, lambda logits: categorical_entropy(logits, MASK[:, 0])),
    "bradley terry": (2, bradley_terry_loss),
    "dpo": (4, lambda *x: dpo_loss(*x, beta=0.1)),
    "ipo": (4, lambda *x: ipo_loss(*x, beta=0.1)),
    "sum": (1, of_rows(masked_sum)),
    "mean": (1, of_rows(masked_mean, dim=-1)),
    "variance": (1, of_rows(masked_var)),
    "whiten": (1, of_rows(masked_whiten)),
    "token mean": (1, of_rows(token_mean, denominator=7)),
    "sequence mean": (1, of_rows(sequence_mean, denominator=3)),
    "monte carlo": (1, of_rows(monte_carlo_returns, gamma=0.9)),
    "groups": (1, lambda x: group_normalized_advantages(x[:, 0], GROUPS)),
    "leave one out": (1, lambda x: leave_one_out_advantages(x[:, 0], GROUPS)),
    "decoupled": (1, lambda x: decoupled_group_advantages(x, GROUPS, [1.0] * STEPS)),
    "components": (1, lambda x: combine_rewards(x, [0.3] * STEPS)),
    "shaped": (1, lambda x: shape_scores(x[:, 0], MASK[:, 0], clip=0.4, missing_eos_penalty=0.3)),
}


def tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [x for x in found if x.is_floating_point()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_types_are_brought_together_before_anything_is_computed(name: str) -> None:
    count, function = FUNCTIONS[name]
    exact = torch.randn(count, ROWS, STEPS, generator=torch.Generator().manual_seed(0)).double()
    for types in itertools.product(TYPES, repeat=count):
        common = torch.promote_types(max(types, key=lambda t: t.itemsize), torch.float32)
        given = [x.to(t) for x, t in zip(exact, types, strict=True)]
        expected = tensors(function(*(x.to(common) for x in given)))
        for got, want in zip(tensors(function(*given)), expected, strict=True):
            assert got.dtype == common, types
            assert torch.equal(got, want), types


@pytest.mark.parametrize(("one", "two"), itertools.product(TYPES, repeat=2))
def test_nothing_is_clipped_where_the_policy_has_not_moved(one: torch.dtype, two: torch.dtype) -> None:
    exact = torch.randn(2, ROWS, STEPS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_probs, advantages = exact[0].to(one).requires_grad_(), exact[1].to(two)
    loss, ratio, is_clipped = clipped_surrogate_loss(log_probs, log_probs.detach(), advantages, MASK)
    assert not is_clipped.any()
    assert torch.equal(ratio, torch.ones_like(ratio))
    loss.sum().backward()
    assert log_probs.grad is not None
    torch.testing.assert_close(log_probs.grad, torch.where(MASK, -advantages, 0).to(one), rtol=0, atol=0)
    assert not value_loss(exact[0].to(one), advantages, MASK, old_values=exact[0].to(one), value_clip=0.1)[1].any()


@pytest.mark.parametrize("dtype", TYPES)
def test_estimators_take_values_of_another_type(dtype: torch.dtype) -> None:
    exact = torch.randn(4, ROWS, STEPS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rewards, values, log_probs, old = exact.float()
    values = values.to(dtype)
    mine = gae(rewards, values, MASK, gamma=0.9, gae_lambda=0.8)
    for got, want in zip(mine, gae(rewards, values.float(), MASK, gamma=0.9, gae_lambda=0.8), strict=True):
        assert torch.equal(got, want)
    half = gae(rewards.to(dtype), values, MASK)
    assert half.advantages.dtype == torch.promote_types(dtype, torch.float32)
    found = vtrace(rewards, values, log_probs, old, MASK)
    for got, want in zip(found, vtrace(rewards, values.float(), log_probs, old, MASK), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_batches_of_half_precision_are_counted(dtype: torch.dtype) -> None:
    """float16 ends at 65,504; bfloat16 has no odd number above 256."""
    ones, mask = torch.ones(70_000, dtype=dtype), torch.ones(70_000, dtype=torch.bool)
    assert float(token_mean(ones, mask, denominator=70_000)) == pytest.approx(1)
    whitened = masked_whiten(torch.arange(70_000).remainder(2).to(dtype), mask)
    assert float(whitened.abs().max()) == pytest.approx(1, abs=1e-3)
    scores = torch.arange(600).remainder(2).to(dtype)
    advantages = group_normalized_advantages(scores, torch.zeros(600, dtype=torch.int64), divide_by_std=False)
    assert torch.equal(advantages, scores.float() - 0.5)
