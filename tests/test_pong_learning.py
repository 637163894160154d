"""How a rollout becomes an update: each option calls the core's function of that name, and nothing else."""

import dataclasses

import numpy as np
import pytest
import torch
from pong_toys import Clockwork
from torch import Tensor, nn

from pong.config import AlgorithmConfig, NetworkConfig
from pong.learning import Learner, estimate
from pong.network import ActorCritic
from pong.rollout import Collector, FrameHistory, Rollout
from rlhf.advantages import episode_returns, gae, monte_carlo_returns, td0_returns
from rlhf.checks import InputError
from rlhf.masking import masked_whiten
from rlhf.run import load_state, save_state

GAMMA, LAMBDA = 0.9, 0.8


def rollout_of(rewards: list[list[float]], *, terminated=(), truncated=(), seed: int = 0) -> Rollout:
    """Random values and two-pixel frames; ends as (env, step) pairs, and the rollout's own end."""
    reward = torch.tensor(rewards)
    generator = torch.Generator().manual_seed(seed)
    count, steps = reward.shape
    flags = []
    for places in (terminated, truncated):
        flag = torch.zeros(count, steps, dtype=torch.bool)
        for place in places:
            flag[place] = True
        flags.append(flag)
    flags[1][:, -1] |= ~flags[0][:, -1]
    history = FrameHistory(steps=steps, envs=count, stack=2, frame_shape=(8, 8), device="cpu")
    history.frames.random_(0, 256, generator=generator)
    return Rollout(
        history,
        actions=torch.randint(3, (count, steps), generator=generator),
        log_probs=torch.randn(count, steps, generator=generator).clamp(max=-0.1),
        values=torch.randn(count, steps, generator=generator),
        rewards=reward,
        terminated=flags[0],
        truncated=flags[1],
        bootstrap_values=torch.randn(count, steps, generator=generator),
        episodes=[],
    )


