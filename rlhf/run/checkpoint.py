"""Checkpoints that a kill at any moment leaves whole: written under another name, then renamed.

A checkpoint is a folder `step-000123`. While saving, `step-000123.tmp` holds one that is being written or removed,
and `step-000123.former` one that is being replaced; latest_checkpoint and the next save deal with what a kill left.
"""

import os
import re
import shutil
from pathlib import Path

from rlhf.checks import check_range
from rlhf.run.atomic import flush_to_disk
from rlhf.run.state import save_state

_NAME = re.compile(r"step-(\d{6,})")
_TMP = ".tmp"
_FORMER = ".former"


def save_checkpoint(checkpoints_dir: Path | str, step: int, state: object, keep: int | None = None) -> Path:
    """Save `state` as `checkpoints_dir`/step-000123, all of it or nothing; replaces a checkpoint of the same step.

    One process at a time may save to a folder: in a distributed program, the main one.

    Args:
        checkpoints_dir: made if it is not there.
        step: >= 0.
        state: what `save_state` takes.
        keep: how many to keep, this one and the newest before it; None keeps all. Those of later steps stay.
    Returns:
        The checkpoint's folder; the disk holds it.
    Raises:
        InputError: step or keep out of range.
        TypeError: the state holds a type that cannot be saved.
    """
    check_range("step", step, low=0)
    if keep is not None:
        check_range("keep", keep, low=1)
    checkpoints_dir = Path(checkpoints_dir)
    checkpoints_dir.mkdir(parents=True, exist_ok=True)
    _clean(checkpoints_dir)

    final = checkpoints_dir / f"step-{step:06d}"
    temporary = _beside(final, _TMP)
    save_state(temporary, state)
    if final.exists():
        os.rename(final, _beside(final, _FORMER))
    os.rename(temporary, final)
    flush_to_disk(checkpoints_dir)

    _clean(checkpoints_dir)
    if keep is not None:
        older = sorted((s, path) for s, path in _complete(checkpoints_dir).items() if s < step)
        for _, path in older[: len(older) + 1 - keep]:
            _remove(path)
    return final


def latest_checkpoint(checkpoints_dir: Path | str) -> Path | None:
    """The complete checkpoint of the greatest step; None if there is none, or no such folder. Changes nothing."""
    complete = _complete(Path(checkpoints_dir))
    return complete[max(complete)] if complete else None


def _complete(checkpoints_dir: Path) -> dict[int, Path]:
    """Complete checkpoints by step. A former one counts if its replacement never got its name."""
    if not checkpoints_dir.is_dir():
        return {}
    found: dict[int, Path] = {}
    for path in sorted(checkpoints_dir.iterdir()):  # a former one comes after its replacement
        if match := _NAME.fullmatch(path.name.removesuffix(_FORMER)):
            found.setdefault(int(match[1]), path)
    return found


def _clean(checkpoints_dir: Path) -> None:
    """Put right what an interrupted save left."""
    for path in checkpoints_dir.glob(f"step-*{_TMP}"):
        shutil.rmtree(path)
    for path in checkpoints_dir.glob(f"step-*{_FORMER}"):
        final = path.with_name(path.name.removesuffix(_FORMER))
        if final.exists():
            _remove(path)
        else:
            os.rename(path, final)


def _remove(path: Path) -> None:
    """Delete a checkpoint; renamed first, so that one half deleted is not taken for a whole one."""
    doomed = _beside(path, _TMP)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
