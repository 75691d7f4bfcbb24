"""Megatron-LM's caches of versions 1 to 3, from files that are written here from the layouts' description."""

import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.importers.document import Document, Options
from sparsekd.trainer.importers.megatron import listed_samples, open_megatron, read_megatron

sys.path.append(str(Path(__file__).parent))
import captures
import captures_megatron as megatron
from captures_megatron import LENGTH, SAMPLES


def no_tokenizer() -> Any:
    raise AssertionError("nothing here needs a tokenizer")


def read(folder: Path) -> list[Document]:
    return list(read_megatron(folder, Options(tokenizer=no_tokenizer)).documents())


@pytest.mark.parametrize("version", [1, 2])
def test_samples_come_in_the_order_of_the_run(tmp_path: Path, version: int) -> None:
    # Ids on both sides of 2^16, whose 17th bit lies apart.
    offset = 2**16 - captures.V // 2
    megatron.write_megatron(tmp_path / "tars", 3, version, offset)
    found = list(listed_samples(open_megatron(tmp_path / "tars")))
    assert len(found) == 3 * SAMPLES
    for number, listed in enumerate(found):
        ids, values = megatron.sample(number, offset=offset)
        np.testing.assert_array_equal(listed.ids, ids)
        kept = ids >= 0
        np.testing.assert_allclose(listed.values[kept], values[kept], rtol=1e-3)


def test_version_3_holds_its_tokens(tmp_path: Path) -> None:
    offset = 2**16 - captures.V // 2
    megatron.write_paired(tmp_path / "cache", 3, offset=offset)
    source = read_megatron(tmp_path / "cache", Options(tokenizer=no_tokenizer))
    assert source.rest == "derived" and source.tokens is None and len(source.files) == 4
    assert source.details["megatron"]["generation"] == "run"
    found = list(source.documents())
    assert len(found) == 3 * SAMPLES
    for number, document in enumerate(found):
        tokens, _ = captures.dense(LENGTH + 1, 100 + number)
        np.testing.assert_array_equal(document.token_ids, tokens)
        # The first label of each sample is masked (and -100); the last one is the document's last token.
        assert document.loss_mask.tolist() == [False] + [True] * (LENGTH - 1) + [False]
        ids, values = megatron.sample(number, offset=offset)
        np.testing.assert_array_equal(document.head_ids[:-1], ids)
        kept = ids >= 0
        np.testing.assert_allclose(document.head_logprobs[:-1][kept], values[kept], rtol=1e-3)
        assert document.weights is None


def test_version_3_s_documents_end_where_attention_was_cut(tmp_path: Path) -> None:
    megatron.write_paired(tmp_path / "packed", 1, borders=[0, 10, LENGTH])
    found = read(tmp_path / "packed")
    assert len(found) == 2 * SAMPLES
    tokens, _ = captures.dense(LENGTH + 1, 100)
    # Each ends with the label of its last position, which another document may begin with.
    np.testing.assert_array_equal(found[0].token_ids, tokens[:11])
    np.testing.assert_array_equal(found[1].token_ids, tokens[10:])
    np.testing.assert_array_equal(found[1].head_ids[:-1], megatron.sample(0)[0][10:])

    def close(inputs: dict[str, Any], targets: dict[str, Any]) -> None:
        ends = inputs["tokens"].view(-1, LENGTH)
        ends[:, 6] = captures.EOS
        inputs["labels"].view(-1, LENGTH)[:, 5] = captures.EOS

    megatron.write_paired(tmp_path / "reset", 1, edit=close, reset_attention_mask=True)
    found = read(tmp_path / "reset")
    assert len(found) == 2 * SAMPLES and [len(item.token_ids) for item in found[:2]] == [8, LENGTH - 6]
    megatron.write_paired(tmp_path / "kept", 1, edit=close)
    assert len(read(tmp_path / "kept")) == SAMPLES


def test_fractional_weights_are_kept_in_documents(tmp_path: Path) -> None:
    def weigh(inputs: dict[str, Any], targets: dict[str, Any]) -> None:
        weights = inputs["loss_mask"].float()
        weights[2] = 0.25
        inputs["loss_mask"] = weights

    megatron.write_paired(tmp_path / "cache", 1, edit=weigh)
    document = read(tmp_path / "cache")[0]
    assert document.weights is not None
    assert document.weights.tolist() == [0, 1, 0.25] + [1] * (LENGTH - 3) + [0]


