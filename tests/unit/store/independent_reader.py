"""A second reader of logit stores, written from docs/format.md alone: it shares no code with sparsekd."""

import base64
import hashlib
import json
import struct
import zlib

import numpy as np
import pyarrow as pa
import zstandard


def read_store(path):
    """Yields (split, row, {plane: array}) of every row."""
    text = (path / "MANIFEST.json").read_bytes()
    manifest, index = json.loads(text), signed(path / "INDEX.json")
    assert manifest["format_version"] == 1 and index["manifest_sha256"] == hashlib.sha256(text).hexdigest()
    for split, shard in [(s, i) for s in index["splits"] for i in range(index["splits"][s]["shards"])]:
        sha256, rows = index["splits"][split]["table_sha256"], index["splits"][split]["rows"]
        table = (path / f"index/{split}-{sha256[:16]}.bin").read_bytes()
        assert hashlib.sha256(table).hexdigest() == sha256
        digests = table[20 * rows :].hex()
        record = signed(path / f"shards/{split}/{shard // 1000:03d}/{shard:06d}.json")
        assert record["digest"] == digests[64 * shard : 64 * shard + 64]
        first = 20 * shard * manifest["rows_per_shard"]
        entries = struct.iter_unpack("<QIII", table[first : first + 20 * len(record["offsets"])])
        columns = (record["offsets"], record["lengths"], record["crc32"], record["counted"])
        assert list(entries) == list(zip(*columns, strict=True))
        data = (path / f"shards/{split}/{shard // 1000:03d}/{shard:06d}.arrow").read_bytes()
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


