"""Atari games: ale-py's C++ vector environment, made exact to resume and safe to drive.

What this module takes care of, so that nothing else needs to know of it:

- an episode's end is told apart: `terminated` by the game or `truncated` by the frame limit, with the final frame. The
  limit is counted here: the emulator's own stops before it draws that frame, so that its `final_obs` shows an older one
  (and uninitialised memory for environments that did not end);
- an action the emulator does not have would make it wait for ever, and is refused before it is sent;
- an emulator's state cannot be saved, but it is a function of the seed it was reset with and the actions since: both
  are kept, and restoring plays them again. `RESEED_AFTER` bounds how many.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from ale_py import ALEInterface, roms
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode

from pong.config import GameConfig
from rlhf.checks import InputError, check_choice
from rlhf.run import CheckpointError

RESEED_AFTER = 25_000
"""Steps after which an environment gets a new seed when its episode ends: with that episode, all that a resumed run
plays again."""

_NO_LIMIT = 2**31 - 1


class Frames(NamedTuple):
    """What n environments answered to one action each."""

    frames: np.ndarray  # u8 [n, rows, columns]: the next observation; of the new episode where one ended
    rewards: np.ndarray  # f32 [n], as the game gives them
    terminated: np.ndarray  # bool [n]: the game ended the episode
    truncated: np.ndarray  # bool [n]: the frame limit cut it off
    final_frames: dict[int, np.ndarray]  # by environment that was truncated: the episode's last frame, u8


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
        check_choice("game", config.game, games())
        self.count = count
        self._limit = -(-config.max_frames_per_episode // config.frame_skip)
        self._rows = slice(None) if colour else config.rows
        self._seed = tuple(seed)
        self._env = AtariVectorEnv(
            config.game,
            count,
            num_threads=min(threads, count),
            max_num_frames_per_episode=_NO_LIMIT,
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
        self._log = np.zeros((count, RESEED_AFTER + self._limit), dtype=np.uint8)
        self._log_length = np.zeros(count, dtype=np.int64)  # steps since the environment was seeded
        self._seedings = np.zeros(count, dtype=np.int64)
        self._episode_steps = np.zeros(count, dtype=np.int64)
        self._last_frames: np.ndarray | None = None
        self._in_flight = False

    def reset(self) -> np.ndarray:
        """Seed every environment anew and return the first frames, u8 [n, rows, columns]."""
        return self._seed_and_reset(np.ones(self.count, dtype=bool))

    def send(self, actions: np.ndarray) -> None:
        """Start a step. Actions: [n] integers, positions in `action_names`. Returns at once; `recv` has the result.

        Raises:
            InputError: an action out of range; nothing has been sent.
        """
        assert self._last_frames is not None, "reset first"
        assert not self._in_flight, "recv first"
        actions = np.asarray(actions)
        is_valid = actions.shape == (self.count,) and np.issubdtype(actions.dtype, np.integer)
        if not is_valid or actions.min() < 0 or actions.max() >= len(self._action_ids):
            allowed = ", ".join(f"{i}: {name}" for i, name in enumerate(self.action_names))
            raise InputError(f"actions must be [{self.count}] of {allowed}; got {actions.tolist()}")
        self._env.send(self._action_ids[actions])
        self._in_flight = True
        self._log[np.arange(self.count), self._log_length] = actions
        self._log_length += 1

    def recv(self) -> Frames:
        """Wait for the step that `send` started."""
        observed, rewards, terminated, _, _ = self._env.recv()
        self._in_flight = False
        self._episode_steps += 1
        frames = observed[:, 0, self._rows]
        truncated = (self._episode_steps >= self._limit) & ~terminated
        finals = {int(i): frames[i].copy() for i in np.flatnonzero(truncated)}
        ended = terminated | truncated
        self._episode_steps[ended] = 0
        to_seed = ended & (self._log_length >= RESEED_AFTER)
        if (truncated & ~to_seed).any():
            frames = self._reset(truncated & ~to_seed, seeds=None)
        if to_seed.any():
            frames = self._seed_and_reset(to_seed)
        self._last_frames = frames
        return Frames(frames, rewards.astype(np.float32), terminated, truncated, finals)

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
        starts = np.array([longest - len(log) for log in logs])  # all end together, so short ones start late
        self._last_frames = self._env.reset(seed=0)[0][:, 0, self._rows]
        seedings = np.array(state["seedings"])
        for step in range(longest + 1):
            due = starts == step
            if due.any():
                # Only now: what is played until its turn comes may last long enough for a new seed of its own.
                self._seedings[due] = seedings[due] - 1  # counted up again
                self._seed_and_reset(due)
            if step < longest:
                self.send(np.array([log[step - at] if step >= at else 0 for log, at in zip(logs, starts, strict=True)]))
                self.recv()
        if not np.array_equal(self._last_frames, state["last_frames"].numpy()):
            raise CheckpointError(
                "the emulator did not arrive at the saved frame: resume with the ale-py version that wrote the "
                "checkpoint, or start a new run"
            )

    def close(self) -> None:
        """Stop the emulators and their threads; nothing but this may be called again."""
        if self._in_flight:
            self._env.recv()
            self._in_flight = False
        del self._env.ale  # its threads end with it

    def _seed_and_reset(self, which: np.ndarray) -> np.ndarray:
        """Give these environments (bool [n]) their next seeds; frames of all."""
        self._seedings[which] += 1
        self._log_length[which] = 0
        keys = [(*self._seed, int(i), int(self._seedings[i])) for i in np.flatnonzero(which)]
        seeds = [int(np.random.SeedSequence(key).generate_state(1)[0]) >> 1 for key in keys]
        return self._reset(which, seeds=np.array(seeds, dtype=np.int64))

    def _reset(self, which: np.ndarray, *, seeds: np.ndarray | None) -> np.ndarray:
        """Start new episodes in these environments, on with their own randomness if there are no seeds; all frames."""
        self._episode_steps[which] = 0
        options = None if which.all() else {"reset_mask": which}
        self._last_frames = self._env.reset(seed=seeds, options=options)[0][:, 0, self._rows]
        return self._last_frames


def games() -> list[str]:
    """The games that the emulator can play, by ROM name."""
    paths = {name: roms.get_rom_path(name) for name in roms.get_all_rom_ids()}
    return sorted(name for name, path in paths.items() if path is not None and ALEInterface.isSupportedROM(path))
