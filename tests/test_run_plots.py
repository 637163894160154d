"""The picture is there as a whole or not at all, and shows what the rows say."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import rlhf.run.plots as plots_module
from rlhf.run import Panel, plot_metrics

ROWS: list[dict[str, Any]] = [
    {"step": 1, "reward": 0.5, "loss/policy": 1.0, "loss/value": None},
    {"step": 2, "reward": None, "loss/policy": 2.0, "loss/value": math.nan},
    {"note": "a row without a step", "reward": 9.0},
    {"step": 3, "reward": 0.75, "loss/policy": math.inf, "loss/value": 4},
    {"step": 4, "reward": "high"},
]
REWARD = Panel("Reward", (("reward", "mean score"),), (0.0, 1.0))
LOSSES = Panel("Losses", (("loss/policy", "policy"), ("loss/value", "value"), ("loss/absent", "absent")))
ABSENT = Panel("Absent", (("nothing", "none"),))


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of the figure that plot_metrics saves."""
    drawn: list[Axes] = []
    save = Figure.savefig

    def noting(figure: Figure, *args: Any, **kwargs: Any) -> None:
        drawn.extend(figure.axes)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", noting)
    return drawn


def points(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    return {
        str(line.get_label()): [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())] for line in axes.lines
    }


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_suffix_says_the_format_and_the_folder_is_made(tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / "plots" / f"training{suffix}"
    plot_metrics(ROWS, path, [REWARD, LOSSES], "run a")
    assert path.read_bytes().startswith(magic)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_panels_show_the_finite_values_of_rows_with_a_step(tmp_path: Path, axes: list[Axes]) -> None:
    plot_metrics(ROWS, tmp_path / "a.png", [REWARD, ABSENT, LOSSES], "run a")
    reward, losses = axes
    assert points(reward) == {"mean score": [(1, 0.5), (3, 0.75)]}
    assert points(losses) == {"policy": [(1, 1.0), (2, 2.0)], "value": [(3, 4.0)]}


def test_titles_labels_limits_and_legends(tmp_path: Path, axes: list[Axes]) -> None:
    plot_metrics([*ROWS, {"step": 5, "loss/value": 3.0}], tmp_path / "a.png", [REWARD, LOSSES], "run a")
    reward, losses = axes
    assert reward.get_title(loc="left") == "Reward"
    assert (reward.get_xlabel(), reward.get_ylabel()) == ("step", "mean score")
    assert reward.get_ylim() == (0.0, 1.0)
    assert reward.get_legend() is None
    legend = losses.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["policy", "value"]
    assert reward.get_xlim() == losses.get_xlim() == (0, 1.02 * 5), "panels can be compared across"
    colours = [line.get_color() for line in losses.lines]
    assert len(set(colours)) == len(colours)


def test_single_points_are_visible(tmp_path: Path, axes: list[Axes]) -> None:
    plot_metrics(ROWS[:1], tmp_path / "a.png", [REWARD], "run a")
    assert axes[0].lines[0].get_marker() == "o"


def test_many_points_are_drawn_as_they_are_and_once_more_as_their_running_mean(
    tmp_path: Path, axes: list[Axes]
) -> None:
    rows = [{"step": step, "reward": float(step % 2)} for step in range(200)]
    plot_metrics(rows, tmp_path / "a.png", [REWARD], "run a")
    raw, mean = axes[0].lines
    assert list(np.asarray(raw.get_ydata())) == [row["reward"] for row in rows]
    values = [row["reward"] for row in rows]
    expected = [sum(part) / len(part) for part in (values[max(0, i - 4) : i + 5] for i in range(200))]
    assert list(np.asarray(mean.get_ydata())) == pytest.approx(expected)


@pytest.mark.parametrize("rows", [[], [{"step": 1}], ROWS[2:3]])
def test_nothing_to_draw_writes_nothing(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    plot_metrics(rows, tmp_path / "plots" / "a.png", [REWARD, LOSSES], "run a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", range(1, 8))
def test_every_panel_has_its_place(tmp_path: Path, axes: list[Axes], count: int) -> None:
    plot_metrics(ROWS, tmp_path / "a.svg", [REWARD._replace(title=str(n)) for n in range(count)], "run a")
    assert [panel.get_title(loc="left") for panel in axes] == [str(n) for n in range(count)]
    assert len({panel.get_position().bounds for panel in axes}) == count


def test_a_failure_while_drawing_leaves_the_former_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"former")

    def failing(_: Figure, aside: Path, **__: Any) -> None:
        aside.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", failing)
    with pytest.raises(OSError, match="no space"):
        plot_metrics(ROWS, path, [REWARD], "run a")
    assert path.read_bytes() == b"former"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_colours_are_enough_for_any_number_of_lines(tmp_path: Path, axes: list[Axes]) -> None:
    keys = tuple(("reward", f"line {n}") for n in range(len(plots_module._COLOURS) + 2))
    plot_metrics(ROWS, tmp_path / "a.png", [Panel("Many", keys)], "run a")
    assert len(axes[0].lines) == len(keys)
