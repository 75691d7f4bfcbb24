"""Documents as they come: text files, JSON lines, CSV, Parquet, saved Hugging Face datasets and hub names.

Every reader streams: one document, one line or one batch of rows is in memory at a time. The order depends
on the given paths and on relative names alone, never on the file system, so that two machines with the same
files read the same corpus.
"""

import csv
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sparsekd.logit_store.errors import first_line
from sparsekd.trainer.config.corpus import CorpusConfig, check_corpus, with_escapes
from sparsekd.trainer.config.schema import require
from sparsekd.trainer.corpus.fields import require_fields, text_and_weight
from sparsekd.trainer.corpus.files import LeftOut, SourceFile, list_files, source_name
from sparsekd.trainer.corpus.splitting import split_text
from sparsekd.trainer.corpus.streams import (
    LARGEST_DOCUMENT,
    open_text,
    read_lines,
    without_compression,
)
from sparsekd.trainer.run.errors import DataError

# Rows of a Parquet file or dataset that are decoded at a time: enough to hide the cost of a batch, and small
# beside a row group.
BATCH_ROWS = 1024


@dataclass(frozen=True)
class Document:
    """One document and where it stood.

    Attributes:
        text: The text, decoded and otherwise untouched; may be empty.
        content: Its UTF-8 bytes, from which digests and the held-out choice come.
        source: Index into `corpus.paths`.
        place: File relative to the given path, with line or row number where it has one; for messages.
        weight: What `corpus.weight_field` says of its weight in the loss; 1 without such a field.
    """

    text: str
    content: bytes
    source: int
    place: str
    weight: float = 1.0


def read_documents(config: CorpusConfig, left_out: LeftOut = lambda name: None) -> Iterator[Document]:
    """Yields the documents of `corpus.paths` in their fixed order, `corpus.max_documents` at most.

    Args:
        config: Where documents are and how they are read.
        left_out: Is told of the files that `list_files` leaves out.

    Raises:
        ConfigError: No path is given, or keys contradict each other.
        DataError: A path matches nothing, or a file, line or row cannot be read; the message says where.
    """
    require(config.paths, "corpus.paths", "to find documents")
    check_corpus(config)
    return islice(_read_all(config, left_out), config.max_documents)


def _read_all(config: CorpusConfig, left_out: LeftOut) -> Iterator[Document]:
    compressed = config.format in ("text", "jsonl", "csv")
    for source, given in enumerate(config.paths):
        if config.format == "dataset":
            yield from _read_dataset(given, source, config)
            continue
        files = list_files(given, config.include, config.exclude, compressed=compressed, left_out=left_out)
        for file in files:
            if config.format == "text":
                yield from _read_text(file, source, config)
            elif config.format == "jsonl":
                yield from _read_jsonl(file, source, config)
            elif config.format == "csv":
                yield from _read_csv(file, source, config)
            elif config.format == "parquet":
                yield from _read_parquet(file, source, config)
            else:
                raise DataError(
                    f"corpus.format is {config.format!r}, expected text, jsonl, csv, parquet or dataset."
                )


def _document(text: str, source: int, place: str, weight: float = 1.0) -> Document:
    text = text.removeprefix("\ufeff")  # a byte order mark says nothing at the beginning of a text
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: the text holds {text[error.start]!r} (half of a surrogate pair) at character "
            f"{error.start}, which is no Unicode text; mend or remove this document."
        ) from error
    return Document(text=text, content=content, source=source, place=place, weight=weight)


def _read_text(file: SourceFile, source: int, config: CorpusConfig) -> Iterator[Document]:
    separator = None if config.separator is None else with_escapes(config.separator)
    with open_text(file.path) as stream:
        for text, line in split_text(stream, file.path, config.sample_by, separator):
            yield _document(text, source, file.name if line is None else f"{file.name}:{line}")


def _read_jsonl(file: SourceFile, source: int, config: CorpusConfig) -> Iterator[Document]:
    with open_text(file.path) as stream:
        for number, line in enumerate(read_lines(stream, file.path), start=1):
            if not line.strip():
                continue
            where = f"{file.path}, line {number}"
            try:  # a mark stands before later lines where files were joined
                record = json.loads(_decoded(line, where).removeprefix("\ufeff"))
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where} is not JSON: {error.msg} at column {error.colno}; mend or remove the line."
                ) from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
                raise DataError(
                    f"{where} cannot be read as JSON ({first_line(error)}); mend or remove the line."
                ) from error
            if not isinstance(record, dict):
                raise DataError(
                    f"{where} has no field {config.text_field!r}, found {type(record).__name__}; mend or "
                    "remove the line."
                )
            text, weight = text_and_weight(record, config, where, "field")
            yield _document(text, source, f"{file.name}:{number}", weight)


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8: byte 0x{line[error.start]:02x} at offset {error.start} of the line "
            "cannot be decoded; convert the file."
        ) from error


