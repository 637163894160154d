"""Estimators against their definitions.

The oracle drops every slot at which the policy did not act, cuts what is left into episodes, and evaluates the textbook
sums forwards from each step. So neither masks nor recursions, which the code is made of, appear in it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.advantages import (
    VTraceEstimate,
    episode_returns,
    gae,
    monte_carlo_returns,
    n_step_returns,
    reinforce_plus_plus_advantages,
    td0_returns,
    td_lambda_returns,
    vtrace,
)
from rlhf.checks import InputError
from rlhf.masking import masked_var

F64 = torch.float64
GARBAGE = [math.nan, math.inf, -math.inf, 1e30]


@dataclass(frozen=True)
class Rollout:
    """The arguments common to all estimators, each [..., T]."""

    rewards: Tensor
    values: Tensor
    action_mask: Tensor
    terminated: Tensor
    truncated: Tensor
    bootstrap_values: Tensor
    log_ratios: Tensor  # log pi - log mu of the actions

    def ends(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("terminated", "truncated", "bootstrap_values")}

    def map(self, change: Callable[[Tensor], Tensor]) -> "Rollout":
        return Rollout(**{name: change(x) for name, x in vars(self).items()})


VTRACE = {"vtrace_lambda": 0.8, "rho_clip": 1.2, "c_clip": 0.9, "advantage_rho_clip": 1.1}


def corrected(r: Rollout, gamma: float, **options: float) -> VTraceEstimate:
    """V-trace; NaN and infinities of the log-ratio are in both log-probs."""
    arguments = (r.rewards, r.values, 0.75 * r.log_ratios - 1, -0.25 * r.log_ratios - 1, r.action_mask)
    return vtrace(*arguments, gamma=gamma, **r.ends(), **options)


Estimator = Callable[[Rollout, float], Tensor]
ESTIMATORS: dict[str, Estimator] = {
    "monte carlo": lambda r, gamma: monte_carlo_returns(r.rewards, r.action_mask, gamma=gamma, **r.ends()),
    "episode": lambda r, gamma: episode_returns(r.rewards, r.action_mask, gamma=gamma, **r.ends()),
    "td0": lambda r, gamma: td0_returns(r.rewards, r.values, r.action_mask, gamma=gamma, **r.ends()),
    **{f"{n} steps": lambda r, gamma, n=n: n_step_returns(
        r.rewards, r.values, r.action_mask, n=n, gamma=gamma, **r.ends()) for n in (1, 2, 3, 99)},
    **{f"td({lam})": lambda r, gamma, lam=lam: td_lambda_returns(
        r.rewards, r.values, r.action_mask, td_lambda=lam, gamma=gamma, **r.ends()) for lam in (0.0, 0.7, 1.0)},
    **{f"gae({lam}).advantages": lambda r, gamma, lam=lam: gae(
        r.rewards, r.values, r.action_mask, gae_lambda=lam, gamma=gamma, **r.ends()).advantages
       for lam in (0.0, 0.95, 1.0)},
    "gae(0.9).returns": lambda r, gamma: gae(
        r.rewards, r.values, r.action_mask, gae_lambda=0.9, gamma=gamma, **r.ends()).returns,
    "vtrace.targets": lambda r, gamma: corrected(r, gamma, **VTRACE).targets,
    "vtrace.advantages": lambda r, gamma: corrected(r, gamma, **VTRACE).advantages,
}  # fmt: skip
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)
gammas = st.sampled_from([0.0, 0.5, 0.97, 1.0])


# --------------------------------------------------------------------------------------------------------- the oracle
@dataclass(frozen=True)
class Episode:
    """One episode, or the part of one that a row holds: plain numbers, no gaps."""

    slots: list[int]  # where its actions stand in the row
    rewards: list[float]
    values: list[float]
    ratios: list[float]
    tail: float  # worth of what follows the last action

    def __len__(self) -> int:
        return len(self.rewards)


def episodes(row: Rollout) -> Iterator[Episode]:
    columns = {name: x.tolist() for name, x in vars(row).items()}
    slots: list[int] = []
    actions = [t for t, acted in enumerate(columns["action_mask"]) if acted]
    for t in actions:
        slots.append(t)
        terminated = columns["terminated"][t]
        truncated = columns["truncated"][t] and not terminated
        if terminated or truncated or t == actions[-1]:
            rewards, values = ([columns[name][s] for s in slots] for name in ("rewards", "values"))
            ratios = [math.exp(columns["log_ratios"][s]) for s in slots]
            yield Episode(slots, rewards, values, ratios, columns["bootstrap_values"][t] if truncated else 0.0)
            slots = []


def n_step_target(e: Episode, t: int, n: int, gamma: float) -> float:
    steps = min(n, len(e) - t)
    last = e.values[t + steps] if t + steps < len(e) else e.tail
    return sum(gamma**k * e.rewards[t + k] for k in range(steps)) + gamma**steps * last


def lambda_target(e: Episode, t: int, lam: float, gamma: float) -> float:
    """Forward view: n-step targets weighted (1 - lambda) lambda^(n-1), the rest of the weight on the longest."""
    longest = len(e) - t
    weights = [(1 - lam) * lam ** (n - 1) for n in range(1, longest)] + [lam ** (longest - 1)]
    return sum(w * n_step_target(e, t, n, gamma) for n, w in enumerate(weights, start=1))


def gae_sum(e: Episode, t: int, lam: float, gamma: float) -> float:
    next_values = [*e.values[1:], e.tail]
    deltas = [r + gamma * after - v for r, v, after in zip(e.rewards, e.values, next_values, strict=True)]
    return sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:]))


def vtrace_target(e: Episode, t: int, gamma: float) -> float:
    """Equation 1: every later TD error, weighted by the product of the c on the way to it."""
    next_values, target = [*e.values[1:], e.tail], e.values[t]
    for k in range(t, len(e)):
        path = math.prod(VTRACE["vtrace_lambda"] * min(VTRACE["c_clip"], ratio) for ratio in e.ratios[t:k])
        delta = e.rewards[k] + gamma * next_values[k] - e.values[k]
        target += gamma ** (k - t) * path * min(VTRACE["rho_clip"], e.ratios[k]) * delta
    return target


def vtrace_advantage(e: Episode, t: int, gamma: float) -> float:
    following = e.tail
    if t + 1 < len(e):
        lam = VTRACE["vtrace_lambda"]
        following = lam * vtrace_target(e, t + 1, gamma) + (1 - lam) * e.values[t + 1]
    return min(VTRACE["advantage_rho_clip"], e.ratios[t]) * (e.rewards[t] + gamma * following - e.values[t])


Oracle = Callable[[Episode, int, float], float]
FOR_EVER = 10**6
ORACLES: dict[str, Oracle] = {
    "monte carlo": lambda e, t, gamma: n_step_target(e, t, FOR_EVER, gamma),
    "episode": lambda e, t, gamma: n_step_target(e, 0, FOR_EVER, gamma),
    "td0": lambda e, t, gamma: n_step_target(e, t, 1, gamma),
    **{f"{n} steps": lambda e, t, gamma, n=n: n_step_target(e, t, n, gamma) for n in (1, 2, 3, 99)},
    **{f"td({lam})": lambda e, t, gamma, lam=lam: lambda_target(e, t, lam, gamma) for lam in (0.0, 0.7, 1.0)},
    **{f"gae({lam}).advantages": lambda e, t, gamma, lam=lam: gae_sum(e, t, lam, gamma) for lam in (0.0, 0.95, 1.0)},
    "gae(0.9).returns": lambda e, t, gamma: gae_sum(e, t, 0.9, gamma) + e.values[t],
    "vtrace.targets": vtrace_target,
    "vtrace.advantages": vtrace_advantage,
}


def expected(name: str, rollout: Rollout, gamma: float) -> Tensor:
    result = torch.zeros_like(rollout.rewards)
    for b in range(result.shape[0]):
        for episode in episodes(rollout.map(lambda x, b=b: x[b])):
            for t, slot in enumerate(episode.slots):
                result[b, slot] = ORACLES[name](episode, t, gamma)
    return result


# --------------------------------------------------------------------------------------------------------- the inputs
NUMBER = st.floats(-4, 4)
LOG_RATIO = st.floats(-1, 1)  # from 0.37 to 2.7: on both sides of every clip


@st.composite
def rollouts(draw: st.DrawFn, max_steps: int = 9, gaps: bool = True, ends: bool = True) -> Rollout:
    rows, steps = draw(st.integers(1, 2)), draw(st.integers(1, max_steps))
    flag = st.sampled_from([False, False, True]) if ends else st.just(False)
    slot = st.tuples(
        NUMBER, NUMBER, st.sampled_from([True, True, False]) if gaps else st.just(True), flag, flag, NUMBER, LOG_RATIO
    )
    columns = zip(*draw(st.lists(slot, min_size=rows * steps, max_size=rows * steps)), strict=True)
    return Rollout(
        *(torch.tensor(x, dtype=F64 if isinstance(x[0], float) else torch.bool).view(rows, steps) for x in columns)
    )


def random_rollout(rows: int, steps: int, dtype: torch.dtype = F64, seed: int = 0) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    rewards, values, bootstrap_values, log_ratios = (
        torch.randn(rows, steps, generator=generator, dtype=F64).to(dtype) for _ in range(4)
    )
    chances = torch.rand(3, rows, steps, generator=generator)
    mask, terminated, truncated = chances[0] < 0.7, chances[1] < 0.05, chances[2] < 0.05
    return Rollout(rewards, values, mask, terminated, truncated, bootstrap_values, log_ratios)


def close(actual: Tensor, wanted: Tensor | float, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(wanted, dtype=actual.dtype).expand_as(actual),
                               rtol=tolerance, atol=tolerance)  # fmt: skip


# ----------------------------------------------------------------------------------------------------- the definition
@every_estimator
@given(rollouts(), gammas)
def test_equals_its_definition(name: str, rollout: Rollout, gamma: float) -> None:
    close(ESTIMATORS[name](rollout, gamma), expected(name, rollout, gamma))


@every_estimator
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-11), (torch.float32, 2e-5)])
def test_equals_its_definition_over_many_blocks(name: str, dtype: torch.dtype, tolerance: float) -> None:
    rollout = random_rollout(3, 300)
    result = ESTIMATORS[name](rollout.map(lambda x: x.to(dtype) if x.is_floating_point() else x), 0.99)
    assert result.dtype == dtype
    close(result, expected(name, rollout, 0.99).to(dtype), tolerance)


@given(rollouts(), gammas, st.floats(0, 1))
def test_reductions_to_each_other(r: Rollout, gamma: float, lam: float) -> None:
    common = {"gamma": gamma, **r.ends()}
    arguments = (r.rewards, r.values, r.action_mask)
    acted_values = torch.where(r.action_mask, r.values, 0.0)
    monte_carlo = monte_carlo_returns(r.rewards, r.action_mask, **common)
    td0 = td0_returns(*arguments, **common)
    steps = r.rewards.shape[-1]

    close(gae(*arguments, gae_lambda=1.0, **common).advantages, monte_carlo - acted_values)
    close(gae(*arguments, gae_lambda=0.0, **common).advantages, td0 - acted_values)
    close(n_step_returns(*arguments, n=1, **common), td0)
    close(n_step_returns(*arguments, n=steps, **common), monte_carlo)
    close(n_step_returns(*arguments, n=steps + 5, **common), monte_carlo)
    estimate = gae(*arguments, gae_lambda=lam, **common)
    close(td_lambda_returns(*arguments, td_lambda=lam, **common), estimate.advantages + acted_values)
    close(estimate.returns, estimate.advantages + acted_values)


# ------------------------------------------------------------------------------------------------------------ V-trace
@given(rollouts(), gammas, st.floats(0, 1))
def test_vtrace_on_policy_is_the_lambda_return(r: Rollout, gamma: float, lam: float) -> None:
    on_policy = replace(r, log_ratios=torch.zeros_like(r.rewards))
    acted_values = torch.where(r.action_mask, r.values, 0.0)
    arguments = (r.rewards, r.values, r.action_mask)
    estimate = corrected(on_policy, gamma, vtrace_lambda=lam)
    lambda_returns = td_lambda_returns(*arguments, td_lambda=lam, gamma=gamma, **r.ends())
    close(estimate.targets, lambda_returns)
    close(estimate.advantages, lambda_returns - acted_values)  # gae's
    close(corrected(on_policy, gamma).targets, monte_carlo_returns(r.rewards, r.action_mask, gamma=gamma, **r.ends()))


@given(rollouts(), gammas)
def test_vtrace_limits_in_its_clips(r: Rollout, gamma: float) -> None:
    acted_values = torch.where(r.action_mask, r.values, 0.0)
    td_errors = td0_returns(r.rewards, r.values, r.action_mask, gamma=gamma, **r.ends()) - acted_values
    never = corrected(replace(r, log_ratios=torch.full_like(r.rewards, -800.0)), gamma)  # pi would not do any of this
    close(never.targets, acted_values)
    assert (never.advantages == 0).all()
    unclipped = corrected(r, gamma, vtrace_lambda=0.0, rho_clip=math.inf, advantage_rho_clip=math.inf)
    ratios = r.log_ratios.exp()
    close(unclipped.targets, acted_values + ratios * td_errors)
    close(unclipped.advantages, ratios * td_errors)
    always = corrected(replace(r, log_ratios=torch.full_like(r.rewards, 800.0)), gamma)  # a ratio that overflows
    close(always.targets, monte_carlo_returns(r.rewards, r.action_mask, gamma=gamma, **r.ends()))


@pytest.mark.parametrize("rho_clip", [math.inf, 1.0, 0.7])
def test_vtrace_learns_the_value_of_the_policy_between_mu_and_pi(rho_clip: float) -> None:
    """One action, worth 1 or 0. Targets rest at the value of the policy proportional to min(rho_clip mu, pi)."""
    mu, pi = torch.tensor([0.2, 0.8], dtype=F64), torch.tensor([0.6, 0.4], dtype=F64)
    towards = torch.minimum(rho_clip * mu, pi)
    value = towards[0] / towards.sum()
    rewards = torch.tensor([[1.0], [0.0]], dtype=F64)
    everywhere = torch.ones(2, 1, dtype=torch.bool)
    log_probs = (pi.log()[:, None], mu.log()[:, None])
    estimate = vtrace(rewards, value.expand(2, 1), *log_probs, everywhere, rho_clip=rho_clip, c_clip=min(rho_clip, 1.0))
    close((mu[:, None] * (estimate.targets - value)).sum(), 0.0)
    if rho_clip == math.inf:
        close(value, pi[0])


# -------------------------------------------------------------------------------------------------------- REINFORCE++
def test_reinforce_plus_plus_is_the_whitened_reward_to_go() -> None:
    rollout = random_rollout(5, 40)
    mask = rollout.action_mask
    advantages = reinforce_plus_plus_advantages(rollout.rewards, mask, gamma=0.9)
    returns = monte_carlo_returns(rollout.rewards, mask, gamma=0.9)[mask]
    close(advantages[mask], (returns - returns.mean()) / returns.std(), 1e-7)  # epsilon is 1e-8
    assert (advantages[~mask] == 0).all()
    biased = reinforce_plus_plus_advantages(rollout.rewards, mask, gamma=0.9, ddof=0, epsilon=0.0)[mask]
    close(biased, (returns - returns.mean()) / returns.std(correction=0))
    close(biased.mean(), 0.0)
    close(biased.std(correction=0), 1.0)


@given(rollouts(), gammas, st.floats(0.1, 10), st.sampled_from(GARBAGE))
def test_reinforce_plus_plus_ignores_scale_and_masked_slots(
    r: Rollout, gamma: float, scale: float, garbage: float
) -> None:
    def advantages(rewards: Tensor) -> Tensor:
        return reinforce_plus_plus_advantages(rewards, r.action_mask, gamma=gamma, epsilon=0.0)

    rewards = r.rewards.round(decimals=1)  # 0, or far from the smallest numbers
    assert torch.equal(advantages(torch.where(r.action_mask, rewards, garbage)), advantages(rewards))
    if masked_var(monte_carlo_returns(rewards, r.action_mask, gamma=gamma), r.action_mask) > 1e-3:
        close(advantages(scale * rewards), advantages(rewards), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("score", [0.1, -1 / 3, 5000.1])
def test_reinforce_plus_plus_of_equal_returns_is_exactly_zero(dtype: torch.dtype, score: float) -> None:
    rewards = torch.nn.functional.pad(torch.full((6, 1), score, dtype=dtype), (8, 0))
    assert (reinforce_plus_plus_advantages(rewards, torch.ones(6, 9, dtype=torch.bool)) == 0).all()


# -------------------------------------------------------------------------------------------------------- invariances
@every_estimator
@given(rollouts(), gammas)
def test_gaps_are_no_steps(name: str, rollout: Rollout, gamma: float) -> None:
    """A row's estimate is that of the row with its masked slots cut out, gaps and padding alike."""
    result = ESTIMATORS[name](rollout, gamma)
    assert (result[~rollout.action_mask] == 0).all()
    for b, mask in enumerate(rollout.action_mask):
        if mask.any():
            compressed = rollout.map(lambda x, b=b, mask=mask: x[b][mask])
            close(result[b][mask], ESTIMATORS[name](compressed, gamma))


