"""Changes that a hostile stranger may make to a store: one function each, of (store taken apart, random).

All are generic over planes and codecs: they go by the store's own schema and by what its planes look like.
What is signed or counted above a change is made right again by `forgery`, so that only checks of the content
can find it.
"""

import base64
import copy
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import zstandard
from forgery import Forgery, text_of
from shard_mutators import (
    LARGEST_PLANE,
    a_shard,
    cut,
    flipped,
    message_body,
    message_header,
    message_kind,
    number,
    plane_content,
    plane_swap,
    refill,
    shard_frame,
)

from sparsekd.logit_store.places.tokenizer_folder import digest_of_files

Mutator = Callable[[Forgery, random.Random], None]

SHAPES = [
    0, 1, 2, 3, 5, 15, 17, 24, 31, 64, 1000, 4096, 2**16, 2**18, 2**20, 2**22, 2**24, 2**27, 2**31 - 1, 2**40,
]  # fmt: skip
OTHERS: list[Any] = [
    None, True, False, 0.5, 1.0, -0.0, 1e300, float("nan"), float("inf"), "", "x", "0" * 64, "\ud800",
    "\x1b[2J\n", "../../x", "y" * 5000, [], [0], [[]], {}, {"x": 1},
]  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield (*path, key)
            yield from _places(value[key], (*path, key))


def _change_value(content: Any, now: random.Random) -> None:
    """Changes one value anywhere in a nested one."""
    path = now.choice(list(_places(content)))
    for key in path[:-1]:
        content = content[key]
    key, old = path[-1], content[path[-1]]
    kind = now.randrange(8)
    if kind < 3 and isinstance(old, (int, float)):
        content[key] = now.choice([old + now.choice([-1, 1, 8, 256]), number(now), -old])
    elif kind == 4:
        del content[key]
    elif kind == 5 and isinstance(content, dict):
        content[now.choice(["", "x", "digest", "rows", str(key) + "_"])] = copy.deepcopy(old)
    elif kind == 6 and isinstance(content, list):
        now.choice([content.reverse, lambda: content.append(copy.deepcopy(old)), content.clear])()
    else:
        content[key] = now.choice([*OTHERS, number(now), number(now)])


def _changed_text(text: bytes, now: random.Random) -> bytes:
    """Changes a JSON text as text."""
    lines = text.splitlines(keepends=True)
    place = now.randrange(len(lines))
    deep = now.choice([20, 100, 3000, 100_000])
    nested = now.choice([b"[" * deep + b"]" * deep, b'{"x":' * deep + b"1" + b"}" * deep])
    key = lines[place].partition(b":")[0]
    changed = now.choice([
        lambda: [*lines[:place], lines[place], *lines[place:]],
        lambda: [*lines[:place], *lines[place + 1 :]],
        lambda: [*lines[:place], key + b": " + nested + b",\n", *lines[place + 1 :]],
        lambda: [*lines[:place], key + b": " + b"9" * deep + b",\n", *lines[place + 1 :]],
        lambda: [text.replace(b"\n", now.choice([b"", b"\r\n", b" \n"]))],
        lambda: [flipped(text, now)],
        lambda: [cut(text, now)],
        lambda: [text, text],
    ])  # fmt: skip
    return b"".join(changed())


def index_value(forged: Forgery, now: random.Random) -> None:
    for _ in range(now.randint(1, 3)):
        _change_value(forged.index, now)
    forged.index_is_forged = True


def index_text(forged: Forgery, now: random.Random) -> None:
    forged.files()
    forged.index_text = _changed_text(text_of(forged.index), now)


def table(forged: Forgery, now: random.Random) -> None:
    """Entries of rows and digests of records with other bytes, cut, longer, exchanged or empty."""
    change = now.choice([
        lambda data: flipped(data, now),
        lambda data: cut(data, now),
        lambda data: data + bytes(20),
        lambda data: data[20:40] + data[:20] + data[40:],
        lambda data: b"\xff" * len(data),
        lambda data: bytes(len(data)),
        lambda data: b"",
    ])  # fmt: skip
    forged.tables[now.choice(["train", "heldout"])] = change


