"""Whether a run can be continued, asked before any long work."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rlhf.checks import InputError
from rlhf.run.checkpoint import latest_checkpoint
from rlhf.run.folder import RunFolder


def check_resumable(folder: RunFolder, config: Mapping[str, Mapping[str, Any]], *, may_change: Collection[str]) -> Path:
    """The run's latest checkpoint, if the run was started with the same config.

    Args:
        folder: the run's.
        config: {topic: {option: value}}, JSON's types, as `RunFolder.create` got it.
        may_change: options that need not be the same.
    Raises:
        InputError: there is no run, it was started otherwise (names every difference), or it has no checkpoint.
    """
    old = RunFolder.open(folder.path).config()
    differences = [
        f"{name} was {old.get(topic, {}).get(name)!r}, is now {value!r}"
        for topic, fields in config.items()
        for name, value in fields.items()
        if old.get(topic, {}).get(name) != value and name not in may_change
    ]
    if differences:
        raise InputError(
            f"--resume continues the run in {folder.path} as it was started, but {'; '.join(differences)}: give the "
            "same options, or start a new run in another --run-dir"
        )
    checkpoint = latest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        raise InputError(
            f"{folder.path} has no complete checkpoint to resume from: start again in another --run-dir, or remove "
            "this one"
        )
    return checkpoint
