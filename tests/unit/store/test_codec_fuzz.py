"""Bad bytes end in a clear error: every flipped byte of a row of every codec; lengths and sizes that lie.

Nothing may crash, hang, or take memory that the manifest's shapes do not ask for.
"""

import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic_stores import write_synthetic_store
from whole import whole_manifest, whole_row

from sparsekd.logit_store.checks import check_row
from sparsekd.logit_store.codecs.codec import CODECS, codec_of
from sparsekd.logit_store.codecs.frames import (
    PlaneError,
    compress_frame,
    decompress_frame,
    join_parts,
    split_parts,
)
from sparsekd.logit_store.codecs.frequency import compact_parameters
from sparsekd.logit_store.errors import DamagedStoreError, InvalidRowError
from sparsekd.logit_store.manifest import CodecSpec, Manifest
from sparsekd.logit_store.planes import names_of, planes_of
from sparsekd.logit_store.protocol.reader import open_store

KINDS = [*sorted(CODECS), "compact with mass"]
ZIPPED = [kind for kind in KINDS if kind != "plain"]


def _manifest(kind: str, **fields) -> Manifest:
    name, parameters = kind.split()[0], {}
    settings_ = {"sequence_length": 6, "vocabulary_size": 9, "k": 3, "n": 2, "temperatures": (1.0,)}
    if name == "compact":
        mass = 0.7 if "mass" in kind else None
        parameters = compact_parameters(np.arange(9), mass=mass, table_ids=4)
        settings_["n"] = 0 if mass else 2
    settings_["tail_logprobs"] = settings_["n"] > 0
    return whole_manifest(codec=CodecSpec(name, parameters), **settings_ | fields)


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_byte_of_a_shard_is_found_and_placed(tmp_path: Path, kind: str) -> None:
    manifest = _manifest(kind, splits=("train",), rows_per_shard=1, dataset={})
    write_synthetic_store(tmp_path / "store", manifest, {"train": 1}, seed=0)
    store = open_store(tmp_path / "store")
    commit = store.commit("train", 0)
    begin, length = int(commit.offsets[0]), int(commit.lengths[0])
    file = tmp_path / "store/shards/train/000/000000.arrow"
    whole = file.read_bytes()
    named = set()
    for offset in range(begin, begin + length):
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << offset % 8
        file.write_bytes(damaged)
        with pytest.raises(DamagedStoreError, match="split train, shard 000000, row 0") as caught:
            store.read_row("train", 0)
        if found := re.search(r"in plane (\w+), bytes", str(caught.value)):
            named.add(found[1])
    file.write_bytes(whole)
    store.read_row("train", 0)
    assert named == set(names_of(planes_of(manifest)))


