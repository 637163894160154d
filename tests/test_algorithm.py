"""The data chooses the core's functions: each option against a direct call of what it names, or its closed form."""

import dataclasses
import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from rlhf import group_advantages as groups
from rlhf.advantages import gae, monte_carlo_returns
from rlhf.algorithm import AlgorithmConfig, SamplerWeight
from rlhf.checks import InputError
from rlhf.kl import kl_estimate
from rlhf.losses import clipped_surrogate_loss, importance_weighted_loss
from rlhf.masking import masked_whiten
from rlhf.objective import Estimate, estimate_advantages, kl_to_reference, policy_loss
from rlhf.policy_losses import cispo_loss, gspo_loss, sampler_importance_weights, sapo_loss

generator = torch.Generator().manual_seed(0)
MASK = torch.arange(5) < torch.tensor([[5], [2], [3], [1], [4], [5]])
SCORES = torch.tensor([1.0, 0.0, 0.5, 3.0, 2.0, 2.5], dtype=torch.float64)
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
TOKEN_REWARDS = torch.where(MASK, torch.randn(6, 5, generator=generator, dtype=torch.float64), math.nan)
VALUES = torch.where(MASK, torch.randn(6, 5, generator=generator, dtype=torch.float64), math.nan)


def algorithm(advantage: str = "gae", **options: Any) -> AlgorithmConfig:
    critic = "separate" if advantage == "gae" else "none"
    return AlgorithmConfig(**{"advantage": advantage, "critic": critic, "whiten_advantages": False, **options})


def estimate(config: AlgorithmConfig, **changes: Any) -> Estimate:
    given = {"scores": SCORES, "group_ids": GROUPS, "token_rewards": TOKEN_REWARDS, "values": VALUES, **changes}
    return estimate_advantages(config, MASK, **given)


def at_last(scores: Tensor) -> Tensor:
    rewards = torch.where(MASK, TOKEN_REWARDS, 0.0)
    for row, score in enumerate(scores):
        rewards[row, MASK[row].sum() - 1] += score
    return rewards


def test_gae_sees_token_rewards_and_the_score_at_the_last_action() -> None:
    found = estimate(algorithm(gamma=0.9, gae_lambda=0.7))
    expected = gae(at_last(SCORES), VALUES, MASK, gamma=0.9, gae_lambda=0.7)
    assert found.returns is not None
    torch.testing.assert_close(found.advantages, expected.advantages)
    torch.testing.assert_close(found.returns, expected.returns)


def test_reward_to_go_and_its_group_baseline() -> None:
    plain = estimate(algorithm("reward_to_go", gamma=0.9)).advantages
    torch.testing.assert_close(plain, monte_carlo_returns(at_last(SCORES), MASK, gamma=0.9))
    centred = estimate(algorithm("reward_to_go", center_in_groups=True)).advantages
    expected = monte_carlo_returns(at_last(SCORES - torch.tensor([0.5] * 3 + [2.5] * 3)), MASK)
    torch.testing.assert_close(centred, expected)


def test_greedy_baseline_subtracts_the_greedy_answers_score_everywhere() -> None:
    greedy = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 2.0], dtype=torch.float64)
    found = estimate(algorithm("greedy_baseline"), greedy_scores=greedy).advantages
    expected = torch.where(MASK, monte_carlo_returns(at_last(SCORES), MASK) - greedy[:, None], 0.0)
    torch.testing.assert_close(found, expected)
    with pytest.raises(InputError, match="needs greedy_scores"):
        estimate(algorithm("greedy_baseline"))


TOTALS = at_last(SCORES).sum(-1)
OF_GROUPS = {
    "group": (algorithm("group"), groups.group_normalized_advantages(TOTALS, GROUPS)),
    "dr_grpo": (
        algorithm("group", divide_by_std=False),
        groups.group_normalized_advantages(TOTALS, GROUPS, divide_by_std=False),
    ),
    "trl's epsilon": (
        algorithm("group", convention="trl"),
        groups.group_normalized_advantages(TOTALS, GROUPS, epsilon=1e-4),
    ),
    "rloo": (algorithm("leave_one_out", divide_by_std=False), groups.leave_one_out_advantages(TOTALS, GROUPS)),
    "leave one out, std": (
        algorithm("leave_one_out"),
        groups.leave_one_out_advantages(TOTALS, GROUPS, divide_by_std=True),
    ),
    "opo": (algorithm("length_weighted"), groups.length_weighted_advantages(TOTALS, MASK.sum(-1), GROUPS)),
    "maxrl": (algorithm("mean_normalized"), groups.mean_normalized_advantages(TOTALS, GROUPS)),
    "pass@k": (algorithm("best_of_group", divide_by_std=False), groups.best_of_group_advantages(TOTALS, GROUPS)),
}


