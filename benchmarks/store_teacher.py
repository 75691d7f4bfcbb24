"""The real teacher of the store benchmark: trained by sparsekd's own verbs, its records captured here.

A byte-level BPE on the standard library, and a small Llama on some of its packages, often enough that it
knows them: at full size its loss there is 2.6 nats.

L positions of a row, V vocabulary, H hidden.
"""

import hashlib
import json
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path

import numpy as np
import torch
from page import DIGITS, Code, versions
from store_data import SPLIT, Case, DataSet, as_recorded, manifest_of
from store_fidelity import DenseTeacher
from transformers.utils.logging import disable_progress_bar
from verbs import sparsekd

from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.row import RECORD_NAMES, TEXT_NAMES, Row, planes_of_row, row_of_planes
from sparsekd.trainer.config.schema import TeacherConfig
from sparsekd.trainer.data.inputs import model_inputs
from sparsekd.trainer.models.causal_lm import hidden_states
from sparsekd.trainer.teacher.capture import captured_rows
from sparsekd.trainer.teacher.model import load_teacher
from sparsekd.trainer.teacher.settings import resolved_settings

MADE = "made.json"
"""Beside a finished teacher: when and by what it was made."""

THREADS = 2
TRAIN = (
    "student=llama_1m",
    "optimizer.learning_rate=2e-3",
    "train.global_batch_rows=2",
    "train.micro_batch_rows=2",
    "train.evaluate_every=0",
    f"launch.threads_per_rank={THREADS}",
    "tracking=disabled",
)


@dataclass(frozen=True)
class TeacherSizes:
    """What the teacher is made of.

    Attributes:
        vocabulary: V.
        tokenizer_text: packages of the standard library that the tokenizer is trained on; "" is all of it.
        text: packages that the teacher is trained on, and whose records are captured.
        length: L of a row that the teacher sees.
        rows: of the data set.
        joined: rows of the teacher that make one row of the data set.
        steps: of training.
    """

    vocabulary: int
    tokenizer_text: tuple[str, ...]
    text: tuple[str, ...]
    length: int
    rows: int
    joined: int
    steps: int


