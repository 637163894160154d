"""The whole program on real ALE frames: a few thousand steps, killed and resumed, scored and filmed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from pong.config import AlgorithmConfig, PongConfig, preset
from pong.learning import Targets, estimate
from pong.play import Shot, load_policy, show
from pong.rollout import Rollout
from pong.train_pg import defaults as pg_defaults
from pong.train_pg import parse as parse_pg
from pong.train_ppo import parse
from pong.trainer import PongTrainer
from rlhf.checks import InputError
from rlhf.run import generator_for, load_state, read_json_lines, without_timings

ROOT = Path(__file__).parent.parent


def small(run_dir: Path, *, total_steps: int = 1536, **run) -> PongConfig:
    """Six rollouts of 256 steps, in episodes of at most 50 steps."""
    config = preset("fast")
    return replace(
        config,
        game=replace(config.game, max_frames_per_episode=200),
        optimization=replace(
            config.optimization, total_steps=total_steps, envs=4, rollout_steps=64, minibatch_size=128, epochs=2
        ),
        run=replace(config.run, run_dir=run_dir, eval_episodes=0, checkpoint_every=2, threads=1, **run),
    )


def run(*args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", *map(str, args)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, env=env)


def test_the_program_trains_evaluates_and_is_watched(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run("pong.train_ppo", "--total-steps", 4096, "--eval-episodes", 2, "--run-dir", folder)
    assert done.returncode == 0, done.stderr
    assert "2 fresh episodes" in done.stdout
    assert f"python -m pong.play {folder}" in done.stdout
    rows = read_json_lines(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2048, 4096]
    assert all(0 < row["policy/entropy"] < 1.1 for row in rows)
    assert (folder / "plots" / "metrics.png").stat().st_size > 10_000
    assert len(json.loads((folder / "evaluation.json").read_text())["scores"]) == 2

    watched = run("pong.play", folder, "--episodes", 2, "--film-steps", 20)
    assert watched.returncode == 0, watched.stderr
    film = Image.open(folder / "play.gif")
    assert film.n_frames == 20  # type: ignore[attr-defined]
    assert film.size[0] == 320


def test_a_killed_run_continues_exactly(tmp_path: Path) -> None:
    """Killed in the middle of the program, with checkpoints behind it: the same files as never killed."""
    options = [
        *("--total-steps", 6144, "--envs", 4, "--rollout-steps", 64, "--minibatch-size", 128, "--epochs", 1),
        *("--max-frames-per-episode", 240, "--checkpoint-every", 2, "--eval-episodes", 0, "--threads", 1),
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run("pong.train_ppo", "--run-dir", whole, *options).returncode == 0
    words = [sys.executable, "-m", "pong.train_ppo", "--run-dir", str(killed), *map(str, options)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None and len(list((killed / "checkpoints").glob("step-??????"))) < 2:
            time.sleep(0.01)  # until there is something to resume from
        os.kill(process.pid, signal.SIGKILL)
    assert not (killed / "final").exists()
    resumed = run("pong.train_ppo", "--run-dir", killed, *options, "--resume")
    assert resumed.returncode == 0, resumed.stderr

    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = [without_timings(read_json_lines(folder / name)) for folder in (whole, killed)]
        assert rows[0] == rows[1]
        assert len(rows[0]) > 10
    weights = [load_state(folder / "final")["network"] for folder in (whole, killed)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        PongTrainer(small(tmp_path / name, total_steps=512, seed=seed)).train()
        found.append(without_timings(read_json_lines(tmp_path / name / "metrics.jsonl")))
    assert found[0] == found[1] != found[2]


def test_the_learning_rate_falls_by_the_same_factor_where_told(tmp_path: Path) -> None:
    config = small(tmp_path, total_steps=1024)
    PongTrainer(replace(config, optimization=replace(config.optimization, lr_schedule="geometric"))).train()
    rows = read_json_lines(tmp_path / "metrics.jsonl")
    assert [row["lr"] for row in rows] == pytest.approx([1e-3 * 0.02 ** (k / 4) for k in range(4)])


def test_schedules_follow_the_run_and_every_rollout_draws_its_own(tmp_path: Path, monkeypatch) -> None:
    drawn: list[tuple[object, ...]] = []
    flags: list[bool] = []
    gammas: list[float] = []

    def recording_generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
        drawn.append((purpose, *indices))
        return generator_for(seed, purpose, *indices)  # type: ignore[arg-type]

    def recording_estimate(
        rollout: Rollout, algorithm: AlgorithmConfig, *, reward_ends_credit: bool, gamma: float
    ) -> Targets:
        flags.append(reward_ends_credit)
        gammas.append(gamma)
        return estimate(rollout, algorithm, reward_ends_credit=reward_ends_credit, gamma=gamma)

    monkeypatch.setattr("pong.trainer.generator_for", recording_generator)
    monkeypatch.setattr("pong.trainer.estimate", recording_estimate)
    PongTrainer(small(tmp_path, total_steps=1024)).train()
    rows = read_json_lines(tmp_path / "metrics.jsonl")
    assert [row["lr"] for row in rows] == pytest.approx([1e-3 + k / 4 * (2e-5 - 1e-3) for k in range(4)])
    entropy = preset("fast").algorithm
    start, end = entropy.entropy_coef, entropy.final_entropy_coef
    assert [row["entropy_coef"] for row in rows] == pytest.approx([start + k / 4 * (end - start) for k in range(4)])
    assert len(drawn) == len(set(drawn)) == 1 + 2 * 4  # the background; actions and minibatches of each rollout
    assert flags == [True] * 4
    assert gammas == [row["gamma"] for row in rows] == pytest.approx([0.97 + k / 4 * 0.02 for k in range(4)])


def test_resuming_with_other_options_is_refused(tmp_path: Path) -> None:
    config = small(tmp_path, total_steps=256)
    PongTrainer(config).train()
    with pytest.raises(InputError, match=r"clip was 0\.2, is now 0\.1"):
        PongTrainer(
            replace(config, algorithm=replace(config.algorithm, clip=0.1), run=replace(config.run, resume=True))
        )
    with pytest.raises(InputError, match="already holds a run"):
        PongTrainer(config)


def test_a_run_can_be_played_before_its_end(tmp_path: Path) -> None:
    trainer = PongTrainer(small(tmp_path))
    trainer.train_step()
    trainer.save_checkpoint()
    config, network = load_policy(tmp_path)
    assert config == trainer.config
    for name, tensor in trainer.network.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor)
    trainer.collector.close()


def test_without_a_screen_there_is_no_window(tmp_path: Path) -> None:
    """Whatever matplotlib is told to use."""
    trainer = PongTrainer(small(tmp_path))
    trainer.collector.close()
    env = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    for backend in ("TkAgg", "svg"):
        watched = run(
            "pong.play", tmp_path, "--episodes", 0, "--render-mode", "human", env=env | {"MPLBACKEND": backend}
        )
        assert watched.returncode == 2
        assert "there is no screen here" in watched.stderr


def test_closing_the_window_ends_the_game(monkeypatch: pytest.MonkeyPatch) -> None:
    plt.switch_backend("agg")
    shown = []

    def pause(seconds: float) -> None:
        shown.append(plt.gcf().axes[0].images[0].get_array()[0, 0].tolist())
        if len(shown) == 3:
            plt.close()

    monkeypatch.setattr(plt, "pause", pause)
    shots = (Shot(np.full((210, 160, 3), brightness, dtype=np.uint8), 0.5, 0.0) for brightness in range(10))
    show(shots, seconds=0.0)
    assert shown == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    assert next(shots).screen[0, 0, 0] == 3


def test_the_policy_gradient_program_runs(tmp_path: Path) -> None:
    """A few hundred steps of each of its forms."""
    for advantage, baseline in (("mc", False), ("episode", False), ("mc", True)):
        config = small(tmp_path / f"{advantage}{baseline}", total_steps=512)
        algorithm = replace(pg_defaults().algorithm, advantage=advantage, baseline=baseline)
        config = replace(config, algorithm=algorithm, optimization=replace(config.optimization, epochs=None))
        PongTrainer(config).train()
        rows = read_json_lines(tmp_path / f"{advantage}{baseline}" / "metrics.jsonl")
        assert ("critic/loss" in rows[-1]) == baseline


def test_presets_and_single_options_from_the_command_line() -> None:
    assert parse([], None).game == preset("fast").game
    v5 = parse(["--preset", "v5", "--gamma", "0.9", "--game", "breakout"], None)
    assert (v5.game.game, v5.game.repeat_action_probability, v5.algorithm.gamma) == ("breakout", 0.25, 0.9)
    assert v5.run.run_dir == Path("runs/breakout_ppo")
    assert parse(["--preset=v5"], None).game.frame_shape == (84, 84)


def test_the_policy_gradient_plays_other_games_by_their_own_options() -> None:
    breakout, pong = parse_pg(["--game", "breakout", "--gamma", "0.9"], None), parse_pg([], None)
    assert pong.game == preset("fast").game
    assert breakout.game == preset("fast", "breakout").game
    assert (breakout.algorithm.loss, breakout.algorithm.gamma) == ("reinforce", 0.9)
    assert breakout.run.run_dir == Path("runs/breakout_pg")


def test_a_device_that_computes_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no numbers"):
        PongTrainer(small(tmp_path / "run", device="meta"))


def test_the_cuda_device_is_refused_with_advice_where_there_is_none(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(InputError, match="try auto or cpu"):
        PongTrainer(small(tmp_path / "run", device="cuda"))
    assert not (tmp_path / "run").exists()
