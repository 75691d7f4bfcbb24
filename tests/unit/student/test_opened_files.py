"""A start opens no more files of a store of many shards than of one of few, and one rank reads for all."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.synthetic import synthetic_manifest

VOCABULARY = 97
START = """
import json, os, sys
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.run.ending import run_as_process
from sparsekd.trainer.run.ranks import ranks
from sparsekd.trainer.student import setup
from sparsekd.trainer.student.setup import make_plan

events = []
EVENTS = ("open", "os.listdir", "os.scandir")
sys.addaudithook(lambda event, words: events.append((event, str(words[0]))) if event in EVENTS else None)

def main():
    config = Config()
    config.student.config = {
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config.train.global_batch_rows, config.train.micro_batch_rows = 2, 1
    config.engine.dtype = "float32"
    config.launch.device = "cpu"
    counts, check = [], setup.check_student
    def told(*words, **options):
        print("CHECKED", flush=True)
        return check(*words, **options)
    setup.check_student = told
    with ranks(config.launch, timeout_minutes=1) as here:
        # The first of them imports, too.
        for store in (sys.argv[1], *sys.argv[1:]):
            config.store.path = store
            events.clear()
            plan = make_plan(config, here)
            assert plan.store.rows("train") > 0
            counts.append([len(events), sum(store in place for _, place in events)])
    print(json.dumps(counts))
    return 0

run_as_process(main)
"""


def test_files_opened_at_the_start_do_not_grow_with_shards(tmp_path: Path) -> None:
    shards = {"few": 4, "many": 40}
    for name, count in shards.items():
        manifest = synthetic_manifest(vocabulary_size=VOCABULARY, sequence_length=16, rows_per_shard=2)
        write_synthetic_store(tmp_path / name, manifest, {"train": 2 * count, "heldout": 2}, seed=3)
        assert len(list((tmp_path / name / "shards" / "train").rglob("*.arrow"))) == count
    command = [sys.executable, "-c", START, *(str(tmp_path / name) for name in shards)]
    environment = os.environ | {"PYTHONSAFEPATH": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    _, few, many = json.loads(done.stdout.splitlines()[-1])
    assert 0 < few[1] < 40, few
    assert many[1] == few[1] and many[0] == few[0], (few, many)


def test_the_first_rank_alone_looks_for_ids_that_a_student_lacks(tmp_path: Path) -> None:
    """For that it may have to read all of the text."""
    manifest = synthetic_manifest(vocabulary_size=VOCABULARY, sequence_length=16, rows_per_shard=2)
    write_synthetic_store(tmp_path / "store", manifest, {"train": 4, "heldout": 2}, seed=3)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = []
    for rank in range(2):
        places = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment = os.environ | places | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        environment |= {"PYTHONSAFEPATH": "1", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "-c", START, str(tmp_path / "store")]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    printed = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert [text.count("CHECKED") for text in printed] == [2, 0]  # the script makes two plans
