"""The real teacher of the store benchmark: trained once by sparsekd's own verbs, then kept in a folder.

A byte-level BPE of 32,768 entries on the standard library, and a small Llama on three of its packages, often
enough that it is as sure of that text as a large teacher is of any. Its records of that text are captured
here for each (k, n).

B rows of the token store, L positions of a row, V vocabulary, H hidden.
"""

import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from store_data import Case, DataSet
from transformers.utils.logging import disable_progress_bar

from sparsekd.logit_store.manifest import CodecSpec, Manifest, RecordSpec
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.row import Row, TeacherRecord, position_ids
from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.trainer.causal_lm import hidden_states
from sparsekd.trainer.config import TeacherConfig
from sparsekd.trainer.teacher.model import Teacher, load_teacher
from sparsekd.trainer.teacher.records import records_of_rows
from sparsekd.trainer.teacher.weights import teacher_identity

VOCABULARY = 32768
LENGTH = 512
"""Positions of a row of the token store."""

JOINED = 8
"""Rows of the token store that make one row of the benchmark: 4,096 positions."""

TEXT = ("json", "collections", "wsgiref")
TRAIN = (
    "student=llama_1m",
    "optimizer.learning_rate=2e-3",
    "train.steps=500",
    "train.global_batch_rows=2",
    "train.micro_batch_rows=2",
    "train.evaluate_every=0",
    "train.checkpoint_every=500",
    "train.log_every=50",
    "launch.threads_per_rank=2",
    "tracking=disabled",
)
"""About 500,000 tokens, 15 epochs or more: four minutes on two idle cores, under ten on busy ones."""

SETTINGS = TeacherConfig(dtype="float32")
SEED = 0


def train_teacher(cache_folder: Path, say: Callable[[str], None]) -> None:
    """Trains and exports the teacher, unless the folder has it. A run that was cut off goes on."""
    if (cache_folder / "teacher" / "export" / "config.json").exists():
        return
    begin = time.monotonic()
    library = sysconfig.get_paths()["stdlib"]
    root = f"run.root={cache_folder}"
    shape = f"corpus.sequence_length={LENGTH}"
    everything, text = cache_folder / "all", cache_folder / "text"
    say("    tokenizer, tokens and teacher are made; this happens once")
    _sparsekd(
        "prepare", "experiment=demo", f"corpus.paths=[{library}]", shape,
        f"corpus.train_vocabulary_size={VOCABULARY}", f"store.tokens={everything}", root,
    )  # fmt: skip
    packages = ",".join(f"{library}/{name}" for name in TEXT)
    _sparsekd(
        "prepare", "experiment=demo", f"corpus.paths=[{packages}]", shape, "corpus.heldout_fraction=0.05",
        "corpus.train_vocabulary_size=null", f"corpus.tokenizer={everything}/tokenizer",
        f"store.tokens={text}", root,
    )  # fmt: skip
    run = ["experiment=demo_teacher", root, f"store.path={text}", *TRAIN]
    _sparsekd("train", *run)
    _sparsekd("export", *run)
    say(f"    made in {time.monotonic() - begin:.0f} s")


def _sparsekd(*words: str) -> None:
    """Runs one verb as a user would, and stops where it fails."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "2"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    subprocess.run(["sparsekd", *words], check=True, env=environment, stdout=subprocess.DEVNULL)


def real_set(cache_folder: Path, rows: int) -> DataSet:
    """The trained teacher's records as a data set of so many rows of 4,096 positions."""

    @cache
    def rows_of(case: Case) -> tuple[Manifest, list[Row]]:
        store = captured(cache_folder, case, rows * JOINED)
        pieces = [store.read_row("train", index) for index in range(rows * JOINED)]
        manifest = replace(
            store.manifest,
            sequence_length=LENGTH * JOINED,
            rows_per_shard=1 << 20,
            # Every store of the benchmark is written with the made-up tokenizer of its vocabulary.
            tokenizer=synthetic_manifest(vocabulary_size=VOCABULARY).tokenizer,
        )
        return manifest, [joined(pieces[start : start + JOINED]) for start in range(0, len(pieces), JOINED)]

    story = (
        f"a Llama of 4.8 M parameters trained here on the packages {', '.join(TEXT)} of the standard "
        f"library, on that text; {JOINED} rows of {LENGTH} joined"
    )
    return DataSet("real", story, rows_of)


