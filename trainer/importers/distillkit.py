"""DistillKit's captures: Parquet files of bit-packed ids and fitted log-probabilities.

Layout, as of arcee-ai/DistillKit commit a61c2e7 (distillkit/sample_common.py, distillkit/compression/). A
Parquet row is one text with three columns: `input_ids`, list of uint64 [T]; `compressed_logprobs` and
`bytepacked_indices`, lists of lists of uint8, one inner list per position. vLLM gives nothing for a first
token, and the writer leaves that position out: inner list j describes token j + 1, so there are T - 1.

`bytepacked_indices`: k ids of ceil(log2 d) bits each, in one stream of bits, most significant first, filled
with 0 to a byte. `compressed_logprobs`, one part after the other, little-endian:

1. `exact_k` values in `exact_dtype`;
2. one coefficient in `term_dtype` per entry of `polynomial_terms`: an integer e is t^e, `sqrt` and `exp` are
   those functions of t, t = 0, 1, ... over the k - exact_k other ranks (from 0 to 1 with `normalize_t`);
3. for each of `residual_bins`: a scale in `scale_dtype`, then `num_elements` codes of `element_bits` bits,
   packed like the ids. A code c stands for (c - 2^(bits - 1)) * scale, or for -scale and scale where it has
   one bit.

Values behind `exact_k` are polynomial + residual (0 behind the last bin). With `delta_encoding` all values
are differences to the one before and are summed up. The settings stand in `compression_config.yaml` beside
the data.

Ranks that vLLM did not give have the value -inf (and any id): such an entry is not listed. Fitted values may
break the order and sum to more than 1; see `records`. The older layout with `packed_indices` and `coeffs`,
whose values are logits around their mean, is refused, and so are rows of `token_ids` and `top_values`.

Shapes: T tokens of a text, k entries, N = T - 1 positions with a record.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.importers.document import NOT_LISTED, Document, Source, source_files

COLUMNS = ("input_ids", "compressed_logprobs", "bytepacked_indices")
TEXTS_AT_ONCE = 16
SETTINGS = (
    "d",
    "k",
    "exact_k",
    "exact_dtype",
    "polynomial_terms",
    "term_dtype",
    "residual_bins",
    "delta_encoding",
    "error_diffusion",
    "normalize_t",
)
"""Keys of DistillKit's file. error_diffusion changes how codes were chosen, not what they mean."""

BITS = {"float16": 16, "bfloat16": 16, "float32": 32, "float64": 64}
MOST_BITS_OF_A_CODE = 32


@dataclass(frozen=True)
class Bin:
    """One run of quantised residuals."""

    scale_dtype: str
    element_bits: int
    num_elements: int


