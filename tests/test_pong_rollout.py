"""Rollouts against an environment whose frames say which step of which episode they are."""

import numpy as np
import pytest
import torch
from pong_toys import Clockwork, NewestPixel

from pong.config import AlgorithmConfig
from pong.env import Frames
from pong.learning import estimate
from pong.rollout import Collector, Rollout

GAMMA = 0.9
VALUES = torch.linspace(-1, 1, 256)


def collector(envs: list[Clockwork], *, steps: int, stack: int = 3, values: torch.Tensor = VALUES) -> Collector:
    made = Collector(envs, NewestPixel(values), steps=steps, stack=stack)  # type: ignore[arg-type]
    made.reset()
    return made


def greys(rollout: Rollout, env: int, step: int) -> list[int]:
    """The grey level of each frame of an observation."""
    return rollout.history.stacks(torch.tensor([step]), torch.tensor([env]))[0, :, 0, 0].tolist()


def test_stacks_hold_the_last_frames_of_the_same_episode_only() -> None:
    two = [Clockwork(1, length=4, ends="terminated"), Clockwork(1, length=4, ends="terminated", first=100)]
    collect = collector(two, steps=6)
    first = collect.collect(torch.Generator())
    # time:          0            1            2            3            | 10: the next episode
    expected = [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3], [10, 10, 10], [10, 10, 11]]
    assert [greys(first, 0, step) for step in range(6)] == expected
    assert [greys(first, 1, step) for step in range(6)] == [[100 + x for x in stack] for stack in expected]
    second = collect.collect(torch.Generator())  # goes on where the first ended
    assert [greys(second, 0, step) for step in range(3)] == [[10, 11, 12], [11, 12, 13], [20, 20, 20]]


def test_all_observations_at_once_are_the_same_stacks() -> None:
    two = [Clockwork(2, length=4, ends="terminated"), Clockwork(1, length=7, ends="truncated", first=100)]
    collect = collector(two, steps=6)
    collect.collect(torch.Generator())
    history = collect.collect(torch.Generator()).history
    steps, envs = torch.arange(6).repeat(3), torch.arange(3).repeat_interleave(6)
    observations = history.observations(lambda frames: -frames.float())
    assert torch.equal(observations, -history.stacks(steps, envs).float())
    assert observations.is_contiguous(memory_format=torch.channels_last)


def test_the_background_is_the_median_and_the_first_rollout_goes_on_from_there() -> None:
    collect = collector([Clockwork(1, length=100, ends="terminated", first=100)], steps=6)
    background = collect.measure_background(5, torch.Generator())
    assert torch.equal(background, torch.full((2, 3), 103.0))  # of 101 ... 105
    rollout = collect.collect(torch.Generator())
    assert [greys(rollout, 0, step) for step in range(2)] == [[103, 104, 105], [104, 105, 106]]
    young = collector([Clockwork(1, length=4, ends="terminated")], steps=6)
    young.measure_background(5, torch.Generator())
    rollout = young.collect(torch.Generator())
    assert [greys(rollout, 0, step) for step in range(3)] == [[10, 10, 11], [10, 11, 12], [11, 12, 13]]


def test_rewards_are_clipped_for_learning_and_whole_in_the_score() -> None:
    class Rich(Clockwork):
        def recv(self) -> Frames:
            return super().recv()._replace(rewards=np.full(self.count, 3, dtype=np.float32))

    rollout = collector([Rich(1, length=2, ends="terminated")], steps=4).collect(torch.Generator())
    assert rollout.rewards.tolist() == [[1, 1, 1, 1]]
    assert [episode.score for episode in rollout.episodes] == [6, 6]


def test_values_are_those_of_the_observation_before_the_action() -> None:
    rollout = collector([Clockwork(2, length=4, ends="terminated")], steps=5).collect(torch.Generator())
    np.testing.assert_array_equal(rollout.values[1], VALUES[[50, 51, 52, 53, 60]])


def test_episodes_report_their_own_environment_score_and_length() -> None:
    groups = [Clockwork(1, length=3, ends="terminated"), Clockwork(1, length=5, ends="truncated")]
    episodes = collector(groups, steps=7).collect(torch.Generator()).episodes
    assert [tuple(episode) for episode in episodes] == [(0, 3.0, 3), (1, 5.0, 5), (0, 3.0, 3)]


