"""One teacher over several ranks: the records of one process, and an end of all where one ends."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import ForkedRank, forked
from synthetic_stores import write_synthetic_store
from transformers import AutoConfig, AutoModelForCausalLM

from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.row import Row, TeacherRecord
from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.trainer.config.compose import check_for_verb, compose_config
from sparsekd.trainer.door.cli import main
from sparsekd.trainer.run.errors import ConfigError
from sparsekd.trainer.teacher.deviation import deviation_of

pytestmark = pytest.mark.distributed

VOCABULARY = 97  # which neither 2 nor 3 divides
BOUND = 5e-5
"""Nats, in float32: sums of a layer's parts in another order. Here 4e-6 was the most."""
PLANES = ("head_logprobs", "log_rest", "rest_entropy", "true_logprob", "entropy")
SIZES = {"hidden_size": 48, "intermediate_size": 50, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
TEACHERS: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen3": {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "tie_word_embeddings": True,
    },
    "gpt2": {"n_head": 4},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokens, and a teacher of each kind."""
    root = tmp_path_factory.mktemp("divided")
    manifest = synthetic_manifest(vocabulary_size=VOCABULARY, sequence_length=32, rows_per_shard=4, k=0, n=0)
    write_synthetic_store(root / "tokens", manifest, {"train": 13, "heldout": 3}, seed=3)
    for kind, fields in TEACHERS.items():
        torch.manual_seed(1)
        # Wide weights, so that attention matters.
        config = AutoConfig.for_model(kind, **SIZES, **fields, initializer_range=0.2)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(root / kind)
    return root


def words(world: Path, kind: str, store: Path, *more: str) -> list[str]:
    return [
        *(
            "capture",
            f"store.path={store}",
            f"store.tokens={world / 'tokens'}",
            f"teacher.path={world / kind}",
        ),
        *("teacher.dtype=float32", "teacher.micro_batch_rows=2", "teacher.unit_rows=2", "launch.device=cpu"),
        *(
            "launch.start_minutes=1",
            "engine.timeout_minutes=1",
            "store.k=5",
            "store.n=7",
            "store.codec=exact",
        ),
        *more,
    ]


def start(world: Path, kind: str, store: Path, ranks: int) -> list[ForkedRank]:
    """A job whose ranks write into a file each beside the store."""
    outputs = [store.with_name(f"{store.name}-{rank}.txt") for rank in range(ranks)]
    for output in outputs:
        output.write_text("")
    return forked(words(world, kind, store, f"teacher.tensor_parallel={ranks}"), outputs)


def ended(jobs: list[ForkedRank]) -> tuple[list[int], str]:
    said = "".join(job.communicate(timeout=100)[0] for job in jobs)
    return [job.wait(0) for job in jobs], said


def capture_whole(world: Path, kind: str, store: Path) -> None:
    assert main(words(world, kind, store)) == 0


def rows_of(path: Path) -> tuple[list[tuple[str, int, Row, TeacherRecord]], Manifest]:
    store = open_store(path)
    found = []
    for split in store.manifest.splits:
        for index in range(store.rows(split)):
            row = store.read_row(split, index)
            assert row.teacher is not None
            found.append((split, index, row, row.teacher))
    return found, store.manifest


def assert_equal_records(divided: Path, whole: Path) -> None:
    found, manifest = rows_of(divided)
    expected, _ = rows_of(whole)
    pairs = [(*one[:3], other[3]) for one, other in zip(found, expected, strict=True)]
    far = {plane: deviation_of(plane, pairs).largest for plane in PLANES}
    assert manifest.record.k == 5 and max(far.values()) <= BOUND, far
    ids = {
        name: sum(
            int((getattr(a[3], name) != getattr(b[3], name)).sum())
            for a, b in zip(found, expected, strict=True)
        )
        for name in ("head_ids", "tail_ids", "tail_counts")
    }
    # An id may change where two are equal but for rounding: none did.
    assert not any(ids.values()), ids


@pytest.mark.parametrize(("kind", "ranks"), [("llama", 2), ("qwen3", 3)])
def test_records_are_those_of_one_process(world: Path, tmp_path: Path, kind: str, ranks: int) -> None:
    codes, said = ended(start(world, kind, tmp_path / "divided", ranks))
    assert codes == [0] * ranks, said
    assert "which hold it together" in said and said.count("is sealed: ") == 1
    capture_whole(world, kind, tmp_path / "whole")
    assert_equal_records(tmp_path / "divided", tmp_path / "whole")
    divided, whole = (open_store(tmp_path / name).manifest.teacher for name in ("divided", "whole"))
    assert divided is not None and whole is not None
    assert divided.weights_digest == whole.weights_digest
    assert divided.engine == f"{whole.engine} tensor_parallel={ranks}"
    verify = ["store", "verify", str(tmp_path / "divided"), "--teacher", f"teacher.path={world / kind}"]
    assert main([*verify, "launch.device=cpu"]) == 0


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_ends_all_and_the_same_command_goes_on(
    world: Path, tmp_path: Path, killed: int
) -> None:
    store = tmp_path / "store"
    jobs = start(world, "llama", store, 2)
    wait_for_unit(store, jobs)
    jobs[killed].send_signal(signal.SIGKILL)
    codes, said = ended(jobs)
    assert codes == [-signal.SIGKILL if rank == killed else 2 for rank in range(2)], said
    assert (
        f"Rank {killed} (process " in said
        and said.count("sparsekd capture: ") == 1
        and "Traceback" not in said
    ), said
    codes, said = ended(start(world, "llama", store, 2))
    assert codes == [0, 0], said
    capture_whole(world, "llama", tmp_path / "whole")
    assert_equal_records(store, tmp_path / "whole")


def test_a_rank_that_is_asked_to_stop_stops_all(world: Path, tmp_path: Path) -> None:
    jobs = start(world, "llama", tmp_path / "store", 2)
    wait_for_unit(tmp_path / "store", jobs)
    jobs[1].send_signal(signal.SIGTERM)
    codes, said = ended(jobs)
    assert codes == [75, 75], said


def wait_for_unit(store: Path, jobs: list[ForkedRank]) -> None:
    """Until a unit is claimed or written."""
    deadline = time.monotonic() + 60
    while not list((store / "work").rglob("*.lease")):
        assert time.monotonic() < deadline and jobs[0].poll() is None
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("kind", "ranks", "message"),
    [
        ("gpt2", 2, "transformers has no tensor-parallel plan for its type, gpt2"),
        ("qwen3", 2, "its num_key_value_heads=3 cannot be divided among 2 ranks"),
    ],
)
def test_teachers_that_cannot_be_divided_are_refused(
    world: Path, tmp_path: Path, kind: str, ranks: int, message: str
) -> None:
    codes, said = ended(start(world, kind, tmp_path / "store", ranks))
    assert codes == [2] * ranks and said.count(message) == 1 and "Traceback" not in said, said
    assert not (tmp_path / "store").exists()


def test_other_verbs_do_not_divide_a_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "teacher.tensor_parallel=2"]) == 2
    assert "leave it out of `evaluate`" in capsys.readouterr().err
    check_for_verb(
        compose_config(["teacher.tensor_parallel=2"]), "plan"
    )  # a forecast of `capture`'s own words
    with pytest.raises(ConfigError, match="leave it out of `plan`"):
        check_for_verb(compose_config(["teacher.tensor_parallel=2", "plan.probe_rows=2"]), "plan")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "this one has 1: start 2 ranks"),
        (("teacher.device_map=auto",), "does not go with teacher.device_map=auto"),
        (("teacher.quantization=int8",), "does not go with teacher.quantization=int8"),
        (("teacher.impl=triton",), "does not go with teacher.impl=triton"),
        (("store.features=[{layer: 1}]",), "does not go with store.features="),
    ],
)
def test_settings_that_do_not_go_with_it(
    world: Path, tmp_path: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(world, "llama", tmp_path / "store", "teacher.tensor_parallel=2", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
