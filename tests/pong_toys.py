"""Environments whose every answer is known, in the place of the emulator."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pong.env import Frames


class Clockwork:
    """n environments, each an episode of `length` steps with reward 1 each, that then end as `ends` says.

    The frame of environment i at its t-th step of episode e is filled with `first + 50 i + 10 e + t`.
    """

    def __init__(
        self,
        count: int,
        *,
        length: int,
        ends: str,
        first: int = 0,
        shape: tuple[int, int] = (2, 3),
        actions: int = 2,
    ) -> None:
        self.action_names = [f"action {i}" for i in range(actions)]
        self.count, self.length, self.ends, self.first, self.shape = count, length, ends, first, shape
        self.time = np.zeros(count, dtype=np.int64)
        self.episode = np.zeros(count, dtype=np.int64)
        self.sent: list[np.ndarray] = []
        self.closed = False

    def reset(self) -> np.ndarray:
        return self._frames()

    def send(self, actions: np.ndarray) -> None:
        self.sent.append(actions.copy())

    def recv(self) -> Frames:
        self.time += 1
        over = self.time == self.length
        finals = {int(i): self._frames()[i] for i in np.flatnonzero(over) if self.ends == "truncated"}
        self.time[over] = 0
        self.episode[over] += 1
        no = np.zeros(self.count, dtype=bool)
        terminated, truncated = (over, no) if self.ends == "terminated" else (no, over)
        return Frames(self._frames(), np.ones(self.count, dtype=np.float32), terminated, truncated, finals)

    def state(self) -> dict[str, Any]:
        return {"time": torch.from_numpy(self.time.copy()), "episode": torch.from_numpy(self.episode.copy())}

    def restore(self, state: dict[str, Any]) -> None:
        self.time, self.episode = state["time"].numpy().copy(), state["episode"].numpy().copy()

    def close(self) -> None:
        self.closed = True

    def _frames(self) -> np.ndarray:
        grey = self.first + 50 * np.arange(self.count) + 10 * self.episode + self.time
        return np.broadcast_to(grey.astype(np.uint8)[:, None, None], (self.count, *self.shape)).copy()


class NewestPixel(nn.Module):
    """A policy without preference whose value is a function of the newest frame's grey level."""

    background: Tensor

    def __init__(self, value_of: Tensor, *, actions: int = 2, shape: tuple[int, int] = (2, 3)) -> None:
        super().__init__()
        self.register_buffer("background", torch.zeros(shape))
        self.register_buffer("value_of", value_of)  # f32 [256]
        self.actions = actions

    def forward(self, stacks: Tensor) -> tuple[Tensor, Tensor]:
        newest = stacks[:, -1, 0, 0].long()
        return torch.zeros(len(stacks), self.actions), self.value_of[newest]
