"""Files that appear whole or not at all: written under another name, flushed to the disk, then renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def flush_to_disk(path: Path) -> None:
    """Return once the disk holds the file's content (or, for a folder, the names in it): fsync."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; what the block writes there becomes `path` when the block ends.

    After an exception, or a kill at any moment, `path` is what it was before. The temporary name has the same suffix,
    for writers that choose their format by it.
    """
    aside = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield aside
        flush_to_disk(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    flush_to_disk(path.parent)
