"""Which relative names a listing may give. A store may come from a stranger, and so may the names in it."""

import re

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.places.paths import StorePath

PART_BYTES = 255
"""Longest file name of ext4, XFS, NFS and APFS, in UTF-8."""

NAME_BYTES = 1024
"""Longest key of S3 and of GCS; so no folder is nested more than 512 deep."""

_DRIVE = re.compile(r"[A-Za-z]:")

_LETTERS_SHOWN = 100


def admitted_name(name: str, folder: StorePath) -> str:
    """Returns a name, relative to a folder and with `/`, that stays below the folder wherever it is joined.

    Every listing of a store's files and every file of a tokenizer folder goes through here, before the
    first byte of a file is read.

    Args:
        name: as the file system lists it.
        folder: whose listing it is, for the message.

    Raises:
        StoreError: it might mean a place outside, or another file system could not hold it.
    """
    fault = _fault(name)
    if fault is None:
        return name
    shown = repr(name if len(name) <= _LETTERS_SHOWN else name[:_LETTERS_SHOWN] + "...")
    raise StoreError(
        f"{folder} lists a file named {shown}, which {fault}: no store and no tokenizer needs such a name; "
        "if you were given it so, do not use it, else remove the file."
    )


def name_below(place: str, key: str, folder: StorePath) -> str:
    """Returns the admitted name, relative to a folder, of a place that its file system lists.

    Args:
        place: as the file system names it, from its root.
        key: the folder's place in the same form; empty for the root.
        folder: for the message.
    """
    start = f"/{key.strip('/')}/" if key.strip("/") else "/"
    # One that is not below the folder keeps its slash, and is refused.
    return admitted_name(f"/{place.removeprefix('/')}".removeprefix(start), folder)


def _fault(name: str) -> str | None:
    """Says what is wrong with a name; None where nothing is."""
    parts = name.split("/")
    if not name.isprintable():  # NUL and line ends, and the surrogates that stand for what is not UTF-8
        return "has characters that do not print"
    if "\\" in name:
        return "has a backslash"
    if name.startswith("/") or any(_DRIVE.match(part) for part in parts):
        return "is an absolute place"
    if "" in parts:
        return "has an empty part"
    if "." in parts or ".." in parts:
        return "has a part that means another folder"
    if any(len(part.encode()) > PART_BYTES for part in parts):
        return f"has a part of more than {PART_BYTES} bytes"
    if len(name.encode()) > NAME_BYTES:
        return f"has more than {NAME_BYTES:,} bytes"
    return None