def _read_csv(file: SourceFile, source: int, config: CorpusConfig) -> Iterator[Document]:
    is_tabbed = without_compression(file.name).lower().endswith((".tsv", ".tab"))
    delimiter = ("\t" if is_tabbed else ",") if config.delimiter is None else with_escapes(config.delimiter)
    csv.field_size_limit(LARGEST_DOCUMENT)
    with open_text(file.path) as stream:
        lines = (
            _decoded(line, f"{file.path}, line {number}")
            for number, line in enumerate(read_lines(stream, file.path), start=1)
        )
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        line = 1
        try:
            for cells in rows:
                where, place = f"{file.path}, line {line}", f"{file.name}:{line}"
                line = rows.line_num + 1
                if header is None:
                    header = cells
                    _check_header(header, config, where)
                elif cells:
                    if len(cells) != len(header):
                        raise DataError(
                            f"{where} has {len(cells)} cells, the first line names {len(header)} columns; "
                            "mend the row, or set corpus.delimiter to what stands between cells."
                        )
                    record: dict[str, Any] = dict(zip(header, cells, strict=True))
                    if config.weight_field is not None:
                        record[config.weight_field] = _as_number(record[config.weight_field])
                    text, weight = text_and_weight(record, config, where, "column")
                    yield _document(text, source, place, weight)
        except csv.Error as error:
            raise DataError(
                f"{file.path} cannot be read as CSV in the row that begins at line {line} ({error}); mend "
                'it: a cell with a delimiter, line break or quote stands in quotes, with "" for the quote.'
            ) from error


def _check_header(header: list[str], config: CorpusConfig, where: str) -> None:
    require_fields(dict.fromkeys(header, ""), config, where, "column")
    for name in (config.text_field, config.weight_field):
        if name is not None and header.count(name) > 1:
            raise DataError(
                f"{where} names the column {name!r} {header.count(name)} times; rename the others."
            )


def _as_number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


def _read_parquet(file: SourceFile, source: int, config: CorpusConfig) -> Iterator[Document]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file.path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file.path} cannot be read as Parquet: {first_line(error)}.") from error
    with table:
        columns = _columns_of_schema(table.schema_arrow)
        require_fields(columns, config, str(file.path), "column")
        row = 0
        try:
            for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=_top_columns(columns, config)):
                for record in batch.to_pylist():
                    text, weight = text_and_weight(record, config, f"{file.path}, row {row}", "column")
                    yield _document(text, source, f"{file.name}:{row}", weight)
                    row += 1
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(
                f"{file.path} cannot be read at row {row} or shortly after: {first_line(error)}."
            ) from error


def _columns_of_schema(fields: Any) -> dict[str, Any]:
    """Columns of an Arrow schema, or fields of a struct, as `require_fields` takes them."""
    from pyarrow import types

    return {
        field.name: _columns_of_schema(field.type) if types.is_struct(field.type) else "" for field in fields
    }


def _top_columns(columns: Mapping[str, Any], config: CorpusConfig) -> list[str]:
    """The columns in which the fields that are asked for may stand."""
    names = [name for name in (config.text_field, config.weight_field) if name is not None]
    return [
        column for column in columns if any(name == column or name.startswith(f"{column}.") for name in names)
    ]


def _read_dataset(given: str, source: int, config: CorpusConfig) -> Iterator[Document]:
    table = _load_dataset(given, config)
    require_fields(dict(table.features), config, f"The dataset {given}", "column")
    row = 0
    fields = _top_columns(table.features, config)
    for batch in table.select_columns(fields).iter(batch_size=BATCH_ROWS):
        for values in zip(*(batch[field] for field in fields), strict=True):
            record = dict(zip(fields, values, strict=True))
            text, weight = text_and_weight(record, config, f"{given}, row {row}", "column")
            yield _document(text, source, f"{source_name(given)}:{row}", weight)
            row += 1


def _load_dataset(given: str, config: CorpusConfig) -> Any:
    """A `datasets.Dataset`, memory-mapped: saved by `save_to_disk`, or whatever `load_dataset` takes."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "corpus.format=dataset needs the package `datasets`, which is not installed; "
            "install it with: pip install 'sparsekd[teacher]'."
        ) from error
    datasets.disable_progress_bars()
    folder = Path(given)
    saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    try:
        if saved:
            table = datasets.load_from_disk(given)
        else:
            table = datasets.load_dataset(given, config.dataset_config, split=config.dataset_split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"The dataset {given} cannot be loaded: {first_line(error)}.") from error
    if isinstance(table, datasets.DatasetDict):
        if config.dataset_split not in table:
            raise DataError(
                f"The dataset {given} has no split {config.dataset_split!r}, found {sorted(table)}; "
                "set corpus.dataset_split."
            )
        table = table[config.dataset_split]
    return table


class CorpusDigest:
    """Running digest, size and count of a stream of documents: the corpus's identity.

    The digest is SHA-256 over each document's length (8 bytes, little-endian) and bytes, in order, so that
    moving a border between two documents changes it; where documents have weights, also over these (float32).
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.documents = 0
        self.bytes = 0

    def add(self, content: bytes, weight: float | None = None) -> None:
        """Takes in one document, with its weight where the corpus has any."""
        self._hash.update(len(content).to_bytes(8, "little"))
        self._hash.update(content)
        if weight is not None:
            self._hash.update(struct.pack("<f", weight))
        self.documents += 1
        self.bytes += len(content)

    def hexdigest(self) -> str:
        """The digest so far, in hexadecimal."""
        return self._hash.hexdigest()
