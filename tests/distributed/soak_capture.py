"""Teacher passes for the soak: by any number of workers, killed and stopped, until the store is sealed.

A capture keeps nothing but its store. So the marks of where it stands are read from what lies there, and what
one start leaves is judged by the store of a pass that nobody disturbed.
"""

import json
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from distributed_harness import VOCABULARY, Workplace, student
from forked import Server
from soak_jobs import GENTLE, Blow, Job, Run, Stand, seconds_of
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.places.files import TEMPORARY_PREFIX
from sparsekd.logit_store.protocol.layout import INDEX_NAME
from sparsekd.logit_store.synthetic import synthetic_manifest

TEACHER_SEED = 1
"""An untrained teacher has its favourites: of others `store verify` may say that the records seem shifted."""
ROWS, ROWS_PER_SHARD = {"train": 57, "heldout": 9}, 6
SHARDS = sum(-(-rows // ROWS_PER_SHARD) for rows in ROWS.values())


@dataclass(frozen=True)
class Pass:
    """What the captures of a soak differ in."""

    k: int
    n: int
    codec: str
    unit_rows: int = 2
    """On which the store does not depend."""

    def words(self, place: Path, store: Path) -> list[str]:
        """The command, with its teacher and its tokens in a folder."""
        return [
            *("capture", f"store.path={store}", f"store.tokens={place / 'tokens'}"),
            *(f"teacher.path={place / 'teacher'}", "teacher.dtype=float32", "teacher.micro_batch_rows=1"),
            *("teacher.chunk_positions=16", "launch.device=cpu", "launch.start_minutes=1"),
            *("engine.timeout_minutes=1", f"store.k={self.k}", f"store.n={self.n}"),
            *(f"store.codec={self.codec}", f"teacher.unit_rows={self.unit_rows}", "teacher.sort_rows=0"),
        ]


class Captures:
    """All captures of a soak, by one teacher over one token store.

    Args:
        root: An empty folder to work in.
        server: Forks the ranks.
    """

    def __init__(self, root: Path, server: Server) -> None:
        root.mkdir()
        self.root, self.server = root, server
        manifest = synthetic_manifest(
            vocabulary_size=VOCABULARY, sequence_length=64, rows_per_shard=ROWS_PER_SHARD, k=0, n=0
        )
        write_synthetic_store(root / "tokens", manifest, ROWS, seed=3)
        # A tied one, untrained, expects each token once more, which is a shift as well.
        config = Workplace(root).run_values("")["student"]["config"] | {"tie_word_embeddings": False}
        teacher = student(config, seed=TEACHER_SEED, vocabulary=VOCABULARY).float()
        teacher.save_pretrained(root / "teacher")
        self._quiet: dict[Pass, tuple[dict[str, bytes], tuple[float, float]]] = {}

    def quiet(self, shape: Pass) -> tuple[dict[str, bytes], tuple[float, float]]:
        """The files of an undisturbed pass, and its seconds: until its first unit, and from there on."""
        if shape not in self._quiet:
            run = self.run(f"quiet-{len(self._quiet)}", shape, 1)
            seconds = seconds_of(run.start(1), run)
            self._quiet[shape] = files_of(run.folder), seconds
        return self._quiet[shape]

    def run(self, name: str, shape: Pass, usual: int) -> "Capture":
        return Capture(self, name, shape, usual)


class Capture(Run):
    """One teacher pass that is disturbed.

    Args:
        captures: To which it belongs.
        name: Of the store's folder.
        shape: Of the pass.
        usual: See `Run`; the store does not depend on it.
    """

    verb = "capture"

    def __init__(self, captures: Captures, name: str, shape: Pass, usual: int) -> None:
        super().__init__(captures.root / name, captures.root / f"{name}.txt", usual)
        self._all, self._shape = captures, shape
        self._committed, self._before, self._dead_writers = 0, 0, set[str]()
        self._is_done = False

    def quiet_seconds(self) -> tuple[float, float]:
        return self._all.quiet(self._shape)[1]

    def note(self) -> None:
        super().note()
        self._committed, self._dead_writers = self._shards(".json"), self._unnamed()
        self._before = self._unrecorded()

    def start(self, world: int) -> Job:
        return Job(self._all.server, self._shape.words(self._all.root, self.folder), world, self.output)

    def stands(self, world: int) -> list[Stand | None]:
        return [{"step": self._shards(".json"), "phase": self._phase()}]

    def _phase(self) -> str:
        if "capture: teacher" not in self.said():  # the first words, when all ranks have met
            return "start"
        if (self.folder / INDEX_NAME).exists():
            return "sealed"
        if self._unnamed() - self._dead_writers:
            return "write"
        if self._shards(".json") == SHARDS:
            return "seal"
        if any(place.name == "join.lease" for place in self._leases()):
            return "join"
        return "between units" if self._is_at_work() else "load"

    def _is_at_work(self) -> bool:
        """Whether a rank of this start has claimed a unit, or something was done."""
        return self._shards(".json") > self._committed or bool(self.held())

    def is_reached(self, since: str, world: int) -> bool:
        phase = self._phase() if since != "start" else ""
        return phase not in (("start",) if since == "pulse" else ("start", "load"))

    def is_done(self) -> bool:
        return self._is_done

    def problems_of_start(self, job: Job, blow: Blow) -> list[str]:
        codes, is_sealed = job.codes, (self.folder / INDEX_NAME).exists()
        others = {code for rank, code in enumerate(codes) if rank != blow.rank}
        # Once the store is sealed, some may have left already; a rank that is hit then has done its work.
        struck = set(codes) if blow.rank is None else {codes[blow.rank]}
        blow.fell = blow.fell and not (is_sealed and struck == {0})
        left = {0} if is_sealed else set()
        self._is_done = is_sealed and set(codes) <= {0, 75, -signal.SIGKILL} and 0 in codes
        wrong = self._torn()
        if is_sealed and (self.folder / "work").exists() and 0 in codes:
            wrong.append("the store is sealed, and its folder of work is left")
        if not blow.fell:
            if not is_sealed or not others <= {0}:
                wrong.append(f"nobody disturbed it, but its codes are {codes}, sealed: {is_sealed}")
        elif blow.is_gentle:
            wrong += self._problems_of_stop(job, blow)
        elif blow.rank is None or job.world == 1:
            if set(codes) - left != {-signal.SIGKILL}:
                wrong.append(f"all ranks killed, codes {codes}")
        elif codes[blow.rank] != -signal.SIGKILL or not (others == left or others == {2}):
            # Those that are left do its work, or, before they had begun, say who is gone.
            wrong.append(f"rank {blow.rank} killed, codes {codes}, sealed: {is_sealed}")
        elif others == {2}:
            named = f"rank {blow.rank} (process {job.pids[blow.rank]} on "
            sentences = [line for line in self.said().splitlines() if line.startswith("sparsekd capture: ")]
            if len(sentences) != 1 or named not in sentences[0].lower():
                wrong.append(f"rank {blow.rank} was killed, it says {sentences}")
        return wrong

    def _problems_of_stop(self, job: Job, blow: Blow) -> list[str]:
        """After a gentle signal: every unit that was begun is written, and nobody holds one."""
        codes, is_sealed = job.codes, (self.folder / INDEX_NAME).exists()
        struck = set(codes) if blow.rank is None else {codes[blow.rank]}
        others = {code for rank, code in enumerate(codes) if rank != blow.rank}
        wrong = []
        # Of one rank alone: the others go on to the end, or had not begun yet.
        if not struck <= {75} | ({0} if is_sealed else set()) or not (
            blow.rank is None or others <= {75} or (is_sealed and others == {0})
        ):
            wrong.append(f"a gentle signal to {blow.rank}, codes {codes}, sealed: {is_sealed}")
        assert blow.signal is not None
        sentences = [line for line in self.said().splitlines() if "was asked to stop" in line]
        is_asked = [f"({GENTLE[blow.signal]}, {blow.name})" in sentence for sentence in sentences]
        if is_asked != [True] * (codes[0] == 75):
            wrong.append(f"asked to stop by {blow.name}, codes {codes}, it says {sentences}")
        if self._unnamed() - self._dead_writers:
            wrong.append("a temporary file is left after a gentle stop")
        if held := self.held() & set(job.pids):
            wrong.append(f"after a gentle stop {held} hold a unit")
        before = blow.stands[0]["step"] if blow.stands and blow.stands[0] else 0
        shards, unrecorded = self._shards(".json"), self._unrecorded()
        if shards < before or unrecorded > self._before:
            wrong.append(f"asked to stop at {before} shards, it left {shards}, and {unrecorded} in half")
        return wrong

    def problems_of_run(self, widths: set[int]) -> list[str]:
        quiet, found = self._all.quiet(self._shape)[0], files_of(self.folder)
        wrong = [f"it lacks {name}" for name in sorted(quiet.keys() - found.keys())]
        wrong += [f"{name} is left" for name in sorted(found.keys() - quiet.keys())]
        output = self.output.with_name(f"{self.output.stem}-verify.txt")
        job = Job(self._all.server, ["store", "verify", str(self.folder)], 1, output)
        if not job.wait(100) or job.codes != [0]:
            wrong.append(f"store verify ended with {job.codes}: {output.read_text()[-2000:]}")
        output.unlink()
        return wrong + self._torn()

    def _torn(self) -> list[str]:
        """Files under their own names with other bytes than an undisturbed pass puts there."""
        quiet = self._all.quiet(self._shape)[0]
        return [
            f"{name} is another than in a quiet pass"
            for name, data in files_of(self.folder).items()
            if TEMPORARY_PREFIX not in name and not name.startswith("work/") and quiet.get(name) != data
        ]

    def _shards(self, ending: str) -> int:
        """How many shards have a file with this ending: of rows, or of a commit record."""
        return len(list(self.folder.glob(f"shards/*/*/*{ending}")))

    def _unrecorded(self) -> int:
        """How many shards have no commit record."""
        return self._shards(".arrow") - self._shards(".json")

    def _leases(self) -> list[Path]:
        return [path for path in paths_below(self.folder / "work") if path.suffix == ".lease"]

    def held(self) -> set[int]:
        """The processes that hold a unit, a shard that is joined, or the seal."""
        held = set()
        for place in self._leases():
            with suppress(OSError, ValueError):  # given back, or half there
                held.add(json.loads(place.read_text())["process"]["pid"])
        return held

    def _unnamed(self) -> set[str]:
        """The files that have not their own names yet: those of writers at work, and of dead ones."""
        return {path.name for path in paths_below(self.folder) if path.name.startswith(TEMPORARY_PREFIX)}


def paths_below(folder: Path) -> list[Path]:
    """All files below a folder, in which workers make and remove others meanwhile."""
    return [Path(inner, name) for inner, _, names in os.walk(folder) for name in names]


def files_of(store: Path) -> dict[str, bytes]:
    """The bytes of all files below a folder, by their names in it."""
    return {
        path.relative_to(store).as_posix(): path.read_bytes() for path in store.rglob("*") if path.is_file()
    }
