"""Makes the golden stores. Run once per codec, when the codec is new; never again: they are a promise.

    python tests/unit/store/golden/make.py NAME

Writes `golden/NAME/` and adds what it decodes to, to `golden/DIGESTS.json`.
"""

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from sparsekd.logit_store.codecs.frequency import compact_parameters
from sparsekd.logit_store.manifest import CodecSpec, FeatureSpec, Manifest, TokenizerIdentity
from sparsekd.logit_store.places.tokenizer_folder import digest_of_files
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.row import Row, planes_of_row
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows

HERE = Path(__file__).parent
VOCABULARY = 70_000  # two byte planes and a bit plane, but for the kinds that name another
TOKENIZER = {"tokenizer.json": b"{}\n"}

BOTH = {"planes": ("weights", "token_types")}
CLASSES = ("no", "perhaps", "yes")
FEATURES = (
    FeatureSpec(0, 6, 6, "none", None, 1.0, "int8", "all"),
    FeatureSpec(3, 5, 5, "none", None, 1.0, "float16", "recorded"),
)

# name -> (codec, fields of the manifest)
KINDS = {
    "exact": ("exact", {"k": 5, "n": 7, "tail_logprobs": True}),
    "tkq8": ("tkq8", {"k": 5, "n": 7, "tail_logprobs": True}),
    "tkq8-sampled": ("tkq8", {"k": 0, "n": 20}),
    "tkq8-tokens": ("tkq8", {"k": 0, "n": 0}),
    "compact": ("compact", {"k": 12, "n": 0}),
    "fp16": ("fp16", {"k": 5, "n": 7, "tail_logprobs": True}),
    "plain": ("plain", {"k": 5, "n": 7, "tail_logprobs": True}),
    # One byte plane; two byte planes and two bit planes.
    "tkq8-v256": ("tkq8", {"k": 5, "n": 7, "tail_logprobs": True, "vocabulary": 256}),
    "plain-v256": ("plain", {"k": 5, "n": 7, "tail_logprobs": True, "vocabulary": 256}),
    "tkq8-v262144": ("tkq8", {"k": 5, "n": 7, "tail_logprobs": True, "vocabulary": 262_144}),
    "plain-v262144": ("plain", {"k": 5, "n": 7, "tail_logprobs": True, "vocabulary": 262_144}),
    # Where records stand, what labels are, weights and types.
    "tkq8-share": ("tkq8", {"k": 5, "n": 7, "positions": "sampled", "share": 0.4, **BOTH}),
    "plain-share": ("plain", {"k": 5, "n": 7, "positions": "sampled", "share": 0.4, **BOTH}),
    "tkq8-all": ("tkq8", {"k": 5, "n": 7, "positions": "all"}),
    "tkq8-masked": ("tkq8", {"k": 5, "n": 7, "target": "masked_token", "positions": "masked", **BOTH}),
    "exact-masked": ("exact", {"k": 5, "n": 7, "target": "masked_token", **BOTH}),
    "plain-masked": ("plain", {"k": 5, "n": 7, "target": "masked_token"}),
    "tkq8-classes": ("tkq8", {"k": 3, "n": 0, "target": "class", "outcomes": CLASSES}),
    "compact-classes": ("compact", {"k": 3, "n": 0, "target": "class", "outcomes": CLASSES}),
    # Hidden states, in frames and without.
    "tkq8-features": ("tkq8", {"k": 5, "n": 7, "features": FEATURES}),
    "exact-features": ("exact", {"k": 5, "n": 7, "features": FEATURES}),
    "plain-features": ("plain", {"k": 5, "n": 7, "features": FEATURES}),
}


def golden_manifest(name: str) -> Manifest:
    codec, fields = KINDS[name]
    fields = dict(fields)
    vocabulary = fields.pop("vocabulary", VOCABULARY)
    parameters = {}
    if codec == "compact":
        parameters = compact_parameters(np.arange(VOCABULARY) * 7 % 1000, mass=0.4, table_ids=300)
    return synthetic_manifest(
        sequence_length=24,
        rows_per_shard=2,
        codec=CodecSpec(codec, parameters),
        tokenizer=TokenizerIdentity("golden", vocabulary, digest_of_files(TOKENIZER.items()), None, 0),
        **fields,
    )


def golden_rows(manifest: Manifest) -> dict[str, list[Row]]:
    rows = {
        "train": synthetic_rows(manifest, 3, 1),
        "heldout": synthetic_rows(manifest, 1, 2, "heldout"),
    }
    return {split: [_with_edges(row, manifest) for row in content] for split, content in rows.items()}


def _with_edges(row: Row, manifest: Manifest) -> Row:
    """A row whose first records are as odd as the rules allow."""
    record, k, n = row.teacher, manifest.record.k, manifest.record.n
    vocabulary = manifest.outcome_count
    if record is None or len(record.entropy) < 3 or manifest.outcomes is not None:
        return row
    changes = {field.name: getattr(record, field.name).copy() for field in dataclasses.fields(record)}
    # Record 0: certainty, an empty rest, no draws. 1: equal values. 2: nearly equal ones.
    if k:  # else nothing would be possible
        changes["log_rest"][0], changes["rest_entropy"][0] = -np.inf, 0
        changes["tail_ids"][0], changes["tail_counts"][0] = -1, 0
        changes["tail_logprobs"][0] = -np.inf
        # Steps of 5,000 where that many fit, as in the first stores; else such that the highest bit is used.
        spacing = 5000 if vocabulary == VOCABULARY else (vocabulary - 2) // (k - 1)
        changes["head_ids"][:3] = np.arange(k) * spacing
        changes["head_logprobs"][0] = [0.0] + [-np.inf] * (k - 1)
        changes["head_logprobs"][1] = np.float32(np.log(1e-3))
        changes["head_logprobs"][2] = np.log(1e-3) - np.arange(k, dtype=np.float32) * np.float32(1e-6)
    if n:
        changes["tail_ids"][1] = [1, vocabulary - 1] + [-1] * (n - 2)
        changes["tail_counts"][1] = [1, n - 1] + [0] * (n - 2)
        changes["tail_logprobs"][1, 2:] = -np.inf
    return dataclasses.replace(row, teacher=dataclasses.replace(record, **changes))


def digests_of(row: Row) -> dict[str, str]:
    """sha256 of each decoded array, in the little-endian type that `Row` promises."""
    arrays = planes_of_row(row)
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}


def main(name: str) -> None:
    manifest, path = golden_manifest(name), HERE / name
    tokenizer = HERE / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    for file, content in TOKENIZER.items():
        (tokenizer / file).write_bytes(content)
    create_store(path, manifest, tokenizer)
    rows = golden_rows(manifest)
    for split, content in rows.items():
        for shard in range(-(-len(content) // 2)):
            write_shard(path, manifest, split, shard, content[shard * 2 : shard * 2 + 2])
    digest = seal(path, {"train": 2, "heldout": 1})
    store = open_store(path)
    found = {
        f"{split}/{index}": digests_of(store.read_row(split, index))
        for split, content in rows.items()
        for index in range(len(content))
    }
    place = HERE / "DIGESTS.json"
    known = json.loads(place.read_text()) if place.exists() else {}
    if name in known:
        raise SystemExit(f"{name} is in {place} already: a golden store is never made anew.")
    known[name] = {"store": digest, "rows": found}
    place.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
