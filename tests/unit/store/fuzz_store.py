"""Stores of a hostile stranger by the thousand: each is read by a child of its own, which must live.

    python tests/unit/store/fuzz_store.py --cases 20000 --seed 0
    python tests/unit/store/fuzz_store.py --seed 0 --only 1234    # one case again, in this process

A case is a sound store of one of several kinds, changed by one to three mutators, with every checksum above
the change right. A child forked from this loaded process opens it in every way, reads rows, verifies it,
tries to adopt its shards and uses one of the tools on it. What may come out is rows or one sentence; what may
not: a traceback, a warning, a dead child, one that computes for 10 seconds or sleeps for 60, or one of more
than 512 MB.
"""

import argparse
import copy
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2])]
from forgery import Forgery
from mutators import MUTATORS
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.codecs.frequency import compact_parameters
from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import CodecSpec, FeatureSpec
from sparsekd.logit_store.projections import Projection, digest_of, projected, projection_of
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.protocol.recover import record_of_file
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows, write_synthetic_tokenizer
from sparsekd.logit_store.tools.combine import merge_stores, subset_store
from sparsekd.logit_store.tools.compare import compare_stores
from sparsekd.logit_store.tools.export import export_store
from sparsekd.logit_store.tools.inspect import inspect_text
from sparsekd.logit_store.tools.reencode import reencode_store
from sparsekd.logit_store.tools.stats import store_stats
from sparsekd.logit_store.tools.verify import verify_store

SECONDS = 10
SECONDS_ASLEEP = 60
RESIDENT_BYTES = 512 * 10**6
ADDRESS_SPACE = 6 << 30
"""More than that is asked for in vain, so that the machine lives."""

LONGEST_SENTENCE = 1500

REFUSALS = re.compile(
    "No row of|which fp16 cannot hold|when they are kept apart|has no head|cannot be read by the library"
)
"""Words in what tools say of sound stores that are not for them."""
ROWS_READ = 12

GOLDEN = Path(__file__).with_name("golden")


def _feature(layer: int, kind: str, positions: str) -> FeatureSpec:
    return FeatureSpec(layer, 8, 8, "none", None, 1.0, kind, positions)


def base_stores(folder: Path) -> dict[str, Forgery]:
    """Sound stores of every codec and kind of record, and the golden ones."""
    both = {"k": 4, "n": 6}
    most = {"k": 3, "n": 5, "tail_logprobs": True, "planes": ("weights", "token_types")}
    features = (_feature(2, "int8", "all"), _feature(4, "float16", "recorded"))
    masked = both | {"target": "masked_token"}
    classes = {"k": 3, "n": 0, "target": "class", "outcomes": tuple("abcde")}
    counts = np.arange(300)
    kinds: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
        "exact": ("exact", {}, most),
        "exact masked": ("exact", {}, masked),
        "tkq8": ("tkq8", {}, most),
        "tkq8 all": ("tkq8", {}, most | {"positions": "all"}),
        "tkq8 sampled": ("tkq8", {}, both | {"positions": "sampled", "share": 0.5}),
        "tkq8 masked": ("tkq8", {}, masked),
        "tkq8 features": ("tkq8", {}, both | {"features": features}),
        "exact features": ("exact", {}, {"k": 3, "n": 0, "features": features}),
        "tkq8 class": ("tkq8", {}, classes),
        "tkq8 head": ("tkq8", {}, {"k": 5, "n": 0}),
        "tkq8 draws": ("tkq8", {}, {"k": 0, "n": 7}),
        "tkq8 tokens": ("tkq8", {}, {"k": 0, "n": 0}),
        "plain": ("plain", {}, most),
        "plain class": ("plain", {}, classes),
        "fp16": ("fp16", {}, most),
        "compact": ("compact", compact_parameters(counts, mass=None, table_ids=40), both),
        "compact mass": ("compact", compact_parameters(counts, mass=0.7, table_ids=40), {"k": 5, "n": 0}),
    }
    paths = {f"golden {path.name}": path for path in GOLDEN.iterdir() if (path / "INDEX.json").exists()}
    for number, (name, (codec, parameters, record)) in enumerate(kinds.items()):
        manifest = synthetic_manifest(codec=CodecSpec(codec, parameters), **record)
        paths[name] = folder / str(number)
        write_synthetic_store(paths[name], manifest, {"train": 4, "heldout": 1}, seed=number)
    for kind in ("int8", "float16"):
        paths[f"tkq8 projected to {kind}"] = _projected(folder / kind, kind)
    for name, path in paths.items():
        for tool in range(len(TOOLS)):
            assert read_case(path, tool) == "rows", f"{name} is sound"
    return {name: Forgery.of(path) for name, path in paths.items()}


