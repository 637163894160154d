"""JSON lines survive kills, keep every bit, and continue after a resume as if nothing had happened."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.checks import InputError
from rlhf.run import JsonLines, MetricsLog, read_json_lines, truncate_after, without_timings


def write_all(path: Path, rows: list[dict[str, Any]]) -> None:
    with JsonLines(path) as lines:
        for row in rows:
            lines.write(row)


def test_each_row_is_readable_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "m.jsonl") as lines:
        for step in range(3):
            lines.write({"step": step})
            assert read_json_lines(tmp_path / "m.jsonl") == [{"step": s} for s in range(step + 1)]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_keep_every_bit(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    path = tmp_path_factory.mktemp("floats") / "m.jsonl"
    write_all(path, [{"x": value}])
    assert read_json_lines(path)[0]["x"].hex() == value.hex()


def test_tensors_and_numpy_values_of_one_element_become_numbers(tmp_path: Path) -> None:
    row = {
        "f32": torch.tensor(0.1),
        "shaped": torch.ones(1, 1, requires_grad=True),
        "bf16": torch.tensor(0.5, dtype=torch.bfloat16),
        "int": torch.tensor(2**40),
        "bool": torch.tensor(True),
        "numpy": np.float32(0.1),
        "array": np.array([7]),
        "nested": [{"x": torch.tensor(3)}, (1, "two", None)],
    }
    write_all(tmp_path / "m.jsonl", [row])
    f32 = float(np.float32(0.1))
    assert read_json_lines(tmp_path / "m.jsonl") == [
        {
            **{"f32": f32, "shaped": 1.0, "bf16": 0.5, "int": 2**40, "bool": True, "numpy": f32, "array": 7},
            "nested": [{"x": 3}, [1, "two", None]],
        }
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.tensor(math.nan), np.float64("inf")])
def test_what_strict_json_lacks_becomes_null(tmp_path: Path, value: object) -> None:
    write_all(tmp_path / "m.jsonl", [{"x": value, "deep": [value]}])
    text = (tmp_path / "m.jsonl").read_text()
    assert text == '{"x": null, "deep": [null]}\n'


@pytest.mark.parametrize(
    ("row", "place"),
    [
        ({"a": {"b": [0, torch.zeros(2)]}}, r"a\.b\[1\]: only one element.*\[2\]"),
        ({"a": {1, 2}}, "a: set"),
        ({"a": np.zeros(0)}, "a: only one element"),
    ],
)
def test_an_error_names_the_place_and_writes_nothing(tmp_path: Path, row: dict[str, Any], place: str) -> None:
    with JsonLines(tmp_path / "m.jsonl") as lines:
        with pytest.raises(TypeError, match=place):
            lines.write({"fine": 1, **row})
        lines.write({"step": 1})
    assert read_json_lines(tmp_path / "m.jsonl") == [{"step": 1}]


def test_any_text_comes_back_and_stays_on_one_line(tmp_path: Path) -> None:
    text = "Grüße\n数学\u2028\ud83d\x00"  # a line separator and half a character among them
    write_all(tmp_path / "m.jsonl", [{"text": text}])
    assert read_json_lines(tmp_path / "m.jsonl") == [{"text": text}]
    raw = (tmp_path / "m.jsonl").read_bytes()
    assert raw.count(b"\n") == 1
    assert "Grüße".encode() in raw, "people read this file"


def test_a_file_cut_anywhere_reads_up_to_its_last_whole_row_and_can_be_continued(tmp_path: Path) -> None:
    rows = [{"step": 1, "text": "é"}, {"step": 2, "text": "数"}]
    write_all(tmp_path / "whole.jsonl", rows)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    first = whole.index(b"\n")
    for cut in range(len(whole) + 1):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(whole[:cut])
        left = rows[: (cut >= first) + (cut >= len(whole) - 1)]
        assert read_json_lines(path) == left
        write_all(path, [{"step": 3}])
        assert read_json_lines(path) == [*left, {"step": 3}]


@pytest.mark.parametrize("bad", [b"{oops", b"[1]", b"\xff"])
def test_a_bad_line_before_the_last_is_an_error_with_its_number(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"m\.jsonl, line 2"):
        read_json_lines(path)


def test_a_killed_process_loses_no_row(tmp_path: Path) -> None:
    program = (
        "import os, sys; from rlhf.run import JsonLines\n"
        "lines = JsonLines(sys.argv[1])\n"
        "for step in range(5): lines.write({'step': step})\n"
        "os._exit(9)"
    )
    path = tmp_path / "m.jsonl"
    assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == 9
    assert [row["step"] for row in read_json_lines(path)] == [0, 1, 2, 3, 4]


def test_truncating_and_going_on_equals_never_having_stopped(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 0.1 * step} for step in range(1, 8)]
    write_all(tmp_path / "straight.jsonl", rows)
    path = tmp_path / "resumed.jsonl"
    write_all(path, rows[:5])
    path.write_bytes(path.read_bytes() + b'{"step": 6, "lo')
    truncate_after(path, 3)
    write_all(path, rows[3:])
    assert path.read_bytes() == (tmp_path / "straight.jsonl").read_bytes()


def test_truncate_keeps_rows_of_the_step_itself_and_rows_without_one(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"note":  "spaced"}\n{"step": 2, "a": 1}\n{"step": 3}\n{"step": 2, "a": 2}\n{"step": null}')
    truncate_after(path, 2)
    assert path.read_bytes() == b'{"note":  "spaced"}\n{"step": 2, "a": 1}\n{"step": 2, "a": 2}\n{"step": null}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_truncate_interrupted_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    content = b'{"step": 1}\n{broken}\n{"step": 2}\n'
    path.write_bytes(content)
    with pytest.raises(InputError, match="line 2"):
        truncate_after(path, 1)
    assert path.read_bytes() == content


def test_truncating_a_file_that_is_not_there_does_nothing(tmp_path: Path) -> None:
    truncate_after(tmp_path / "m.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_without_timings_leaves_what_two_equal_runs_share() -> None:
    first = [{"step": 1, "loss": 0.5, "time/step": 1.25}]
    second = [{"step": 1, "loss": 0.5, "time/step": 1.5, "time/tokens_per_second": 7.0}]
    assert without_timings(first) == without_timings(second) == [{"step": 1, "loss": 0.5}]
    assert "time/step" in first[0]


class FakeAccelerator:
    """What MetricsLog uses of accelerate's Accelerator."""

    def __init__(self, is_main_process: bool) -> None:
        self.is_main_process = is_main_process
        self.logged: list[tuple[dict[str, Any], int]] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((values, step))


def test_metrics_go_to_the_file_and_to_the_trackers(tmp_path: Path) -> None:
    accelerator = FakeAccelerator(is_main_process=True)
    with MetricsLog(tmp_path / "m.jsonl", cast(Any, accelerator)) as log:
        log.write(3, {"loss": torch.tensor(0.5), "kl": 2})
    assert read_json_lines(tmp_path / "m.jsonl") == [{"step": 3, "loss": 0.5, "kl": 2}]
    assert accelerator.logged == [({"loss": 0.5, "kl": 2}, 3)]
    assert type(accelerator.logged[0][0]["loss"]) is float


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    accelerator = FakeAccelerator(is_main_process=False)
    with MetricsLog(tmp_path / "m.jsonl", cast(Any, accelerator)) as log:
        log.write(1, {"loss": 0.5})
    assert list(tmp_path.iterdir()) == []
    assert accelerator.logged == []


def test_without_accelerator_the_log_is_the_file(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl") as log:
        log.write(1, {"loss": math.nan})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "loss": None}


def test_importing_the_room_loads_neither_accelerate_nor_matplotlib_nor_transformers() -> None:
    program = "import sys, rlhf.run; print({'accelerate', 'matplotlib', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
