"""Starts writers of a store, each a process of its own; run by test_crash, which kills them.

Reads lines from standard input: `start|STORE|TOKENIZER|RANK|RANKS` forks a writer and answers with its
process id; `wait` answers with `ID STATUS` of the next one to end. The rows are made once, before any fork.
"""

import os
import sys
import traceback
from pathlib import Path

from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows
from sparsekd.logit_store.writer import committed_shards, create_store, write_shard

SHARDS = 12
MANIFEST = synthetic_manifest(sequence_length=128, rows_per_shard=4)
ROWS = synthetic_rows(MANIFEST, SHARDS * MANIFEST.rows_per_shard, 0)


def write(path: Path, tokenizer: Path, rank: int, world: int) -> None:
    """Does what a rank of a capture does: makes its share of the shards that are not there yet."""
    create_store(path, MANIFEST, tokenizer)
    done = committed_shards(path, "train")
    for shard in range(rank, SHARDS, world):
        if shard not in done:
            first = shard * MANIFEST.rows_per_shard
            write_shard(path, MANIFEST, "train", shard, ROWS[first : first + MANIFEST.rows_per_shard])


def main() -> None:
    """Serves until standard input ends."""
    for line in sys.stdin:
        command, *words = line.rstrip("\n").split("|")
        if command == "wait":
            print(*os.wait(), flush=True)
            continue
        child = os.fork()
        if child:
            print(child, flush=True)
            continue
        code = 1
        try:
            write(Path(words[0]), Path(words[1]), int(words[2]), int(words[3]))
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)


if __name__ == "__main__":
    main()