def make_case(stores: dict[str, Forgery], seed: int, number: int, path: Path) -> str:
    """Writes a case; returns what was done, in words."""
    now = random.Random(f"{seed}/{number}")
    name = now.choice(sorted(stores))
    forged = copy.deepcopy(stores[name])
    names = now.choices(
        list(MUTATORS), [often for _, often in MUTATORS.values()], k=now.choice([1, 1, 1, 2, 3])
    )
    done = []
    for mutator in names:
        before = copy.deepcopy(forged)
        try:
            MUTATORS[mutator][0](forged, now)
            files = forged.files()
        except Exception:  # of a store that the mutator before has left without what this one looks for
            forged = before
            continue
        done.append(mutator)
    for file, data in (files if done else forged.files()).items():
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_bytes(data)
    return f"{name}: {', '.join(done)}"


def _projected(path: Path, kind: str) -> Path:
    """Writes a store with hidden states that were projected from 12 numbers to 8."""
    random = np.random.default_rng(0)
    content = Projection(*(random.standard_normal(shape, np.float32) for shape in (12, (12, 8)))).to_bytes()
    feature = FeatureSpec(2, 8, 12, "pca", digest_of(content), 0.9, kind, "all")
    manifest = synthetic_manifest(k=3, n=0, features=(feature,))
    tokenizer = write_synthetic_tokenizer(path.with_name(f"{kind}-tokenizer"), 300)
    create_store(path, manifest, tokenizer, {feature.plane: content})
    write_shard(path, manifest, "train", 0, synthetic_rows(manifest, 3, 0))
    seal(path, {"train": 1, "heldout": 0})
    return path


def _first_rows(path: Path, new: Path) -> None:
    store = open_store(path)
    split = next(name for name in store.manifest.splits if store.rows(name))
    subset_store(path, new, split=split)


TOOLS: tuple[Callable[[Path, Path], object], ...] = (
    _first_rows,
    lambda path, new: subset_store(path, new, documents=range(2**62)),
    lambda path, new: merge_stores([path, path], new, allow_repeated_rows=True),
    lambda path, new: export_store(path, new),
    lambda path, new: export_store(path, new, text=True),
    lambda path, new: reencode_store(path, new, codec="fp16"),
    lambda path, new: store_stats(path).text(),
    lambda path, new: inspect_text(path),
    lambda path, new: compare_stores(path, path).text(),
    lambda path, new: [projection_of(path, spec) for spec in projected(open_store(path).manifest)],
)
"""What is done with a store beside reading it: (its folder, a new one)."""


