"""The emulator behind `AtariEnvs`: its traps, and that it is exact to resume. Real ALE frames throughout."""

from dataclasses import replace

import numpy as np
import psutil
import pytest

from pong import env as env_module
from pong.config import GameConfig, preset
from pong.env import AtariEnvs, games
from rlhf.checks import InputError
from rlhf.run import CheckpointError, load_state, save_state

FAST = preset("fast").game
V5 = preset("v5").game


def make(game: GameConfig = FAST, *, seed: int = 3, count: int = 2) -> AtariEnvs:
    return AtariEnvs(game, seed=(seed,), count=count, threads=2)


def play(envs: AtariEnvs, steps: int, *, seed: int = 0) -> list[np.ndarray]:
    """Random actions; the frames."""
    rng = np.random.default_rng(seed)
    seen = []
    for _ in range(steps):
        envs.send(rng.integers(0, len(envs.action_names), envs.count))
        seen.append(envs.recv().frames.copy())
    return seen


def test_the_fast_preset_has_three_actions_and_the_field_only() -> None:
    envs = make()
    assert envs.action_names == ["NOOP", "RIGHT", "LEFT"]
    assert envs.reset().shape == (2, 80, 80)
    assert envs.reset().dtype == np.uint8


def test_v5_is_the_standard_protocol() -> None:
    assert (V5.repeat_action_probability, V5.frame_skip, V5.stack) == (0.25, 4, 4)
    envs = make(V5)
    assert envs.action_names == ["NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE"]
    assert envs.reset().shape == (2, 84, 84)


def test_the_cropped_frame_shows_what_moves_and_not_the_score() -> None:
    """The score board is above the crop: after a point it changes, the crop's background does not."""
    whole = make(replace(FAST, crop_top=0, crop_bottom=None))
    whole.reset()
    frames = np.stack(play(whole, 400))
    changes = (frames.max(0) != frames.min(0)).any(0)  # [rows, columns]
    board, field = changes[: FAST.crop_top].any(), changes[FAST.rows].any()
    assert board
    assert field
    moving = np.flatnonzero(changes.any(1))
    assert moving[moving >= FAST.crop_top].max() < FAST.crop_bottom  # nothing below the crop moves


def test_sticky_actions_differ_from_none() -> None:
    """The same seeds and actions, with and without: else v5 would not be v5."""
    plain, sticky = make(replace(V5, repeat_action_probability=0.0)), make(V5)
    plain.reset()
    sticky.reset()
    assert not all(np.array_equal(a, b) for a, b in zip(play(plain, 60), play(sticky, 60), strict=True))


@pytest.mark.parametrize("actions", [[0, 3], [0, -1], [0], [[0, 0]], [0.0, 1.0]])
def test_an_action_out_of_range_is_refused_before_the_emulator_waits_for_ever(actions: list[float]) -> None:
    envs = make()
    envs.reset()
    with pytest.raises(InputError, match=r"0: NOOP, 1: RIGHT, 2: LEFT"):
        envs.send(np.array(actions))
    assert len(play(envs, 1)) == 1  # still alive


def test_games_that_the_emulator_cannot_load_are_not_offered() -> None:
    """It ends the process over these."""
    assert {"pong", "breakout", "ms_pacman"} <= set(games())
    assert not {"combat", "joust", "maze_craze", "warlords"} & set(games())


def test_an_unknown_game_and_an_unknown_action_are_refused() -> None:
    with pytest.raises(InputError, match="breakout"):
        make(GameConfig(game="breakot"))
    with pytest.raises(InputError, match="5: LEFTFIRE"):
        make(GameConfig(actions=(0, 6)))


def test_a_time_limit_truncates_and_shows_the_final_frame_of_that_environment_only() -> None:
    envs = make(replace(FAST, max_frames_per_episode=40, noop_max=0))
    first = envs.reset().copy()
    for step in range(1, 11):
        envs.send(np.zeros(2, dtype=int))
        result = envs.recv()
        assert not result.terminated.any()
        assert result.truncated.all() == (step == 10)
        assert set(result.final_frames) == ({0, 1} if step == 10 else set())
    np.testing.assert_array_equal(result.frames, first)  # the next episode's first
    unlimited = make(replace(FAST, noop_max=0))
    unlimited.reset()
    for _ in range(10):
        unlimited.send(np.zeros(2, dtype=int))
        true = unlimited.recv().frames
    for i in range(2):
        np.testing.assert_array_equal(result.final_frames[i], true[i])
        assert not np.array_equal(result.final_frames[i], result.frames[i])


