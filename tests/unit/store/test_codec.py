"""Every codec: ids and counts come out as they went in, values within the errors that the format states."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from whole import whole_manifest, whole_row, whole_rows

from sparsekd.logit_store.checks import check_row
from sparsekd.logit_store.codecs import plain as codec_plain
from sparsekd.logit_store.codecs import tkq8 as codec_tkq8
from sparsekd.logit_store.codecs.codec import (
    CODECS,
    DEFAULT_CODEC,
    codec_of,
    stored_record,
)
from sparsekd.logit_store.codecs.faithful import first_difference
from sparsekd.logit_store.codecs.frames import PlaneError
from sparsekd.logit_store.codecs.frequency import compact_parameters, mass_of, renumbering_of
from sparsekd.logit_store.codecs.pieces import smallest_unsigned
from sparsekd.logit_store.codecs.ragged import join_rest
from sparsekd.logit_store.errors import InvalidRowError, StoreError
from sparsekd.logit_store.manifest import CodecSpec, Manifest
from sparsekd.logit_store.planes import names_of, planes_of
from sparsekd.logit_store.row import NO_ID, Row, TeacherRecord, planes_of_row
from sparsekd.logit_store.synthetic import synthetic_rows
from sparsekd.logit_store.synthetic_text import text_like_rows

EXACT_PLANES = ("token_ids", "loss_mask", "segment_starts", "segment_documents")

VOCABULARIES = [1, 2, 3, 255, 256, 257, 65_535, 65_536, 65_537, 131_072, 151_936, 262_144]
"""Where the number of byte planes and bit planes changes, and the sizes of real tokenizers."""


def codec_spec(name: str, vocabulary: int, mass: float | None = None) -> CodecSpec:
    """A codec with its parameters; `compact` gets a table of up to 300 ids, which are not the lowest."""
    if name != "compact":
        return CodecSpec(name, {})
    counts = (np.arange(vocabulary) * 7) % 1000
    return CodecSpec(name, compact_parameters(counts, mass=mass, table_ids=300))


def assert_round_trip(manifest: Manifest, row: Row) -> Row:
    """Encodes and decodes a row, and holds it against the promises of the format; returns it decoded."""
    codec = codec_of(manifest)
    check_row(row, manifest, split="train", where="row")
    stored = codec.encode(row, manifest)
    assert tuple(stored) == names_of(planes_of(manifest))
    decoded = codec.decode(stored, manifest)
    short = mass_of(manifest) is not None
    check_row(decoded, manifest, split="train", where="decoded row", short_heads=short)
    for name in EXACT_PLANES:
        _assert_same(getattr(row, name), getattr(decoded, name), name)
        assert getattr(decoded, name).flags.writeable
    assert (row.teacher is None) == (decoded.teacher is None)
    if row.teacher is None or decoded.teacher is None:
        return decoded
    expected, found = stored_record(row.teacher, manifest), decoded.teacher
    _assert_same(expected.tail_ids, found.tail_ids, "tail_ids")
    _assert_same(expected.tail_counts, found.tail_counts, "tail_counts")
    _assert_same(np.sort(expected.head_ids, axis=1), np.sort(found.head_ids, axis=1), "head_ids")
    for name, errors in codec.errors(found, manifest).items():
        left, right = getattr(expected, name), getattr(found, name)
        assert right.dtype == np.float32 and right.shape == left.shape == errors.shape, name
        np.testing.assert_array_equal(np.isneginf(left), np.isneginf(right), err_msg=name)
        with np.errstate(invalid="ignore"):
            difference = np.where(left == right, 0, np.abs(left.astype(np.float64) - right))
        assert (difference <= errors).all(), (name, difference.max(), (difference - errors).max())
    assert first_difference(row, codec.decode_planes(stored, manifest), manifest) is None
    # The same again, into arrays that hold something else.
    reuse: dict[str, np.ndarray] = {}
    codec.decode_planes(stored, manifest, None, reuse)
    kept = {name: array for name, array in reuse.items()}
    for array in reuse.values():
        array.fill(7)
    again = codec.decode_planes(stored, manifest, None, reuse)
    for name, array in reuse.items():
        assert array is kept[name], name
        renumbered = manifest.codec.name == "compact" and name == "token_ids"
        assert renumbered or not again[name].size or np.shares_memory(array, again[name]), name
    for name, array in planes_of_row(decoded).items():
        if array.shape[1:] != (0,):
            _assert_same(array, again[name], name)
    return decoded


def _assert_same(left: np.ndarray, right: np.ndarray, name: str) -> None:
    assert left.dtype == right.dtype and left.shape == right.shape, name
    assert left.tobytes() == right.tobytes(), name


def some_rows(manifest: Manifest, count: int, seed: int) -> list[Row]:
    """Random rows, of the generator that can make them for the vocabulary."""
    large = manifest.tokenizer.vocabulary_size > 8 * (manifest.record.k + manifest.record.n + 200)
    return text_like_rows(manifest, count, seed) if large else synthetic_rows(manifest, count, seed)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    codec=st.sampled_from(sorted(CODECS)),
    vocabulary=st.sampled_from(VOCABULARIES),
    length=st.sampled_from([1, 3, 17, 64]),
    k=st.sampled_from([0, 1, 2, 7, 9, 64]),
    n=st.sampled_from([0, 1, 2, 12, 255, 256]),
    grid=st.sampled_from([(1.0,), (2.0,), (1.0, 2.0, 4.0), (0.5, 1.0)]),
    tail_logprobs=st.booleans(),
    mass=st.sampled_from([None, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(codec, vocabulary, length, k, n, grid, tail_logprobs, mass, seed) -> None:
    manifest = whole_manifest(
        vocabulary_size=vocabulary,
        sequence_length=length,
        k=min(k, vocabulary),
        n=n,
        temperatures=grid,
        draw_temperature=grid[-1],
        tail_logprobs=tail_logprobs and n > 0,
        codec=codec_spec(codec, vocabulary, None if n or 1.0 not in grid else mass),
    )
    assert_round_trip(manifest, some_rows(manifest, 1, seed)[0])


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("vocabulary", [65_535, 65_536, 65_537, 131_072, 262_144, 2**20 + 1, 2**22])
def test_round_trip_around_the_id_widths(codec: str, vocabulary: int) -> None:
    spec = CodecSpec(codec, {})
    manifest = whole_manifest(vocabulary_size=300, sequence_length=3, k=2, n=3, codec=spec)
    row = whole_row(manifest, 0)
    tokenizer = dataclasses.replace(manifest.tokenizer, vocabulary_size=vocabulary)
    manifest = dataclasses.replace(manifest, tokenizer=tokenizer)
    assert row.teacher is not None
    row.token_ids[:] = [0, vocabulary - 1, vocabulary // 2]
    row.teacher.head_ids[1] = [vocabulary - 2, 0]
    row.teacher.tail_ids[1] = [1, vocabulary - 1, -1]
    row.teacher.tail_counts[1] = [1, 2, 0]
    assert_round_trip(manifest, row)


def _with_record(row: Row, **changes: Any) -> Row:
    assert row.teacher is not None
    return dataclasses.replace(row, teacher=dataclasses.replace(row.teacher, **changes))


HEADS = {
    "certain": [0.0, -np.inf, -np.inf, -np.inf],
    "impossible": [-np.inf] * 4,
    "equal": [np.log(1e-3)] * 4,
    "nearly equal": [-7.0, -7.0000005, -7.000001, -7.0000014],
    "tiny steps below 0": [-1e-7, -16.2, -16.3, -16.4],
    "subnormal": [-1e-42, -110.0, -120.0, -130.0],
    "far": [-0.1, -3.0, -1e4, -6e4],
    "rounding above 0": [9e-7, -15.0, -15.0000005, -np.inf],
    "rising by rounding": [-5.0, -5.0 + 9e-7, -5.0, -8.0],
    "one finite": [-2.0, -np.inf, -np.inf, -np.inf],
}


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("head", sorted(HEADS))
def test_odd_heads(codec: str, head: str) -> None:
    for mass in (None, 0.5) if codec == "compact" else (None,):
        manifest = whole_manifest(
            vocabulary_size=500, sequence_length=2, k=4, n=0, codec=codec_spec(codec, 500, mass)
        )
        row = whole_row(manifest, 0)
        values = np.array([HEADS[head], HEADS["certain"]], np.float32)
        rest = np.array([[-8.0, 1.0, 3.0], [-np.inf] * 3], np.float32)
        row = _with_record(
            row,
            head_ids=np.array([[3, 7, 8, 499], [4, 5, 6, 7]], np.int32),
            head_logprobs=values,
            log_rest=rest,
            rest_entropy=np.array([2.0, 0.0], np.float32),
        )
        assert_round_trip(manifest, row)


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_masked_logits_leave_room_for_the_others(codec: str) -> None:
    manifest = whole_manifest(vocabulary_size=500, sequence_length=1, k=4, n=0, codec=codec_spec(codec, 500))
    row = whole_row(manifest, 0)
    values = np.array([[-0.1, -3.0, -1e9, -3e38]], np.float32)
    row = _with_record(row, head_ids=np.array([[3, 7, 8, 499]], np.int32), head_logprobs=values)
    stored = codec_of(manifest).encode(row, manifest)
    record = codec_of(manifest).decode(stored, manifest).teacher
    assert record is not None
    np.testing.assert_allclose(record.head_logprobs[0, :2], values[0, :2], atol=4e-3)
    assert np.exp(record.head_logprobs[0, 2:]).tolist() == [0, 0]
    assert np.isneginf(record.head_logprobs[0, 2:]).tolist() == [CODECS[codec].drops_deep] * 2
    assert record.head_ids[0].tolist() == [3, 7, 8, 499]


@pytest.mark.parametrize("codec", ["compact", "fp16", "plain", "tkq8"])
def test_entries_too_deep_for_steps_are_stored_as_impossible(codec: str) -> None:
    """128 nats below the first are the last that fit; what was deeper has no bound but a probability of 0."""
    manifest = whole_manifest(vocabulary_size=500, sequence_length=2, k=4, n=0, codec=codec_spec(codec, 500))
    row = whole_row(manifest, 0)
    values = np.array([[-1.0, -1.5, -129.0, -129.1], [-np.inf] * 4], np.float32)
    ids = np.array([[3, 499, 8, 7], [4, 5, 6, 7]], np.int32)
    rest = np.full((2, 3), -8, np.float32)
    row = _with_record(row, head_ids=ids, head_logprobs=values, log_rest=rest)
    record = assert_round_trip(manifest, row).teacher
    assert record is not None
    deep = CODECS[codec].drops_deep
    assert np.isneginf(record.head_logprobs[0]).tolist() == [False, False, False, deep]
    errors = codec_of(manifest).errors(record, manifest)["head_logprobs"]
    assert np.isinf(errors).tolist() == [[False, False, False, deep], [False] * 4]
    # Nothing moves when it is written again: no entry that fitted is too deep the next time.
    again = codec_of(manifest).encode(_with_record(row, **vars(record)), manifest)
    assert again == codec_of(manifest).encode(row, manifest)


def test_a_short_head_keeps_no_entry_that_is_stored_as_impossible() -> None:
    manifest = whole_manifest(
        vocabulary_size=500, sequence_length=1, k=4, n=0, codec=codec_spec("compact", 500, 1.0)
    )
    row = whole_row(manifest, 0)
    values = np.array([[-1.0, -1.5, -129.0, -129.1]], np.float32)
    row = _with_record(row, head_ids=np.array([[3, 7, 8, 499]], np.int32), head_logprobs=values)
    record = assert_round_trip(manifest, row).teacher
    assert record is not None and record.head_ids.tolist() == [[3, 7, 8, NO_ID]]


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_draws_of_an_empty_rest_and_of_one_id(codec: str) -> None:
    manifest = whole_manifest(
        vocabulary_size=8, sequence_length=4, k=3, n=2, tail_logprobs=True, codec=codec_spec(codec, 8)
    )
    row = whole_row(manifest, 0)
    assert row.teacher is not None
    teacher = row.teacher
    teacher.head_ids[:2] = [[2, 0, 1], [0, 1, 2]]
    teacher.head_logprobs[:2] = [[0.0, -np.inf, -np.inf], [-np.log(8)] * 3]
    teacher.log_rest[0], teacher.rest_entropy[0] = -np.inf, 0.0
    teacher.tail_ids[:2], teacher.tail_counts[:2] = [[-1, -1], [3, 4]], [[0, 0], [1, 1]]
    teacher.tail_logprobs[:2] = [[-np.inf, -np.inf], [-np.log(8), -np.inf]]
    teacher.log_rest[1] = np.log(5 / 8)
    teacher.entropy[0] = 1e-42
    assert_round_trip(manifest, row)


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_equal_stored_values_stand_by_id(codec: str) -> None:
    manifest = whole_manifest(vocabulary_size=400, sequence_length=1, k=4, n=0, codec=codec_spec(codec, 400))
    row = whole_row(manifest, 0)
    values = np.array([[-1.0, -9.00001, -9.00002, -9.00003]], np.float32)
    row = _with_record(row, head_ids=np.array([[9, 399, 5, 6]], np.int32), head_logprobs=values)
    record = assert_round_trip(manifest, row).teacher
    assert record is not None
    if codec == "exact":
        assert record.head_ids.tolist() == [[9, 399, 5, 6]]
    elif codec == "fp16":
        assert record.head_ids.tolist() == [[9, 5, 6, 399]]
    else:
        assert record.head_ids.tolist() == [[9, 5, 6, 399]] and len(set(record.head_logprobs[0, 1:])) == 1


def test_plain_has_the_values_of_the_default_and_heads_that_are_prefixes() -> None:
    rows = {}
    for codec in (DEFAULT_CODEC, "plain"):
        manifest = whole_manifest(
            vocabulary_size=70_000, sequence_length=24, k=16, n=0, codec=CodecSpec(codec, {})
        )
        row = whole_rows(manifest, 1, 5, text_like_rows)[0]
        stored = codec_of(manifest).encode(row, manifest)
        rows[codec] = codec_of(manifest).decode(stored, manifest).teacher
    one, other = rows[DEFAULT_CODEC], rows["plain"]
    for field in dataclasses.fields(one):
        _assert_same(getattr(one, field.name), getattr(other, field.name), field.name)
    low = np.frombuffer(stored["head_ids"], "<u2", 24 * 16).reshape(24, 16)[:, :5]
    high = np.unpackbits(np.frombuffer(stored["head_ids"][2 * 24 * 16 :], np.uint8), bitorder="little")
    _assert_same(low + (high.reshape(24, 16)[:, :5].astype(np.int32) << 16), other.head_ids[:, :5], "prefix")


def test_short_heads_keep_the_mass_and_the_entropy() -> None:
    """What is cut off joins the rest: the sums over the vocabulary are those of the whole record."""
    manifest = whole_manifest(
        vocabulary_size=200, sequence_length=40, k=30, n=0, codec=codec_spec("compact", 200, 0.8)
    )
    row = whole_row(manifest, 1)
    assert row.teacher is not None
    whole, short = row.teacher, stored_record(row.teacher, manifest)
    kept = (short.head_ids != NO_ID).sum(axis=1)
    assert kept.min() < kept.max() and kept.min() >= 1
    for column, temperature in enumerate(manifest.record.temperatures):
        sums = [
            np.exp(record.head_logprobs.astype(np.float64) / temperature).sum(axis=1)
            + np.exp(record.log_rest[:, column].astype(np.float64))
            for record in (whole, short)
        ]
        np.testing.assert_allclose(*sums, rtol=1e-6)
    before = np.exp(short.head_logprobs.astype(np.float64)).sum(axis=1)
    last = np.exp(np.take_along_axis(short.head_logprobs, kept[:, None] - 1, axis=1)[:, 0].astype(np.float64))
    assert ((before >= 0.8) | (kept == 30)).all() and (before - last < 0.8).all()

    def entropy(record: TeacherRecord) -> np.ndarray:
        head, rest = record.head_logprobs.astype(np.float64), record.log_rest[:, 0].astype(np.float64)
        of_head = -np.where(np.isneginf(head), 0, np.exp(head) * np.where(np.isneginf(head), 0, head)).sum(
            axis=1
        )
        return of_head + np.exp(rest) * (record.rest_entropy - rest)

    np.testing.assert_allclose(entropy(whole), entropy(short), atol=2e-6)


def test_what_joins_a_rest_is_counted_however_small_it_is() -> None:
    manifest = whole_manifest(vocabulary_size=40, sequence_length=4, k=2, n=0, temperatures=(1.0, 400.0))
    record = whole_row(manifest, 0).teacher
    assert record is not None
    record.log_rest[:3], record.rest_entropy[:3] = -np.inf, 0
    joining = np.array([[-800.0, -800.0], [np.log(0.5)] * 2, [-np.inf] * 2, [-np.inf] * 2])
    log_rest, rest_entropy = join_rest(record, joining, manifest.record.temperatures)
    expected = [[-800 + np.log(2), -2 + np.log(2)], [0.0, np.log(2) * (1 - 1 / 400)]]
    np.testing.assert_allclose(log_rest[:2], expected, rtol=1e-6, atol=1e-6)
    assert rest_entropy[1] == pytest.approx(np.log(2)) and np.isfinite(rest_entropy).all()
    # Where nothing joins, nothing changes.
    _assert_same(log_rest[2:], record.log_rest[2:], "log_rest")
    _assert_same(rest_entropy[2:], record.rest_entropy[2:], "rest_entropy")


def test_frequent_ids_get_low_numbers() -> None:
    counts = np.array([0, 5, 0, 9, 5, 1], np.int64)
    manifest = whole_manifest(
        vocabulary_size=6, k=2, n=0, codec=CodecSpec("compact", compact_parameters(counts, table_ids=3))
    )
    renumbering = renumbering_of(manifest)
    assert renumbering is not None
    assert renumbering.old.tolist() == [3, 1, 4, 0, 2, 5]
    assert renumbering.new[renumbering.old].tolist() == list(range(6))


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_token_stores_need_no_head(codec: str) -> None:
    manifest = whole_manifest(
        k=0, n=0, vocabulary_size=70_000, sequence_length=30, codec=codec_spec(codec, 70_000, 0.9)
    )
    for row in synthetic_rows(manifest, 3, 0):
        assert_round_trip(manifest, row)


def test_sizes_of_stored_integers() -> None:
    found = [smallest_unsigned(largest).str for largest in (0, 255, 256, 65_535, 65_536, 2**31 - 1)]
    assert found == ["|u1", "|u1", "<u2", "<u2", "<u4", "<u4"]


def test_unknown_codec_and_parameters_are_named() -> None:
    with pytest.raises(StoreError, match=r"'brotli'.*compact, exact, fp16, plain, tkq8"):
        codec_of(whole_manifest(codec=CodecSpec("brotli", {})))
    for name in CODECS:
        with pytest.raises(StoreError, match=f"{name}.*level"):
            codec_of(whole_manifest(codec=CodecSpec(name, {"level": 3})))


@pytest.mark.parametrize(
    ("parameters", "fields", "words"),
    [
        ({"mass": 1.5}, {"n": 0}, "mass is 1.5"),
        ({"mass": 0}, {"n": 0}, "mass is 0"),
        ({"mass": True}, {"n": 0}, "mass is True"),
        ({"mass": "1"}, {"n": 0}, "mass is '1'"),
        ({"mass": 0.9}, {}, "mass is 0.9 with n=6 draws"),
        ({"mass": 0.9}, {"n": 0, "temperatures": (2.0,), "draw_temperature": 2.0}, "log R at temperature 1"),
        ({"frequent_ids": 3}, {}, "frequent_ids is 3"),
        ({"frequent_ids": {}}, {}, "frequent_ids is {}"),
        ({"frequent_ids": "####"}, {}, "no table of ids"),
        ({"frequent_ids": "AAAA"}, {}, "no table of ids"),
        (compact_parameters(np.arange(301), mass=None), {}, "not below 300"),
    ],
)
def test_parameters_of_compact_are_judged(parameters, fields, words) -> None:
    with pytest.raises(StoreError, match=words):
        codec_of(whole_manifest(codec=CodecSpec("compact", parameters), **fields))


def test_only_a_codec_with_a_mass_holds_short_heads() -> None:
    manifest = whole_manifest(n=0, codec=codec_spec("compact", 300, 0.5))
    row = whole_row(manifest, 0)
    assert row.teacher is not None
    short = dataclasses.replace(row, teacher=stored_record(row.teacher, manifest))
    check_row(short, manifest, split="train", where="row", short_heads=True)
    other = dataclasses.replace(manifest, codec=CodecSpec("tkq8", {}))
    with pytest.raises(InvalidRowError, match=r"head_ids\[\d\] is -1, expected from 0 to 299"):
        check_row(short, other, split="train", where="row")
    assert short.teacher is not None
    position = int(np.flatnonzero((short.teacher.head_ids != NO_ID).sum(axis=1) == 1)[0])
    short.teacher.head_logprobs[position, 1] = -9.0
    with pytest.raises(InvalidRowError, match="expected -inf where the id is -1"):
        check_row(short, manifest, split="train", where="row", short_heads=True)
    short.teacher.head_logprobs[position, 1] = -np.inf
    short.teacher.head_ids[position, 2] = 299
    with pytest.raises(InvalidRowError, match="expected -1 behind a -1"):
        check_row(short, manifest, split="train", where="row", short_heads=True)


# Ways to break the codecs, each of which a round trip must notice.
BREAKS = {
    "no differences": ("running_sums", lambda steps, entries: np.pad(steps, ((0, 0), (1, 0)))),
    "no tie order": ("sorted_by_depth", lambda depth, ids, vocabulary: (depth, ids)),
    "ids without high bits": ("id_parts", lambda ids, vocabulary: _REAL_ID_PARTS(ids & 0xFFFF, vocabulary)),
    "top too low": ("half_below_top", None),
    "entropies doubled": (
        "entropy_codes",
        lambda nats, vocabulary: _REAL_ENTROPY_CODES(nats * 2, vocabulary),
    ),
    "bytes swapped": ("word_parts", lambda words: _REAL_WORD_PARTS(words)[::-1]),
}
_REAL_ID_PARTS, _REAL_ENTROPY_CODES = codec_tkq8.id_parts, codec_tkq8.entropy_codes
_REAL_WORD_PARTS, _REAL_ENCODE_RANGE = codec_tkq8.word_parts, codec_tkq8.encode_range


def _top_too_low(values, *, descending):
    top, span, codes = _REAL_ENCODE_RANGE(values, descending=descending)
    return (top.astype(np.float32) - np.float32(0.05)).astype(np.float16), span, codes


@pytest.mark.parametrize("name", sorted(BREAKS))
def test_a_broken_codec_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = whole_manifest(
        vocabulary_size=70_000, sequence_length=64, k=32, n=4, codec=CodecSpec("tkq8", {})
    )
    row = whole_rows(manifest, 1, 0, text_like_rows)[0]
    assert_round_trip(manifest, row)
    target, replacement = BREAKS[name]
    if replacement is None:
        target, replacement = "encode_range", _top_too_low
    monkeypatch.setattr(codec_tkq8, target, replacement)
    with pytest.raises((AssertionError, InvalidRowError, PlaneError)):
        assert_round_trip(manifest, row)
    monkeypatch.undo()
    assert codec_plain.encode_range is codec_tkq8.encode_range