def index_size(forged: Forgery, now: random.Random) -> None:
    """Claims more or fewer rows than there are, with counts and shards that fit."""
    content, size = json.loads(forged.manifest), now.choice([*SHAPES, 2**50])
    entry = forged.index["splits"][now.choice(["train", "heldout"])]
    entry["rows"], entry["shards"] = size, -(-size // content["rows_per_shard"])
    entry["counts"]["tokens"] = size * content["sequence_length"]


def record_value(forged: Forgery, now: random.Random) -> None:
    shard = a_shard(forged, now)
    shard.files()
    for _ in range(now.randint(1, 3)):
        if shard.record:
            _change_value(shard.record, now)
    shard.kept = {"offsets", "lengths", "crc32", "file_bytes", "file_sha256", "plane_bytes"}


def record_places(forged: Forgery, now: random.Random) -> None:
    """Lies about where rows are, in one list that is otherwise right."""
    shard = a_shard(forged, now)
    shard.files()
    name = now.choice(["offsets", "lengths", "crc32"])
    values = shard.record[name]
    values[now.randrange(len(values))] = now.choice(
        [number(now), now.choice(values) + 8, now.choice(values) - 8]
    )
    shard.kept = {name, now.choice(["file_bytes", name])}
    if now.random() < 0.3:
        shard.record["file_bytes"] = now.choice([2**40, 2**62])
        shard.kept.add("file_bytes")


def record_text(forged: Forgery, now: random.Random) -> None:
    shard = a_shard(forged, now)
    shard.files()
    shard.record_text = _changed_text(text_of(shard.record), now)


def _fit_counts(forged: Forgery, length: object) -> None:
    """Makes the counts of positions those of another sequence length."""
    if type(length) is not int:
        return
    for shard in forged.shards.values():
        counts = shard.record["counts"]
        counts["tokens"] = length * len(shard.messages)
    for entry in forged.index["splits"].values():
        entry["counts"]["tokens"] = length * entry["rows"]


def manifest_value(forged: Forgery, now: random.Random) -> None:
    content = json.loads(forged.manifest)
    for _ in range(now.randint(1, 2)):
        _change_value(content, now)
    forged.set_manifest(text_of(content))
    _fit_counts(forged, content.get("sequence_length"))


def manifest_text(forged: Forgery, now: random.Random) -> None:
    forged.set_manifest(_changed_text(forged.manifest, now))


def manifest_shape(forged: Forgery, now: random.Random) -> None:
    """Other sizes, as far as possible with everything else made to fit them."""
    content = json.loads(forged.manifest)
    record, size = content["record"], now.choice(SHAPES)
    kind = now.choice(["sequence_length", "k", "n", "grid", "vocabulary", "rows", "codec"])
    if kind == "sequence_length":
        times = 2 ** now.choice([0, 1, 2, 8, 12, 16])
        content["sequence_length"] = now.choice([size, times * content["sequence_length"]])
        # Rows that are what the manifest says, and as sound as they were, up to the largest.
        large = list(forged.shards.values())[-1:] if times > 2**8 else list(forged.shards.values())
        for shard in large:
            refill(shard, lambda plain: plain * times if len(plain) * times <= LARGEST_PLANE else b"")
    elif kind in ("k", "n"):
        ratio = size / max(1, record[kind])
        record[kind] = size
        if now.random() < 0.7 and size <= 2**20:
            for shard in forged.shards.values():
                refill(
                    shard,
                    lambda plain: bytes(min(int(len(plain) * ratio), LARGEST_PLANE)),
                    f"{'head' if kind == 'k' else 'tail'}_",
                )
    elif kind == "grid":
        record["temperatures"] = [1.0 + place for place in range(min(size, 20_000))]
    elif kind == "vocabulary":
        content["tokenizer"]["vocabulary_size"] = size
    elif kind == "rows":
        content["rows_per_shard"] = size
    else:
        content["codec"]["name"] = now.choice(["exact", "tkq8", "compact", "fp16", "plain"])
        frame = zstandard.ZstdCompressor(write_checksum=True).compress(
            bytes(now.choice([0, 4, 400, 1 << 24]))
        )
        table = now.choice([flipped(frame, now), frame, b"", bytes(100)])
        content["codec"]["parameters"] = now.choice([
            {},
            {"mass": now.choice([0, 1, 0.5, -1, 2, True, "x", None, 10**300])},
            {"frequent_ids": base64.b64encode(table).decode()},
            {"frequent_ids": now.choice([0, None, "&", [], "A" * 10_000])},
        ])  # fmt: skip
        if now.random() < 0.5:
            content["tokenizer"]["vocabulary_size"] = now.choice([2**31 - 1, 2**24, size])
    forged.set_manifest(text_of(content))
    _fit_counts(forged, content["sequence_length"])


def rows_moved(forged: Forgery, now: random.Random) -> None:
    """Rows taken away, added or given to another shard, with indexes that say so."""
    shard = a_shard(forged, now)
    now.choice([
        lambda: shard.messages.pop() if len(shard.messages) > 1 else None,
        lambda: shard.messages.append(shard.messages[0]),
        lambda: shard.messages.reverse(),
        lambda: shard.messages.extend(shard.messages * 3),
    ])()  # fmt: skip
    if now.random() < 0.5:
        for (split, number), each in forged.shards.items():
            entry = forged.index["splits"][split]
            entry["rows"] = (entry["rows"] if number else 0) + len(each.messages)
        _fit_counts(forged, json.loads(forged.manifest)["sequence_length"])


def _projection(forged: Forgery, now: random.Random) -> None:
    """Other numbers, or more or fewer, in a file that the manifest's digest fits."""
    name = now.choice([name for name in forged.others if name.startswith("projections/")])
    old = forged.others[name]
    forged.others[name] = now.choice([
        b"\xff" * len(old), b"\0\0\x80\x7f" + old[4:], flipped(old, now), cut(old, now), old + old, b"",
    ])  # fmt: skip
    content = json.loads(forged.manifest)
    for feature in content["features"]:
        feature["projection_digest"] = hashlib.sha256(forged.others[name]).hexdigest()
        if now.random() < 0.3:
            feature[now.choice(["source_width", "width"])] = now.choice(SHAPES)
    forged.set_manifest(text_of(content))


def _tokenizer(forged: Forgery, now: random.Random) -> None:
    """Files that the manifest's digest fits, and that no library reads."""
    place = "tokenizer/tokenizer.json"
    old = forged.others[place]
    changed = [b"", b"{}", b"[" * 10_000, flipped(old, now), cut(old, now), _changed_text(old, now)]
    forged.others[place] = now.choice(changed)
    content = json.loads(forged.manifest)
    files = {name.partition("/")[2]: data for name, data in forged.others.items() if name.startswith("tok")}
    content["tokenizer"]["digest"] = digest_of_files(sorted(files.items()))
    forged.set_manifest(text_of(content))


def other_files(forged: Forgery, now: random.Random) -> None:
    """The tokenizer's files, projections, and files that nobody expects."""
    if any(name.startswith("projections/") for name in forged.others) and now.random() < 0.8:
        return _projection(forged, now)
    if now.random() < 0.3:
        return _tokenizer(forged, now)
    name = now.choice(list(forged.others) or ["x"])
    forged.others[name] = now.choice([b"", flipped(forged.others.get(name, b"x"), now), bytes(1 << 20)])
    forged.others[
        now.choice(["shards/x", "quarantine/train/000000.arrow", "tokenizer/x", ".tmp-1", name])
    ] = b"x"


MUTATORS: dict[str, tuple[Mutator, int]] = {
    "index value": (index_value, 2),
    "index text": (index_text, 1),
    "index table": (table, 2),
    "index size": (index_size, 1),
    "record value": (record_value, 2),
    "record places": (record_places, 2),
    "record text": (record_text, 1),
    "manifest value": (manifest_value, 2),
    "manifest text": (manifest_text, 1),
    "manifest shape": (manifest_shape, 3),
    "plane content": (plane_content, 8),
    "plane swap": (plane_swap, 1),
    "message header": (message_header, 4),
    "message body": (message_body, 2),
    "message kind": (message_kind, 2),
    "shard header or footer": (shard_frame, 1),
    "rows moved": (rows_moved, 1),
    "other files": (other_files, 1),
}
"""Name -> (mutator, how often it is taken)."""
