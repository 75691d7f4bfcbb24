"""The teacher's head split over real processes on gloo: the record of one process, on every rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsekd.kernels.objective import HeadTransform
from sparsekd.kernels.shard import VocabularyShard
from sparsekd.kernels.teacher import teacher_statistics

sys.path.insert(0, str(Path(__file__).parent))
from teacher_shard_worker import CASES

WORKER = Path(__file__).with_name("teacher_shard_worker.py")
RANKS = 3


@pytest.mark.distributed
def test_the_record_is_that_of_one_process(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    # A file a rank: lines of several processes on one stream can run into one another.
    done = subprocess.run(
        [*launcher, "--redirects=3", f"--log-dir={tmp_path}", str(WORKER)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr + "".join(p.read_text() for p in tmp_path.rglob("stderr.log"))
    outputs = [path.read_text() for path in tmp_path.rglob("stdout.log")]
    lines = [json.loads(line) for output in outputs for line in output.splitlines() if line[:1] == "{"]
    assert len(lines) == len(CASES) * (2 + 3)
    far = [line for line in lines if not max(line["far"].values()) <= 4e-6]  # some roundings of float32
    assert not far, far


def test_a_part_without_a_true_id_and_triton_are_refused() -> None:
    def call(start: int, impl: str) -> None:
        teacher_statistics(
            torch.zeros(1, 4),
            torch.zeros(5, 4),
            bias=None,
            labels=torch.zeros(1, dtype=torch.int64),
            head=HeadTransform(vocabulary_size=9, scale=1.0, softcap=None),
            k=1,
            n=0,
            temperatures=(),
            draw_temperature=1.0,
            uniforms=torch.zeros(1, 0, dtype=torch.float64),
            impl=impl,
            shard=VocabularyShard(group=None, start=start),
        )

    with pytest.raises(ValueError, match="below the vocabulary size 9"):
        call(10, "torch")
    with pytest.raises(ValueError, match="split over ranks"):
        call(5, "triton")
