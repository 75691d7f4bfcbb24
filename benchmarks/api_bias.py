"""What an API's answers are worth to a student, against the whole distribution: a page.

A stub of an OpenAI-compatible server on loopback answers with the K largest log-probabilities of a real
model, or with m sampled tokens; the answers become stores by `sparsekd store import`, and the loss over these
gives values and gradients, which are compared with those of the whole distribution in float64.

    .venv/bin/python benchmarks/api_bias.py --model models/SmolLM2-135M --text texts/prose.jsonl

Without --model a small random Llama reads the standard library of Python.
"""

import contextlib
import io
import json
import math
import os
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

# The folder is no package, and PYTHONSAFEPATH keeps a script's folder off the path.
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from capture import sample, small_teacher
from page import command_line, made_by, processor, running_code, table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sparsekd.kernels.loss import sparse_kd_loss
from sparsekd.kernels.objective import HeadTransform, Objective
from sparsekd.kernels.targets import SparseTargets
from sparsekd.logit_store.places.paths import store_path
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.row import TeacherRecord
from sparsekd.trainer.corpus.tokenizer import train_tokenizer
from sparsekd.trainer.door.store_cli import run_store

PACKAGES = ("torch", "transformers", "numpy")
SEED = 0
NAME = "api_bias"
SEEN = 0.5
"""Bias below this share of what is left of the noise in a mean over all repeats cannot be told from none."""

DENSE = "the whole distribution"
TEXT = "the text alone (cross-entropy)"
BUCKET = "rest as one bucket (`tail_bucket`)"
DROPPED = "rest dropped, renormalised (`renormalized`)"
CUT = "rest dropped (`truncated`)"
COUNTS = "counts of samples (`sampled`, k = 0)"
MODES = {BUCKET: "tail_bucket", DROPPED: "renormalized", CUT: "truncated"}


class Setting(NamedTuple):
    """Sizes of a run."""

    documents: int
    length: int
    listed: tuple[int, ...]
    samples: tuple[int, ...]
    repeats: int
    noise: Mapping[str, float]  # student -> deviation of its hidden states, in that of the teacher's


FULL = Setting(4, 97, (1, 5, 20), (1, 5, 20), 12, {"near": 0.25, "far": 0.6})
SMOKE = Setting(2, 17, (1, 5), (5,), 6, {"near": 0.25})


class World(NamedTuple):
    """The teacher over some texts: T tokens each, of which N = T - 1 have a record."""

    folder: Path  # of model and tokenizer
    texts: list[list[int]]
    hidden: Tensor  # (documents * N, H), what its head reads
    weight: Tensor  # (V, H)
    logprobs: Tensor  # (documents * N, V) float64


class Outcome(NamedTuple):
    """What a teacher of one kind gives, over repeats of its answers: means over positions, and gradients."""

    value: float
    gradient: Tensor  # (repeats, positions, H)


def prepared(root: Path, model: Path | None, text: Path | None, setting: Setting) -> World:
    """The teacher, and texts of equal lengths."""
    characters = 12 * setting.documents * setting.length
    content = sample(text, characters)
    if model is None:
        model = root / "model"
        trained = train_tokenizer([content], 300)
        small_teacher(model, len(trained))
        trained.save_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = tokenizer(content, add_special_tokens=False)["input_ids"]
    texts = [ids[start : start + setting.length] for start in range(0, len(ids), setting.length)]
    texts = [text for text in texts if len(text) == setting.length][: setting.documents]
    assert len(texts) == setting.documents
    head = found.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    with torch.inference_mode():
        hidden = found.base_model(input_ids=torch.tensor(texts)).last_hidden_state[:, :-1].flatten(0, 1)
        weight = head.weight[: len(tokenizer)].clone()
        logprobs = (hidden.double() @ weight.double().T).log_softmax(-1)
    return World(model, texts, hidden.clone(), weight, logprobs.clone())


