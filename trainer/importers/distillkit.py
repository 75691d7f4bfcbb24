"""DistillKit's captures: Parquet files of bit-packed ids and fitted log-probabilities.

Layout, as of arcee-ai/DistillKit commit a61c2e7 (distillkit/sample_common.py, distillkit/compression/). A
Parquet row is one text with three columns: `input_ids`, list of uint64 [T]; `compressed_logprobs` and
`bytepacked_indices`, lists of lists of uint8, one inner list per position. vLLM gives nothing for a first
token, and the writer leaves that position out: inner list j describes token j + 1, so there are T - 1. Where
there are T, as in sets that were packed afterwards, the last describes what follows the end and is left away.

So that the last token of a text is described, too, the sampler appends a padding token (the tokenizer's; its
end-of-text token where it has none) to texts shorter than its limit. Padding tokens at the end are left away
unless they are the end-of-text token, which ends our texts as well: nobody should learn to write padding.

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

The coefficients were fitted for a decoder that computes the polynomial in `term_dtype` and takes the sum to
`exact_dtype`: with 16 bits another precision gives another curve, far from the values (`decode_values`).

Ranks that vLLM did not give have the value -inf (and any id): such an entry is not listed. Fitted values may
break the order and sum to more than 1; see `records`. The older layout with `packed_indices` and `coeffs`,
whose values are logits around their mean, is refused.

Shapes: T tokens of a text, k entries, N positions, P polynomial terms.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.importers.columns import (
    TableRow,
    column_names,
    lists_of,
    read_rows,
    table_files,
    vector,
)
from sparsekd.trainer.importers.document import NOT_LISTED, Document, Format, Options, Source, one_line

if TYPE_CHECKING:
    import torch

COLUMNS = ("input_ids", "compressed_logprobs", "bytepacked_indices")
COMPRESSION_NAME = "compression_config.yaml"
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
MOST_ENTRIES = 1 << 20
"""Of a position: more than any vocabulary has."""

MOST_TERMS = 64

POSITIONS_AT_ONCE = 1024
"""That are decoded together, which bounds the products [N, k, P]."""


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
    if unknown := sorted(map(str, settings.keys() - set(SETTINGS))):
        raise StoreError(f"{where} has the unknown {', '.join(unknown)}, expected {', '.join(SETTINGS)}.")
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
    except (TypeError, ValueError, OverflowError) as error:
        raise StoreError(
            f"{where} cannot be read as DistillKit's compression settings ({one_line(error)})."
        ) from error
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
        (
            1 <= compression.d <= 1 << 31 and compression.k <= MOST_ENTRIES,
            f"d is from 1 to 2^31, k at most {MOST_ENTRIES}",
        ),
        (
            len(compression.polynomial_terms) <= MOST_TERMS
            and all(
                isinstance(term, str) or abs(term) <= MOST_TERMS for term in compression.polynomial_terms
            ),
            f"there are at most {MOST_TERMS} polynomial_terms, with exponents up to {MOST_TERMS}",
        ),
        (all(item.num_elements >= 1 for item in compression.residual_bins), "num_elements is at least 1"),
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


def read_distillkit(path: Path, options: Options) -> Source:
    """Opens a folder of DistillKit's Parquet files.

    Raises:
        StoreError: there is none, it has other columns, or its settings are missing.
    """
    files = table_files(path, "DistillKit's Parquet files")
    for file in files:
        names = column_names(file)
        if not set(COLUMNS) <= names:
            older = " (the older layout, which is not read)" if "packed_indices" in names else ""
            raise StoreError(
                f"{file} has the columns {', '.join(sorted(names))}, expected {', '.join(COLUMNS)}{older}."
            )
    folder = path if path.is_dir() else path.parent
    compression = read_compression_file(options.compression or folder / COMPRESSION_NAME)

    def documents() -> Iterator[Document]:
        tokenizer = options.tokenizer()
        padding = None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id
        for row in read_rows(files, COLUMNS):
            yield _document(row, compression, padding)

    return Source(
        files=files,
        rest="derived",
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


FORMAT = Format(
    name="distillkit",
    reads="DistillKit's captures: Parquet and compression_config.yaml",
    suffixes=(".parquet",),
    fields=(frozenset(COLUMNS), frozenset({"input_ids", "packed_indices", "coeffs"})),
    read=read_distillkit,
    cannot_give=(
        "exact values behind the first exact_k ranks (a fit)",
        "a loss mask (every token that has a record counts) and document boundaries inside a text",
    ),
    flags=("compression",),
)


def read_compression_file(place: Path) -> Compression:
    """Reads DistillKit's settings, see `read_compression`.

    Raises:
        StoreError: the file is missing, or no such settings.
    """
    import yaml

    try:
        content = yaml.safe_load(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(
            f"{place} is not there, and DistillKit's files cannot be read without their settings: name it "
            "with --compression."
        ) from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise StoreError(f"{place} cannot be read as YAML ({one_line(error)}).") from error
    if not isinstance(content, dict):
        raise StoreError(f"{place} holds no settings.")
    return read_compression(content, str(place))


def unpack_bits(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """Returns the integers [N, count] of `bits` bits each, most significant first, from bytes [N, B]."""
    stream = np.unpackbits(packed, axis=1)[:, : bits * count].reshape(len(packed), count, bits)
    total = np.zeros((len(packed), count), np.int64)
    for bit in range(bits):
        total = (total << 1) | stream[:, :, bit]
    return total


def decode_values(stored: NDArray[np.uint8], compression: Compression) -> NDArray[np.float64]:
    """Returns log-probabilities [N, k] from a position's bytes each, [N, value_bytes].

    In DistillKit's own precision: polynomial terms and their products in `term_dtype`, residuals in float32,
    everything rounded to `exact_dtype` where it does so, differences summed up in float32.
    """
    import torch

    out = np.empty((len(stored), compression.k))
    for start in range(0, len(stored), POSITIONS_AT_ONCE):
        block = torch.from_numpy(stored[start : start + POSITIONS_AT_ONCE].copy())
        out[start : start + POSITIONS_AT_ONCE] = _decode_block(block, compression).double().numpy()
    return out


def _decode_block(stored: "torch.Tensor", compression: Compression) -> "torch.Tensor":
    """Returns [N, k] in DistillKit's dtype from uint8 [N, value_bytes]."""
    import torch

    offset = 0

    def take(count: int, dtype: str) -> "torch.Tensor":
        """Returns the next numbers of each position, [N, count]."""
        nonlocal offset
        size = count * BITS[dtype] // 8
        part = stored[:, offset : offset + size].contiguous()
        offset += size
        return part.view(getattr(torch, dtype)).reshape(len(stored), count)

    out_dtype, term_dtype = getattr(torch, compression.exact_dtype), getattr(torch, compression.term_dtype)
    others = compression.k - compression.exact_k
    exact = take(compression.exact_k, compression.exact_dtype)
    fit = None
    if compression.polynomial_terms:
        coefficients = take(len(compression.polynomial_terms), compression.term_dtype)
        ranks = (
            torch.linspace(0, 1, others, dtype=term_dtype)
            if compression.normalize_t
            else torch.arange(others, dtype=term_dtype)
        )
        terms = torch.stack([_term_of(term, ranks) for term in compression.polynomial_terms], dim=1)
        # Only where products are rounded to 16 bits is their sum another than the matrix product.
        short = BITS[compression.term_dtype] == 16
        fit = (terms * coefficients[:, None]).sum(dim=2) if short else coefficients @ terms.T
    double = any(item.scale_dtype == "float64" for item in compression.residual_bins)
    residual = torch.zeros(len(stored), others, dtype=torch.float64 if double else torch.float32)
    start = 0
    for item in compression.residual_bins:
        scale = take(1, item.scale_dtype)
        size = -(-item.element_bits * item.num_elements // 8)
        packed = stored[:, offset : offset + size].numpy()
        offset += size
        codes = torch.from_numpy(unpack_bits(packed, item.element_bits, item.num_elements))
        steps = 2 * codes - 1 if item.element_bits == 1 else codes - (1 << (item.element_bits - 1))
        residual[:, start : start + item.num_elements] = steps.float() * scale
        start += item.num_elements
    rest = residual.to(out_dtype) if fit is None else fit + residual.to(out_dtype)
    together = torch.cat([exact, rest], dim=1)
    return together.float().cumsum(dim=1).to(out_dtype) if compression.delta_encoding else together


def _document(row: TableRow, compression: Compression, padding: int | None) -> Document:
    where, _ = row
    tokens = vector(row, "input_ids", integer=True)
    stored = _bytes_of(row, "compressed_logprobs", compression.value_bytes)
    packed = _bytes_of(row, "bytepacked_indices", compression.id_bytes)
    length, positions = len(tokens), len(stored)
    if len(packed) != positions or positions not in (length, max(length - 1, 0)):
        raise StoreError(
            f"{where} has {length} input_ids, {positions} compressed_logprobs and {len(packed)} "
            "bytepacked_indices; expected one position fewer than tokens, or as many: this text was captured "
            "in another way."
        )
    if padding is not None:
        length = int(np.flatnonzero(tokens != padding).max(initial=-1)) + 1
    positions = max(min(positions, length - 1), 0)
    logprobs = decode_values(stored[:positions], compression)
    entries = unpack_bits(packed[:positions], compression.id_bits, compression.k)
    head_ids = np.full((length, compression.k), NOT_LISTED, np.int64)
    head_logprobs = np.full((length, compression.k), -np.inf)
    # A fitted value may be NaN where an infinite one was fitted; `put_in_order` refuses it by name.
    head_ids[:positions] = np.where(logprobs == -np.inf, NOT_LISTED, entries)
    head_logprobs[:positions] = logprobs
    mask = np.ones(length, np.bool_)
    mask[-1:] = False
    return Document(where, tokens[:length], mask, head_ids, head_logprobs)


def _bytes_of(row: TableRow, name: str, width: int) -> NDArray[np.uint8]:
    """Returns a list of lists of bytes as [N, width]."""
    where, _ = row
    found = lists_of(row, name, integer=True)
    bad = np.flatnonzero(found.lengths != width)
    if bad.size:
        raise StoreError(
            f"{where}, {name}, position {bad[0]} has {found.lengths[bad[0]]} bytes, expected {width} by the "
            "compression settings: they are not those of this file (its compression_config.yaml says what "
            "was used)."
        )
    if found.flat.size and not 0 <= found.flat.min() <= found.flat.max() <= 255:
        raise StoreError(f"{where}: {name} holds numbers that are no bytes: the file is damaged.")
    return found.flat.astype(np.uint8).reshape(len(found.lengths), width)


def _term(term: Any) -> int | str:
    if isinstance(term, bool) or not (isinstance(term, int) or term in ("sqrt", "exp")):
        raise ValueError(f"polynomial term {term!r} is none of an integer, sqrt and exp")
    return term


def _term_of(term: int | str, ranks: "torch.Tensor") -> "torch.Tensor":
    return getattr(ranks, term)() if isinstance(term, str) else ranks**term
