"""Conventions beyond numbers: gaps, the slot of the terminal reward, counting of rows, clamps; in closed form."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.algorithm import AlgorithmConfig
from rlhf.checks import InputError
from rlhf.conventions import CONVENTIONS, Convention
from rlhf.losses import value_loss
from rlhf.objective import critic_loss, estimate_advantages, loss_denominator, policy_loss

GAMMA, LAMBDA = 0.9, 0.7
GAPPED = torch.tensor([[True, False, False, True, False], [True, True, True, True, True], [False] * 5])


def plain(convention: str, **options: Any) -> AlgorithmConfig:
    settings = {"gamma": GAMMA, "gae_lambda": LAMBDA, "whiten_advantages": False, **options}
    return AlgorithmConfig(convention=convention, **settings)  # type: ignore[arg-type]


def estimate(
    config: AlgorithmConfig, mask: Tensor, scores: list[float], values: Tensor | None
) -> tuple[Tensor, Tensor]:
    score = torch.tensor(scores, dtype=torch.float64)
    found = estimate_advantages(config, mask, scores=score, group_ids=torch.arange(len(mask)), values=values)
    return found.advantages, torch.empty(0) if found.returns is None else found.returns


def test_the_critic_is_asked_one_slot_further_where_there_is_one() -> None:
    further = GAPPED.clone()
    further[0, 4] = True
    assert torch.equal(CONVENTIONS["trl"].value_mask(GAPPED), further)
    for name in CONVENTIONS.keys() - {"trl"}:
        assert torch.equal(CONVENTIONS[name].value_mask(GAPPED), GAPPED), name


def test_a_score_one_slot_after_the_last_action() -> None:
    """Two actions with values V0, V1, and V2 after them: the score meets V2 first. A row without room is as ours."""
    values = torch.tensor([[0.3, -0.2, 0.5], [0.3, -0.2, 0.5]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    advantages, returns = estimate(plain("trl"), mask, [2.0, 2.0], values)
    after = 2.0 - 0.5
    last = GAMMA * 0.5 - -0.2 + GAMMA * LAMBDA * after
    first = GAMMA * -0.2 - 0.3 + GAMMA * LAMBDA * last
    expected = torch.tensor([first, last, 0.0], dtype=torch.float64)
    torch.testing.assert_close(advantages[0], expected)
    torch.testing.assert_close(returns[0], expected + values[0] + torch.tensor([0.0, 0.0, after]).double())
    ours = estimate(plain("ours"), mask, [2.0, 2.0], values)
    torch.testing.assert_close(advantages[1], ours[0][1])
    torch.testing.assert_close(returns[1], ours[1][1])


def test_where_the_score_stands_makes_no_difference_to_monte_carlo() -> None:
    """Undiscounted and with lambda 1, values along the way cancel."""
    values = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = [
        estimate(plain(name, gamma=1.0, gae_lambda=1.0), GAPPED, [1.0, 2.0, 3.0], values)[0] for name in ("trl", "ours")
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("advantage", ["gae", "reward_to_go"])
def test_gaps_are_carried_over_or_discounted_through(advantage: str) -> None:
    """Without values an action is worth the score times gamma (and lambda) for every step up to it."""
    mask = torch.tensor([[True, False, False, True, False]])
    decay = GAMMA * LAMBDA if advantage == "gae" else GAMMA
    for convention, steps in (("ours", 1), ("openrlhf", 3)):
        config = plain(convention, advantage=advantage, critic="none")
        advantages, _ = estimate(config, mask, [2.0], None)
        expected = torch.tensor([[2.0 * decay**steps, 0.0, 0.0, 2.0, 0.0]], dtype=torch.float64)
        torch.testing.assert_close(advantages, expected)


def test_values_in_gaps_are_zero_where_gaps_are_steps() -> None:
    mask = torch.tensor([[True, False, True]])
    values = torch.tensor([[0.5, math.nan, 0.25]], dtype=torch.float64)
    advantages, returns = estimate(plain("openrlhf"), mask, [1.0], values)
    last, through = 1.0 - 0.25, GAMMA * 0.25  # the step through the gap: from 0 to 0.25
    first = -0.5 + GAMMA * LAMBDA * (through + GAMMA * LAMBDA * last)
    torch.testing.assert_close(advantages, torch.tensor([[first, 0.0, last]], dtype=torch.float64))
    assert not returns[~mask].any()


@pytest.mark.parametrize("reduction", ["sequence_mean", "sequence_sum", "fixed_length"])
@pytest.mark.parametrize(("convention", "rows"), [("ours", 2), ("verl", 2 + 1e-8), ("trl", 3), ("nemo_rl", 3 + 1e-8)])
def test_rows_without_actions_count_or_do_not(reduction: str, convention: str, rows: float) -> None:
    assert float(loss_denominator(plain(convention, reduction=reduction), GAPPED)) == rows
    tokens = float(loss_denominator(plain(convention, reduction="token_mean"), GAPPED))
    assert tokens == 7 + CONVENTIONS[convention].count_epsilon


LOG_PROBS = torch.tensor([[math.log(50.0), 12.0, 25.0]], dtype=torch.float64)  # log ratios, the old ones being 0
ALL = torch.ones(1, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("convention", "options", "bounds"),
    [
        ("ours", {}, [math.inf] * 3),
        ("verl", {}, [3.0] * 3),
        ("verl", {"dual_clip": 7.0}, [7.0] * 3),
        ("openrlhf", {}, [math.exp(20)] * 3),
    ],
)
def test_ratios_of_bad_actions_are_bounded_as_the_convention_says(
    convention: str, options: dict[str, float], bounds: list[float]
) -> None:
    config = AlgorithmConfig(convention=convention, **options)  # type: ignore[arg-type]
    loss = policy_loss(config, LOG_PROBS, torch.zeros_like(LOG_PROBS), -torch.ones_like(LOG_PROBS), ALL).loss
    torch.testing.assert_close(loss, LOG_PROBS.exp().minimum(torch.tensor([bounds], dtype=torch.float64)))


def test_ratios_of_whole_sequences_have_a_bound_of_their_own() -> None:
    config = AlgorithmConfig(policy_loss="gspo", advantage="group", critic="none", convention="verl")
    log_probs = torch.full((1, 3), 12.0, dtype=torch.float64)
    loss = policy_loss(config, log_probs, torch.zeros_like(log_probs), -torch.ones_like(log_probs), ALL).loss
    torch.testing.assert_close(loss, torch.full_like(loss, math.exp(10)))


def test_a_clipped_value_may_take_the_place_of_the_other() -> None:
    """Ours is the worse of both: they differ where clipping helps, and then theirs has no gradient."""
    values = torch.tensor([[2.0, 0.1]], dtype=torch.float64, requires_grad=True)
    old, returns = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    mask = torch.ones(1, 2, dtype=torch.bool)
    args = (values, returns, mask)
    theirs, is_clipped = critic_loss(AlgorithmConfig(convention="stable_baselines3"), *args, old_values=old)
    assert is_clipped.tolist() == [[True, False]]
    torch.testing.assert_close(theirs, torch.tensor([[0.2**2, 0.9**2]], dtype=torch.float64))
    torch.testing.assert_close(
        torch.autograd.grad(theirs.sum(), values)[0], torch.tensor([[0.0, -1.8]], dtype=torch.float64)
    )
    ours = critic_loss(AlgorithmConfig(), *args, old_values=old).loss
    assert torch.equal(ours, value_loss(*args, old_values=old, value_clip=0.2).loss)
    with pytest.raises(InputError, match="old_values"):
        critic_loss(AlgorithmConfig(convention="stable_baselines3"), *args)


@pytest.mark.parametrize(
    "options",
    [{"gaps": "skipped"}, {"terminal_reward": "first"}, {"dual_clip": 1.0}, {"sequence_dual_clip": 0.5}],
    ids=str,
)
def test_a_convention_out_of_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        Convention(**options)


def test_a_critic_that_reads_the_actor_cannot_look_one_slot_further() -> None:
    with pytest.raises(InputError, match="critic='separate'"):
        AlgorithmConfig(critic="shared", convention="trl")
