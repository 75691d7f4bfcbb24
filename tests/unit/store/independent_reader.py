"""A second reader of logit stores, written from docs/format.md alone: it shares no code with sparsekd."""

import base64
import hashlib
import json
import zlib

import numpy as np
import pyarrow as pa
import zstandard


def read_store(path):
    """Yields (split, row, {plane: array}) of every row."""
    text = (path / "MANIFEST.json").read_bytes()
    manifest, index = json.loads(text), signed(path / "INDEX.json")
    assert manifest["format_version"] == 1 and index["manifest_sha256"] == hashlib.sha256(text).hexdigest()
    for split, shard in [(s, i) for s in index["splits"] for i in range(len(index["splits"][s]["shards"]))]:
        record = signed(path / f"shards/{split}/{shard:06d}.json")
        assert record["digest"] == index["splits"][split]["shards"][shard]["record_digest"]
        data = (path / f"shards/{split}/{shard:06d}.arrow").read_bytes()
        schema = pa.ipc.read_schema(pa.py_buffer(data[8:]))
        for begin, length, crc32 in zip(record["offsets"], record["lengths"], record["crc32"], strict=True):
            assert zlib.crc32(data[begin : begin + length]) == crc32
            batch = pa.ipc.read_record_batch(pa.py_buffer(data[begin : begin + length]), schema)
            planes = {name: batch[name][0].as_py() for name in schema.names[2:]}
            yield split, batch["row"][0].as_py(), decode(planes, manifest)


def signed(file):
    digest = json.loads(file.read_bytes())["digest"].encode()
    assert hashlib.sha256(file.read_bytes().replace(digest, b"", 1)).hexdigest().encode() == digest
    return json.loads(file.read_bytes())


def unzip(frame):
    return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)


def uint(largest):
    return "<u1" if largest < 256 else "<u2" if largest < 65536 else "<u4"


