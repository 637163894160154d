"""States come back exactly, and a kill at any moment leaves a set of whole checkpoints."""

import json
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rlhf.run.state as state_module
from rlhf.checks import InputError
from rlhf.run import (
    CheckpointError,
    latest_checkpoint,
    load_state,
    rng_state,
    save_checkpoint,
    save_state,
    set_rng_state,
)

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
]


def assert_same(a: Any, b: Any) -> None:
    """Equal to the bit, in type and order too."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        as_bytes = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
        assert torch.equal(*as_bytes)
        return
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert [(type(key), key) for key in a] == [(type(key), key) for key in b]
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, float):
        assert a.hex() == b.hex()
    else:
        assert a == b


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any saved type; 0 to 3 axes, empty ones too; contiguous, transposed or a slice of something larger."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    tensor = torch.tensor(list(raw), dtype=torch.uint8).view(dtype).reshape(shape)
    match draw(st.sampled_from(["as it is", "transposed", "slice"])):
        case "transposed" if len(shape) >= 2:
            return tensor.transpose(0, 1)
        case "slice" if shape:
            return tensor[1:]
    return tensor


MARKS = st.sampled_from(["tensor", "dict", "tuple", "float", "format", "state", "__metadata__", "", ".", "a.b", "0"])
KEYS = MARKS | st.text(max_size=4) | st.integers(-2, 2)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | MARKS | tensors()
STATES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)


@given(STATES)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_any_state_comes_back_exactly(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "any_state"
    save_state(folder, state)
    assert_same(load_state(folder), state)


@pytest.mark.parametrize(
    "state",
    [
        {"tensor": "x"},
        {"tuple": [1, 2]},
        {"float": "nan"},
        {"dict": [["a", 1]]},
        {"x": torch.ones(2), "y": {"tensor": "x"}},
        {"a.b": torch.zeros(2), "a": {"b": torch.ones(3)}, "a.b#2": torch.full((4,), 2.0)},
        {0: torch.zeros(1), "0": torch.ones(1)},
        {"__metadata__": torch.ones(2), "": torch.zeros(2), "\ud83d": torch.zeros(3), "\x00": torch.ones(3)},
        torch.tensor(3.5),
        [-0.0, math.nan, math.inf, -math.inf, 5e-324, 2**100, -1, True, None, "\ud83d", ()],
        {"betas": (0.9, 0.999), "steps": [(), [], {}], "nothing": torch.zeros(0, 4)},
    ],
)
def test_hard_states_come_back_exactly(tmp_path: Path, state: Any) -> None:
    save_state(tmp_path, state)
    assert_same(load_state(tmp_path), state)


def test_tied_weights_are_saved_once_and_loaded_tied(tmp_path: Path) -> None:
    weight = torch.randn(1000, 10)
    save_state(tmp_path, {"embed": weight, "head": weight.view(1000, 10), "parameter": torch.nn.Parameter(weight)})
    assert (tmp_path / "tensors.safetensors").stat().st_size < 1.5 * weight.nbytes
    loaded = load_state(tmp_path)
    assert_same(loaded["head"], weight)
    assert loaded["embed"] is loaded["head"] is loaded["parameter"]


def test_overlapping_views_each_come_back(tmp_path: Path) -> None:
    buffer = torch.arange(12.0)
    grid = buffer.view(3, 4)
    state = {"all": buffer, "grid": grid, "turned": grid.T, "row": grid[1], "tail": buffer[5:], "strided": buffer[::2]}
    state["spread"] = buffer[0].expand(3)
    state["bits"] = buffer.view(torch.int32)
    state["square"] = buffer[:9].view(3, 3)
    state["turned_square"] = state["square"].T
    save_state(tmp_path, state)
    assert_same(load_state(tmp_path), state)


def test_two_views_of_one_memory_that_read_it_with_other_signs_stay_apart(tmp_path: Path) -> None:
    pair = torch.tensor([1 + 2j])
    state = {"imag": pair.imag, "minus": pair.conj().imag}
    for some in (state, {"minus": state["minus"]}):
        save_state(tmp_path, some)
        assert {name: x.item() for name, x in load_state(tmp_path).items()} == {
            name: x.item() for name, x in some.items()
        }
    assert state["minus"].item() == -2


def test_what_training_programs_save_comes_back(tmp_path: Path) -> None:
    def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(5, 3)).square().mean().backward()
            optimizer.step()

    model, optimizer = fresh()
    train(model, optimizer)
    save_state(tmp_path, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng_state()})
    train(model, optimizer)

    again, again_optimizer = fresh()
    loaded = load_state(tmp_path)
    again.load_state_dict(loaded["model"])
    again_optimizer.load_state_dict(loaded["optimizer"])
    set_rng_state(loaded["rng"])
    train(again, again_optimizer)
    assert_same(dict(again.state_dict()), dict(model.state_dict()))


def test_subclasses_come_back_as_what_they_extend(tmp_path: Path) -> None:
    save_state(tmp_path, OrderedDict(a=np.float64(0.5), b=torch.nn.Parameter(torch.ones(2))))
    loaded = load_state(tmp_path)
    assert_same(loaded, {"a": 0.5, "b": torch.ones(2)})
    assert not loaded["b"].requires_grad


class WrappedTensor(torch.Tensor):
    """Stands for sharded or quantised tensors, whose content is elsewhere."""


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"optimizer": {"hooks": [0, print]}}, r"optimizer\.hooks\.1: cannot save builtin_function_or_method"),
        ({"a": ({"b": {1, 2}},)}, r"a\.0\.b: cannot save set"),
        ({"a": {(1, 2): 0}}, r"a: a dict's keys must be str or int, got tuple \(1, 2\)"),
        ({True: 0}, r"the state: a dict's keys must be str or int, got bool True"),
        (b"bytes", "the state: cannot save bytes"),
        ({"a": np.float32(1)}, "a: cannot save float32"),
        ({"a": torch.eye(2).to_sparse()}, r"a: cannot save a tensor of torch\.sparse_coo"),
        ({"a": torch.empty(2, device="meta")}, "a: cannot save a tensor of .* on meta"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "a: cannot save a tensor of .*complex64"),
        ({"a": torch.ones(2).as_subclass(WrappedTensor)}, "a: cannot save WrappedTensor"),
    ],
)
def test_what_cannot_be_saved_is_named_and_nothing_is_written(tmp_path: Path, state: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        save_state(tmp_path / "state", state)
    assert not (tmp_path / "state").exists()


def test_a_loaded_state_may_be_changed_and_saved_over_its_own_files(tmp_path: Path) -> None:
    save_state(tmp_path, {"x": torch.arange(100_000.0)})
    first, second = load_state(tmp_path)["x"], load_state(tmp_path)["x"]
    first.mul_(2)
    assert_same(second, torch.arange(100_000.0))
    save_state(tmp_path, {"x": first, "before": second})
    assert_same(second, torch.arange(100_000.0))
    assert_same(load_state(tmp_path), {"x": 2 * torch.arange(100_000.0), "before": second})


def test_tensors_go_to_the_device_asked_for(tmp_path: Path) -> None:
    save_state(tmp_path, [torch.ones(2)])
    for device in ("meta", torch.device("meta")):
        assert load_state(tmp_path, device)[0].device.type == "meta"
    assert load_state(tmp_path)[0].device.type == "cpu"


def test_all_files_of_a_checkpoint_have_the_same_readers(tmp_path: Path) -> None:
    save_state(tmp_path, {"x": torch.ones(2)})
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_loading_runs_no_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    for name in ("state.json", "tensors.safetensors"):
        save_state(tmp_path, {"x": torch.ones(2)})
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(CheckpointError, match=name):
            load_state(tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
def test_a_missing_or_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    save_state(tmp_path, {"x": torch.ones(20), "y": [1, 2]})
    whole = (tmp_path / name).read_bytes()
    for size in (0, 1, 7, 8, 9, 40, len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            load_state(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_state(tmp_path)


@pytest.mark.parametrize(
    "tree",
    [
        {"tensor": "other"},
        {"tensor": ["x"]},
        {"pickle": "gANLAS4="},
        {"dict": 3},
        {"dict": [["a"]]},
        {"dict": [[[], 1]]},
        {"tuple": None},
        {"float": "many"},
        {},
    ],
)
def test_a_tree_that_was_never_written_so_is_damage(tmp_path: Path, tree: object) -> None:
    save_state(tmp_path, {"x": torch.ones(2)})
    (tmp_path / "state.json").write_text(json.dumps({"format": 1, "state": tree}))
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        load_state(tmp_path)


@pytest.mark.parametrize("text", ['{"format": 2, "state": null}', "[]", "{}"])
def test_another_format_is_refused(tmp_path: Path, text: str) -> None:
    save_state(tmp_path, None)
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match="format 1"):
        load_state(tmp_path)


# ---- checkpoints as a set


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[int, int]:
    """What each whole checkpoint holds, by the step that the newest-first walk finds; the folder is a copy."""
    found = {}
    while (latest := latest_checkpoint(folder)) is not None:
        loaded = load_state(latest)
        assert int(loaded["x"].sum()) == 3 * loaded["value"]
        found[int(latest.name[5:11])] = loaded["value"]
        for path in folder.glob(f"{latest.name[:11]}*"):
            shutil.rmtree(path)
    return found


def whole(folder: Path) -> dict[int, int]:
    copy = folder.with_name(folder.name + "-copy")
    shutil.copytree(folder, copy)
    try:
        return contents(copy)
    finally:
        shutil.rmtree(copy)


def state(value: int) -> dict[str, Any]:
    return {"value": value, "x": torch.full((3,), value)}


def test_save_returns_the_folder_and_latest_finds_it(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "c") is None
    path = save_checkpoint(tmp_path / "c", 123, state(1))
    assert path == tmp_path / "c" / "step-000123"
    assert latest_checkpoint(tmp_path / "c") == path
    assert_same(load_state(path), state(1))


def test_latest_counts_steps_as_numbers(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 5):
        save_checkpoint(tmp_path, step, state(step))
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.name == "step-1000000"


def test_keep_counts_this_one_and_the_newest_before_it(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, state(step))
    save_checkpoint(tmp_path, 5, state(5), keep=3)
    assert names(tmp_path) == ["step-000003", "step-000004", "step-000005"]
    save_checkpoint(tmp_path, 5, state(6), keep=1)
    assert whole(tmp_path) == {5: 6}


def test_keep_never_removes_what_was_just_written_nor_later_steps(tmp_path: Path) -> None:
    for step in (1, 8, 9):
        save_checkpoint(tmp_path, step, state(step))
    save_checkpoint(tmp_path, 2, state(2), keep=1)
    assert names(tmp_path) == ["step-000002", "step-000008", "step-000009"]


@pytest.mark.parametrize(("step", "keep"), [(-1, None), (1, 0)])
def test_nonsense_is_refused(tmp_path: Path, step: int, keep: int | None) -> None:
    with pytest.raises(InputError, match="must be in"):
        save_checkpoint(tmp_path, step, state(1), keep=keep)


def test_a_state_that_cannot_be_saved_leaves_the_former_checkpoints(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, state(1))
    with pytest.raises(TypeError, match="bad"):
        save_checkpoint(tmp_path, 1, {"bad": print})
    assert whole(tmp_path) == {1: 1}


def test_a_failure_while_the_tensors_are_written_leaves_the_former(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, state(1))

    def disk_full(_: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(state_module, "save_file", disk_full)
        with pytest.raises(OSError, match="no space"):
            save_checkpoint(tmp_path, 2, state(2), keep=1)
    assert whole(tmp_path) == {1: 1}
    save_checkpoint(tmp_path, 3, state(3))
    assert names(tmp_path) == ["step-000001", "step-000003"], "the next save cleans up"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    flush, rename = os.fsync, os.rename

    def noting_fsync(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        flush(descriptor)

    def noting_rename(source: Path, target: Path) -> None:
        flushed.append(f"renamed to {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    save_checkpoint(tmp_path / "c", 1, state(1))
    assert {".state.tmp.json", ".tensors.tmp.safetensors", "step-000001.tmp"} == set(flushed[:-2])
    assert flushed[-2:] == ["renamed to step-000001", "c"]


# Runs in a process of its own: dies, like by SIGKILL, at the n-th call that changes something on the disk.
KILLED_SAVE = """
import os, shutil, sys
from pathlib import Path
import torch
import rlhf.run.state
from rlhf.run import save_checkpoint

