"""Rows of a table of lists: Parquet files, or lines of JSON with the same names.

Arrow's readers return what a file says, so a small file may unfold to any size: how much a Parquet column
holds is compared with its bytes before it is read, and only some rows are in memory.

Shapes: T positions of a row, E entries of all of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.importers.document import LINES, files_in, has_suffix, one_line, source_files
from sparsekd.trainer.importers.jsonl import read_objects

SUFFIXES = (".parquet", *LINES)
VALUES_AT_ONCE = 1 << 22
"""Of the widest column, in the rows that are read together."""

ROWS_AT_ONCE = 16
MOST_EXPANSION = 1_000
"""Values that one compressed byte may become. Ids and log-probabilities shrink to a tenth or so."""

FREE_VALUES = 1 << 24
"""Values of a row group that may come from nothing."""

REMEDY = "the file is damaged: fetch it again"

TableRow = tuple[str, Mapping[str, Any]]
"""A row's place, for messages, and its Arrow scalars by column."""


class Lists(NamedTuple):
    """Lists that stand one behind the other.

    Attributes:
        flat: [E], their entries.
        lengths: int64 [T], of each.
    """

    flat: NDArray[Any]
    lengths: NDArray[np.int64]


def table_files(path: Path, what: str, suffixes: Sequence[str] = SUFFIXES) -> tuple[Path, ...]:
    """Returns the table's files: the file, or the folder's with the first suffix that any has, since other
    files may describe them.

    Raises:
        StoreError: there is none, or only Hugging Face's Arrow files; the message tells how to turn them
            into Parquet.
    """
    names = [item.name for item in files_in(path, what)]
    if any(name.endswith(".arrow") for name in names):
        raise StoreError(
            f"{path} holds Arrow files, expected Parquet or lines of JSON: write it anew with "
            "datasets.load_from_disk(FOLDER).to_parquet(FILE)."
        )
    used = [suffix for suffix in suffixes if any(has_suffix(name, (suffix,)) for name in names)]
    return source_files(path, tuple(used[:1] or suffixes), what)


def column_names(file: Path) -> frozenset[str]:
    """Returns the columns of a Parquet file, or the keys of a JSON file's first object.

    Raises:
        StoreError: the file cannot be read.
    """
    if file.suffix == ".parquet":
        return frozenset(_open(file).schema_arrow.names)
    return frozenset(next((item for _, item in read_objects(file)), {}))


def read_rows(
    files: Sequence[Path], columns: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[TableRow]:
    """Returns the rows of all files.

    Args:
        files: of one table, in order.
        columns: that every row has.
        optional: that are returned where a file has them.

    Raises:
        StoreError: a column is missing, the file is damaged, or it would unfold to more than its bytes can
            hold.
    """
    for file in files:
        if file.suffix == ".parquet":
            yield from _parquet_rows(file, columns, optional)
        else:
            for where, item in read_objects(file):
                if missing := [name for name in columns if name not in item]:
                    raise StoreError(f"{where} lacks {', '.join(missing)}, expected {', '.join(columns)}.")
                names = [*columns, *(name for name in optional if name in item)]
                yield where, {name: _scalar(item[name], name, where) for name in names}


def vector(row: TableRow, name: str, *, integer: bool) -> NDArray[Any]:
    """Returns a column's list as int64 or float64 [T].

    Raises:
        StoreError: it is no list of such numbers, or holds nulls.
    """
    where, cells = row
    return _numbers(_values_of(cells[name], name, where), name, where, integer=integer)


def lists_of(row: TableRow, name: str, *, integer: bool) -> Lists:
    """Returns a column's list of lists of numbers, int64 or float64; a null in place of a list is empty.

    Raises:
        StoreError: it is no list of lists of such numbers, or these hold nulls.
    """
    where, _ = row
    inner = inner_lists(row, name)
    flat = _numbers(inner.flatten(), name, where, integer=integer)
    return Lists(flat, inner.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64))


