"""What a record of (k, n) keeps of full distillation: the gradient it gives, and the target it stands for.

A linear student z = W A x + b: hidden states x and head W, b are the teacher's, the map A is what is trained.
So the gradient is the mean over positions of (W' d) x', d = q - target in logits, and averages over positions
as that of a real layer does. Full distillation has target = p, the teacher; what a record stands for:

- `tail_bucket`: p on the head, and the rest's mass spread like the student's own rest (the divergence over
  head and one bucket has that gradient);
- `sampled`: p on the head, and the rest's mass spread like the draws;
- `renormalized` (both sides over the head): p / A on the head; the gradient's q is renormalised there, too.

N positions, V vocabulary, H hidden, C positions of a chunk, k head entries, n draws, S sets of draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from store_data import Case

Floats = NDArray[np.float32]

CASES = tuple(
    Case(*pair)
    for pair in (
        (64, 0), (32, 0), (16, 0), (12, 0), (8, 0), (32, 24), (16, 24), (8, 24), (8, 12), (8, 6),
        (0, 50), (0, 24), (0, 12),
    )
)  # fmt: skip
RENORMALIZED = (Case(64, 0), Case(12, 0))
"""Cases whose renormalised form is shown, too: what top-k without a rest comes to."""

SETS = 4
"""Independent sets of draws, to tell noise from bias."""

CHUNK_VALUES = 1 << 25
"""Logits of a chunk at most."""

SEED = 0


@dataclass(frozen=True)
class DenseTeacher:
    """A teacher whose whole distribution is known.

    Attributes:
        name: one word.
        story: in words.
        hidden: x, [N, H].
        weight: W, [V, H].
        bias: b, [V].
    """

    name: str
    story: str
    hidden: Floats
    weight: Floats
    bias: Floats


@dataclass(frozen=True)
class Student:
    """A student: its map A, [H, H], and the mean KL of it from the teacher."""

    name: str
    map: Floats
    kl: float


@dataclass(frozen=True)
class Fidelity:
    """One record's worth for one student.

    Attributes:
        angle: degrees between the gradient of one batch and that of full distillation.
        norm: ratio of their norms.
        bias: what remains of the difference when draws are averaged away, over the full gradient's norm.
        noise: what the draws add, likewise (root mean square).
        target_kl: nats, mean over positions of KL(target || teacher); of one set of draws.
    """

    case: Case
    mode: str
    student: str
    angle: float
    norm: float
    bias: float
    noise: float
    target_kl: float


def synthetic_teacher(*, positions: int, vocabulary: int, hidden: int, entropy: float) -> DenseTeacher:
    """Low-rank logits over Zipf's bias, with a sharpness that varies between positions; as sure as asked."""
    random = np.random.default_rng(SEED)
    weight = random.standard_normal((vocabulary, hidden), np.float32)
    bias = -np.log(np.arange(vocabulary) + 3.0).astype(np.float32)
    directions = random.standard_normal((positions, hidden), np.float32) / np.float32(np.sqrt(hidden))
    spread = np.exp(np.float32(0.4) * random.standard_normal((positions, 1), np.float32))
    states: Floats = directions * spread
    sample = slice(0, min(positions, 256))

    def entropy_at(scale: float) -> float:
        logprobs = log_softmax((np.float32(scale) * states[sample]) @ weight.T + bias)
        return float(-(np.exp(logprobs) * logprobs).sum(axis=1).mean())

    low, high = 0.0, 64.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if entropy_at(middle) > entropy else (low, middle)
    story = f"low-rank logits over Zipf's bias, V = {vocabulary:,}, H = {hidden}"
    return DenseTeacher("synthetic", story, np.float32(high) * states, weight, bias)