def _use(path: Path, tool: int) -> str:
    """Uses one of the tools; returns what it says."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            TOOLS[tool % len(TOOLS)](path, Path(folder, "new"))
        except StoreError as error:
            return str(error)
    return ""


def read_case(path: Path, tool: int) -> str:
    """Does with a store what readers do; returns `rows`, or the first sentence.

    Raises:
        AssertionError: what several ways say contradicts itself, or a sentence is none.
    """
    sentences: list[str] = []
    verified = verify_store(path)
    rows = 0
    try:
        store = open_store(path)
        mapped = open_store(path, access="mapped")
    except StoreError as error:
        sentences.append(str(error))
    else:
        for split in store.manifest.splits:
            rows += _read_rows(store, mapped, split, sentences)
    assert not (sentences and verified.ok), f"sound to verify, but not to the reader: {sentences[0]}"
    if said := _use(path, tool):
        assert not verified.ok or REFUSALS.search(said), f"sound to verify, but not to a tool: {said}"
        if not REFUSALS.search(said):
            sentences.append(said)
    for text in (*sentences, *verified.problems):
        assert text.isprintable() and 10 < len(text) < LONGEST_SENTENCE, f"no sentence: {text[:3000]!r}"
    if sentences or not verified.ok:
        return (sentences or list(verified.problems) or ["misaligned"])[0]
    return "rows"


def _read_rows(store: LogitStore, mapped: LogitStore, split: str, sentences: list[str]) -> int:
    total, read = store.rows(split), 0
    for index in sorted({place * total // ROWS_READ for place in range(ROWS_READ)} if total else set()):
        said = []
        for each in (store, mapped):
            try:
                each.read_row(split, index)
                said.append("")
            except StoreError as error:
                said.append(str(error))
        assert said[0] == said[1], said
        sentences += said[:1] if said[0] else []
        read += not said[0]
    for shard in range(min(3, store.shards(split))):
        try:
            record_of_file(store.path, store.manifest, split, shard)
        except StoreError as error:
            assert str(error).isprintable() and len(str(error)) < LONGEST_SENTENCE, f"no sentence: {error}"
    return read


@dataclass
class Child:
    """A case that is being read."""

    number: int
    what: str
    path: Path
    started: float


def begin(number: int, what: str, path: Path) -> tuple[int, Child]:
    child = os.fork()
    if child:
        return child, Child(number, what, path, time.monotonic())
    said = path.with_suffix(".said")
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        warnings.simplefilter("error")
        said.write_text("said " + read_case(path, number), errors="backslashreplace")
    except BaseException:  # a child's end, whatever it is, is what the case is about
        said.write_text(traceback.format_exc(), errors="backslashreplace")
    finally:
        os._exit(0)


def outcome(child: Child, status: int, resident: int) -> tuple[str, str]:
    """(kind, text) of a child that has ended; kinds that may not be are in capitals."""
    place = child.path.with_suffix(".said")
    text = place.read_text() if place.exists() else ""
    if os.WIFSIGNALED(status):
        name = f"signal {os.WTERMSIG(status)}"
        hung = os.WTERMSIG(status) in (9, 24)  # by us, or for its seconds
        return ("HANG" if hung else "CRASH"), name
    if resident > RESIDENT_BYTES:
        return "MEMORY", f"{resident / 1e6:.0f} MB; {text}"
    if text == "said rows":
        return "rows", text
    if text.startswith("said "):
        return "sentence", text[5:]
    if "AssertionError" in text.splitlines()[-1] if text else False:
        return "CONTRADICTION", text
    return "TRACEBACK", text


def run(cases: range, seed: int, jobs: int, keep: Path | None, sentences_shown: int) -> Counter[str]:
    """Reads the cases; prints and keeps those that may not be; returns how often what came out."""
    counts: Counter[str] = Counter()
    by_mutator: Counter[str] = Counter()
    sentences: Counter[str] = Counter()
    largest = (0, "")
    with tempfile.TemporaryDirectory() as folder:
        stores = base_stores(Path(folder))
        running: dict[int, Child] = {}
        left = iter(cases)
        number = next(left, None)
        while running or number is not None:
            if number is not None and len(running) < jobs:
                path = Path(folder, f"case-{number}")
                what = make_case(stores, seed, number, path)
                sys.stdout.flush()
                identity, child = begin(number, what, path)
                running[identity] = child
                number = next(left, None)
                continue
            identity, status, usage = _ended(running)
            child = running.pop(identity)
            resident = usage.ru_maxrss * 1024
            largest = max(largest, (resident, f"case {child.number}, {child.what}"))
            kind, text = outcome(child, status, resident)
            counts[kind] += 1
            for mutator in set(child.what.partition(": ")[2].split(", ")):
                by_mutator[f"{mutator or 'nothing'}: {kind}"] += 1
            if kind == "sentence":
                sentences[_shape(text)] += 1
            if kind.isupper():
                print(f"{kind} case {child.number} (seed {seed}), {child.what}\n{text}")
                if keep is not None:
                    kept = keep / f"seed-{seed}-case-{child.number}"
                    shutil.copytree(child.path, kept, dirs_exist_ok=True)
                    kept.with_suffix(".said").write_text(f"{child.what}\n{text}")
                    print(f"kept in {kept}")
            shutil.rmtree(child.path, ignore_errors=True)
            child.path.with_suffix(".said").unlink(missing_ok=True)
    for line, times in sorted(by_mutator.items()):
        print(f"  {times:6,} {line}")
    for line, times in sentences.most_common(sentences_shown):
        print(f"  {times:6,} {line}")
    print(f"  largest child: {largest[0] / 1e6:.0f} MB resident ({largest[1]})")
    return counts


def _shape(sentence: str) -> str:
    """A sentence without its place and its numbers, so that equal ones can be counted."""
    words = re.sub(r"/\S*/(case-\d+)?", "", sentence)
    return re.sub(r"[0-9a-f]*\d[\d,.a-f]*", "#", words)[:150]


def _ended(running: dict[int, Child]) -> tuple[int, int, resource.struct_rusage]:
    """Waits for one of the children, and ends those that sleep."""
    while True:
        for identity, child in running.items():
            ended, status, usage = os.wait4(identity, os.WNOHANG)
            if ended:
                return ended, status, usage
            if time.monotonic() - child.started > SECONDS_ASLEEP:
                os.kill(identity, 9)
        time.sleep(0.001)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="one case, read in this process")
    parser.add_argument("--jobs", type=int, default=max(1, len(os.sched_getaffinity(0))))
    parser.add_argument("--sentences", type=int, default=0, help="how many kinds of sentences are counted")
    parser.add_argument("--keep", type=Path, help="folder for the stores that fail")
    options = parser.parse_args()
    # Of this process too, whose mutators make what children read.
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    if options.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = (options.keep or Path(folder)) / f"seed-{options.seed}-case-{options.only}"
            print(make_case(base_stores(Path(folder)), options.seed, options.only, path))
            warnings.simplefilter("error")
            print(read_case(path, options.only))
        return 0
    started = time.monotonic()
    cases = range(options.first, options.first + options.cases)
    counts = run(cases, options.seed, options.jobs, options.keep, options.sentences)
    took = time.monotonic() - started
    print(f"seed {options.seed}, {options.cases:,} cases in {took:.0f} s: {dict(sorted(counts.items()))}")
    return int(any(kind.isupper() for kind in counts))


if __name__ == "__main__":
    sys.exit(main())