def inner_lists(row: TableRow, name: str) -> Any:
    """Returns the Arrow array of a column's inner lists.

    Raises:
        StoreError: it is no list of lists.
    """
    where, cells = row
    inner = _values_of(cells[name], name, where)
    if pa.types.is_fixed_size_list(inner.type):
        inner = inner.cast(pa.large_list(inner.type.value_type))
    if pa.types.is_null(inner.type):  # nothing but nulls, or nothing at all
        inner = inner.cast(pa.large_list(pa.int64()))
    if not (pa.types.is_list(inner.type) or pa.types.is_large_list(inner.type)):
        raise StoreError(f"{where}: {name} holds {inner.type}, expected a list for each position.")
    return inner


def _values_of(cell: Any, name: str, where: str) -> Any:
    if not cell.is_valid or not isinstance(cell, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
        found = cell.type if cell.is_valid else "null"
        raise StoreError(f"{where}: {name} is {found}, expected a list: {REMEDY}.")
    return cell.values


def _numbers(values: Any, name: str, where: str, *, integer: bool) -> NDArray[Any]:
    kind = values.type
    fits = pa.types.is_integer(kind) or pa.types.is_null(kind) or pa.types.is_boolean(kind)
    if not (fits or (not integer and pa.types.is_floating(kind))):
        raise StoreError(f"{where}: {name} holds {kind}, expected {'integers' if integer else 'numbers'}.")
    if values.null_count:
        raise StoreError(f"{where}: {name} holds nulls: {REMEDY}.")
    numbers = values.to_numpy(zero_copy_only=False)
    if integer:
        # Beyond int64 is beyond any vocabulary, and is refused there by name.
        return (np.minimum(numbers, 1 << 62) if kind == pa.uint64() else numbers).astype(np.int64)
    return numbers.astype(np.float64)


def _parquet_rows(file: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[TableRow]:
    table = _open(file)
    found = table.schema_arrow.names
    if missing := [name for name in columns if name not in found]:
        raise StoreError(f"{file} lacks the columns {', '.join(missing)}; it has {', '.join(found)}.")
    names = [*columns, *(name for name in optional if name in found)]
    number = 0
    try:
        for group in range(table.num_row_groups):
            most = _widest(table.metadata.row_group(group), names, file, group)
            rows = max(1, table.metadata.row_group(group).num_rows)
            together = max(1, min(ROWS_AT_ONCE, VALUES_AT_ONCE * rows // max(most, 1)))
            for batch in table.iter_batches(together, row_groups=[group], columns=names):
                for index in range(batch.num_rows):
                    yield f"{file}, row {number}", {name: batch.column(name)[index] for name in names}
                    number += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StoreError(
            f"{file} is damaged behind row {number} ({one_line(error)}): fetch it again."
        ) from error


def _widest(group: Any, names: Sequence[str], file: Path, number: int) -> int:
    """Returns the values of the widest column of a row group; refuses what cannot be a capture."""
    columns = [group.column(index) for index in range(group.num_columns)]
    columns = [column for column in columns if column.path_in_schema.partition(".")[0] in names]
    # A mask of ones has as many values as what it masks, and no bytes: all columns answer for each.
    size = sum(column.total_compressed_size for column in columns)
    for column in columns:
        if column.num_values > FREE_VALUES + MOST_EXPANSION * size:
            raise StoreError(
                f"{file}, row group {number}, {column.path_in_schema}: {column.num_values:,} values in "
                f"{size:,} bytes are no capture's: the file is damaged, or made to fill the memory."
            )
    return max((column.num_values for column in columns), default=0)


def _scalar(value: Any, name: str, where: str) -> Any:
    try:
        return pa.scalar(value)
    except (pa.ArrowException, ValueError, OverflowError, TypeError) as error:
        raise StoreError(f"{where}: {name} is no table of one kind of value ({one_line(error)}).") from error


def _open(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StoreError(f"{file} cannot be read as Parquet ({one_line(error)}): fetch it again.") from error
