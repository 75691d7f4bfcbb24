"""The manifest: what a store holds and where it came from. Written first, never changed.

Every number that shapes the stored bytes stands here. Counts and checksums do not: they belong to the commit
records and to the index.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsekd.logit_store.errors import DamagedStoreError, StoreError
from sparsekd.logit_store.json_text import canonical_json
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.typed_json import parse_json, read_bounded, short, typed

FORMAT_VERSION = 1
"""Major version of the format. A reader refuses a newer one."""

ALIGNMENT = "record at position t describes token t+1"
"""The only alignment convention there is; stored so that nobody has to guess."""

MANIFEST_NAME = "MANIFEST.json"

MANIFEST_BYTES = 16 << 20
"""Bytes of a manifest at most; one that lists 50,000 sources has about 8 MB."""

RESTS = ("exact", "derived", "unknown")
"""What log R is: summed by the capture, 1 - the head's sum at temperature 1, or not known at all."""

_USUAL_RECORD = {"rest": "exact", "tail_logprobs": False}
"""Fields of the record that stand in the file only where they differ from this."""


@dataclass(frozen=True)
class TokenizerIdentity:
    """Which tokenizer made the ids.

    Attributes:
        name: for people.
        vocabulary_size: the true number of ids; every stored id is below it.
        digest: `tokenizer_digest` of the tokenizer's files.
        chat_template_digest: sha256 (hex) of the chat template's text, None without one.
        eos_token_id: None without one.
    """

    name: str
    vocabulary_size: int
    digest: str
    chat_template_digest: str | None
    eos_token_id: int | None


@dataclass(frozen=True)
class RecordSpec:
    """What is kept of the teacher's distribution at each position.

    Attributes:
        k: entries of the exact head.
        n: draws of the sampled tail.
        temperatures: ascending grid at which log R_T is stored.
        draw_temperature: the grid temperature at which the draws were made.
        seed: of the draws.
        rest: one of `RESTS`; only imported records are other than exact, and these have no draws and the grid
            (1.0,). `derived`: R is 1 - the head's sum of probabilities, both entropies count what the source
            did not list as one outcome (lower bounds), and true_logprob of a token that the source did not
            list is the upper bound min(last head entry, log R). `unknown`: the source had no normaliser, the
            head sums to 1, log R is -inf, and true_logprob outside the head is the last head entry.
        tail_logprobs: whether the draws' log-probabilities are stored.
    """

    k: int
    n: int
    temperatures: tuple[float, ...]
    draw_temperature: float
    seed: int
    rest: str = "exact"
    tail_logprobs: bool = False

    def __post_init__(self) -> None:
        # 1 and 1.0 are equal but are written differently, and equal manifests must be equal bytes.
        object.__setattr__(self, "temperatures", tuple(float(value) for value in self.temperatures))
        object.__setattr__(self, "draw_temperature", float(self.draw_temperature))


@dataclass(frozen=True)
class TeacherIdentity:
    """Which teacher made the records.

    Attributes:
        name: for people.
        revision: of the weights at their source, None when unknown.
        weights_digest: sha256 (hex) over the weights.
        dtype: of the weights and the forward pass.
        logits_dtype: of the logits that the log-probabilities were made from.
        engine: what ran the forward pass.
        versions: package -> version.
    """

    name: str
    revision: str | None
    weights_digest: str
    dtype: str
    logits_dtype: str
    engine: str
    versions: dict[str, str]


