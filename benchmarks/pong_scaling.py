"""How rollout and update time grow with environments, threads and network, against the emulator's own floor.

    python benchmarks/pong_scaling.py

The floor of a rollout is the emulator alone: the same environments and threads, given actions made beforehand. The
floor of an update is its arithmetic at the speed that one large float32 matrix product reaches on the same threads.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import tyro
from torch import nn

from pong.config import NetworkConfig, PongConfig, preset
from pong.env import AtariEnvs
from pong.learning import Learner, estimate
from pong.rollout import Collector
from pong.trainer import build_network, cores

SMALL = NetworkConfig(channels=(8, 16), kernels=((8, 6), (4, 3)), strides=((4, 4), (2, 2)), hidden=128)
NATURE = NetworkConfig()


@dataclass(frozen=True)
class Args:
    """Time one rollout and one update in each setting."""

    envs: tuple[int, ...] = (4, 8, 16, 32, 64)
    threads: tuple[int, ...] = tuple(sorted({1, cores()}))
    repeats: int = 5
    """Rollouts and updates timed; the median is printed."""


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def flops_per_step(network: nn.Module, stacks: torch.Tensor) -> float:
    """Multiplications and additions of one forward and one backward pass over one observation."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        logits, values = network(stacks)
        (logits.sum() + values.sum()).backward()
    return counter.get_total_flops() / len(stacks)


def measure(config: PongConfig, threads: int, repeats: int) -> list[str]:
    """Table cells, in steps per second: emulator alone, rollout, update (each with its distance to the floor), both."""
    optimization = config.optimization
    half, steps = optimization.envs // 2, optimization.rollout_steps
    groups = [AtariEnvs(config.game, seed=(0, index), count=half, threads=threads) for index in range(2)]
    network = build_network(config, actions=len(groups[0].action_names))
    collector = Collector(groups, network, steps=steps, stack=config.game.stack)
    collector.reset()
    made = np.random.default_rng(0).integers(0, len(groups[0].action_names), (steps, half))

    def emulate() -> None:
        for actions in made:
            for group in groups:
                group.send(actions)
            for group in groups:
                group.recv()

    torch.set_num_threads(1)
    floor = median_seconds(emulate, repeats)
    collect = median_seconds(lambda: collector.collect(torch.Generator()), repeats)

    torch.set_num_threads(threads)
    rollout = collector.collect(torch.Generator())
    targets = estimate(rollout, config.algorithm, reward_ends_credit=config.game.reward_ends_credit)
    learner = Learner(
        network,
        config.algorithm,
        epochs=config.epochs,
        minibatch_size=optimization.minibatch_size,
        adam_epsilon=1e-5,
        max_grad_norm=0.5,
    )
    update = median_seconds(
        lambda: learner.update(rollout, targets, learning_rate=1e-5, entropy_coef=0.01, generator=torch.Generator()),
        repeats,
    )
    a = torch.randn(2048, 2048)
    peak = 2 * 2048**3 / median_seconds(lambda: a @ a, repeats)
    observations = rollout.history.observations(network.prepare)[: optimization.minibatch_size]
    arithmetic = flops_per_step(network, observations) * optimization.steps_per_rollout * config.epochs / peak
    collector.close()
    total = optimization.steps_per_rollout
    return [
        f"{total / floor:,.0f}",
        f"{total / collect:,.0f} ({collect / floor:.2f})",
        f"{total / update:,.0f} ({update / arithmetic:.1f})",
        f"{total / (collect + update):,.0f}",
    ]


def main(args: Args) -> None:
    fast = preset("fast")
    print("| environments | threads | network | emulator alone | rollout (times floor) | update (times floor) | both |")
    print("|---|---|---|---|---|---|---|")
    settings = [(envs, threads, "default", fast.network) for threads in args.threads for envs in args.envs]
    settings += [(16, max(args.threads), name, net) for name, net in (("small", SMALL), ("Nature", NATURE))]
    for envs, threads, name, net in settings:
        config = replace(fast, network=net, optimization=replace(fast.optimization, envs=envs))
        cells = measure(config, threads, args.repeats)
        print(f"| {envs} | {threads} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
