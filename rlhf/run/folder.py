"""The run folder: one place for all that a run leaves behind, with the same names in every program."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.checks import InputError
from rlhf.run.atomic import written_aside

_CONFIG = "config.json"
# A folder with any of these holds a run; a new one would mix with it. Other files (a scheduler's log) do not matter.
_RUN_FILES = (_CONFIG, "metrics.jsonl", "samples.jsonl", "checkpoints", "final")


class RunExistsError(InputError, FileExistsError):
    """A new run would overwrite something that is there."""


class RunNotFoundError(InputError, FileNotFoundError):
    """There is no run where one is to be continued."""


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run's folder. `create` and `open` check the folder; `RunFolder(path)` alone does not, and is
    what processes other than the main one use."""

    path: Path

    @classmethod
    def create(cls, path: Path | str, config: dict[str, Any]) -> "RunFolder":
        """Make the folder (parents too) and write config.json. To be called on the main process only.

        Args:
            path: a folder that does not exist, or holds no run.
            config: anything `json` can write (infinities included); paths are written as text.
        Raises:
            RunExistsError: (a FileExistsError) a run, or something that is no folder, is there already.
            TypeError: a value in `config` is not JSON; nothing has been made then.
        """
        check_creatable(path)
        text = json.dumps(config, indent=2, default=_path_as_text) + "\n"
        folder = cls(Path(path))
        folder.path.mkdir(parents=True, exist_ok=True)
        with written_aside(folder.path / _CONFIG) as aside:
            aside.write_text(text, encoding="utf-8")
        return folder

    @classmethod
    def open(cls, path: Path | str) -> "RunFolder":
        """The folder of a run that was created before, to resume it.

        Raises:
            RunNotFoundError: (a FileNotFoundError) no config.json there.
        """
        folder = cls(Path(path))
        if not (folder.path / _CONFIG).is_file():
            raise RunNotFoundError(
                f"{folder.path} holds no run to resume ({_CONFIG} is not there): "
                "check --run-dir, or leave out --resume to start a new run"
            )
        return folder

    @property
    def metrics(self) -> Path:
        """metrics.jsonl: one row per step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """samples.jsonl: what the policy did, for people to read."""
        return self.path / "samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        """checkpoints/: step-000123 folders to resume from; made by the first save."""
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        """final/: the trained model, in the form its users load."""
        return self.path / "final"

    @property
    def plots(self) -> Path:
        """plots/: pictures of the metrics; made by the first plot."""
        return self.path / "plots"

    def config(self) -> dict[str, Any]:
        """What config.json says; JSON's types (tuples come back as lists).

        Raises:
            InputError: the file cannot be read as JSON.
        """
        path = self.path / _CONFIG
        try:
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is not valid JSON ({error}): repair it or start a new run") from error
        return config


def check_creatable(path: Path | str) -> None:
    """Raise what `RunFolder.create` would; makes nothing, so that a program can fail before long work.

    Raises:
        RunExistsError: a run, or something that is no folder, is there already.
        InputError: the folder cannot be written.
    """
    path = Path(path)
    if path == Path():
        raise InputError("the run folder is the current one itself: give it a name, as in --run-dir runs/mine")
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise RunExistsError(f"{nearest} is a file, not a folder: choose another --run-dir")
    if not os.access(nearest, os.W_OK):
        raise InputError(f"{path} cannot be written ({nearest} is not writable): choose another --run-dir")
    found = [name for name in _RUN_FILES if (path / name).exists()]
    if found:
        raise RunExistsError(
            f"{path} already holds a run ({', '.join(found)}): pass --resume to continue it or choose another --run-dir"
        )


def _path_as_text(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"config values must be JSON types or paths, got {type(value).__name__}: {value!r}")
