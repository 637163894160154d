"""Collecting experience: the agent chooses for half of the environments while the other half emulate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pong.env import Frames
from pong.network import ActorCritic


class Rollout(NamedTuple):
    """T steps of N environments. Frames are kept once, until the next rollout; observations are built from them."""

    history: "FrameHistory"
    actions: Tensor  # int64 [N, T]
    log_probs: Tensor  # f32 [N, T] of those actions, by the policy that chose them
    values: Tensor  # f32 [N, T]
    rewards: Tensor  # f32 [N, T], clipped to [-1, 1]
    terminated: Tensor  # bool [N, T]
    truncated: Tensor  # bool [N, T]: by the frame limit, and where the rollout ends
    bootstrap_values: Tensor  # f32 [N, T]: value of the state after a truncated step, elsewhere 0
    episodes: list["Episode"]  # that ended, in order


class Envs(Protocol):
    """What the collector needs of environments; `pong.env.AtariEnvs` says what each does."""

    count: int
    action_names: list[str]

    def reset(self) -> np.ndarray: ...
    def send(self, actions: np.ndarray) -> None: ...
    def recv(self) -> Frames: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class Episode(NamedTuple):
    """env: which environment's; score: the game's own; steps: the agent's."""

    env: int
    score: float
    steps: int


class FrameHistory:
    """The single frames of a rollout, and the observations (stacks) as indices into them.

    Slot k holds the frame before step k - (stack - 1): the first stack - 1 slots are what went before the rollout.
    An observation does not reach back beyond its episode's first frame, which is repeated instead.

    Args:
        steps: T.
        envs: N.
        stack: frames per observation.
        frame_shape: (rows, columns).
    """

    def __init__(
        self, *, steps: int, envs: int, stack: int, frame_shape: tuple[int, int], device: torch.device | str
    ) -> None:
        self.stack = stack
        self.frames = torch.zeros(steps + stack, envs, *frame_shape, dtype=torch.uint8, device=device)
        self.age = torch.zeros(steps + 1, envs, dtype=torch.int64, device=device)  # frames of the episode before this
        self._back = torch.arange(stack - 1, -1, -1, device=device)

    def put(self, step: int, envs: slice, frames: np.ndarray, age: np.ndarray) -> None:
        """The frames that these environments show before `step`, and how many of their episode came before."""
        self.frames[step + self.stack - 1, envs] = torch.from_numpy(frames).to(self.frames.device)
        self.age[step, envs] = torch.from_numpy(age).to(self.age.device)

    def start_over(self) -> None:
        """The last frames become what went before the next rollout; its step 0 is this one's end."""
        self.frames[: self.stack] = self.frames[-self.stack :].clone()
        self.age[0] = self.age[-1]

    def stacks(self, steps: Tensor, envs: Tensor) -> Tensor:
        """Observations before these steps of these environments, [B] int64 each: u8 [B, stack, rows, columns]."""
        places = self._places(steps, envs)
        return self.frames.flatten(0, 1).index_select(0, places.flatten()).unflatten(0, places.shape)

    def observations(self, prepare: Callable[[Tensor], Tensor]) -> Tensor:
        """What the agent saw before every step of the rollout, [N * T, stack, rows, columns], environment by
        environment, in the channels-last layout that convolutions like: transposed once instead of every epoch.

        Args:
            prepare: what is done to each frame, once, before the stacks are built: `ActorCritic.prepare`.
        """
        steps, envs = self.age.shape[0] - 1, self.age.shape[1]
        of_each = torch.arange(steps, device=self.age.device).repeat(envs)
        places = self._places(of_each, torch.arange(envs, device=self.age.device).repeat_interleave(steps))
        frames = prepare(self.frames.flatten(0, 1))
        built = frames.new_empty(len(places), *frames.shape[1:], self.stack)
        for channel in range(self.stack):
            built[..., channel] = frames.index_select(0, places[:, channel])
        return built.permute(0, 3, 1, 2)

    def final_stack(self, step: int, env: int, frame: np.ndarray) -> Tensor:
        """The observation that an episode ended with: `frame` after the one before `step`, u8 [1, stack, ...]."""
        last = torch.from_numpy(frame).to(self.frames.device)
        where = torch.tensor([step], device=self.frames.device), torch.tensor([env], device=self.frames.device)
        return torch.cat([self.stacks(*where)[:, 1:], last[None, None]], dim=1)

    def _places(self, steps: Tensor, envs: Tensor) -> Tensor:
        """Where the frames of observations are among all frames, [B, stack] int64."""
        back = torch.minimum(self._back, self.age[steps, envs].unsqueeze(1))
        slots = (steps + self.stack - 1).unsqueeze(1) - back
        return slots * self.frames.shape[1] + envs.unsqueeze(1)