def test_a_game_that_ends_is_terminated() -> None:
    """Pong is lost 0:21 by standing still, well before the time limit."""
    envs = make(count=1)
    envs.reset()
    score = 0.0
    for _ in range(2000):
        envs.send(np.zeros(1, dtype=int))
        result = envs.recv()
        score += float(result.rewards[0])
        if result.terminated[0]:
            break
    assert score == -21
    assert not result.truncated[0]
    assert not result.final_frames


@pytest.mark.parametrize("game", [FAST, V5], ids=["fast", "v5"])
def test_the_same_seed_gives_the_same_games_and_another_seed_others(game: GameConfig) -> None:
    runs = []
    for seed in (3, 3, 4):
        envs = make(game, seed=seed)
        runs.append(np.stack([envs.reset().copy(), *play(envs, 40)]))
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


@pytest.mark.parametrize("game", [FAST, V5], ids=["fast", "v5"])
def test_restored_environments_go_on_exactly(game: GameConfig, tmp_path, monkeypatch) -> None:
    """Across episodes, new seeds between them (every 30 steps here), and sticky actions' own randomness."""
    monkeypatch.setattr(env_module, "RESEED_AFTER", 30)
    game = replace(game, max_frames_per_episode=4 * 23)
    one = make(game, count=3)
    one.reset()
    play(one, 100)
    save_state(tmp_path, one.state())
    expected = play(one, 60, seed=1)

    other = make(game, count=3)
    other.restore(load_state(tmp_path))
    for a, b in zip(play(other, 60, seed=1), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_restored_environments_may_have_been_seeded_at_different_times(monkeypatch) -> None:
    """Those whose turn comes late play on until then, perhaps beyond a new seed that is none of the saved ones."""
    monkeypatch.setattr(env_module, "RESEED_AFTER", 30)
    game = replace(FAST, max_frames_per_episode=4 * 23)
    one, other = make(game, count=3), make(game, count=3)
    one.reset()
    one._episode_steps[0] = 10  # its episodes end 10 steps before the others'
    play(one, 40)
    assert [len(log) for log in one.state()["actions"]] == [4, 40, 40]
    other.reset()
    play(other, 20)
    other.restore(one.state())
    for a, b in zip(play(other, 60, seed=1), play(one, 60, seed=1), strict=True):
        np.testing.assert_array_equal(a, b)


def test_environments_are_seeded_apart_and_what_is_replayed_stays_short(monkeypatch) -> None:
    monkeypatch.setattr(env_module, "RESEED_AFTER", 30)
    envs = make(replace(FAST, max_frames_per_episode=4 * 23), count=3)
    envs.reset()
    play(envs, 100)
    assert max(len(log) for log in envs.state()["actions"]) <= 30 + 23


def test_environments_play_different_games() -> None:
    envs = make(count=4)
    envs.reset()
    games = []
    for _ in range(100):
        envs.send(np.zeros(4, dtype=int))
        games.append(envs.recv().frames.copy())
    of_each = np.stack(games, axis=1)
    assert len({of_each[i].tobytes() for i in range(4)}) > 1


def test_an_emulator_that_arrives_elsewhere_is_reported() -> None:
    envs = make()
    envs.reset()
    play(envs, 20)
    state = envs.state()
    state["last_frames"] = state["last_frames"] + 1
    with pytest.raises(CheckpointError, match="ale-py version"):
        make().restore(state)


def test_closing_with_a_step_in_flight_returns() -> None:
    envs = make()
    envs.reset()
    envs.send(np.zeros(2, dtype=int))
    envs.close()


def test_closing_ends_the_emulators_threads() -> None:
    before = psutil.Process().num_threads()
    envs = make()
    envs.reset()
    assert psutil.Process().num_threads() > before
    envs.close()
    assert psutil.Process().num_threads() == before


def test_another_seed_plays_other_games_than_the_first(monkeypatch) -> None:
    """A new seed after some steps must not repeat the same noops for ever."""
    monkeypatch.setattr(env_module, "RESEED_AFTER", 1)
    envs = make(replace(FAST, max_frames_per_episode=400), count=1)
    games_played = set()
    envs.reset()
    for _ in range(6):
        frames = []
        for _ in range(100):
            envs.send(np.zeros(1, dtype=int))
            frames.append(envs.recv().frames.tobytes())
        games_played.add(tuple(frames))
    assert len(games_played) > 1
