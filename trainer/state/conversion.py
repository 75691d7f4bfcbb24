"""The record of a checkpoint that was converted for another number of ranks: of which one, and its files."""

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.json_text import read_signed_json, signed_json
from sparsekd.logit_store.typed_json import Sha256, read_bounded, typed
from sparsekd.trainer.state.checkpoint import crc32_of
from sparsekd.trainer.state.record import RECORD_BYTES, FileRecord

CONVERSION_NAME = "CONVERTED.json"
_VERSION = 1


@dataclass(frozen=True)
class Conversion:
    """What a conversion's record says."""

    source: Sha256  # the digest of the record of the checkpoint that was converted
    files: dict[str, FileRecord]  # by their names in the folder


def publish_conversion(working: Path, converted: Path, source: str) -> None:
    """Gives a finished conversion its record and its name, in place of an older one.

    Args:
        working: The folder that the converter wrote.
        converted: The name that it gets.
        source: Digest of the record of the checkpoint that was converted.

    Raises:
        OSError: The disk is full or fails.
    """
    files = {
        path.relative_to(working).as_posix(): FileRecord(path.stat().st_size, crc32_of(path))
        for path in sorted(working.rglob("*"))
        if path.is_file()
    }
    content = dataclasses.asdict(Conversion(source, files))
    (working / CONVERSION_NAME).write_bytes(signed_json({**content, "format_version": _VERSION}))
    if converted.exists():
        shutil.rmtree(converted)
    os.rename(working, converted)


def read_conversion(converted: Path) -> Conversion | None:
    """The record of a conversion; None where there is none that can be read, and it has to be made anew."""
    place = converted / CONVERSION_NAME
    try:
        content, _ = read_signed_json(place, read_bounded(place, RECORD_BYTES), _VERSION)
        return typed(Conversion, content, str(place))
    except (OSError, StoreError):
        return None
