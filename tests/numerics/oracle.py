"""Float64 dense oracle, written position by position from the definitions; no formula of the package.

N positions, K stored entries, k head, n draws, V true vocabulary, H hidden.
"""

import unittest.mock
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsekd.kernels import loss as loss_module
from sparsekd.kernels import memory
from sparsekd.kernels.loss import LossOutput, sparse_kd_loss
from sparsekd.kernels.objective import HeadTransform, Objective
from sparsekd.kernels.targets import SparseTargets

PLAIN = Objective(
    kd_weight=0.7,
    ce_weight=0.4,
    divergence="forward_kl",
    mixture=0.1,
    target_mode="tail_bucket",
    temperature=1.0,
    label_smoothing=0.0,
    z_loss=0.0,
)


def objective(**changes: Any) -> Objective:
    """A plain objective with changes."""
    return replace(PLAIN, **changes)


def device_of(impl: str) -> torch.device:
    """Where an implementation runs in these tests."""
    return torch.device("cuda" if impl.startswith("triton") and torch.cuda.is_available() else "cpu")


# No divisor of the tests' vocabularies: the last slice is narrower.
SLICE_COLUMNS = 16


def _plan_of_slices(impl: str, shape: memory.LossShape, **_: Any) -> memory.MemoryPlan:
    """A plan of the low-memory mode, for vocabularies too small to ask for it."""
    plan = memory.plan_memory(impl, shape)
    return plan._replace(slice_columns=SLICE_COLUMNS)


@dataclass
class Case:
    """Inputs of one comparison, on the CPU, already rounded to their dtype."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: SparseTargets | None
    labels: Tensor
    ce_weights: Tensor
    kd_weights: Tensor
    objective: Objective
    head: HeadTransform

    def change(self, **changes: Any) -> "Case":
        """A copy with changes."""
        return replace(self, **changes)


def record(
    logits: Tensor, *, k: int, n: int, temperature: float, generator: torch.Generator
) -> SparseTargets:
    """The record of a dense teacher [N, V] in float64, its draws made at `temperature`."""
    count = logits.shape[0]
    logprobs = logits.double().log_softmax(1)
    order = logprobs.argsort(dim=1, descending=True, stable=True)
    ids = torch.full((count, k + n), -1)
    counts = torch.zeros(count, n)
    ids[:, :k] = order[:, :k]
    log_rest = torch.full((count,), -torch.inf, dtype=torch.float64)
    for t in range(count):
        rest = order[t, k:]
        if rest.numel() == 0:
            continue
        log_rest[t] = (logprobs[t, rest] / temperature).logsumexp(0)
        if n:
            law = (logprobs[t, rest] / temperature).softmax(0)
            drawn = rest[torch.multinomial(law, n, replacement=True, generator=generator)]
            distinct, times = drawn.unique(return_counts=True)
            ids[t, k : k + distinct.numel()] = distinct
            counts[t, : distinct.numel()] = times.float()
    at_temperature = (logprobs / temperature).log_softmax(1)
    entropy = -(at_temperature.exp() * at_temperature).sum(1)
    return SparseTargets(
        ids=ids,
        head_logprobs=logprobs.gather(1, ids[:, :k]).float(),
        tail_counts=counts,
        log_rest=log_rest.float(),
        entropy=entropy.float(),
    )


def make_case(
    *,
    seed: int = 0,
    count: int = 7,
    vocabulary: int = 53,
    padding: int = 4,
    size: int = 12,
    k: int = 5,
    n: int = 6,
    spread: float = 2.0,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    softcap: float | None = None,
    with_bias: bool = True,
    **changes: Any,
) -> Case:
    """A random case: labels in and out of the support, one ignored, one position dropped.

    Of seven positions or more one counts for the distillation alone, and one for the cross-entropy alone.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wanted = objective(**changes)
    teacher = normal(count, vocabulary) * spread
    targets = record(teacher, k=k, n=n, temperature=wanted.temperature, generator=generator)
    labels = torch.randint(0, vocabulary, (count,), generator=generator)
    ce_weights = torch.rand(count, generator=generator) + 0.1
    kd_weights = torch.rand(count, generator=torch.Generator().manual_seed(seed + 1000)) + 0.1
    if count >= 4:
        if k:
            labels[0] = targets.ids[0, k - 1]
        labels[2] = -100
        ce_weights[3] = kd_weights[3] = 0.0
    if count >= 7:
        ce_weights[5] = kd_weights[6] = 0.0
    return Case(
        hidden=normal(count, size).to(dtype),
        weight=(normal(vocabulary + padding, size) * spread / size**0.5).to(dtype),
        bias=(normal(vocabulary + padding) * 0.3).to(dtype) if with_bias else None,
        targets=targets,
        labels=labels,
        ce_weights=ce_weights,
        kd_weights=kd_weights,
        objective=wanted,
        head=HeadTransform(vocabulary_size=vocabulary, scale=scale, softcap=softcap),
    )