def students(teacher: DenseTeacher, divergences: Sequence[float]) -> list[Student]:
    """Students whose map is the teacher's (the identity) with noise, as much as gives each divergence; and
    one that knows nothing of the text before (the map 0)."""
    random = np.random.default_rng(SEED + 1)
    size = teacher.hidden.shape[1]
    noise = random.standard_normal((size, size)).astype(np.float32) / np.float32(np.sqrt(size))
    identity = np.eye(size, dtype=np.float32)
    sample = teacher.hidden[: min(len(teacher.hidden), 256)]
    logprobs = log_softmax(sample @ teacher.weight.T + teacher.bias)

    def divergence(map_: Floats) -> float:
        hidden: Floats = sample @ map_.T
        other = log_softmax(hidden @ teacher.weight.T + teacher.bias)
        return float((np.exp(logprobs) * (logprobs - other)).sum(axis=1).mean())

    found = []
    for wanted in divergences:
        low, high = 0.0, 4.0
        for _ in range(12):
            middle = (low + high) / 2
            above = divergence(identity + np.float32(middle) * noise) > wanted
            low, high = (low, middle) if above else (middle, high)
        map_ = identity + np.float32(high) * noise
        found.append(Student(f"KL {wanted:g}", map_, divergence(map_)))
    blank = np.zeros_like(identity)
    return [*found, Student("blank", blank, divergence(blank))]


