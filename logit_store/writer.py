"""Writing a store: the manifest first, then shards in any order by any number of processes, then the seal.

A shard exists when its commit record does. Equal rows give equal files, whoever writes them and whenever, so
two writers of one shard cannot harm each other and a killed run is continued by running it again.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from sparsekd.logit_store.codec import codec_of
from sparsekd.logit_store.errors import DamagedStoreError, StoreError
from sparsekd.logit_store.files import (
    TEMPORARY_PREFIX,
    HashingFile,
    make_folder,
    publish,
    publish_bytes,
    read_range,
    remove_stale,
    signed_json,
)
from sparsekd.logit_store.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Manifest,
    compare_manifests,
    files_of_tokenizer,
    manifest_digest,
    manifest_to_json,
    read_manifest,
    tokenizer_digest,
)
from sparsekd.logit_store.row import Row
from sparsekd.logit_store.shard import (
    CommitRecord,
    RowCounts,
    commit_file,
    commit_to_content,
    read_commit,
    shard_file,
    shard_header,
    write_rows,
)

INDEX_NAME = "INDEX.json"
TOKENIZER_NAME = "tokenizer"

_SHARD_NAME = re.compile(r"(\d{6,})\.(arrow|json)")


def create_store(path: Path, manifest: Manifest, tokenizer_files: Path) -> None:
    """Makes an empty store, or does nothing when this very store is there.

    Temporary files of writers that are no longer alive are removed.

    Args:
        path: folder of the store; made when absent.
        manifest: its identity.
        tokenizer_files: the tokenizer's files; their `tokenizer_digest` is in the manifest.

    Raises:
        StoreError: another store is there (naming the fields that differ), the folder holds something else,
            or the tokenizer's files are not those of the manifest.
    """
    codec_of(manifest)
    found = tokenizer_digest(tokenizer_files)
    if found != manifest.tokenizer.digest:
        raise StoreError(
            f"The tokenizer files in {tokenizer_files} have the digest {found[:12]}, but the manifest names "
            f"{manifest.tokenizer.digest[:12]}: give the folder of the tokenizer that made the ids."
        )
    make_folder(path)
    if (path / MANIFEST_NAME).exists():
        _require_same_manifest(path, manifest)
    else:
        strangers = [item.name for item in path.iterdir() if not item.name.startswith(TEMPORARY_PREFIX)]
        if strangers and not (path / MANIFEST_NAME).exists():
            raise StoreError(
                f"{path} is no store but holds {', '.join(sorted(strangers)[:3])}: name a new or an empty "
                "folder."
            )
        publish_bytes(path / MANIFEST_NAME, manifest_to_json(manifest).encode("ascii"))
    for name, source in files_of_tokenizer(tokenizer_files):
        target = path / TOKENIZER_NAME / name
        make_folder(target.parent)
        publish_bytes(target, source.read_bytes())
    for split in manifest.splits:
        make_folder(shard_file(path, split, 0).parent)
    _remove_stale(path, manifest)


def write_shard(path: Path, manifest: Manifest, split: str, shard_index: int, rows: Sequence[Row]) -> None:
    """Writes one shard and commits it, or does nothing when it is committed.

    Whatever goes wrong, a half-written file never has a shard's name, and no temporary file stays behind.

    Args:
        path: of a store made by `create_store`.
        manifest: of that store.
        split: one of the manifest's.
        shard_index: number of the shard; its first row is `shard_index * rows_per_shard`.
        rows: as many as the manifest says; fewer in the last shard of a split.

    Raises:
        InvalidRowError: a row breaks a rule; the message names position and value.
        StoreError: no room, another store, a sealed store, or other bytes under the shard's name.
    """
    _require_same_manifest(path, manifest)
    where = f"{path}, split {split}, shard {shard_index:06d}"
    if split not in manifest.splits:
        raise StoreError(f"{path} has no split {split!r}: name one of {', '.join(manifest.splits)}.")
    if not 1 <= len(rows) <= manifest.rows_per_shard:
        raise StoreError(f"{where}: {len(rows)} rows were given, expected 1 to {manifest.rows_per_shard}.")
    final, commit = shard_file(path, split, shard_index), commit_file(path, split, shard_index)
    if commit.exists() and final.exists():
        return
    if (path / INDEX_NAME).exists() and not commit.exists():
        raise StoreError(f"{where} is not part of the store, which is sealed: write to a new folder.")
    records: list[CommitRecord] = []

    def produce(file: HashingFile) -> None:
        records.append(write_rows(file, path, manifest, split, shard_index, rows))

    publish(final, produce)
    publish_bytes(commit, signed_json(commit_to_content(records[0])))


def committed_shards(path: Path, split: str) -> set[int]:
    """Returns the numbers of the shards of a split that are there with their commit records."""
    names = {item.name for item in (path / "shards" / split).glob("*")}
    matches = (_SHARD_NAME.fullmatch(name) for name in names)
    numbers = {int(match[1]) for match in matches if match}
    return {
        number
        for number in numbers
        if {shard_file(path, split, number).name, commit_file(path, split, number).name} <= names
    }


def seal(path: Path, shards_per_split: Mapping[str, int]) -> str:
    """Writes the index, after which the store can be read; does nothing when it is sealed so already.

    Each shard's commit record, length and header are checked; its content is not read, see `verify_store`.

    Args:
        path: of the store.
        shards_per_split: for each split of the manifest, how many shards it must have.

    Returns:
        The store's digest, sha256 (hex): equal for equal stores.

    Raises:
        StoreError: a shard is missing, short, superfluous or of another store, or the store is sealed with
            another number of shards.
    """
    manifest = read_manifest(path)
    if sorted(shards_per_split) != sorted(manifest.splits):
        raise StoreError(
            f"{path} has the splits {', '.join(manifest.splits)}, but shards were given for "
            f"{', '.join(shards_per_split)}: give a number for each."
        )
    if sum(shards_per_split.values()) == 0:
        raise StoreError(
            f"{path} has no shard in any split: there is nothing to seal, write some rows first."
        )
    if tokenizer_digest(path / TOKENIZER_NAME) != manifest.tokenizer.digest:
        raise DamagedStoreError(
            f"{path / TOKENIZER_NAME} does not hold the manifest's tokenizer: restore its files."
        )
    _remove_stale(path, manifest)
    content = {
        "format_version": FORMAT_VERSION,
        "manifest_sha256": manifest_digest(manifest),
        "splits": {
            split: _seal_split(path, manifest, split, shards_per_split[split]) for split in manifest.splits
        },
    }
    data = signed_json(content)
    index = path / INDEX_NAME
    if index.exists() and index.read_bytes() != data:
        raise StoreError(
            f"{path} was sealed before with other shards, or its {INDEX_NAME} is damaged: remove "
            f"{INDEX_NAME} if "
            "the shards of now are meant."
        )
    publish_bytes(index, data)
    return signed_digest(data)


def signed_digest(data: bytes) -> str:
    """Returns the `digest` of canonical signed JSON, which the caller knows to be sound."""
    match = re.search(rb'^ "digest": "([0-9a-f]{64})"', data, re.MULTILINE)
    assert match is not None
    return match[1].decode()


def _seal_split(path: Path, manifest: Manifest, split: str, shards: int) -> dict[str, object]:
    folder = shard_file(path, split, 0).parent
    present = {int(match[1]) for item in folder.glob("*") if (match := _SHARD_NAME.fullmatch(item.name))}
    committed = committed_shards(path, split)
    if missing := sorted(set(range(shards)) - committed):
        some = ", ".join(f"{number:06d}" for number in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise StoreError(
            f"{path}, split {split}: {len(missing)} of {shards} shards are not committed ({some}{more}); run "
            "the command that writes the store again, it makes the missing ones."
        )
    if foreign := sorted(present - set(range(shards))):
        raise StoreError(
            f"{folder} has shard {foreign[0]:06d}, but the split has {shards} shards: it belongs to another "
            "plan; remove it or write to a new folder."
        )
    digest = manifest_digest(manifest)
    entries = []
    counts = dict.fromkeys((field.name for field in fields(RowCounts)), 0)
    plane_bytes = dict.fromkeys(codec_of(manifest).planes(manifest), 0)
    file_bytes = 0
    for shard in range(shards):
        record, data = read_commit(path, digest, split, shard)
        if record.rows != manifest.rows_per_shard and shard != shards - 1:
            raise StoreError(
                f"{path}, split {split}, shard {shard:06d} has {record.rows} rows, expected "
                f"{manifest.rows_per_shard}: only the last shard may be short; remove both its files and run "
                "again."
            )
        _check_shard_file(path, manifest, record)
        entries.append({"record_digest": signed_digest(data), "rows": record.rows})
        for name, value in asdict(record.counts).items():
            counts[name] += value
        for name, value in record.plane_bytes.items():
            plane_bytes[name] += value
        file_bytes += record.file_bytes
    return {
        "rows": sum(int(str(entry["rows"])) for entry in entries),
        "counts": counts,
        "plane_bytes": plane_bytes,
        "file_bytes": file_bytes,
        "shards": entries,
    }


def _check_shard_file(path: Path, manifest: Manifest, record: CommitRecord) -> None:
    """Compares what can be compared without reading a whole shard."""
    place = shard_file(path, record.split, record.shard)
    length = place.stat().st_size
    if length != record.file_bytes:
        raise DamagedStoreError(
            f"{place} has {length} bytes, but its commit record says {record.file_bytes}: remove both files "
            "and run the command that writes the store again."
        )
    header = shard_header(manifest, record.split, record.shard)
    if read_range(place, 0, len(header)) != header:
        raise DamagedStoreError(
            f"{place} does not begin as shard {record.shard:06d} of split {record.split} of this store must: "
            "it is damaged or another shard; remove it and its commit record and run again."
        )


def _require_same_manifest(path: Path, manifest: Manifest) -> None:
    if differing := compare_manifests(read_manifest(path), manifest):
        raise StoreError(
            f"{path} is another store than this run would write ({'; '.join(differing)}): use a new folder, "
            "or the settings that made this one."
        )


def _remove_stale(path: Path, manifest: Manifest) -> None:
    remove_stale(path)
    for folder in {target.parent for _, target in files_of_tokenizer(path / TOKENIZER_NAME)} | {
        path / TOKENIZER_NAME
    }:
        remove_stale(folder)
    for split in manifest.splits:
        remove_stale(shard_file(path, split, 0).parent)
