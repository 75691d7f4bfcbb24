"""What a teacher pass costs beyond the teacher itself: a page.

By turns over the same rows of text: the bare forward; the forward and the product with the head; the loops
that people write (logits -> topk); our records in memory; and our capture, which also encodes them and makes
their shard durable.

    .venv/bin/python benchmarks/capture.py --model models/SmolLM2-135M --text texts/prose.jsonl

Without --model a small random Llama reads the standard library of Python.
"""

import json
import os
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

# The folder is no package, and PYTHONSAFEPATH keeps a script's folder off the path.
sys.path.insert(0, str(Path(__file__).parent))

import torch
from page import command_line, made_by, processor, running_code, table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import sparsekd
from sparsekd.kernels.gemm import plain_precision, prepare_operand, wide_product
from sparsekd.logit_store.places.paths import store_path
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.protocol.writer import create_store, write_shard
from sparsekd.logit_store.row import Row
from sparsekd.trainer.config.schema import TeacherConfig
from sparsekd.trainer.data.inputs import model_inputs
from sparsekd.trainer.models.causal_lm import hidden_states
from sparsekd.trainer.models.opened import OpenModel
from sparsekd.trainer.teacher.model import load_teacher
from sparsekd.trainer.teacher.records import recorded_rows
from sparsekd.trainer.teacher.settings import resolved_settings

PACKAGES = ("torch", "transformers", "numpy")
WANTED = 1.15
"""Our capture over forward and head product, at most, on a CPU."""

SEED = 0
CHARACTERS = 8
"""Of text for a token: more than any tokenizer takes of prose."""

BATCHES = 3
"""Micro-batches of a turn of the capture: each is written while the next is computed, the last alone."""

FORWARD = "forward"
PRODUCT = "forward + head product"
TOPK = "logits -> topk"
LOG_TOPK = "logits -> log_softmax -> topk"
RECORDS = "sparsekd, records in memory"
CAPTURE = "sparsekd, capture"
WRITE = "encode and write alone"


class Setting(NamedTuple):
    """Sizes of a run."""

    length: int
    rows: int
    k: int
    n: int
    rounds: int
    dtype: str


FULL = Setting(length=512, rows=4, k=16, n=24, rounds=5, dtype="float32")
SMOKE = Setting(length=32, rows=2, k=4, n=4, rounds=2, dtype="float32")


class World(NamedTuple):
    """What all ways work on."""

    teacher: OpenModel
    config: TeacherConfig
    store: LogitStore  # that a real `sparsekd capture` made, for its manifest
    rows: list[Row]  # one micro-batch, without records


