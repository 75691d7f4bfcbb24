"""What Weights & Biases already has of a run, so that a run that goes on repeats nothing there.

A run that goes on after a crash takes some steps again. Online, W&B has what it was given: `Sent` remembers
it. Offline, its own process keeps lines in memory and loses them when it is killed: its files count, too.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

SENT_NAME = "wandb_sent.json"

_MAGIC, _BLOCK, _HEADER = b":W&B", 32_768, 7
_WHOLE, _LAST = 1, 4

_LARGEST_STEP = 2**53
"""Beyond it W&B's numbers, which are JSON's, are none of steps."""


class Sent:
    """The last step of each kind of line that W&B surely has, in a small file of the run folder.

    Online it is written before W&B gets a line: a crash between the two leaves a gap there, never a repeat.
    Each time the same few bytes are overwritten and made durable: one write to the disk (0.15 ms, measured).
    Offline it is written at the end, after W&B's process has written its files.

    Args:
        folder: The run folder.
        offline: Whether this start is offline.
        kept: The last step of each kind in metrics.jsonl, for a run that W&B knows and that has no such file.

    Raises:
        ValueError: The file is damaged, or no file.
        OSError: It cannot be read or written.
    """

    _ROOM = 512  # bytes of the file, all of one sector: a crash leaves the old ones or the new ones

    def __init__(self, folder: Path, *, offline: bool, kept: dict[str, int]) -> None:
        path = folder / SENT_NAME
        is_there = os.path.lexists(path)
        self._offline = offline
        # A link may lead anywhere.
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            found = self._read(path) if is_there else dict(kept)
            for kind, step in offline_steps(folder).items():
                found[kind] = max(step, found.get(kind, step))
            self._before, self._steps = found, dict(found)
            self._write()
        except BaseException:
            os.close(self._file)
            raise

    def _read(self, path: Path) -> dict[str, int]:
        """What the file says.

        Raises:
            ValueError: It is damaged, or no file.
        """
        try:
            found = json.loads(os.pread(self._file, self._ROOM, 0))
            if all(type(step) is int and 0 <= step <= _LARGEST_STEP for step in found.values()):
                return dict(found)
        except (OSError, ValueError, AttributeError, RecursionError):
            pass
        raise ValueError(
            f"{path} is damaged; remove it, and W&B gets no more of the steps up to the newest checkpoint"
        )

    def is_new(self, kind: str, step: int) -> bool:
        """Whether no earlier start sent this step; if so, from now on it counts as sent."""
        if step <= self._before.get(kind, -1):
            return False
        if step != self._steps.get(kind):
            self._steps[kind] = step
            if not self._offline:
                self._write()
        return True

    def close(self) -> None:
        """Called when W&B has finished."""
        try:
            self._write()
        finally:
            os.close(self._file)

    def _write(self) -> None:
        os.pwrite(self._file, json.dumps(self._steps).ljust(self._ROOM - 1).encode() + b"\n", 0)
        os.fdatasync(self._file)


def offline_steps(folder: Path) -> dict[str, int]:
    """The last step of each kind in the files that W&B wrote offline in a run folder."""
    from wandb.proto import wandb_internal_pb2

    read = getattr(wandb_internal_pb2, "Record").FromString  # noqa: B009  (made at import; no type knows it)
    steps: dict[str, int] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for entry in log_entries(path.read_bytes()):
            for item in read(entry).history.item:
                kind, _, name = (item.key or "/".join(item.nested_key)).partition("/")
                if name == "step":
                    steps[kind] = max(steps.get(kind, -1), int(json.loads(item.value_json)))
    return steps


def log_entries(data: bytes) -> Iterator[bytes]:
    """The whole entries of a file of W&B's; the end of one that was being written is left out.

    Such a file is a log of LevelDB's kind: after 7 bytes come blocks of 32 KiB, with pieces of entries, each
    of crc32, length and part (whole, first, middle, last); no piece lies over the end of a block.
    """
    if not data.startswith(_MAGIC):
        return
    place, entry = _HEADER, b""
    while place + _HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        length, part = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        piece = data[place + _HEADER : place + _HEADER + length]
        if len(piece) < length:
            return
        place += _HEADER + length
        entry = piece if part in (_WHOLE, 2) else entry + piece
        if part in (_WHOLE, _LAST):
            yield entry