def test_damage_of_versions_1_and_2_is_named(tmp_path: Path) -> None:
    def message(change: Callable[[Path], Any], version: int = 2) -> str:
        folder = tmp_path / f"tars{len(list(tmp_path.iterdir()))}"
        megatron.write_megatron(folder, 5, version)
        change(folder)
        with pytest.raises(StoreError) as caught:
            list(listed_samples(open_megatron(folder)))
        return str(caught.value)

    def cut(folder: Path) -> None:
        file = folder / "dp1__16-32.tar"
        file.write_bytes(file.read_bytes()[:1500])

    def spoil(folder: Path) -> None:
        file = folder / "dp1__16-32.tar"
        data = bytearray(file.read_bytes())
        place = data.find(b"\x28\xb5\x2f\xfd") + 40
        data[place : place + 60] = bytes(60)
        file.write_bytes(bytes(data))

    def remove(pattern: str) -> Callable[[Path], Any]:
        return lambda folder: [item.unlink() for item in folder.glob(pattern)]

    def replace(data: bytes) -> Callable[[Path], Any]:
        meta = {"saver": {"format_version": 2, "mbs_save": megatron.MICRO}}
        return lambda folder: [
            remove("*.tar")(folder),
            megatron.write_tar(
                folder / "dp0__0-8.tar", {"_meta.json": json.dumps(meta).encode(), "0-8.pt.zst": data}
            ),
        ]

    assert "which is missing" in message(remove("dp?__16-32.tar"))
    assert "a rank lacks one" in message(remove("dp1__16-32.tar"))
    assert "ends before" in message(remove("dp1__32-40.tar"))
    assert "no tar of data-parallel rank 0" in message(remove("dp0*"))
    assert "2 wrote them" in message(remove("dp1*"))
    assert "context-parallel rank 1" in message(
        lambda folder: (folder / "cp0_dp0__1.tar").rename(folder / "cp1_dp0__1.tar"), 1
    )
    assert "is no name of" in message(lambda folder: (folder / "other.tar").write_text(""))
    assert "dp1__16-32.tar" in message(cut)
    assert "dp1__16-32.tar" in message(spoil)
    good = {
        "values": torch.zeros(LENGTH, 2, 4),
        "indices_low": torch.zeros(LENGTH, 2, 4, dtype=torch.uint16),
        "bit_17": torch.zeros(LENGTH, 2, 4, dtype=torch.bool),
    }
    assert "0-8.pt.zst cannot be decompressed" in message(replace(b"no zstd"))
    assert "0-8.pt.zst unpacks to" in message(replace(megatron.saved(good)[:-200]))
    assert "holds a list, expected a dict" in message(replace(megatron.saved([1])))
    assert "lacks the tensor values" in message(replace(megatron.saved({})))
    assert "holds more than plain tensors" in message(replace(megatron.saved({**good, "values": print})))
    assert "bit_17 is torch.float32, expected integers" in message(
        replace(megatron.saved({**good, "bit_17": torch.zeros(LENGTH, 2, 4)}))
    )
    assert "have shapes" in message(replace(megatron.saved({**good, "values": torch.zeros(LENGTH, 2, 5)})))
    assert "are no micro-batches of 2" in message(
        replace(megatron.saved({name: tensor[:, :1] for name, tensor in good.items()}))
    )


