"""`capture`: records against a float64 oracle, equal bytes for any ranks and kills, and its refusals."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.places.files import files_below
from sparsekd.logit_store.positions import content_uniforms
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.row import segment_lengths
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.corpus.tokenizer import save_tokenizer, train_tokenizer
from sparsekd.trainer.run.errors import ConfigError, DataError, ModelError
from sparsekd.trainer.teacher.capture import run as capture
from sparsekd.trainer.teacher.deviation import deviation_of
from sparsekd.trainer.teacher.verify import VALUE_PLANES
from sparsekd.trainer.teacher.verify import run as verify

sys.path.insert(0, str(Path(__file__).parent))
from capture_world import LENGTH, VOCABULARY, config_for, files_of, make_teacher

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("own_environment")]


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-12))


def float64_logprobs(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """What the model says of a piece of a document that is alone in the world: [tokens, VOCABULARY]."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :, :VOCABULARY]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


@pytest.mark.parametrize(
    ("kind", "k", "n", "draw_temperature", "rule", "fraction"),
    [
        ("llama", 5, 7, 1.0, "all", 1.0),
        ("gemma2", 3, 0, 1.0, "counted", 1.0),
        ("granite", 0, 6, 2.0, "sampled", 0.4),
    ],
)
def test_records_are_what_the_model_says_of_each_document_alone(
    kind: str,
    k: int,
    n: int,
    draw_temperature: float,
    rule: str,
    fraction: float,
    tokens: Path,
    tmp_path: Path,
) -> None:
    teacher = make_teacher(tmp_path / "teacher", kind)
    grid = [1.0, 2.0, 4.0]
    changes = {"store__k": k, "store__n": n, "store__draw_temperature": draw_temperature, "store__seed": 11}
    changes["store__tail_logprobs"] = n > 0
    changes |= {"store__positions": rule, "store__share": fraction}
    changes["store__codec"] = "exact"  # what the pass gives, without the rounding of a codec
    changes["teacher__attention"] = "eager" if kind == "gemma2" else "sdpa"  # Gemma 2 has no other
    capture(config_for(tokens, teacher, tmp_path / "store", **changes))
    source, store = open_store(tokens), open_store(tmp_path / "store")
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64, attn_implementation="eager")
    planes = ("head_logprobs", "log_rest", "rest_entropy", "true_logprob", "entropy", "tail_logprobs")
    found: dict[str, list[np.ndarray]] = {name: [] for name in planes}
    expected: dict[str, list[np.ndarray]] = {name: [] for name in planes}
    drawn_equal = drawn_all = segments = seen = kept = 0
    for split in ("train", "heldout"):
        assert store.rows(split) == source.rows(split) > 0
        for index in range(store.rows(split)):
            row, bare = store.read_row(split, index), source.read_row(split, index)
            for name in ("token_ids", "loss_mask", "segment_starts", "segment_documents"):
                assert np.array_equal(getattr(row, name), getattr(bare, name))
            record = row.teacher
            assert record is not None and row.recorded is not None
            real = np.repeat(row.segment_documents >= 0, segment_lengths(row))
            wanted = {"all": real, "counted": row.loss_mask, "sampled": row.loss_mask}[rule]
            if rule == "sampled" and split == "train":
                seen += int(row.loss_mask.sum())
                kept += int(row.recorded.sum())
                assert not (row.recorded & ~wanted).any()
            else:
                assert np.array_equal(row.recorded, wanted)
            uniforms = content_uniforms(row.token_ids, seed=11, count=n)
            ends = row.segment_starts + segment_lengths(row)
            for start, end, document in zip(row.segment_starts, ends, row.segment_documents, strict=True):
                segments += 1
                here = np.flatnonzero(row.recorded[start:end])  # positions in the document
                first = int(row.recorded[:start].sum())
                span = slice(first, first + len(here))  # their records
                if not len(here):
                    continue
                ids = row.token_ids[start:end]
                every = float64_logprobs(model, ids)
                logprobs = every[here]
                order = np.argsort(-logprobs, axis=1, kind="stable")[:, :k]
                head = np.take_along_axis(logprobs, order, axis=1)
                # Entries closer than float32 can tell may swap their places.
                swapped = record.head_ids[span] != order
                stored_head = np.take_along_axis(logprobs, record.head_ids[span].astype(np.int64), axis=1)
                assert np.abs(stored_head - head)[swapped].max(initial=0) < 1e-4
                rest = logprobs.copy()
                np.put_along_axis(rest, record.head_ids[span].astype(np.int64), -np.inf, axis=1)
                mass = np.exp(rest)
                share = mass / mass.sum(axis=1, keepdims=True)
                tempered = np.exp(logprobs / draw_temperature)
                tempered /= tempered.sum(axis=1, keepdims=True)
                values = {
                    "head_logprobs": head,
                    "log_rest": np.stack([np.log(np.exp(rest / t).sum(axis=1)) for t in grid], axis=1),
                    "rest_entropy": -(share * np.log(np.where(share > 0, share, 1))).sum(axis=1),
                    "entropy": -(tempered * np.log(np.where(tempered > 0, tempered, 1))).sum(axis=1),
                }
                assert document >= 0
                truth = np.zeros(len(ids))
                truth[:-1] = every[np.arange(len(ids) - 1), ids[1:]]
                values["true_logprob"] = truth[here]
                drawn = record.tail_ids[span]
                if n:
                    there = np.take_along_axis(logprobs, np.maximum(drawn, 0).astype(np.int64), axis=1)
                    found["tail_logprobs"].append(record.tail_logprobs[span][drawn >= 0].astype(np.float64))
                    expected["tail_logprobs"].append(there[drawn >= 0])
                for name, value in values.items():
                    found[name].append(getattr(record, name)[span].astype(np.float64).ravel())
                    expected[name].append(value.ravel())
                # The draws, by the inverse of the cumulative distribution over ascending ids.
                weights = np.exp(rest / draw_temperature)
                steps = weights.cumsum(axis=1)
                for place in range(len(here)):
                    points = uniforms[start + here[place]] * steps[place, -1]
                    ids_drawn, counts = np.unique(
                        np.searchsorted(steps[place], points, side="right"), return_counts=True
                    )
                    used = record.tail_ids[span][place] >= 0
                    drawn_all += 1
                    drawn_equal += bool(
                        np.array_equal(record.tail_ids[span][place][used], ids_drawn)
                        and np.array_equal(record.tail_counts[span][place][used], counts)
                    )
    assert segments > store.rows("train") + store.rows("heldout")  # rows do hold several documents
    if rule == "sampled":
        assert abs(kept - fraction * seen) < 5 * (seen * fraction * (1 - fraction)) ** 0.5 and seen > 1000
    for name in planes[: len(planes) - (n == 0)]:
        left, right = np.concatenate(found[name]), np.concatenate(expected[name])
        assert len(left) == len(right)
        if len(left):
            assert relative(left, right) < 2e-5, name
            assert np.abs(left - right).max() < 2e-3, name
    # A point within float32's rounding of a step falls on either side.
    assert drawn_equal >= 0.995 * drawn_all
    # The check above can fail: the records of one position further do not pass it.
    shifted = np.concatenate(found["entropy"])
    assert relative(np.roll(shifted, 1), np.concatenate(expected["entropy"])) > 1e-2


