"""The S3 server of the loader benchmark, in a process of its own: its work is not the loaders'.

Says where it is in one line of JSON, then answers each line of its input with how many requests it has had
since the last. Each request waits a while first, as a network would have it.

    python loader_server.py SECONDS KEY=FOLDER ...
"""

import json
import sys
import time
from pathlib import Path

# The one server that counts is the tests'.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/unit/store"))

from s3_server import s3_server


def main(seconds: float, folders: dict[str, Path]) -> None:
    """Serves the files of some folders until the input ends."""
    with s3_server() as server:
        for key, folder in folders.items():
            paths = [path for path in folder.rglob("*") if path.is_file()]
            server.fill({f"{key}/{path.relative_to(folder)}": path.read_bytes() for path in paths})
        server.before = lambda environment: time.sleep(seconds)
        server.requests.clear()
        print(json.dumps(server.environment), flush=True)
        for _ in sys.stdin:
            found, server.requests[:] = list(server.requests), []
            print(json.dumps(len(found)), flush=True)


if __name__ == "__main__":
    main(
        float(sys.argv[1]), {key: Path(folder) for key, _, folder in (w.partition("=") for w in sys.argv[2:])}
    )
