"""The road on a real device by one rank, through the command line: capture, train and resume, evaluate."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

VOCABULARY = 300
LENGTH = 64
STEPS = 4


def sparsekd(*words: str) -> str:
    """Runs one verb in a process of its own and returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "sparsekd.trainer.door.cli", *words],
        env=environment | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def make_teacher(folder: Path, tokenizer: Path) -> None:
    """A small Llama with random, wide weights, so that its logits spread."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY + 20,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def metrics_of(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def drive(folder: Path, device: str) -> tuple[str, str, dict]:
    """The whole road in `folder`: (what train printed first, what it printed resumed, the evaluation)."""
    library = Path(json.__file__).parent
    (folder / "text").mkdir()
    for index, line in enumerate(sorted(set((library / "decoder.py").read_text().splitlines()))):
        (folder / "text" / f"line{index:03d}.txt").write_text(line)
    shutil.copy(library / "encoder.py", folder / "text")
    store = [f"store.tokens={folder / 'tokens'}", f"store.path={folder / 'store'}"]
    teacher = f"teacher.path={folder / 'teacher'}"
    on_device = f"launch.device={device}"
    sparsekd(
        "prepare",
        f"corpus.paths=[{folder / 'text'}]",
        f"corpus.train_vocabulary_size={VOCABULARY}",
        f"corpus.sequence_length={LENGTH}",
        "corpus.heldout_fraction=0.2",
        store[0],
    )
    make_teacher(folder / "teacher", folder / "tokens" / "tokenizer")
    sparsekd("capture", *store, "store.k=8", "store.n=8", teacher, on_device)
    sparsekd("store", "verify", str(folder / "store"), "--teacher", teacher, on_device)

    sizes = "hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 2"
    run = folder / "runs" / "kd"
    train = [
        "train",
        *store,
        on_device,
        f"run.root={run.parent}",
        f"run.name={run.name}",
        f"student.config={{model_type: llama, {sizes}, tie_word_embeddings: true}}",
        f"train.steps={STEPS}",
        "train.global_batch_rows=4",
        "train.micro_batch_rows=2",
        "train.log_every=1",
        f"train.checkpoint_every={STEPS // 2}",
        "schedule.warmup_steps=1",
        "tracking.wandb=disabled",
    ]
    printed = sparsekd(*train)
    whole = metrics_of(run, "train"), metrics_of(run, "heldout")
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")  # as if it had been killed before
    again = sparsekd(*train)
    for before, after in zip(whole, (metrics_of(run, "train"), metrics_of(run, "heldout")), strict=True):
        assert [line["step"] for line in after] == [line["step"] for line in before]
        for name in ("loss", "kd", "ce", "agreement"):
            # Sums on a GPU may be taken in another order.
            assert [line[name] for line in after] == pytest.approx(
                [line[name] for line in before], rel=2e-2, abs=2e-2
            ), name

    sparsekd("export", f"run.root={run.parent}", f"run.name={run.name}")
    sparsekd(
        "evaluate",
        *store,
        teacher,
        on_device,
        f"run.root={folder}",
        f"evaluate.models={{kd: {run / 'export'}}}",
        "evaluate.baseline=null",
        "evaluate.teacher=load",
        "evaluate.dtype=bfloat16",
    )
    return printed, again, json.loads((folder / "evaluation" / "evaluation.json").read_text())


def test_the_road_on_a_gpu(tmp_path: Path) -> None:
    printed, again, evaluation = drive(tmp_path, "cuda")
    assert "impl triton" in printed
    assert f"step {STEPS}/{STEPS}" in again and f"step 1/{STEPS}" not in again  # it did go on
    assert evaluation["settings"]["device"] == "cuda"
    # The store was captured in bfloat16 on this device, and the teacher ran in bfloat16 again.
    assert evaluation["teacher_deviation"] < 0.05
    held = metrics_of(tmp_path / "runs" / "kd", "heldout")[-1]
    student = next(model for model in evaluation["models"] if model["name"] == "kd")
    assert student["figures"]["loss"]["value"] == pytest.approx(held["ce"], rel=0.02)
