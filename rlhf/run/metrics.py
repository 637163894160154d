"""metrics.jsonl and samples.jsonl: one JSON object per line, readable while the run goes on and after a kill.

Fields about time (seconds, tokens per second) begin with "time/". All others are equal bit for bit between two equal
runs; `without_timings` leaves those.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from rlhf.checks import InputError
from rlhf.run.atomic import written_aside

if TYPE_CHECKING:
    from accelerate import Accelerator

TIMING_PREFIX = "time/"


class JsonLines:
    """Append rows to a JSON-lines file; each has left the process before `write` returns.

    A last line left torn by a killed process is removed on opening: rows after it would be unreadable otherwise.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        _end_with_whole_line(self.path)
        self._file = self.path.open("ab")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row.

        Args:
            row: JSON's types, nested as you like; tensors and numpy values of one element become numbers, NaN and
                infinities null (strict JSON has neither). Floats keep every bit.
        Raises:
            TypeError: anything else; names where it is. Nothing has been written then.
        """
        text = json.dumps(_strict_json(row, ""), ensure_ascii=False, allow_nan=False)
        # A lone surrogate (half a character, from a careless decode) is no UTF-8, but its escape is valid JSON.
        self._file.write(text.encode("utf-8", "backslashreplace") + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class MetricsLog:
    """metrics.jsonl and accelerate's trackers together; does nothing on processes other than the main one."""

    def __init__(self, path: Path | str, accelerator: "Accelerator | None" = None) -> None:
        """Open the log.

        Args:
            path: the run folder's metrics.jsonl; continued if it exists.
            accelerator: says which process is the main one, and passes values on to its trackers (after
                `init_trackers`); None for a program of one process without trackers.
        """
        self._accelerator = accelerator
        is_main = accelerator is None or accelerator.is_main_process
        self._lines = JsonLines(path) if is_main else None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append {"step": step, **values} to the file and hand `values` to the trackers, tensors as numbers."""
        if self._lines is None:
            return
        self._lines.write({"step": step, **values})
        if self._accelerator is not None:
            self._accelerator.log({key: plain_value(value) for key, value in values.items()}, step=step)

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_tracker(name: str | None) -> None:
    """accelerate knows the tracker and its package is installed.

    Raises:
        InputError: it does not or is not.
    """
    from accelerate.tracking import get_available_trackers  # slow to load, and only trackers need it

    installed = [tracker.value for tracker in get_available_trackers()]
    if name is not None and name not in installed:
        raise InputError(
            f"--log-with {name}: not installed here; there are {installed or 'none'}. Install its package "
            "(tensorboard, wandb, ...), or leave the option out: metrics.jsonl is written in any case"
        )


def read_json_lines(path: Path | str) -> list[dict[str, Any]]:
    """All rows of a file, less a torn last line.

    Raises:
        FileNotFoundError: no such file.
        InputError: a line before the last is no JSON object; names the file and the line.
    """
    return [row for _, row in _whole_rows(Path(path))]


def truncate_after(path: Path | str, step: int) -> None:
    """Drop the rows whose "step" is greater than `step`, and a torn last line; the rest stays byte for byte.

    Resuming from a checkpoint of `step` calls it, so that the file goes on as if the run had never stopped. Rows
    without a step stay; a file that is not there is left so. The file is replaced as a whole: a kill harms nothing.
    """
    path = Path(path)
    if not path.exists():
        return
    with written_aside(path) as aside, aside.open("wb") as kept:
        for line, row in _whole_rows(path):
            if row.get("step") is None or row["step"] <= step:
                kept.write(line)


def without_timings(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows without their "time/..." fields: what two equal runs have in common."""
    return [{key: value for key, value in row.items() if not key.startswith(TIMING_PREFIX)} for row in rows]


def plain_value(value: Any) -> Any:
    """A tensor or numpy value of one element as a Python number; anything else as it is.

    Raises:
        TypeError: a tensor or array of several elements.
    """
    if isinstance(value, Tensor | np.ndarray | np.generic):
        if math.prod(value.shape) != 1:
            raise TypeError(f"only one element can be logged, got shape {list(value.shape)}: reduce it first")
        return value.item()
    return value


def _strict_json(value: Any, path: str) -> Any:
    """`value` in types that strict JSON has; `path` says where it is, for errors."""
    if isinstance(value, Mapping):
        return {key: _strict_json(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict_json(item, f"{path}[{index}]") for index, item in enumerate(value)]
    try:
        value = plain_value(value)
    except TypeError as error:
        raise TypeError(f"{path}: {error}") from None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    raise TypeError(f"{path}: {type(value).__name__} is no JSON type; convert it to a number or text first")


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The JSON object on a line; None if there is none."""
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _whole_rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each row as (its line with the newline, the row)."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            row = _parsed(line)
            if row is not None:
                yield line if line.endswith(b"\n") else line + b"\n", row
            elif line.endswith(b"\n"):
                raise InputError(f"{path}, line {number}: not a JSON object; remove or repair that line")


def _end_with_whole_line(path: Path) -> None:
    """Cut a torn last line off, or add the newline that alone is missing."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        whole, last = 0, b""
        for line in file:
            whole, last = whole + len(last), line
        if last and not last.endswith(b"\n"):
            if _parsed(last) is None:
                file.truncate(whole)
            else:
                file.write(b"\n")
