"""Documents as they come: text files, JSON lines, CSV, Parquet, saved Hugging Face datasets and hub names.

What a record of these holds, `forms` says: a text, a conversation, a pair, token ids.

Every reader streams: one document, one line or one batch of rows is in memory at a time. The order depends
on the given paths and on relative names alone, never on the file system, so that two machines with the same
files read the same corpus.
"""

import csv
import hashlib
import io
import itertools
import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sparsekd.logit_store.errors import first_line
from sparsekd.trainer.config.corpus import CorpusConfig, check_corpus, with_escapes
from sparsekd.trainer.config.schema import require
from sparsekd.trainer.corpus.bodies import Body, content_of, text_of
from sparsekd.trainer.corpus.fields import RecordError, weight_of_record
from sparsekd.trainer.corpus.files import LeftOut, SourceFile, list_files, source_name
from sparsekd.trainer.corpus.forms import Forms
from sparsekd.trainer.corpus.splitting import split_text
from sparsekd.trainer.run.errors import DataError
from sparsekd.trainer.run.streams import (
    LARGEST_DOCUMENT,
    open_text,
    read_lines,
    read_whole,
    without_compression,
)

# Rows of a Parquet file or dataset that are decoded at a time: enough to hide the cost of a batch, and small
# beside a row group.
BATCH_ROWS = 1024


_BETWEEN_RECORDS = re.compile(r"\s*,?\s*")

Skipped = Callable[[str, str], None]
"""Is told of each record that is left out: why, and where it stands."""


@dataclass(frozen=True)
class Document:
    """One document and where it stood.

    Attributes:
        text: The text, decoded and otherwise untouched; may be empty. Of a body, all texts in it.
        content: The bytes that tell it from others, from which digests and the held-out choice come: those of
            the text in UTF-8, or of the body.
        source: Index into `sources_of`.
        place: File relative to the given path, with line or row number where it has one; for messages.
        weight: What `corpus.weight_field` says of its weight in the loss; 1 without such a field.
        body: What it holds, where that is no text.
    """

    text: str
    content: bytes
    source: int
    place: str
    weight: float = 1.0
    body: Body | None = None


@dataclass(frozen=True)
class Source:
    """One place where documents come from.

    Attributes:
        given: An entry of `corpus.paths` or `corpus.heldout_paths`.
        split: The split of a dataset that is read.
        heldout: Whether all its documents are held out.
    """

    given: str
    split: str
    heldout: bool = False


def sources_of(config: CorpusConfig) -> list[Source]:
    """The places of a corpus in the order in which they are read."""
    sources = [Source(given, config.dataset_split) for given in config.paths]
    if config.heldout_split is not None:
        sources += [Source(given, config.heldout_split, heldout=True) for given in config.paths]
    return [*sources, *(Source(given, config.dataset_split, heldout=True) for given in config.heldout_paths)]


def has_own_heldout(config: CorpusConfig) -> bool:
    """Whether held-out documents come from places of their own, so that none is chosen."""
    return bool(config.heldout_paths) or config.heldout_split is not None


def read_documents(
    config: CorpusConfig,
    left_out: LeftOut = lambda name: None,
    skipped: Skipped = lambda reason, place: None,
    forms: Forms | None = None,
) -> Iterator[Document]:
    """Yields the documents of `corpus.paths` in their fixed order, `corpus.max_documents` of them at most.

    Behind them stand those of `corpus.heldout_paths` or `corpus.heldout_split`.

    Args:
        config: Where documents are and how they are read.
        left_out: Is told of the files that `list_files` leaves out.
        skipped: Is told of the records that `corpus.invalid=skip` leaves out.
        forms: Says what records hold, and learns it from the first where the configuration does not say.

    Raises:
        ConfigError: No path is given, or keys contradict each other.
        DataError: A path matches nothing, or a file, line or row cannot be read; the message says where.
    """
    require(config.paths, "corpus.paths", "to find documents")
    check_corpus(config)
    reader = _Reader(config, left_out, skipped, Forms(config) if forms is None else forms)
    sources = list(enumerate(sources_of(config)))
    trained = (place for place in sources if not place[1].heldout)
    yield from islice(chain.from_iterable(itertools.starmap(reader.read, trained)), config.max_documents)
    yield from chain.from_iterable(
        itertools.starmap(reader.read, (place for place in sources if place[1].heldout))
    )


