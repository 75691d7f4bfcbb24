"""A store as plain Parquet, one line per position, for pandas, polars and DuckDB.

Nothing here reads it back: the store stays the source. Lists hold what is used alone; a value that does not
exist (the token after a document's last, and its log-probability) is null. docs/store.md has the columns.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
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
from sparsekd.logit_store.planes import Plane, planes_of
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.row import (
    IGNORED_LABEL,
    Row,
    document_of_position,
    is_real,
    labels_at_records,
    labels_of,
    next_tokens,
    planes_of_row,
    weights_of_positions,
)
from sparsekd.logit_store.tools.derive import Progress, no_progress
from sparsekd.logit_store.tools.processes import require_jobs, results_of
from sparsekd.logit_store.tools.spelling import spelling_tokenizer

EXPORT_NAME = "EXPORT.json"
"""Says which store the files are from; written first, so that an export can be continued but not mixed."""

POSITIONS_PER_FILE = 1 << 20


def export_store(
    source: StorePath,
    target: StorePath,
    *,
    split: str | None = None,
    text: bool = False,
    jobs: int = 1,
    progress: Progress = no_progress,
) -> list[StorePath]:
    """Writes a store as Parquet files SPLIT-000000.parquet, ...; returns them.

    Each file is whole or absent. The same call continues an export that was cut off, and several of them, on
    one or more machines, share the files.

    Args:
        source: a sealed store.
        target: a folder that is not there, empty, or holds an export of the same store that was begun.
        split: this split only.
        text: add each token's text, by the store's tokenizer.
        jobs: processes that write files.
        progress: told after each file.

    Raises:
        StoreError: the folder holds something else, or the tokenizer cannot spell tokens.
    """
    require_jobs(jobs)
    store = open_store(source)
    if split is not None:
        store.index(split)
    splits = [split] if split is not None else [name for name in store.manifest.splits if store.rows(name)]
    export = _Export(store, text)
    if text:
        export.spell(0)
    _claim(target, store, splits, text)
    per_file = max(1, POSITIONS_PER_FILE // store.manifest.sequence_length)
    files = [
        (target / f"{name}-{number:06d}.parquet", name, range(start, min(start + per_file, store.rows(name))))
        for name in splits
        for number, start in enumerate(range(0, store.rows(name), per_file))
    ]
    missing = [file for file in files if not exists(file[0])]
    random.shuffle(missing)  # so that several machines seldom write the same one
    written = results_of(export.write, missing, jobs, what=f"exporting {source}")
    for done, _ in enumerate(written, start=1):
        progress("files", len(files) - len(missing) + done, len(files))
    return [final for final, _, _ in files]


def export_schema(manifest: Manifest, *, text: bool) -> pa.Schema:
    """Returns the columns for a store, without metadata."""
    fields = [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
    ]
    if text:
        fields.append(pa.field("text", pa.string(), nullable=False))
    for plane in planes_of(manifest):
        if plane.column is not None:
            fields += COLUMNS[plane.column].fields(plane, manifest)
    return pa.schema(fields)


def rest_column(temperature: float) -> str:
    """Returns the name of log R's column at a temperature, which SQL takes without quotes."""
    return "log_rest_" + f"{temperature:g}".replace(".", "_").replace("-", "m").replace("+", "")


def position_table(
    row: Row, index: int, manifest: Manifest, schema: pa.Schema, spell: Callable[[int], str] | None
) -> pa.Table:
    """Returns the lines of one row.

    Args:
        row: of a store.
        index: its number in the split.
        manifest: of the store.
        schema: `export_schema`, its columns in order.
        spell: id -> text, where the schema has `text`.
    """
    length = len(row.token_ids)
    columns: dict[str, pa.Array] = {
        "row": pa.array(np.full(length, index, np.int64)),
        "position": pa.array(np.arange(length, dtype=np.int32)),
    }
    if spell is not None:
        columns["text"] = pa.array([spell(int(token)) for token in row.token_ids], pa.string())
    arrays = planes_of_row(row)
    for plane in planes_of(manifest):
        if plane.column is not None:
            made = COLUMNS[plane.column]
            names = (field.name for field in made.fields(plane, manifest))
            columns |= dict(zip(names, made.arrays(plane, row, arrays[plane.name], manifest), strict=True))
    return pa.table([columns[name] for name in schema.names], schema=schema)


@dataclass(frozen=True)
class _Column:
    """How a plane becomes columns of the export.

    Attributes:
        fields: (plane, manifest) -> the columns' fields.
        arrays: (plane, row, its array, manifest) -> the columns, a value for each position.
    """

    fields: Callable[[Plane, Manifest], list[pa.Field]]
    arrays: Callable[[Plane, Row, NDArray[Any], Manifest], list[pa.Array]]


def _named(name: str | None, *, nullable: bool) -> Callable[[Plane, Manifest], list[pa.Field]]:
    """Returns what makes the one field of a plane, under its own name for None."""

    def fields(plane: Plane, manifest: Manifest) -> list[pa.Field]:
        return [pa.field(name or plane.name, pa.from_numpy_dtype(plane.dtype), nullable=nullable)]

    return fields


def _token_fields(plane: Plane, manifest: Manifest) -> list[pa.Field]:
    fields = [pa.field("token_id", pa.int32(), nullable=False)]
    return fields if manifest.has_labels else [*fields, pa.field("next_token_id", pa.int32())]


def _tokens(plane: Plane, row: Row, array: NDArray[Any], manifest: Manifest) -> list[pa.Array]:
    if manifest.has_labels:
        return [pa.array(array)]
    following = next_tokens(row)
    return [pa.array(array), pa.array(following.astype(np.int32), mask=following == IGNORED_LABEL)]


