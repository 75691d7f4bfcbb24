"""Starts writers of a store, each a process of its own; run by test_crash, which kills them.

Reads lines from standard input: `start|STORE|TOKENIZER|RANK|RANKS|WHERE` forks a writer and answers with its
process id; `wait` answers with `ID STATUS` of the next one to end. The rows are made once, before any fork.

WHERE is empty, or the place where the writer kills itself: `STEP ENDING TIMES` stops it when it has reached a
step of publishing a file with that ending for so many times; the step `half written` is in the middle of its
content. `in place` makes the writer break the protocol: it writes under the final name.
"""

import os
import signal
import sys
import traceback
from pathlib import Path

from sparsekd.logit_store.places import file_system, local_files
from sparsekd.logit_store.places.file_system import HashingFile, Produce
from sparsekd.logit_store.places.paths import StorePath, store_path
from sparsekd.logit_store.protocol.recover import adopt_orphans
from sparsekd.logit_store.protocol.writer import committed_shards, create_store, write_shard
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows

SHARDS = 12
MANIFEST = synthetic_manifest(sequence_length=128, rows_per_shard=4)
ROWS = synthetic_rows(MANIFEST, SHARDS * MANIFEST.rows_per_shard, 0)


def write(path: StorePath, tokenizer: Path, rank: int, world: int) -> None:
    """Does what a rank of a capture does: makes its share of the shards that are not there yet."""
    create_store(path, MANIFEST, tokenizer)
    adopt_orphans(path, MANIFEST)
    done = committed_shards(path, "train")
    for shard in range(rank, SHARDS, world):
        if shard not in done:
            first = shard * MANIFEST.rows_per_shard
            write_shard(path, MANIFEST, "train", shard, ROWS[first : first + MANIFEST.rows_per_shard])


def die_at(where: str) -> None:
    """Has this process kill itself at a step of the protocol."""
    step, ending, times = where.rsplit(" ", 2)
    current, left = "", int(times)

    def count(reached: str, name: str) -> None:
        nonlocal left
        if reached == step and name.endswith(ending):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def reached(found: str, final: StorePath) -> None:
        nonlocal current
        current = final.name
        count(found, final.name)

    plain = HashingFile.write

    def write_some(file: HashingFile, data: object) -> int:
        view = memoryview(data).cast("B")
        done = plain(file, view[: len(view) // 2])
        count("half written", current)
        return done + plain(file, view[len(view) // 2 :])

    file_system.reached = reached
    if step == "half written":
        HashingFile.write = write_some


def publish_in_place(self: local_files.LocalFiles, final: Path, produce: Produce, *, replace: bool) -> str:
    """Breaks the protocol on purpose."""
    file_system.reached("opened", final)
    final.parent.mkdir(exist_ok=True)
    with open(final, "wb") as target:
        file = HashingFile(target.fileno())
        produce(file)
    return file.hexdigest()


def main() -> None:
    """Serves until standard input ends; with the words of a `start` as arguments, is that one writer."""
    if len(sys.argv) > 1:
        path, tokenizer, where = sys.argv[1:]
        die_at(where)
        write(store_path(path), Path(tokenizer), 0, 1)
        return
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
            path, tokenizer, rank, world, where = words
            if where.startswith("in place "):
                local_files.LocalFiles.publish = publish_in_place
                where = where.removeprefix("in place ")
            if where:
                die_at(where)
            write(store_path(path), Path(tokenizer), int(rank), int(world))
            code = 0
        except BaseException:  # the child must not go on as its parent, whatever ends it
            traceback.print_exc()
        os._exit(code)


if __name__ == "__main__":
    main()