@dataclass
class Result:
    """Values and gradients of one computation."""

    loss: Tensor
    kd: Tensor
    ce: Tensor
    agreement: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def _mass(logits: Tensor, chosen: list[int]) -> Tensor:
    """log of the softmax mass of some ids, summed directly."""
    if not chosen:
        return torch.tensor(-torch.inf, dtype=torch.float64)
    return logits[chosen].logsumexp(0) - logits.logsumexp(0)


def _position_kd(z: Tensor, case: Case, t: int) -> Tensor:
    """KD of one position, T^2 included, from the definitions."""
    targets, wanted = case.targets, case.objective
    assert targets is not None
    temperature, k = wanted.temperature, targets.head_logprobs.shape[1]
    u = z / temperature
    head = [int(v) for v in targets.ids[t, :k] if v >= 0]
    stored = [float(x) for v, x in zip(targets.ids[t, :k], targets.head_logprobs[t], strict=True) if v >= 0]
    unnormalised = torch.tensor([x / temperature for x in stored], dtype=torch.float64).exp()
    rest = targets.log_rest[t].double().exp()
    total = unnormalised.sum() + rest
    p, p_rest = unnormalised / total, rest / total
    log_q = u - u.logsumexp(0)

    def relative_entropy(first: Tensor, second: Tensor) -> Tensor:
        some = first > 0
        return (first[some] * (first[some].log() - second[some].log())).sum()

    def divergence(teacher: Tensor, log_student: Tensor) -> Tensor:
        student, share = log_student.exp(), wanted.mixture
        if wanted.divergence == "jensen_shannon":
            middle = share * teacher + (1 - share) * student
            ours, theirs = relative_entropy(student, middle), relative_entropy(teacher, middle)
            return share * theirs + (1 - share) * ours
        if wanted.divergence == "skewed_forward_kl":
            return relative_entropy(teacher, share * teacher + (1 - share) * student)
        if wanted.divergence == "skewed_reverse_kl":
            return relative_entropy(student, (1 - share) * teacher + share * student)
        if wanted.divergence == "forward_kl":
            some = teacher > 0
            return (teacher[some] * (teacher[some].log() - log_student[some])).sum()
        if wanted.divergence == "reverse_kl":
            some = log_student > -torch.inf
            return (log_student[some].exp() * (log_student[some] - teacher[some].log())).sum()
        assert wanted.divergence == "total_variation"
        return (teacher - log_student.exp()).abs().sum() / 2

    if wanted.target_mode == "sampled":
        n = sum(float(times) for times in targets.tail_counts[t])
        value = -targets.entropy[t].double() - (p * log_q[head]).sum()
        for v, times in zip(targets.ids[t, k:], targets.tail_counts[t], strict=True):
            if v >= 0:
                value = value - p_rest * float(times) / n * log_q[int(v)]
    elif wanted.target_mode == "tail_bucket":
        outside = [v for v in range(z.numel()) if v not in set(head)]
        value = divergence(torch.cat([p, p_rest[None]]), torch.cat([log_q[head], _mass(u, outside)[None]]))
    elif wanted.target_mode == "renormalized":
        value = divergence(p / p.sum(), u[head] - u[head].logsumexp(0))
    else:
        assert wanted.target_mode == "truncated"
        value = divergence(p, log_q[head])
    return value * temperature**2


