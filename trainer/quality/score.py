"""One model over the held-out rows: every counted position's figures.

Shapes: B rows, L tokens of a row, N counted positions, C of them at a time, H hidden, V vocabulary, k head,
n draws.
"""

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparsekd.kernels.objective import HeadTransform
from sparsekd.logit_store.manifest import RecordSpec
from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.logit_store.row import Row, records_at
from sparsekd.trainer.data.heldout import row_batches
from sparsekd.trainer.data.inputs import model_inputs
from sparsekd.trainer.models.causal_lm import dense_logits, hidden_states
from sparsekd.trainer.models.opened import OpenModel
from sparsekd.trainer.quality import metrics
from sparsekd.trainer.quality.result import ESTIMATE, EXACT, LOWER_BOUND, UPPER_BOUND

# Positions whose logits exist at one time: some five float32 [C, V] arrays, 1.6 GB at V = 152,064.
_POSITIONS_AT_ONCE = 512


class TeacherTrace(NamedTuple):
    """What remains of a teacher that ran once: from it every logit can be made again, without the model.

    So teacher and student never have to fit in memory together.
    """

    hidden: Tensor  # (N, H) at the counted positions in row order, backed by a file
    head: nn.Linear
    transform: HeadTransform


@dataclass(frozen=True)
class Scores:
    """A model's figures at the counted positions, each [N] in row order; None where they cannot be had.

    `loss`, `entropy`, `kl` are in nats; the others are probabilities or yes and no.
    """

    loss: NDArray[np.float32]
    top_ids: NDArray[np.int64]
    confidence: NDArray[np.float32]
    hit: NDArray[np.bool_]
    entropy: NDArray[np.float32]
    agreement: NDArray[np.bool_] | None
    kl: NDArray[np.float32] | None
    acceptance: NDArray[np.float32] | None
    tokens_per_second: float


def kinds(record: RecordSpec, *, teacher_runs: bool) -> dict[str, str]:
    """Which comparisons with the teacher can be had, and how far each can be trusted."""
    if teacher_runs:
        return {"agreement": EXACT, "kl": EXACT, "acceptance": EXACT}
    found = {}
    if record.k > 0:
        found["agreement"] = EXACT
    # Imported without a normaliser: probabilities are relative to the head. Imported draws alone: KL is known
    # up to the teacher's entropy.
    if record.rest in ("unknown", "counts"):
        return found
    if 1.0 in record.temperatures:
        if record.n > 0 and record.draw_temperature == 1.0:
            found["kl"] = ESTIMATE
        elif record.k > 0:
            found["kl"] = LOWER_BOUND
        if record.k > 0:
            found["acceptance"] = UPPER_BOUND
    return found


