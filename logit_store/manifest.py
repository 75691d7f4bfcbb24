"""The manifest: what a store holds and where it came from. Written first, never changed.

Every number that shapes the stored bytes stands here. Counts and checksums do not: they belong to the commit
records and to the index.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.json_text import canonical_json
from sparsekd.logit_store.places.files import explained, read_file
from sparsekd.logit_store.places.paths import StorePath

FORMAT_VERSION = 1
"""Major version of the format. A reader refuses a newer one."""

ALIGNMENT = "record at position t describes token t+1"
"""The only alignment convention there is; stored so that nobody has to guess."""

MANIFEST_NAME = "MANIFEST.json"

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
        _require(draw in grid, "record.draw_temperature", draw, f"one of the grid {list(grid)}")
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


def manifest_from_json(text: str, where: str) -> Manifest:
    """Reads a manifest.

    Args:
        text: what `manifest_to_json` returned.
        where: the place the text is from, for messages.

    Raises:
        StoreError: the text is no manifest, a field is missing, unknown or of the wrong type, or the format
            is newer than this reader.
    """
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise StoreError(f"{where} is not valid JSON ({error}): restore it from a copy.") from error
    if not isinstance(raw, dict):
        raise StoreError(f"{where} holds a {type(raw).__name__}, not a manifest: restore it from a copy.")
    # Before the fields: a newer format may have others.
    _check_version(raw.get("format_version"), where)
    values = _fields_of(Manifest, raw, where)
    values["splits"] = tuple(_typed(values["splits"], list, "splits", where))
    values["tokenizer"] = TokenizerIdentity(**_fields_of(TokenizerIdentity, values["tokenizer"], where))
    record = _fields_of(
        RecordSpec, {**_USUAL_RECORD, **_typed(values["record"], dict, "record", where)}, where
    )
    record["temperatures"] = tuple(_typed(record["temperatures"], list, "record.temperatures", where))
    values["record"] = RecordSpec(**record)
    if values["teacher"] is not None:
        values["teacher"] = TeacherIdentity(**_fields_of(TeacherIdentity, values["teacher"], where))
    values["codec"] = CodecSpec(**_fields_of(CodecSpec, values["codec"], where))
    _typed(values["dataset"], dict, "dataset", where)
    return Manifest(**values)


def read_manifest(path: StorePath) -> Manifest:
    """Reads `MANIFEST.json` of the store at `path`, sealed or not.

    Raises:
        StoreError: there is none, or it cannot be read.
    """
    place = path / MANIFEST_NAME
    with explained(place):
        try:
            text = read_file(place).decode("ascii")
        except FileNotFoundError:
            raise StoreError(
                f"{path} is not a logit store: it has no {MANIFEST_NAME}; name the folder that `prepare` or "
                "`capture` wrote."
            ) from None
        except UnicodeDecodeError as error:
            raise StoreError(f"{place} is damaged at byte {error.start}: restore it from a copy.") from error
    return manifest_from_json(text, str(place))


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
        f"{name}: found {_short(left.get(name, 'nothing'))}, wanted {_short(right.get(name, 'nothing'))}"
        for name in sorted(left.keys() | right.keys())
        if name not in left or name not in right or left[name] != right[name]
    ]


def _short(value: object) -> str:
    """Returns a value for a message; a table of a codec may have many thousand letters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:40]}... ({len(text):,} letters)"


def _check_version(version: object, where: str = "The manifest") -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise StoreError(f"{where} has format_version {version!r}, expected {FORMAT_VERSION}.")
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
        raise StoreError(f"The manifest's {name} is {found!r}, expected {expected}.")


def _typed(value: Any, kind: type, name: str, where: str) -> Any:
    if not isinstance(value, kind):
        raise StoreError(f"{where} has {value!r} as {name}, expected a {kind.__name__}.")
    return value


_KINDS: dict[object, tuple[type, ...]] = {
    int: (int,),
    float: (int, float),
    str: (str,),
    bool: (bool,),
    str | None: (str, type(None)),
    int | None: (int, type(None)),
}


def _fields_of(kind: Any, raw: object, where: str) -> dict[str, Any]:
    """Returns the values of a dataclass from parsed JSON, refusing missing, unknown and mistyped fields."""
    values = _typed(raw, dict, kind.__name__, where)
    declared = {field.name: field.type for field in fields(kind)}
    if missing := sorted(declared.keys() - values.keys()):
        raise StoreError(f"{where} lacks {', '.join(missing)} in its {kind.__name__}.")
    if unknown := sorted(values.keys() - declared.keys()):
        raise StoreError(f"{where} has the unknown {', '.join(unknown)} in its {kind.__name__}.")
    for name, type_ in declared.items():
        value = values[name]
        allowed = _KINDS.get(type_)
        is_number_like = isinstance(value, bool) and type_ is not bool
        if allowed and (not isinstance(value, allowed) or is_number_like):
            raise StoreError(
                f"{where} has {value!r} as {name}, expected {getattr(type_, '__name__', type_)}."
            )
    return dict(values)


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    """Returns a nested value as {dotted path: leaf}."""
    if isinstance(value, Mapping) and value:
        pairs = ((f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items())
    elif isinstance(value, (list, tuple)) and value:
        pairs = ((f"{prefix}[{index}]", item) for index, item in enumerate(value))
    else:
        return {prefix: value}
    return {name: leaf for path, item in pairs for name, leaf in _flat(item, path).items()}