def measure_fidelity(teacher: DenseTeacher, pupils: Sequence[Student]) -> list[Fidelity]:
    """Every case with every student, over all positions of the teacher as one batch."""
    random = np.random.default_rng(SEED + 2)
    chunk = max(1, CHUNK_VALUES // len(teacher.weight))
    count, size = teacher.hidden.shape
    jobs = [(case, "sampled" if case.n else "tail_bucket") for case in CASES]
    jobs += [(case, "renormalized") for case in RENORMALIZED]
    full = {pupil.name: np.zeros((size, size)) for pupil in pupils}
    gradients = {
        (job, pupil.name): np.zeros((SETS if job[0].n else 1, size, size)) for job in jobs for pupil in pupils
    }
    target_kl = dict.fromkeys(gradients, 0.0)
    for start in range(0, count, chunk):
        x = teacher.hidden[start : start + chunk]
        records = Records(log_softmax(x @ teacher.weight.T + teacher.bias), teacher.weight, random)
        for pupil in pupils:
            student = StudentChunk(x @ pupil.map.T, teacher, records)
            full[pupil.name] += (student.mean_weight - records.mean_weight).T.astype(np.float64) @ x
            for job in jobs:
                for index, (difference, divergence) in enumerate(student.estimate(job)):
                    gradients[job, pupil.name][index] += difference.T.astype(np.float64) @ x
                    target_kl[job, pupil.name] += float(divergence.sum()) / len(gradients[job, pupil.name])
    return [
        _summary(job, name, found, full[name], target_kl[job, name] / count)
        for (job, name), found in gradients.items()
    ]


def _summary(
    job: tuple[Case, str], student: str, found: NDArray[np.float64], full: NDArray[np.float64], kl: float
) -> Fidelity:
    """The figures of the gradients [S, H, H] of one job."""
    length = float(np.linalg.norm(full))
    mean, sets = found.mean(axis=0), len(found)
    noise = float(np.sum((found - mean) ** 2)) / (sets - 1) if sets > 1 else 0.0
    bias = float(np.sum((mean - full) ** 2)) - noise / sets
    angles = [
        np.degrees(np.arccos(np.clip(np.sum(one * full) / np.linalg.norm(one) / length, -1, 1)))
        for one in found
    ]
    return Fidelity(
        case=job[0],
        mode=job[1],
        student=student,
        angle=float(np.mean(angles)),
        norm=float(np.mean([np.linalg.norm(one) / length for one in found])),
        bias=float(np.sqrt(max(bias, 0.0))) / length,
        noise=float(np.sqrt(noise)) / length,
        target_kl=kl,
    )


class Records:
    """The teacher's records of a chunk: its distribution, its most likely ids, and draws from what is left.

    Attributes:
        logprobs: [C, V].
        order: int64 [C, most k], the most likely ids in falling order.
        mean_weight: the mean of W's rows under the teacher, [C, H].
        draws: case -> ids [C, S, n].
    """

    def __init__(self, logprobs: Floats, weight: Floats, random: np.random.Generator) -> None:
        self.logprobs = logprobs
        probabilities = np.exp(logprobs)
        self.mean_weight = probabilities @ weight
        most = max(case.k for case in CASES)
        likely = np.argpartition(-logprobs, most, axis=1)[:, :most]
        values = np.take_along_axis(logprobs, likely, axis=1)
        self.order = np.take_along_axis(likely, np.argsort(-values, axis=1, kind="stable"), axis=1)
        self.draws: dict[Case, NDArray[np.int64]] = {}
        rows = np.arange(len(logprobs))
        for k in {case.k for case in CASES if case.n}:
            rest = probabilities.copy()
            np.put_along_axis(rest, self.order[:, :k], 0, axis=1)
            cumulative = np.cumsum(rest, axis=1, dtype=np.float64)
            for case in (case for case in CASES if case.n and case.k == k):
                uniforms = random.random((len(rows), SETS * case.n)) * cumulative[:, -1:]
                drawn = np.stack(
                    [np.searchsorted(cumulative[row], uniforms[row], side="right") for row in rows]
                )
                drawn = np.minimum(drawn, logprobs.shape[1] - 1)
                self.draws[case] = drawn.reshape(len(rows), SETS, case.n)


class StudentChunk:
    """A student's distribution on a chunk, and the estimates of its gradient.

    Attributes:
        mean_weight: the mean of W's rows under the student, [C, H]; less that under a target it is W' d.
    """

    def __init__(self, x: Floats, teacher: DenseTeacher, records: Records) -> None:
        self.records, self.weight = records, teacher.weight
        self.logprobs = log_softmax(x @ teacher.weight.T + teacher.bias)
        probabilities = np.exp(self.logprobs)
        self.mean_weight = probabilities @ teacher.weight
        # KL(q || p): what the tail bucket's target, which spreads the rest like q, is short of.
        self.reverse = (probabilities * (self.logprobs - records.logprobs)).sum(axis=1, dtype=np.float64)

    def estimate(self, job: tuple[Case, str]) -> list[tuple[Floats, NDArray[np.float64]]]:
        """Returns for each set of draws (W' d [C, H], KL(target || teacher) [C])."""
        case, mode = job
        ids = self.records.order[:, : case.k]
        log_p = np.take_along_axis(self.records.logprobs, ids, axis=1).astype(np.float64)
        log_q = np.take_along_axis(self.logprobs, ids, axis=1).astype(np.float64)
        p, q = np.exp(log_p), np.exp(log_q)
        rest_p = np.maximum(1 - p.sum(axis=1), 1e-12)
        rest_q = np.maximum(1 - q.sum(axis=1), 1e-12)
        if mode == "renormalized":
            weights = q / (1 - rest_q)[:, None] - p / (1 - rest_p)[:, None]
            return [(self._gathered(weights, ids), -np.log(1 - rest_p))]
        if mode == "tail_bucket":
            ratio = (rest_p / rest_q)[:, None]
            # d = q - target: (1 - ratio) q everywhere, but q - p on the head.
            gradient = (1 - ratio) * self.mean_weight + self._gathered(ratio * q - p, ids)
            rest = self.reverse - (q * (log_q - log_p)).sum(axis=1)  # the sum over the rest of q log(q / p)
            divergence = rest_p * (rest / rest_q + np.log(rest_p / rest_q))
            return [(gradient, np.maximum(divergence, 0))]
        found = []
        for drawn in self.records.draws[case].transpose(1, 0, 2):
            weights = np.broadcast_to(rest_p[:, None] / case.n, drawn.shape)
            gradient = self.mean_weight - self._gathered(p, ids) - self._gathered(weights, drawn)
            found.append((gradient, self._divergence(drawn, rest_p)))
        return found

    def _gathered(self, weights: NDArray[np.float64], ids: NDArray[np.int64]) -> Floats:
        """The sum over entries of weights [C, E] times W's rows of ids [C, E], [C, H]."""
        return np.einsum("ce,ceh->ch", weights.astype(np.float32), self.weight[ids])

    def _divergence(self, drawn: NDArray[np.int64], rest: NDArray[np.float64]) -> NDArray[np.float64]:
        """KL of the target from the teacher, [C]: over the draws [C, n] alone, because heads are equal."""
        count = drawn.shape[1]
        ascending = np.sort(drawn, axis=1)
        log_p = np.take_along_axis(self.records.logprobs, ascending, axis=1).astype(np.float64)
        # Each draw carries rest / n; how often its id was drawn counts in the logarithm.
        same = (ascending[:, :, None] == ascending[:, None, :]).sum(axis=2)
        log_w = np.log(rest)[:, None] + np.log(same / count)
        return rest * (log_w - log_p).mean(axis=1)


def log_softmax(logits: Floats) -> Floats:
    """Log-probabilities of logits [C, V]; float32, the sum in float64."""
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