@dataclass
class _Group:
    """One of the two halves, and the episodes that its environments are in."""

    envs: Envs
    place: slice  # among all environments
    score: np.ndarray = field(init=False)
    steps: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.score = np.zeros(self.envs.count)
        self.steps = np.zeros(self.envs.count, dtype=np.int64)

    def advance(self, result: Frames) -> list[Episode]:
        """Count the step; the episodes that it ended."""
        self.score += result.rewards
        self.steps += 1
        ended = np.flatnonzero(result.terminated | result.truncated)
        episodes = [Episode(self.place.start + int(i), float(self.score[i]), int(self.steps[i])) for i in ended]
        self.score[ended] = 0
        self.steps[ended] = 0
        return episodes


class _Buffers:
    """A rollout while it is being collected, [T, N]: each step of a group is one piece of memory."""

    def __init__(self, steps: int, envs: int, device: torch.device) -> None:
        shape = (steps, envs)
        self.actions = torch.zeros(shape, dtype=torch.int64, device=device)
        self.log_probs, self.values, self.bootstrap = (torch.zeros(shape, device=device) for _ in range(3))
        self.rewards = np.zeros(shape, dtype=np.float32)
        self.terminated, self.truncated = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        self.episodes: list[Episode] = []

    def rollout(self, history: FrameHistory) -> Rollout:
        """The same with time last."""
        device = self.actions.device
        return Rollout(
            history,
            self.actions.T,
            self.log_probs.T,
            self.values.T,
            torch.from_numpy(self.rewards).to(device).clamp(-1, 1).T,
            torch.from_numpy(self.terminated).to(device).T,
            torch.from_numpy(self.truncated).to(device).T,
            self.bootstrap.T,
            self.episodes,
        )