@every_estimator
@given(rollouts(gaps=False), gammas, st.sampled_from([1, 3, 15, 40]))
def test_right_padding_changes_nothing(name: str, rollout: Rollout, gamma: float, amount: int) -> None:
    padded = rollout.map(lambda x: torch.nn.functional.pad(x, (0, amount), value=1.0 if x.is_floating_point() else 1))
    padded.action_mask[..., rollout.rewards.shape[-1] :] = False
    result = ESTIMATORS[name](padded, gamma)
    close(result[..., :-amount], ESTIMATORS[name](rollout, gamma))
    assert (result[..., -amount:] == 0).all()


@every_estimator
@given(st.lists(rollouts(max_steps=5), min_size=2, max_size=3), gammas, st.data())
def test_episodes_in_one_row_do_not_touch(name: str, parts: list[Rollout], gamma: float, data: st.DataObject) -> None:
    """Each part ends with a terminated or a truncated action, so putting them in one row changes none of them."""
    parts = [part.map(lambda x: x[:1].clone()) for part in parts]
    for part in parts:
        part.action_mask[..., -1] = True
        (part.terminated if data.draw(st.booleans()) else part.truncated)[..., -1] = True
    row = Rollout(*(torch.cat(columns, -1) for columns in zip(*(vars(p).values() for p in parts), strict=True)))
    close(ESTIMATORS[name](row, gamma), torch.cat([ESTIMATORS[name](part, gamma) for part in parts], -1))


