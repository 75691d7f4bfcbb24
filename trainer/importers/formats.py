"""The table of layouts that `store import` reads, and how one is told from another."""

from pathlib import Path

from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.importers import api, axolotl, distillkit, megatron, nemo, samples, topk, vllm
from sparsekd.trainer.importers.columns import column_names, table_files
from sparsekd.trainer.importers.document import Format, has_suffix

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (distillkit, megatron, nemo, vllm, api, samples, axolotl, topk)
}


def recognise(path: Path) -> Format:
    """Returns the format of a file or folder, by its suffixes and the columns or keys of its first file.

    Of several that fit, it is the one that knows most of these columns.

    Raises:
        StoreError: there is no file of any format, or its columns are those of none, or of several.
    """
    suffixes = dict.fromkeys(suffix for item in FORMATS.values() for suffix in item.suffixes)
    first = table_files(path, "a capture", tuple(suffixes))[0]
    fitting = [item for item in FORMATS.values() if has_suffix(first.name, item.suffixes)]
    found: frozenset[str] = frozenset()
    if not any(not item.fields for item in fitting):
        found = column_names(first) if fitting else found
        known = {
            item.name: max((len(names) for names in item.fields if names <= found), default=0)
            for item in fitting
        }
        most = max(known.values(), default=0)
        fitting = [item for item in fitting if most and known[item.name] == most]
    if len(fitting) == 1:
        return fitting[0]
    names = f" ({', '.join(sorted(found)[:20])})" if found else ""
    which = " and of ".join(item.name for item in fitting) or "no format that is read"
    raise StoreError(
        f"{first} is of {which} by its name and fields{names}: say which with --format, one of "
        f"{', '.join(FORMATS)}."
    )


def formats_text() -> str:
    """Returns the table for `store import --help`."""
    lines = ["formats (--format), each recognised by its files:"]
    for item in FORMATS.values():
        kinds = "/".join(suffix.removeprefix(".") for suffix in item.suffixes)
        by = " or ".join(", ".join(sorted(names)) for names in item.fields[:1])
        lines.append(f"  {item.name:<11} {item.reads}")
        lines.append(f"  {'':<11}   {kinds}{f' with {by}' if by else ''}")
        lines += [f"  {'':<11}   cannot give {phrase}" for phrase in item.cannot_give]
    return "\n".join(lines)