@dataclass(frozen=True)
class Compression:
    """DistillKit's settings, with its names.

    Attributes:
        d: vocabulary size that decides the bits of an id.
        k: entries.
        exact_k: of these, stored as they are.
        exact_dtype: their type.
        polynomial_terms: of the fit to the others; empty for none.
        term_dtype: of the coefficients.
        residual_bins: of what the fit leaves over.
        delta_encoding: values are differences.
        normalize_t: ranks run from 0 to 1.
    """

    d: int
    k: int
    exact_k: int
    exact_dtype: str
    polynomial_terms: tuple[int | str, ...]
    term_dtype: str
    residual_bins: tuple[Bin, ...]
    delta_encoding: bool
    normalize_t: bool

    @property
    def id_bits(self) -> int:
        """Returns the bits of an id, rounded as DistillKit does, in single precision."""
        return math.ceil(float(np.log2(np.float32(self.d))))

    @property
    def value_bytes(self) -> int:
        """Returns the bytes of a position's values."""
        size = self.exact_k * BITS[self.exact_dtype] // 8
        size += len(self.polynomial_terms) * BITS[self.term_dtype] // 8
        for item in self.residual_bins:
            size += BITS[item.scale_dtype] // 8 + -(-item.element_bits * item.num_elements // 8)
        return size

    @property
    def id_bytes(self) -> int:
        """Returns the bytes of a position's ids."""
        return -(-self.k * self.id_bits // 8)


def read_compression(settings: Mapping[str, Any], where: str) -> Compression:
    """Returns DistillKit's settings from its configuration file's content.

    Args:
        settings: the content, with the defaults of DistillKit where it is silent.
        where: the file, for messages.

    Raises:
        StoreError: a setting is missing, unknown or contradicts another.
    """
    if "polynomial_degree" in settings:
        raise StoreError(
            f"{where} describes DistillKit's older layout (polynomial_degree), whose values are no "
            "log-probabilities; capture these texts again, or sample them with a current DistillKit."
        )
    if unknown := sorted(settings.keys() - set(SETTINGS)):
        raise StoreError(
            f"{where} has the unknown {', '.join(map(str, unknown))}, expected {', '.join(SETTINGS)}."
        )
    try:
        compression = Compression(
            d=int(settings["d"]),
            k=int(settings["k"]),
            exact_k=int(settings["exact_k"]),
            exact_dtype=str(settings.get("exact_dtype", "float32")),
            polynomial_terms=tuple(_term(term) for term in settings.get("polynomial_terms") or ()),
            term_dtype=str(settings.get("term_dtype", "float32")),
            residual_bins=tuple(
                Bin(str(item["scale_dtype"]), int(item["element_bits"]), int(item["num_elements"]))
                for item in settings.get("residual_bins") or ()
            ),
            delta_encoding=bool(settings.get("delta_encoding", True)),
            normalize_t=bool(settings.get("normalize_t", False)),
        )
    except KeyError as error:
        raise StoreError(
            f"{where} lacks {error.args[0]}: give DistillKit's compression_config.yaml."
        ) from error
    except (TypeError, ValueError) as error:
        raise StoreError(f"{where} cannot be read as DistillKit's compression settings ({error}).") from error
    binned = sum(item.num_elements for item in compression.residual_bins)
    dtypes = [
        compression.exact_dtype,
        compression.term_dtype,
        *(item.scale_dtype for item in compression.residual_bins),
    ]
    rules = [
        (
            0 <= compression.exact_k <= compression.k and compression.k >= 1,
            "exact_k is from 0 to k, k at least 1",
        ),
        (compression.d >= 1, "d is at least 1"),
        (binned <= compression.k - compression.exact_k, "residual_bins have at most k - exact_k elements"),
        (all(name in BITS for name in dtypes), f"every dtype is one of {', '.join(BITS)}"),
        (
            all(1 <= item.element_bits <= MOST_BITS_OF_A_CODE for item in compression.residual_bins),
            f"element_bits is from 1 to {MOST_BITS_OF_A_CODE}",
        ),
    ]
    for holds, rule in rules:
        if not holds:
            raise StoreError(
                f"{where} breaks the rule that {rule}: give the file that DistillKit wrote beside the data."
            )
    return compression


def open_distillkit(path: Path, compression: Compression) -> Source:
    """Opens a folder of DistillKit's Parquet files.

    Raises:
        StoreError: there is none, or it has other columns.
    """
    files = source_files(path, (".parquet",), "DistillKit's Parquet files")
    for file in files:
        names = set(_open(file).schema_arrow.names)
        if not set(COLUMNS) <= names:
            older = " (the older layout, which is not read)" if "packed_indices" in names else ""
            raise StoreError(
                f"{file} has the columns {', '.join(sorted(names))}, expected {', '.join(COLUMNS)}{older}."
            )

    def documents() -> Iterator[Document]:
        for file in files:
            yield from _documents(file, compression)

    return Source(
        format="distillkit",
        files=files,
        rest="derived",
        cannot_give=(
            "log R (1 - the sum of what is listed, at temperature 1 only)",
            "the entropies (lower bounds: what is not listed counts as one outcome)",
            "log-probabilities of true tokens that are not listed (upper bounds)",
            "exact values behind the first exact_k ranks (a fit)",
            "a loss mask (every token that has a record counts) and document boundaries inside a text",
        ),
        documents=documents,
        details={
            "compression": {
                "k": compression.k,
                "exact_k": compression.exact_k,
                "exact_dtype": compression.exact_dtype,
                "polynomial_terms": list(compression.polynomial_terms),
                "term_dtype": compression.term_dtype,
                "delta_encoding": compression.delta_encoding,
            }
        },
    )


def unpack_bits(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """Returns the integers [N, count] of `bits` bits each, most significant first, from bytes [N, B]."""
    stream = np.unpackbits(packed, axis=1)[:, : bits * count].reshape(len(packed), count, bits)
    total = np.zeros((len(packed), count), np.int64)
    for bit in range(bits):
        total = (total << 1) | stream[:, :, bit]
    return total


def decode_values(stored: NDArray[np.uint8], compression: Compression) -> NDArray[np.float64]:
    """Returns log-probabilities [N, k] from a position's bytes each, [N, value_bytes]."""
    offset = 0

    def take(size: int) -> NDArray[np.uint8]:
        nonlocal offset
        part = np.ascontiguousarray(stored[:, offset : offset + size])
        offset += size
        return part

    exact = _floats(take(compression.exact_k * BITS[compression.exact_dtype] // 8), compression.exact_dtype)
    others = compression.k - compression.exact_k
    values = np.zeros((len(stored), others))
    if compression.polynomial_terms:
        size = len(compression.polynomial_terms) * BITS[compression.term_dtype] // 8
        coefficients = _floats(take(size), compression.term_dtype)
        ranks = np.linspace(0, 1, others) if compression.normalize_t else np.arange(others, dtype=np.float64)
        terms = np.stack([_term_of(term, ranks) for term in compression.polynomial_terms], axis=1)
        with np.errstate(invalid="ignore", over="ignore"):
            values = coefficients @ terms.T
    start = 0
    for item in compression.residual_bins:
        scale = _floats(take(BITS[item.scale_dtype] // 8), item.scale_dtype)
        packed = take(-(-item.element_bits * item.num_elements // 8))
        codes = unpack_bits(packed, item.element_bits, item.num_elements)
        steps = 2 * codes - 1 if item.element_bits == 1 else codes - (1 << (item.element_bits - 1))
        values[:, start : start + item.num_elements] += steps * scale
        start += item.num_elements
    together = np.concatenate([exact, values], axis=1)
    return np.cumsum(together, axis=1) if compression.delta_encoding else together


def _documents(file: Path, compression: Compression) -> Iterator[Document]:
    number = 0
    try:
        for batch in _open(file).iter_batches(TEXTS_AT_ONCE, columns=list(COLUMNS)):
            columns = [batch.column(name) for name in COLUMNS]
            for index in range(batch.num_rows):
                where = f"{file}, row {number}"
                ids, values, indices = (column[index] for column in columns)
                yield _document(where, ids, values, indices, compression)
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{file} is damaged behind row {number} ({error}): fetch it again.") from error


def _document(where: str, ids: Any, values: Any, indices: Any, compression: Compression) -> Document:
    tokens = _integers(ids, where)
    stored = _bytes_of(values, compression.value_bytes, f"{where}, compressed_logprobs")
    packed = _bytes_of(indices, compression.id_bytes, f"{where}, bytepacked_indices")
    length, positions = len(tokens), len(stored)
    if len(packed) != positions or positions != max(length - 1, 0):
        raise StoreError(
            f"{where} has {length} input_ids, {positions} compressed_logprobs and {len(packed)} "
            "bytepacked_indices; expected one position fewer than tokens: this text was captured in another "
            "way."
        )
    logprobs = decode_values(stored, compression)
    entries = unpack_bits(packed, compression.id_bits, compression.k)
    listed = logprobs > -np.inf
    head_ids = np.full((length, compression.k), NOT_LISTED, np.int64)
    head_logprobs = np.full((length, compression.k), -np.inf)
    head_ids[:positions] = np.where(listed, entries, NOT_LISTED)
    # A fitted value may be NaN where an infinite one was fitted; `put_in_order` refuses it by name.
    head_ids[:positions] = np.where(np.isnan(logprobs), entries, head_ids[:positions])
    head_logprobs[:positions] = logprobs
    mask = np.ones(length, np.bool_)
    mask[-1:] = False
    return Document(where, tokens, mask, head_ids, head_logprobs, np.full(length, np.nan))


def _bytes_of(cell: Any, width: int, where: str) -> NDArray[np.uint8]:
    """Returns a list of lists of bytes as [N, width]."""
    if not cell.is_valid:
        raise StoreError(f"{where} is null: the file is damaged.")
    inner = cell.values
    lengths = inner.value_lengths().to_numpy(zero_copy_only=False)
    bad = np.flatnonzero(lengths != width)
    if bad.size:
        raise StoreError(
            f"{where}, position {bad[0]} has {lengths[bad[0]]} bytes, expected {width} by the compression "
            "settings: they are not those of this file (its compression_config.yaml says what was used)."
        )
    flat = inner.flatten()
    if flat.null_count:
        raise StoreError(f"{where} holds nulls: the file is damaged.")
    return flat.to_numpy(zero_copy_only=False).astype(np.uint8).reshape(len(lengths), width)


def _integers(cell: Any, where: str) -> NDArray[np.int64]:
    if not cell.is_valid or cell.values.null_count:
        raise StoreError(f"{where}: input_ids hold nulls: the file is damaged.")
    values = cell.values.to_numpy(zero_copy_only=False)
    # Out of range for int64 is out of any vocabulary; it is refused there by name.
    return np.minimum(values, np.iinfo(np.int32).max).astype(np.int64)


def _open(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{file} cannot be read as Parquet ({error}): fetch it again.") from error


def _floats(stored: NDArray[np.uint8], dtype: str) -> NDArray[np.float64]:
    """Returns bytes [N, B] as numbers [N, count]."""
    if stored.shape[1] == 0:
        return np.zeros((len(stored), 0))
    if dtype == "bfloat16":  # the upper half of a float32
        return (stored.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.view({"float16": "<f2", "float32": "<f4", "float64": "<f8"}[dtype]).astype(np.float64)


def _term(term: Any) -> int | str:
    if isinstance(term, bool) or not (isinstance(term, int) or term in ("sqrt", "exp")):
        raise ValueError(f"polynomial term {term!r} is none of an integer, sqrt and exp")
    return term


def _term_of(term: int | str, ranks: NDArray[np.float64]) -> NDArray[np.float64]:
    if isinstance(term, str):
        return np.sqrt(ranks) if term == "sqrt" else np.exp(ranks)
    with np.errstate(divide="ignore"):
        return ranks**term
