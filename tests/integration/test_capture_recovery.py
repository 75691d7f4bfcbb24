"""`capture` after damage, kills and failures, and on S3: the store is the one of an undisturbed capture."""

import json
import logging
import re
import shutil
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.places.files import files_below
from sparsekd.logit_store.places.paths import store_path
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.protocol.writer import write_shard
from sparsekd.logit_store.tools.verify import AlignmentCheck, VerifyResult
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.corpus.prepare import run as prepare
from sparsekd.trainer.door.cli import main
from sparsekd.trainer.run.errors import DataError
from sparsekd.trainer.teacher.capture import run as capture
from sparsekd.trainer.teacher.repair import run as repair
from sparsekd.trainer.teacher.verify import run as verify

sys.path.insert(0, str(Path(__file__).parent))
from capture_world import LENGTH, config_for, files_of, make_teacher

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("own_environment")]


def test_repair_captures_damaged_shards_again(
    tokens: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capture(config_for(tokens, llama, tmp_path / "store"))
    whole = files_of(tmp_path / "store")
    digest = open_store(tmp_path / "store").digest
    bad = bytearray(whole["shards/train/000/000002.arrow"])
    bad[len(bad) // 2] ^= 1
    (tmp_path / "store/shards/train/000/000002.arrow").write_bytes(bad)
    (tmp_path / "store/shards/heldout/000/000000.arrow").unlink()
    wrong = make_teacher(tmp_path / "wrong", "llama", seed=1)

    def repair(*settings: str, path: Path = tmp_path / "store") -> tuple[int, str]:
        capsys.readouterr()
        code = main(["store", "verify", str(path), "--repair", "launch.device=cpu", *settings])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    teacher, text = f"teacher.path={llama}", f"store.tokens={tokens}"
    for settings, said in (
        ((text,), "teacher.path is not set, but is needed by store verify --repair"),
        ((teacher,), "store.tokens is not set, but is needed by store verify --repair"),
        ((f"teacher.path={wrong}", text), "are not those that made"),
        ((teacher, f"store.tokens={tmp_path / 'store'}"), "is not the token store that"),
    ):
        code, printed = repair(*settings)
        assert code == 2 and said in printed, printed
    # The settings of the pass are those of the manifest, whatever stands here.
    code, printed = repair(teacher, text, "teacher.micro_batch_rows=1", "teacher.dtype=bfloat16")
    assert code == 0 and "2 shards are sound again" in printed and f"digest {digest} as before" in printed
    kept = {name: data for name, data in files_of(tmp_path / "store").items() if "quarantine" in name}
    assert files_of(tmp_path / "store") == whole | kept
    assert kept["quarantine/train/000002.arrow"] == bytes(bad) and len(kept) == 3
    code, printed = repair(teacher, text)
    assert code == 0 and "every byte is as it was written" in printed and "again" not in printed
    damaged = tmp_path / "tokens"
    shutil.copytree(tokens, damaged)
    (damaged / "shards/train/000/000001.arrow").unlink()
    code, printed = repair(teacher, text, path=damaged)
    assert code == 2 and "is a token store, and no teacher can make its rows" in printed


def test_a_store_on_s3_is_the_local_one(
    tokens: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        address = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
        for name, value in {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "SPARSEKD_CACHE": str(tmp_path / "cache"),
        }.items():
            monkeypatch.setenv(name, value)
        urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT"))
        # Tokens and records both: `capture` reads one address and writes the other. In few shards, because
        # each file is a dozen questions to a slow server.
        config = Config()
        config.corpus.paths, config.corpus.tokenizer = (
            [str(tokens.parent / "text")],
            str(tokens / "tokenizer"),
        )
        config.corpus.sequence_length, config.corpus.heldout_fraction = LENGTH, 0.2
        config.store.tokens, config.store.rows_per_shard = "s3://bucket/tokens", 64
        prepare(config)
        config.store.tokens = str(tmp_path / "tokens")
        prepare(config)
        config = config_for(tmp_path / "tokens", llama, tmp_path / "store")
        capture(config)
        config.store.tokens, config.store.path = "s3://bucket/tokens", "s3://bucket/a/store"
        capture(config)
        path = store_path(config.store.path)
        assert {name: (path / name).read_bytes() for name in files_below(path)} == files_of(
            tmp_path / "store"
        )
        verify(config, config.store.path)
    finally:
        server.stop()


def test_whole_shards_of_a_killed_run_are_kept(
    tokens: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capture(config_for(tokens, llama, tmp_path / "store"))
    whole = files_of(tmp_path / "store")
    for name in ("shards/train/000/000001.json", "shards/train/000/000002.json", "INDEX.json"):
        (tmp_path / "store" / name).unlink()
    (tmp_path / "store/shards/train/000/000002.arrow").write_bytes(b"half of it")
    capsys.readouterr()
    capture(config_for(tokens, llama, tmp_path / "store"))
    assert "1 shards were whole and are kept, 1 were not and are in quarantine/" in capsys.readouterr().out
    assert files_of(tmp_path / "store") == whole | {"quarantine/train/000002.arrow": b"half of it"}


def test_a_failed_write_ends_the_capture(
    tokens: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def fail(path: object, manifest: object, split: str, shard: int, rows: object) -> None:
        written.append(shard)
        raise StoreError("No room to write anything")

    monkeypatch.setattr("sparsekd.trainer.teacher.work.write_shard", fail)
    with pytest.raises(StoreError, match="No room"):
        capture(config_for(tokens, llama, tmp_path / "store"))
    assert written == [0] and not (tmp_path / "store/INDEX.json").exists()
    assert not list((tmp_path / "store").glob("work/**/*.lease"))


@pytest.mark.parametrize("lost", ["000001.json", "000001.arrow", "000001.arrow's end"])
def test_a_sealed_store_that_is_damaged_is_left_to_its_repair(
    tokens: Path, llama: Path, tmp_path: Path, lost: str
) -> None:
    config = config_for(tokens, llama, tmp_path / "store")
    capture(config)
    place = tmp_path / "store/shards/train/000" / lost.removesuffix("'s end")
    content = place.read_bytes()
    place.unlink()
    if lost.endswith("'s end"):
        place.write_bytes(content[:-9])
    else:
        (place.parent / "000002.arrow").write_bytes(b"not sound")
        (place.parent / "000002.json").unlink()
    before = files_of(tmp_path / "store")
    with pytest.raises((DataError, StoreError), match=r"store verify \S+store --repair"):
        capture(config)
    assert files_of(tmp_path / "store") == before


def test_capture_keeps_no_shard_of_another_text(
    tokens: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(tokens, llama, tmp_path / "store")
    capture(config)
    whole = files_of(tmp_path / "store")
    manifest, store = open_store(tmp_path / "store").manifest, tmp_path / "store"
    rows = [open_store(store).read_row("train", index) for index in range(manifest.rows_per_shard)]
    for name in ("shards/train/000/000000.json", "shards/train/000/000000.arrow", "INDEX.json"):
        (store / name).unlink()
    write_shard(store, manifest, "train", 0, rows[::-1])
    (store / "shards/train/000/000000.json").unlink()
    stranger = (store / "shards/train/000/000000.arrow").read_bytes()
    capsys.readouterr()
    capture(config)
    assert "0 shards were whole and are kept, 1 were not and are in quarantine/" in capsys.readouterr().out
    assert files_of(store) == whole | {"quarantine/train/000000.arrow": stranger}


CAPTURES = """
import contextlib, io, json, sys, time
from pathlib import Path
from sparsekd.trainer.door.cli import main
from sparsekd.trainer.teacher import capture

create_store = capture.create_store
here, other, rounds, *settings = sys.argv[1:]

def create_at_one_moment(path, *arguments):
    # Both are there, with the teacher loaded: a spinning wait is over within microseconds.
    Path(f"{path}-{here}").touch()
    began = time.monotonic()
    while not Path(f"{path}-{other}").exists() and time.monotonic() < began + 120:
        pass
    create_store(path, *arguments)

capture.create_store = create_at_one_moment
for number in range(int(rounds)):
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        code = main(["capture", f"store.path=store{number}", *settings])
    print(json.dumps([code, said.getvalue()]), flush=True)
"""


def test_of_two_captures_at_one_moment_one_goes_on(tokens: Path, llama: Path, tmp_path: Path) -> None:
    """They differ in a setting alone. Nothing of the other's is in the store."""
    rounds = 4
    config = config_for(tokens, llama, tmp_path)
    settings = [f"store.n={config.store.n}", f"store.tokens={tokens}", f"teacher.path={llama}"]
    settings += [f"teacher.{name}={getattr(config.teacher, name)}" for name in ("dtype", "micro_batch_rows")]
    settings += [f"teacher.chunk_positions={config.teacher.chunk_positions}", "launch.device=cpu"]
    jobs = {}
    for k, other in ((4, 5), (5, 4)):
        words = [str(k), str(other), str(rounds), *settings, f"store.k={k}"]
        command = [sys.executable, "-P", "-c", CAPTURES, *words]
        jobs[k] = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    said = {}
    for k, job in jobs.items():
        printed, _ = job.communicate(timeout=300)
        said[k] = [json.loads(line) for line in printed.splitlines()]
    expected = {}
    for k in jobs:
        capture(config_for(tokens, llama, tmp_path / f"alone{k}", store__k=k))
        expected[k] = files_of(tmp_path / f"alone{k}")
    for number in range(rounds):
        codes = {k: said[k][number][0] for k in jobs}
        assert sorted(codes.values()) == [0, 2], said
        winner, loser = sorted(codes, key=lambda k: codes[k])
        sentence = said[loser][number][1]
        assert sentence.startswith("sparsekd capture: ") and sentence.count("\n") == 1, sentence
        assert re.search(r"another configuration|record\.k: found", sentence), sentence
        assert "new folder" in sentence and files_of(tmp_path / f"store{number}") == expected[winner]


def test_repair_says_why_there_is_nothing_to_repair(tmp_path: Path) -> None:
    shifted = AlignmentCheck(1000, 0.1, 0.9, 0.1, -1.0, -1.0, 0.0)
    found = VerifyResult(tmp_path, "0" * 64, 9, 3, 99, (), (), (), (), shifted)
    with pytest.raises(DataError, match=r"; its records do not describe the tokens that follow"):
        repair(Config(), found, reseal=False)
    with pytest.raises(DataError, match=r"; it is sound\.$"):
        repair(Config(), replace(found, alignment=None), reseal=False)
