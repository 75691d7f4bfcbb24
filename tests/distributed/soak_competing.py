"""Workers that compete for one store while SIGKILL takes them at random: jobs of their own, that come and go.

`python tests/distributed/soak_competing.py --workers 4 --kills 60` (with tests and tests/distributed on
PYTHONPATH) goes on with store after store until so many have died, and compares each with the quiet one.
"""

import argparse
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from forked import Server
from soak_capture import Captures, Pass, files_of
from soak_jobs import SECONDS_TO_END, Job


def compete(
    captures: Captures, shape: Pass, name: str, *, workers: int, kills: int, seed: int
) -> tuple[int, list[str]]:
    """Has some workers, each a job of its own, make one store; one that is killed is started again.

    Args:
        captures: To which the store belongs.
        shape: Of the pass.
        name: Of the store.
        workers: At one time.
        kills: At most; the store may be there before.
        seed: Of the moments and of who is killed.

    Returns:
        (how many were killed, what is wrong in words).
    """
    chance = random.Random(seed)
    run = captures.run(name, shape, 1)
    _, seconds = captures.quiet(shape)[1]
    killed = 0
    living: list[Job] = [run.start(1) for _ in range(workers)]
    codes: list[int | None] = []
    deadline = time.monotonic() + SECONDS_TO_END + kills * SECONDS_TO_END / 10
    next_kill: float | None = None
    while living and time.monotonic() < deadline:
        held = run.held()
        if next_kill is None and held:
            # The first at once, so that one falls however fast the machine is.
            next_kill = time.monotonic() + (chance.uniform(0, seconds / workers) if killed else 0.0)
        if killed < kills and next_kill is not None and time.monotonic() >= next_kill:
            at_work = [job for job in living if job.pids[0] in held]
            job = chance.choice(at_work if at_work and (not killed or chance.random() < 0.5) else living)
            if not job.is_over():
                job.send(signal.SIGKILL, 0)
                job.wait(10)
                killed += 1
                living[living.index(job)] = run.start(1)
            next_kill = None
        for job in [job for job in living if job.is_over()]:
            codes += job.codes
            living.remove(job)
        time.sleep(0.002)
    wrong = ["it hangs"] * bool(living)
    for job in living:
        job.give_up()
    if set(codes) != {0}:
        wrong.append(f"those that nobody killed ended with {codes}")
    quiet, found = captures.quiet(shape)[0], files_of(run.folder)
    wrong += [f"it lacks {file}" for file in sorted(quiet.keys() - found.keys())]
    wrong += [f"{file} is left" for file in sorted(found.keys() - quiet.keys())]
    wrong += [
        f"{file} is another" for file in sorted(quiet.keys() & found.keys()) if quiet[file] != found[file]
    ]
    wrong += [line for line in run.said().splitlines() if "Traceback" in line]
    return killed, [f"{problem} (seed {seed}, {run.output.read_text()[-3000:]})" for problem in wrong]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    asked = parser.parse_args()
    chance, killed, stores = random.Random(asked.seed), 0, 0
    with tempfile.TemporaryDirectory(prefix="competing-") as root:
        server = Server()
        captures = Captures(Path(root) / "captures", server)
        while killed < asked.kills:
            k, n = chance.choice(((5, 7), (8, 0), (0, 12)))
            shape = Pass(k, n, chance.choice(("tkq8", "compact")), chance.choice((1, 2, 64)))
            name = f"store-{stores}"
            seed = chance.randrange(1 << 30)
            died, wrong = compete(captures, shape, name, workers=asked.workers, kills=8, seed=seed)
            killed, stores = killed + died, stores + 1
            print(f"{stores} stores, {killed} kills: {shape}: {wrong or 'the quiet store'}", flush=True)
            if wrong:
                return 1
            shutil.rmtree(captures.root / name)
        server.end()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