folder, step, moments = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def dying(call, half=None):
    def wrapped(*args, **kwargs):
        global moments
        moments -= 1
        if moments == 0:
            if half is not None:
                half(*args)
            os._exit(9)
        return call(*args, **kwargs)
    return wrapped

def half_removed(path, *_):
    (path / "tensors.safetensors").unlink(missing_ok=True)

def half_written(_, path):
    path.write_bytes(b"half")

rlhf.run.state.save_file = dying(rlhf.run.state.save_file, half_written)
os.rename, os.replace, os.fsync = dying(os.rename), dying(os.replace), dying(os.fsync)
shutil.rmtree = dying(shutil.rmtree, half_removed)
save_checkpoint(folder, step, {"value": 7, "x": torch.full((3,), 7)}, keep=2)
"""
# Imports torch once and forks a save for each moment, each on a copy of the folder, until one gets through.
EVERY_MOMENT = """
import os, shutil, sys
import torch
source, folder, step = sys.stdin.read(), sys.argv[1], sys.argv[2]
for moment in range(1, 100):
    shutil.copytree(folder, f"{folder}-{moment}")
    child = os.fork()
    if child == 0:
        sys.argv = ["save", f"{folder}-{moment}", step, str(moment)]
        exec(source)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(moment)
"""


@pytest.mark.parametrize(("step", "after"), [(2, {1: 1, 2: 7}), (3, {2: 2, 3: 7})], ids=["replacing", "new"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_checkpoints(
    tmp_path: Path, step: int, after: dict[int, int]
) -> None:
    folder, before = tmp_path / "c", {1: 1, 2: 2}
    for old in before:
        save_checkpoint(folder, old, state(old))
    command = [sys.executable, "-c", EVERY_MOMENT, str(folder), str(step)]
    result = subprocess.run(command, input=KILLED_SAVE, capture_output=True, text=True, check=True)
    moments = int(result.stdout)
    assert 8 < moments < 99, "it died at many moments, and got through in the end"

    found = []
    for moment in range(1, moments + 1):
        killed = tmp_path / f"c-{moment}"
        found.append(whole(killed))
        # The new one there, and what it pushes out not removed yet, is a set of whole checkpoints as well.
        assert found[-1] in (before, {**before, step: 7}, after), f"killed at moment {moment}"
        again = shutil.copytree(killed, tmp_path / f"again-{moment}")
        path = save_checkpoint(again, step, state(9), keep=2)
        assert whole(again) == {step - 1: step - 1, step: 9}, f"repeated after moment {moment}"
        assert names(path) == ["state.json", "tensors.safetensors"]

        newest = max(found[-1])
        save_checkpoint(killed, 4, state(4), keep=2)
        assert whole(killed) == {newest: found[-1][newest], 4: 4}, f"went on after moment {moment}"
        assert names(killed) == [f"step-{newest:06d}", "step-000004"], f"cleaned up after moment {moment}"
    assert found[0] == before
    assert found[-1] == after


# ---- random numbers


def draws() -> list[Any]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()]  # noqa: NPY002


@pytest.mark.parametrize("gauss_pending", [False, True])
def test_random_numbers_continue_after_a_round_trip(tmp_path: Path, gauss_pending: bool) -> None:
    if gauss_pending:  # both generators make normal numbers in pairs and hold the second one back
        random.gauss(0, 1)
        np.random.randn()  # noqa: NPY002
    save_state(tmp_path, rng_state())
    expected = [draws() for _ in range(400)]
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    set_rng_state(load_state(tmp_path))
    assert [draws() for _ in range(400)] == expected


def test_cuda_states_of_devices_that_are_not_here_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = {**rng_state(), "cuda": [torch.tensor([device], dtype=torch.uint8) for device in range(3)]}
    given_to: dict[int, int] = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda x, device: given_to.update({device: int(x)}))
    set_rng_state(saved)
    assert given_to == {0: 0, 1: 1}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_continue(tmp_path: Path) -> None:
    save_state(tmp_path, rng_state())
    expected = torch.rand(5, device="cuda").tolist()
    set_rng_state(load_state(tmp_path, device="cuda"))
    assert torch.rand(5, device="cuda").tolist() == expected