def test_damage_of_version_3_is_named(tmp_path: Path) -> None:
    def message(change: Callable[[Path], Any] | None = None, **written: Any) -> str:
        folder = tmp_path / f"cache{len(list(tmp_path.iterdir()))}"
        megatron.write_paired(folder, 4, **written)
        if change is not None:
            change(folder)
        with pytest.raises(StoreError) as caught:
            read(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def described(record: int = 0, **fields: Any) -> Callable[[Path], None]:
        """Changes a record in a tar's description."""

        def change(folder: Path) -> None:
            file = folder / "dp1__0-16.tar.ready.json"
            content = json.loads(file.read_text())
            content["records"][record].update(fields)
            file.write_text(json.dumps(content))

        return change

    def flip(folder: Path) -> None:
        file = folder / "dp1__0-16.tar"
        data = bytearray(file.read_bytes())
        with tarfile.open(file) as tar:
            data[tar.getmembers()[2].offset_data + 50] ^= 1
        file.write_bytes(bytes(data))

    def tensors(kind: int, **changed: Any) -> megatron.Edit:
        def change(inputs: dict[str, Any], targets: dict[str, Any]) -> None:
            (inputs, targets)[kind].update(changed)

        return change

    total = 4 * LENGTH
    assert "0-8.targets.pt.zst differs from its checksum" in message(flip)
    assert "dp1__16-32.tar.ready.json, so it was not finished" in message(
        lambda folder: (folder / "dp1__16-32.tar.ready.json").unlink()
    )
    assert "fetch that of rank 1" in message(lambda folder: (folder / "dp1__0-16.tar").unlink())
    assert "come behind sample 0" in message(
        lambda folder: [item.unlink() for item in folder.glob("dp?__0-16.tar")]
    )
    assert "is of another run" in message(
        lambda folder: (folder / "_v3_cache.json").write_text(
            (folder / "_v3_cache.json").read_text().replace('"run"', '"walk"')
        )
    )
    assert "_v3_cache.json cannot be read" in message(lambda folder: (folder / "_v3_cache.json").unlink())
    assert "cannot be read as JSON" in message(
        lambda folder: (folder / "dp1__0-16.tar.ready.json").write_text("[" * 100_000)
    )
    assert "sample_ids are not those of rank 1" in message(described(sample_ids=[0, 1, 4, 5]))
    assert "sample_ids are not those of rank 1" in message(described(end=9))
    assert "record 1 begins with sample 12, expected 8" in message(described(1, start=12))
    assert "start is '0', expected an integer" in message(described(start="0"))
    path = {"member": "../../../etc/passwd", "size": 1, "sha256": "0"}
    assert "no description of the member 0-8.inputs.pt.zst" in message(described(inputs=path))
    assert "is the record 'run:dp1:0', expected 'other' of version 3" in message(described(record_id="other"))
    assert "describes 'x.tar', expected dp" in message(
        lambda folder: (folder / "dp1__0-16.tar.ready.json").write_text(json.dumps({"tar": "x.tar"}))
    )
    assert "tokens has shape [3], expected" in message(edit=tensors(0, tokens=torch.zeros(3).int()))
    assert "tokens is torch.float32" in message(edit=tensors(0, tokens=torch.zeros(total)))
    assert "sample_offsets are not 5 ascending" in message(
        edit=tensors(0, sample_offsets=torch.zeros(5).int())
    )
    assert "values, indices_low and bit_17 have shapes" in message(
        edit=tensors(1, bit_17=torch.zeros(3, dtype=torch.uint8))
    )
    assert "cu_seqlens does not ascend from 0 to 23" in message(borders=[0, 12, 10, LENGTH])
    assert "cu_seqlens is no list" in message(edit=tensors(0, cu_seqlens=3))
    assert "is no weight" in message(edit=tensors(0, loss_mask=torch.full((total,), float("nan"))))
    assert "the label is 7, but the next token is" in message(
        edit=tensors(0, labels=torch.full((total,), 7).int())
    )
    assert "mbs_save is 0, expected an integer from 1" in message(mbs_save=0)
    with pytest.raises(StoreError, match="version 4 of Megatron-LM's tars; 1, 2 and 3 are read"):
        megatron.write_tar(tmp_path / "dp0__8.tar", {"_meta.json": b'{"format_version": 4}'})
        read(tmp_path / "dp0__8.tar")


def test_members_are_plain_files(tmp_path: Path) -> None:
    def message(make: Callable[[tarfile.TarInfo], None]) -> str:
        meta = {"saver": {"format_version": 2, "mbs_save": megatron.MICRO}}
        folder = tmp_path / f"tars{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        megatron.write_tar(folder / "dp0__0-8.tar", {"_meta.json": json.dumps(meta).encode()})
        with tarfile.open(folder / "dp0__0-8.tar", "a") as tar:
            info = tarfile.TarInfo("0-8.pt.zst")
            make(info)
            tar.addfile(info)
        with pytest.raises(StoreError) as caught:
            list(listed_samples(open_megatron(folder)))
        return str(caught.value)

    def linked(info: tarfile.TarInfo) -> None:
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"

    def sparse(info: tarfile.TarInfo) -> None:
        # A hole of a terabyte, without a byte behind it.
        info.pax_headers = {
            "GNU.sparse.major": "0",
            "GNU.sparse.minor": "1",
            "GNU.sparse.size": str(1 << 40),
            "GNU.sparse.map": f"{1 << 40},0",
            "GNU.sparse.name": "0-8.pt.zst",
        }

    assert "0-8.pt.zst is no plain file of the tar" in message(linked)
    assert "0-8.pt.zst is no plain file of the tar" in message(sparse)
