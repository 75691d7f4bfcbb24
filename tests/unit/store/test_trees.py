"""Leaves of nested values by name, and where two of them differ."""

from dataclasses import replace

from sparsekd.logit_store.manifest import compare_manifests
from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.logit_store.trees import differing, flat


def test_leaves_have_the_names_of_their_places() -> None:
    value = {"a": {"b": [1, {"c": 2}], "d": {}}, "e": (), "f": None}
    assert flat(value) == {"a.b[0]": 1, "a.b[1].c": 2, "a.d": {}, "e": (), "f": None}
    assert flat(value, lists=False) == {"a.b": [1, {"c": 2}], "a.d": {}, "e": (), "f": None}
    assert flat({}) == {}


def test_what_differs_is_told_with_both_values() -> None:
    left, right = {"same": 1, "a": {"x": 1}, "gone": 2}, {"same": 1, "a": {"x": 2}, "new": [3]}
    assert differing(left, right, absent="-") == [("a.x", 1, 2), ("gone", 2, "-"), ("new[0]", "-", 3)]
    assert differing(left, left, absent=None) == []


def test_in_a_manifest_none_is_not_the_same_as_not_there() -> None:
    one = synthetic_manifest()
    other = replace(one, dataset={**one.dataset, "note": None})
    assert compare_manifests(other, one) == ["dataset.note: found None, wanted nothing"]
