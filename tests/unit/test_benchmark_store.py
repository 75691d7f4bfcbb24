"""Parts of the store benchmark; tests/integration/test_benchmarks.py runs the whole."""

import dataclasses
import json

import numpy as np
import pytest
import store
import store_data
import store_fidelity as fidelity
import store_measure
import store_ours
import store_peers
import store_targets
import store_teacher
import torch
from page import Code

from sparsekd.kernels.loss import sparse_kd_loss
from sparsekd.kernels.objective import HeadTransform, Objective
from sparsekd.kernels.targets import SparseTargets

CODE = Code("of commit `abc`", "0123456789ab")


def test_what_is_read_in_part_is_what_the_loss_needs():
    named = {"tail_ids", "tail_counts", "entropy"}
    for case, more in {(8, 12): {"head_ids", "head_logprobs", "log_rest"}, (0, 50): set()}.items():
        record = store_data.manifest_of(store_data.Case(*case), vocabulary=2048, length=64).record
        assert store_ours.sampled_planes(record) == named | more


@pytest.mark.parametrize(
    ("k", "n", "mode"), [(12, 0, "tail_bucket"), (8, 12, "sampled"), (12, 0, "renormalized")]
)
def test_its_gradients_are_those_of_the_loss(k, n, mode):
    """The closed forms of the fidelity table against the package's own loss."""
    case = store_data.Case(k, n)
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


def test_a_bfloat16_is_the_nearest():
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert (store_peers.to_bfloat16(values) == expected).all()


class StandIn:
    """In place of a teacher: what it was opened with."""

    def __init__(self, folder, sizes, cache_story):
        self.folder, self.sizes, self.cache_story = folder, sizes, cache_story


@pytest.fixture
def trained(monkeypatch):
    """Folders in which a teacher was trained, with nothing in them."""
    folders = []

    def train(folder, sizes):
        folder.mkdir(parents=True)
        folders.append(folder)

    monkeypatch.setattr(store_teacher, "_train", train)
    monkeypatch.setattr(store_teacher, "RealTeacher", StandIn)
    return folders


def teacher_of(folder, sizes=store.SMOKE.teacher, code=CODE, packages=("numpy",)):
    return store_teacher.trained_teacher(folder, sizes, code, packages, lambda _: None)


def test_a_teacher_is_taken_from_the_cache_and_that_is_said(tmp_path, trained):
    assert teacher_of(tmp_path).cache_story == ""
    again = teacher_of(tmp_path)
    assert len(trained) == 1 and again.folder == trained[0]
    made = json.loads((trained[0] / store_teacher.MADE).read_text())
    story = f"The trained teacher is of an earlier run, on {made['date']}, by code of commit `abc`"
    assert again.cache_story == f"{story}, of the same digest."


@pytest.mark.parametrize(
    "change",
    [
        {"code": Code("of commit `abc`", "ba9876543210")},
        {"packages": ("numpy", "pyarrow")},
        {"sizes": dataclasses.replace(store.SMOKE.teacher, steps=3)},
    ],
)
def test_a_teacher_made_by_anything_else_is_not_found(tmp_path, trained, change):
    teacher_of(tmp_path)
    assert teacher_of(tmp_path, **change).cache_story == ""
    assert len(set(trained)) == 2


def test_a_pair_takes_turns_and_its_ratio_is_ours_over_the_peers(monkeypatch):
    """Reading a row of ours takes 2 s, of the peer 3 s, both 100 s where something else runs."""
    data = store_data.synthetic_set("text", vocabulary=2048, length=8, rows=2)
    layouts = {name: store.Ours(name, "plain", store_data.TOP_K) for name in ("ours", "peer")}
    begun, slow = [], range(10, 14)

    def read_time(read, index):
        begun.append((read, index))
        return 100.0 if len(begun) in slow else {"ours": 2.0, "peer": 3.0}[read], 0.0

    monkeypatch.setattr(store_measure, "_read_time", read_time)
    readers = {name: name for name in layouts}
    pair = store_measure.Pair("read", "ours", "peer")
    first, *others = store_measure._ratios(pair, layouts, data, readers, None, 3)
    assert others == [1.5, 1.5]
    assert first == pytest.approx((14 * 3 + 200) / (14 * 2 + 200))
    turns = [begun[index : index + 2] for index in range(0, len(begun), 2)]
    assert all({name for name, _ in turn} == {"ours", "peer"} for turn in turns)
    assert all(turn[0][1] == turn[1][1] for turn in turns)
    assert [turn[0][0] for turn in turns[:4]] == ["peer", "ours", "peer", "ours"]


def test_a_target_is_met_or_not_at_its_own_sizes_alone():
    errors = store_measure.Errors(*(np.full(4, value) for value in (1e-5, 1e-6, 0.0)), 0.0, True)

    def measured(name, length):
        results = [
            store_measure.Result(target.contestant, "", True, store_data.TOP_K, 10, 1000, errors)
            for target in store_targets.SIZES
        ]
        manifest = store_data.manifest_of(store_data.TOP_K, store_targets.TARGET_VOCABULARY, length)
        ratios = {target.pair: [9.0, target.least - 0.01, 0.0] for target in store_targets.RATIOS}
        data = store_data.DataSet(name, "", lambda case: (manifest, []))
        return store_measure.Measured(data, None, results, ratios, 1.0)

    def verdicts(length):
        lines = store_targets.targets([measured(name, length) for name in ("text", "uniform")])
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line][2:]
        return {row[0]: row[4] for row in rows}

    found = verdicts(store_targets.TARGET_LENGTH)
    for target in store_targets.SIZES:
        assert found[f"bytes/token, {target.name}"] == ("yes" if target.most >= 100 else "**no**")
    for target in store_targets.RATIOS:
        assert found[target.name] == "**no**"
    assert found["KL, default, text: mean / p99.9 / max"] == "yes"
    others = verdicts(16)
    exact = others.pop("ids and counts bit-exact, every codec and data set")
    assert exact == "yes" and set(others.values()) == {"other sizes"} and others.keys() < found.keys()
