"""How fast `prepare` makes tokens of text and of conversations, by one process and by several: a page.

By turns over one corpus, each in a process of its own: our `prepare` with one thread, with the tokenizer's
threads, and with `corpus.jobs`; and `datasets.map` with as many processes. What the first of our processes
does alone says how far more processes can help.

    .venv/bin/python benchmarks/prepare.py --tokenizer models/a --chat models/b --text docs.jsonl

Without --tokenizer a small one is trained, and without --text the standard library of Python is the text.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

# The folder is no package, and PYTHONSAFEPATH keeps a script's folder off the path.
sys.path.insert(0, str(Path(__file__).parent))

from page import command_line, made_by, processor, running_code, table
from prepare_turn import LENGTH

from sparsekd.trainer.corpus.tokenizer import save_tokenizer, train_tokenizer

STARTED = 4
"""Documents of a turn that is hardly more than a start."""

PACKAGES = ("tokenizers", "transformers", "datasets", "numpy")
SEED = 0

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""What most instruct models have, for a tokenizer that is trained here."""

ALONE = "sparsekd, one thread"
THREADS = "sparsekd, corpus.jobs=1"
JOBS = "sparsekd, corpus.jobs={}"
MAP = "datasets.map, {} process{}"
TEXT, CHAT = "text", "conversations"


class Setting(NamedTuple):
    """Sizes of a run."""

    documents: int
    rounds: int
    processes: int
    kinds: tuple[str, ...]
    every: int  # of the ways


FULL = Setting(documents=1_000_000, rounds=2, processes=2, kinds=(TEXT, CHAT), every=1)
SMOKE = Setting(documents=12, rounds=1, processes=2, kinds=(CHAT,), every=2)


class Corpus(NamedTuple):
    """What all ways read."""

    kind: str
    path: Path
    tokenizer: Path
    begin: Path  # its first documents, with which a way takes as long as it takes to start


class Turn(NamedTuple):
    """What one turn took: seconds by the clock, seconds of the first process's processor, tokens made."""

    seconds: float
    serial: float
    tokens: int


def texts_of(path: Path | None, most: int) -> list[str]:
    """The documents of a file of JSON lines; without one, of the standard library."""
    if path is not None:
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line)["text"] for line in lines][:most]
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [file.read_text(encoding="utf-8") for file in files][:most]


def conversations_of(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Conversations of a document's paragraphs, four to each."""
    found = []
    for text in texts:
        paragraphs = [part for part in text.split("\n\n") if part.strip()]
        for first in range(0, len(paragraphs) - 3, 4):
            turns = zip(("user", "assistant") * 2, paragraphs[first : first + 4], strict=True)
            found.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return found


def corpora(
    root: Path, text: Path | None, tokenizer: Path | None, chat: Path | None, setting: Setting
) -> list[Corpus]:
    """The corpora, as files."""
    texts = texts_of(text, setting.documents)
    if tokenizer is None:
        tokenizer = root / "tokenizer"
        made = train_tokenizer(texts[:100], 4096)
        made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        made.chat_template = CHATML
        save_tokenizer(made, tokenizer)
    records = {TEXT: [{"text": each} for each in texts], CHAT: conversations_of(texts)}
    found = []
    for kind in setting.kinds:
        folder = chat or tokenizer if kind == CHAT else tokenizer
        path = root / f"{kind}.jsonl"
        lines = [f"{json.dumps(record)}\n" for record in records[kind]]
        path.write_text("".join(lines), encoding="utf-8")
        begin = root / f"{kind}-begin.jsonl"
        begin.write_text("".join(lines[:STARTED]), encoding="utf-8")
        found.append(Corpus(kind, path, folder, begin))
    return found


def ways_of(corpus: Corpus, path: Path, processes: int) -> dict[str, tuple[dict[str, Any], dict[str, str]]]:
    """Each way: what its process is told, and its environment."""
    words = [
        "corpus=jsonl",
        f"corpus.paths=[{path}]",
        f"corpus.tokenizer={corpus.tokenizer}",
        f"corpus.sequence_length={LENGTH}",
        "corpus.heldout_fraction=0",
    ]
    alone, threads = {"TOKENIZERS_PARALLELISM": "false"}, {"TOKENIZERS_PARALLELISM": "true"}
    ways = {
        ALONE: ({"kind": "ours", "words": words}, alone),
        THREADS: ({"kind": "ours", "words": words}, threads),
        JOBS.format(processes): ({"kind": "ours", "words": [*words, f"corpus.jobs={processes}"]}, alone),
    }
    for number in (1, processes):
        told: dict[str, Any] = {"kind": "theirs", "text": str(path), "processes": number}
        ways[MAP.format(number, "es" * (number > 1))] = told | {"tokenizer": str(corpus.tokenizer)}, alone
    return ways


def turn(told: Mapping[str, Any], environment: Mapping[str, str]) -> Turn:
    """One turn of a way, in a process of its own and an empty folder."""
    script = str(Path(__file__).with_name("prepare_turn.py"))
    with TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, script, json.dumps({**told, "folder": folder})],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", **environment},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return Turn(**json.loads(done.stdout.splitlines()[-1]))