@dataclass(frozen=True)
class _Reader:
    """Reads the files and tables of a corpus."""

    config: CorpusConfig
    left_out: LeftOut
    skipped: Skipped
    forms: Forms

    def read(self, source: int, place: Source) -> Iterator[Document]:
        config = self.config
        if config.format == "dataset":
            yield from self._read_dataset(place, source)
            return
        compressed = config.format in ("text", "jsonl", "csv")
        files = list_files(
            place.given, config.include, config.exclude, compressed=compressed, left_out=self.left_out
        )
        for file in files:
            if config.format == "text":
                yield from self._read_text(file, source)
            elif config.format == "jsonl":
                yield from self._read_jsonl(file, source)
            elif config.format == "csv":
                yield from self._read_csv(file, source)
            elif config.format == "parquet":
                yield from self._read_parquet(file, source)
            else:
                raise DataError(
                    f"corpus.format is {config.format!r}, expected text, jsonl, csv, parquet or dataset."
                )

    def _document_of(
        self, record: Mapping[str, Any], where: str, noun: str, source: int, place: str
    ) -> Iterator[Document]:
        """The document of a record, or none where it is left out."""
        if self.forms.kind is None:
            self.forms.begin(record, where, noun)
        try:
            weight = weight_of_record(record, self.config, where, noun)
            if self.forms.kind == "text":
                text = self.forms.text(record, where, noun)
                yield _document(text, source, place, weight)
                return
            body = self.forms.body(record, where, is_table=noun == "column")
            content = content_of(body, where)
            yield Document(checked_text(text_of(body), where), content, source, place, weight, body)
        except RecordError as error:
            self._leave_out(error, place)

    def _leave_out(self, error: RecordError, place: str) -> None:
        if self.config.invalid == "refuse":
            raise error
        self.skipped(error.reason, place)

    def _read_text(self, file: SourceFile, source: int) -> Iterator[Document]:
        separator = None if self.config.separator is None else with_escapes(self.config.separator)
        with open_text(file.path) as stream:
            for text, line in split_text(stream, file.path, self.config.sample_by, separator):
                yield _document(text, source, file.name if line is None else f"{file.name}:{line}")

    def _read_jsonl(self, file: SourceFile, source: int) -> Iterator[Document]:
        with open_text(file.path) as stream:
            if stream.peek(1)[:1] == b"[":  # no record is a list
                yield from self._read_json_list(stream, file, source)
                return
            for number, line in enumerate(read_lines(stream, file.path), start=1):
                if not line.strip():
                    continue
                where, place = f"{file.path}, line {number}", f"{file.name}:{number}"
                try:
                    record = json_record(line, where, self.config.text_field)
                except RecordError as error:
                    self._leave_out(error, place)
                    continue
                yield from self._document_of(record, where, "field", source, place)

    def _read_json_list(self, stream: io.BufferedReader, file: SourceFile, source: int) -> Iterator[Document]:
        """A file that is one list of records, as Alpaca's is; one of them is decoded at a time."""
        text = _decoded(read_whole(stream, file.path), str(file.path))
        decoder, number = json.JSONDecoder(), 0
        begin = _BETWEEN_RECORDS.match(text, 1)
        while begin is not None and not text.startswith("]", begin.end()):
            number += 1
            where = f"{file.path}, record {number}"
            try:
                record, end = decoder.raw_decode(text, begin.end())
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{where} is not JSON ({first_line(error)}), and the file a list of records that was "
                    "perhaps cut short; mend it."
                ) from error
            place = f"{file.name}:{number}"
            if isinstance(record, dict):
                yield from self._document_of(record, where, "field", source, place)
            else:
                found = f"{where} is of type {type(record).__name__}, expected an object; mend it."
                self._leave_out(RecordError("no object", found), place)
            begin = _BETWEEN_RECORDS.match(text, end)
        if begin is not None and text[begin.end() + 1 :].strip():
            raise DataError(
                f"{file.path} is a list of records with more text behind it, expected one list or one record "
                "a line; mend it."
            )

    def _read_csv(self, file: SourceFile, source: int) -> Iterator[Document]:
        config = self.config
        is_tabbed = without_compression(file.name).lower().endswith((".tsv", ".tab"))
        delimiter = (
            ("\t" if is_tabbed else ",") if config.delimiter is None else with_escapes(config.delimiter)
        )
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
                        self._begin_table(header, where)
                    elif cells:
                        if len(cells) != len(header):
                            self._leave_out(
                                RecordError(
                                    "a row of another length",
                                    f"{where} has {len(cells)} cells, the first line names {len(header)} "
                                    "columns; mend the row, or set corpus.delimiter to what stands between "
                                    "cells.",
                                ),
                                place,
                            )
                            continue
                        record: dict[str, Any] = dict(zip(header, cells, strict=True))
                        if config.weight_field is not None:
                            record[config.weight_field] = _as_number(record[config.weight_field])
                        yield from self._document_of(record, where, "column", source, place)
            except csv.Error as error:
                raise DataError(
                    f"{file.path} cannot be read as CSV in the row that begins at line {line} ({error}); "
                    'mend it: a cell with a delimiter, line break or quote stands in quotes, with "" for the '
                    "quote."
                ) from error

    def _begin_table(self, header: list[str], where: str) -> None:
        self.forms.begin(dict.fromkeys(header, ""), where, "column")
        for name in self.forms.fields():
            if header.count(name) > 1:
                raise DataError(
                    f"{where} names the column {name!r} {header.count(name)} times; rename the others."
                )

    def _read_parquet(self, file: SourceFile, source: int) -> Iterator[Document]:
        import pyarrow as pa
        from pyarrow import parquet

        try:
            table = parquet.ParquetFile(file.path)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{file.path} cannot be read as Parquet: {first_line(error)}.") from error
        with table:
            columns = _columns_of_schema(table.schema_arrow)
            self.forms.begin(columns, str(file.path), "column")
            wanted = _top_columns(columns, self.forms)
            row = 0
            try:
                for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=wanted):
                    for record in batch.to_pylist():
                        where, place = f"{file.path}, row {row}", f"{file.name}:{row}"
                        yield from self._document_of(record, where, "column", source, place)
                        row += 1
            except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
                raise DataError(
                    f"{file.path} cannot be read at row {row} or shortly after: {first_line(error)}."
                ) from error

    def _read_dataset(self, place: Source, source: int) -> Iterator[Document]:
        given = place.given
        table = _load_dataset(given, place.split, self.config)
        columns = dict(table.features)
        self.forms.begin(columns, f"The dataset {given}", "column")
        row = 0
        fields = _top_columns(columns, self.forms)
        for batch in table.select_columns(fields).iter(batch_size=BATCH_ROWS):
            for values in zip(*(batch[field] for field in fields), strict=True):
                record = dict(zip(fields, values, strict=True))
                where, name = f"{given}, row {row}", f"{source_name(given)}:{row}"
                yield from self._document_of(record, where, "column", source, name)
                row += 1


