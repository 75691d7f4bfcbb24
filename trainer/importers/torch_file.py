"""Plain tensors out of a file that `torch.save` wrote, and nothing else that may be in it.

`torch.load(weights_only=True)` refuses a pickle that would run something. It does not bound what a pickle
makes; with torch 2.13: `bytearray(2**31)` is made, `_codecs.encode(text, "hex")` doubles a text as often as
it is called, a stride of 0 gives 2^40 elements out of 40 bytes, and no checksum is compared. So it is asked
last, for a file whose parts are not compressed, unharmed and name nothing but what plain tensors need; and no
tensor that comes out may have more elements than its storage. The file is mapped, so that only what is looked
at is read.
"""

import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.importers.document import one_line

if TYPE_CHECKING:
    import torch

MOST_PICKLE_BYTES = 1 << 24
"""Of `data.pkl`, which holds names, shapes and lists of numbers; tensors lie beside it."""

DTYPES = ("float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool")
STORAGES = ("Half", "BFloat16", "Float", "Double", "Byte", "Char", "Short", "Int", "Long", "Bool")
PLAIN = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch.storage UntypedStorage",
    *(f"torch {name}" for name in (*DTYPES, "uint16", "uint32", "uint64")),
    *(f"torch {name}Storage" for name in STORAGES),
}
"""What a pickle of plain tensors in dicts, lists and tuples names. Tensors of unsigned integers beyond 8 bits
have no storage class of their own, and are rebuilt from an untyped one with their dtype."""

CALLS_BY_OTHER_MEANS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "BUILD"}
"""Opcodes that name or make objects; plain tensors need GLOBAL and REDUCE alone."""


def load_tensors(path: Path, where: str) -> Any:
    """Returns the saved object, its tensors mapped from the file, which may be removed afterwards.

    Args:
        path: the file.
        where: its place, for messages.

    Raises:
        StoreError: it is no such file, damaged, or holds something else than plain tensors.
    """
    import torch

    try:
        _refuse_other_things(path, where)
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        for tensor in _tensors(loaded):
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise StoreError(
                    f"{where} is damaged (a tensor of shape {list(tensor.shape)} in "
                    f"{tensor.untyped_storage().nbytes()} bytes): fetch it again."
                )
    except StoreError:
        raise
    except Exception as error:  # damaged bytes may raise anything, and nothing of it is ours
        raise StoreError(f"{where} is damaged ({one_line(error)}): fetch it again.") from error
    return loaded


def numbers_of(tensor: "torch.Tensor") -> NDArray[Any]:
    """Returns a tensor's values; bfloat16 becomes float32, which numpy knows."""
    import torch

    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _refuse_other_things(path: Path, where: str) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1 or len({entry.filename for entry in entries}) != len(entries):
            raise StoreError(f"{where} is no file of torch.save: expected one data.pkl, and each name once.")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise StoreError(f"{where} is compressed inside, which torch.save never does: fetch it again.")
        if pickles[0].file_size > MOST_PICKLE_BYTES:
            raise StoreError(
                f"{where} has a data.pkl of {pickles[0].file_size:,} bytes, expected at most "
                f"{MOST_PICKLE_BYTES:,}: it holds more than tensors; save its tensors alone."
            )
        if harmed := archive.testzip():
            raise StoreError(f"{where} is damaged ({harmed} differs from its checksum): fetch it again.")
        content = archive.read(pickles[0])
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in CALLS_BY_OTHER_MEANS or (opcode.name == "GLOBAL" and argument not in PLAIN):
            name = str(argument).replace(" ", ".") if opcode.name == "GLOBAL" else opcode.name
            raise StoreError(
                f"{where} holds more than plain tensors ({name}): load it with torch and save its tensors "
                "alone."
            )


def _tensors(loaded: Any) -> Iterator["torch.Tensor"]:
    import torch

    # A pickle may name one list many times: each is looked into once.
    seen: set[int] = set()
    waiting = [loaded]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple):
            waiting.extend(item)
