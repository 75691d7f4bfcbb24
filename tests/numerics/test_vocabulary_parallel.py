"""The head split over real processes on gloo: exact against one process, and no more said than needed."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsekd.kernels.shard import VocabularyShard

WORKER = Path(__file__).with_name("vocabulary_worker.py")
POSITIONS, CHUNK, SUPPORT = 7, 3, 5


@pytest.fixture(scope="module", params=[2, 3])
def every_line(request, tmp_path_factory):
    """One dictionary per case and rank."""
    place = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    # A file a rank: lines of several processes on one stream can run into one another.
    done = subprocess.run(
        [*launcher, f"--nproc-per-node={request.param}", "--redirects=3", f"--log-dir={place}", str(WORKER)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr + "".join(path.read_text() for path in place.rglob("stderr.log"))
    return [json.loads(line) for path in place.rglob("stdout.log") for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def lines(every_line):
    """Those of the comparisons with the oracle."""
    return [line for line in every_line if "errors" in line]


@pytest.mark.distributed
def test_a_diverged_row_shows_on_every_rank(every_line):
    """Whichever rank holds the row; a MAX over ranks may pass over NaN (gloo's does, by the ranks' order)."""
    found = [line["loss"] for line in every_line if "diverged" in line]
    assert len(found) in (2 * 14, 3 * 14) and all(math.isnan(loss) for loss in found), found


@pytest.mark.distributed
def test_exact_against_one_process(lines):
    assert len(lines) % 8 == 0 and len(lines) >= 16
    for line in lines:
        bound = 1e-12 if "float64" in line["changes"] else 1e-5
        far = {name: error for name, error in line["errors"].items() if not error <= bound}
        assert not far, (line["impl"], line["changes"], line["rank"], far)


@pytest.mark.distributed
def test_every_rank_has_the_same_loss(lines):
    by_case = {}
    for line in lines:
        by_case.setdefault((line["impl"], line["changes"]), set()).add(line["loss"])
    assert all(len(losses) == 1 for losses in by_case.values()), by_case


@pytest.mark.distributed
def test_what_is_sent(lines):
    """Per position one maximum and K + 1 logits in a MAX, two sums in a SUM, three with label smoothing."""
    plain = next(line for line in lines if line["impl"] == "torch" and line["changes"] == "{}")
    kept = POSITIONS - 1  # one has weight 0
    chunks = [CHUNK] * (kept // CHUNK)
    expected = [
        ["MAX" if i % 2 == 0 else "SUM", n * ((SUPPORT + 2) if i % 2 == 0 else 2)]
        for n in chunks
        for i in range(2)
    ]
    assert plain["sent"][:-1] == expected
    # The hidden states' gradient, once: 12 is their width.
    assert plain["sent"][-1] == ["SUM", kept * 12]
    smoothed = next(
        line for line in lines if line["impl"] == "torch" and "'label_smoothing'" in line["changes"]
    )
    assert smoothed["sent"][1] == ["SUM", CHUNK * 3]


def test_a_shard_outside_the_vocabulary_is_refused(oracle):
    case = oracle.make_case()
    shard = VocabularyShard(group=None, start=53)
    with pytest.raises(ValueError, match=r"shard.start is 53, expected a number from 0 to 52"):
        oracle.call(case, "torch", shard=shard)
    with pytest.raises(ValueError, match=r"shard is .*expected None for impl='reference'"):
        oracle.call(case, "reference", shard=VocabularyShard(group=None, start=0))


def test_a_mutated_merge_is_noticed(oracle, monkeypatch):
    """Sums that are not brought to one maximum first are seen by the same comparison."""
    from sparsekd.kernels import partial

    case = oracle.make_case(seed=41, temperature=2.0)
    expected = oracle.dense(case)
    oracle.check(oracle.measured(case, "torch/slices"), expected, 1e-5)
    monkeypatch.setattr(partial, "rebased", lambda sums, maximum, temperature: sums._replace(maximum=maximum))
    with pytest.raises(AssertionError, match="relative errors"):
        oracle.check(oracle.measured(case, "torch/slices"), expected, 1e-2)
    assert torch.isfinite(expected.loss)
