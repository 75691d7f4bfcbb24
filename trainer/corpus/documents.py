"""Documents as they come: text files, JSON lines, Parquet, saved Hugging Face datasets and hub names.

Every reader streams: one document, one line or one batch of rows is in memory at a time. The order depends
on the given paths and on relative names alone, never on the file system, so that two machines with the same
files read the same corpus.
"""

import fnmatch
import glob
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sparsekd.trainer.config.schema import CorpusConfig, require
from sparsekd.trainer.run.errors import ConfigError, DataError

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


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus: where it is now, and its name relative to what was given."""

    path: Path
    name: str


def source_name(given: str) -> str:
    """The name of one of `corpus.paths` in the manifest: its last part (stores travel), a hub name whole."""
    is_hub_name = not Path(given).is_absolute() and given.count("/") == 1 and not Path(given).exists()
    return given if is_hub_name and not glob.has_magic(given) else Path(given).name


def read_documents(config: CorpusConfig) -> Iterator[Document]:
    """Yields the documents of `corpus.paths` in their fixed order, `corpus.max_documents` at most.

    Raises:
        ConfigError: No path is given, or a field is asked of text files.
        DataError: A path matches nothing, or a file, line or row cannot be read; the message says where.
    """
    require(config.paths, "corpus.paths", "to find documents")
    if config.weight_field is not None and config.format == "text":
        raise ConfigError(
            f"corpus.weight_field={config.weight_field} with corpus.format=text: a text file has no fields; "
            "use jsonl, parquet or dataset, or leave corpus.weight_field away."
        )
    return islice(_read_all(config), config.max_documents)


def _read_all(config: CorpusConfig) -> Iterator[Document]:
    for source, given in enumerate(config.paths):
        if config.format == "dataset":
            yield from _read_dataset(given, source, config)
            continue
        for file in list_files(given, config.include, config.exclude):
            if config.format == "text":
                yield _read_text(file, source)
            elif config.format == "jsonl":
                yield from _read_jsonl(file, source, config)
            elif config.format == "parquet":
                yield from _read_parquet(file, source, config)
            else:
                raise DataError(
                    f"corpus.format is {config.format!r}, expected text, jsonl, parquet or dataset."
                )


def list_files(given: str, include: str, exclude: list[str]) -> list[SourceFile]:
    """The files of one path, sorted by relative name.

    Args:
        given: A file, a folder (searched recursively; links to folders are not followed) or a glob pattern,
            in which `**` stands for any depth. A path that exists is never read as a pattern.
        include: Pattern of file names taken from folders.
        exclude: Patterns of relative paths inside folders that are left out. The path is matched with and
            without a leading slash, so that `*/test/*` also matches a folder `test` at the top.

    Raises:
        DataError: Nothing is there, or nothing is left.
    """
    path = Path(given)
    if path.is_file():
        return [SourceFile(path, path.name)]
    if path.is_dir():
        found = sorted(_walk(path, include, exclude), key=lambda file: file.name)
        if not found:
            raise DataError(
                f"corpus.paths: the folder {given} holds no file with corpus.include={include!r} that "
                f"corpus.exclude={exclude} leaves; check the patterns."
            )
        return found
    matches = sorted(glob.glob(given, recursive=True))
    if not matches:
        raise DataError(
            f"corpus.paths: {given} is neither a file nor a folder, and as a pattern it matches nothing; "
            "check the path (relative paths start where the command was started)."
        )
    files = []
    for match in matches:
        if Path(match).is_file():
            files.append(SourceFile(Path(match), _below_pattern(match, given)))
        elif not given.rstrip("/").endswith("**"):  # `**` names the folders whose files it names too
            prefix = _below_pattern(match, given)
            below = _walk(Path(match), include, exclude)
            files += [SourceFile(file.path, f"{prefix}/{file.name}") for file in below]
    return sorted(files, key=lambda file: file.name)


def _walk(folder: Path, include: str, exclude: list[str]) -> Iterator[SourceFile]:
    def is_excluded(relative: str, patterns: list[str]) -> bool:
        return any(
            fnmatch.fnmatchcase(relative, pattern) or fnmatch.fnmatchcase(f"/{relative}", pattern)
            for pattern in patterns
        )

    # A folder that matches `x` has nothing inside that `x/*` leaves: it need not be entered.
    whole_folders = [pattern.removesuffix("/*") for pattern in exclude if pattern.endswith("/*")]
    for parent, folders, names in os.walk(folder):
        below = os.path.relpath(parent, folder).replace(os.sep, "/")
        prefix = "" if below == "." else f"{below}/"
        folders[:] = [name for name in folders if not is_excluded(prefix + name, whole_folders)]
        for name in names:
            relative = prefix + name
            if fnmatch.fnmatchcase(name, include) and not is_excluded(relative, exclude):
                path = Path(parent, name)
                if path.is_file():
                    yield SourceFile(path, relative)


def _below_pattern(match: str, pattern: str) -> str:
    """`match` relative to the part of `pattern` before its first wildcard."""
    fixed = []
    for part in Path(pattern).parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return Path(match).relative_to(Path(*fixed)).as_posix()


def _document(text: str, source: int, place: str, weight: float = 1.0) -> Document:
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: the text holds {text[error.start]!r} (half of a surrogate pair) at character "
            f"{error.start}, which is no Unicode text; mend or remove this document."
        ) from error
    return Document(text=text, content=content, source=source, place=place, weight=weight)


def _fields(config: CorpusConfig) -> list[str]:
    """The fields or columns that are read of each document: the text's, then the weight's."""
    return [config.text_field] if config.weight_field is None else [config.text_field, config.weight_field]


def _require_fields(found: Sequence[str], config: CorpusConfig, where: str, kind: str) -> None:
    """Raises DataError for a field that is not there, naming its key; `kind` is "field" or "column"."""
    for key in ("text_field", "weight_field"):
        name = getattr(config, key)
        if name is not None and name not in found:
            shown = f"the fields {list(found)}" if kind == "field" else list(found)
            what = key.removesuffix("_field")
            raise DataError(
                f"{where} has no {kind} {name!r}, found {shown}; set corpus.{key} to the {what}'s."
            )


def _of_record(
    record: Mapping[str, Any], config: CorpusConfig, source: int, where: str, place: str
) -> Document:
    """The document of one line or row, whose fields are there."""
    text = _as_text(record[config.text_field], where, config.text_field)
    weight = 1.0
    if config.weight_field is not None:
        weight = _as_weight(record[config.weight_field], where, config.weight_field)
    return _document(text, source, place, weight)


def _as_weight(value: Any, where: str, field: str) -> float:
    """A weight field's value, as the float32 that the store keeps."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            weight = struct.unpack("<f", struct.pack("<f", value))[0]
        except OverflowError:
            weight = math.inf
        if math.isfinite(weight) and weight >= 0:
            return weight
    raise DataError(
        f"{where}: {field!r} is {value!r}, expected a finite number, 0 or more; mend it, or leave "
        "corpus.weight_field away to weigh all documents alike."
    )


