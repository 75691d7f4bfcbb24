"""A page about a store that is being written, or was left: what it becomes, and how much of it is there."""

from collections.abc import Iterable

from sparsekd.logit_store.manifest import Manifest, read_manifest
from sparsekd.logit_store.places.files import sizes_below
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.protocol.layout import QUARANTINE_NAME, WORK_NAME, split_folder
from sparsekd.logit_store.protocol.writer import committed_shards
from sparsekd.logit_store.tools.inspect import identity, section, table


def unfinished_text(path: StorePath) -> str:
    """Returns the page, of what is there at this moment: others may write meanwhile.

    Args:
        path: Of a store that is not sealed.

    Raises:
        StoreError: There is none, or its files cannot be listed.
    """
    manifest = read_manifest(path)
    title = f"{'token' if manifest.teacher is None else 'logit'} store  {path}\nformat "
    title += f"{manifest.format_version}, not sealed: it cannot be read yet"
    return "\n\n".join([title, identity(manifest), _amounts(path, manifest)]) + "\n"


def _amounts(path: StorePath, manifest: Manifest) -> str:
    """What each split has: whole shards, and of others the parts that are written and the leases."""
    lines = []
    for split in manifest.splits:
        shards = committed_shards(path, split)
        whole = sum(sizes_below(split_folder(path, split)).values())
        work = sizes_below(path / WORK_NAME / split)
        parts = {name: size for name, size in work.items() if name.endswith(".part")}
        lines.append(
            [
                split,
                f"{len(shards):,}",
                f"{len(parts):,}",
                f"{_count(work, '.lease'):,}",
                f"{whole + sum(parts.values()):,}",
            ]
        )
    note = "shards: whole ones; units: of shards that are not whole; leases: of units that somebody works at"
    aside = len(sizes_below(path / QUARANTINE_NAME))
    more = [f"{aside:,} files of other writers are in {QUARANTINE_NAME}/"] if aside else []
    return section(
        "How far it is", [*table(["split", "shards", "units", "leases", "bytes"], lines), note, *more]
    )


def _count(names: Iterable[str], ending: str) -> int:
    return sum(name.endswith(ending) for name in names)
