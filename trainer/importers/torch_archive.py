"""Arrays out of a file that `torch.save` wrote, without torch and without running anything that is in it.

Layout, as of torch 1.6 to 2.13: a zip archive, not compressed, with one folder: `data.pkl`, a pickle of the
object in which each tensor is a call of `torch._utils._rebuild_tensor_v2` (or `_v3`, which adds the dtype:
for those without a storage class of their own, such as uint16) on (storage, offset, shape, strides, ...), and
each storage a persistent id ("storage", class, key, device, elements); `data/KEY`, the bytes of a storage;
`byteorder`. Only what plain tensors in dicts, lists and tuples need is known to the reader; anything else is
refused by name, so a pickle can call nothing here.
"""

import collections
import io
import math
import pickle
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.errors import StoreError

DTYPES = {
    "float16": "<f2",
    "bfloat16": "<u2",
    "float32": "<f4",
    "float64": "<f8",
    "uint8": "u1",
    "int8": "i1",
    "int16": "<i2",
    "uint16": "<u2",
    "int32": "<i4",
    "uint32": "<u4",
    "int64": "<i8",
    "uint64": "<u8",
    "bool": "?",
}
STORAGES = {
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "BoolStorage": "bool",
}
UNTYPED = "untyped"


@dataclass(frozen=True)
class _Name:
    """A dtype or a storage class of torch, by its name."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """The bytes of a storage and what they are."""

    data: bytes
    dtype: str


def load_torch_archive(data: bytes, where: str) -> Any:
    """Returns the saved object, its tensors as numpy arrays; bfloat16 becomes float32.

    Args:
        data: the file.
        where: its place, for messages.

    Raises:
        StoreError: it is no such archive, damaged, or holds something else than plain tensors.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            pickles = [name for name in names if name.endswith("/data.pkl") or name == "data.pkl"]
            if len(pickles) != 1:
                raise StoreError(f"{where} is no file of torch.save: it has no data.pkl.")
            folder = pickles[0][: -len("data.pkl")]
            order = archive.read(folder + "byteorder") if folder + "byteorder" in names else b"little"
            if order != b"little":
                raise StoreError(f"{where} was saved on a big-endian machine: save it again on another.")
            return _Reader(archive, folder, archive.read(pickles[0])).load()
    except StoreError:
        raise
    except pickle.UnpicklingError as error:
        raise StoreError(
            f"{where} holds more than plain tensors ({error}): load it with torch and save its tensors alone."
        ) from error
    except Exception as error:  # damaged bytes may raise anything, and nothing of it is ours
        raise StoreError(f"{where} is damaged ({type(error).__name__}: {error}): fetch it again.") from error


class _Reader(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, folder: str, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("torch._utils", "_rebuild_tensor_v3"):
            return _rebuild_typed
        if module in ("torch", "torch.storage") and name in STORAGES:
            return _Name(STORAGES[name])
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return _Name(UNTYPED)
        if module == "torch" and name in DTYPES:
            return _Name(name)
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, name, key = pid[0], pid[1], pid[2]
        if kind != "storage" or not isinstance(name, _Name) or not str(key).isalnum():
            raise pickle.UnpicklingError(f"the persistent id {pid!r}")
        return _Storage(self._archive.read(f"{self._folder}data/{key}"), name.name)


def _rebuild(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> NDArray[Any]:
    return _tensor(storage.data, storage.dtype, offset, tuple(shape), tuple(strides))


def _rebuild_typed(
    storage: _Storage, offset: int, shape: Any, strides: Any, gradient: Any, hooks: Any, dtype: _Name, *_: Any
) -> NDArray[Any]:
    return _tensor(storage.data, dtype.name, offset, tuple(shape), tuple(strides))


def _tensor(
    data: bytes, dtype: str, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> NDArray[Any]:
    values = np.frombuffer(data, DTYPES[dtype])
    if len(shape) != len(strides) or min((*shape, *strides, offset), default=0) < 0:
        raise ValueError(f"a tensor of shape {shape} and strides {strides}")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and (last >= values.size or math.prod(shape) > values.size):
        raise ValueError(f"a tensor of shape {shape} in a storage of {values.size} elements")
    if math.prod(shape) == 0:
        array = np.empty(shape, values.dtype)
    else:
        steps = tuple(stride * values.itemsize for stride in strides)
        array = np.lib.stride_tricks.as_strided(values[offset:], shape, steps).copy()
    if dtype == "bfloat16":  # the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array
