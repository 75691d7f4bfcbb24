"""The store benchmark, small and on synthetic data alone, so that it cannot rot."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from sparsekd.kernels.loss import sparse_kd_loss
from sparsekd.kernels.objective import HeadTransform, Objective
from sparsekd.kernels.targets import SparseTargets

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def store() -> ModuleType:
    """The script benchmarks/store.py as a module; it finds its own neighbours."""
    spec = importlib.util.spec_from_file_location("store_benchmark", BENCHMARKS / "store.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_every_table_is_written(store, tmp_path):
    pytest.importorskip("matplotlib")
    store.main(["--quick", "--rounds", "1", "--sets", "text", "--out", str(tmp_path)])
    page = (tmp_path / "store_cpu.md").read_text()
    assert (tmp_path / "store_cpu.png").stat().st_size > 10_000
    assert str(tmp_path) not in page
    cells = [
        [cell.strip(" *") for cell in line.split("|")[1:-1]] for line in page.splitlines() if "|" in line
    ]
    rows = {row[0]: row for row in cells}
    layouts = [*store.ours(), *store.peers()]
    exact = rows["layout"].index("ids exact")
    for layout in layouts:
        row = rows[layout.name]
        assert float(row[1]) > 0 and row[exact] == "yes", row
        assert layout.is_ours or f"- {layout.name}: {layout.lacks}." in page
    assert rows["exact"][rows["layout"].index("max")] == "0"
    for case in store.CASES:
        assert re.search(rf"^\| {case} \| (sampled|tail_bucket) \|", page, re.MULTILINE), case


@pytest.mark.parametrize(
    ("k", "n", "mode"), [(12, 0, "tail_bucket"), (8, 12, "sampled"), (12, 0, "renormalized")]
)
def test_its_gradients_are_those_of_the_loss(store, k, n, mode):
    """The closed forms of the fidelity table against the package's own loss."""
    fidelity, case = sys.modules["store_fidelity"], store.Case(k, n)
    teacher = fidelity.synthetic_teacher(positions=16, vocabulary=500, hidden=8, entropy=2.0)
    records = fidelity.Records(
        fidelity.log_softmax(teacher.hidden @ teacher.weight.T + teacher.bias),
        teacher.weight,
        np.random.default_rng(0),
    )
    map_ = fidelity.students(teacher, [1.0])[0].map
    chunk = fidelity.StudentChunk(teacher.hidden @ map_.T, teacher, records)
    head = torch.from_numpy(records.order[:, :k])
    head_logprobs = torch.from_numpy(records.logprobs).gather(1, head)
    ids, counts = [head], torch.zeros(16, n)
    if n:
        drawn = torch.full((16, n), -1)
        for row, line in enumerate(records.draws[case][:, 0]):
            distinct, times = np.unique(line, return_counts=True)
            drawn[row, : len(distinct)] = torch.from_numpy(distinct)
            counts[row, : len(distinct)] = torch.from_numpy(times)
        ids.append(drawn)
    rest = records.logprobs.copy()
    np.put_along_axis(rest, records.order[:, :k], -np.inf, axis=1)
    targets = SparseTargets(
        ids=torch.cat(ids, dim=1),
        head_logprobs=head_logprobs,
        tail_counts=counts,
        log_rest=torch.from_numpy(rest).logsumexp(dim=1),
        entropy=torch.zeros(16),
    )
    hidden = torch.from_numpy(teacher.hidden @ map_.T).double().requires_grad_()
    sparse_kd_loss(
        hidden,
        torch.from_numpy(teacher.weight).double(),
        bias=torch.from_numpy(teacher.bias).double(),
        targets=targets,
        labels=torch.zeros(16, dtype=torch.int64),
        ce_weights=torch.ones(16),
        kd_weights=torch.ones(16),
        objective=Objective(
            kd_weight=1.0,
            ce_weight=0.0,
            divergence="forward_kl",
            mixture=0.1,
            target_mode=mode,
            temperature=1.0,
            label_smoothing=0.0,
            z_loss=0.0,
        ),
        head=HeadTransform(vocabulary_size=500, scale=1.0, softcap=None),
        impl="reference",
    ).loss.backward()
    np.testing.assert_allclose(chunk.estimate((case, mode))[0][0], hidden.grad, atol=2e-5)


def test_a_bfloat16_is_the_nearest(store):
    peers = sys.modules["store_peers"]
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert (peers.to_bfloat16(values) == expected).all()