def parts_of(plane):
    many = [4 * m + np.cumsum(np.frombuffer(plane, "<u4", m)) for m in range(1, min(99, len(plane) // 4))]
    ends = next(ends for ends in many if ends[-1] == len(plane))
    return [unzip(plane[a:b]) for a, b in zip([4 * len(ends), *ends], ends, strict=False)]


def uint(largest):
    return "<u1" if largest < 256 else "<u2" if largest < 65536 else "<u4"


def decode(planes, manifest):
    spec, codec, options = manifest["record"], manifest["codec"]["name"], manifest["codec"]["parameters"]
    L, V, k, n = manifest["sequence_length"], manifest["tokenizer"]["vocabulary_size"], spec["k"], spec["n"]
    U = len(manifest["outcomes"]) if manifest["outcomes"] is not None else V
    G, zipped = len(spec["temperatures"]), codec not in ("plain", "exact")
    text = ["loss_mask", "recorded", "segment_starts", "segment_documents"]
    text += ["weight_starts", "weights", "token_types"]
    # Planes of one part, of which arrays are cut off.
    framed = [p for p in planes if zipped or (codec == "exact" and (p == "labels" or p[:8] == "feature_"))]
    single = [p for p in planes if p in text or p not in framed]
    left = {p: parts_of(planes[p]) for p in planes if p not in single}
    left |= {p: [planes[p] if codec == "plain" or not planes[p] else unzip(planes[p])] for p in single}

    def take(plane, kind, count=-1):
        data = left[plane].pop(0)
        array = np.frombuffer(data, kind, count if plane in single else -1)
        left[plane] += [data[array.nbytes :]] if plane in single else []
        return array

    def words(plane, kind, count):
        if not zipped:
            return take(plane, "<f4" if codec == "exact" else kind, count)
        return np.stack([take(plane, "u1"), take(plane, "u1")], axis=1).reshape(-1).view(kind)

    def nats(plane):
        return words(plane, "<u2", M) if codec == "exact" else words(plane, "<u2", M) / np.float32(512)

    def ids(plane, count, below):
        bits, split = max(1, (below - 1).bit_length()), plane not in single
        if codec == "exact" and plane != "labels":
            return take(plane, uint(below - 1), count).astype(int)
        found = take(plane, "<u2" if bits > 8 and not split else "u1", count).astype(int)
        if bits > 8 and split:
            found += take(plane, "u1").astype(int) << 8
        packed = take(plane, "u1", (bits - 16) * -(-count // 8)).reshape(bits - 16, -1) if bits > 16 else []
        for bit, line in enumerate(packed, 16):
            found += np.unpackbits(line, count=count, bitorder="little").astype(int) << bit
        return found

    def place(used, array, filler=0):
        """All places, of entries that are stored for the used ones or for all."""
        out = np.full(used.shape, filler, array.dtype if filler else int)
        out[used] = array if array.size == used.sum() else array.reshape(used.shape)[used]
        return out

    def values(plane, used):
        if codec in ("exact", "fp16"):
            return place(used, words(plane, "<f2", used.size), -np.inf)
        top, span = (words(plane, "<f2", M).astype("f4")[:, None] for _ in range(2))
        if zipped and plane == "head_logprobs":
            told = used & (np.arange(k) > 0)
            codes = np.cumsum(place(told, take(plane, "u1")), axis=1)
        else:
            codes = place(used, take(plane, "u1", used.size))
        value = top - span / np.float32(64516) * codes.astype("f4") ** 2
        return np.where(used & (codes < 255), value, -np.inf)

    def bits_of(plane):
        return np.unpackbits(take(plane, "u1"), count=L, bitorder="little")

    old = np.arange(V)
    if options.get("frequent_ids"):
        table = np.frombuffer(unzip(base64.b64decode(options["frequent_ids"])), "u1").reshape(4, -1)
        first = 256 ** np.arange(4) @ table
        old = np.concatenate([first, np.setdiff1d(old, first)])
    row = {"token_ids": old[ids("token_ids", L, V)], "loss_mask": bits_of("loss_mask")}
    kinds = {"segment_starts": "<u4", "segment_documents": "<i8", "weight_starts": "<u4"}
    kinds |= {"weights": "<f4", "token_types": "u1"}
    row |= {plane: take(plane, kind) for plane, kind in kinds.items() if plane in planes}
    if "labels" in planes:
        row["labels"] = ids("labels", int(row["loss_mask"].sum()), U + 1) - 1
    if manifest["teacher"] is None:
        return row
    row["recorded"] = bits_of("recorded") if planes.get("recorded") else row["loss_mask"]
    M = int(row["recorded"].sum())
    if k:
        sizes = np.full(M, k) if options.get("mass") is None else take("head_ids", uint(k))
        used = np.arange(k) < sizes[:, None]
        found = ids("head_ids", int(used.sum()), U)
        row["head_ids"] = place(used, found if manifest["outcomes"] else old[found], -1)
        row["head_logprobs"] = values("head_logprobs", used)
    if n and zipped:
        used = np.arange(n) < take("tail_ids", uint(n))[:, None]
        row["tail_ids"] = np.where(used, np.cumsum(place(used, ids("tail_ids", used.sum(), U)), axis=1), -1)
        last = used & ~np.pad(used[:, 1:], ((0, 0), (0, 1)))
        counts = place(used & ~last, take("tail_counts", uint(n)))
        row["tail_counts"] = counts + last * (n - counts.sum(axis=1, keepdims=True))
    elif n:
        row["tail_counts"] = take("tail_counts", uint(n)).reshape(M, n)
        used = row["tail_counts"] > 0
        row["tail_ids"] = place(used, ids("tail_ids", M * n, U), -1)
    if spec["tail_logprobs"]:
        row["tail_logprobs"] = values("tail_logprobs", used)
    rest = [words("log_rest", "<f2", M) for _ in range(G)]
    row["log_rest"] = np.stack(rest, axis=1) if zipped else np.concatenate(rest).reshape(M, G)
    row["true_logprob"] = words("true_logprob", "<f2", M)
    row["rest_entropy"], row["entropy"] = nats("rest_entropy"), nats("entropy")
    for feature in manifest["features"]:
        plane, d, is_int8 = f"feature_{feature['layer']}", feature["width"], feature["kind"] == "int8"
        lengths = np.diff(np.append(row["segment_starts"], L))
        F = M if feature["positions"] == "recorded" else int(lengths[row["segment_documents"] != -1].sum())
        count = F if is_int8 else F * d
        if plane in single:
            halves = take(plane, "<f2", count)
        else:
            halves = np.stack([take(plane, "u1"), take(plane, "u1")], axis=1).reshape(-1).view("<f2")
        row[plane] = halves.astype("f4").reshape(F, 1 if is_int8 else d)  # for int8 the scale
        if is_int8:
            row[plane] = take(plane, "i1").astype("f4").reshape(F, d) * row[plane]
    if zipped and k == 0:
        row["entropy"] = (row["entropy"] + row["rest_entropy"]) % 128  # 65,536 steps
    return row