@pytest.mark.parametrize("kind", ZIPPED)
def test_frames_find_every_flipped_bit_themselves(kind: str) -> None:
    """Without the crc32 of the row, too, zstd's checksums and the lengths of parts let nothing through."""
    manifest = _manifest(kind)
    codec = codec_of(manifest)
    row = whole_row(manifest, 0)
    stored = codec.encode(row, manifest)
    for plane, good in stored.items():
        for place in range(8 * len(good)):
            bad = bytearray(good)
            bad[place // 8] ^= 1 << place % 8
            try:
                decoded = codec.decode(stored | {plane: bytes(bad)}, manifest)
            except PlaneError as error:
                assert error.plane == plane
                continue
            # Bits of a frame's header that change nothing: the same content under another window size.
            assert codec.encode(decoded, manifest)[plane] == good, (plane, place)


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_and_extension_of_a_plane_is_refused(kind: str) -> None:
    manifest = _manifest(kind)
    codec = codec_of(manifest)
    stored = codec.encode(whole_row(manifest, 0), manifest)
    for plane, good in stored.items():
        for bad in [good[:length] for length in range(len(good))] + [good + b"\0", good + good]:
            if (
                kind == "plain"
                and plane.startswith("segment")
                and len(bad) % (4 if "starts" in plane else 8) == 0
            ):
                continue  # any number of segments is a plane; the rules of a row judge it
            if plane == "recorded" and not bad:
                continue  # then records stand where the loss counts; other planes have another size then
            with pytest.raises(PlaneError) as caught:
                codec.decode(stored | {plane: bad}, manifest)
            assert caught.value.plane == plane


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_made_up_planes_end_in_an_error_or_in_a_row_that_keeps_the_rules(kind: str, data) -> None:
    manifest = _manifest(kind)
    codec = codec_of(manifest)
    stored = codec.encode(whole_row(manifest, 0), manifest)
    plane = data.draw(st.sampled_from(sorted(stored)))
    content = st.binary(max_size=60)
    way = data.draw(st.sampled_from(["bytes", "frame", "parts", "same sizes"]))
    if way == "bytes":
        bad = data.draw(content)
    elif way == "frame":
        bad = compress_frame(data.draw(content))
    elif way == "parts" or kind in ("plain", "exact"):
        bad = join_parts(data.draw(st.lists(content, max_size=8)))
    else:  # sound frames of the right sizes, of which only the content is made up
        try:
            count = next(count for count in range(1, 12) if _is_split(stored[plane], count))
        except StopIteration:
            count = 0
        sizes = [
            len(decompress_frame(part, plane, None, at_most=999)) for part in _parts(stored[plane], count)
        ]
        bad = join_parts([data.draw(st.binary(min_size=size, max_size=size)) for size in sizes])
    try:
        row = codec.decode(stored | {plane: bad}, manifest)
        check_row(row, manifest, split="train", where="row")
    except (PlaneError, InvalidRowError):
        pass


def _is_split(stored: bytes, count: int) -> bool:
    try:
        split_parts(stored, "", count)
    except PlaneError:
        return False
    return True


def _parts(stored: bytes, count: int) -> list[memoryview]:
    return split_parts(stored, "", count) if count else []


def test_frames_are_judged_before_they_are_unpacked() -> None:
    good = compress_frame(bytes(1000))
    assert decompress_frame(good, "p", 1000, at_most=1000) == bytes(1000)
    bomb = compress_frame(bytes(1 << 26))
    unsized = zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compress(bytes(1000))
    unchecked = zstandard.ZstdCompressor(write_checksum=False).compress(bytes(1000))
    bad = bytearray(good)
    bad[-1] ^= 1  # the checksum itself
    for stored in (bomb, unsized, unchecked, bytes(bad), good + b"x", good[:-1], good[:3], b"", b"nonsense"):
        with pytest.raises(PlaneError) as caught:
            decompress_frame(stored, "head_ids", 1000, at_most=1000)
        assert caught.value.plane == "head_ids"


@pytest.mark.parametrize("kind", ZIPPED)
def test_lying_sizes_take_no_memory(kind: str) -> None:
    """A frame that claims or holds gigabytes, and lengths of 4 GiB, are refused from their headers."""
    manifest = _manifest(kind)
    codec = codec_of(manifest)
    stored = codec.encode(whole_row(manifest, 0), manifest)
    bomb = compress_frame(bytes(1 << 28))
    huge_length = (0xFFFFFFFF).to_bytes(4, "little") * 8
    tracemalloc.start()
    try:
        for plane in stored:
            for bad in (bomb, huge_length, len(bomb).to_bytes(4, "little") * 3 + bomb * 3):
                with pytest.raises(PlaneError):
                    codec.decode(stored | {plane: bad}, manifest)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("plane", "parts", "words"),
    [
        # 6 positions, one byte plane. Too many distinct ids; differences above 255; no numbers.
        ("tail_ids", [bytes([3] * 6), bytes(18)], "record 0 has 3 entries, at most 2 fit"),
        ("head_logprobs", [bytes(6)] * 4 + [bytes([200] * 12)], "sum to more than 255"),
        ("head_logprobs", [bytes(6), bytes([0x7E] * 6)] + [bytes(6)] * 2 + [bytes(12)], "has top nan"),
        ("head_logprobs", [bytes(6)] * 2 + [bytes(6), bytes([0x7C] * 6)] + [bytes(12)], "span inf"),
        ("head_logprobs", [bytes(6)] * 2 + [bytes(6), bytes([0xBC] * 6)] + [bytes(12)], "span -1.0"),
        ("head_logprobs", [bytes(6), bytes([0x3C] * 6)] + [bytes(6)] * 2 + [bytes(12)], "has top 1.0"),
    ],
)
def test_sound_frames_of_impossible_content_are_refused(plane: str, parts: list[bytes], words: str) -> None:
    manifest = _manifest("tkq8")
    codec = codec_of(manifest)
    stored = codec.encode(whole_row(manifest, 0), manifest)
    with pytest.raises(PlaneError, match=words):
        codec.decode(stored | {plane: join_parts(parts)}, manifest)


def test_a_number_above_the_vocabulary_is_refused() -> None:
    manifest = _manifest("compact")
    codec = codec_of(manifest)
    stored = codec.encode(whole_row(manifest, 0), manifest)
    for plane, size in (("token_ids", 6), ("head_ids", 18)):
        with pytest.raises(PlaneError, match="it holds 9, expected below 9"):
            codec.decode(stored | {plane: join_parts([bytes([9] * size)])}, manifest)


@pytest.mark.parametrize("kind", KINDS)
def test_segments_of_broken_width_are_refused(kind: str) -> None:
    manifest = _manifest(kind)
    codec = codec_of(manifest)
    stored = codec.encode(whole_row(manifest, 0), manifest)
    bad = bytes(3) if kind == "plain" else compress_frame(bytes(3))
    with pytest.raises(PlaneError, match=r"multiple of 4|at most 6 times 4"):
        codec.decode(stored | {"segment_starts": bad}, manifest)
