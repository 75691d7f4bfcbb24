"""Files of torch.save, read without torch: every plain tensor, and nothing else."""

import io
from typing import Any

import numpy as np
import pytest
import torch

from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.importers.torch_archive import load_torch_archive


def test_only_plain_tensors_come_out_of_a_torch_archive() -> None:
    def saved(value: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()

    values = {
        name: torch.arange(24).reshape(2, 3, 4).to(getattr(torch, name))
        for name in (
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
    }
    values |= {
        "turned": torch.arange(12).reshape(3, 4).T,
        "part": torch.arange(10)[3:7:2],
        "none": torch.zeros(0, 3),
    }
    found = load_torch_archive(saved({"deep": [values]}), "here")["deep"][0]
    for name, tensor in values.items():
        np.testing.assert_array_equal(
            found[name], tensor.float().numpy() if name == "bfloat16" else tensor.numpy()
        )
    for value in (torch.nn.Linear(2, 2), print, torch.device("cpu")):
        with pytest.raises(StoreError, match="more than plain tensors"):
            load_torch_archive(saved({"a": value}), "here")
    data = saved({"a": torch.arange(100)})
    for place in range(0, len(data), 41):
        spoilt = data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]
        for wrong in (spoilt, data[:place]):
            try:
                load_torch_archive(wrong, "here")
            except StoreError as error:
                assert "here" in str(error)