@torch.inference_mode()
def score(
    judged: OpenModel,
    store: LogitStore,
    *,
    rows: int,
    batch: int,
    teacher: TeacherTrace | None,
    keep: Tensor | None = None,
) -> Scores:
    """Runs a model over the first `rows` held-out rows.

    Args:
        judged: The model.
        store: Its held-out rows; their records stand for the teacher where `teacher` is None.
        rows: How many.
        batch: Rows in one forward pass.
        teacher: Its trace over the same rows, which makes every figure exact.
        keep: (N, H), filled with this model's hidden states at the counted positions.
    """
    device = judged.device
    wanted = kinds(store.manifest.record, teacher_runs=teacher is not None)
    columns: dict[str, list[NDArray]] = {}
    # (seconds, tokens) of each batch; the first is a warm-up wherever there is a second.
    laps: list[tuple[float, int]] = []
    done = 0
    for chunk in row_batches(store, rows, batch):
        token_ids, positions = model_inputs(chunk, device)
        mask = np.stack([row.loss_mask[: token_ids.shape[1]] for row in chunk])
        counted = torch.from_numpy(mask).to(device)
        labels = token_ids.roll(-1, dims=1)[counted]
        began = _now(device)
        hidden = hidden_states(judged.decoder, token_ids, positions)[counted]
        seconds = _now(device) - began
        here = slice(done, done + len(labels))
        done = here.stop
        if keep is not None:
            keep[here] = hidden.to(keep.device)
        teacher_hidden = None if teacher is None else teacher.hidden[here].to(device)
        record = _Record.of(chunk, store.manifest.record, device) if teacher is None else None
        for start in range(0, len(labels), _POSITIONS_AT_ONCE):
            part = slice(start, start + _POSITIONS_AT_ONCE)
            began = _now(device)
            log_q = dense_logits(hidden[part], judged.head, judged.transform).log_softmax(-1)
            seconds += _now(device) - began
            own = metrics.own_scores(log_q, labels[part])
            found = dict(own._asdict())
            if teacher is not None and teacher_hidden is not None:
                log_p = dense_logits(teacher_hidden[part], teacher.head, teacher.transform).log_softmax(-1)
                found["agreement"] = own.top_ids == log_p.argmax(-1)
                found["kl"] = metrics.dense_kl(log_p, log_q)
                found["acceptance"] = metrics.dense_acceptance(log_p, log_q)
            elif record is not None:
                found |= _against_record(record.part(part), log_q, own.top_ids, wanted)
            for name, value in found.items():
                columns.setdefault(name, []).append(value.cpu().numpy())
        laps.append((seconds, token_ids.numel()))
    timed = laps[1:] or laps
    whole = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Scores(
        loss=whole["loss"],
        top_ids=whole["top_ids"],
        confidence=whole["confidence"],
        hit=whole["hit"],
        entropy=whole["entropy"],
        agreement=whole["agreement"] if "agreement" in wanted else None,
        kl=whole["kl"] if "kl" in wanted else None,
        acceptance=whole["acceptance"] if "acceptance" in wanted else None,
        tokens_per_second=sum(tokens for _, tokens in timed) / sum(seconds for seconds, _ in timed),
    )


class _Record(NamedTuple):
    """The records of the counted positions of a batch, on the device, at temperature 1."""

    head_ids: Tensor  # (N, k) int64
    head_logprobs: Tensor  # (N, k) float32
    tail_ids: Tensor  # (N, n) int64
    tail_counts: Tensor  # (N, n) float32
    log_rest: Tensor  # (N,) float32; NaN where temperature 1 is not on the grid, and never read then
    entropy: Tensor  # (N,) float32

    @classmethod
    def of(cls, rows: list[Row], spec: RecordSpec, device: torch.device) -> "_Record | None":
        """Gathers the records; None in a token store."""

        def gather(name: str, dtype: torch.dtype) -> Tensor:
            parts = [getattr(record, name) for record in records]
            return torch.from_numpy(np.concatenate(parts)).to(device, dtype)

        if any(row.teacher is None for row in rows):
            return None
        records = [records_at(row, row.loss_mask) for row in rows]
        log_rest = gather("log_rest", torch.float32)
        at_one = spec.temperatures.index(1.0) if 1.0 in spec.temperatures else None
        # A head that a codec cut short ends with -1 at probability 0: its first id stands there as well.
        head_ids = gather("head_ids", torch.int64)
        return cls(
            head_ids=torch.where(head_ids < 0, head_ids[:, :1], head_ids),
            head_logprobs=gather("head_logprobs", torch.float32),
            tail_ids=gather("tail_ids", torch.int64),
            tail_counts=gather("tail_counts", torch.float32),
            log_rest=log_rest.new_full(log_rest.shape[:1], torch.nan)
            if at_one is None
            else log_rest[:, at_one],
            entropy=gather("entropy", torch.float32),
        )

    def part(self, positions: slice) -> "_Record":
        return _Record(*(value[positions] for value in self))


def _against_record(
    record: _Record, log_q: Tensor, top_ids: Tensor, wanted: dict[str, str]
) -> dict[str, Tensor]:
    """The comparisons that a stored record allows, [N] each."""
    found = {}
    head = (record.head_ids, record.head_logprobs)
    if "agreement" in wanted:
        found["agreement"] = top_ids == record.head_ids[:, 0]
    if "kl" in wanted:
        found["kl"] = (
            metrics.sampled_kl(
                log_q, *head, record.tail_ids, record.tail_counts, record.log_rest, record.entropy
            )
            if wanted["kl"] == ESTIMATE
            else metrics.bucket_kl(log_q, *head, record.log_rest)
        )
    if "acceptance" in wanted:
        found["acceptance"] = metrics.bucket_acceptance(log_q, *head, record.log_rest)
    return found


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