def _read_text(file: SourceFile, source: int) -> Document:
    try:
        content = file.path.read_bytes()
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {error.strerror}.") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file.path} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start} cannot be "
            "decoded; convert the file or leave it out with corpus.exclude."
        ) from error
    return Document(text=text, content=content, source=source, place=file.name)


def _read_jsonl(file: SourceFile, source: int, config: CorpusConfig) -> Iterator[Document]:
    with _open(file) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{file.path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where} is not UTF-8: byte 0x{line[error.start]:02x} at offset {error.start} of the "
                    "line cannot be decoded; convert the file."
                ) from error
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where} is not JSON: {error.msg} at column {error.colno}; mend or remove the line."
                ) from error
            if not isinstance(record, dict):
                raise DataError(
                    f"{where} has no field {config.text_field!r}, found {type(record).__name__}; mend or "
                    "remove the line."
                )
            _require_fields(sorted(record), config, where, "field")
            yield _of_record(record, config, source, where, f"{file.name}:{number}")


def _open(file: SourceFile) -> Any:
    try:
        return file.path.open("rb")
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {error.strerror}.") from error


def _as_text(value: Any, where: str, field: str) -> str:
    """A text field's value; null counts as an empty document."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{where}: {field!r} is of type {type(value).__name__}, expected text; "
            "set corpus.text_field to the field that holds the text."
        )
    return value


def _read_parquet(file: SourceFile, source: int, config: CorpusConfig) -> Iterator[Document]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file.path)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{file.path} cannot be read as Parquet: {reason}") from error
    with table:
        _require_fields(table.schema_arrow.names, config, str(file.path), "column")
        row = 0
        try:
            for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=_fields(config)):
                for record in batch.to_pylist():
                    yield _of_record(record, config, source, f"{file.path}, row {row}", f"{file.name}:{row}")
                    row += 1
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{file.path} cannot be read at row {row} or shortly after: {reason}") from error


def _read_dataset(given: str, source: int, config: CorpusConfig) -> Iterator[Document]:
    table = _load_dataset(given, config)
    _require_fields(table.column_names, config, f"The dataset {given}", "column")
    row = 0
    fields = _fields(config)
    for batch in table.select_columns(fields).iter(batch_size=BATCH_ROWS):
        for values in zip(*(batch[field] for field in fields), strict=True):
            record = dict(zip(fields, values, strict=True))
            yield _of_record(record, config, source, f"{given}, row {row}", f"{source_name(given)}:{row}")
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
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"The dataset {given} cannot be loaded: {reason}") from error
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
