"""The held-out choice: a function of content and seed alone."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekd.trainer.config.corpus import CorpusConfig
from sparsekd.trainer.corpus.split import check_places, is_heldout, split_of
from sparsekd.trainer.run.errors import DataError


@given(st.binary(max_size=40), st.integers(0, 2**63))
def test_choice_is_the_keyed_hash_read_as_a_fraction(content: bytes, seed: int) -> None:
    digest = hashlib.blake2b(content, digest_size=8, key=seed.to_bytes(8, "little")).digest()
    fraction = int.from_bytes(digest, "little") / 2**64
    for threshold in (0.0, 0.02, 0.5, 0.9):
        assert is_heldout(content, fraction=threshold, seed=seed) == (fraction < threshold)


def test_share_is_about_the_fraction_and_seeds_differ() -> None:
    contents = [f"document {index}".encode() for index in range(5000)]
    choices = [[is_heldout(content, fraction=0.1, seed=seed) for content in contents] for seed in (0, 1)]
    for choice in choices:
        assert abs(sum(choice) - 500) < 6 * (5000 * 0.1 * 0.9) ** 0.5  # six standard deviations
    both = sum(left and right for left, right in zip(*choices, strict=True))
    assert both < 100  # 50 by chance


def test_a_larger_fraction_only_adds_documents() -> None:
    contents = [f"document {index}".encode() for index in range(500)]
    small = {content for content in contents if split_of(content, fraction=0.1, seed=3) == "heldout"}
    large = {content for content in contents if split_of(content, fraction=0.3, seed=3) == "heldout"}
    assert small < large


def test_known_choice() -> None:
    # Stores that were written once must split the same way for ever.
    held = [index for index in range(40) if is_heldout(f"document {index}".encode(), fraction=0.2, seed=7)]
    assert held == [6, 9, 10, 21, 24, 30]


def test_what_is_trained_on_is_not_held_out(tmp_path: Path) -> None:
    for name in ("a.txt", "valid/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link.txt").symlink_to(tmp_path / "valid" / "b.txt")
    held = [str(tmp_path / "valid" / "b.txt")]
    for paths in ([str(tmp_path)], held, [str(tmp_path / "*.txt")]):
        with pytest.raises(DataError, match=r"valid/b\.txt is trained on, as corpus\.paths=.* and held out"):
            check_places(CorpusConfig(paths=paths, heldout_paths=held))
    check_places(CorpusConfig(paths=[str(tmp_path)], exclude=["valid/*", "link.txt"], heldout_paths=held))
    check_places(CorpusConfig(paths=held))
    with pytest.raises(DataError, match=r"a/b is trained on, as corpus\.paths=a/b has it"):
        check_places(CorpusConfig(format="dataset", paths=["a/b"], heldout_paths=["a/b"]))
    check_places(CorpusConfig(format="dataset", paths=["a/b"], heldout_split="test"))