def small_teacher(folder: Path, vocabulary_size: int) -> None:
    """A random Llama, for a machine without a model."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def sample(text: Path | None, characters: int) -> str:
    """The first characters of a file of text or of JSON lines; without one, of the standard library."""
    path = text or Path(sysconfig.get_paths()["stdlib"], "argparse.py")
    found = ""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            found += json.loads(line)["text"] + "\n" if path.suffix == ".jsonl" else line
            if len(found) >= characters:
                break
    return found[:characters]


def prepared(root: Path, model: Path | None, text: Path | None, setting: Setting) -> World:
    """Tokens, a store of them by the public functions, and the teacher beside them."""
    tokens, store, corpus = root / "tokens", root / "store", root / "corpus.txt"
    corpus.write_text(sample(text, CHARACTERS * setting.rows * setting.length), encoding="utf-8")
    sparsekd.prepare(
        [
            f"corpus.paths=[{corpus}]",
            f"corpus.tokenizer={model}" if model else "corpus.train_vocabulary_size=512",
            f"corpus.sequence_length={setting.length}",
            "corpus.heldout_fraction=0",
            f"store.tokens={tokens}",
            f"store.rows_per_shard={setting.rows}",
        ]
    )
    if model is None:
        model = root / "model"
        small_teacher(model, open_store(store_path(str(tokens))).manifest.tokenizer.vocabulary_size)
    config = sparsekd.compose(
        [
            f"teacher.path={model}",
            f"teacher.dtype={setting.dtype}",
            f"teacher.micro_batch_rows={setting.rows}",
            f"store.tokens={tokens}",
            f"store.path={store}",
            f"store.k={setting.k}",
            f"store.n={setting.n}",
        ]
    )
    sparsekd.capture(config)
    made, device = open_store(store_path(str(store))), torch.device("cpu")
    settings = resolved_settings(config.teacher, device, made.manifest.tokenizer.vocabulary_size)
    rows = [made.read_text("train", index) for index in range(setting.rows)]
    return World(load_teacher(settings, str(model), made, device), settings, made, rows)


def ways(world: World, setting: Setting, root: Path) -> dict[str, Callable[[], int]]:
    """One turn of each way; they return the micro-batches that they did."""
    teacher, config = world.teacher, world.config
    size, chunk = teacher.transform.vocabulary_size, config.chunk_positions
    assert chunk is not None  # settings are resolved
    token_ids, positions = model_inputs(world.rows)
    room = torch.empty(min(chunk, token_ids.numel()), size)
    places = iter(range(10**6))

    def forward() -> int:
        hidden_states(teacher.decoder, token_ids, positions)
        return 1

    def product() -> int:
        hidden = hidden_states(teacher.decoder, token_ids, positions).flatten(0, 1)
        with plain_precision(hidden.device, hidden.dtype):
            matrix = prepare_operand(teacher.head.weight[:size])
            for part in hidden.split(chunk):
                wide_product(prepare_operand(part), matrix.T, out=room[: len(part)])
        return 1

    def whole_logits() -> Tensor:
        found = teacher.model(input_ids=token_ids, position_ids=positions, use_cache=False).logits
        assert isinstance(found, Tensor)
        return found.float()

    def topk() -> int:
        whole_logits().topk(setting.k, dim=-1)
        return 1

    def log_topk() -> int:
        whole_logits().log_softmax(-1).topk(setting.k, dim=-1)
        return 1

    def records() -> list[Row]:
        return list(
            recorded_rows(
                teacher,
                world.rows,
                world.store.manifest,
                "train",
                projections={},
                micro_batch_rows=config.micro_batch_rows,
                sort_rows=config.sort_rows,
                chunk_positions=chunk,
                impl=config.impl,
            )
        )

    def kept() -> int:
        records()
        return 1

    made = records()

    def write(rows: list[Row], shard: int, folder: Path) -> None:
        write_shard(store_path(str(folder)), world.store.manifest, "train", shard, rows)

    def new_store() -> Path:
        folder = root / f"store-{next(places)}"
        create_store(store_path(str(folder)), world.store.manifest, world.store.tokenizer_path)
        return folder

    def capture() -> int:
        folder = new_store()
        with ThreadPoolExecutor(1) as writer:
            waiting: list[Future[None]] = []
            for shard in range(BATCHES):
                rows = records()
                waiting.append(writer.submit(write, rows, shard, folder))
            for future in waiting:
                future.result()
        return BATCHES

    def write_alone() -> int:
        write(made, 0, new_store())
        return 1

    return {
        FORWARD: forward,
        PRODUCT: product,
        TOPK: topk,
        LOG_TOPK: log_topk,
        RECORDS: kept,
        CAPTURE: capture,
        WRITE: write_alone,
    }


def measured(turns: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Seconds of a micro-batch by way and round; the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    order, names = random.Random(SEED), list(turns)
    for number in range(rounds + 1):
        order.shuffle(names)
        for name in names:
            begin = time.perf_counter()
            with torch.inference_mode():
                batches = turns[name]()
            if number:
                found[name].append((time.perf_counter() - begin) / batches)
    return found


def over(found: Mapping[str, Sequence[float]], name: str, other: str) -> list[float]:
    """One way's time over another's, round by round."""
    return [mine / its for mine, its in zip(found[name], found[other], strict=True)]


def _middle(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def markdown(
    found: Mapping[str, Sequence[float]], world: World, setting: Setting, made: Sequence[str], source: str
) -> str:
    """The page."""
    tokens = setting.rows * setting.length
    ratio = over(found, CAPTURE, PRODUCT)
    verdict = "other sizes"
    if setting == FULL:
        verdict = "yes" if statistics.median(ratio) <= WANTED else "**no**"
    target = ("capture / (forward + head product)", f"<= {WANTED}", _middle(ratio, ".2f"), verdict)
    rows = [
        (
            name,
            f"{tokens / statistics.median(seconds):,.0f}",
            _middle(over(found, name, PRODUCT), ".2f"),
            _middle(over(found, name, TOPK), ".2f"),
        )
        for name, seconds in found.items()
        if name != WRITE
    ]
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    parts = {
        "forward pass": medians[FORWARD],
        "head product": medians[PRODUCT] - medians[FORWARD],
        "what the record keeps of the logits": medians[RECORDS] - medians[PRODUCT],
        "waiting for the writer": medians[CAPTURE] - medians[RECORDS],
    }
    shares = [(name, f"{seconds / medians[CAPTURE]:.0%}") for name, seconds in parts.items()]
    size = world.teacher.transform.vocabulary_size
    return "\n".join(
        [
            "# What a teacher pass costs beyond the teacher",
            "",
            *made,
            "",
            f"{source}; {world.teacher.model.num_parameters():,} parameters in {setting.dtype}, V = "
            f"{size:,}; micro-batches of {setting.rows} x {setting.length} positions, k = {setting.k}, n = "
            f"{setting.n}, chunks of {world.config.chunk_positions} positions, one thread. Medians (range) "
            f"of {setting.rounds} rounds in which all ways take turns; ratios are of one round. A turn of "
            f"the capture is {BATCHES} micro-batches, each written by a thread while the next is "
            "computed, the last alone. The loops keep the k largest values alone, in memory; ours keeps the "
            "head, the draws, the mass and entropy of the rest, and the true token's log-probability.",
            "",
            "## Target",
            "",
            *table(("target", "wanted", "found", "met"), [target], words=(0, 3)),
            "## All ways",
            "",
            *table(("way", "tokens/s", "time / (forward + head)", f"time / `{TOPK}`"), rows, words=(0,)),
            "## Where a capture's time goes",
            "",
            *table(("part", "share"), shares, words=(0,)),
            "Encoding, checking and writing a micro-batch alone takes "
            f"{medians[WRITE] / medians[PRODUCT]:.1%} of forward and head product, beside them.",
            "",
        ]
    )


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write the page, say where it is."""
    words = list(sys.argv[1:] if words is None else words)
    parser = command_line(__doc__)
    parser.add_argument("--model", type=Path, help="folder of a causal language model with its tokenizer")
    parser.add_argument("--text", type=Path, help="a file of text, or of JSON lines with a field `text`")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=FULL.dtype)
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    code, begin, load = running_code(), time.monotonic(), os.getloadavg()[0]
    setting = (SMOKE if arguments.smoke else FULL)._replace(dtype=arguments.dtype)
    with TemporaryDirectory() as folder:
        root = Path(folder)
        world = prepared(root, arguments.model, arguments.text, setting)
        found = measured(ways(world, setting, root), setting.rounds)
    minutes = (time.monotonic() - begin) / 60
    machine = (
        f"{processor()}, load {load:.1f} at the begin and {os.getloadavg()[0]:.1f} at the end, "
        f"{minutes:.0f} minutes"
    )
    source = (
        f"{arguments.model.name} on {arguments.text.name if arguments.text else 'argparse.py'}"
        if arguments.model
        else "A random Llama on argparse.py"
    )
    made = made_by("capture.py", words, code, cache="", machine=machine, packages=PACKAGES)
    arguments.out.mkdir(parents=True, exist_ok=True)
    page = arguments.out / "capture_cpu.md"
    page.write_text(markdown(found, world, setting, made, source))
    print(f"{page.read_text()}\nWritten: {page}")


if __name__ == "__main__":
    main()
