"""The codec: what goes in comes out, bit for bit; bad frames are refused before they grow."""

import dataclasses

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsekd.logit_store.checks import check_row
from sparsekd.logit_store.codec import (
    PlaneError,
    codec_of,
    compress_frame,
    decompress_frame,
    smallest_unsigned,
)
from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import CodecSpec, Manifest
from sparsekd.logit_store.row import Row
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows


def assert_same_row(left: Row, right: Row) -> None:
    for name in ("token_ids", "loss_mask", "segment_starts", "segment_documents"):
        _assert_same(getattr(left, name), getattr(right, name), name)
    assert (left.teacher is None) == (right.teacher is None)
    if left.teacher is not None and right.teacher is not None:
        for field in dataclasses.fields(left.teacher):
            _assert_same(getattr(left.teacher, field.name), getattr(right.teacher, field.name), field.name)


def _assert_same(left: np.ndarray, right: np.ndarray, name: str) -> None:
    assert left.dtype == right.dtype and left.shape == right.shape, name
    assert left.tobytes() == right.tobytes(), name


def _round_trip(manifest: Manifest, row: Row) -> None:
    codec = codec_of(manifest)
    check_row(row, manifest, mass_tolerance=codec.mass_tolerance, where="row")
    stored = codec.encode(row, manifest)
    assert tuple(stored) == codec.planes(manifest)
    decoded = codec.decode(stored, manifest)
    assert_same_row(row, decoded)
    assert all(array.flags.writeable for array in (decoded.token_ids, decoded.segment_starts))
    assert codec.encode(decoded, manifest) == stored


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    vocabulary=st.sampled_from([1, 2, 3, 255, 256, 257, 1000]),
    length=st.integers(1, 20),
    k=st.integers(0, 8),
    n=st.sampled_from([0, 1, 2, 12, 255, 256]),
    grid=st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=1, max_size=4, unique=True).map(sorted),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_round_trip(vocabulary, length, k, n, grid, seed, data) -> None:
    manifest = synthetic_manifest(
        vocabulary_size=vocabulary,
        sequence_length=length,
        k=min(k, vocabulary),
        n=n,
        temperatures=tuple(grid),
        draw_temperature=data.draw(st.sampled_from(grid)),
    )
    for row in synthetic_rows(manifest, 2, seed):
        _round_trip(manifest, row)


@pytest.mark.parametrize("vocabulary", [65_535, 65_536, 65_537, 262_144])
def test_round_trip_around_the_id_widths(vocabulary: int) -> None:
    manifest = synthetic_manifest(vocabulary_size=vocabulary, sequence_length=3, k=2, n=3)
    row = synthetic_rows(manifest, 1, 0)[0]
    assert row.teacher is not None
    row.token_ids[:] = [0, vocabulary - 1, vocabulary // 2]
    row.teacher.head_ids[1] = [vocabulary - 2, 0]
    row.teacher.tail_ids[1] = [1, vocabulary - 1, -1]
    row.teacher.tail_counts[1] = [1, 2, 0]
    _round_trip(manifest, row)


def test_extremes_survive() -> None:
    manifest = synthetic_manifest(vocabulary_size=8, sequence_length=4, k=3, n=2)
    row = synthetic_rows(manifest, 1, 0)[0]
    assert row.teacher is not None
    # Position 0: certainty, an empty rest and ids of probability 0. Position 1: all values equal; subnormals.
    row.teacher.head_ids[:2] = [[2, 0, 1], [0, 1, 2]]
    row.teacher.head_logprobs[:2] = [[0.0, -np.inf, -np.inf], [-np.log(8)] * 3]
    row.teacher.log_rest[0], row.teacher.rest_entropy[0] = -np.inf, 0.0
    row.teacher.tail_ids[0], row.teacher.tail_counts[0] = -1, 0
    row.teacher.tail_ids[1], row.teacher.tail_counts[1] = [3, 4], [1, 1]
    row.teacher.log_rest[1] = np.log(5 / 8)
    row.teacher.entropy[0] = 1e-42
    _round_trip(manifest, row)


def test_sizes_of_stored_integers() -> None:
    found = [smallest_unsigned(largest).str for largest in (0, 255, 256, 65_535, 65_536, 2**31 - 1)]
    assert found == ["|u1", "|u1", "<u2", "<u2", "<u4", "<u4"]


def test_unknown_codec_and_parameters_are_named() -> None:
    with pytest.raises(StoreError, match=r"'brotli'.*exact"):
        codec_of(synthetic_manifest(codec=CodecSpec("brotli", {})))
    with pytest.raises(StoreError, match="level"):
        codec_of(synthetic_manifest(codec=CodecSpec("exact", {"level": 3})))


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


def test_segments_of_broken_width_are_refused() -> None:
    manifest = synthetic_manifest()
    codec = codec_of(manifest)
    stored = codec.encode(synthetic_rows(manifest, 1, 0)[0], manifest)
    with pytest.raises(PlaneError, match="multiple of 4"):
        codec.decode(stored | {"segment_starts": compress_frame(bytes(3))}, manifest)