@dataclass(frozen=True)
class CodecSpec:
    """How rows become bytes: a name from `codec.CODECS` and that codec's parameters."""

    name: str
    parameters: dict[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", _as_read_back(self.parameters, "codec.parameters"))


@dataclass(frozen=True)
class Manifest:
    """Identity of a store. `k = 0, n = 0, teacher = None` is a token store: rows without teacher planes.

    Attributes:
        format_version: `FORMAT_VERSION`.
        alignment: `ALIGNMENT`.
        sequence_length: L, positions of every row.
        rows_per_shard: rows of every shard; only the last shard of a split may have fewer.
        splits: names of the separate row spaces.
        dataset: identity and order of the data: sources with digests, split, packing, token-store digest.
        tokenizer: which tokenizer made the ids.
        record: what is kept at each position.
        teacher: None in a token store.
        codec: how rows become bytes.
    """

    format_version: int
    alignment: str
    sequence_length: int
    rows_per_shard: int
    splits: tuple[str, ...]
    dataset: dict[str, Any]
    tokenizer: TokenizerIdentity
    record: RecordSpec
    teacher: TeacherIdentity | None
    codec: CodecSpec

    def __post_init__(self) -> None:
        object.__setattr__(self, "splits", tuple(self.splits))
        object.__setattr__(self, "dataset", _as_read_back(self.dataset, "dataset"))
        check_manifest(self)


def check_manifest(manifest: Manifest) -> None:
    """Raises StoreError, naming the field, when a manifest contradicts itself."""
    record = manifest.record
    vocabulary = manifest.tokenizer.vocabulary_size
    _check_version(manifest.format_version)
    _require(manifest.alignment == ALIGNMENT, "alignment", manifest.alignment, repr(ALIGNMENT))
    for name in ("sequence_length", "rows_per_shard"):
        _require(getattr(manifest, name) >= 1, name, getattr(manifest, name), "at least 1")
    names_are_plain = all(name.isidentifier() for name in manifest.splits)
    _require(names_are_plain, "splits", manifest.splits, "plain names of letters, digits and _")
    _require(
        len(set(manifest.splits)) == len(manifest.splits) > 0, "splits", manifest.splits, "distinct names"
    )
    _require(1 <= vocabulary < 2**31, "tokenizer.vocabulary_size", vocabulary, "from 1 to 2^31 - 1")
    _require(0 <= record.k <= vocabulary, "record.k", record.k, f"from 0 to the vocabulary size {vocabulary}")
    _require(0 <= record.n < 2**31, "record.n", record.n, "from 0 to 2^31 - 1")
    grid = record.temperatures
    grid_is_ascending = all(low < high for low, high in itertools.pairwise(grid))
    grid_is_positive = all(value > 0 and math.isfinite(value) for value in grid)
    _require(grid_is_ascending and grid_is_positive, "record.temperatures", grid, "ascending and above 0")
    if manifest.teacher is None:
        _require(record.k == 0 and record.n == 0, "teacher", None, "an identity, because k or n is above 0")
    else:
        _require(record.k + record.n > 0, "record.k", record.k, "k or n above 0, because there is a teacher")
        draw = record.draw_temperature
        _require(draw in grid, "record.draw_temperature", draw, f"one of the grid {short(list(grid))}")
    _require(record.rest in RESTS, "record.rest", record.rest, f"one of {', '.join(RESTS)}")
    if record.rest != "exact":
        shape = (record.k > 0, record.n, grid)
        _require(
            shape == (True, 0, (1.0,)), "record.rest", record.rest, "exact unless k > 0, n = 0, grid [1.0]"
        )
    draws = record.n > 0 or not record.tail_logprobs
    _require(draws, "record.tail_logprobs", record.tail_logprobs, "false, because there are no draws")


def manifest_to_json(manifest: Manifest) -> str:
    """Returns the canonical text: equal manifests give equal text."""
    content = asdict(manifest)
    # Written only where it says something: stores from before the field keep their bytes and digests.
    for name, usual in _USUAL_RECORD.items():
        if content["record"][name] == usual:
            del content["record"][name]
    return canonical_json(content)


def manifest_from_json(text: str | bytes, where: str) -> Manifest:
    """Reads a manifest.

    Args:
        text: what `manifest_to_json` returned.
        where: the place the text is from, for messages.

    Raises:
        StoreError: the text is no manifest, a field is missing, unknown or of the wrong type, or the format
            is newer than this reader.
    """
    raw = parse_json(text.encode() if isinstance(text, str) else text, where)
    # Before the fields: a newer format may have others.
    if isinstance(raw, dict):
        _check_version(raw.get("format_version"), where)
    try:
        return typed(Manifest, raw, where)
    except DamagedStoreError:
        raise
    except StoreError as error:
        raise StoreError(f"{where}: {error}") from error


def read_manifest(path: StorePath) -> Manifest:
    """Reads `MANIFEST.json` of the store at `path`, sealed or not.

    Raises:
        StoreError: there is none, or it cannot be read.
    """
    return manifest_from_json(read_manifest_text(path), str(path / MANIFEST_NAME))


def read_manifest_text(path: StorePath) -> bytes:
    """Returns the bytes of `MANIFEST.json` of the store at `path`, sealed or not.

    Raises:
        StoreError: there is none, it is too large, or it cannot be read.
    """
    try:
        return read_bounded(path / MANIFEST_NAME, MANIFEST_BYTES)
    except FileNotFoundError:
        raise StoreError(
            f"{path} is not a logit store: it has no {MANIFEST_NAME}; name the folder that `prepare` or "
            "`capture` wrote."
        ) from None


def manifest_digest(manifest: Manifest) -> str:
    """Returns the sha256 (hex) of the canonical text, which is also that of the file."""
    return hashlib.sha256(manifest_to_json(manifest).encode("ascii")).hexdigest()


def compare_manifests(found: Manifest, wanted: Manifest) -> list[str]:
    """Names every field in which two manifests differ, with both values.

    Returns:
        One line per field, such as `record.k: found 8, wanted 16`; empty when they are equal.
    """
    left, right = _flat(asdict(found)), _flat(asdict(wanted))
    return [
        f"{name}: found {short(left.get(name, 'nothing'))}, wanted {short(right.get(name, 'nothing'))}"
        for name in sorted(left.keys() | right.keys())
        if name not in left or name not in right or left[name] != right[name]
    ]


def tokenizer_digest(folder: Path) -> str:
    """Returns the sha256 (hex) over the files of a tokenizer folder, see `digest_of_files`."""
    if not folder.is_dir():
        raise StoreError(f"The tokenizer folder {folder} does not exist: give a folder with tokenizer.json.")
    return digest_of_files((name, path.read_bytes()) for name, path in files_of_tokenizer(folder))


def files_of_tokenizer(folder: Path) -> list[tuple[str, Path]]:
    """Returns (name relative to the folder, path) of every file below it, sorted by name."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".tmp-"))
    return sorted((path.relative_to(folder).as_posix(), path) for path in paths)


def digest_of_files(files: Iterable[tuple[str, bytes]]) -> str:
    """Returns the sha256 (hex) over names and bytes.

    Each file adds its name in UTF-8, a zero byte, its length as 8 bytes little-endian, and its bytes.

    Args:
        files: (name, bytes), sorted by name.
    """
    total = hashlib.sha256()
    for name, content in files:
        total.update(name.encode() + b"\0" + len(content).to_bytes(8, "little"))
        total.update(content)
    return total.hexdigest()


def _check_version(version: object, where: str = "The manifest") -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise StoreError(
            f"{where} has {short(version)} as format_version, expected {FORMAT_VERSION}: restore it from a "
            "copy."
        )
    if version > FORMAT_VERSION:
        raise StoreError(
            f"{where} has format version {version}, but this sparsekd reads versions up to {FORMAT_VERSION}: "
            "update sparsekd."
        )


def _as_read_back(value: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns a free-form value as JSON gives it back (tuples become lists), so that equality holds."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StoreError(f"The manifest's {name} cannot be written as JSON: {error}.") from error


def _require(holds: bool, name: str, found: object, expected: str) -> None:
    if not holds:
        raise StoreError(f"The manifest's {name} is {short(found)}, expected {expected}.")


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    """Returns a nested value as {dotted path: leaf}."""
    if isinstance(value, Mapping) and value:
        pairs = ((f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items())
    elif isinstance(value, (list, tuple)) and value:
        pairs = ((f"{prefix}[{index}]", item) for index, item in enumerate(value))
    else:
        return {prefix: value}
    return {name: leaf for path, item in pairs for name, leaf in _flat(item, path).items()}
