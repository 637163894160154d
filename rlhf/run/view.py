"""What a person at the terminal sees of a run: progress, time left, the metrics that matter and where they go."""

import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlhf.checks import InputError, check_range
from rlhf.run.metrics import plain_value

_BLOCKS = "▁▂▃▄▅▆▇█"
_TREND_LENGTH = 32
_PLAIN_INTERVAL = 10.0  # seconds between lines where nothing can be redrawn
RESUME_HINT = "; once a run has a checkpoint, the same command with --resume goes on from the last one"
_clock = time.monotonic


class LiveView:
    """A progress bar with the latest metrics beneath it, redrawn in place; a context manager.

    Where stdout is no terminal (a log file) it prints one line at the first step, about every 10 seconds, and at the
    last step instead.
    """

    def __init__(
        self,
        title: str,
        total_steps: int,
        columns: Sequence[str] = (),
        start_step: int = 0,
        enabled: bool = True,
    ) -> None:
        """Prepare the view; nothing is printed before `with`.

        Args:
            title: the run's name.
            total_steps: the step that ends the run, >= 1.
            columns: which of the metrics to show, by key, from top to bottom.
            start_step: the step a resumed run goes on from; time left is reckoned from there.
            enabled: False prints nothing: for all processes but the main one.
        """
        check_range("total_steps", total_steps, low=1)
        check_range("start_step", start_step, low=0)
        self._title = title
        self._total = total_steps
        self._start_step = self._step = start_step
        self._latest: dict[str, Any] = dict.fromkeys(columns)
        self._trends: dict[str, deque[float]] = {key: deque(maxlen=_TREND_LENGTH) for key in columns}
        self._enabled = enabled
        self._live: Live | None = None
        self._started = self._updated = _clock()
        self._next_line = -math.inf
        self._unprinted = False

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show that `step` is done. Keys not in `columns` are left out; a key missing or None keeps its last value.

        Values are numbers, tensors of one element, or text.
        """
        self._step, self._updated = step, _clock()
        for key, trend in self._trends.items():
            value = plain_value(metrics.get(key))
            if value is not None:
                self._latest[key] = value
            if isinstance(value, int | float) and math.isfinite(value):
                trend.append(float(value))
        self._unprinted = True
        if self._enabled and self._live is None and (self._updated >= self._next_line or step >= self._total):
            self._print_line()

    def say(self, message: str) -> None:
        """Print a message above the live display; as it is, without markup."""
        if self._live is not None:
            self._live.console.print(message, markup=False, highlight=False, soft_wrap=True)
        elif self._enabled:
            print(message, flush=True)

    def __enter__(self) -> "LiveView":
        self._started = self._updated = _clock()
        console = Console()
        if self._enabled and sys.stdout.isatty() and not console.is_dumb_terminal:
            self._live = Live(get_renderable=self._picture, console=console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._enabled and self._unprinted:
            self._print_line()

    def _seconds_left(self) -> float | None:
        """Left at the mean pace since the start; None before the first step."""
        done = self._step - self._start_step
        if done <= 0:
            return None
        seconds_per_step = (self._updated - self._started) / done
        return max(0.0, seconds_per_step * (self._total - self._step) - (_clock() - self._updated))

    def _status(self) -> list[str]:
        """What stands beside the bar: step of total, share, elapsed, left."""
        share = self._step / self._total
        return [
            f"{self._step:,}/{self._total:,}",
            f"{share:.0%}",
            f"elapsed {_duration(_clock() - self._started)}",
            f"left {_duration(self._seconds_left())}",
        ]

    def _print_line(self) -> None:
        metrics = [f"{key} {_number(value)}" for key, value in self._latest.items() if value is not None]
        print("  ".join([self._title, *self._status(), *metrics]), flush=True)
        self._next_line = _clock() + _PLAIN_INTERVAL
        self._unprinted = False

    def _picture(self) -> Group:
        bar = Table.grid(padding=(0, 2))
        head = Text(self._title, style="bold")
        bar.add_row(head, ProgressBar(self._total, self._step, width=30), *(Text(part) for part in self._status()))
        table = Table.grid(padding=(0, 2))
        table.add_column(min_width=len(self._title))
        table.add_column(justify="right", min_width=9)
        for key, trend in self._trends.items():
            table.add_row(
                Text(key, style="dim"),
                Text(_number(self._latest[key]), style="bold"),
                Text(_sparkline(trend), style="cyan"),
            )
        return Group(bar, table)


@contextmanager
def reporting_errors(*, hint: str = RESUME_HINT) -> Iterator[None]:
    """End the program on an InputError (the run folder's errors are some) with one red line and exit code 2.

    Ctrl-C ends it with exit code 130 and says how to go on, `hint`. All other exceptions pass untouched, with their
    traceback.
    """
    try:
        yield
    except InputError as error:
        Console(stderr=True).print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        Console(stderr=True).print(f"stopped{hint}")
        raise SystemExit(130) from None


def _duration(seconds: float | None) -> str:
    """h:mm:ss."""
    if seconds is None:
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _number(value: Any) -> str:
    """Four digits that count; whole thousands with commas."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if math.isfinite(value) and 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _sparkline(values: Sequence[float] | deque[float]) -> str:
    """One block per value, between the lowest and the highest of them; a level line if all are equal."""
    if not values:
        return ""
    low, high = min(values), max(values)
    if low == high:
        return _BLOCKS[0] * len(values)
    return "".join(_BLOCKS[round((value - low) / (high - low) * (len(_BLOCKS) - 1))] for value in values)