def test_micro_batches_move_records_by_rounding_alone(tokens: Path, tmp_path: Path) -> None:
    """They may change a product's bits, so their size is part of a store's identity; ranks change nothing."""
    teacher = make_teacher(tmp_path / "teacher", "llama")
    stores = []
    for rows in (1, 3, 8):
        place = tmp_path / f"rows-{rows}"
        capture(config_for(tokens, teacher, place, teacher__micro_batch_rows=rows, store__codec="exact"))
        stores.append(open_store(place))
    alone = stores[0]
    for store in stores[1:]:
        assert store.digest != alone.digest
        pairs, draws = [], []
        for split in store.manifest.splits:
            for index in range(store.rows(split)):
                left, right = alone.read_row(split, index), store.read_row(split, index)
                assert left.teacher is not None and right.teacher is not None
                assert np.array_equal(left.recorded, right.recorded)
                pairs.append((split, index, left, right.teacher))
                draws.append((left.teacher.tail_ids == right.teacher.tail_ids).all(axis=1))
        for plane in VALUE_PLANES:
            assert deviation_of(plane, pairs).largest < 2e-5, plane
        assert np.concatenate(draws).mean() > 0.995


def start(ranks: int, config: Config, **keywords: object) -> subprocess.Popen:
    """`torchrun sparsekd capture ...`."""
    overrides = [
        f"store.tokens={config.store.tokens}",
        f"store.path={config.store.path}",
        f"store.k={config.store.k}",
        f"store.n={config.store.n}",
        f"teacher.path={config.teacher.path}",
        f"teacher.dtype={config.teacher.dtype}",
        f"teacher.micro_batch_rows={config.teacher.micro_batch_rows}",
        f"teacher.chunk_positions={config.teacher.chunk_positions}",
        "launch.device=cpu",
    ]
    programs = Path(sys.executable).parent
    launcher = [str(programs / "torchrun"), "--standalone", "--nproc-per-node", str(ranks), "--no-python"]
    return subprocess.Popen(
        [*launcher, str(programs / "sparsekd"), "capture", *overrides],
        env=os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        text=True,
        **keywords,
    )