@every_estimator
@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_garbage_where_nothing_is_read_changes_nothing(name: str, garbage: float, dtype: torch.dtype) -> None:
    """Bit for bit: floats and flags in masked slots, and bootstrap values wherever no step was cut off."""
    clean = random_rollout(4, 70, dtype)
    clean.action_mask[3] = False
    mask = clean.action_mask
    coin = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    dirty = Rollout(
        rewards=torch.where(mask, clean.rewards, garbage),
        values=torch.where(mask, clean.values, garbage),
        action_mask=mask,
        terminated=torch.where(mask, clean.terminated, coin),
        truncated=torch.where(mask, clean.truncated, ~coin),
        bootstrap_values=torch.where(mask & clean.truncated & ~clean.terminated, clean.bootstrap_values, garbage),
        log_ratios=torch.where(mask, clean.log_ratios, garbage),
    )
    assert torch.equal(ESTIMATORS[name](dirty, 0.97), ESTIMATORS[name](clean, 0.97))


@every_estimator
def test_results_are_detached_and_inputs_untouched(name: str) -> None:
    rollout = random_rollout(2, 20)
    for x in (rollout.rewards, rollout.values, rollout.bootstrap_values, rollout.log_ratios):
        x.requires_grad_()
    copies = rollout.map(lambda x: x.detach().clone())
    assert not ESTIMATORS[name](rollout, 0.9).requires_grad
    assert all(torch.equal(x, copy) for x, copy in zip(vars(rollout).values(), vars(copies).values(), strict=True))


