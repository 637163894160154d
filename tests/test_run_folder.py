"""The run folder refuses to mix two runs, and says what to do."""

import math
from pathlib import Path

import pytest

from rlhf.checks import InputError
from rlhf.run import RunExistsError, RunFolder, RunNotFoundError, check_creatable


def test_create_writes_the_config_and_open_reads_it_back(tmp_path: Path) -> None:
    config = {"lr": 1e-6, "max_grad_norm": math.inf, "task": {"name": "gsm8k", "splits": ["train"]}, "seed": None}
    created = RunFolder.create(tmp_path / "runs" / "a", config)
    assert RunFolder.open(tmp_path / "runs" / "a") == created
    assert created.config() == config
    text = (created.path / "config.json").read_text()
    assert text.count("\n") > len(config), "one field per line, for people"


def test_paths_in_the_config_are_written_as_text(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a", {"data": Path("x/y.jsonl")})
    assert folder.config() == {"data": "x/y.jsonl"}


def test_a_config_that_is_no_json_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="object"):
        RunFolder.create(tmp_path / "a", {"model": object()})
    assert not (tmp_path / "a").exists()


def test_an_empty_folder_or_one_with_unrelated_files_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "slurm.log").write_text("starting")
    check_creatable(tmp_path)
    RunFolder.create(tmp_path, {})
    assert (tmp_path / "slurm.log").read_text() == "starting"


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "final"])
def test_a_folder_that_holds_a_run_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    for attempt in (lambda: check_creatable(tmp_path), lambda: RunFolder.create(tmp_path, {})):
        with pytest.raises(FileExistsError) as caught:
            attempt()
        message = str(caught.value)
        assert str(tmp_path) in message
        assert name in message
        assert "pass --resume to continue it or choose another --run-dir" in message
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_check_creatable_makes_nothing(tmp_path: Path) -> None:
    check_creatable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    for path in (tmp_path / "a", tmp_path / "a" / "b" / "c"):
        with pytest.raises(FileExistsError, match="is a file"):
            RunFolder.create(path, {})


@pytest.mark.parametrize("path", ["", ".", Path()])
def test_the_current_folder_is_no_run_folder(path: Path | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty --run-dir would fill it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="give it a name"):
        RunFolder.create(path, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exists", [True, False])
def test_open_without_a_run_says_so(tmp_path: Path, exists: bool) -> None:
    path = tmp_path if exists else tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError, match=r"holds no run to resume.*--resume"):
        RunFolder.open(path)


def test_the_folders_errors_are_input_errors_so_that_programs_print_one_line() -> None:
    assert issubclass(RunExistsError, InputError)
    assert issubclass(RunNotFoundError, InputError)


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, {})
    (tmp_path / "config.json").write_text('{"lr": 1')
    with pytest.raises(InputError, match=r"config\.json is not valid JSON"):
        folder.config()


def test_names_inside_the_folder() -> None:
    folder = RunFolder(Path("runs/a"))
    inside = [folder.metrics, folder.samples, folder.checkpoints, folder.final, folder.plots]
    names = ["metrics.jsonl", "samples.jsonl", "checkpoints", "final", "plots"]
    assert inside == [Path("runs/a") / name for name in names]