def dense(case: Case) -> Result:
    """The oracle: float64, one position after another, gradients by autograd."""
    wanted, head = case.objective, case.head
    hidden = case.hidden.double().requires_grad_()
    weight = case.weight.double().requires_grad_()
    bias = None if case.bias is None else case.bias.double().requires_grad_()
    size = head.vocabulary_size
    kd, ce, agreement = [], [], []
    loss = torch.zeros((), dtype=torch.float64)
    for t in range(hidden.shape[0]):
        of_ce, of_kd = float(case.ce_weights[t]), float(case.kd_weights[t])
        if of_ce == of_kd == 0:
            for values in (kd, ce, agreement):
                values.append(torch.zeros((), dtype=torch.float64))
            continue
        z = weight[:size] @ hidden[t]
        if bias is not None:
            z = z + bias[:size]
        z = z * head.scale
        if head.softcap is not None:
            z = head.softcap * torch.tanh(z / head.softcap)
        here = torch.zeros((), dtype=torch.float64)
        if wanted.kd_weight and case.targets is not None and of_kd:
            here = _position_kd(z, case, t)
        there = plain = torch.zeros((), dtype=torch.float64)
        if case.labels[t] >= 0 and of_ce:
            truth = torch.full((size,), wanted.label_smoothing / size, dtype=torch.float64)
            truth[case.labels[t]] += 1 - wanted.label_smoothing
            plain = z.logsumexp(0) - z[case.labels[t]]
            there = -(truth * (z - z.logsumexp(0))).sum() + wanted.z_loss * z.logsumexp(0) ** 2
        loss = loss + of_kd * wanted.kd_weight * here + of_ce * wanted.ce_weight * there
        unread = case.targets is None or not case.targets.head_size or not of_kd
        top = -2 if unread else int(case.targets.ids[t, 0])
        kd.append(here.detach())
        ce.append(plain.detach())
        agreement.append(torch.tensor(float(int(z.argmax()) == top), dtype=torch.float64))
    leaves = [hidden, weight] + ([] if bias is None else [bias])
    found: tuple[Tensor, ...] = tuple(torch.zeros_like(leaf) for leaf in leaves)
    if loss.requires_grad:
        found = torch.autograd.grad(loss, leaves)
    empty = torch.zeros(0, dtype=torch.float64)
    return Result(
        loss.detach(),
        torch.stack(kd) if kd else empty,
        torch.stack(ce) if ce else empty,
        torch.stack(agreement) if agreement else empty,
        found[0],
        found[1],
        found[2] if bias is not None else None,
    )


def call(
    case: Case, impl: str, *, chunk: int | None = None, frozen: tuple[str, ...] = (), shard: Any = None
) -> Any:
    """(LossOutput, leaves by name) of the package, on the implementation's device.

    "torch/slices" and "triton/slices" are the low-memory mode, in slices of SLICE_COLUMNS.
    """
    device = device_of(impl)
    impl, _, mode = impl.partition("/")
    if mode == "slices":
        with unittest.mock.patch.object(loss_module, "plan_memory", _plan_of_slices):
            return call(case, impl, frozen=frozen, shard=shard)
    chunk = None if impl == "reference" else chunk
    leaves = {"hidden": case.hidden, "weight": case.weight}
    if case.bias is not None:
        leaves["bias"] = case.bias
    leaves = {
        name: value.detach().clone().to(device).requires_grad_(name not in frozen)
        for name, value in leaves.items()
    }
    targets = case.targets
    output = sparse_kd_loss(
        leaves["hidden"],
        leaves["weight"],
        bias=leaves.get("bias"),
        targets=None if targets is None else SparseTargets(*(value.to(device) for value in targets)),
        labels=case.labels.to(device),
        ce_weights=case.ce_weights.to(device),
        kd_weights=case.kd_weights.to(device),
        objective=case.objective,
        head=case.head,
        impl=impl,
        chunk_positions=chunk,
        shard=shard,
    )
    return output, leaves


def measured(
    case: Case, impl: str, *, chunk: int | None = 3, upstream: float = 1.0, shard: Any = None
) -> Result:
    """The package's values, and its gradients divided by the upstream gradient they were made with."""
    output, leaves = call(case, impl, chunk=chunk, shard=shard)
    assert isinstance(output, LossOutput)
    (output.loss * upstream).backward()

    def gradient(name: str) -> Tensor | None:
        leaf = leaves.get(name)
        if leaf is None:
            return None
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
        return leaf.grad.double().cpu() / upstream

    values = (value.detach().double().cpu() for value in output)
    return Result(*values, gradient("hidden"), gradient("weight"), gradient("bias"))


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius distance; NaN and inf count as infinitely far."""
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    scale = expected.norm()
    return float((found - expected).norm() / (scale if scale > 0 else 1.0))


def check(found: Result, expected: Result, bound: float, value_bound: float = 1e-5) -> None:
    """Assert every value within `value_bound` and every gradient within `bound`, by relative norm."""
    errors = {
        name: relative(getattr(found, name), getattr(expected, name))
        for name in ("loss", "kd", "ce", "hidden", "weight", "bias")
        if getattr(expected, name) is not None
    }
    limits = {name: value_bound if name in ("loss", "kd", "ce") else bound for name in errors}
    far = {name: error for name, error in errors.items() if not error <= limits[name]}
    assert not far, f"relative errors {far}, bounds {limits}"
    assert torch.equal(found.agreement, expected.agreement)
