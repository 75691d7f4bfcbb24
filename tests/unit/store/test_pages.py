"""What people read: the alarm for shifted records, and the page of `inspect`."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from synthetic_stores import write_synthetic_store
from whole import whole_manifest, whole_rows

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.protocol.layout import work_folder, work_name
from sparsekd.logit_store.protocol.parts import write_part
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.row import Row, TeacherRecord
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows, write_synthetic_tokenizer
from sparsekd.logit_store.tools.inspect import inspect_text, record_means, tail_masses
from sparsekd.logit_store.tools.verify import verify_store
from sparsekd.trainer.door import store_cli


def _write(path: Path, manifest: Manifest, rows: list[Row]) -> Path:
    tokenizer = write_synthetic_tokenizer(path.parent / "tokenizer", manifest.tokenizer.vocabulary_size)
    create_store(path, manifest, tokenizer)
    write_shard(path, manifest, "train", 0, rows)
    seal(path, {"train": 1, "heldout": 0})
    return path


def _shift(row: Row, by: int) -> Row:
    """Moves the records of a whole row by some positions against its tokens, as an off-by-one would."""
    record = row.teacher
    assert record is not None
    moved = TeacherRecord(
        **{
            field.name: np.roll(getattr(record, field.name), by, axis=0)
            for field in dataclasses.fields(TeacherRecord)
        }
    )
    lasts = np.append(row.segment_starts[1:], len(row.token_ids)) - 1
    moved.true_logprob[lasts] = 0
    return dataclasses.replace(row, teacher=moved)


@pytest.mark.parametrize(("k", "n"), [(8, 0), (8, 12), (0, 40)])
def test_shifted_records_raise_the_alarm(tmp_path: Path, k: int, n: int) -> None:
    manifest = whole_manifest(k=k, n=n, sequence_length=64, rows_per_shard=8)
    rows = whole_rows(manifest, 8, 0)
    good = verify_store(_write(tmp_path / "good", manifest, rows))
    assert good.ok and good.alignment is not None and good.alignment.verdict == "aligned"
    assert good.alignment.inconsistent == 0 and "aligned:" in good.text()
    for by in (1, -1):
        bad = verify_store(_write(tmp_path / f"bad{by}", manifest, [_shift(row, by) for row in rows]))
        assert bad.problems == (), "every byte is sound, only the meaning is not"
        assert bad.alignment is not None and bad.alignment.verdict == "misaligned"
        assert not bad.ok and "NOT" in bad.text()
        # The direction shows: records one late fit the token itself, records one early the one after next.
        late, early = bad.alignment.found_late, bad.alignment.found_early
        assert (late > early) == (by == 1)
        # A moved record is found at its true place as often as it was, up to the rows' and documents' ends.
        assert abs(max(late, early) - good.alignment.found) < 0.1


def test_true_logprob_of_another_position_raises_the_alarm(tmp_path: Path) -> None:
    manifest = synthetic_manifest(k=8, n=0, sequence_length=64, rows_per_shard=8)
    rows = synthetic_rows(manifest, 8, 0)
    for row in rows:
        assert row.teacher is not None
        values = row.teacher.true_logprob
        values[values != 0] = np.roll(values[values != 0], 1)
    result = verify_store(_write(tmp_path / "store", manifest, rows))
    assert result.alignment is not None and result.alignment.inconsistent > 0.5 and not result.ok


def test_alignment_of_few_positions_is_undecided(tmp_path: Path) -> None:
    manifest = synthetic_manifest(sequence_length=8)
    result = verify_store(_write(tmp_path / "store", manifest, synthetic_rows(manifest, 1, 0)))
    assert result.ok and result.alignment is not None and result.alignment.verdict == "undecided"


def test_token_store_has_no_alignment(tmp_path: Path) -> None:
    manifest = synthetic_manifest(k=0, n=0)
    result = verify_store(_write(tmp_path / "store", manifest, synthetic_rows(manifest, 2, 0)))
    assert result.ok and result.alignment is None


def test_tail_mass_from_the_dense_distribution() -> None:
    logits = np.random.default_rng(0).standard_normal((5, 40)) * 3
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-logprobs, axis=1)[:, :3]
    grid = (0.5, 1.0, 3.0)
    rest = logprobs.copy()
    np.put_along_axis(rest, ids, -np.inf, axis=1)
    record = TeacherRecord(
        head_ids=ids.astype(np.int32),
        head_logprobs=np.take_along_axis(logprobs, ids, axis=1).astype(np.float32),
        tail_ids=np.zeros((5, 0), np.int32),
        tail_counts=np.zeros((5, 0), np.int32),
        log_rest=np.stack([np.log(np.exp(rest / t).sum(axis=1)) for t in grid], axis=1).astype(np.float32),
        rest_entropy=np.zeros(5, np.float32),
        true_logprob=np.zeros(5, np.float32),
        entropy=np.zeros(5, np.float32),
    )
    expected = []
    for temperature in grid:
        powered = np.exp(logits / temperature)
        share = powered / powered.sum(axis=1, keepdims=True)
        expected.append(1 - np.take_along_axis(share, ids, axis=1).sum(axis=1))
    np.testing.assert_allclose(tail_masses(record, grid), np.stack(expected, axis=1), rtol=1e-5)


def test_means_count_the_positions_of_the_loss() -> None:
    manifest = synthetic_manifest(sequence_length=32)
    rows = synthetic_rows(manifest, 4, 0)
    means = record_means(rows, manifest.record.temperatures, manifest.target)
    assert means is not None
    nll = np.concatenate([-row.teacher.true_logprob for row in rows])
    assert means.positions == len(nll) and means.rows == 4
    assert means.teacher_nll == pytest.approx(nll.mean(dtype=np.float64), rel=1e-6)
    drawn = np.concatenate([row.teacher.tail_counts for row in rows])
    assert means.distinct_draws == pytest.approx((drawn > 0).sum(axis=1).mean())
    # Records of prompts and document ends are none of the loss's.
    whole = whole_manifest(sequence_length=32)
    rows = whole_rows(whole, 4, 0)
    counted = np.concatenate([row.teacher.entropy[row.loss_mask] for row in rows])
    assert len(counted) < 4 * 32
    means = record_means(rows, whole.record.temperatures, whole.target)
    assert means is not None and means.positions == len(counted)
    assert means.entropy == pytest.approx(counted.mean(dtype=np.float64), rel=1e-6)
    silent = [dataclasses.replace(row, loss_mask=np.zeros(32, np.bool_)) for row in rows]
    assert record_means(silent, whole.record.temperatures, whole.target) is None


def test_page_of_a_logit_store(tmp_path: Path) -> None:
    manifest = synthetic_manifest(sequence_length=32)
    digest = write_synthetic_store(tmp_path / "store", manifest, {"train": 20, "heldout": 2}, seed=0)
    page = inspect_text(tmp_path / "store", positions=3, sample_rows=5)
    for words in (
        digest,
        "k = 4",
        "n = 6",
        "T = 1, 2, 4",
        "300 ids",
        "head_logprobs",
        "container",
        "<- true",
        "drawn",
    ):
        assert words in page, words
    assert page.count(", position ") == 3 and "at every position that the loss counts" in page
    (read,) = (line for line in page.splitlines() if line.startswith("rows read"))
    assert read.split()[2:] == ["5", "2"]
    total = next(
        line for line in page.splitlines() if line.startswith("all  ") and "%" in line and "640" not in line
    )
    counted = sum(int(row.loss_mask.sum()) for row in synthetic_rows(manifest, 20, 0))
    counted += sum(int(row.loss_mask.sum()) for row in synthetic_rows(manifest, 2, 1, "heldout"))
    assert total.split()[3:6] == ["704", str(counted), str(counted)], "22 rows of 32 tokens"
    assert max(map(len, page.splitlines())) <= 110
    # The candidates' text is that of the stored ids.
    assert "'w" in page


def test_page_of_a_token_store(tmp_path: Path) -> None:
    write_synthetic_store(tmp_path / "store", synthetic_manifest(k=0, n=0), {"train": 4}, seed=0)
    page = inspect_text(tmp_path / "store", positions=2)
    assert page.startswith("token store") and "label  'w" in page and "tail mass" not in page


def test_page_without_tokenizer_json_shows_ids(unspelled: Path) -> None:
    assert "ids " in inspect_text(unspelled, positions=1)


def test_a_store_that_is_being_written_says_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = synthetic_manifest(rows_per_shard=3)
    tokenizer = write_synthetic_tokenizer(tmp_path / "tokenizer", manifest.tokenizer.vocabulary_size)
    path = tmp_path / "store"
    create_store(path, manifest, tokenizer)
    rows = synthetic_rows(manifest, 6, seed=2)
    write_shard(path, manifest, "train", 0, rows[:3])
    write_part(path, manifest, "train", 1, range(3, 5), rows[3:5])
    lease = work_folder(path, "train", 1) / f"{work_name(range(5, 6))}.lease"
    lease.write_text("{}")
    assert store_cli.run_store(["inspect", str(path)]) == 0
    page = capsys.readouterr().out
    assert "not sealed: it cannot be read yet" in page and "next: the command that writes it" in page
    size = sum(item.stat().st_size for item in path.rglob("*") if item.suffix in (".arrow", ".json", ".part"))
    size -= (path / "MANIFEST.json").stat().st_size
    size -= sum(item.stat().st_size for item in (path / "tokenizer").iterdir() if item.suffix == ".json")
    (line,) = (line for line in page.splitlines() if line.startswith("train"))
    assert line.split() == ["train", "1", "1", "1", f"{size:,}"]
    with pytest.raises(StoreError, match="is not a logit store"):
        store_cli.run_store(["inspect", str(tmp_path / "tokenizer")])
