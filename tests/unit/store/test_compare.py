"""`store compare` against the divergence of dense distributions, joined by hand."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from dense import GRID, L, dense_logprobs, dense_manifest, dense_rows, write_rows
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.logit_store.tools.compare import compare_stores
from sparsekd.logit_store.tools.reencode import reencode_store


def _joined_kl(p: np.ndarray, q: np.ndarray, k: int, m: int, temperature: float) -> np.ndarray:
    """KL over the ids that are in both top lists and one outcome for the others, from dense [N, V]."""
    values = []
    for one, other in zip(p, q, strict=True):
        shared = sorted(set(np.argsort(-one)[:k]) & set(np.argsort(-other)[:m]))
        a, b = np.exp(one / temperature), np.exp(other / temperature)
        a, b = a / a.sum(), b / b.sum()
        a, b = (np.append(x[shared], np.delete(x, shared).sum()) for x in (a, b))
        values.append((a * np.log(a / b)).sum())
    return np.array(values)


@pytest.mark.parametrize(("k", "m"), [(8, 8), (8, 3), (3, 8)])
def test_divergence_of_two_teachers(tmp_path: Path, k: int, m: int) -> None:
    p = dense_logprobs(4, seed=0)
    q = p + np.random.default_rng(3).standard_normal(p.shape) * 0.3
    q -= np.log(np.exp(q).sum(axis=-1, keepdims=True))
    one = write_rows(tmp_path / "one", dense_manifest(k), {"train": dense_rows(p, k)})
    other = write_rows(tmp_path / "other", dense_manifest(m), {"train": dense_rows(q, m)})
    result = compare_stores(one, other)
    assert result.positions == 4 * (L - 1)
    flat_p, flat_q = (x[:, :-1].reshape(-1, x.shape[-1]) for x in (p, q))
    for item, temperature in zip(result.divergences, GRID, strict=True):
        forward = _joined_kl(flat_p, flat_q, k, m, temperature)
        backward = _joined_kl(flat_q, flat_p, m, k, temperature)
        assert item.temperature == temperature
        assert item.forward.mean == pytest.approx(forward.mean(), rel=1e-4)
        assert item.backward.mean == pytest.approx(backward.mean(), rel=1e-4)
        assert item.forward.maximum == pytest.approx(forward.max(), rel=1e-4)
        worst = int(forward.argmax())
        assert item.worst == ("train", worst // (L - 1), worst % (L - 1))
        dense = (np.exp(flat_p) * (flat_p - flat_q)).sum(axis=1)
        if temperature == 1:
            assert (forward <= dense + 1e-9).all(), "joining outcomes cannot raise a divergence"
    tops = (flat_p.argmax(axis=1) == flat_q.argmax(axis=1)).mean()
    assert result.top_agrees == pytest.approx(tops)
    assert "KL(first || second) at T = 1" in result.text() and "lower bound" in result.text()


def test_a_store_is_no_way_from_itself_nor_from_its_smaller_head(tmp_path: Path) -> None:
    write_synthetic_store(tmp_path / "a", synthetic_manifest(n=0), {"train": 4, "heldout": 1}, seed=0)
    same = compare_stores(tmp_path / "a", tmp_path / "a")
    assert all(item.forward.maximum == item.backward.maximum == 0 for item in same.divergences)
    assert same.shared == same.top_agrees == 1 and same.true_difference.maximum == 0
    reencode_store(tmp_path / "a", tmp_path / "b", k=2)
    smaller = compare_stores(tmp_path / "a", tmp_path / "b", rows=2)
    assert smaller.rows == 3, "two of the first split, the one of the other"
    assert all(item.forward.maximum < 1e-12 for item in smaller.divergences)
    assert smaller.shared == pytest.approx(0.5)


def test_an_id_with_no_mass_in_the_second_is_infinitely_far(tmp_path: Path) -> None:
    rows = dense_rows(dense_logprobs(1, seed=0), 4)
    record = rows[0].teacher
    values = record.head_logprobs.copy()
    values[:, 3] = -np.inf
    other = dataclasses.replace(rows[0], teacher=dataclasses.replace(record, head_logprobs=values))
    one = write_rows(tmp_path / "one", dense_manifest(4), {"train": rows})
    two = write_rows(tmp_path / "two", dense_manifest(4), {"train": [other]})
    item = compare_stores(one, two).divergences[0]
    assert item.forward.infinite == item.forward.count == L - 1 and np.isfinite(item.backward.maximum)


def test_different_texts_are_refused_by_place(tmp_path: Path) -> None:
    rows = dense_rows(dense_logprobs(4, seed=0), 4)
    one = write_rows(tmp_path / "one", dense_manifest(4), {"train": rows})
    tokens = rows[2].token_ids.copy()
    tokens[7] = (tokens[7] + 1) % 50
    changed = [*rows[:2], dataclasses.replace(rows[2], token_ids=tokens), rows[3]]
    two = write_rows(tmp_path / "two", dense_manifest(4), {"train": changed})
    with pytest.raises(StoreError, match=r"the same text: split train, row 2, position 7 holds token \d+"):
        compare_stores(one, two)
    three = write_rows(tmp_path / "three", dense_manifest(4), {"train": rows[:3]})
    with pytest.raises(StoreError, match="rows of train is 4 and 3"):
        compare_stores(one, three)
    write_synthetic_store(tmp_path / "drawn", synthetic_manifest(k=0), {"train": 1}, seed=0)
    with pytest.raises(StoreError, match="has no head"):
        compare_stores(tmp_path / "drawn", one)
    write_synthetic_store(tmp_path / "other", synthetic_manifest(n=0), {"train": 4}, seed=0)
    with pytest.raises(StoreError, match=r"tokenizer\.digest"):
        compare_stores(one, tmp_path / "other")


def test_a_rest_that_was_not_measured_is_said(tmp_path: Path) -> None:
    rows = dense_rows(dense_logprobs(2, seed=0), 4)
    assert rows[0].teacher is not None
    for rest in ("derived", "unknown", "exact"):
        record = dataclasses.replace(
            dense_manifest(4).record, temperatures=(1.0,), draw_temperature=1.0, rest=rest
        )
        ones = [
            dataclasses.replace(
                row, teacher=dataclasses.replace(row.teacher, log_rest=row.teacher.log_rest[:, :1])
            )
            for row in rows
        ]
        write_rows(tmp_path / rest, dataclasses.replace(dense_manifest(4), record=record), {"train": ones})
    for one, other, expected in (
        ("exact", "exact", []),
        ("exact", "derived", ["second  its rest is 1 - the head's sum"]),
        ("unknown", "exact", ["first   its rest is unknown"]),
        ("unknown", "derived", ["first   its rest is unknown", "second  its rest is 1 - the head's sum"]),
    ):
        text = compare_stores(tmp_path / one, tmp_path / other).text()
        found = [line for line in text.splitlines() if "its rest is" in line]
        assert len(found) == len(expected)
        assert all(line.startswith(words) for line, words in zip(found, expected, strict=True))