@pytest.mark.parametrize("name", OF_GROUPS)
def test_what_compares_samples_gives_each_of_their_actions_one_advantage(name: str) -> None:
    config, per_sequence = OF_GROUPS[name]
    found = estimate(config)
    torch.testing.assert_close(found.advantages, torch.where(MASK, per_sequence[:, None], 0.0))
    assert found.returns is None
    assert len({tuple(x[1].tolist()) for x in OF_GROUPS.values()}) == len(OF_GROUPS), "no two of them are the same"


@pytest.mark.parametrize("config", [algorithm("group"), algorithm("reward_to_go", center_in_groups=True)])
def test_a_group_of_one_has_no_signal_but_by_a_peers_convention_its_score(config: AlgorithmConfig) -> None:
    alone = {"group_ids": torch.tensor([0, 0, 0, 1, 1, 2]), "token_rewards": None}
    ours, theirs = (
        estimate(dataclasses.replace(config, convention=convention), **alone).advantages  # type: ignore[arg-type]
        for convention in ("ours", "verl")
    )
    assert not ours[5].any()
    torch.testing.assert_close(theirs[5], SCORES[5].expand(5))
    torch.testing.assert_close(theirs[:5], ours[:5], rtol=1e-5, atol=0)


def test_decoupled_normalises_each_reward_function_by_itself() -> None:
    components = torch.stack([SCORES, SCORES.square()], -1)
    config = algorithm("decoupled")
    found = estimate(config, components=components, weights=[1.0, 3.0], token_rewards=None).advantages
    one, two = (groups.group_normalized_advantages(x, GROUPS) for x in components.unbind(-1))
    torch.testing.assert_close(found, torch.where(MASK, (one + 3 * two)[:, None], 0.0))
    with pytest.raises(InputError, match="needs components"):
        estimate(config)


@pytest.mark.parametrize(
    ("advantage", "default"), [("gae", True), ("reward_to_go", True), ("decoupled", True), ("group", False)]
)
def test_whitening_is_on_where_the_authors_whiten(advantage: str, default: bool) -> None:
    assert algorithm(advantage, whiten_advantages=None).whitens == default
    assert not algorithm(advantage, whiten_advantages=False).whitens


@pytest.mark.parametrize(
    ("convention", "arguments"),
    [("ours", {"epsilon": 1e-8}), ("cleanrl", {"epsilon": 0.0, "std_epsilon": 1e-8}), ("openrlhf", {"ddof": 0})],
)
def test_whitening_follows_the_convention(convention: str, arguments: dict[str, float]) -> None:
    plain = estimate(algorithm()).advantages
    found = estimate(algorithm(whiten_advantages=True, convention=convention)).advantages
    torch.testing.assert_close(found, masked_whiten(plain, MASK, **{"epsilon": 0.0, **arguments}))  # type: ignore[arg-type]


def test_sequences_left_out_of_training_count_in_their_groups_but_not_in_whitening() -> None:
    is_trained = torch.tensor([True, False, True, True, True, False])
    found = estimate(algorithm("group"), is_trained=is_trained).advantages
    torch.testing.assert_close(found, torch.where(is_trained[:, None], estimate(algorithm("group")).advantages, 0.0))
    whitened = estimate(algorithm(whiten_advantages=True), is_trained=is_trained).advantages
    kept = whitened[MASK & is_trained[:, None]]
    assert abs(float(kept.mean())) < 1e-12
    assert abs(float(kept.var()) - 1) < 1e-6
    assert not whitened[~is_trained].any()


@pytest.mark.parametrize("name", [*OF_GROUPS, "gae", "reward_to_go"])
def test_garbage_in_masked_slots_changes_nothing(name: str) -> None:
    config = OF_GROUPS[name][0] if name in OF_GROUPS else algorithm(name, whiten_advantages=True)
    clean = {"token_rewards": TOKEN_REWARDS.nan_to_num(), "values": VALUES.nan_to_num()}
    assert torch.equal(estimate(config).advantages, estimate(config, **clean).advantages)


LOG_PROBS = torch.where(MASK, -torch.rand(6, 5, generator=generator, dtype=torch.float64), math.nan).requires_grad_()
OLD = LOG_PROBS.detach() + 0.5 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
SAMPLED = OLD + 0.5 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
ADVANTAGES = torch.where(MASK, torch.randn(6, 5, generator=generator, dtype=torch.float64), math.nan)
ARGS = (LOG_PROBS, OLD, ADVANTAGES, MASK)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"clip_low": 0.1, "clip_high": 0.3}, clipped_surrogate_loss(*ARGS, clip_low=0.1, clip_high=0.3)),
        ({"dual_clip": 1.5}, clipped_surrogate_loss(*ARGS, dual_clip=1.5)),
        ({"policy_loss": "importance"}, importance_weighted_loss(*ARGS)),
        ({"policy_loss": "gspo", "clip_low": 0.01}, gspo_loss(*ARGS, clip_low=0.01, clip_high=0.2)),
        ({"policy_loss": "cispo", "clip_low": None}, cispo_loss(*ARGS, clip_low=None, clip_high=0.2)),
        ({"policy_loss": "cispo"}, cispo_loss(*ARGS, clip_low=0.2, clip_high=0.2)),
        (
            {"policy_loss": "sapo", "gate_temperature_positive": 2.0, "gate_temperature_negative": 3.0},
            sapo_loss(*ARGS, temperature_positive=2.0, temperature_negative=3.0),
        ),
    ],
    ids=str,
)
def test_policy_loss_is_the_one_named(options: dict[str, Any], expected: Any) -> None:
    found = policy_loss(AlgorithmConfig(**options), *ARGS)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    grads = [torch.autograd.grad(x.loss.sum(), LOG_PROBS, retain_graph=True)[0] for x in (found, expected)]
    torch.testing.assert_close(*grads)


