"""A soak: trainings and captures, killed and asked to stop at random moments, on 1 to 4 ranks.

`make soak KILLS=300 SIGNALS=50` goes on from what `.soak/starts.jsonl` holds: one line for each start, with
the place where the blow fell, and one for each run. A run is started by the same command until it is done;
then it must be the run that nobody disturbed. One that is not is kept in `.soak`.

`--goodput MINUTES` trains while it is killed every 20 s, and tells the share of useful time. `--page` writes
what it all comes to, see `soak_page`.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forked import Server
from page import ROOT, UNKNOWN, commit_and_changes
from soak_capture import Captures, Pass
from soak_counts import told, totals_of
from soak_goodput import goodput
from soak_jobs import Blow, Run, drawn_blow, strike
from soak_page import update
from soak_training import Shape, Trainings

WORLDS = (1, 2, 3, 4)
KILLS_OF_A_RUN, SIGNALS_OF_A_RUN = 6, 2
SHARE_OF_TRAININGS = 2 / 3
NOTHING = Blow(None, None, "start", 0.0)

Drawn = tuple[Shape | Pass, tuple[int, ...]]
"""A run's shape, and the numbers of ranks that its starts draw from."""


class Soak:
    """Runs that are disturbed, each beside one that nobody disturbs.

    Args:
        root: An empty folder to work in.
        results: The file of JSON lines to which starts and runs are added.
        seed: Of all that is drawn.
    """

    def __init__(self, root: Path, results: Path, seed: int) -> None:
        self._results, self._chance, self._seed = results, random.Random(seed), seed
        self._commit = commit_mark()
        self._runs = 0
        self.server = Server()
        self.trainings = Trainings(root / "trainings", self.server)
        self.captures = Captures(root / "captures", self.server)

    def one_run(self, shape: Shape | Pass, worlds: tuple[int, ...], *, kills: int, signals: int) -> list[str]:
        """Starts a run again and again until it is done; returns what was wrong.

        Args:
            shape: Of the run.
            worlds: Each start draws its number of ranks from these.
            kills: How many kills are still wanted; beyond them nothing disturbs.
            signals: How many gentle signals are.
        """
        name = f"run-{self._runs}"
        self._runs += 1
        run: Run
        if isinstance(shape, Shape):
            run = self.trainings.run(name, shape, worlds[0])
        else:
            run = self.captures.run(name, shape, worlds[0])
        wrong: list[str] = []
        widths: set[int] = set()
        wanted = {"kill": kills, "signal": signals}
        while not run.is_done() and not wrong:
            world = self._chance.choice(worlds)
            widths.add(world)
            kinds = [kind for kind, count in wanted.items() for _ in range(count)]
            blow = NOTHING
            if kinds:
                kind = self._chance.choice(kinds)
                blow = drawn_blow(self._chance, world, kill=kind == "kill", seconds=run.quiet_seconds())
            wrong = self._one_start(run, name, asdict(shape), world, blow)
            if blow.fell:
                wanted[kind] -= 1
        if not wrong:
            wrong = run.problems_of_run(widths)
        self._write("run", run.verb, run=name, worlds=sorted(widths), problems=wrong, **asdict(shape))
        if wrong:
            kept = Path(tempfile.mkdtemp(prefix="failed-", dir=self._results.parent))
            if run.folder.exists():
                shutil.copytree(run.folder, kept / "run")
            shutil.copy(run.output, kept / "output.txt")
            print(f"{name} {shape} {sorted(widths)}: {wrong}; kept in {kept}", flush=True)
        shutil.rmtree(run.folder, ignore_errors=True)
        return wrong

    def _one_start(self, run: Run, name: str, shape: dict[str, Any], world: int, blow: Blow) -> list[str]:
        """One start of a run and what befalls it."""
        run.note()
        job = run.start(world)
        if strike(job, blow, run):
            wrong = run.problems_of_start(job, blow)
        else:
            job.give_up()
            wrong = ["it hangs"]
        wrong += [line for line in run.said().splitlines() if "Traceback" in line]
        self._write(
            "start",
            run.verb,
            run=name,
            seed=self._seed,
            **shape,
            world=world,
            signal=blow.name,
            rank=blow.rank,
            fell=blow.fell,
            pulses=blow.stands,
            codes=job.codes,
            seconds=round(time.monotonic() - job.began, 2),
            problems=wrong,
        )
        return wrong

    def _write(self, kind: str, verb: str, **fields: Any) -> None:
        record = {"time": time.strftime("%F %T"), "kind": kind, "verb": verb, "commit": self._commit}
        with self._results.open("a") as file:
            file.write(json.dumps(record | fields) + "\n")

    def drawn_run(self) -> Drawn:
        """A run's shape, and the numbers of ranks that its starts draw from."""
        shape: Shape | Pass
        if self._chance.random() < SHARE_OF_TRAININGS:
            shape = Shape(
                self._chance.choices((0, 1, 2, 3), weights=(5, 2, 3, 2))[0],
                self._chance.choice(("global", "chunked")),
                self._chance.choice((1, 4)),
                self._chance.random() < 0.7,
            )
        else:
            k, n = self._chance.choice(((5, 7), (8, 0), (0, 12)))
            codec, unit_rows = self._chance.choice(("tkq8", "compact")), self._chance.choice((1, 2, 64))
            shape = Pass(k, n, codec, unit_rows)
        return shape, self._chance.choice((WORLDS[::-1], (self._chance.choice(WORLDS),)))