def test_a_truncated_episode_is_bootstrapped_from_its_own_final_frame() -> None:
    rollout = collector([Clockwork(1, length=4, ends="truncated")], steps=6).collect(torch.Generator())
    assert rollout.truncated.tolist() == [[False, False, False, True, False, True]]  # frame limit; rollout end
    assert not rollout.terminated.any()
    expected = torch.zeros(1, 6)
    expected[0, 3] = VALUES[4]  # the episode's fifth frame, not 10, the next episode's first
    expected[0, 5] = VALUES[12]  # what the environment shows after the rollout
    torch.testing.assert_close(rollout.bootstrap_values, expected, rtol=0, atol=0)


def test_a_truncation_at_the_rollouts_end_is_bootstrapped_from_the_final_frame_too() -> None:
    rollout = collector([Clockwork(1, length=4, ends="truncated")], steps=4).collect(torch.Generator())
    assert float(rollout.bootstrap_values[0, 3]) == float(VALUES[4])  # not 10, the next episode's first frame


def test_a_terminated_episode_is_worth_nothing_after_its_end() -> None:
    rollout = collector([Clockwork(1, length=4, ends="terminated")], steps=4).collect(torch.Generator())
    assert rollout.terminated.tolist() == [[False, False, False, True]]
    assert not rollout.truncated.any()
    assert rollout.bootstrap_values.tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("advantage", ["mc", "td", "gae"])
@pytest.mark.parametrize("ends", ["terminated", "truncated"])
def test_the_true_values_are_the_estimators_fixed_point(advantage: str, ends: str) -> None:
    """Reward 1 per step: worth 1 / (1 - gamma) if the end is only a time limit, the finite sum if it is an end."""
    length = 4
    value_of = torch.full((256,), 1 / (1 - GAMMA))
    if ends == "terminated":
        time = torch.arange(256) % 10
        value_of = (1 - GAMMA ** (length - time)) / (1 - GAMMA)
    rollout = collector([Clockwork(2, length=length, ends=ends)], steps=10, values=value_of).collect(torch.Generator())
    algorithm = AlgorithmConfig(advantage=advantage, gamma=GAMMA, normalize_advantages=False)  # type: ignore[arg-type]
    targets = estimate(rollout, algorithm, reward_ends_credit=False)
    torch.testing.assert_close(targets.advantages, torch.zeros(2, 10), rtol=0, atol=2e-5)
    torch.testing.assert_close(targets.returns, rollout.values, rtol=0, atol=2e-5)


def test_actions_are_drawn_from_the_policy() -> None:
    envs = Clockwork(500, length=10**6, ends="terminated", shape=(1, 1))
    network = NewestPixel(VALUES, shape=(1, 1))
    network.forward = lambda stacks: (
        torch.log(torch.tensor([0.2, 0.8])).expand(len(stacks), 2),
        torch.zeros(len(stacks)),
    )  # type: ignore[method-assign]
    collect = Collector([envs], network, steps=40, stack=1)  # type: ignore[arg-type]
    collect.reset()
    rollout = collect.collect(torch.Generator().manual_seed(0))
    assert float(rollout.actions.float().mean()) == pytest.approx(0.8, abs=4 * (0.16 / 20_000) ** 0.5)
    assert torch.equal(torch.tensor(np.stack(envs.sent, 1)), rollout.actions)
    torch.testing.assert_close(rollout.log_probs, torch.log(torch.tensor([0.2, 0.8]))[rollout.actions])
    assert collect.collect(None).actions.all()  # greedy


def test_a_restored_collector_goes_on_as_the_other() -> None:
    def fresh() -> Collector:
        return collector([Clockwork(1, length=4, ends="truncated"), Clockwork(1, length=7, ends="terminated")], steps=5)

    one, other = fresh(), fresh()
    one.collect(torch.Generator())
    other.restore(one.state())
    a, b = one.collect(torch.Generator().manual_seed(1)), other.collect(torch.Generator().manual_seed(1))
    for x, y in zip(a[1:-1], b[1:-1], strict=True):
        assert torch.equal(x, y)
    assert a.episodes == b.episodes
    every = torch.arange(5).repeat(2), torch.arange(2).repeat_interleave(5)
    assert torch.equal(a.history.stacks(*every), b.history.stacks(*every))
