"""Manifests, indexes and records with right digests and wrong content: a sentence that names the place."""

import copy
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.errors import DamagedStoreError, StoreError
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.protocol.writer import seal
from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.logit_store.tools.combine import merge_stores, subset_store
from sparsekd.logit_store.tools.export import export_store
from sparsekd.logit_store.tools.stats import store_stats
from sparsekd.logit_store.tools.verify import verify_store

sys.path.append(str(Path(__file__).parent))
from forgery import Forgery, text_of

DEEP = 3000

VALUES: list[Any] = [
    None, True, -1, 0, 2**31, 2**63, 10**400, 1.5, float("nan"), "", "0" * 64, "a" * 100_000, [], [None, 1],
    {}, {"x": 1},
]  # fmt: skip
"""What may stand anywhere."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "store"
    manifest = synthetic_manifest(sequence_length=4, vocabulary_size=9, k=1, n=1, temperatures=(1.0,))
    write_synthetic_store(path, manifest, {"train": 5, "heldout": 1}, seed=0)
    return path


def _everywhere(content: Any) -> Iterator[Callable[[Any], tuple[Any, Any]]]:
    """For each value in a nested one: a function that finds its (container, key) in a copy."""

    def places(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        keys = (
            list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
        )
        for key in keys:
            yield (*path, key)
            yield from places(value[key], (*path, key))

    for place in places(content, ()):

        def find(root: Any, place: tuple[Any, ...] = place) -> tuple[Any, Any]:
            for key in place[:-1]:
                root = root[key]
            return root, place[-1]

        yield find


def _mutants(content: Any) -> Iterator[bytes]:
    """Texts of a value that is changed in one place."""
    for find in _everywhere(content):
        for value in VALUES:
            changed = copy.deepcopy(content)
            holder, key = find(changed)
            holder[key] = value
            yield text_of(changed)
        changed = copy.deepcopy(content)
        holder, key = find(changed)
        kept = holder.pop(key)
        yield text_of(changed)
        if isinstance(holder, dict):
            holder[key + "_"] = kept
            yield text_of(changed)
            holder[key] = kept
            yield text_of(changed)
    whole = text_of(content)
    yield from (b"", b"{", b"[]\n", b"null", b"\xff" + whole, whole + b"x", whole.replace(b"\n", b""))
    yield b"[" * DEEP + b"]" * DEEP
    for line in whole.splitlines(keepends=True):
        if line.startswith(b' "'):
            yield whole.replace(line, line + line.rstrip(b",\n") + b",\n", 1)
            key = line.partition(b":")[0]
            yield whole.replace(line, key + b": " + b"[" * DEEP + b"]" * DEEP + b",\n", 1)


def _outcome(path: Path) -> str:
    """Reads everything in every way; returns the sentence, or nothing."""
    verified = verify_store(path)  # which promises not to raise
    try:
        store = open_store(path)
        for split in store.manifest.splits:
            for index in range(store.rows(split)):
                store.read_row(split, index)
    except StoreError as error:
        assert not verified.ok
        for text in (str(error), *verified.problems):
            assert "\n" not in text and len(text) < 1300, text[:3000]
        return str(error)
    return "" if verified.ok else verified.problems[0]


def _forge(forged: Forgery, file: str, text: bytes) -> None:
    if file == "manifest":
        forged.set_manifest(text)
    elif file == "index":
        forged.index_text = text
    else:
        forged.shards["train", 1].record_text = text


def _content(forged: Forgery, file: str) -> Any:
    forged.files()  # makes what the digests need
    if file == "manifest":
        return json.loads(forged.manifest)
    return forged.index if file == "index" else forged.shards["train", 1].record


@pytest.mark.parametrize("file", ["manifest", "index", "record"])
def test_no_value_anywhere_is_more_than_a_sentence(tmp_path: Path, sound: Path, file: str) -> None:
    forged = Forgery.of(sound)
    content = _content(forged, file)
    refused = taken = 0
    written: dict[str, bytes] = {}
    original = forged.files()
    for text in _mutants(content):
        _forge(forged, file, text)
        files = forged.files()
        if files == original:
            continue
        for name in files.keys() | written.keys():
            if files.get(name) != written.get(name):
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                if name in files:
                    (tmp_path / name).write_bytes(files[name])
                else:
                    (tmp_path / name).unlink()
        written = files
        if _outcome(tmp_path):
            refused += 1
        else:
            taken += 1
    # A store of another name, seed or source is a sound store.
    assert refused > 500 and (taken > 0) == (file == "manifest"), (refused, taken)


Change = Callable[[dict[str, Any]], object]


def _set(*path: Any, to: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        holder: Any = content
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = to

    return change


TRAIN = ("splits", "train")


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("index", _set(*TRAIN, "rows", to=6), "INDEX.json, train has 20 as counts.tokens, expected 24"),
        ("index", _set(*TRAIN, "rows", to=True), "True as splits.train.rows, expected an int"),
        ("index", _set(*TRAIN, "rows", to=2**63), "as splits.train.rows, expected an int of 64 bits"),
        ("index", _set(*TRAIN, "shards", to=3), "3 as shards, expected 2, of 5 rows"),
        ("index", _set(*TRAIN, "shards", to=-1), "splits.train.shards, expected from 0"),
        ("index", _set(*TRAIN, "table_sha256", to="../../x"), "expected 64 lower-case hex digits"),
        ("index", _set(*TRAIN, "colour", to=0), "unknown colour in splits.train"),
        ("index", _set(*TRAIN, "counts", to={}), "lacks segments, tokens, tokens_counted, tokens_padding"),
        ("index", _set(*TRAIN, "counts", "tokens", to=21), "21 as counts.tokens, expected 20"),
        ("index", _set(*TRAIN, "counts", "tokens_counted", to=21), "expected at most"),
        ("index", _set(*TRAIN, "counts", "segments", to=99), "99 as counts.segments, expected at most"),
        ("index", _set(*TRAIN, "plane_bytes", "token_ids", to=-1), "plane_bytes.token_ids, expected from 0"),
        ("index", _set(*TRAIN, "plane_bytes", "other", to=1), "as plane_bytes, expected entropy, head_ids"),
        ("index", _set("splits", "other", to={}), "lacks counts"),
        ("index", _set("format_version", to=2), "2 as format_version, expected 1"),
        ("index", _set("format_version", to=True), "True as format_version, expected 1"),
        ("record", _set("format_version", to=1.0), "1.0 as format_version, expected 1"),
        ("record", _set("lengths", 0, to=2**40), "as lengths, expected inside of the"),
        ("record", _set("lengths", 0, to=-8), "-8 as lengths, expected above 0"),
        ("record", _set("lengths", 0, to=8), "as offsets[1], expected"),
        ("record", _set("offsets", 0, to=2**62), "as offsets, expected inside of the"),
        ("record", _set("offsets", 0, to=0), "0 as offsets[0], expected behind the header"),
        ("record", _set("offsets", to=[]), "expected lists of one length"),
        ("record", _set("crc32", 1, to=2**32), "4294967296 as crc32[1], expected an int from 0 to"),
        ("record", _set("crc32", 1, to=False), "False as crc32[1], expected an int"),
        ("record", _set("file_sha256", to="A" * 64), "expected 64 lower-case hex digits"),
        ("record", _set("plane_bytes", "token_ids", to=10**6), "as plane_bytes, expected below the rows'"),
        ("record", _set("counts", "tokens", to=4), "4 as counts.tokens, expected 8"),
        ("record", _set("split", to="heldout"), "is the record of shard 000001 of split heldout"),
        ("manifest", _set("tokenizer", "name", to="\x1b[2J"), "as tokenizer.name, expected printable"),
        ("manifest", _set("tokenizer", "vocabulary_size", to=True), "True as tokenizer.vocabulary_size"),
        ("manifest", _set("record", "temperatures", to=[1.0, "2"]), "'2' as record.temperatures[1]"),
        ("manifest", _set("splits", to=["train", 5]), "5 as splits[1], expected a str"),
        ("manifest", _set("teacher", "versions", to={"a": 1}), "1 as teacher.versions.a, expected a str"),
        ("manifest", _set("dataset", "x", to=[2**63]), "expected an int of 64 bits"),
        ("manifest", _set("dataset", "x", to=json.loads("[" * 40 + "]" * 40)), "more than 32 levels"),
        ("manifest", _set("format_version", to=[[[[]]]]), "as format_version, expected 1"),
    ],
)  # fmt: skip
def test_the_sentence_names_place_value_and_what_was_expected(
    tmp_path: Path, sound: Path, file: str, change: Change, words: str
) -> None:
    forged = Forgery.of(sound)
    content = _content(forged, file)
    change(content)
    _forge(forged, file, text_of(content))
    sentence = _outcome(forged.write(tmp_path / "store"))
    assert words in sentence and "restore it from a copy" in sentence, sentence


def test_lengths_that_the_file_has_but_no_row_can_have_are_refused(tmp_path: Path, sound: Path) -> None:
    """A record may name a file of any length: it is not what bounds a read."""
    forged = Forgery.of(sound)
    shard = forged.shards["train", 1]
    shard.files()
    shard.record |= {"file_bytes": 2**50, "lengths": [shard.record["lengths"][0], 2**40]}
    shard.kept = {"file_bytes", "lengths"}
    sentence = _outcome(forged.write(tmp_path / "store"))
    assert "as lengths, expected at most" in sentence and "for a row of this store" in sentence


def test_rows_that_an_index_only_claims_are_found_before_anything_is_made_for_them(
    tmp_path: Path, sound: Path
) -> None:
    forged, rows = Forgery.of(sound), 2**33
    manifest, entry = json.loads(forged.manifest), forged.index["splits"]["train"]
    entry["rows"], entry["shards"] = rows, -(-rows // manifest["rows_per_shard"])
    entry["counts"]["tokens"] = rows * manifest["sequence_length"]
    path = forged.write(tmp_path / "store")
    said = r"train-\w+\.bin is damaged: it ends before byte"
    with pytest.raises(DamagedStoreError, match=said):
        open_store(path)
    for use in (
        lambda: subset_store(path, tmp_path / "new", split="train"),
        lambda: merge_stores([path, sound], tmp_path / "new"),
        lambda: store_stats(path),
        lambda: export_store(path, tmp_path / "new"),
    ):
        with pytest.raises(DamagedStoreError, match=said):
            use()
    assert not (tmp_path / "new").exists()
    assert not verify_store(path).ok


def test_a_text_of_many_values_is_refused_before_they_are_made(tmp_path: Path, sound: Path) -> None:
    forged = Forgery.of(sound)
    forged.index_text = b'{\n "digest": "",\n "x": [' + b"[]," * 3_000_000 + b"1]}\n"
    assert "holds more values than its length" in _outcome(forged.write(tmp_path / "store"))


@pytest.mark.parametrize("name", ["MANIFEST.json", "INDEX.json", "shards/train/000/000000.json"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "large", "unreadable"])
def test_what_is_no_file_of_a_store_gives_a_sentence(
    tmp_path: Path, sound: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Forgery.of(sound).write(tmp_path / "store") / name
    if kind == "unreadable":  # by anybody but root, whom nothing stops
        plain = os.open

        def denied(path: Any, *settings: int, **others: Any) -> int:
            if path == place:
                raise PermissionError(13, "Permission denied", str(path))
            return plain(path, *settings, **others)

        monkeypatch.setattr(os, "open", denied)
    else:
        place.unlink()
    if kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "large":
        place.touch()
        os.truncate(place, 2**40)
    sentence = _outcome(tmp_path / "store")
    words = {"large": "expected at most", "unreadable": "Permission denied"}.get(kind, "where a file belongs")
    assert words in sentence and str(place) in sentence


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "file", "file/below"])
def test_what_is_no_store_gives_a_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("no store")
    for ask in (open_store, verify_store, lambda path: seal(path, {})):
        with pytest.raises(StoreError) as caught:
            ask(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_an_index_that_names_another_manifest_is_refused(tmp_path: Path, sound: Path) -> None:
    path = Forgery.of(sound).write(tmp_path / "store")
    text = (path / "MANIFEST.json").read_bytes()
    (path / "MANIFEST.json").write_bytes(text.replace(b'"sequence_length": 4', b'"sequence_length": 5'))
    with pytest.raises(DamagedStoreError, match="is not the manifest that was sealed"):
        open_store(path)


def test_sums_of_the_index_are_compared_with_the_records(tmp_path: Path, sound: Path) -> None:
    for number, (key, name) in enumerate([("counts", "segments"), ("plane_bytes", "entropy")]):
        forged = Forgery.of(sound)
        forged.index["splits"]["train"][key][name] -= 1
        forged.index_is_forged = True
        path = forged.write(tmp_path / str(number))
        open_store(path)
        (problem,) = verify_store(path).problems
        assert f"INDEX.json, train has other {key} than its commit records together" in problem