def commit_mark() -> str:
    """The commit that runs, with a + where files differ from it."""
    commit, changes = commit_and_changes(ROOT)
    return commit + "+" * bool(changes)


@contextmanager
def soaking(results: Path, seed: int) -> Iterator[Soak]:
    """A soak with a folder of its own to work in."""
    results.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as root:
        soak = Soak(Path(root), results, seed)
        try:
            yield soak
        finally:
            soak.server.end()


def soak_until(
    results: Path,
    *,
    kills: int,
    signals: int,
    seed: int,
    runs: Iterator[Drawn] | None = None,
    most_problems: int = 1,
    kills_of_a_run: int = KILLS_OF_A_RUN,
    signals_of_a_run: int = SIGNALS_OF_A_RUN,
) -> int:
    """Disturbs runs until the file of results counts so many kills and signals.

    Args:
        results: The file of JSON lines.
        kills: Wanted, over all calls.
        signals: Wanted, over all calls.
        seed: Of what is drawn.
        runs: Shapes and the numbers of ranks that the starts of each draw from; None draws them.
        most_problems: Ends at so many runs that are wrong.
        kills_of_a_run: At most.
        signals_of_a_run: At most.

    Returns:
        The number of runs that were wrong.
    """
    bad = 0
    with soaking(results, seed) as soak:
        while bad < most_problems:
            totals = totals_of(results)
            print(told(totals), flush=True)
            if totals.kills >= kills and totals.signals >= signals:
                break
            shape, worlds = next(runs) if runs is not None else soak.drawn_run()
            wrong = soak.one_run(
                shape,
                worlds,
                kills=min(max(kills - totals.kills, 0), kills_of_a_run),
                signals=min(max(signals - totals.signals, 0), signals_of_a_run),
            )
            bad += bool(wrong)
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--signals", type=int, default=50)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--results", type=Path, default=Path(".soak/starts.jsonl"))
    parser.add_argument("--most-problems", type=int, default=1, help="ends at so many runs that are wrong")
    parser.add_argument("--goodput", type=float, metavar="MINUTES", help="instead: the share of useful time")
    parser.add_argument("--page", type=Path, help="which counts all of the results in the end")
    parser.add_argument("--commit", default=UNKNOWN, help="of those results that bear none")
    asked = parser.parse_args()
    try:
        if asked.goodput is not None:
            goodput(asked.goodput, asked.results, commit_mark())
            return 0
        bad = soak_until(
            asked.results,
            kills=asked.kills,
            signals=asked.signals,
            seed=asked.seed,
            most_problems=asked.most_problems,
        )
        return 1 if bad else 0
    finally:
        if asked.page is not None:
            update(asked.page, [asked.results], asked.commit)


if __name__ == "__main__":
    raise SystemExit(main())