@every_estimator
def test_flags_left_out_are_false_everywhere(name: str) -> None:
    rollout = random_rollout(2, 20)
    nowhere = torch.zeros_like(rollout.action_mask)
    absent = replace(rollout, terminated=None, truncated=None, bootstrap_values=None)
    present = replace(rollout, terminated=nowhere, truncated=nowhere)
    assert torch.equal(ESTIMATORS[name](absent, 0.9), ESTIMATORS[name](present, 0.9))


def test_rows_need_no_batch_axis_and_may_have_several() -> None:
    rollout = random_rollout(6, 20)
    for name, estimate in ESTIMATORS.items():
        flat = estimate(rollout, 0.9)
        stacked = estimate(rollout.map(lambda x: x.view(2, 3, 20)), 0.9)
        assert torch.equal(stacked.view(6, 20), flat), name
        assert torch.equal(estimate(rollout.map(lambda x: x[4]), 0.9), flat[4]), name


# ---------------------------------------------------------------------------------------- environments in closed form
def constant_reward(steps: int, gamma: float, reward: float = 2.0) -> tuple[Rollout, float]:
    """Reward r for ever: V = r / (1 - gamma) in every state, and the critic knows it. Cut off after some steps."""
    value = reward / (1 - gamma)
    full = torch.full((1, steps), 1.0, dtype=F64)
    last = torch.arange(steps)[None] == steps - 1
    return Rollout(
        reward * full, value * full, full.bool(), torch.zeros_like(last), last, value * full, 0 * full
    ), value


