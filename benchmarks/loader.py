"""The way of rows into a batch beside mosaicml-streaming and Hugging Face datasets: a page and a picture.

All read the same stored rows, as bytes, in an order drawn anew; from local files that lie in the page cache,
and from an S3 server on loopback that counts requests and waits before each.

    .venv/bin/python benchmarks/loader.py --peers runs/loader_peers

mosaicml-streaming wants other versions of numpy and transformers: the folder of --peers is an environment of
its own, made where it is missing. Without the flag it is left out.

Speeds on local files are per second of a process's CPU time, all its threads together.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

# The folder is no package, and PYTHONSAFEPATH keeps a script's folder off the path.
sys.path.insert(0, str(Path(__file__).parent))

from loader_contestants import DATASETS, DECODED, LOADERS, MOSAICML, REMOTE, Task
from loader_data import HERE, Data, Shape, asked, write_data
from loader_report import LocalResult, RemoteResult, draw, markdown
from page import command_line, made_by, page_and_picture, processor, running_code

PACKAGES = ("numpy", "pyarrow", "datasets", "obstore", "moto")
PEERS = ("mosaicml-streaming", "numpy<2.2", "transformers<5")
SEED = 0


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        local: data sets on local files.
        remote: the one on S3.
        rounds: in each, all contestants take turns in an order drawn anew.
        batch: rows of a batch.
        streams: of the chunked order.
        window: of the chunked order.
        latency: of each request, seconds.
    """

    local: tuple[Shape, ...]
    remote: Shape
    rounds: int
    batch: int
    streams: int
    window: int
    latency: float


FULL = Sizes(
    local=(Shape(512, 4096, 128_256), Shape(4096, 1024, 128_256)),
    # The server copies a whole shard for each request: shards are small here, and rows, too.
    remote=Shape(512, 1024, 128_256),
    rounds=3,
    batch=256,
    streams=16,
    window=2,
    latency=0.02,
)
SMOKE = Sizes(
    local=(Shape(32, 96, 1024),),
    remote=Shape(32, 96, 1024),
    rounds=1,
    batch=16,
    streams=2,
    window=2,
    latency=0.001,
)


def measure_local(
    data: Data, sizes: Sizes, pythons: Mapping[str, Path | str], environment: Mapping[str, str]
) -> list[LocalResult]:
    """One epoch of every contestant in every round."""
    entries = [(name, False) for name in LOADERS]
    entries += [(name, True) for name in LOADERS if not name.startswith("sparsekd")]
    found = {entry: LocalResult(*entry) for entry in entries if _family(entry[0]) in data.folders}
    chance = random.Random(SEED)
    for number in range(sizes.rounds):
        for name, checked in chance.sample(list(found), len(found)):
            task = replace(
                _task(name, str(data.folders[_family(name)]), data, sizes, number), checked=checked
            )
            answer = asked(_python(name, pythons), task, environment)
            _require_all(task, answer, data)
            found[name, checked].rates.append(answer["rows"] / answer["processor"])
    return list(found.values())


def measure_remote(
    data: Data,
    sizes: Sizes,
    pythons: Mapping[str, Path | str],
    environment: Mapping[str, str],
    folder: Path,
) -> list[RemoteResult]:
    """One epoch of each that reads from S3 by itself, with an empty cache."""
    names = [name for name in REMOTE if _family(name) in data.folders]
    served = [f"{family.partition('-')[0]}={folder}" for family, folder in data.folders.items()]
    command = [sys.executable, str(HERE / "loader_server.py"), str(sizes.latency), *served]
    results = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        place = json.loads(server.stdout.readline())
        for name in names:
            address = f"s3://bucket/{_family(name).partition('-')[0]}"
            local = folder / f"copy of {name}"
            task = replace(_task(name, address, data, sizes, 0), local=str(local))
            own = {"SPARSEKD_CACHE": str(local), "S3_ENDPOINT_URL": place["AWS_ENDPOINT_URL"]}
            answer = asked(_python(name, pythons), task, {**environment, **place, **own})
            _require_all(task, answer, data)
            print("requests?", file=server.stdin, flush=True)
            requests = int(server.stdout.readline())
            kept = sum(path.stat().st_size for path in local.rglob("*") if path.is_file())
            results.append(
                RemoteResult(name, requests / answer["rows"], answer["rows"] / answer["wall"], kept)
            )
        server.stdin.close()
    return results