def measured(corpus: Corpus, setting: Setting) -> dict[str, list[Turn]]:
    """The turns of each way beyond its start, in an order that changes from round to round."""
    ways, starts = (ways_of(corpus, path, setting.processes) for path in (corpus.path, corpus.begin))
    order, names = random.Random(SEED), list(ways)[:: setting.every]
    found: dict[str, list[Turn]] = {name: [] for name in names}
    for _ in range(setting.rounds):
        order.shuffle(names)
        for name in names:
            start, whole = turn(*starts[name]), turn(*ways[name])
            found[name].append(
                Turn(whole.seconds - start.seconds, whole.serial - start.serial, whole.tokens - start.tokens)
            )
    return found


def _middle(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def section(corpus: Corpus, found: Mapping[str, Sequence[Turn]], setting: Setting) -> list[str]:
    """What the page says of a corpus."""
    rows = []
    for name, turns in found.items():
        seconds = statistics.median(each.seconds for each in turns)
        ratios = [before.seconds / each.seconds for before, each in zip(found[ALONE], turns, strict=True)]
        rows.append(
            (name, f"{turns[0].tokens:,}", f"{turns[0].tokens / seconds:,.0f}", _middle(ratios, ".2f"))
        )
    # Of the processor, which other work on the machine does not lengthen.
    whole = statistics.median(each.serial for each in found[ALONE])
    serial = statistics.median(each.serial for each in found[JOBS.format(setting.processes)])
    bounds = [f"{number} processes {whole / (serial + (whole - serial) / number):.0f}" for number in (16, 64)]
    size = corpus.path.stat().st_size / 1e6
    return [
        f"## {corpus.kind.capitalize()}",
        "",
        f"{size:,.1f} MB of JSON lines, the tokenizer {corpus.tokenizer.name}.",
        "",
        *table(("way", "tokens", "tokens/s", f"times `{ALONE}`"), rows, words=(0,)),
        f"Of {whole:.1f} s of a processor that one thread takes, the first of several processes does "
        f"{serial:.2f} s by itself ({serial / whole:.1%}): it reads, packs and sends. So no number of "
        f"processes is more than {whole / serial:.0f} times as fast, and by this alone (Amdahl) "
        f"{' and '.join(bounds)} times; none were there to measure it.",
        "",
    ]


def markdown(found: Mapping[Corpus, Mapping[str, Sequence[Turn]]], setting: Setting, made: list[str]) -> str:
    """The page."""
    return "\n".join(
        [
            "# What `prepare` takes, by one process and by several",
            "",
            *made,
            "",
            f"Medians (range) of {setting.rounds} rounds in which all ways take turns, each in a process of "
            "its own. What a way takes for the first documents alone, its start, is taken off: that is a "
            "matter of seconds, and a corpus one of hours. Ratios are of one round. "
            "`datasets.map` encodes, joins into rows and saves as transformers' scripts of training do: it "
            "keeps no borders of documents, looks for nothing in them, and counts the loss everywhere.",
            "",
            *(line for corpus, turns in found.items() for line in section(corpus, turns, setting)),
        ]
    )


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write the page, say where it is."""
    words = list(sys.argv[1:] if words is None else words)
    parser = command_line(__doc__)
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer")
    parser.add_argument(
        "--chat", type=Path, help="folder of a tokenizer with a chat template, for conversations"
    )
    parser.add_argument("--text", type=Path, help="a file of JSON lines with a field `text`")
    parser.add_argument("--processes", type=int, default=FULL.processes, help="of the ways with several")
    arguments = parser.parse_args(words)
    code, begin, load = running_code(), time.monotonic(), os.getloadavg()[0]
    setting = (SMOKE if arguments.smoke else FULL)._replace(processes=arguments.processes)
    with TemporaryDirectory() as folder:
        made = corpora(Path(folder), arguments.text, arguments.tokenizer, arguments.chat, setting)
        found = {corpus: measured(corpus, setting) for corpus in made}
        minutes = (time.monotonic() - begin) / 60
        machine = (
            f"{processor()}, load {load:.1f} at the begin and {os.getloadavg()[0]:.1f} at the end, "
            f"{minutes:.0f} minutes"
        )
        source = made_by("prepare.py", words, code, cache="", machine=machine, packages=PACKAGES)
        arguments.out.mkdir(parents=True, exist_ok=True)
        page = arguments.out / "prepare_cpu.md"
        page.write_text(markdown(found, setting, source))
    print(f"{page.read_text()}\nWritten: {page}")


if __name__ == "__main__":
    main()
