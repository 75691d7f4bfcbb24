"""A store as plain Parquet, one line per position, for pandas, polars and DuckDB.

Nothing here reads it back: the store stays the source. Lists hold what is used alone; a value that does not
exist (the token after a document's last, and its log-probability) is null. docs/store.md has the columns.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.json_text import canonical_json
from sparsekd.logit_store.manifest import Manifest, manifest_digest, manifest_to_json
from sparsekd.logit_store.places.files import (
    HashingFile,
    exists,
    make_folder,
    names_in,
    publish,
    publish_bytes,
    remove_stale,
)
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.row import Row, document_of_position
from sparsekd.logit_store.tools.derive import Progress, no_progress

EXPORT_NAME = "EXPORT.json"
"""Says which store the files are from; written first, so that an export can be continued but not mixed."""

POSITIONS_PER_FILE = 1 << 20


def export_store(
    source: StorePath,
    target: StorePath,
    *,
    split: str | None = None,
    text: bool = False,
    progress: Progress = no_progress,
) -> list[StorePath]:
    """Writes a store as Parquet files SPLIT-000000.parquet, ...; returns them.

    Each file is whole or absent. The same call continues an export that was cut off.

    Args:
        source: a sealed store.
        target: a folder that is not there, empty, or holds an export of the same store that was begun.
        split: this split only.
        text: add each token's text, by the store's tokenizer.
        progress: told of rows.

    Raises:
        StoreError: the folder holds something else, or the tokenizer cannot spell tokens.
    """
    store = open_store(source)
    if split is not None:
        store.index(split)
    splits = [split] if split is not None else [name for name in store.manifest.splits if store.rows(name)]
    spell = _speller(store) if text else None
    _claim(target, store, splits, text)
    schema = export_schema(store.manifest, text=text).with_metadata(
        {"sparsekd.store": store.digest, "sparsekd.manifest": manifest_to_json(store.manifest)}
    )
    per_file = max(1, POSITIONS_PER_FILE // store.manifest.sequence_length)
    total, done = sum(store.rows(name) for name in splits), 0
    written = []
    for name in splits:
        for number, start in enumerate(range(0, store.rows(name), per_file)):
            stop = min(start + per_file, store.rows(name))
            final = target / f"{name}-{number:06d}.parquet"
            if not exists(final):
                publish(final, _producer(store, name, range(start, stop), schema, spell))
            written.append(final)
            done += stop - start
            progress("rows", done, total)
    return written


def export_schema(manifest: Manifest, *, text: bool) -> pa.Schema:
    """Returns the columns for a store, without metadata."""
    record = manifest.record
    fields = [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("document", pa.int64(), nullable=False),
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("next_token_id", pa.int32()),
    ]
    if text:
        fields.append(pa.field("text", pa.string(), nullable=False))
    fields.append(pa.field("loss_mask", pa.bool_(), nullable=False))
    if manifest.teacher is None:
        return pa.schema(fields)
    if record.k:
        fields += [
            pa.field("head_ids", pa.list_(pa.int32())),
            pa.field("head_logprobs", pa.list_(pa.float32())),
        ]
    if record.n:
        fields += [pa.field("tail_ids", pa.list_(pa.int32())), pa.field("tail_counts", pa.list_(pa.int32()))]
    if record.tail_logprobs:
        fields.append(pa.field("tail_logprobs", pa.list_(pa.float32())))
    fields += [pa.field(rest_column(value), pa.float32()) for value in record.temperatures]
    fields += [pa.field(name, pa.float32()) for name in ("rest_entropy", "true_logprob", "entropy")]
    return pa.schema(fields)


def rest_column(temperature: float) -> str:
    """Returns the name of log R's column at a temperature, which SQL takes without quotes."""
    return "log_rest_" + f"{temperature:g}".replace(".", "_").replace("-", "m").replace("+", "")


def position_table(row: Row, index: int, schema: pa.Schema, spell: Callable[[int], str] | None) -> pa.Table:
    """Returns the lines of one row.

    Args:
        row: of a store.
        index: its number in the split.
        schema: `export_schema`, its columns in order.
        spell: id -> text, where the schema has `text`.
    """
    length = len(row.token_ids)
    ends = np.zeros(length, np.bool_)
    ends[np.append(row.segment_starts[1:], length) - 1] = True
    columns: dict[str, pa.Array] = {
        "row": pa.array(np.full(length, index, np.int64)),
        "position": pa.array(np.arange(length, dtype=np.int32)),
        "document": pa.array(document_of_position(row)),
        "token_id": pa.array(row.token_ids),
        "next_token_id": pa.array(np.roll(row.token_ids, -1), mask=ends),
        "loss_mask": pa.array(row.loss_mask),
    }
    if spell is not None:
        columns["text"] = pa.array([spell(int(token)) for token in row.token_ids], pa.string())
    record = row.teacher
    if record is not None:
        in_head = record.head_ids >= 0
        columns["head_ids"] = _lists(record.head_ids, in_head)
        columns["head_logprobs"] = _lists(record.head_logprobs, in_head)
        drawn = record.tail_counts > 0
        columns["tail_ids"] = _lists(record.tail_ids, drawn)
        columns["tail_counts"] = _lists(record.tail_counts, drawn)
        if "tail_logprobs" in schema.names:
            columns["tail_logprobs"] = _lists(record.tail_logprobs, drawn)
        rests = [name for name in schema.names if name.startswith("log_rest_")]
        for column, name in enumerate(rests):
            columns[name] = pa.array(np.ascontiguousarray(record.log_rest[:, column]))
        columns["rest_entropy"] = pa.array(record.rest_entropy)
        columns["true_logprob"] = pa.array(record.true_logprob, mask=ends)
        columns["entropy"] = pa.array(record.entropy)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _producer(
    store: LogitStore, split: str, numbers: range, schema: pa.Schema, spell: Callable[[int], str] | None
) -> Callable[[HashingFile], None]:
    def produce(file: HashingFile) -> None:
        with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
            for index in numbers:  # a row group each: one row is in memory
                writer.write_table(position_table(store.read_row(split, index), index, schema, spell))

    return produce


def _lists(values: NDArray[Any], used: NDArray[np.bool_]) -> pa.Array:
    """Returns a list per position [L] of the used ones among values [L, K]."""
    offsets = np.append(0, np.cumsum(used.sum(axis=1))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values[used]))


def _claim(target: StorePath, store: LogitStore, splits: list[str], text: bool) -> None:
    """Makes the folder this export's, or finds that it is."""
    content = canonical_json(
        {
            "format": "one line per position, see docs/store.md",
            "store": store.digest,
            "manifest_sha256": manifest_digest(store.manifest),
            "splits": splits,
            "text": text,
        }
    ).encode("ascii")
    make_folder(target)
    remove_stale(target)
    place = target / EXPORT_NAME
    if exists(place):
        if place.read_bytes() != content:
            raise StoreError(f"{target} holds another export than this one: name a new or an empty folder.")
        return
    if strangers := sorted(names_in(target)):
        raise StoreError(
            f"{target} is no export but holds {', '.join(strangers[:3])}: name a new or an empty folder."
        )
    publish_bytes(place, content)


def _speller(store: LogitStore) -> Callable[[int], str]:
    place = store.tokenizer_path / "tokenizer.json"
    if not place.exists():
        raise StoreError(f"{place} is not there, so tokens cannot be spelled: export without --text.")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(place))
    known: dict[int, str] = {}

    def spell(token: int) -> str:
        if token not in known:
            known[token] = tokenizer.decode([token], skip_special_tokens=False)
        return known[token]

    return spell
