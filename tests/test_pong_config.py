"""Pong's options: what is refused, what reads back, what the network makes of them."""

import json
from dataclasses import replace

import pytest
import torch

from pong.config import AlgorithmConfig, GameConfig, NetworkConfig, OptimizationConfig, PongConfig, preset
from pong.network import ActorCritic
from rlhf.checks import InputError


@pytest.mark.parametrize(
    ("topic", "options", "message"),
    [
        (GameConfig, {"repeat_action_probability": 1.0}, "repeat_action_probability"),
        (GameConfig, {"crop_top": 84}, "crop_top=84"),
        (GameConfig, {"actions": (0, 0)}, "distinct"),
        (GameConfig, {"frame_skip": 0}, "frame_skip"),
        (AlgorithmConfig, {"advantage": "vtrace"}, "'episode', 'mc', 'td', 'gae'"),
        (AlgorithmConfig, {"loss": "trpo"}, "'reinforce', 'clip', 'kl'"),
        (AlgorithmConfig, {"baseline": False}, "needs baseline=True"),
        (AlgorithmConfig, {"gamma": 1.1}, "gamma"),
        (NetworkConfig, {"strides": ((4, 4),)}, "one entry per convolution"),
        (OptimizationConfig, {"envs": 3}, "even"),
        (OptimizationConfig, {"lr_schedule": "cosine"}, "'linear', 'geometric'"),
        (OptimizationConfig, {"lr_schedule": "geometric", "final_learning_rate": 0.0}, "lr-schedule linear"),
        (OptimizationConfig, {"minibatch_size": 300}, "must divide envs \\* rollout_steps = 2048"),
    ],
)
def test_what_cannot_work_is_refused(topic: type, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        topic(**options)


@pytest.mark.parametrize("config", [preset("fast"), preset("v5"), preset("fast", "breakout")])
def test_a_config_reads_back_from_its_json(config: PongConfig) -> None:
    assert PongConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config


def test_another_programs_config_is_refused() -> None:
    with pytest.raises(InputError, match="not that of a Pong run"):
        PongConfig.from_dict({"sampling": {}})


def test_reinforce_looks_at_fresh_data_once_unless_told_otherwise() -> None:
    config = PongConfig()
    assert config.epochs == 2
    assert replace(config, algorithm=AlgorithmConfig(loss="reinforce")).epochs == 1


def test_too_small_a_frame_is_refused() -> None:
    with pytest.raises(InputError, match="too small"):
        ActorCritic(NetworkConfig(), stack=4, frame_shape=(20, 40), actions=3)


def test_weights_of_another_network_are_refused() -> None:
    network = ActorCritic(NetworkConfig(), stack=2, frame_shape=(84, 84), actions=3)
    weights = network.state_dict()
    network.load(weights)
    with pytest.raises(InputError, match="another network"):
        network.load(weights | {"background": torch.zeros(1, 2, 84, 84)})


def test_the_background_is_subtracted() -> None:
    network = ActorCritic(NetworkConfig(), stack=2, frame_shape=(84, 84), actions=3)
    frames = torch.randint(0, 256, (1, 2, 84, 84), dtype=torch.uint8)
    network.background.copy_(frames[0, 0].float())
    same = frames[:, :1].expand(1, 2, 84, 84)
    blank = torch.zeros_like(frames)
    shown = network(same)[0]
    network.background.zero_()
    torch.testing.assert_close(shown, network(blank)[0], rtol=0, atol=0)
    assert not torch.equal(network(frames)[0], shown)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_frames_prepared_beforehand_are_the_same_to_the_network(precision: torch.dtype) -> None:
    network = ActorCritic(NetworkConfig(), stack=4, frame_shape=(84, 84), actions=6, precision=precision)
    stacks = torch.randint(0, 256, (8, 4, 84, 84), dtype=torch.uint8)
    network.background.copy_(stacks[0, 0].float())
    prepared = network.prepare(stacks)
    assert prepared.dtype == precision
    torch.testing.assert_close(prepared.float(), (stacks.float() - stacks[0, 0].float()) / 255, rtol=2**-8, atol=0)
    for one, two in zip(network(stacks), network(prepared), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_the_first_policy_is_nearly_uniform() -> None:
    network = ActorCritic(NetworkConfig(), stack=4, frame_shape=(84, 84), actions=6)
    logits, values = network(torch.randint(0, 256, (8, 4, 84, 84), dtype=torch.uint8))
    assert logits.shape == (8, 6)
    assert values.shape == (8,)
    assert float(logits.detach().softmax(-1).max()) < 0.2