def decode(planes, manifest):
    spec, codec, options = manifest["record"], manifest["codec"]["name"], manifest["codec"]["parameters"]
    L, V, k, n = manifest["sequence_length"], manifest["tokenizer"]["vocabulary_size"], spec["k"], spec["n"]
    bits, zipped, mass = max(1, (V - 1).bit_length()), codec not in ("plain", "exact"), options.get("mass")
    queues = {}  # plane -> what is left of it: bytes, or a list of parts

    def take(plane, kind, count=-1, parts=1):
        """The next array of a plane that has so many parts."""
        if plane not in queues:
            data = planes[plane]
            if zipped and plane not in ("loss_mask", "segment_starts", "segment_documents"):
                ends = 4 * parts + np.cumsum(np.frombuffer(data, "<u4", parts))
                queues[plane] = [unzip(data[a:b]) for a, b in zip([4 * parts, *ends], ends, strict=False)]
            else:
                queues[plane] = data if codec == "plain" else unzip(data)
        if isinstance(queues[plane], list):
            return np.frombuffer(queues[plane].pop(0), kind, count)
        array = np.frombuffer(queues[plane], kind, count)
        queues[plane] = queues[plane][array.nbytes :]
        return array

    def words(plane, kind, count, parts=2):
        """16-bit numbers, low and high bytes apart where the codec does so; the float32 of `exact`."""
        if not zipped:
            return take(plane, kind if codec == "plain" else "<f4", count)
        return np.stack([take(plane, "u1", count, parts), take(plane, "u1", count)], 1).reshape(-1).view(kind)

    def ids(plane, count, parts):
        if codec == "exact":
            return take(plane, uint(V - 1), count).astype(int)
        low = take(plane, "u1" if zipped or bits <= 8 else "<u2", count, parts).astype(int)
        if zipped and bits > 8:
            low = low + 256 * take(plane, "u1", count).astype(int)
        packed = take(plane, "u1", (bits - 16) * -(-count // 8)).reshape(bits - 16, -1) if bits > 16 else []
        for bit, line in enumerate(packed):
            low = low + (np.unpackbits(line, bitorder="little")[:count].astype(int) << (16 + bit))
        return low

    def nats(plane):
        return words(plane, "<u2", L) if codec == "exact" else words(plane, "<u2", L).astype(int)

    def values(plane, used, differences=False):
        """Log-probabilities of the used places; differences: the first of each position is not told."""
        if codec in ("exact", "fp16"):
            return spread(used, words(plane, "<f2", used.sum() if zipped else used.size), -np.inf)
        top, span = words(plane, "<f2", L, 5), words(plane, "<f2", L)
        if differences and zipped:
            told = used & (np.arange(used.shape[1]) > 0)
            codes = np.cumsum(spread(told, take(plane, "u1", told.sum()), 0), axis=1)
        else:
            codes = spread(used, take(plane, "u1", used.sum() if zipped else used.size), 0)
        step = (span.astype("f4") / np.float32(64516))[:, None]
        value = top.astype("f4")[:, None] - step * codes.astype("f4") ** 2
        return np.where(used & (codes < 255), value, np.float32(-np.inf))

    def spread(used, array, filler):
        """Entries to their places; where a codec stores all places, those that are not used are cleared."""
        out = np.full(used.shape, filler, np.float32 if filler else int)
        out[used] = array if array.size == used.sum() and zipped else array.reshape(used.shape)[used]
        return out

    old, id_parts = np.arange(V), min(2, -(-bits // 8)) + (bits > 16)
    if options.get("frequent_ids"):
        table = np.frombuffer(unzip(base64.b64decode(options["frequent_ids"])), "u1").reshape(4, -1)
        first = (256 ** np.arange(4)) @ table
        old = np.concatenate([first, np.setdiff1d(old, first)])
    row = {"token_ids": old[ids("token_ids", L, id_parts)]}
    row["loss_mask"] = np.unpackbits(take("loss_mask", "u1"), bitorder="little")[:L]
    row["segment_starts"], row["segment_documents"] = (
        take("segment_starts", "<u4"),
        take("segment_documents", "<i8"),
    )
    if manifest["teacher"] is None:
        return row
    if k:
        used = np.ones((L, k), bool)
        if mass is not None:
            used = np.arange(k) < take("head_ids", uint(k), L, 1 + id_parts)[:, None]
        found = old[ids("head_ids", int(used.sum()), id_parts)]
        row["head_ids"] = np.full((L, k), -1)
        row["head_ids"][used] = found
        row["head_logprobs"] = values("head_logprobs", used, differences=True)
    if n and zipped:
        used = np.arange(n) < take("tail_ids", uint(n), L, 1 + id_parts)[:, None]
        gaps = spread(used, ids("tail_ids", int(used.sum()), id_parts), 0)
        row["tail_ids"] = np.where(used, np.cumsum(gaps, axis=1), -1)
        last = used & ~np.pad(used[:, 1:], ((0, 0), (0, 1)))
        counts = spread(used & ~last, take("tail_counts", uint(n)), 0)
        row["tail_counts"] = counts + last * (n - counts.sum(axis=1, keepdims=True))
    elif n:
        row["tail_counts"] = take("tail_counts", uint(n)).reshape(L, n)
        used = row["tail_counts"] > 0
        row["tail_ids"] = np.where(used, ids("tail_ids", L * n, id_parts).reshape(L, n), -1)
    if spec.get("tail_logprobs"):
        row["tail_logprobs"] = values("tail_logprobs", used)
    grid = len(spec["temperatures"])
    if zipped:
        row["log_rest"] = np.stack([words("log_rest", "<f2", L, 2 * grid) for _ in range(grid)], axis=1)
    else:
        row["log_rest"] = words("log_rest", "<f2", L * grid).reshape(L, grid)
    row["rest_entropy"], row["true_logprob"], row["entropy"] = (
        nats("rest_entropy"),
        words("true_logprob", "<f2", L),
        nats("entropy"),
    )
    if zipped and k == 0:
        row["entropy"] = (row["entropy"] + row["rest_entropy"]) % 65536
    if codec != "exact":
        row["rest_entropy"], row["entropy"] = row["rest_entropy"] / 512, row["entropy"] / 512
    return row
