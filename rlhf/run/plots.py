"""Pictures of a run's metrics: a grid of line plots over the step."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlhf.run.atomic import written_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito 2008, less yellow (too pale on white): told apart by colour-blind readers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_INK, _FAINT = "#222222", "#D9D9D9"
_PANEL_SIZE = (4.4, 3.0)  # inches
_FEW_POINTS = 25  # so few are marked: a line alone hides where the points are, and a single one entirely
_MANY_POINTS = 100  # from so many on, a running mean over about 4 % of them is drawn over the faint points
_NOTE = "faint: every row; bold: running mean over about 4 % of the rows, centred"

Points = tuple[list[float], list[float]]


class Panel(NamedTuple):
    """One plot of the grid.

    title: what it shows; keys: (metric key, label) per line; ylim: (low, high) in the metric's unit, or None to fit.
    """

    title: str
    keys: tuple[tuple[str, str], ...]
    ylim: tuple[float, float] | None = None


def plot_metrics(rows: Sequence[Mapping[str, Any]], path: Path | str, panels: Sequence[Panel], title: str) -> None:
    """Draw the panels for which there is something to draw, at most three to a row, in one picture.

    Args:
        rows: what `read_json_lines` returns; rows without "step" are skipped, and values that are None or not finite.
        path: the picture; its suffix says the format (.png, .svg, .pdf). Replaced as a whole, its folder made. Not
            written if no panel has a value.
        panels: in reading order.
        title: above all.
    """
    from matplotlib.figure import Figure  # slow to load, and only plots need it

    lines = [{label: _points(rows, key) for key, label in panel.keys} for panel in panels]
    drawn = [(panel, data) for panel, data in zip(panels, lines, strict=True) if any(x for x, _ in data.values())]
    if not drawn:
        return
    columns = 2 if len(drawn) == 4 else min(len(drawn), 3)
    height = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(_PANEL_SIZE[0] * columns, _PANEL_SIZE[1] * height + 0.5))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    figure.suptitle(title, fontsize=14, fontweight="bold", color=_INK)

    counts = [len(x) for _, data in drawn for x, _ in data.values()]
    last_step = max(max(x) for _, data in drawn for x, _ in data.values() if x)
    for position, (panel, data) in enumerate(drawn, start=1):
        axes = figure.add_subplot(height, columns, position)
        _draw(axes, panel, data)
        axes.set_xlim(0, max(last_step, 1) * 1.02)
    figure.align_ylabels()
    if max(counts) >= _MANY_POINTS:
        figure.supxlabel(_NOTE, fontsize=8, color=_INK)
    _save(figure, Path(path))


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> Points:
    """Steps and values of the rows that have a number under `key`."""
    steps, values = [], []
    for row in rows:
        value = row.get(key)
        if row.get("step") is not None and isinstance(value, int | float) and math.isfinite(value):
            steps.append(float(row["step"]))
            values.append(float(value))
    return steps, values


def _draw(axes: "Axes", panel: Panel, data: Mapping[str, Points]) -> None:
    for index, (label, points) in enumerate(data.items()):
        if points[0]:
            _draw_line(axes, points, label, _COLOURS[index % len(_COLOURS)])
    if panel.ylim is not None:
        axes.set_ylim(*panel.ylim)
    if len(panel.keys) > 1:
        axes.legend(fontsize=9, frameon=False, labelcolor=_INK)
    else:
        axes.set_ylabel(panel.keys[0][1], fontsize=9, color=_INK)
    axes.set_title(panel.title, fontsize=11, loc="left", color=_INK)
    axes.set_xlabel("step", fontsize=9, color=_INK)
    _style(axes)


def _draw_line(axes: "Axes", points: Points, label: str, colour: str) -> None:
    steps, values = points
    if len(steps) >= _MANY_POINTS:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
        axes.plot(steps, _running_mean(values), color=colour, label=label, linewidth=1.8)
    else:
        marker = "o" if len(steps) <= _FEW_POINTS else None
        axes.plot(steps, values, color=colour, label=label, linewidth=1.5, marker=marker, markersize=3.5)


def _running_mean(values: list[float]) -> np.ndarray:
    """The mean of each value and its neighbours, 2 % of all to either side; fewer at the ends."""
    half = max(1, len(values) // 50)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return np.asarray((sums[high] - sums[low]) / (high - low))


def _style(axes: "Axes") -> None:
    """A light grid, no box, and tick labels without powers of ten beside the axis."""
    from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

    axes.grid(color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(labelsize=9, colors=_INK, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if max(abs(limit) for limit in axes.get_ylim()) >= 10_000:
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _save(figure: "Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=150, facecolor="white")