class Collector:
    """Steps groups of environments in turn with the current policy, and keeps what they answer.

    Args:
        groups: of environments, in order; usually two halves, so that one emulates while the other is thought about.
        network: chooses.
        steps: T, per environment and rollout.
        stack: frames of an observation.
    """

    def __init__(self, groups: Sequence[Envs], network: ActorCritic, *, steps: int, stack: int) -> None:
        self.network, self.steps = network, steps
        self.device = network.background.device
        ends = np.cumsum([group.count for group in groups]).tolist()
        self._groups = [_Group(g, slice(end - g.count, end)) for g, end in zip(groups, ends, strict=True)]
        self.count = ends[-1]
        self.actions = len(groups[0].action_names)
        self._envs = torch.arange(self.count, device=self.device)
        rows, columns = network.background.shape[-2:]
        self.history = FrameHistory(
            steps=steps, envs=self.count, stack=stack, frame_shape=(rows, columns), device=self.device
        )

    def reset(self) -> None:
        """Start every environment's first episode."""
        for group in self._groups:
            self.history.put(self.steps, group.place, group.envs.reset(), group.steps)

    @torch.inference_mode()
    def collect(self, generator: torch.Generator | None) -> Rollout:
        """T steps of every environment, from where the last rollout ended.

        Args:
            generator: of the actions; on the CPU, so that every device draws the same. None: the likeliest ones.
        """
        self.history.start_over()
        buffers = _Buffers(self.steps, self.count, self.device)
        # argmax(p / e), e ~ Exp(1), is a draw from p: the noise of a whole rollout in one call.
        noise = torch.ones(self.steps, self.count, self.actions)
        if generator is not None:
            noise.exponential_(generator=generator)
        noise = noise.to(self.device)
        for step in range(self.steps):
            for group in self._groups:
                if step > 0:
                    self._receive(group, step - 1, buffers)
                self._act(group, step, buffers, noise)
        for group in self._groups:
            self._receive(group, self.steps - 1, buffers)

        # Where the rollout ends, episodes go on: cut off there, and worth what the critic says of the next state.
        last = torch.full_like(self._envs, self.steps)
        ended = buffers.terminated[-1] | buffers.truncated[-1]
        following = self.network(self.history.stacks(last, self._envs))[1]
        buffers.bootstrap[-1] = torch.where(torch.from_numpy(ended).to(self.device), buffers.bootstrap[-1], following)
        buffers.truncated[-1] |= ~ended
        return buffers.rollout(self.history)

    def _act(self, group: _Group, step: int, buffers: _Buffers, noise: Tensor) -> None:
        """Choose the group's actions and send them."""
        envs = self._envs[group.place]
        logits, values = self.network(self.history.stacks(torch.full_like(envs, step), envs))
        log_p = logits.log_softmax(-1)
        actions = (log_p.exp() / noise[step, group.place]).argmax(-1, keepdim=True)
        group.envs.send(actions.squeeze(-1).cpu().numpy())
        at = (step, group.place)
        buffers.actions[at], buffers.values[at] = actions.squeeze(-1), values
        buffers.log_probs[at] = log_p.gather(-1, actions).squeeze(-1)

    def _receive(self, group: _Group, step: int, buffers: _Buffers) -> None:
        """Keep the answer to the group's actions of `step`."""
        result = group.envs.recv()
        at = (step, group.place)
        buffers.rewards[at], buffers.terminated[at], buffers.truncated[at] = result[1:4]
        for env, frame in result.final_frames.items():
            index = group.place.start + env
            buffers.bootstrap[step, index] = self.network(self.history.final_stack(step, index, frame))[1][0]
        buffers.episodes.extend(group.advance(result))
        self.history.put(step + 1, group.place, result.frames, group.steps)

    def measure_background(self, steps: int, generator: torch.Generator) -> Tensor:
        """Each pixel's median over `steps` random steps of every environment: f32 [rows, columns].

        The first rollout goes on from there.

        Args:
            steps: at least the stack, at most a rollout's.
            generator: of the actions; on the CPU.
        """
        seen = []
        for step in range(self.steps - steps, self.steps):  # as if they were a rollout's last
            for group in self._groups:
                group.envs.send(torch.randint(self.actions, (group.envs.count,), generator=generator).numpy())
            for group in self._groups:
                result = group.envs.recv()
                group.advance(result)
                self.history.put(step + 1, group.place, result.frames, group.steps)
                seen.append(torch.from_numpy(result.frames))
        return torch.cat(seen).median(0).values.float()

    def state(self) -> dict[str, Any]:
        """Everything that the next rollout depends on, but for the network."""
        groups = [
            {"envs": g.envs.state(), "score": torch.from_numpy(g.score), "steps": torch.from_numpy(g.steps)}
            for g in self._groups
        ]
        stack = self.history.stack
        return {"groups": groups, "frames": self.history.frames[-stack:], "age": self.history.age[-1]}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`; replays each emulator's steps since its last seed."""
        for group, saved in zip(self._groups, state["groups"], strict=True):
            group.envs.restore(saved["envs"])
            group.score, group.steps = saved["score"].numpy().copy(), saved["steps"].numpy().copy()
        self.history.frames[-self.history.stack :] = state["frames"].to(self.device)
        self.history.age[-1] = state["age"].to(self.device)

    def close(self) -> None:
        """Stop the emulators."""
        for group in self._groups:
            group.envs.close()