def descendants(pid: int) -> list[int]:
    """Process ids below `pid`: torchrun gives each rank a session of its own."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        parents[int(entry.parent.name)] = int(fields[1])
    found = [pid]
    for candidate in found:
        found += [child for child, parent in parents.items() if parent == candidate]
    return found[1:]


def end_all(process: subprocess.Popen, by: signal.Signals) -> None:
    """A signal to the launcher and to every rank, at one moment; waits until none is left."""
    ranks = [psutil.Process(pid) for pid in descendants(process.pid)]
    for pid in [*(rank.pid for rank in ranks), process.pid]:
        with contextlib.suppress(ProcessLookupError):  # the launcher, by the same signal, was faster
            os.kill(pid, by)
    assert process.wait(timeout=60) != 0
    assert not psutil.wait_procs(ranks, timeout=60)[1]


@pytest.mark.distributed
def test_ranks_and_kills_do_not_change_a_byte(tokens: Path, llama: Path, tmp_path: Path) -> None:
    def config(name: str) -> Config:
        return config_for(tokens, llama, tmp_path / name, teacher__dtype="bfloat16")

    capture(config("alone"))
    expected = files_of(tmp_path / "alone")
    assert "INDEX.json" in expected and len([name for name in expected if name.endswith(".arrow")]) > 12

    seed = time.time_ns() % 10_000
    generator = random.Random(seed)
    killed = config("killed")
    # What a scheduler sends first must leave no more than what a node does that loses its power.
    for ranks, by in zip((2, 1), generator.sample([signal.SIGKILL, signal.SIGTERM], 2), strict=True):
        process = start(ranks, killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = len(list((tmp_path / "killed").rglob("*.arrow")))
        enough = before + generator.randint(0, 5)
        try:
            while process.poll() is None and not (
                (tmp_path / "killed" / "MANIFEST.json").exists()
                and len(list((tmp_path / "killed").rglob("*.arrow"))) >= enough
            ):
                time.sleep(0.001)
            time.sleep(generator.random() * 0.02)
        finally:
            end_all(process, by)
        committed = len(list((tmp_path / "killed").rglob("0*.json")))
        assert enough - 2 <= committed < 37, f"{committed} units, {enough} expected, {by.name}, seed {seed}"
    assert not (tmp_path / "killed" / "INDEX.json").exists()
    output = subprocess.PIPE
    process = start(2, killed, stdout=output, stderr=subprocess.STDOUT)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert files_of(tmp_path / "killed") == expected, f"seed {seed}"
    assert "tokens/s" in printed and "next: sparsekd store inspect" in printed
    for line in ("capture: teacher ", "is sealed", "next: "):
        assert printed.count(line) == 1, printed  # one voice for the whole job
    capture(config("alone"))  # once more, when there is nothing left to do
    assert files_of(tmp_path / "alone") == expected


@pytest.mark.distributed
def test_a_problem_of_one_rank_is_its_sentence_and_the_work_of_the_others_stays(
    tokens: Path, llama: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "tokens"
    shutil.copytree(tokens, damaged)
    shard = damaged / "shards" / "train" / "000" / "000001.arrow"  # the second unit is the second rank's
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    config = config_for(damaged, llama, tmp_path / "store")
    output = subprocess.PIPE
    process = start(2, config, stdout=output, stderr=subprocess.STDOUT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    # torchrun asks the other rank to stop, which may have come to the same unit before.
    said = [line for line in printed.splitlines() if "split train, shard 000001, row" in line]
    assert len(said) in (1, 2) and said[0].startswith("sparsekd capture: rank 1: "), printed
    assert "restore it from a copy" in said[0]
    assert "trainer/teacher" not in printed  # no traceback of ours: torchrun adds its own
    store = tmp_path / "store"
    assert files_below(store / "shards") and not list(store.glob("work/**/*.lease"))
    # Nothing is lost: with the shard restored the same command goes on.
    shutil.copy(tokens / "shards" / "train" / "000" / "000001.arrow", shard)
    capture(config)
    assert open_store(tmp_path / "store").rows("train") == open_store(tokens).rows("train")


def test_summary_and_verify(
    tokens: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(tokens, llama, tmp_path / "store")
    capture(config)
    printed = capsys.readouterr().out
    store = open_store(tmp_path / "store")
    for split in ("train", "heldout"):
        rows = [store.read_row(split, index) for index in range(store.rows(split))]
        losses = np.concatenate([-row.teacher.true_logprob for row in rows if row.teacher])
        rest = np.concatenate([row.teacher.log_rest[:, 0] for row in rows if row.teacher])
        assert f"{split:8} teacher {losses.mean():.3f} nats" in printed
        assert f"mean tail mass {np.exp(rest).mean():.4f}" in printed
    config.teacher.dtype = "bfloat16"  # the store's own counts
    verify(config, tmp_path / "store")
    printed = capsys.readouterr().out
    assert "head ids equal at 100.00% of positions, draws equal at 100.00% of positions" in printed
    assert printed.count("largest deviation 0 nats") == 5  # same machine, same settings: the same bits
    # The manifest says how it was captured; the rows are others each time.
    config.teacher.attention, config.teacher.micro_batch_rows = "eager", 3
    config.teacher.chunk_positions, config.launch.threads_per_rank = 5, 2
    verify(config, tmp_path / "store")
    again = capsys.readouterr().out
    assert again.count("largest deviation 0 nats") == 5
    seeds = [int(re.findall(r"random rows \(seed (\d+)\)", text)[0]) for text in (printed, again)]
    assert seeds[0] != seeds[1]
    wrong = make_teacher(tmp_path / "wrong", "llama", seed=1)
    config.teacher.path = str(wrong)
    with pytest.raises(
        DataError,
        match=r"head_logprobs of split \w+, row \d+, position \d+ deviates by .* not the manifest's",
    ):
        verify(config, tmp_path / "store")
    with pytest.raises(DataError, match="is a token store"):
        verify(config, tokens)


def test_verify_without_a_head(
    tokens: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(tokens, llama, tmp_path / "store", store__k=0)
    capture(config)
    assert "mean tail mass 1.0000" in capsys.readouterr().out
    verify(config, tmp_path / "store", seed=3)
    printed = capsys.readouterr().out
    assert "(seed 3); draws equal at 100.00% of positions" in printed
    assert (
        "head ids" not in printed
        and "head_logprobs" not in printed
        and printed.count("largest deviation 0 nats") == 4
    )


def test_a_store_of_other_settings_is_refused_by_name(tokens: Path, llama: Path, tmp_path: Path) -> None:
    capture(config_for(tokens, llama, tmp_path / "store"))
    before = files_of(tmp_path / "store")
    other = make_teacher(tmp_path / "other", "llama", seed=3)
    for field, changes, teacher in (
        ("record.k: found 5, wanted 6", {"store__k": 6}, llama),
        ("record.seed: found 0, wanted 1", {"store__seed": 1}, llama),
        ("teacher.engine: .*micro_batch_rows=2.*micro_batch_rows=4", {"teacher__micro_batch_rows": 4}, llama),
        ("teacher.weights_digest", {}, other),
    ):
        with pytest.raises(StoreError, match=f"{field}.*use a new folder"):
            capture(config_for(tokens, teacher, tmp_path / "store", **changes))
    assert files_of(tmp_path / "store") == before


def test_teachers_that_do_not_fit_are_refused(tokens: Path, llama: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"

    def refused(match: str, teacher: Path, **changes: object) -> None:
        with pytest.raises((ModelError, ConfigError, StoreError), match=match):
            capture(config_for(tokens, teacher, store, **changes))
        assert not store.exists()

    small = make_teacher(tmp_path / "small", "llama", vocab_size=VOCABULARY - 1)
    refused(
        r"has 279 vocabulary entries, but of the 280 ids .* the text of .* has 279 \(split train, row",
        small,
    )
    short = make_teacher(tmp_path / "short", "llama", max_position_embeddings=LENGTH - 1)
    refused(r"at most 47 positions, .* have 48; .*prepare again with corpus\.sequence_length=47", short)
    foreign = train_tokenizer(["quite another text with other merges, merges, merges"], VOCABULARY)
    save_tokenizer(foreign, tmp_path / "foreign")
    stranger = make_teacher(tmp_path / "stranger", "llama", tokenizer=tmp_path / "foreign")
    refused(r"is not the store's .*, and id \d+ is .* in it and .*; prepare the text", stranger)
    # Mamba reads no borders from position_ids: its state runs from one document into the next.
    torch.manual_seed(0)
    mamba = AutoConfig.for_model(
        "mamba", vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4, eos_token_id=0
    )
    AutoModelForCausalLM.from_config(mamba).save_pretrained(tmp_path / "mamba")
    leaks = "In the teacher, a MambaForCausalLM, a document of a packed row depends on the one before it"
    refused(leaks, tmp_path / "mamba", teacher__attention="eager")
    refused(r"teacher\.path=.*nothing cannot be loaded", tmp_path / "nothing")
    refused("store.path and store.tokens are both", llama, store__path=str(tokens))
    refused("is not a logit store", llama, store__tokens=str(tmp_path))
    refused(r"record\.draw_temperature is 3\.0, expected one of the grid", llama, store__draw_temperature=3.0)
    refused(r"record\.k is 281, expected from 0 to 280", llama, store__k=281)


def test_the_teachers_tokenizer_is_compared_by_content(tokens: Path, llama: Path, tmp_path: Path) -> None:
    # The same tokenizer, saved by another hand: other settings, other file layout, equal ids.
    teacher = tmp_path / "teacher"
    shutil.copytree(llama, teacher)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(teacher)
    capture(config_for(tokens, teacher, tmp_path / "store"))
    # Equal ids, but text is cut in another way.
    description = (teacher / "tokenizer.json").read_text()
    assert '"add_prefix_space": false' in description
    (teacher / "tokenizer.json").write_text(
        description.replace('"add_prefix_space": false', '"add_prefix_space": true', 1)
    )
    with pytest.raises(ModelError, match=r"cuts text differently \(its pre_tokenizer\)"):
        capture(config_for(tokens, teacher, tmp_path / "other"))
