"""Ways to the bytes: a file cut short under its reader, mapped files, and a store of 20,000 shards."""

import hashlib
import os
import re
import signal
import struct
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.errors import DamagedStoreError, StoreError
from sparsekd.logit_store.json_text import signed_json
from sparsekd.logit_store.manifest import manifest_digest
from sparsekd.logit_store.planes import names_of, planes_of
from sparsekd.logit_store.protocol.commit import RowCounts
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.synthetic import synthetic_manifest

SHARDS, ROWS_PER_SHARD = 1_000_000, 256
LARGEST_BYTES = 20 * 10**6

# The look before each touch is taken away: this is the moment between the two.
READER = """
import sys
from sparsekd.logit_store.places import access
from sparsekd.logit_store.errors import DamagedStoreError
from sparsekd.logit_store.protocol.reader import open_store
store = open_store(sys.argv[1], access=sys.argv[2])
store.read_row("train", 0)
print("read", flush=True)
sys.stdin.readline()
if sys.argv[2] == "mapped":
    class Stat: st_size = next(len(m) for place, m in store._access._maps.items() if place.suffix == '.arrow')
    access.os.stat = lambda place: Stat
try:
    store.read_row("train", 1)
except DamagedStoreError as error:
    print(error)
"""

OPENER = """
import resource, sys, time, tracemalloc
from sparsekd.logit_store.protocol.commit import RowCounts
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.synthetic import synthetic_manifest
open_store(sys.argv[2])  # imports are not the store's
def resident():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))
before, began = resident(), time.perf_counter()
store = open_store(sys.argv[1])
seconds, kept = time.perf_counter() - began, resident() - before
assert store.rows("train") == int(sys.argv[3])
del store
tracemalloc.start()
store = open_store(sys.argv[1])
print(seconds, kept, *tracemalloc.get_traced_memory(), flush=True)
"""


def _run(program: str, *words: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )


@pytest.mark.parametrize("access", ["positional", "mapped"])
def test_a_file_cut_short_kills_only_a_reader_that_maps_it(tmp_path: Path, access: str) -> None:
    path = tmp_path / "store"
    manifest = synthetic_manifest(sequence_length=512)  # rows of more than a page
    write_synthetic_store(path, manifest, {"train": 3}, seed=0)
    reader = _run(READER, path, access)
    assert reader.stdout is not None and reader.stdout.readline() == "read\n"
    os.truncate(path / "shards/train/000/000000.arrow", 4096)
    said, _ = reader.communicate("go on\n", timeout=60)
    if access == "positional":
        assert reader.returncode == 0
        assert re.search(r"row 1: 000000\.arrow has 4096 bytes, expected \d+ or more", said)
    else:
        assert reader.returncode == -signal.SIGBUS, "why mapping has to be asked for"


def test_mapped_files_give_the_same_rows_and_the_same_errors(tmp_path: Path) -> None:
    path = tmp_path / "store"
    write_synthetic_store(path, synthetic_manifest(), {"train": 7, "heldout": 2}, seed=0)
    plain, mapped = open_store(path), open_store(path, access="mapped")
    for index in range(7):
        assert bytes(mapped.read_message("train", index)) == plain.read_message("train", index)
        assert (mapped.read_row("train", index).token_ids == plain.read_row("train", index).token_ids).all()
    shard = path / "shards/train/000/000001.arrow"
    whole = shard.read_bytes()
    middle = int(plain.commit("train", 1).offsets[1]) + int(plain.commit("train", 1).lengths[1]) // 2
    for content in (whole[:middle] + b"\xff\x00" + whole[middle + 2 :], whole[:middle], b""):
        shard.write_bytes(content)
        said = []
        for store in (plain, mapped, open_store(path, access="mapped")):
            with pytest.raises(DamagedStoreError, match=r"shard 000001, row 4") as caught:
                store.read_row("train", 4)
            said.append(str(caught.value))
        assert len(set(said)) == 1
    shard.unlink()
    with pytest.raises(DamagedStoreError, match=r"000001\.arrow is missing"):
        mapped.read_row("train", 4)
    with pytest.raises(StoreError, match="'by magic': local stores are read positional or mapped"):
        open_store(path, access="by magic")


def test_a_million_shards_are_opened_in_little_memory(tmp_path: Path) -> None:
    manifest = synthetic_manifest(rows_per_shard=ROWS_PER_SHARD)
    write_synthetic_store(tmp_path / "small", manifest, {"train": 1}, seed=0)
    path = tmp_path / "large"
    (path / "index").mkdir(parents=True)
    (path / "MANIFEST.json").write_bytes((tmp_path / "small/MANIFEST.json").read_bytes())
    rows = SHARDS * ROWS_PER_SHARD
    none = {
        "counts": dict.fromkeys((field.name for field in fields(RowCounts)), 0),
        "plane_bytes": dict.fromkeys(names_of(planes_of(manifest)), 0),
        "file_bytes": 0,
        "rows": 0,
        "shards": 0,
        "table_sha256": hashlib.sha256().hexdigest(),
    }
    counts = none["counts"] | {"tokens": rows * manifest.sequence_length}
    sha256 = "ab" * 32
    large = {"counts": counts, "rows": rows, "shards": SHARDS, "table_sha256": sha256}
    # Where it is read its entries are as they would be; the rest is a hole in the file.
    with open(path / f"index/train-{sha256[:16]}.bin", "wb") as table:
        table.truncate(20 * rows + 32 * SHARDS)
        table.seek(20 * (rows - 1))
        table.write(struct.pack("<QIII", 8, 200, 1234, 7))
        table.seek(20 * rows + 32 * (SHARDS - 1))
        table.write(b"\x17" * 32)
    content = {
        "format_version": 1,
        "manifest_sha256": manifest_digest(manifest),
        "splits": {"train": none | large, "heldout": none},
    }
    (path / "INDEX.json").write_bytes(signed_json(content))
    assert open_store(path).counted("train", rows - 2, rows).tolist() == [0, 7]
    with pytest.raises(DamagedStoreError, match=r"999999\.arrow is missing"):
        open_store(path).read_row("train", rows - 1)
    opener = _run(OPENER, path, tmp_path / "small", rows)
    said, errors = opener.communicate(timeout=120)
    assert opener.returncode == 0, errors
    seconds, resident, kept, peak = (float(word) for word in said.split())
    print(
        f"{SHARDS:,} shards, {rows:,} rows: opened in {seconds:.3f} s; {kept / 1e6:.1f} MB kept, "
        f"{peak / 1e6:.1f} MB at most while opening; resident memory grew by {resident / 1e6:.1f} MB"
    )
    assert max(resident, kept, peak) < LARGEST_BYTES
