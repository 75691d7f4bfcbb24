"""The manifest: what a store holds and where it came from. Written first, never changed.

Every number that shapes the stored bytes stands here. Counts and checksums do not: they belong to the commit
records and to the index.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from sparsekd.logit_store.errors import DamagedStoreError, StoreError
from sparsekd.logit_store.json_text import canonical_json
from sparsekd.logit_store.manifest_checks import check_manifest, check_version
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.trees import differing
from sparsekd.logit_store.typed_json import parse_json, read_bounded, short_pair, typed

MANIFEST_NAME = "MANIFEST.json"

MANIFEST_BYTES = 16 << 20
"""Bytes of a manifest at most; one that lists 50,000 sources has about 8 MB."""


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
    """What is kept of the teacher's distribution, and at which positions.

    Attributes:
        k: entries of the exact head.
        n: draws of the sampled tail.
        temperatures: ascending grid at which log R_T is stored.
        draw_temperature: the grid temperature at which the draws were made.
        seed: of the draws.
        rest: one of `RESTS`; only imported records are other than exact, and these have the grid (1.0,) and
            no draws, or (`counts`) draws alone. `derived`: R is 1 - the head's sum of probabilities, both
            entropies count what the source did not list as one outcome (lower bounds), and true_logprob of a
            token that the source did not list is the upper bound min(last head entry, log R). `unknown`: the
            source had no normaliser, the head sums to 1, log R is -inf, and true_logprob outside the head is
            the last head entry. `counts`: the source had nothing but labels that were sampled; log R is 0,
            the whole distribution's, and both entropies and true_logprob are unknown: 0 stands in their
            places, and nobody may read it as a value.
        tail_logprobs: whether the draws' log-probabilities are stored.
        positions: one of `POSITION_RULES`.
        share: probability with which `sampled` records a counted position of `train`; 1 for other rules.
    """

    k: int
    n: int
    temperatures: tuple[float, ...]
    draw_temperature: float
    seed: int
    rest: str = "exact"
    tail_logprobs: bool = False
    positions: str = "counted"
    share: float = 1.0

    def __post_init__(self) -> None:
        # 1 and 1.0 are equal but are written differently, and equal manifests must be equal bytes.
        object.__setattr__(self, "share", float(self.share))
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
class FeatureSpec:
    """Hidden states of one teacher layer: a vector at each of some positions.

    Attributes:
        layer: how many of the teacher's layers they have passed; 0 are the embeddings, the last is what the
            head reads.
        width: d, numbers of a vector.
        source_width: H, of the teacher's hidden states; d where nothing is projected.
        projection: one of `FEATURE_PROJECTIONS`: how H became d; the matrix is a file of the store.
        projection_digest: sha256 (hex) of that file; None where nothing is projected.
        kept: share of the variance around the mean that the projection keeps, on the rows that were probed;
            1 where nothing is projected.
        kind: one of `FEATURE_KINDS`: `int8` with a float16 scale for each vector, or `float16`.
        positions: one of `FEATURE_POSITIONS`: every position but padding, or the recorded ones.
    """

    layer: int
    width: int
    source_width: int
    projection: str
    projection_digest: str | None
    kept: float
    kind: str
    positions: str

    @property
    def plane(self) -> str:
        """Returns the name of the plane."""
        return f"feature_{self.layer}"


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
        target: one of `TARGETS`, what a label is.
        sequence_length: L, positions of every row.
        rows_per_shard: rows of every shard; only the last shard of a split may have fewer.
        splits: names of the separate row spaces.
        dataset: identity and order of the data: sources with digests, split, packing, token-store digest.
        tokenizer: which tokenizer made the ids.
        record: what is kept of the teacher, and where.
        teacher: None in a token store.
        codec: how rows become bytes.
        outcomes: names of the classes; None where outcomes are the tokenizer's ids.
        planes: the `OPTIONAL_PLANES` that rows have.
        features: hidden states that are kept, a plane for each.
    """

    format_version: int
    target: str
    sequence_length: int
    rows_per_shard: int
    splits: tuple[str, ...]
    dataset: dict[str, Any]
    tokenizer: TokenizerIdentity
    record: RecordSpec
    teacher: TeacherIdentity | None
    codec: CodecSpec
    outcomes: tuple[str, ...] | None = None
    planes: tuple[str, ...] = ()
    features: tuple[FeatureSpec, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "splits", tuple(self.splits))
        object.__setattr__(self, "planes", tuple(self.planes))
        object.__setattr__(self, "features", tuple(self.features))
        if self.outcomes is not None:
            object.__setattr__(self, "outcomes", tuple(self.outcomes))
        object.__setattr__(self, "dataset", _as_read_back(self.dataset, "dataset"))
        check_manifest(self)

    @property
    def outcome_count(self) -> int:
        """Returns V, over how many outcomes the teacher's distribution is."""
        return self.tokenizer.vocabulary_size if self.outcomes is None else len(self.outcomes)

    @property
    def has_labels(self) -> bool:
        """Returns whether labels are a plane; those of `next_token` follow from the tokens."""
        return self.target != "next_token"


def manifest_to_json(manifest: Manifest) -> str:
    """Returns the canonical text: equal manifests give equal text."""
    return canonical_json(asdict(manifest))


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
        check_version(raw.get("format_version"), where)
        if "target" not in raw:
            raise StoreError(
                f"{where} does not say what its labels are (it has no `target`): it was written before the "
                "format was settled; run `prepare` and `capture` again."
            )
    try:
        return typed(Manifest, raw, where)
    except DamagedStoreError:
        raise
    except StoreError as error:
        raise StoreError(f"{where}: {error}") from error


def readable_text(manifest: Manifest) -> bytes:
    """Returns the bytes of a manifest's file, of which a reader makes the same manifest.

    Raises:
        StoreError: it would refuse them: they are too many, or a text or the nesting in them is too long.
    """
    text = manifest_to_json(manifest).encode("ascii")
    if len(text) > MANIFEST_BYTES:
        raise StoreError(
            f"The manifest has {len(text):,} bytes, expected at most {MANIFEST_BYTES:,}: describe the data "
            "in fewer words."
        )
    manifest_from_json(text, "The manifest to be written")
    return text


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
    return [
        "{}: found {}, wanted {}".format(name, *short_pair(left, right))
        for name, left, right in differing(asdict(found), asdict(wanted), absent=_Nothing())
    ]


class _Nothing:
    """Stands for a field that is not there, and is equal to no value that could be."""

    def __repr__(self) -> str:
        return "nothing"


def _as_read_back(value: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns a free-form value as JSON gives it back (tuples become lists), so that equality holds."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StoreError(f"The manifest's {name} cannot be written as JSON: {error}.") from error
