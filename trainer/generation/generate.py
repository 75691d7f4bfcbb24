"""The verb `generate`: prompts -> a teacher's answers, raw and cleaned, for `prepare`.

The raw answers come first, each asked for once, by whatever number of starts. Then all of them are gone over
by the rules of generate.clean, which may be changed afterwards: the same command with other rules asks
nothing again. One process works in a folder at a time.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sparsekd.logit_store.json_text import canonical_json
from sparsekd.trainer.config.schema import Config, require
from sparsekd.trainer.corpus.findings import Tally
from sparsekd.trainer.generation.answers import Reply, Task
from sparsekd.trainer.generation.cleaning import Cleaning
from sparsekd.trainer.generation.folder import AnswerFolder
from sparsekd.trainer.generation.prompts import read_prompts
from sparsekd.trainer.run.console import Interval, readable_seconds
from sparsekd.trainer.run.errors import OwnerError, UserError, writing
from sparsekd.trainer.run.files import write_whole
from sparsekd.trainer.run.lease import STALE_SECONDS, HeldError, Holder, take
from sparsekd.trainer.run.stop import StopWatch, watched

FORMAT_VERSION = 1
DATA_NAME, CLEANING_NAME, LEASE_NAME = "data", "cleaning.json", "LEASE.json"
_RECORDS_PER_FILE = 50_000


def run(config: Config, watch: StopWatch | None = None) -> None:
    """Writes the answers to generate.prompts to generate.path.

    Args:
        config: The composed configuration.
        watch: What asks this process to stop; None for one of its own.

    Raises:
        UserError: Prompts, teacher, endpoint or folder cannot be used, or answers did not come; what came is
            kept.
        Stopped: It was asked to stop; what came is kept.
    """
    with ExitStack() as stack:
        _generate(config, watch or stack.enter_context(watched(os.environ)))


def _generate(config: Config, watch: StopWatch) -> None:
    generate = config.generate
    path = Path(require(generate.path, "generate.path", "to know where the answers go"))
    prompts = read_prompts(generate)
    cleaning = Cleaning(generate.clean)  # before anything is asked: its filter may not be there
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    with _leased(path):
        folder = AnswerFolder(
            path,
            _identity(config, prompts.digest),
            prompts.entries,
            answers=generate.answers,
            seed=generate.seed,
            prompts_per_part=generate.prompts_per_part,
        )
        print(
            f"generate: {len(prompts.entries):,} prompts, {folder.total:,} answers, {folder.written:,} of "
            "them there",
            flush=True,
        )
        for what, tally in [("repeated", prompts.repeated), *sorted(prompts.unusable.items())]:
            if tally.count:
                print(
                    f"generate: {tally.count:,} prompts left out ({what}), the first {tally.first}",
                    flush=True,
                )
        for part in folder.open_parts():
            folder.finish(part)
        if folder.open_parts():
            _ask(config, folder, watch)
        with writing(path):
            _write_data(folder, cleaning, asdict(generate.clean))
    _report(path, cleaning)


def _identity(config: Config, digest: str) -> dict[str, Any]:
    """What the raw answers depend on. Not where the endpoint is, which changes with each of its jobs."""
    generate, teacher = config.generate, config.teacher
    source: dict[str, Any] = {"endpoint_model": generate.model, "request": generate.request}
    if generate.endpoint is None:
        source = {
            "teacher": teacher.path,
            "revision": teacher.revision,
            "dtype": teacher.dtype,
            "attention": teacher.attention,
            "quantization": teacher.quantization,
            "batch_rows": generate.batch_rows,
            "chat_template_kwargs": config.corpus.chat_template_kwargs,
        }
    names = ("answers", "seed", "temperature", "top_p", "max_tokens", "prompts_per_part")
    return {
        "version": FORMAT_VERSION,
        **source,
        **{name: getattr(generate, name) for name in names},
        "prompts": digest,
    }


@contextmanager
def _leased(path: Path) -> Iterator[None]:
    """Keeps other processes out of the folder.

    Raises:
        OwnerError: One works there.
    """
    place = path / LEASE_NAME
    try:
        with writing(place):
            lease = take(place, Holder.of_this_process(os.environ))
    except HeldError as held:
        who = "another process" if held.found is None else held.found.who()
        raise OwnerError(
            f"{path} belongs to {who}, whose last sign of life is {max(held.age, 0):.0f} s old, and one "
            "process works there at a time; wait for its end. If you know it to be dead: it is taken over "
            f"{STALE_SECONDS:.0f} s after its last sign of life, or when you remove {LEASE_NAME}."
        ) from None
    try:
        yield
    finally:
        lease.release()


def _ask(config: Config, folder: AnswerFolder, watch: StopWatch) -> None:
    tasks = chain.from_iterable(folder.tasks(part) for part in folder.open_parts())
    started, before, interval = time.monotonic(), folder.written, Interval()

    def keep(task: Task, reply: Reply) -> None:
        folder.add(task, reply)
        if interval.is_over():
            done = folder.written
            left = (folder.total - done) * (time.monotonic() - started) / (done - before)
            print(
                f"generate: {done:,} of {folder.total:,} answers, {readable_seconds(left)} left", flush=True
            )

    if config.generate.endpoint is not None:
        _ask_endpoint(config, (task for task in tasks if not folder.is_written(task)), keep, watch)
        return
    from sparsekd.trainer.generation.model import Writer
    from sparsekd.trainer.run.ranks import one_process

    with one_process(config.launch, timeout_minutes=config.engine.timeout_minutes, what="generate") as here:
        writer = Writer(config, here.device, watch)
        writer.ask(tasks, folder.is_written, keep)
    if writer.failed:
        print(
            f"generate: {writer.failed:,} prompts without an answer, the first {writer.first_failure}",
            flush=True,
        )


def _ask_endpoint(config: Config, tasks: Iterator[Task], keep: Any, watch: StopWatch) -> None:
    from sparsekd.trainer.generation.endpoint import Endpoint

    variable = config.generate.key_variable
    endpoint = Endpoint(config.generate, None if variable is None else os.environ[variable], watch)
    endpoint.ask(tasks, keep)
    counts = endpoint.counts
    print(
        f"generate: {counts.answered:,} answers came, {counts.repeated:,} requests asked again, "
        f"{counts.failed:,} "
        "failed" + (f", the first {counts.first_failure}" if counts.failed else ""),
        flush=True,
    )
    if counts.failed and config.generate.failed == "refuse":
        raise UserError(
            f"{counts.failed:,} answers did not come, the first {counts.first_failure}; the same command "
            "asks for these again, and generate.failed=skip leaves them out. What came is kept."
        )


def _write_data(folder: AnswerFolder, cleaning: Cleaning, rules: Mapping[str, Any]) -> None:
    """Writes the records that are kept, in place of those of an earlier start, and what was left out."""
    data, working = folder.path / DATA_NAME, folder.path / f".{DATA_NAME}.tmp"
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir()
    records = cleaning.records(folder.records())
    number = 0
    while some := list(islice(records, _RECORDS_PER_FILE)):
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in some)
        write_whole(working / f"part-{number:05d}.jsonl", text)
        number += 1
    said = {
        "answers": folder.total,
        "kept": cleaning.kept,
        "left_out": {rule: _shown(tally) for rule, tally in cleaning.left_out.items()},
        "rules": dict(rules),
    }
    shutil.rmtree(data, ignore_errors=True)
    os.replace(working, data)
    write_whole(folder.path / CLEANING_NAME, canonical_json(said))


def _shown(tally: Tally) -> dict[str, Any]:
    return {"count": tally.count, "first": tally.first}


def _report(path: Path, cleaning: Cleaning) -> None:
    for rule, tally in cleaning.left_out.items():
        print(f"generate: {tally.count:,} answers left out ({rule}), the first {tally.first}", flush=True)
    print(
        f"generate: {cleaning.kept:,} conversations in {path / DATA_NAME}\n"
        f"next: sparsekd prepare corpus=jsonl 'corpus.paths=[{path / DATA_NAME}]' corpus.weight_field=weight "
        "corpus.tokenizer=... store.tokens=...",
        flush=True,
    )