def checked_text(text: str, where: str) -> str:
    """The text, if it is one in Unicode.

    Raises:
        RecordError: It holds half of a surrogate pair.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(
            "half of a surrogate pair",
            f"{where}: the text holds {text[error.start]!r} (half of a surrogate pair) at character "
            f"{error.start}, which is no Unicode text; mend or remove this document.",
        ) from error
    return text


def _document(text: str, source: int, place: str, weight: float = 1.0) -> Document:
    text = text.removeprefix("\ufeff")  # a byte order mark says nothing at the beginning of a text
    content = checked_text(text, place).encode("utf-8")
    return Document(text=text, content=content, source=source, place=place, weight=weight)


def json_record(line: bytes, where: str, field: str) -> Mapping[str, Any]:
    """The record of a line of JSON.

    Args:
        line: Without its number.
        where: The line, for messages.
        field: One that the record should have, for messages.

    Raises:
        RecordError: It is none.
    """
    try:  # a mark stands before later lines where files were joined
        record = json.loads(_decoded(line, where).removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        raise RecordError(
            "no JSON", f"{where} is not JSON: {error.msg} at column {error.colno}; mend or remove the line."
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        raise RecordError(
            "no JSON", f"{where} cannot be read as JSON ({first_line(error)}); mend or remove the line."
        ) from error
    if not isinstance(record, dict):
        raise RecordError(
            "no object",
            f"{where} has no field {field!r}, found {type(record).__name__}; mend or remove the line.",
        )
    return record


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(
            "no UTF-8",
            f"{where} is not UTF-8: byte 0x{line[error.start]:02x} at offset {error.start} of the line "
            "cannot be decoded; convert the file.",
        ) from error


def _as_number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


def _columns_of_schema(fields: Any) -> dict[str, Any]:
    """Columns of an Arrow schema, or fields of a struct, as `require_fields` takes them."""
    from pyarrow import types

    return {
        field.name: _columns_of_schema(field.type) if types.is_struct(field.type) else "" for field in fields
    }


def _top_columns(columns: Mapping[str, Any], forms: Forms) -> list[str]:
    """The columns in which the fields that are asked for may stand."""
    names = forms.fields()
    return [
        column for column in columns if any(name == column or name.startswith(f"{column}.") for name in names)
    ]


def _load_dataset(given: str, split: str, config: CorpusConfig) -> Any:
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
            table = datasets.load_dataset(given, config.dataset_config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"The dataset {given} cannot be loaded: {first_line(error)}.") from error
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            key = "heldout_split" if split == config.heldout_split else "dataset_split"
            raise DataError(
                f"The dataset {given} has no split {split!r}, found {sorted(table)}; set corpus.{key}."
            )
        table = table[split]
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


def digested(
    documents: Iterable[Document], digests: Sequence[CorpusDigest], config: CorpusConfig
) -> Iterator[Document]:
    """The documents, each of which goes into the digest of its source."""
    for document in documents:
        weight = None if config.weight_field is None else document.weight
        digests[document.source].add(document.content, weight)
        yield document
