"""A start opens no more files of a store of many shards than of one of few."""

import json
import os
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
    config.train.global_batch_rows = config.train.micro_batch_rows = 2
    config.engine.dtype = "float32"
    config.launch.device = "cpu"
    counts = []
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