REWARDS = [[0.0, 1.0, 0.0, 0.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]


def plain(advantage: str, **options) -> AlgorithmConfig:
    return AlgorithmConfig(
        advantage=advantage,
        gamma=GAMMA,
        gae_lambda=LAMBDA,
        normalize_advantages=False,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("advantage", ["episode", "mc", "td", "gae"])
def test_estimators_are_the_cores(advantage: str) -> None:
    rollout = rollout_of(REWARDS, terminated=[(0, 2)], truncated=[(1, 3)])
    ends = {
        "terminated": rollout.terminated,
        "truncated": rollout.truncated,
        "bootstrap_values": rollout.bootstrap_values,
        "gamma": GAMMA,
    }
    mask = torch.ones(2, 6, dtype=torch.bool)
    expected = {
        "episode": lambda: episode_returns(rollout.rewards, mask, **ends) - rollout.values,
        "mc": lambda: monte_carlo_returns(rollout.rewards, mask, **ends) - rollout.values,
        "td": lambda: td0_returns(rollout.rewards, rollout.values, mask, **ends) - rollout.values,
        "gae": lambda: gae(rollout.rewards, rollout.values, mask, gae_lambda=LAMBDA, **ends).advantages,
    }[advantage]()
    targets = estimate(rollout, plain(advantage), reward_ends_credit=False)
    assert torch.equal(targets.advantages, expected)
    assert targets.action_mask.all()
    whitened = estimate(
        rollout, dataclasses.replace(plain(advantage), normalize_advantages=True), reward_ends_credit=False
    )
    assert torch.equal(whitened.advantages, masked_whiten(expected, mask))
    assert torch.equal(whitened.returns, targets.returns)


def test_the_discount_given_is_the_one_used() -> None:
    rollout = rollout_of(REWARDS)
    for advantage in ("episode", "mc", "td", "gae"):
        given = estimate(rollout, plain(advantage), reward_ends_credit=False, gamma=0.5)
        configured = estimate(rollout, dataclasses.replace(plain(advantage), gamma=0.5), reward_ends_credit=False)
        assert torch.equal(given.returns, configured.returns)
        assert torch.equal(given.advantages, configured.advantages)
        assert not torch.equal(given.returns, estimate(rollout, plain(advantage), reward_ends_credit=False).returns)


def test_a_reward_ends_the_credit_if_asked() -> None:
    """Nothing after a point, neither rewards nor values, reaches what came before it."""
    rollout = rollout_of(REWARDS)
    changed = rollout._replace(
        rewards=rollout.rewards.clone(), values=rollout.values.clone(), bootstrap_values=rollout.bootstrap_values + 5
    )
    changed.rewards[0, 4] = 1.0
    changed.values[0, 2:] = 7.0
    for advantage in ("mc", "td", "gae"):
        before, after = (estimate(x, plain(advantage), reward_ends_credit=True).returns for x in (rollout, changed))
        assert torch.equal(before[0, :2], after[0, :2])
        before, after = (estimate(x, plain(advantage), reward_ends_credit=False).returns for x in (rollout, changed))
        assert not torch.equal(before[0, :2], after[0, :2])


def test_without_a_baseline_steps_whose_return_is_not_known_are_left_out() -> None:
    rollout = rollout_of(REWARDS)
    targets = estimate(rollout, plain("mc", baseline=False), reward_ends_credit=True)
    assert targets.action_mask.tolist() == [[True] * 5 + [False], [False] * 6]
    expected = torch.tensor([0.9, 1.0, -0.81, -0.9, -1.0, 0.0])
    torch.testing.assert_close(targets.advantages[0], expected)


def network(actions: int = 3, *, seed: int = 0) -> ActorCritic:
    torch.manual_seed(seed)
    config = NetworkConfig(channels=(4,), kernels=((3, 3),), strides=((2, 2),), hidden=16)
    return ActorCritic(config, stack=2, frame_shape=(8, 8), actions=actions)


def learner(net: ActorCritic, algorithm: AlgorithmConfig, *, epochs: int = 1, minibatch_size: int = 12) -> Learner:
    return Learner(net, algorithm, epochs=epochs, minibatch_size=minibatch_size, adam_epsilon=1e-5, max_grad_norm=1e9)


def on_policy(rollout: Rollout, net: ActorCritic) -> Rollout:
    """The same rollout as if `net` had chosen the actions."""
    steps, envs = torch.arange(6).repeat(2), torch.arange(2).repeat_interleave(6)
    with torch.no_grad():
        logits, values = net(rollout.history.stacks(steps, envs))
    log_probs = logits.log_softmax(-1).gather(-1, rollout.actions.flatten().unsqueeze(-1))
    return rollout._replace(log_probs=log_probs.view(2, 6), values=values.view(2, 6))


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_what_the_collector_reported_is_what_the_learner_recomputes(precision: torch.dtype, tolerance: float) -> None:
    """Groups of other sizes, other batches, another memory layout: the ratio is 1 before the first step."""
    net = network()
    net.precision = precision
    with torch.no_grad():
        net.policy.weight.mul_(100)
    noise = Clockwork(3, length=5, ends="terminated", shape=(8, 8), actions=3)
    other = Clockwork(1, length=7, ends="truncated", shape=(8, 8), actions=3)
    collector = Collector([noise, other], net, steps=9, stack=2)
    collector.reset()
    rollout = collector.collect(torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, values = net(rollout.history.observations(net.prepare))
    log_probs = logits.log_softmax(-1).gather(-1, rollout.actions.reshape(-1, 1)).view(4, 9)
    torch.testing.assert_close(log_probs, rollout.log_probs, rtol=0, atol=tolerance)
    torch.testing.assert_close(values.view(4, 9), rollout.values, rtol=0, atol=tolerance)


def test_bfloat16_tells_close_values_and_logits_apart() -> None:
    """Near 1 it has steps of 1/128: a difference of two values would be mostly rounding."""
    net = network()
    observations = rollout_of(REWARDS).history.observations(net.prepare)
    with torch.no_grad():
        for head in (net.value, net.policy):
            nn.init.normal_(head.weight, std=1e-4)
            nn.init.ones_(head.bias)
        exact = net(observations)
        net.precision = torch.bfloat16
        found = net(observations)
    for a, b in zip(exact, found, strict=True):
        assert a.std(0).max() < 1 / 128
        torch.testing.assert_close(b, a, rtol=0, atol=float(a.std(0).min()) / 4)


def gradients(algorithm: AlgorithmConfig) -> list[Tensor]:
    """Of the first optimizer step, on-policy."""
    net = network()
    with torch.no_grad():
        net.policy.weight.mul_(100)  # far from uniform, so that the entropy has a gradient
    rollout = on_policy(rollout_of(REWARDS), net)
    targets = estimate(rollout, algorithm, reward_ends_credit=False)
    learner(net, algorithm).update(
        rollout, targets, learning_rate=1e-9, entropy_coef=algorithm.entropy_coef, generator=torch.Generator()
    )
    found = [p.grad for p in net.parameters()]
    assert all(g is not None for g in found)
    return [g.clone() for g in found if g is not None]


@pytest.mark.parametrize("name", ["body", "policy"])
def test_an_update_that_diverges_is_an_error(name: str) -> None:
    """Before its weights are saved as a result."""
    net, algorithm = network(), plain("gae", loss="clip")
    rollout = on_policy(rollout_of(REWARDS), net)
    targets = estimate(rollout, algorithm, reward_ends_credit=False)
    with torch.no_grad():
        next(p for key, p in net.named_parameters() if key.startswith(name) or name == "body").fill_(torch.nan)
    with pytest.raises(InputError, match=r"policy/loss.*not finite: training has diverged. Lower --learning-rate"):
        learner(net, algorithm).update(
            rollout, targets, learning_rate=1e-3, entropy_coef=0.0, generator=torch.Generator()
        )


def test_on_policy_all_three_losses_have_the_same_gradient() -> None:
    """At ratio 1: the clipped surrogate's, the KL penalty's (the KL's gradient is 0 there) and REINFORCE's."""
    one, *others = (gradients(plain("gae", loss=loss)) for loss in ("reinforce", "clip", "kl"))
    for other in others:
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss", ["reinforce", "clip", "kl"])
@pytest.mark.parametrize("max_grad_norm", [1e9, 0.05])
def test_one_step_follows_the_loss_written_out(loss: str, max_grad_norm: float) -> None:
    """Away from the policy that collected, with every term and the clipped norm, against plain autograd."""
    algorithm = plain("gae", loss=loss, kl_coef=0.7, value_coef=0.4)
    net = network()
    with torch.no_grad():
        net.policy.weight.mul_(100)
    rollout = on_policy(rollout_of(REWARDS), net)
    rollout = rollout._replace(log_probs=rollout.log_probs + torch.linspace(-0.6, 0.6, 12).view(2, 6))
    targets = estimate(rollout, algorithm, reward_ends_credit=False)

    logits, values = net(rollout.history.observations(net.prepare))
    log_p = logits.log_softmax(-1)
    log_ratio = log_p.gather(-1, rollout.actions.reshape(-1, 1)).squeeze(-1) - rollout.log_probs.flatten()
    ratio, advantages = log_ratio.exp(), targets.advantages.flatten()
    policy = {
        "reinforce": -advantages * log_ratio,
        "clip": -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages),
        "kl": -ratio * advantages + 0.7 * (ratio - 1 - log_ratio),
    }[loss]
    entropy = -(log_p.exp() * log_p).sum(-1)
    whole = (policy + 0.4 * 0.5 * (values - targets.returns.flatten()).square() - 0.3 * entropy).mean()
    expected = torch.autograd.grad(whole, list(net.parameters()))
    norm = torch.stack([g.norm() for g in expected]).norm()
    assert norm > 0.05

    learn = Learner(net, algorithm, epochs=1, minibatch_size=12, adam_epsilon=1e-5, max_grad_norm=max_grad_norm)
    found = learn.update(rollout, targets, learning_rate=1e-9, entropy_coef=0.3, generator=torch.Generator())
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(
            parameter.grad, gradient * min(1.0, max_grad_norm / float(norm)), rtol=1e-3, atol=1e-6
        )
    assert found["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert found["policy/entropy"] == pytest.approx(float(entropy.detach().mean()), rel=1e-4)
    assert found["policy/kl"] == pytest.approx(float((ratio - 1 - log_ratio).detach().mean()), rel=1e-3)


def test_metrics_are_means_over_steps_however_the_minibatches_fall() -> None:
    """With a mask that differs between minibatches; one of them has no known return at all."""
    found = []
    for size in (12, 3, 1):
        net = network()
        rollout = on_policy(rollout_of(REWARDS), net)
        algorithm = plain("mc", baseline=False, loss="clip")
        targets = estimate(rollout, algorithm, reward_ends_credit=True)
        assert 0 < targets.action_mask.sum() < 12
        learn = learner(net, algorithm, minibatch_size=size)
        found.append(learn.update(rollout, targets, learning_rate=1e-12, entropy_coef=0.0, generator=torch.Generator()))
    for other in found[1:]:
        for name in ("policy/loss", "policy/entropy", "policy/kl", "steps_known"):
            assert other[name] == pytest.approx(found[0][name], rel=1e-4, abs=1e-6)


def test_a_rollout_without_any_known_return_changes_no_weight() -> None:
    net, algorithm = network(), plain("mc", baseline=False, loss="reinforce")
    rollout = rollout_of([[0.0] * 6, [0.0] * 6])
    learn = learner(net, algorithm)
    learn.update(rollout_of(REWARDS), estimate(rollout_of(REWARDS), algorithm, reward_ends_credit=True),
                 learning_rate=1e-2, entropy_coef=0.0, generator=torch.Generator())  # fmt: skip
    before = [p.detach().clone() for p in net.parameters()]
    targets = estimate(rollout, algorithm, reward_ends_credit=True)
    found = learn.update(rollout, targets, learning_rate=1e-2, entropy_coef=0.0, generator=torch.Generator())
    assert found == {"steps_known": 0}
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_a_restored_learner_goes_on_as_the_other(tmp_path) -> None:
    """Through a file: the moments' memory layout, which a file does not keep, and the KL coefficient included."""
    algorithm = plain("gae", loss="kl")
    one = learner(network(), algorithm, epochs=2)
    rollout = on_policy(rollout_of(REWARDS), one.network)
    targets = estimate(rollout, algorithm, reward_ends_credit=False)

    def step(learn: Learner) -> None:
        learn.update(rollout, targets, learning_rate=1e-2, entropy_coef=0.0, generator=torch.Generator())

    step(one)
    assert one.kl_coef != algorithm.kl_coef
    save_state(tmp_path, {"learner": one.state(), "network": dict(one.network.state_dict())})
    state = load_state(tmp_path)
    other = learner(network(seed=1), algorithm, epochs=2)
    other.network.load_state_dict(state["network"])
    other.restore(state["learner"])
    assert other.kl_coef == one.kl_coef
    step(one)
    step(other)
    for a, b in zip(one.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("option", ["value_coef", "entropy_coef"])
def test_coefficients_weigh_their_terms_linearly(option: str) -> None:
    at = [gradients(plain("gae", **{option: c}))[2] for c in (0.0, 0.5, 1.0)]  # of the hidden layer
    assert not torch.allclose(at[0], at[2])
    torch.testing.assert_close(at[1], (at[0] + at[2]) / 2, rtol=1e-4, atol=1e-6)


def test_masked_steps_change_nothing() -> None:
    """Without a baseline: whatever a left-out step holds, NaN included, the weights come out the same."""
    results = []
    for garbage in (0.0, float("nan")):
        net = network()
        rollout = rollout_of([REWARDS[0], REWARDS[0]])
        algorithm = plain("mc", baseline=False, loss="clip")
        targets = estimate(rollout, algorithm, reward_ends_credit=True)
        targets.advantages[:, -1] = garbage
        rollout.log_probs[:, -1] = garbage
        found = learner(net, algorithm, epochs=2, minibatch_size=4).update(
            rollout, targets, learning_rate=1e-2, entropy_coef=0.01, generator=torch.Generator().manual_seed(0)
        )
        assert np.isfinite(list(found.values())).all()
        results.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_kl_coefficient_moves_towards_its_target() -> None:
    net, algorithm = network(), plain("gae", loss="kl")
    rollout = on_policy(rollout_of(REWARDS), net)
    targets = estimate(rollout, algorithm, reward_ends_credit=False)
    still, moving = learner(net, algorithm), learner(network(), algorithm, epochs=8)
    options = {"entropy_coef": 0.0, "generator": torch.Generator().manual_seed(0)}
    still.update(rollout, targets, learning_rate=1e-12, **options)  # type: ignore[arg-type]
    moving.update(rollout, targets, learning_rate=0.3, **options)  # type: ignore[arg-type]
    assert still.kl_coef == algorithm.kl_coef / 2
    assert moving.kl_coef == algorithm.kl_coef * 2


class Bright(Clockwork):
    """Episodes of one step; action 1 is right where the frame is bright, action 0 where it is dark."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__(count, length=1, ends="terminated", shape=(8, 8))
        self.rng = np.random.default_rng(seed)

    def _frames(self) -> np.ndarray:
        self.bright = self.rng.integers(0, 2, self.count)
        return np.broadcast_to((self.bright * 255).astype(np.uint8)[:, None, None], (self.count, 8, 8)).copy()

    def recv(self):
        right = self.sent[-1] == self.bright
        return super().recv()._replace(rewards=np.where(right, 1.0, -1.0).astype(np.float32))


@pytest.mark.parametrize("loss", ["reinforce", "clip", "kl"])
@pytest.mark.parametrize("advantage", ["mc", "td", "gae"])
def test_every_combination_learns(advantage: str, loss: str) -> None:
    algorithm = AlgorithmConfig(advantage=advantage, loss=loss, gamma=0.9)  # type: ignore[arg-type]
    net = network(actions=2)
    collector = Collector([Bright(8, 0), Bright(8, 1)], net, steps=16, stack=2)
    collector.reset()
    learn = learner(net, algorithm, epochs=1 if loss == "reinforce" else 3, minibatch_size=64)
    means = []
    for step in range(25):
        rollout = collector.collect(torch.Generator().manual_seed(step))
        targets = estimate(rollout, algorithm, reward_ends_credit=False)
        generator = torch.Generator().manual_seed(step)
        learn.update(rollout, targets, learning_rate=1e-2, entropy_coef=0.0, generator=generator)
        means.append(float(rollout.rewards.mean()))
    assert abs(means[0]) < 0.3
    assert means[-1] > 0.95
