"""Time to learn Pong, side by side: this project, CleanRL's ppo_atari and Stable-Baselines3's PPO.

    pip install stable-baselines3 opencv-python-headless
    python benchmarks/pong_vs_cleanrl.py

The contestants run one after the other on the same machine, each a process of its own that counts from its start. Ours
goes first, until its mean over the last 100 episodes is 18; the others get `factor` times as long. Each plays Pong as
its authors publish it: CleanRL's ppo_atari is written anew below from its published settings (8 environments, 128
steps, Nature's network, no sticky actions), or run from a checkout with --cleanrl-script; Stable-Baselines3 with the
settings of its zoo for Atari. Ours is the fast preset, which sees the field alone and has three actions; with
`--preset v5` it plays the standard protocol, sticky actions included, which the others do not.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
import tyro
from torch import nn

from rlhf.run import read_json_lines

Contestant = Literal["ours", "cleanrl", "sb3"]
THRESHOLDS = (0, 10, 18)
_GAME = "PongNoFrameskip-v4"


@dataclass(frozen=True)
class Args:
    """Run the contestants, or (used by itself) be one of them."""

    contestants: tuple[Contestant, ...] = ("ours", "cleanrl", "sb3")
    factor: float = 5.0
    """How many times our time to 18 the others get."""
    seconds: float = 900.0
    """What the others get if ours is not run or does not arrive; and the most that ours gets."""
    seed: int = 1
    preset: Literal["fast", "v5"] = "fast"
    """Of ours."""
    cleanrl_script: Path | None = None
    """cleanrl/ppo_atari.py of a checkout, in place of the one below."""
    be: Contestant | None = None


class Clock:
    """Prints a line of JSON now and then: seconds since process start, steps, mean of the last 100 episodes."""

    def __init__(self) -> None:
        self.start = psutil.Process().create_time()
        self.scores: deque[float] = deque(maxlen=100)
        self.episodes = 0

    def ended(self, score: float) -> None:
        self.scores.append(score)
        self.episodes += 1

    def report(self, steps: int) -> None:
        mean = sum(self.scores) / len(self.scores) if len(self.scores) == 100 else None
        row = {"seconds": time.time() - self.start, "steps": steps, "mean": mean, "episodes": self.episodes}
        print(json.dumps(row), flush=True)


def cleanrl_envs(count: int, seed: int) -> Any:
    """Its environments on gymnasium's wrappers, one after the other in this process."""
    import ale_py
    import gymnasium as gym

    gym.register_envs(ale_py)

    def make(index: int) -> gym.Env[Any, Any]:
        env = gym.make(_GAME)
        env = gym.wrappers.RecordEpisodeStatistics(env)
        env = gym.wrappers.AtariPreprocessing(env, noop_max=30, frame_skip=4, screen_size=84, grayscale_obs=True)
        env = gym.wrappers.FrameStackObservation(gym.wrappers.ClipReward(env, -1, 1), 4)
        env.action_space.seed(seed + index)
        return env

    return gym.vector.SyncVectorEnv(
        [partial(make, index) for index in range(count)], autoreset_mode=gym.vector.AutoresetMode.SAME_STEP
    )


def cleanrl_network() -> tuple[nn.Module, nn.Module, nn.Module]:
    """Trunk, actor and critic, orthogonal."""

    def layer(module: nn.Conv2d | nn.Linear, gain: float = 2**0.5) -> nn.Module:
        nn.init.orthogonal_(module.weight, gain)
        assert module.bias is not None
        nn.init.zeros_(module.bias)
        return module

    convolutions = [layer(nn.Conv2d(4, 32, 8, 4)), nn.ReLU(), layer(nn.Conv2d(32, 64, 4, 2)), nn.ReLU()]
    trunk = nn.Sequential(
        *convolutions, layer(nn.Conv2d(64, 64, 3, 1)), nn.ReLU(), nn.Flatten(), layer(nn.Linear(3136, 512)), nn.ReLU()
    )
    return trunk, layer(nn.Linear(512, 6), 0.01), layer(nn.Linear(512, 1), 1.0)


