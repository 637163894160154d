"""Watch and score a trained agent.

python -m pong.play runs/pong_ppo                          # 100 fresh episodes, and a film of one
python -m pong.play runs/pong_ppo --render-mode human      # in a window
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw

from pong.config import PongConfig
from pong.env import AtariEnvs
from pong.evaluation import evaluate
from pong.network import ActorCritic
from pong.report import write_evaluation
from pong.rollout import Collector
from pong.trainer import build_network, cores
from rlhf.checks import InputError, check_range
from rlhf.run import LiveView, RunFolder, generator_for, latest_checkpoint, load_state, reporting_errors

_FILM_MARK = 2  # training's games are (seed, 0, ...), evaluation's (seed, 1, ...)
_SCALE = 2  # screen pixels per game pixel
_STRIP = 110  # rows of the value curve
_CURVE = 160  # steps that it shows
_GREEN, _GREY, _WHITE, _BLACK = (92, 186, 92), (120, 120, 120), (236, 236, 236), (0, 0, 0)


@dataclass(frozen=True)
class PlayConfig:
    """What to play, and what to leave."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder; its final policy is played, or the last checkpoint's if it has none yet."""
    episodes: int = 100
    """Fresh episodes to score; 0: none."""
    greedy: bool = False
    """Take the likeliest action instead of a draw."""
    seed: int = 1
    """Of games and actions."""
    render_mode: Literal["film", "human", "none"] = "film"
    """film: play.gif in the run's folder; human: a window."""
    film_steps: int = 1500
    """Agent steps shown, at most one episode."""

    def __post_init__(self) -> None:
        for name in ("episodes", "seed"):
            check_range(name, getattr(self, name), low=0)
        check_range("film_steps", self.film_steps, low=1)


class Shot(NamedTuple):
    """One agent step: the screen before it, u8 [210, 160, 3], what the critic expects, and the score so far."""

    screen: np.ndarray
    value: float
    score: float


def play(config: PlayConfig) -> None:
    """Score the policy, then show it."""
    run, network = load_policy(config.run)
    folder = RunFolder.open(config.run)
    if config.render_mode == "human":
        check_screen()
    torch.set_num_threads(1)
    if config.episodes > 0:
        with LiveView("evaluation", config.episodes, ("mean_score",)) as view:
            found = evaluate(
                network,
                run.game,
                episodes=config.episodes,
                seed=config.seed,
                threads=cores(),
                greedy=config.greedy,
                on_progress=lambda done, mean: view.update(done, {"mean_score": mean}),
            )
        write_evaluation(folder, found, "play.json")
    shots = watch(network, run, steps=config.film_steps, seed=config.seed, greedy=config.greedy)
    if config.render_mode == "film":
        path = folder.path / "play.gif"
        write_film(shots, path, milliseconds=round(1000 * run.game.frame_skip / 60))
        print(f"film in {path}")
    elif config.render_mode == "human":
        show(shots, seconds=run.game.frame_skip / 60)


def check_screen() -> None:
    """Raises InputError if there is no screen for a window."""
    import matplotlib.pyplot as plt  # what is configured counts for nothing: without a screen it falls back on files

    figure = plt.figure()
    has_window = figure.canvas.required_interactive_framework is not None
    plt.close(figure)
    if not has_window:
        raise InputError("--render-mode human: there is no screen here; leave it out for a film in the run's folder")


def load_policy(run_dir: Path) -> tuple[PongConfig, ActorCritic]:
    """The run's config and its final policy, or the last checkpoint's if it has not ended.

    Raises:
        InputError: there is no Pong run, or it has neither.
    """
    if not (run_dir / "config.json").is_file():
        raise InputError(f"{run_dir} holds no run (config.json is not there): give the folder that training printed")
    folder = RunFolder.open(run_dir)
    config = PongConfig.from_dict(folder.config())
    is_final = (folder.final / "tensors.safetensors").exists()  # written last
    path = folder.final if is_final else latest_checkpoint(folder.checkpoints)
    if path is None:
        raise InputError(f"{run_dir} has no policy yet: wait for its first checkpoint")
    state = load_state(path)
    network = build_network(config, actions=len(state["network"]["policy.bias"]))
    network.precision = getattr(torch, state["precision"])
    network.load(state["network"])
    return config, network


def watch(network: ActorCritic, run: PongConfig, *, steps: int, seed: int, greedy: bool = False) -> Iterator[Shot]:
    """One episode, or its first `steps` steps.

    A second emulator with the same seed gets the same actions and shows the screen in colour.
    """
    key = (seed, _FILM_MARK)
    agent = AtariEnvs(run.game, seed=key, count=1, threads=1)
    camera = AtariEnvs(run.game, seed=key, count=1, threads=1, colour=True)
    collector = Collector([agent], network, steps=1, stack=run.game.stack)
    collector.reset()
    screen = camera.reset()[0]
    score = 0.0
    for step in range(steps):
        rollout = collector.collect(None if greedy else generator_for(seed, "evaluation", step))
        yield Shot(screen, float(rollout.values), score)
        camera.send(rollout.actions[:, 0].numpy())
        seen = camera.recv()
        screen, score = seen.frames[0], score + float(seen.rewards[0])
        if rollout.episodes:
            break
    collector.close()
    camera.close()


def draw(shot: Shot, values: list[float]) -> Image.Image:
    """The screen, and below it the last of the critic's values up to this step."""
    height, width = shot.screen.shape[0] * _SCALE, shot.screen.shape[1] * _SCALE
    picture = Image.new("RGB", (width, height + _STRIP), _BLACK)
    picture.paste(Image.fromarray(shot.screen).resize((width, height), Image.Resampling.NEAREST))
    pen = ImageDraw.Draw(picture)
    bound = max(1.0, max(abs(value) for value in values))
    middle, half = height + _STRIP // 2, _STRIP // 2 - 16
    pen.line([(0, middle), (width, middle)], fill=_GREY)
    shown = values[-_CURVE:]
    points = [(i * width / _CURVE, middle - half * value / bound) for i, value in enumerate(shown)]
    if len(points) > 1:
        pen.line(points, fill=_GREEN, width=2)
    pen.text((6, height + 2), f"value {shot.value:+.2f}", fill=_WHITE)
    pen.text((width - 80, height + 2), f"score {shot.score:+.0f}", fill=_WHITE)
    return picture


def write_film(shots: Iterator[Shot], path: Path, *, milliseconds: int) -> None:
    """An animated GIF."""
    values: list[float] = []
    pictures = []
    for shot in shots:
        values.append(shot.value)
        pictures.append(draw(shot, values).quantize(64))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)


def show(shots: Iterator[Shot], *, seconds: float) -> None:
    """A window, at the game's own pace or slower, until it is closed."""
    import matplotlib.pyplot as plt

    values: list[float] = []
    image = None
    for shot in shots:
        values.append(shot.value)
        picture = np.asarray(draw(shot, values))
        if image is None:
            height, width = picture.shape[:2]
            figure = plt.figure(figsize=(width / 50, height / 50))
            axes = figure.add_axes((0, 0, 1, 1))
            axes.set_axis_off()
            image = axes.imshow(picture)
        image.set_data(picture)
        plt.pause(seconds)
        if not plt.fignum_exists(figure.number):
            break


if __name__ == "__main__":
    with reporting_errors(hint=""):
        play(tyro.cli(PlayConfig, description=__doc__))