def answer(world: World, request: Mapping[str, Any]) -> dict[str, Any]:
    """What the server says of a prompt of ids that is to be echoed, or draws at each of its positions."""
    number = world.texts.index(request["prompt"])
    each = len(world.texts[0]) - 1
    said = world.logprobs[number * each : (number + 1) * each]
    if "samples" in request:
        generator = torch.Generator().manual_seed(request["seed"])
        drawn = torch.multinomial(said.exp(), request["samples"], replacement=True, generator=generator)
        return {"input_ids": request["prompt"], "sampled_ids": [*drawn.tolist(), None]}
    own = said.gather(1, torch.tensor(request["prompt"][1:])[:, None])[:, 0].tolist()
    values, ids = said.topk(request["logprobs"])
    lists = [
        {f"token_id:{token}": value for token, value in zip(*entry, strict=True)}
        for entry in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    tokens = [f"token_id:{token}" for token in request["prompt"]]
    logprobs = {"tokens": tokens, "token_logprobs": [None, *own], "top_logprobs": [None, *lists]}
    return {"prompt": [], "choices": [{"index": 0, "logprobs": logprobs}]}


@contextlib.contextmanager
def stub(world: World) -> Iterator[str]:
    """The server on loopback; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # the library's name
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = json.dumps(answer(world, request)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/completions"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def asked(address: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to one request."""
    content = json.dumps(request).encode()
    with urllib.request.urlopen(urllib.request.Request(address, content)) as reply:
        found: dict[str, Any] = json.load(reply)
    return found


def imported(root: Path, world: World, name: str, lines: list[dict[str, Any]]) -> list[TeacherRecord]:
    """The records of answers, document by document, by way of a store."""
    file = root / f"{name}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        words = [str(file), str(root / name), "--tokenizer", str(world.folder), "--codec", "exact"]
        assert run_store(["import", *words]) == 0
    store = open_store(store_path(str(root / name)))
    rows = [store.read_row("train", index) for index in range(store.rows("train"))]
    rows.sort(key=lambda row: int(row.segment_documents[0]))
    return [row.teacher for row in rows if row.teacher is not None]


def targets_of(records: list[TeacherRecord]) -> SparseTargets:
    """Records of documents, one behind the other, as the loss takes them."""

    def plane(name: str) -> np.ndarray:
        return np.concatenate([getattr(record, name) for record in records])

    ids = np.concatenate([plane("head_ids"), plane("tail_ids")], axis=1).astype(np.int64)
    return SparseTargets(
        ids=torch.from_numpy(ids),
        head_logprobs=torch.from_numpy(plane("head_logprobs")),
        tail_counts=torch.from_numpy(plane("tail_counts").astype(np.float32)),
        log_rest=torch.from_numpy(plane("log_rest")[:, 0].copy()),
        entropy=torch.from_numpy(plane("entropy")),
    )


def learned(world: World, student: Tensor, targets: SparseTargets | None, mode: str) -> tuple[float, Tensor]:
    """The mean value and the gradient of the student's hidden states; without targets, of cross-entropy."""
    hidden = student.clone().requires_grad_()
    count = len(hidden)
    labels = torch.tensor([token for text in world.texts for token in text[1:]])
    alone = targets is None
    found = sparse_kd_loss(
        hidden,
        world.weight,
        bias=None,
        targets=targets,
        labels=labels,
        ce_weights=torch.full((count,), float(alone)),
        kd_weights=torch.full((count,), float(not alone)),
        objective=Objective(
            kd_weight=float(not alone),
            ce_weight=float(alone),
            divergence="forward_kl",
            mixture=0.1,
            target_mode=mode,
            temperature=1.0,
            label_smoothing=0.0,
            z_loss=0.0,
        ),
        head=HeadTransform(vocabulary_size=len(world.weight), scale=1.0, softcap=None),
        impl="torch",
    )
    found.loss.backward()
    assert hidden.grad is not None
    return float((found.ce if alone else found.kd).mean()), hidden.grad


def dense(world: World, student: Tensor) -> tuple[float, Tensor]:
    """Mean KL(teacher || student) in float64, and its gradient."""
    hidden = student.double().requires_grad_()
    log_q = (hidden @ world.weight.double().T).log_softmax(-1)
    value = (world.logprobs.exp() * (world.logprobs - log_q)).sum()
    value.backward()
    assert hidden.grad is not None
    return float(value.detach()) / len(hidden), hidden.grad


def outcomes(root: Path, world: World, setting: Setting) -> dict[str, dict[str, Outcome]]:
    """What each kind of teacher gives to each student."""
    listed: dict[int, SparseTargets] = {}
    drawn: dict[int, list[SparseTargets]] = {}
    each = setting.documents
    with stub(world) as address:
        for k in setting.listed:
            lines = [asked(address, {"prompt": text, "logprobs": k, "echo": True}) for text in world.texts]
            listed[k] = targets_of(imported(root, world, f"top-{k}", lines))
        for m in setting.samples:
            lines = [
                asked(address, {"prompt": text, "samples": m, "seed": SEED + repeat * each + number})
                for repeat in range(setting.repeats)
                for number, text in enumerate(world.texts)
            ]
            records = imported(root, world, f"draws-{m}", lines)
            drawn[m] = [targets_of(records[start : start + each]) for start in range(0, len(records), each)]
    generator = torch.Generator().manual_seed(SEED)
    found: dict[str, dict[str, Outcome]] = {}
    for name, share in setting.noise.items():
        noise = torch.randn(world.hidden.shape, generator=generator) * world.hidden.std() * share
        student = world.hidden + noise
        value, gradient = dense(world, student)
        mine = {DENSE: Outcome(value, gradient[None])}
        for k, targets in listed.items():
            for label, mode in MODES.items():
                value, gradient = learned(world, student, targets, mode)
                mine[f"K = {k}, {label}"] = Outcome(value, gradient[None])
        for m, repeats in drawn.items():
            parts = [learned(world, student, targets, "sampled") for targets in repeats]
            mine[f"m = {m}, {COUNTS}"] = Outcome(
                float(np.mean([value for value, _ in parts])), torch.stack([part for _, part in parts])
            )
        value, gradient = learned(world, student, None, "auto")
        mine[TEXT] = Outcome(value, gradient[None])
        found[name] = mine
    return found


def cells(outcome: Outcome, truth: Outcome, unknown: float) -> list[str]:
    """A line's numbers.

    Args:
        outcome: of a kind of teacher.
        truth: of the whole distribution.
        unknown: nats that its value has too many by design: the teacher's entropy.
    """
    true = truth.gradient[0].double()
    size = float(true.norm())
    mean = outcome.gradient.double().mean(0)
    repeats = len(outcome.gradient)
    noise = math.sqrt(float((outcome.gradient.double() - mean).square().sum()) / max(repeats - 1, 1))
    # Of the distance from the truth, what a mean over so many repeats still has of their noise is no bias.
    left = noise / math.sqrt(repeats)
    bias = math.sqrt(max(float((mean - true).square().sum()) - left**2, 0.0))
    seen = bias > SEEN * left
    along = float((mean * true).sum()) / size**2
    return [
        f"{outcome.value - unknown - truth.value:+.3f}",
        f"{bias / size:.3f}" if seen else f"none seen (< {SEEN * left / size:.2g})",
        f"{noise / size:.2f}" if repeats > 1 else "0",
        f"{along:.2f}",
    ]


def page(world: World, found: Mapping[str, Mapping[str, Outcome]], setting: Setting, head: list[str]) -> str:
    """The page's text."""
    entropy = float(-(world.logprobs.exp() * world.logprobs).sum(1).mean())
    outside = {k: float(1 - world.logprobs.exp().topk(k).values.sum(1).mean()) for k in setting.listed}
    lines = ["# What an API's answers are worth", "", *head, ""]
    lines += [
        f"{world.folder.name}: V = {len(world.weight):,}, {len(world.logprobs):,} positions of "
        f"{setting.documents} texts; the teacher's entropy is {entropy:.2f} nats, and "
        + ", ".join(f"{mass:.1%} of its mass lie outside of the {k} likeliest" for k, mass in outside.items())
        + f". Students are the teacher with noise in its hidden states; gradients are those of the hidden "
        f"states at all positions together. Samples are drawn {setting.repeats} times anew.",
        "",
        "- **value**: of the mean loss, less the true KL (for samples and for the text less the teacher's "
        "entropy, too, which they do not tell).",
        "- **bias**: distance of the expected gradient from the true one, over the length of that.",
        "- **noise**: standard deviation of the gradient of one set of samples, in the same measure; it "
        "falls as more positions are learned from, bias does not.",
        "- **along**: the part of the expected gradient along the true one, over the length of that.",
        "",
    ]
    for student, outcome in found.items():
        truth = outcome[DENSE]
        rows = [
            [name, *cells(one, truth, entropy if COUNTS in name or name == TEXT else 0.0)]
            for name, one in outcome.items()
            if name != DENSE
        ]
        lines += [f"## The student that is {student}: KL {truth.value:.3f} nats", ""]
        lines += table(["teacher", "value", "bias", "noise", "along"], rows, words=[0])
    lines += [
        "The text is not the teacher's here: what the text alone has of bias is how far one label a position "
        "is from the distribution at it. Over text that the teacher wrote itself it is one sample, m = 1.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", type=Path, help="folder of a teacher with its tokenizer")
    parser.add_argument("--text", type=Path, help="a text file, or lines of JSON with text")
    arguments = parser.parse_args()
    code, began, load = running_code(), time.monotonic(), os.getloadavg()[0]
    torch.set_num_threads(1)
    setting = SMOKE if arguments.smoke else FULL
    with TemporaryDirectory() as folder:
        world = prepared(Path(folder), arguments.model, arguments.text, setting)
        found = outcomes(Path(folder), world, setting)
    minutes = (time.monotonic() - began) / 60
    machine = f"{processor()}, load {load:.1f} at the begin, {minutes:.0f} minutes"
    head = made_by(Path(__file__).name, sys.argv[1:], code, cache="", machine=machine, packages=PACKAGES)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{NAME}.md").write_text(page(world, found, setting, head), encoding="utf-8")
    print(arguments.out / f"{NAME}.md")


if __name__ == "__main__":
    main()