def cleanrl_update(
    flat: list[torch.Tensor],
    trunk: nn.Module,
    actor: nn.Module,
    critic: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
) -> None:
    """Four epochs of four minibatches over stacks, actions, log-probs, values, advantages and returns."""
    for _ in range(4):
        for chosen in torch.randperm(len(flat[0])).split(256):
            s, a, old, v, adv, ret = (x[chosen] for x in flat)
            hidden = trunk(s / 255.0)
            policy, value = torch.distributions.Categorical(logits=actor(hidden)), critic(hidden).squeeze(-1)
            ratio = (policy.log_prob(a) - old).exp()
            adv = (adv - adv.mean()) / (adv.std() + 1e-8)
            surrogate = torch.max(-adv * ratio, -adv * ratio.clamp(0.9, 1.1)).mean()
            near = v + (value - v).clamp(-0.1, 0.1)
            error = 0.5 * torch.max((value - ret) ** 2, (near - ret) ** 2).mean()
            loss = surrogate - 0.01 * policy.entropy().mean() + 0.5 * error
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()


def cleanrl(seed: int) -> None:
    """PPO with the settings that CleanRL publishes for ppo_atari, for ever."""
    envs, steps, total = 8, 128, 10_000_000
    torch.manual_seed(seed)
    vector = cleanrl_envs(envs, seed)
    trunk, actor, critic = cleanrl_network()
    parameters = [*trunk.parameters(), *actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=2.5e-4, eps=1e-5)
    clock = Clock()
    observation = torch.from_numpy(vector.reset(seed=seed)[0])
    done = torch.zeros(envs)
    stacks = torch.zeros(steps, envs, 4, 84, 84, dtype=torch.uint8)
    actions = torch.zeros(steps, envs, dtype=torch.int64)
    log_probs, rewards, dones, values = (torch.zeros(steps, envs) for _ in range(4))
    updates = total // (envs * steps)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 2.5e-4 * (1 - update / updates)
        for t in range(steps):
            stacks[t], dones[t] = observation, done
            with torch.no_grad():
                hidden = trunk(observation / 255.0)
                policy = torch.distributions.Categorical(logits=actor(hidden))
                actions[t] = policy.sample()
                log_probs[t], values[t] = policy.log_prob(actions[t]), critic(hidden).squeeze(-1)
            seen, reward, terminated, truncated, info = vector.step(actions[t].numpy())
            observation, rewards[t] = torch.from_numpy(seen), torch.from_numpy(reward).float()
            done = torch.from_numpy(np.logical_or(terminated, truncated)).float()
            if "final_info" in info:
                episode = info["final_info"]["episode"]
                for score in episode["r"][episode["_r"]]:
                    clock.ended(float(score))
        with torch.no_grad():
            following, carried = critic(trunk(observation / 255.0)).squeeze(-1), torch.zeros(envs)
            advantages = torch.zeros(steps, envs)
            goes_on = 1 - done
            for t in reversed(range(steps)):
                delta = rewards[t] + 0.99 * following * goes_on - values[t]
                advantages[t] = carried = delta + 0.99 * 0.95 * goes_on * carried
                following, goes_on = values[t], 1 - dones[t]
        flat = [x.flatten(0, 1) for x in (stacks, actions, log_probs, values, advantages, advantages + values)]
        cleanrl_update(flat, trunk, actor, critic, optimizer, parameters)
        clock.report((update + 1) * envs * steps)


def sb3(seed: int) -> None:
    """Stable-Baselines3's PPO with its zoo's settings for Atari, for ever."""
    import ale_py
    import gymnasium as gym
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    gym.register_envs(ale_py)
    clock = Clock()

    class Report(BaseCallback):
        def _on_step(self) -> bool:
            for info in self.locals["infos"]:
                if "episode" in info:
                    clock.ended(float(info["episode"]["r"]))
            return True

        def _on_rollout_end(self) -> None:
            clock.report(self.num_timesteps)

    envs = VecFrameStack(make_atari_env(_GAME, n_envs=8, seed=seed), n_stack=4)
    model = PPO(
        "CnnPolicy",
        envs,
        seed=seed,
        n_steps=128,
        n_epochs=4,
        batch_size=256,
        learning_rate=lambda left: 2.5e-4 * left,
        clip_range=lambda left: 0.1 * left,
        vf_coef=0.5,
        ent_coef=0.01,
    )
    model.learn(10_000_000, callback=Report())