@pytest.mark.parametrize("steps", [1, 7, 40])
@pytest.mark.parametrize("lam", [0.0, 0.9, 1.0])
def test_a_truncated_episode_with_a_perfect_critic_has_no_advantage(steps: int, lam: float) -> None:
    gamma = 0.9
    rollout, value = constant_reward(steps, gamma)
    arguments = (rollout.rewards, rollout.values, rollout.action_mask)
    estimate = gae(*arguments, gamma=gamma, gae_lambda=lam, **rollout.ends())
    close(estimate.advantages, 0.0)
    close(estimate.returns, value)
    close(ESTIMATORS["monte carlo"](rollout, gamma), value)

    # Called terminated, the same episode loses gamma * V at its end, and every step before is blamed for it.
    terminated = gae(*arguments, gamma=gamma, gae_lambda=lam, terminated=rollout.truncated).advantages
    blame = [(gamma * lam) ** (steps - 1 - t) * -gamma * value for t in range(steps)]
    close(terminated, torch.tensor([blame], dtype=F64))
    both = gae(*arguments, gamma=gamma, gae_lambda=lam, **{**rollout.ends(), "terminated": rollout.truncated})
    close(both.advantages, terminated)


@pytest.mark.parametrize("tool_tokens", [0, 1, 30])
def test_one_verdict_at_the_end_of_a_completion(tool_tokens: int) -> None:
    """Score 1 on the last action, discounted once per action and not once per token that a tool returned."""
    mask = torch.tensor([True] * 3 + [False] * tool_tokens + [True] * 2)
    rewards = torch.zeros(len(mask), dtype=F64)
    rewards[-1] = 1.0
    returns = monte_carlo_returns(rewards, mask, gamma=0.5)
    assert returns[mask].tolist() == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
    assert episode_returns(rewards, mask, gamma=0.5)[mask].tolist() == [1 / 16] * 5
    assert gae(rewards, torch.zeros_like(rewards), mask).advantages[-1] == 1


