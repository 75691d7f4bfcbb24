"""One turn of `prepare.py`, in a process of its own: how long one way takes, and how much of it is serial.

Prints one line of JSON: seconds by the clock and of this process's processor, both without imports, and the
tokens that came out.
"""

import json
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

# The folder is no package, and PYTHONSAFEPATH keeps a script's folder off the path.
sys.path.insert(0, str(Path(__file__).parent))

LENGTH = 1024


def ours(words: list[str], folder: Path) -> tuple[Callable[[], None], Callable[[], int]]:
    """Our `prepare`, and the tokens of its store."""
    import sparsekd
    from sparsekd.trainer.corpus.prepare import run

    config = sparsekd.compose([*words, f"store.tokens={folder / 'tokens'}"])

    def tokens() -> int:
        store = sparsekd.open_store(folder / "tokens")
        counts = [store.index(split).counts for split in store.manifest.splits]
        return sum(each.tokens - each.tokens_padding for each in counts)

    return lambda: run(config), tokens


def theirs(
    text: str, tokenizer: str, processes: int, folder: Path
) -> tuple[Callable[[], None], Callable[[], int]]:
    """`datasets.map` with a tokenizer and then into rows, as transformers' own scripts of training do it.

    It keeps no borders of documents, no mask for a prompt, and holds out nothing.
    """
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    made = AutoTokenizer.from_pretrained(tokenizer)
    result: list[Any] = []

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        if "messages" in batch:
            encoded: list[Any] = [made.apply_chat_template(each) for each in batch["messages"]]
            return {"input_ids": [each["input_ids"] for each in encoded]}
        return {"input_ids": made(batch["text"], verbose=False)["input_ids"]}

    def rows(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = list(chain.from_iterable(batch["input_ids"]))
        return {"input_ids": [joined[start : start + LENGTH] for start in range(0, len(joined), LENGTH)]}

    def run() -> None:
        table = datasets.load_dataset("json", data_files=text, split="train", cache_dir=str(folder / "cache"))
        how: dict[str, Any] = {"batched": True, "num_proc": processes if processes > 1 else None}
        table = table.map(encode, remove_columns=table.column_names, **how).map(rows, **how)
        table.save_to_disk(folder / "saved")
        result.append(table)

    return run, lambda: sum(map(len, result[0]["input_ids"]))


def main() -> None:
    way = json.loads(sys.argv[1])
    folder = Path(way["folder"])
    run, tokens = (
        ours(way["words"], folder)
        if way["kind"] == "ours"
        else theirs(way["text"], way["tokenizer"], way["processes"], folder)
    )
    clock, processor = time.perf_counter(), time.process_time()
    run()
    seconds = time.perf_counter() - clock
    print(json.dumps({"seconds": seconds, "serial": time.process_time() - processor, "tokens": tokens()}))


if __name__ == "__main__":
    main()
