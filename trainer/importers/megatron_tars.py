"""What all versions of Megatron-LM's tars have in common: names, members, and zstd around `torch.save`.

Members are read by name and never unpacked under their own: what a name says about folders does not matter.

Shapes: N positions, K most entries of a position.
"""

import json
import re
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.importers.document import NOT_LISTED, one_line
from sparsekd.trainer.importers.torch_file import load_tensors, numbers_of

if TYPE_CHECKING:
    import torch

TAR_NAME = re.compile(
    r"(?:cp(?P<cp>\d{1,9})_)?dp(?P<dp>\d{1,9})__(?P<first>\d{1,15})(?:-(?P<last>\d{1,15}))?\.tar"
)

NOT_KEPT = -999.0
"""Values at or below this mark entries outside of the nucleus: -1e3 and -1e4 are written."""

MOST_BYTES = 1 << 32
"""Of a member when it is unpacked: an iteration of one rank. 200 samples of 4,096 positions and 1,000 entries
have as many."""

MOST_JSON_BYTES = 1 << 26
READ_BYTES = 1 << 20


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> bytes:
    """Returns a member's bytes.

    Raises:
        StoreError: it is no plain file, or has another size than it says.
    """
    # A sparse member may claim any size without having its bytes: none is larger than its tar.
    if not member.isreg() or member.size > Path(str(tar.name)).stat().st_size:
        raise StoreError(f"{where} is no plain file of the tar: it is damaged; fetch it again.")
    content = tar.extractfile(member)
    data = content.read() if content is not None else b""
    if len(data) != member.size:
        raise StoreError(f"{where} has {len(data)} bytes, expected {member.size}: fetch it again.")
    return data


def check_end(file: Path) -> None:
    """Refuses a tar without its end, two blocks of zeros: tarfile takes one that was cut off for a shorter
    one."""
    with file.open("rb") as stream:
        stream.seek(max(file.stat().st_size - 2 * tarfile.BLOCKSIZE, 0))
        if stream.read() != bytes(2 * tarfile.BLOCKSIZE):
            raise StoreError(f"{file} is cut off: fetch it again.")


def read_json(data: bytes, where: str) -> dict[str, Any]:
    """Returns a JSON object.

    Raises:
        StoreError: it is none.
    """
    try:
        content = json.loads(data) if len(data) <= MOST_JSON_BYTES else None
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where} cannot be read as JSON ({one_line(error)}): fetch it again.") from error
    if not isinstance(content, dict):
        raise StoreError(f"{where} holds no JSON object of at most {MOST_JSON_BYTES:,} bytes.")
    return content


def unpack_tensors(data: bytes, folder: Path, where: str) -> dict[str, Any]:
    """Returns the dict that a member holds, its tensors mapped from a file in `folder`.

    Args:
        data: the member.
        folder: for the unpacked file, which may be removed while the tensors are in use.
        where: the member, for messages.

    Raises:
        StoreError: it is damaged, larger than any payload, or holds something else.
    """
    path = folder / f"{len(list(folder.iterdir()))}.pt"
    try:
        promised = zstandard.get_frame_parameters(data).content_size
        known = promised != zstandard.CONTENTSIZE_UNKNOWN
        written = promised if known and promised > MOST_BYTES else 0
        with path.open("wb") as out, zstandard.ZstdDecompressor().stream_reader(data) as reader:
            while written <= MOST_BYTES and (chunk := reader.read(READ_BYTES)):
                written += out.write(chunk)
    except zstandard.ZstdError as error:
        raise StoreError(f"{where} cannot be decompressed ({one_line(error)}): fetch it again.") from error
    except OSError as error:
        raise StoreError(
            f"{where} cannot be unpacked to {folder} ({error.strerror}): make room there, or set TMPDIR."
        ) from error
    if written > MOST_BYTES:
        raise StoreError(
            f"{where} unpacks to more than {MOST_BYTES:,} bytes: the file is damaged, or made to fill the "
            "disk."
        )
    if known and written != promised:
        raise StoreError(f"{where} unpacks to {written:,} bytes, expected {promised:,}: it is cut off.")
    payload = load_tensors(path, where)
    if not isinstance(payload, dict):
        raise StoreError(f"{where} holds a {type(payload).__name__}, expected a dict: it is no payload.")
    return payload


def tensor_of(payload: dict[str, Any], name: str, kind: str, where: str) -> "torch.Tensor":
    """Returns a payload's tensor.

    Args:
        payload: of a member.
        name: of the tensor.
        kind: of numbers it must hold: `integers`, or `fractions`.
        where: the member, for messages.

    Raises:
        StoreError: it is missing, or of another kind.
    """
    import torch

    found = payload.get(name)
    if not isinstance(found, torch.Tensor):
        raise StoreError(f"{where} lacks the tensor {name}: it is no member of Megatron-LM's tars.")
    if found.is_floating_point() != (kind == "fractions"):
        raise StoreError(f"{where}: {name} is {found.dtype}, expected {kind}.")
    return found


def listed(
    values: "torch.Tensor", low: "torch.Tensor", high: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns (ids, values), [N, K] each, `NOT_LISTED` outside of the nucleus.

    Args:
        values: log-probabilities [N, K].
        low: the ids' lower 16 bits, [N, K].
        high: their 17th bit, [N, K].
    """
    logprobs = numbers_of(values.contiguous()).astype(np.float64)
    ids = numbers_of(low.contiguous()).astype(np.int64) + (high.astype(np.int64) << 16)
    # A value that is no number is neither: it stays listed, and `put_in_order` refuses it by name.
    return np.where(logprobs <= NOT_KEPT, NOT_LISTED, ids), logprobs