class RealTeacher:
    """The trained teacher and the text it was trained on.

    Attributes:
        sizes: what it was made of.
        cache_story: when and by what it was made, where that was not in this run; else empty.
    """

    def __init__(self, folder: Path, sizes: TeacherSizes, cache_story: str) -> None:
        self.sizes = sizes
        self.cache_story = cache_story
        disable_progress_bar()
        device, export = torch.device("cpu"), folder / "teacher" / "export"
        self._tokens = open_store(folder / "text")
        settings = TeacherConfig(dtype="float32")
        self._settings = resolved_settings(settings, device, sizes.vocabulary)
        self._teacher = load_teacher(self._settings, str(export), self._tokens, device)
        if self._tokens.shards("train") < 2:  # the last shard may have fewer rows
            raise SystemExit(f"the packages {', '.join(sizes.text)} are too little text for {sizes}")

    def data_set(self) -> DataSet:
        """Its records of its text as a data set."""
        parameters = sum(value.numel() for value in self._teacher.decoder.parameters())
        story = (
            f"a Llama of {parameters / 1e6:.1f} M parameters trained here on the packages "
            f"{', '.join(self.sizes.text)} of the standard library, on that text; {self.sizes.joined} rows "
            f"of {self.sizes.length} joined"
        )
        return DataSet("real", story, self._rows_of)

    @cache  # noqa: B019 - one teacher lives as long as the benchmark
    def _rows_of(self, case: Case) -> tuple[Manifest, list[Row]]:
        """The records of the first rows, exactly as captured."""
        joined = self.sizes.joined
        manifest = manifest_of(case, self.sizes.vocabulary, self.sizes.length * joined)
        everywhere = manifest_of(case.everywhere, self.sizes.vocabulary, self.sizes.length)
        pieces = captured_rows(self._settings, everywhere, self._tokens, self._teacher, {}, (SPLIT, 0))
        starts = range(0, len(pieces), joined)
        rows = [_together(pieces[start : start + joined]) for start in starts]
        return manifest, as_recorded(rows, case, manifest)

    @torch.inference_mode()
    def dense(self, positions: int) -> DenseTeacher:
        """Its hidden states of the first positions, and its head."""
        rows = [self._tokens.read_row("train", index) for index in range(-(-positions // self.sizes.length))]
        states = [hidden_states(self._teacher.decoder, *model_inputs([row]))[0] for row in rows]
        hidden = torch.cat(states)[:positions].numpy()
        weight = self._teacher.head.weight.detach().numpy()[: self.sizes.vocabulary]
        story = f"the trained teacher, V = {len(weight):,}, H = {hidden.shape[1]}"
        return DenseTeacher("trained", story, hidden, weight, np.zeros(len(weight), np.float32))


def trained_teacher(
    cache_folder: Path, sizes: TeacherSizes, code: Code, packages: Sequence[str], say: Callable[[str], None]
) -> RealTeacher:
    """The teacher, trained and exported, or as an earlier run of the same code left it.

    Its folder's name is a digest of all that it depends on: of the code, of the packages' versions and of the
    sizes. So what other code made is never found.
    """
    key = repr((code.digest, versions(packages), sizes))
    folder = cache_folder / f"teacher-{hashlib.sha256(key.encode()).hexdigest()[:DIGITS]}"
    made = folder / MADE
    if made.exists():
        found = json.loads(made.read_text())
        story = f"The trained teacher is of an earlier run, on {found['date']}, by code {found['commit']}"
        return RealTeacher(folder, sizes, f"{story}, of the same digest.")
    begin, was_begun = time.monotonic(), folder.exists()
    _train(folder.resolve(), sizes)
    made.write_text(json.dumps({"date": date.today().isoformat(), "commit": code.commit}))
    say(f"    trained in {time.monotonic() - begin:.0f} s")
    story = "The teacher's training goes on from an earlier run of the same code, which was cut off."
    return RealTeacher(folder, sizes, story if was_begun else "")


def _train(folder: Path, sizes: TeacherSizes) -> None:
    """Tokenizer, tokens, teacher and export, below a folder; each verb goes on where it was cut off."""
    library = sysconfig.get_paths()["stdlib"]
    everything, text = (
        ",".join(f"{library}/{name}" for name in names) for names in (sizes.tokenizer_text, sizes.text)
    )
    root, length = f"run.root={folder}", f"corpus.sequence_length={sizes.length}"
    sparsekd(
        "prepare", "experiment=demo", root, length, f"corpus.paths=[{everything}]",
        f"corpus.train_vocabulary_size={sizes.vocabulary}", f"store.tokens={folder}/all",
    )  # fmt: skip
    sparsekd(
        "prepare", "experiment=demo", root, length, f"corpus.paths=[{text}]", "corpus.heldout_fraction=0.05",
        "corpus.train_vocabulary_size=null", f"corpus.tokenizer={folder}/all/tokenizer",
        f"store.tokens={folder}/text", f"store.rows_per_shard={sizes.rows * sizes.joined}",
    )  # fmt: skip
    run = [
        "experiment=demo_teacher", root, f"store.path={folder}/text", *TRAIN, f"train.steps={sizes.steps}",
        f"train.checkpoint_every={sizes.steps}", f"schedule.warmup_steps={max(1, sizes.steps // 25)}",
    ]  # fmt: skip
    sparsekd("train", *run, threads=THREADS)
    sparsekd("export", *run)


def _together(rows: Sequence[Row]) -> Row:
    """One row of several; a document that goes on in the next row begins a new segment there."""
    lengths = np.cumsum([0, *(len(row.token_ids) for row in rows)])
    names = (*TEXT_NAMES, "recorded", *RECORD_NAMES)
    planes = [planes_of_row(row) for row in rows]
    one = {name: np.concatenate([of_row[name] for of_row in planes]) for name in names}
    starts = [row.segment_starts + start for row, start in zip(rows, lengths, strict=False)]
    return row_of_planes({**one, "segment_starts": np.concatenate(starts).astype(np.int32)})
