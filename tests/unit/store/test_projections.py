"""The matrix of a plane of hidden states: whole, finite and the one that was named, or a sentence."""

from pathlib import Path

import numpy as np
import pytest

from sparsekd.logit_store.errors import DamagedStoreError, StoreError
from sparsekd.logit_store.manifest import FeatureSpec, Manifest
from sparsekd.logit_store.projections import Projection, digest_of, projection_of
from sparsekd.logit_store.protocol.writer import create_store
from sparsekd.logit_store.synthetic import synthetic_manifest, write_synthetic_tokenizer

WIDTH, SOURCE = 3, 5


def store_with(path: Path, content: bytes) -> Manifest:
    spec = FeatureSpec(2, WIDTH, SOURCE, "orthonormal", digest_of(content), 0.9, "int8", "all")
    manifest = synthetic_manifest(features=(spec,))
    tokenizer = write_synthetic_tokenizer(path.parent / "tokenizer", manifest.tokenizer.vocabulary_size)
    create_store(path, manifest, tokenizer, projections={spec.plane: content})
    return manifest


def some_projection() -> Projection:
    matrix = np.linalg.qr(np.random.default_rng(0).standard_normal((SOURCE, WIDTH)))[0]
    return Projection(np.arange(SOURCE, dtype=np.float32), matrix.astype(np.float32))


def test_a_projection_is_read_as_it_was_written(tmp_path: Path) -> None:
    given = some_projection()
    manifest = store_with(tmp_path / "store", given.to_bytes())
    found = projection_of(tmp_path / "store", manifest.features[0])
    assert (found.mean == given.mean).all() and (found.matrix == given.matrix).all()


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_stranger_s_projection_has_finite_numbers(tmp_path: Path, number: float) -> None:
    given = some_projection()
    given.matrix[1, 2] = number
    manifest = store_with(tmp_path / "store", given.to_bytes())
    with pytest.raises(DamagedStoreError, match=r"feature_2 in .*store holds numbers that are not finite"):
        projection_of(tmp_path / "store", manifest.features[0])


def test_a_stranger_s_projection_has_the_size_that_the_manifest_asks_for(tmp_path: Path) -> None:
    manifest = store_with(tmp_path / "store", b"")
    with pytest.raises(DamagedStoreError, match=r"not the projection that the manifest names \(0 bytes"):
        projection_of(tmp_path / "store", manifest.features[0])


@pytest.mark.parametrize("damage", ["cut", "long", "flipped", "gone"])
def test_a_damaged_projection_is_one_sentence(tmp_path: Path, damage: str) -> None:
    manifest = store_with(tmp_path / "store", some_projection().to_bytes())
    place = tmp_path / "store/projections/feature_2.f32"
    content = bytearray(place.read_bytes())
    place.unlink()
    if damage != "gone":
        content[7] ^= damage == "flipped"
        place.write_bytes(content[:-4] if damage == "cut" else content + b"1234" * (damage == "long"))
    with pytest.raises(StoreError, match=r"feature_2\.f32") as caught:
        projection_of(tmp_path / "store", manifest.features[0])
    assert "\n" not in str(caught.value)