def test_episode_returns_by_hand() -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    mask = torch.tensor([True, True, False, True, True, True])
    flags = {name: torch.zeros(6, dtype=torch.bool) for name in ("terminated", "truncated")}
    flags["terminated"][1] = flags["truncated"][4] = True
    bootstrap_values = torch.full((6,), 64.0)
    returns = episode_returns(rewards, mask, gamma=0.5, bootstrap_values=bootstrap_values, **flags)
    assert returns.tolist() == [2, 2, 0, 32, 32, 32]  # 1 + 2/2; 8 + 16/2 + 64/4; 32


# ------------------------------------------------------------------------------------------------------ bad arguments
X, M = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "shapes": (lambda: gae(X, torch.zeros(2, 4), M), r"rewards \[2, 3\], values \[2, 4\], action_mask \[2, 3\]"),
    "mask": (lambda: gae(X, X, M.float()), "action_mask must be bool"),
    "flag type": (lambda: gae(X, X, M, terminated=X), "terminated must be bool, got"),
    "flag shape": (lambda: gae(X, X, M, terminated=M[0]), r"terminated \[3\]"),
    "rewards": (lambda: monte_carlo_returns(X.long(), M), "rewards must be floating point"),
    "no time": (lambda: monte_carlo_returns(X[:, :0], M[:, :0]), r"rewards must be \[..., T\]"),
    "gamma": (lambda: monte_carlo_returns(X, M, gamma=1.01), r"gamma must be in \[0, 1\], got 1.01"),
    "gamma nan": (lambda: episode_returns(X, M, gamma=math.nan), "gamma must be in"),
    "lambda": (lambda: gae(X, X, M, gae_lambda=-0.1), r"gae_lambda must be in \[0, 1\]"),
    "td lambda": (lambda: td_lambda_returns(X, X, M, td_lambda=2), r"td_lambda must be in \[0, 1\]"),
    "n": (lambda: n_step_returns(X, X, M, n=0), r"n must be in \[1, inf\)"),
    "bootstrap": (lambda: td0_returns(X, X, M, truncated=M), "truncated needs bootstrap_values"),
    "vtrace log-probs": (lambda: vtrace(X, X, X, X[0], M), r"log_probs \[2, 3\], behavior_log_probs \[3\]"),
    "vtrace values": (lambda: vtrace(X, X[0], X, X, M), r"values \[3\]"),
    "vtrace types": (lambda: vtrace(X, X, X.long(), X, M), "log_probs must be floating point"),
    "vtrace lambda": (lambda: vtrace(X, X, X, X, M, vtrace_lambda=1.1), "vtrace_lambda must be in"),
    "vtrace clip": (lambda: vtrace(X, X, X, X, M, c_clip=0.0), r"c_clip must be in \(0, inf\)"),
    "whitening": (lambda: reinforce_plus_plus_advantages(X, M, epsilon=-1.0), "epsilon must be in"),
    "reinforce++ gamma": (lambda: reinforce_plus_plus_advantages(X, M, gamma=2.0), "gamma must be in"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
