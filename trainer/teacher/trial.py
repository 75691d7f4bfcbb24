"""A trial of the teacher pass, for `plan`: some rows are recorded as `capture` would, timed, and not kept."""

import sys
import time
from collections.abc import Iterator

from transformers.utils.logging import disable_progress_bar

from sparsekd.logit_store.codecs.codec import codec_of
from sparsekd.logit_store.manifest import TeacherIdentity
from sparsekd.logit_store.places.paths import store_path
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.row import Row
from sparsekd.logit_store.spacing import evenly
from sparsekd.trainer.config.schema import Config, require
from sparsekd.trainer.data.used_ids import UsedIds
from sparsekd.trainer.planning.measured import Measured
from sparsekd.trainer.run.ranks import one_process
from sparsekd.trainer.teacher.capture import manifest_of
from sparsekd.trainer.teacher.model import check_teacher_tokenizer, load_teacher
from sparsekd.trainer.teacher.records import recorded_rows
from sparsekd.trainer.teacher.settings import resolved_settings
from sparsekd.trainer.teacher.summary import summary_of


def measured(config: Config) -> Measured:
    """Has the teacher record `plan.probe_rows` rows of the tokens, and as many more as fill micro-batches.

    Hidden states (store.features) are left out.

    Raises:
        ConfigError: A needed key is missing, two contradict each other, or there are several processes.
        ModelError: The teacher cannot be loaded or does not fit the tokens.
        StoreError: The tokens cannot be read.
    """
    path = require(config.teacher.path, "teacher.path", "as the model that plan.probe_rows measures")
    place_of_tokens = require(
        config.store.tokens, "store.tokens", "as the rows that plan.probe_rows measures"
    )
    tokens = open_store(store_path(place_of_tokens))
    began = time.perf_counter()
    if not sys.stderr.isatty():
        disable_progress_bar()  # of transformers
    with one_process(
        config.launch, timeout_minutes=config.engine.timeout_minutes, what="plan with plan.probe_rows"
    ) as place:
        settings = resolved_settings(config.teacher, place.device, tokens.manifest.tokenizer.vocabulary_size)
        used = UsedIds(tokens)
        check_teacher_tokenizer(settings, path, tokens, used=used)
        teacher = load_teacher(
            settings, path, tokens, place.device, used=used, vocabulary_size=config.store.vocabulary_size
        )
        loaded = time.perf_counter()
        manifest = manifest_of(config.store, tokens, teacher, _IDENTITY, ())

        def recorded(split: str, rows: list[Row]) -> list[Row]:
            return list(
                recorded_rows(
                    teacher,
                    rows,
                    manifest,
                    split,
                    projections={},
                    micro_batch_rows=settings.micro_batch_rows,
                    sort_rows=settings.sort_rows,
                    chunk_positions=settings.chunk_positions,
                    impl=settings.impl,
                )
            )

        samples = dict(_samples(tokens, config.plan.probe_rows, settings.micro_batch_rows))
        # The first pass is slower than all others: memory is taken, and kernels are chosen or compiled.
        split, rows = next(iter(samples.items()))
        recorded(split, rows[: settings.micro_batch_rows])
        warm = time.perf_counter()
        found = [(split, row) for split, rows in samples.items() for row in recorded(split, rows)]
        ended = time.perf_counter()
        codec = codec_of(manifest)
        for _, row in found:
            codec.encode(row, manifest)
        summary = summary_of((row for _, row in found), manifest.record)
        return Measured(
            rows=found,
            manifest=manifest,
            loading_seconds=loaded - began,
            pass_seconds=ended - warm,
            encode_seconds=time.perf_counter() - ended,
            where=f"{place.device.type}, {settings.dtype}, impl {settings.impl}",
            loss=summary and summary.loss,
            tail=summary and summary.tail,
            noise=summary and summary.noise,
        )


_IDENTITY = TeacherIdentity("plan", None, "", "", "", "", {})
"""Nobody's: no store has these rows."""


def _samples(tokens: LogitStore, count: int, micro_batch_rows: int) -> Iterator[tuple[str, list[Row]]]:
    """Rows of each split, evenly spaced: at least so many of all together, in whole micro-batches."""
    counts = {split: tokens.rows(split) for split in tokens.manifest.splits}
    total = sum(counts.values())
    for split, rows in counts.items():
        wanted = -(-count * rows // max(total, 1))
        wanted = min(rows, -(-wanted // micro_batch_rows) * micro_batch_rows)
        if wanted:
            yield split, [tokens.read_text(split, index) for index in evenly(rows, wanted)]
