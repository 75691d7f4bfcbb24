"""From listed ids to records and rows: what `store import` makes of any source."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import CodecSpec
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.row import document_of_position
from sparsekd.logit_store.synthetic import synthetic_manifest, write_synthetic_tokenizer
from sparsekd.logit_store.tools.verify import verify_store
from sparsekd.trainer.importers.document import Document, Format, Options, Source, source_files
from sparsekd.trainer.importers.store import ImportResult, ImportSettings, import_source

V = 40


def _opened_elsewhere(path: Path, options: Options) -> Source:
    raise AssertionError("the tests bring their sources")


LAYOUT = Format("test", "documents made here", (), (), _opened_elsewhere, ("everything else",))


def settings(folder: Path, **overrides: Any) -> ImportSettings:
    """Returns settings for a store of the synthetic tokenizer with V ids."""
    manifest = synthetic_manifest(vocabulary_size=V)
    assert manifest.teacher is not None
    usual: dict[str, Any] = {
        "tokenizer": manifest.tokenizer,
        "tokenizer_files": write_synthetic_tokenizer(folder / "tokenizer", V),
        "teacher": manifest.teacher,
        "codec": CodecSpec("exact", {}),
        "sequence_length": None,
        "k": None,
        "mask_short": False,
        "rows_per_shard": 2,
    }
    return ImportSettings(**{**usual, **overrides})


def document(length: int, listed: int, seed: int, *, where: str = "here") -> tuple[Document, np.ndarray]:
    """Returns a document that lists some of the most likely ids, shuffled, and all log-probabilities."""
    random = np.random.default_rng([7, seed])
    logits = random.standard_normal((length, V)) * 3
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    order = np.argsort(-logprobs, axis=1)[:, :listed]
    order = random.permuted(order, axis=1)
    mask = np.ones(length, np.bool_)
    mask[-1] = False
    made = Document(
        where=where,
        token_ids=random.integers(0, V, length),
        loss_mask=mask,
        head_ids=order.copy(),
        head_logprobs=np.take_along_axis(logprobs, order, axis=1),
    )
    return made, logprobs


def run(
    tmp_path: Path, documents: list[Document], *, rest: str = "derived", name: str = "store", **overrides: Any
) -> ImportResult:
    """Imports documents."""
    (tmp_path / "source").write_text("")

    def read() -> Iterator[Document]:
        yield from documents

    source = Source((tmp_path / "source",), rest, read)
    return import_source(LAYOUT, source, tmp_path / name, settings(tmp_path, **overrides))


def test_derived_records_are_the_dense_distribution_s(tmp_path: Path) -> None:
    made, logprobs = document(10, 6, 0)
    run(tmp_path, [made], k=4)
    store = open_store(tmp_path / "store")
    row = store.read_row("train", 0)
    record, logprobs = row.teacher, logprobs[:9]  # no token follows the last, so that no record stands there
    np.testing.assert_array_equal(row.recorded, np.arange(10) < 9)
    spec = store.manifest.record
    assert (spec.k, spec.n, spec.temperatures, spec.rest) == (4, 0, (1.0,), "derived")
    order = np.argsort(-logprobs, axis=1)
    np.testing.assert_array_equal(record.head_ids, order[:, :4])
    head = np.take_along_axis(logprobs, order[:, :4], axis=1)
    np.testing.assert_allclose(record.head_logprobs, head, rtol=1e-6)
    rest = 1 - np.exp(head).sum(axis=1)
    np.testing.assert_allclose(record.log_rest[:, 0], np.log(rest), rtol=1e-5)
    # One outcome for the rest: a lower bound of the entropy, reached by no other division.
    np.testing.assert_allclose(
        record.entropy, -(np.exp(head) * head).sum(axis=1) - rest * np.log(rest), rtol=1e-5
    )
    assert (record.entropy <= -(np.exp(logprobs) * logprobs).sum(axis=1) + 1e-5).all()
    true = logprobs[np.arange(9), made.token_ids[1:]]
    in_head = (order[:, :4] == made.token_ids[1:, None]).any(axis=1)
    np.testing.assert_allclose(record.true_logprob[in_head], true[in_head], rtol=1e-5)
    bound = np.minimum(head[:, -1], np.log(rest))
    np.testing.assert_allclose(record.true_logprob[~in_head], bound[~in_head], rtol=1e-5)
    assert (bound[~in_head] >= true[~in_head] - 1e-9).all(), "an upper bound"
    assert store.manifest.dataset["imported"]["not_given"][-1] == "everything else"
    assert verify_store(tmp_path / "store").problems == ()


def test_a_true_logprob_that_the_source_gives_is_kept(tmp_path: Path) -> None:
    made, logprobs = document(10, 3, 1)
    true = logprobs[np.arange(9), made.token_ids[1:]]
    run(tmp_path, [dataclasses.replace(made, true_logprob=np.append(true, np.nan))])
    found = open_store(tmp_path / "store").read_row("train", 0).teacher.true_logprob
    np.testing.assert_allclose(found, true, rtol=1e-5)


def test_records_without_a_normaliser_are_relative_to_the_head(tmp_path: Path) -> None:
    made, logprobs = document(10, 6, 2)
    made.head_logprobs[:] += 17.0  # logits: any constant
    run(tmp_path, [made], rest="unknown", k=4)
    store = open_store(tmp_path / "store")
    record = store.read_row("train", 0).teacher
    head = -np.sort(-logprobs[:9], axis=1)[:, :4]
    head -= np.log(np.exp(head).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(record.head_logprobs, head, rtol=1e-5, atol=1e-6)
    assert np.isneginf(record.log_rest).all() and store.manifest.record.rest == "unknown"


def test_rounded_sums_above_one_are_scaled_and_reported(tmp_path: Path) -> None:
    made, logprobs = document(6, V, 3)
    made.head_logprobs[2] += 0.01
    result = run(tmp_path, [made], k=5)
    assert result.survey.above_one > 0 and result.survey.largest_excess == pytest.approx(
        np.expm1(0.01), rel=1e-6
    )
    record = open_store(tmp_path / "store").read_row("train", 0).teacher
    head = -np.sort(-logprobs[:5], axis=1)[:, :5]
    np.testing.assert_allclose(record.head_logprobs, head, rtol=1e-5)
    np.testing.assert_allclose(np.exp(record.log_rest[:, 0]), 1 - np.exp(head).sum(axis=1), atol=1e-6)
    assert "sum to more than 1" in result.text()


def _listing(values: np.ndarray, ids: np.ndarray) -> Document:
    """Returns a document whose every position lists these ids with these values."""
    length = 4
    mask = np.ones(length, np.bool_)
    mask[-1] = False
    return Document(
        where="here",
        token_ids=np.zeros(length, np.int64),
        loss_mask=mask,
        head_ids=np.tile(ids, (length, 1)),
        head_logprobs=np.tile(values, (length, 1)),
    )


@pytest.mark.parametrize("rest", ["derived", "unknown"])
def test_values_that_a_shift_makes_equal_go_by_id(tmp_path: Path, rest: str) -> None:
    # Next to each other below 1/2, where steps are half as wide as where the shift brings them.
    near = np.float32(-0.5)
    values = np.array([np.nextafter(near, np.float32(0)), near], np.float64)
    run(tmp_path, [_listing(values, np.array([9, 3]))], rest=rest)
    record = open_store(tmp_path / "store").read_row("train", 0).teacher
    assert record.head_logprobs[0, 0] == record.head_logprobs[0, 1] and record.head_ids[0].tolist() == [3, 9]


@pytest.mark.parametrize("rest", ["derived", "unknown"])
def test_near_equal_values_are_in_the_order_of_what_is_stored(tmp_path: Path, rest: str) -> None:
    random = np.random.default_rng(5)
    documents = []
    for _ in range(40):
        logits = random.standard_normal(128) * 2e-6 - (20 if rest == "unknown" else 0)
        shift = np.log(128) - 0.1 if rest == "derived" else 0  # a sum of about 1.1
        documents.append(_listing(logits - shift, random.permutation(300)[:128]))
    manifest = synthetic_manifest(vocabulary_size=300)
    tokenizer = write_synthetic_tokenizer(tmp_path / "more", 300)
    run(tmp_path, documents, rest=rest, tokenizer=manifest.tokenizer, tokenizer_files=tokenizer)
    record = open_store(tmp_path / "store").read_row("train", 0).teacher
    order = np.lexsort((record.head_ids, -record.head_logprobs), axis=1)
    np.testing.assert_array_equal(order, np.tile(np.arange(128), (len(order), 1)))


@pytest.mark.parametrize("codec", ["exact", "tkq8", "plain", "compact"])
def test_an_imported_store_verifies(tmp_path: Path, codec: str) -> None:
    documents = [document(9 + number, 6, number)[0] for number in range(6)]
    documents[2].head_logprobs[:] += 0.01  # sums above 1
    run(tmp_path, documents, codec=CodecSpec(codec, {}), k=5)
    found = verify_store(tmp_path / "store")
    assert found.ok and found.problems == (), found.text()


def test_documents_stay_whole_and_rows_are_filled(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    lengths = [int(length) for length in random.integers(2, 17, 40)]
    documents = [document(length, 4, 10 + number)[0] for number, length in enumerate(lengths)]
    result = run(tmp_path, documents)
    store = open_store(tmp_path / "store")
    assert store.manifest.sequence_length == max(lengths) and result.survey.documents == 40
    found: dict[int, list[int]] = {}
    tokens = 0
    for index in range(store.rows("train")):
        row = store.read_row("train", index)
        of_position = document_of_position(row)
        for number in row.segment_documents[row.segment_documents >= 0]:
            assert int(number) not in found, "in one row alone"
            found[int(number)] = row.token_ids[of_position == number].tolist()
        tokens += int((of_position >= 0).sum())
        assert not row.loss_mask[of_position < 0].any()
    assert found == {number: item.token_ids.tolist() for number, item in enumerate(documents)}
    assert store.tokens("train")[1] == sum(lengths) - 40
    assert tokens / store.tokens("train")[0] > 0.8, "little padding"
    assert store.rows("heldout") == 0


def test_long_documents_are_cut_and_what_does_not_count_is_skipped(tmp_path: Path) -> None:
    long, _ = document(30, 4, 0)
    silent, _ = document(8, 4, 1)
    silent.loss_mask[:] = False
    result = run(tmp_path, [long, silent], sequence_length=12)
    assert (result.survey.cut_tokens, result.survey.skipped, result.survey.documents) == (18, 1, 1)
    row = open_store(tmp_path / "store").read_row("train", 0)
    np.testing.assert_array_equal(row.token_ids, long.token_ids[:12])
    assert row.loss_mask.sum() == 11 and len(row.teacher.true_logprob) == 11
    text = result.text()
    assert "18 tokens" in text and "1 documents without" in text


def test_positions_that_list_too_little_are_refused_or_left_out(tmp_path: Path) -> None:
    made, _ = document(10, 6, 0, where="file, row 3")
    made.head_logprobs[4, 2:] = -np.inf
    made.head_ids[7] = -1
    with pytest.raises(StoreError, match=r"k is 0, .* \(file, row 3, position 7 lists none\)"):
        run(tmp_path, [made])
    with pytest.raises(StoreError, match=r"position 7 lists 0 ids, and 2 of 9 counted positions .* --k 1"):
        run(tmp_path, [made], k=6)
    with pytest.raises(StoreError, match="from 1 to 6"):
        run(tmp_path, [made], k=7)
    assert not (tmp_path / "store").exists()
    result = run(tmp_path, [made], k=6, mask_short=True)
    row = open_store(tmp_path / "store").read_row("train", 0)
    assert result.survey.masked == 2 and np.flatnonzero(~row.loss_mask).tolist() == [4, 7, 9]
    # What is not known has no record.
    np.testing.assert_array_equal(row.recorded, row.loss_mask)
    kept = [place for place in range(9) if place not in (4, 7)]
    np.testing.assert_array_equal(np.sort(row.teacher.head_ids), np.sort(made.head_ids[kept]))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    def broken(change: str, **overrides: Any) -> str:
        made, _ = document(10, 4, 0, where="file, row 3")
        if change == "token":
            made.token_ids[5] = V
        elif change == "id":
            made.head_ids[5, 2] = V + 2
        elif change == "twice":
            made.head_ids[5, 2] = made.head_ids[5, 1]
        elif change == "nan":
            made.head_logprobs[5, 2] = np.nan
        elif change == "huge":
            made.head_logprobs[5, 2] = -1e300
        elif change == "logits":
            made.head_logprobs[5] += 10
        with pytest.raises(StoreError) as caught:
            run(tmp_path, [made], **overrides)
        return str(caught.value)

    assert "position 5: token id 40 is not in the tokenizer" in broken("token")
    assert "position 5, entry 2: 42 is not an id" in broken("id")
    assert "position 5: id" in broken("twice") and "twice" in broken("twice")
    assert "position 5, entry 2: nan" in broken("nan")
    assert "position 5, entry 2: -1e+300 is no finite value" in broken("huge")
    assert "no log-probabilities" in broken("logits")
    with pytest.raises(StoreError, match="nothing to import"):
        run(tmp_path, [])
    assert not (tmp_path / "store").exists()


def test_fractional_weights_are_refused_until_a_store_keeps_them(tmp_path: Path) -> None:
    made, _ = document(10, 4, 0, where="file, row 3")
    weights = np.ones(10, np.float32)
    weights[9] = 0.5  # where nothing counts, a weight says nothing
    run(tmp_path, [dataclasses.replace(made, weights=weights)])
    weights[4] = 0.5
    with pytest.raises(StoreError, match=r"row 3, position 4 has the loss weight 0\.5"):
        run(tmp_path, [dataclasses.replace(made, weights=weights)], name="other")
    assert not (tmp_path / "other").exists()


def test_documents_inside_a_document_stay_apart(tmp_path: Path) -> None:
    made, _ = document(10, 4, 0)
    starts, numbers = np.array([0, 6, 8]), np.array([7, 4, -1])
    made.loss_mask[[5, 7, 8]] = False
    made = dataclasses.replace(made, segment_starts=starts, segment_documents=numbers)
    run(tmp_path, [made], sequence_length=12)
    row = open_store(tmp_path / "store").read_row("train", 0)
    assert row.segment_starts.tolist() == [0, 6, 8, 10]
    assert row.segment_documents.tolist() == [7, 4, -1, -1]
    assert (row.teacher.true_logprob[[5, 7, 9]] == 0).all()


def test_the_same_import_again_changes_nothing(tmp_path: Path) -> None:
    documents = [document(9, 4, number)[0] for number in range(5)]
    digest = run(tmp_path, documents).digest
    assert run(tmp_path, documents).digest == digest
    assert run(tmp_path, documents, name="again").digest == digest
    with pytest.raises(StoreError, match="another store"):
        run(tmp_path, documents, k=2)


def test_files_are_taken_in_natural_order(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        (tmp_path / f"data_{number}.parquet").write_text("")
    (tmp_path / "notes.txt").write_text("")
    found = source_files(tmp_path, (".parquet",), "them")
    assert [file.name for file in found] == ["data_1.parquet", "data_2.parquet", "data_10.parquet"]
    with pytest.raises(StoreError, match="no file that ends in"):
        source_files(tmp_path, (".tar",), "them")
    with pytest.raises(StoreError, match="is not there"):
        source_files(tmp_path / "away", (".tar",), "them")