def captured(cache_folder: Path, case: Case, rows: int) -> LogitStore:
    """A store of the teacher's records of the first rows, exactly as captured; made when it is not there.

    The draws' log-probabilities are those of the teacher's float32 logits, like the head's.
    """
    name = f"records-{rows}-k{case.k}-n{case.n}" + ("-logprobs" if case.tail_logprobs else "")
    path = cache_folder / name
    if (path / "INDEX.json").exists():
        return open_store(path)
    tokens = open_store(cache_folder / "text")
    if tokens.rows("train") < rows:
        raise SystemExit(f"{tokens.path} has {tokens.rows('train')} rows, {rows} are needed: lower --rows")
    teacher = teacher_of(cache_folder)
    plain = [tokens.read_row("train", index) for index in range(rows)]
    spec = RecordSpec(
        k=case.k, n=case.n, temperatures=(1.0, 2.0, 4.0), draw_temperature=1.0, seed=SEED,
        tail_logprobs=case.tail_logprobs,
    )  # fmt: skip
    manifest = replace(
        tokens.manifest,
        record=spec,
        teacher=teacher_identity(
            SETTINGS, str(_export(cache_folder)), device_type="cpu", threads=1, revision=None
        ),
        codec=CodecSpec("exact", {}),
        rows_per_shard=rows,
        splits=("train",),
    )
    records = records_of_rows(
        teacher, plain, spec, micro_batch_rows=SETTINGS.micro_batch_rows, chunk_positions=1024
    )
    full = []
    for row, record in zip(plain, records, strict=True):
        kept = _with_logprobs(teacher, row, record) if case.tail_logprobs else record
        full.append(replace(row, teacher=kept))
    create_store(path, manifest, tokens.tokenizer_path)
    write_shard(path, manifest, "train", 0, full)
    seal(path, {"train": 1})
    return open_store(path)


@cache
def teacher_of(cache_folder: Path) -> Teacher:
    """The trained teacher in float32."""
    disable_progress_bar()
    tokens = open_store(cache_folder / "text")
    return load_teacher(SETTINGS, str(_export(cache_folder)), tokens, torch.device("cpu"))


def _export(cache_folder: Path) -> Path:
    return cache_folder / "teacher" / "export"


@torch.inference_mode()
def hidden_of(teacher: Teacher, row: Row) -> torch.Tensor:
    """The teacher's hidden states of a row of the token store, float32 [L, H]."""
    tokens, positions = (
        torch.from_numpy(array.astype(np.int64))[None] for array in (row.token_ids, position_ids(row))
    )
    return hidden_states(teacher.decoder, tokens, positions)[0]


@torch.inference_mode()
def _with_logprobs(teacher: Teacher, row: Row, record: TeacherRecord) -> TeacherRecord:
    logits = hidden_of(teacher, row) @ teacher.head.weight.T  # [L, V]
    ids = torch.from_numpy(record.tail_ids.astype(np.int64))
    drawn = logits.gather(1, ids.clamp(min=0)) - logits.logsumexp(dim=1, keepdim=True)
    return replace(record, tail_logprobs=np.where(record.tail_ids >= 0, drawn.numpy(), -np.inf))


def joined(rows: Sequence[Row]) -> Row:
    """One row of several; a document that goes on in the next row begins a new segment there."""
    lengths = np.cumsum([0, *(len(row.token_ids) for row in rows)])

    def together(arrays: Sequence[NDArray]) -> NDArray:
        return np.concatenate(arrays)

    starts = [row.segment_starts + start for row, start in zip(rows, lengths, strict=False)]
    records = [row.teacher for row in rows]
    names = TeacherRecord.__dataclass_fields__
    return Row(
        token_ids=together([row.token_ids for row in rows]),
        loss_mask=together([row.loss_mask for row in rows]),
        segment_starts=together(starts).astype(np.int32),
        segment_documents=together([row.segment_documents for row in rows]),
        teacher=TeacherRecord(
            **{name: together([getattr(record, name) for record in records]) for name in names}
        ),
    )


def dense_inputs(cache_folder: Path, positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Hidden states [N, H] of the first positions and the head's weight [V, H]."""
    teacher, tokens = teacher_of(cache_folder), open_store(cache_folder / "text")
    rows = [tokens.read_row("train", index) for index in range(-(-positions // LENGTH))]
    hidden = torch.cat([hidden_of(teacher, row) for row in rows])[:positions]
    return hidden.numpy(), teacher.head.weight.detach().numpy()