def _labels(plane: Plane, row: Row, array: NDArray[Any], manifest: Manifest) -> list[pa.Array]:
    labels = labels_of(row, manifest.target)
    return [pa.array(labels.astype(np.int32), mask=labels == IGNORED_LABEL)]


def _list_fields(plane: Plane, manifest: Manifest) -> list[pa.Field]:
    return [pa.field(plane.name, pa.list_(pa.from_numpy_dtype(plane.dtype)))]


def _lists(plane: Plane, row: Row, array: NDArray[Any], manifest: Manifest) -> list[pa.Array]:
    """A list per position of the entries that are used; null where there is no record."""
    assert row.teacher is not None and row.recorded is not None
    used = row.teacher.head_ids >= 0 if plane.coding == "head" else row.teacher.tail_counts > 0
    sizes = np.zeros(len(row.token_ids), np.int64)
    sizes[row.recorded] = used.sum(axis=1)
    offsets = pa.array(np.append(0, np.cumsum(sizes)).astype(np.int32))
    return [pa.ListArray.from_arrays(offsets, pa.array(array[used]), mask=pa.array(~row.recorded))]


def _grid_fields(plane: Plane, manifest: Manifest) -> list[pa.Field]:
    return [pa.field(rest_column(value), pa.float32()) for value in manifest.record.temperatures]


def _grid(plane: Plane, row: Row, array: NDArray[Any], manifest: Manifest) -> list[pa.Array]:
    return [_scattered(row, column) for column in array.T]


def _numbers(plane: Plane, row: Row, array: NDArray[Any], manifest: Manifest) -> list[pa.Array]:
    return [pa.array(array) if plane.stands == "position" else _scattered(row, array)]


def _true(plane: Plane, row: Row, array: NDArray[Any], manifest: Manifest) -> list[pa.Array]:
    return [_scattered(row, array, labels_at_records(row, manifest.target) != IGNORED_LABEL)]


def _vector_fields(plane: Plane, manifest: Manifest) -> list[pa.Field]:
    return [pa.field(plane.name, pa.list_(pa.float32(), *plane.width(manifest)))]


def _vectors(plane: Plane, row: Row, array: NDArray[Any], manifest: Manifest) -> list[pa.Array]:
    """A vector per position; null where there is none."""
    there = is_real(row) if plane.stands == "real" else row.recorded
    assert there is not None
    every = np.zeros((len(there), *plane.width(manifest)), np.float32)
    every[there] = array
    type_ = _vector_fields(plane, manifest)[0].type
    return [pa.FixedSizeListArray.from_arrays(pa.array(every.ravel()), type=type_, mask=pa.array(~there))]


def _documents(plane: Plane, row: Row, array: NDArray[Any], manifest: Manifest) -> list[pa.Array]:
    return [pa.array(document_of_position(row))]


def _weights(plane: Plane, row: Row, array: NDArray[Any], manifest: Manifest) -> list[pa.Array]:
    return [pa.array(weights_of_positions(row))]


def _scattered(row: Row, values: NDArray[Any], known: NDArray[np.bool_] | None = None) -> pa.Array:
    """Returns a value per position of those of the records, [M]; null elsewhere and where not `known` [M]."""
    assert row.recorded is not None
    every, there = np.zeros(len(row.recorded), values.dtype), row.recorded.copy()
    every[row.recorded] = values
    if known is not None:
        there[row.recorded] = known
    return pa.array(every, mask=~there)


COLUMNS: dict[str, _Column] = {
    "token": _Column(_token_fields, _tokens),
    "document": _Column(_named("document", nullable=False), _documents),
    "weight": _Column(_named("weight", nullable=False), _weights),
    "type": _Column(_named("token_type", nullable=False), _numbers),
    "flag": _Column(_named(None, nullable=False), _numbers),
    "label": _Column(_named("label", nullable=True), _labels),
    "list": _Column(_list_fields, _lists),
    "grid": _Column(_grid_fields, _grid),
    "number": _Column(_named(None, nullable=True), _numbers),
    "true": _Column(_named(None, nullable=True), _true),
    "vector": _Column(_vector_fields, _vectors),
}
"""How each kind of column that `planes.TABLE` names is made."""


class _Export:
    """Writes the files of one export, in any process."""

    def __init__(self, store: LogitStore, text: bool) -> None:
        self._store, self._text = store, text
        self._known: dict[int, str] = {}

    def write(self, file: tuple[StorePath, str, range]) -> None:
        """Writes some rows of a split, unless another process has done so meanwhile."""
        final, split, numbers = file
        manifest = self._store.manifest
        schema = export_schema(manifest, text=self._text).with_metadata(
            {"sparsekd.store": self._store.digest, "sparsekd.manifest": manifest_to_json(manifest)}
        )

        def produce(made: HashingFile) -> None:
            with pq.ParquetWriter(made, schema, compression="zstd", write_page_checksum=True) as writer:
                for index in numbers:  # a row group each: one row is in memory
                    row = self._store.read_row(split, index)
                    spell = self.spell if self._text else None
                    writer.write_table(position_table(row, index, manifest, schema, spell))

        if not exists(final):
            publish(final, produce)

    def spell(self, token: int) -> str:
        """Returns a token's text."""
        if token not in self._known:
            self._known[token] = self._tokenizer.decode([token], skip_special_tokens=False)
        return self._known[token]

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = spelling_tokenizer(self._store)
        if tokenizer is None:
            raise StoreError(
                f"{self._store.tokenizer_path / 'tokenizer.json'} is not there, so tokens cannot be spelled: "
                "export without --text."
            )
        return tokenizer


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