def _family(name: str) -> str:
    """Whose files a contestant reads."""
    return next(family for family in ("sparsekd", MOSAICML, DATASETS) if name.startswith(family))


def _python(name: str, pythons: Mapping[str, Path | str]) -> Path | str:
    return pythons.get(_family(name), sys.executable)


def _task(name: str, folder: str, data: Data, sizes: Sizes, seed: int) -> Task:
    longest = 0 if name == DECODED else data.longest
    return Task(
        "read",
        name,
        folder,
        data.shape.rows,
        longest=longest,
        batch=sizes.batch,
        seed=seed,
        streams=sizes.streams,
        window=sizes.window,
    )


def _require_all(task: Task, answer: Mapping[str, float], data: Data) -> None:
    expected = round(data.row_bytes * data.shape.rows) if task.longest else 0
    if (answer["rows"], answer["bytes"]) != (data.shape.rows, expected):
        raise RuntimeError(f"{task.name} gave {answer}, expected {data.shape.rows} rows of {expected} bytes")


def peers_environment(folder: Path) -> Path:
    """The Python of the peers' environment, which is made where it is missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PEERS], check=True)
    return python


def _version(python: Path | str, package: str) -> str:
    code = f"from importlib import metadata; print(metadata.version({package!r}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return f"{package} {done.stdout.strip()}"


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="environment of mosaicml-streaming")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write the page and the picture, say where they are."""
    words = list(sys.argv[1:] if words is None else words)
    arguments = parse(words)
    sizes = SMOKE if arguments.smoke else FULL
    code, begin = running_code(), time.monotonic()
    pythons: dict[str, Path | str] = {DATASETS: sys.executable}
    beside = ""
    if arguments.peers is not None:
        pythons[MOSAICML] = peers_environment(arguments.peers)
        beside = ", in their own environment " + " and ".join(
            _version(pythons[MOSAICML], package) for package in (MOSAICML, "numpy")
        )
    with TemporaryDirectory() as root:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONSAFEPATH": "1",
            "SPARSEKD_CACHE": f"{root}/cache",
            "HF_HOME": f"{root}/hub",
            "TMPDIR": root,
        }
        local = []
        for shape in sizes.local:
            print(f"rows of {shape.length} positions", flush=True)
            data = write_data(Path(root, f"local {shape.length}"), shape, pythons, environment)
            local.append((data, measure_local(data, sizes, pythons, environment)))
        print("S3", flush=True)
        data = next((data for data, _ in local if data.shape == sizes.remote), None) or write_data(
            Path(root, "remote"), sizes.remote, pythons, environment
        )
        remote = measure_remote(data, sizes, pythons, environment, Path(root))
    minutes, load = (time.monotonic() - begin) / 60, os.getloadavg()[0]
    machine = (
        f"{processor()}, one process at a time, load {load:.1f} at the end, {minutes:.0f} minutes{beside}"
    )
    made = made_by("loader.py", words, code, cache="", machine=machine, packages=PACKAGES)
    page, picture = page_and_picture(arguments.out, "loader_cpu")
    draw(local, picture, processor())
    settings = (
        f"Batches of {sizes.batch} rows; data.streams={sizes.streams}, data.window={sizes.window}; medians "
        f"of {sizes.rounds} rounds, {sizes.latency * 1000:g} ms before each request."
    )
    page.write_text(markdown(local, remote, made, settings, picture.name))
    print(f"{page.read_text()}\nWritten: {page}, {picture}")


if __name__ == "__main__":
    main()
