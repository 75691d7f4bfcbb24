"""Files that are whole or not there."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a file durably and in one step, in place of an older one.

    Raises:
        OSError: The disk is full or fails, or the place may not be written; the older file stays.
    """
    working = path.with_name(f".{path.name}.tmp")
    try:
        with working.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(working, path)
    except OSError:
        working.unlink(missing_ok=True)
        raise
