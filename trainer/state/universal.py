"""Going on with another number of ranks, through DeepSpeed's universal checkpoint.

A ZeRO checkpoint holds one part for each rank. For another number of ranks the parts are merged parameter by
parameter (by DeepSpeed's own converter, on the first rank) and cut anew while loading.
"""

import functools
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import deepspeed

from sparsekd.trainer.run.console import Interval, readable_seconds
from sparsekd.trainer.run.errors import CheckpointError, writing
from sparsekd.trainer.run.ranks import Ranks, gather, leave_together, on_first, together
from sparsekd.trainer.run.stop import StopRequest, StopWatch
from sparsekd.trainer.run.waiting import StopAsked, patiently
from sparsekd.trainer.state.checkpoint import CONVERTED_SUFFIX, load, problem_of_share
from sparsekd.trainer.state.conversion import publish_conversion, read_conversion
from sparsekd.trainer.state.record import ENGINE_FOLDER, read_commit_digest

# Each worker holds one rank's part of the optimizer state in memory.
_LARGEST_WORKERS = 8
_SECONDS_TO_SEE = 90.0
_CONVERTER = "sparsekd.trainer.state.converter"


def load_for_other_ranks(
    engine: deepspeed.DeepSpeedEngine,
    checkpoint: Path,
    here: Ranks,
    watch: StopWatch,
    require_owner: Callable[[], None],
) -> StopRequest | None:
    """Brings a checkpoint of another world size into the engine.

    Args:
        engine: The engine.
        checkpoint: Of another number of ranks.
        here: This rank.
        watch: What asks this rank to stop.
        require_owner: Checks, before something is written, that the folder is still this run's.

    Returns:
        None, or why it was broken off.

    Raises:
        CheckpointError: The conversion failed.
        OwnerError: Another job has taken the folder over.
    """
    # A name that `prune` takes for a leftover: it goes when the next checkpoint is published.
    converted = checkpoint.with_name(f".{checkpoint.name}{CONVERTED_SUFFIX}")
    source = on_first(here, lambda: read_commit_digest(checkpoint))
    try:
        if not is_conversion_of(converted, source, here, watch):
            _convert(checkpoint, converted, source, here, watch, require_owner)
    except StopAsked as stopped:
        return stopped.request
    together(here, functools.partial(_wait_to_see, converted))
    decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    engine._config.load_universal_checkpoint = True
    try:
        load(engine, converted)
    finally:
        # Left on, DeepSpeed would write later checkpoints without the other ranks' parts (its issue 7546).
        engine._config.load_universal_checkpoint = False
    _mend(engine, decays)
    return None


def _wait_to_see(converted: Path) -> None:
    """Waits until this machine sees the conversion: a network file system remembers for up to a minute that
    it was not there. Reading the folder above asks the server.

    Raises:
        CheckpointError: It does not appear.
    """
    deadline = time.monotonic() + _SECONDS_TO_SEE
    while converted.name not in os.listdir(converted.parent) or not (converted / ENGINE_FOLDER).is_dir():
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{converted} is not to be seen on this machine, though the first rank has written it: the "
                "run folder must lie on a file system that all machines share."
            )
        time.sleep(0.2)


def _mend(engine: deepspeed.DeepSpeedEngine, decays: list[float]) -> None:
    """Puts right what DeepSpeed 0.19 gets wrong while loading a universal checkpoint under ZeRO-3.

    It gives every group the first group's weight decay, and all groups one and the same step counter, which
    would then count each step once for every group.
    """
    for group, decay in zip(engine.optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for state in engine.optimizer.optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].clone()


def _convert(
    checkpoint: Path,
    converted: Path,
    source: str,
    here: Ranks,
    watch: StopWatch,
    require_owner: Callable[[], None],
) -> None:
    """Runs the converter on the first rank, while the others wait.

    Raises:
        CheckpointError: It failed.
        StopAsked: `watch` was asked meanwhile.
    """
    work = _Conversion(checkpoint, converted, source, require_owner) if here.is_first else None
    try:
        problem = on_first(here, patiently(here, work.run if work is not None else str, watch))
    finally:
        if work is not None:
            work.end()
    if problem:
        leave_together(
            here,
            CheckpointError(
                f"{checkpoint} cannot be converted for {here.world_size} ranks ({problem}); start with the "
                "number of ranks that it was saved with."
            ),
        )


class _Conversion:
    """DeepSpeed's converter in a process of its own: it needs no device, and its memory is returned then."""

    def __init__(
        self, checkpoint: Path, converted: Path, source: str, require_owner: Callable[[], None]
    ) -> None:
        self._checkpoint, self._converted, self._source = checkpoint, converted, source
        self._require_owner = require_owner
        self._working = converted.with_name(f"{converted.name}-{uuid.uuid4().hex[:12]}")
        self._began, self._interval = time.monotonic(), Interval()
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115  # `end` closes it
        self._process: subprocess.Popen[str] | None = None

    def _start(self) -> "subprocess.Popen[str]":
        self._require_owner()
        with writing(self._working.parent):
            self._working.mkdir()
        workers = str(min(len(os.sched_getaffinity(0)), _LARGEST_WORKERS))
        command = [
            *(sys.executable, "-m", _CONVERTER, "--inject_missing_state"),
            *("--input_folder", str(self._checkpoint / ENGINE_FOLDER)),
            *("--output_folder", str(self._working / ENGINE_FOLDER)),
            *("--num_extract_workers", workers, "--num_merge_workers", workers),
        ]
        print(f"converting {self._checkpoint} for another number of ranks", flush=True)
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # by its end the converter knows that this process has ended
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )

    def run(self) -> str:
        """Returns what went wrong, or an empty text.

        Raises:
            UserError: The disk is full or fails.
            OwnerError: Another job has taken the folder over.
        """
        while (problem := self.look()) is None:
            pass
        return problem

    def look(self) -> str | None:
        """Waits a second at most; None while it works, then what went wrong, or an empty text.

        Raises:
            UserError: The disk is full or fails.
            OwnerError: Another job has taken the folder over.
        """
        if self._process is None:
            self._process = self._start()
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            if self._interval.is_over():
                print(f"converting: {readable_seconds(time.monotonic() - self._began)}", flush=True)
            return None
        self._output.seek(0)
        said = self._output.read()
        logging.getLogger(__name__).info("%s", said)
        if code != 0:
            lines = said.strip().splitlines()
            return lines[-1] if lines else f"the converter ended with {code}"
        self._require_owner()
        with writing(self._converted.parent):
            publish_conversion(self._working, self._converted, self._source)
        return ""

    def end(self) -> None:
        """Ends the converter if it still works, and removes what it has not finished."""
        if self._process is not None:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
        self._output.close()
        shutil.rmtree(self._working, ignore_errors=True)


def is_conversion_of(converted: Path, source: str, here: Ranks, watch: StopWatch | None = None) -> bool:
    """Whether a conversion of an earlier start is there, whole, and of this very checkpoint.

    Raises:
        StopAsked: `watch` was asked meanwhile.
    """

    def problem() -> str | None:
        conversion = read_conversion(converted)
        if conversion is None or conversion.source != source:
            return "none"
        return problem_of_share(converted, conversion.files, here)

    return all(found is None for found in gather(here, patiently(here, problem, watch)))