def test_reinforce_has_minus_the_advantage_as_gradient_and_reports_the_ratio() -> None:
    found = policy_loss(AlgorithmConfig(policy_loss="reinforce"), *ARGS)
    (gradient,) = torch.autograd.grad(found.loss.sum(), LOG_PROBS)
    torch.testing.assert_close(gradient, torch.where(MASK, -ADVANTAGES, 0.0))
    torch.testing.assert_close(found.ratio, torch.where(MASK, (LOG_PROBS - OLD).detach().exp(), 1.0))


@pytest.mark.parametrize("level", [x for x in get_args(SamplerWeight) if x != "none"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_the_loss_is_weighed_against_the_sampler(level: Any, mode: Any) -> None:
    bounds = {"sampler_weight_high": 1.3, "sampler_weight_low": 0.8}
    config = AlgorithmConfig(sampler_weight=level, sampler_weight_mode=mode, **bounds)
    weights = sampler_importance_weights(OLD, SAMPLED, MASK, level=level, mode=mode, high=1.3, low=0.8)
    found = policy_loss(config, *ARGS, sampler_log_probs=SAMPLED).loss
    torch.testing.assert_close(found, clipped_surrogate_loss(*ARGS).loss * weights)
    with pytest.raises(InputError, match="needs sampler_log_probs"):
        policy_loss(config, *ARGS)


def test_an_exact_sampler_has_weight_one() -> None:
    config = AlgorithmConfig(sampler_weight="sequence")
    assert torch.equal(policy_loss(config, *ARGS, sampler_log_probs=OLD).loss, clipped_surrogate_loss(*ARGS).loss)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_kl_in_the_loss(estimator: Any) -> None:
    far = OLD - 12
    ours = kl_to_reference(AlgorithmConfig(kl_estimator=estimator), LOG_PROBS, far, MASK)
    torch.testing.assert_close(ours, kl_estimate(LOG_PROBS, far, MASK, estimator=estimator))
    theirs = kl_to_reference(AlgorithmConfig(kl_estimator=estimator, convention="verl"), LOG_PROBS, far, MASK)
    assert (float(theirs.detach().max()) == 10.0) == (estimator == "k3"), "only k3 is clamped"
    straight = AlgorithmConfig(kl_estimator=estimator, kl_straight_through=True)
    through = kl_to_reference(straight, LOG_PROBS, far, MASK)
    torch.testing.assert_close(through, ours)
    (gradient,) = torch.autograd.grad(through.sum(), LOG_PROBS)
    torch.testing.assert_close(gradient, torch.where(MASK, (LOG_PROBS - far).detach(), 0.0))


def test_a_missing_dimension_is_one_clear_error() -> None:
    with pytest.raises(InputError, match="scores"):
        estimate(algorithm(), scores=SCORES[:4])


def test_configs_are_data() -> None:
    config = algorithm("group")
    assert AlgorithmConfig(**dataclasses.asdict(config)) == config


def test_whitened_rewards_have_variance_one_and_keep_their_mean() -> None:
    """With lambda = gamma = 1 and no critic the returns are the sums to come of the rewards, so they show them."""
    algorithm = AlgorithmConfig(gae_lambda=1.0, whiten_rewards=True)
    rewards = torch.tensor([[1.0, 2.0, -3.0], [0.5, 7.0, 99.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    found = estimate_advantages(
        algorithm, mask, scores=torch.zeros(2, dtype=torch.float64), group_ids=torch.arange(2), token_rewards=rewards
    ).returns
    assert found is not None
    shown = (found - torch.nn.functional.pad(found[:, 1:], (0, 1)))[mask]
    assert float(shown.std()) == pytest.approx(1, abs=1e-6)
    assert float(shown.mean()) == pytest.approx(float(rewards[mask].mean()), abs=1e-9)


def test_score_shaping_belongs_to_one_score() -> None:
    with pytest.raises(InputError, match="decoupled"):
        AlgorithmConfig(advantage="decoupled", critic="none", normalize_scores=True)
    with pytest.raises(InputError, match="whiten_rewards belongs to advantage='gae'"):
        AlgorithmConfig(advantage="reward_to_go", critic="none", whiten_rewards=True)