def rows_of(contestant: Contestant, args: Args, seconds: float) -> list[dict[str, Any]]:
    """What a contestant reported until it arrived at the last threshold or its time was up."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        if contestant == "ours":
            options = ["--preset", args.preset, "--seed", str(args.seed), "--run-dir", str(run_dir)]
            command = [sys.executable, "-m", "pong.train_ppo", *options, "--eval-episodes", "0"]
        elif contestant == "cleanrl" and args.cleanrl_script is not None:
            options = ["--env-id", _GAME, "--seed", str(args.seed), "--no-cuda"]
            command = [sys.executable, "-u", str(args.cleanrl_script), *options]
        else:
            command = [sys.executable, __file__, "--be", contestant, "--seed", str(args.seed)]
        log = Path(folder) / "log"
        started = time.time()
        with log.open("w") as file, subprocess.Popen(command, stdout=file) as process:
            while True:
                ended = process.poll() is not None or time.time() - started > seconds
                rows = read_report(contestant, args, run_dir / "metrics.jsonl", log, started)
                if ended or (rows and (rows[-1]["mean"] or -21) >= THRESHOLDS[-1]):
                    process.kill()
                    break
                time.sleep(1)
        return rows


def read_report(contestant: Contestant, args: Args, metrics: Path, log: Path, started: float) -> list[dict[str, Any]]:
    """Rows of seconds, steps and mean, from what each contestant writes."""
    if contestant == "ours":
        rows = read_json_lines(metrics) if metrics.exists() else []
        return [
            {
                "seconds": row["time/elapsed"],
                "steps": row["step"],
                "mean": row["score/mean_100"] if row["episodes"] >= 100 else None,
                "episodes": row["episodes"],
            }
            for row in rows
        ]
    if contestant == "cleanrl" and args.cleanrl_script is not None:
        found = re.findall(r"global_step=(\d+), episodic_return=\[?(-?[\d.]+)", log.read_text())
        scores = [float(score) for _, score in found]
        mean = sum(scores[-100:]) / 100 if len(scores) >= 100 else None
        steps = int(found[-1][0]) if found else 0
        return [{"seconds": time.time() - started, "steps": steps, "mean": mean, "episodes": len(scores)}]
    return read_json_lines(log)


def main(args: Args) -> None:
    seconds = args.seconds
    print(f"| contestant | steps/s | {' | '.join(f'mean {t}' for t in THRESHOLDS)} | at the end |")
    print("|---|---|" + "---|" * (len(THRESHOLDS) + 1))
    for contestant in args.contestants:
        rows = rows_of(contestant, args, seconds)
        if not rows:
            print(f"| {contestant} | did not report: see its error above |" + " |" * (len(THRESHOLDS) + 1))
            continue
        cells = []
        for threshold in THRESHOLDS:
            arrived = [row for row in rows if row["mean"] is not None and row["mean"] >= threshold]
            cells.append(f"{arrived[0]['seconds']:.0f} s" if arrived else f"> {seconds:.0f} s")
        last, first = rows[-1], rows[0]
        rate = (last["steps"] - first["steps"]) / max(last["seconds"] - first["seconds"], 1e-9)
        mean = "-" if last["mean"] is None else f"{last['mean']:.1f}"
        end = f"{mean} after {last['steps'] / 1000:,.0f}k steps, {last['seconds']:.0f} s"
        print(f"| {contestant} | {rate:,.0f} | {' | '.join(cells)} | {end} |", flush=True)
        if contestant == "ours" and last["mean"] is not None and last["mean"] >= THRESHOLDS[-1]:
            seconds = args.factor * last["seconds"]


if __name__ == "__main__":
    chosen = tyro.cli(Args, description=__doc__)
    if chosen.be == "cleanrl":
        cleanrl(chosen.seed)
    elif chosen.be == "sb3":
        sb3(chosen.seed)
    else:
        main(chosen)
