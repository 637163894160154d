"""Atari games: ale-py's C++ vector environment, made exact to resume and safe to drive.

What this module takes care of, so that nothing else needs to know of it:

- an episode's end is told apart: `terminated` by the game or `truncated` by the frame limit, with the final frame;
- rows of `final_obs` whose environment did not finish are uninitialised memory, and never leave this module;
- an action the emulator does not have would make it wait for ever, and is refused before it is sent;
- an emulator's state cannot be saved, but it is a function of the seed it was reset with and the actions since: both
  are kept, and restoring plays them again. `RESEED_AFTER` bounds how many.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode

from pong.config import GameConfig
from rlhf.checks import InputError, check_choice
from rlhf.run import CheckpointError

RESEED_AFTER = 25_000
"""Steps after which an environment gets a new seed when its episode ends: what a resumed run plays again at most."""


class Frames(NamedTuple):
    """What n environments answered to one action each."""

    frames: np.ndarray  # u8 [n, rows, columns]: the next observation; of the new episode where one ended
    rewards: np.ndarray  # f32 [n], as the game gives them
    terminated: np.ndarray  # bool [n]: the game ended the episode
    truncated: np.ndarray  # bool [n]: the frame limit cut it off
    final_frames: dict[int, np.ndarray]  # by environment that ended: the episode's last frame, u8 [rows, columns]


class AtariEnvs:
    """n environments of one game that take a step together, in threads of the emulator's own.

    Args:
        config: the game.
        seed: any integers; environment i is reset with seeds drawn from (*seed, i).
        count: environments. Each costs 0.05 s to construct, and as much again to seed.
        threads: of the emulator, at most `count`.
        colour: frames are the whole screen in colour instead, u8 [n, 210, 160, 3]; for people to watch.
    Raises:
        InputError: no such game, or `config.actions` not in its minimal action set.
    """

    def __init__(
        self, config: GameConfig, *, seed: Sequence[int], count: int, threads: int, colour: bool = False
    ) -> None:
        check_choice("game", config.game, sorted(roms.get_all_rom_ids()))
        self.count = count
        self._rows = slice(None) if colour else config.rows
        self._seed = tuple(seed)
        self._env = AtariVectorEnv(
            config.game,
            count,
            num_threads=min(threads, count),
            max_num_frames_per_episode=config.max_frames_per_episode,
            repeat_action_probability=config.repeat_action_probability,
            img_height=210 if colour else config.frame_height,
            img_width=160 if colour else config.frame_width,
            grayscale=not colour,
            stack_num=1,
            frameskip=config.frame_skip,
            maxpool=config.max_pool,
            noop_max=config.noop_max,
            reward_clipping=False,
            autoreset_mode=AutoresetMode.SAME_STEP,
        )
        minimal = self._env.ale.get_action_set()
        if config.actions and max(config.actions) >= len(minimal):
            named = ", ".join(f"{i}: {action.name}" for i, action in enumerate(minimal))
            raise InputError(f"actions={config.actions}: {config.game} has {named}")
        self._action_ids = np.array(config.actions or range(len(minimal)), dtype=np.int64)
        self.action_names = [minimal[i].name for i in self._action_ids]
        longest = -(-config.max_frames_per_episode // config.frame_skip)
        self._log = np.zeros((count, RESEED_AFTER + longest + 1), dtype=np.uint8)
        self._log_length = np.zeros(count, dtype=np.int64)  # steps since the environment was seeded
        self._seedings = np.zeros(count, dtype=np.int64)
        self._last_frames: np.ndarray | None = None
        self._in_flight = False

    def reset(self) -> np.ndarray:
        """Seed every environment anew and return the first frames, u8 [n, rows, columns]."""
        return self._seed_and_reset(np.arange(self.count))

    def send(self, actions: np.ndarray) -> None:
        """Start a step. Actions: [n] integers, positions in `action_names`. Returns at once; `recv` has the result.

        Raises:
            InputError: an action out of range; nothing has been sent.
        """
        actions = np.asarray(actions)
        if actions.shape != (self.count,) or actions.min() < 0 or actions.max() >= len(self._action_ids):
            allowed = ", ".join(f"{i}: {name}" for i, name in enumerate(self.action_names))
            raise InputError(f"actions must be [{self.count}] of {allowed}; got {actions.tolist()}")
        self._log[np.arange(self.count), self._log_length] = actions
        self._log_length += 1
        self._in_flight = True
        self._env.send(self._action_ids[actions])

    def recv(self) -> Frames:
        """Wait for the step that `send` started."""
        observed, rewards, terminated, truncated, info = self._env.recv()
        self._in_flight = False
        frames = observed[:, 0, self._rows]
        ended = np.flatnonzero(terminated | truncated)
        finals = {int(i): info["final_obs"][i, 0, self._rows].copy() for i in ended}
        old = ended[self._log_length[ended] >= RESEED_AFTER]
        if old.size:
            frames = self._seed_and_reset(old)
        self._last_frames = frames
        return Frames(frames, rewards.astype(np.float32), terminated, truncated & ~terminated, finals)

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as `rlhf.run.save_state` can save it. Between steps, not while one is in flight."""
        assert not self._in_flight
        assert self._last_frames is not None
        logs = [torch.from_numpy(self._log[i, : self._log_length[i]].copy()) for i in range(self.count)]
        last = torch.from_numpy(self._last_frames.copy())
        return {"seedings": self._seedings.tolist(), "actions": logs, "last_frames": last}

    def restore(self, state: dict[str, Any]) -> None:
        """Put the emulators where they were, by playing the actions since each one's seed again.

        Raises:
            CheckpointError: the emulator did not arrive where it was: another version of it, or of the game.
        """
        logs = [log.numpy() for log in state["actions"]]
        longest = max(len(log) for log in logs)
        self._env.reset(seed=0)
        late = [longest - len(log) for log in logs]  # all end together, so short ones start late
        frames = None
        self._seedings = np.array(state["seedings"]) - 1  # _seed_and_reset counts them up again
        for step in range(longest + 1):
            starting = np.flatnonzero(np.array(late) == step)
            if starting.size:
                frames = self._seed_and_reset(starting)
            if step < longest:
                actions = [log[step - start] if step >= start else 0 for log, start in zip(logs, late, strict=True)]
                frames = self._env.step(self._action_ids[np.array(actions)])[0][:, 0, self._rows]
        assert frames is not None
        if not np.array_equal(frames, state["last_frames"].numpy()):
            raise CheckpointError(
                "the emulator did not arrive at the saved frame: resume with the ale-py version that wrote the "
                "checkpoint, or start a new run"
            )
        for i, log in enumerate(logs):
            self._log[i, : len(log)] = log
            self._log_length[i] = len(log)
        self._last_frames = frames

    def close(self) -> None:
        if self._in_flight:
            self._env.recv()
            self._in_flight = False
        self._env.close()

    def _seed_and_reset(self, which: np.ndarray) -> np.ndarray:
        """Give these environments their next seeds; frames of all."""
        self._seedings[which] += 1
        self._log_length[which] = 0
        seeds = [
            np.random.SeedSequence((*self._seed, int(i), int(self._seedings[i]))).generate_state(1)[0] >> 1
            for i in which
        ]
        mask = np.zeros(self.count, dtype=bool)
        mask[which] = True
        options = None if len(which) == self.count else {"reset_mask": mask}
        observed, _ = self._env.reset(seed=np.array(seeds, dtype=np.int64), options=options)
        self._last_frames = observed[:, 0, self._rows]
        return self._last_frames
