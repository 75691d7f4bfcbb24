"""Files of torch.save: every plain tensor, and nothing that runs, or grows, or lies."""

import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.importers.torch_file import load_tensors, numbers_of


def saved(folder: Path, value: Any) -> Path:
    torch.save(value, folder / "file.pt")
    return folder / "file.pt"


def made(folder: Path, pickled: bytes, storages: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """Writes a file as torch.save would, around any pickle."""
    with zipfile.ZipFile(folder / "made.pt", "w", method) as archive:
        archive.writestr("made/data.pkl", pickled)
        archive.writestr("made/byteorder", "little")
        archive.writestr("made/version", "3\n")
        for key, data in storages.items():
            archive.writestr(f"made/data/{key}", data)
    return folder / "made.pt"


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor_pickle(shape: list[int], stride: list[int]) -> bytes:
    """Returns the pickle of {"a": an int32 tensor of any shape in a storage of 10 elements}."""
    storage = b"(" + text("storage") + b"ctorch\nIntStorage\n" + text("0") + text("cpu") + number(10) + b"tQ"
    sizes = b"(" + b"".join(map(number, shape)) + b"t(" + b"".join(map(number, stride)) + b"t"
    rest = b"\x89ccollections\nOrderedDict\n)R"
    return (
        b"\x80\x02}"
        + text("a")
        + b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + number(0)
        + sizes
        + rest
        + b"tRs."
    )


def test_plain_tensors_come_out_as_they_went_in(tmp_path: Path) -> None:
    names = (
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "uint8",
        "int16",
        "uint16",
        "int32",
        "int64",
        "bool",
    )
    values = {name: torch.arange(24).reshape(2, 3, 4).to(getattr(torch, name)) for name in names}
    values |= {
        "turned": torch.arange(12).reshape(3, 4).T,
        "part": torch.arange(10)[3:7:2],
        "none": torch.zeros(0, 3),
    }
    path = saved(tmp_path, {"deep": [values], "number": 3, "text": "a", "nothing": None})
    found = load_tensors(path, "here")
    path.unlink()
    assert found["number"] == 3 and found["text"] == "a" and found["nothing"] is None
    for name, tensor in values.items():
        expected = tensor.float() if name == "bfloat16" else tensor
        np.testing.assert_array_equal(numbers_of(found["deep"][0][name]), expected.numpy())


@pytest.mark.parametrize(
    "value", [torch.nn.Linear(2, 2), print, torch.device("cpu"), {1, 2}, bytearray(b"a")]
)
def test_anything_else_is_refused_by_name(tmp_path: Path, value: Any) -> None:
    with pytest.raises(
        StoreError, match=r"^here holds more than plain tensors \([\w.]+\): load it with torch"
    ):
        load_tensors(saved(tmp_path, {"a": value}), "here")


def test_what_torch_would_make_of_a_few_bytes_is_not_made(tmp_path: Path) -> None:
    def message(pickled: bytes, method: int = zipfile.ZIP_STORED) -> str:
        with pytest.raises(StoreError) as caught:
            load_tensors(made(tmp_path, pickled, {"0": bytes(40)}, method), "here")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    good = tensor_pickle([10], [1])
    assert load_tensors(made(tmp_path, good, {"0": bytes(40)}), "here")["a"].tolist() == [0] * 10
    assert "[1099511627776] in 40 bytes" in message(tensor_pickle([1 << 40], [0]))
    assert "here is damaged" in message(tensor_pickle([1 << 33], [1]))
    assert "here is damaged" in message(tensor_pickle([10], [-1]))
    assert "builtins.bytearray" in message(b"\x80\x02cbuiltins\nbytearray\n" + number(1 << 40) + b"\x85R.")
    doubled = b"c_codecs\nencode\n" + text("aa") + text("latin1") + b"\x86R"
    for _ in range(40):
        doubled = b"c_codecs\nencode\n" + doubled + text("hex") + b"\x86R"
    assert "_codecs.encode" in message(b"\x80\x02" + doubled + b".")
    assert "os.system" in message(b"\x80\x02cos\nsystem\n" + text("echo") + b"\x85R.")
    assert "STACK_GLOBAL" in message(b"\x80\x04" + text("os") + text("system") + b"\x93.")
    assert "compressed inside" in message(good, zipfile.ZIP_DEFLATED)
    assert "data.pkl of" in message(b"\x80\x02" + text("a" * (1 << 24)) + b".")


def test_a_list_that_names_itself_a_million_times_is_looked_into_once(tmp_path: Path) -> None:
    value: Any = [torch.zeros(1)]
    for _ in range(60):
        value = [value, value]
    assert len(load_tensors(saved(tmp_path, value), "here")) == 2


def test_no_damage_raises_anything_but_a_sentence(tmp_path: Path) -> None:
    data = saved(tmp_path, {"a": torch.arange(100)}).read_bytes()
    refused = 0
    for place in range(0, len(data), 13):
        for wrong in (data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :], data[:place]):
            (tmp_path / "wrong.pt").write_bytes(wrong)
            try:
                found = load_tensors(tmp_path / "wrong.pt", "here")
            except StoreError as error:
                refused += 1
                assert str(error).startswith("here ") and "\n" not in str(error)
            else:  # what was hit is filling between parts
                assert found["a"].tolist() == list(range(100))
    assert refused > len(data) // 13
