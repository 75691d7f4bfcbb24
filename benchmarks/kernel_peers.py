"""The contestants of the kernel benchmark: one adapter each, imported on use.

A contestant that cannot run says why, in its row. N positions, V vocabulary, H hidden.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import kernel_dense as dense
import torch
from kernel_cases import (
    CE_WEIGHT,
    GRID,
    KD_WEIGHT,
    CannotRunError,
    Inputs,
    Setting,
    our_loss,
    smaller_plans,
    teacher_record,
)
from torch import Tensor

from sparsekd.kernels.loss import default_impl

Step = Callable[[Inputs], tuple[Tensor, ...]]
Loss = Callable[[Inputs, Setting], Tensor]

FLOOR = "floor"
OURS = "ours"
LARGE_CHUNK = 4096  # positions; where its authors find Liger's fastest on an H200
TEACHER_PRODUCT = "one teacher product"


@dataclass(frozen=True)
class Peer:
    """A contestant.

    Attributes:
        name: of its row.
        prepare: the step to time, made for a setting and a device.
        needs: modules without which it cannot run; those that there are run on CUDA alone.
        truth: name of the loss in `kernel_dense.TRUTHS` that it computes, "record", or "" for none.
        subtract: name of the row whose time a second line takes off, or "".
        note: what to know when reading its row.
    """

    name: str
    prepare: Callable[[Setting, torch.device], Step]
    needs: tuple[str, ...] = ()
    truth: str = ""
    subtract: str = ""
    note: str = ""

    def available(self, device: torch.device) -> str | None:
        """Why it cannot run here, or None."""
        for module in self.needs:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
        if self.needs and device.type != "cuda":
            return "needs CUDA"
        return None


def contestants(table: str, device: torch.device) -> list[Peer]:
    """The contestants of a table, the floor first."""
    return {"A": _sparse, "B": _cross_entropy, "C": _live, "D": _record}[table](device)


def _gradients(loss: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    """Forward and backward end here: both gradients, nothing accumulated."""
    return torch.autograd.grad(loss, (inputs.hidden, inputs.weight))


def _from_loss(loss: Loss, *, compiled: bool = False) -> Callable[[Setting, torch.device], Step]:
    """A step from a loss in torch, compiled if asked for."""

    def prepare(setting: Setting, device: torch.device) -> Step:
        def of_inputs(inputs: Inputs) -> Tensor:
            return loss(inputs, setting)

        run = torch.compile(of_inputs, dynamic=False) if compiled else of_inputs
        return lambda inputs: _gradients(run(inputs), inputs)

    return prepare


def _ours(
    *,
    kd_weight: float = KD_WEIGHT,
    ce_weight: float = CE_WEIGHT,
    impl: str | None = None,
    memory: str = "rule",
) -> Callable[[Setting, torch.device], Step]:
    """A step with the package's loss.

    Args:
        kd_weight: 0 for cross-entropy alone.
        ce_weight: 0 for distillation alone.
        impl: None for the device's default.
        memory: "rule" for no budget, "slices" for the largest budget that chooses slices of the vocabulary
            (logits made twice), "least" for the smallest that works.
    """

    def prepare(setting: Setting, device: torch.device) -> Step:
        chosen = impl or default_impl(device)
        budget = None
        if memory != "rule":
            plans = smaller_plans(setting, chosen, device)
            sliced = [plan for plan in plans if plan.slice_columns]
            if not sliced:
                raise CannotRunError("whole rows need the least memory at this shape")
            budget = (sliced[0] if memory == "slices" else plans[-1]).peak_bytes

        def step(inputs: Inputs) -> tuple[Tensor, ...]:
            output = our_loss(
                inputs,
                setting,
                impl=chosen,
                kd_weight=kd_weight,
                ce_weight=ce_weight,
                memory_budget=budget,
            )
            return _gradients(output.loss / setting.positions, inputs)

        return step

    return prepare


@torch.no_grad()
def _three_products(inputs: Inputs) -> tuple[Tensor, ...]:
    """Logits, gradient of hidden and of weight as plain products, nothing between."""
    logits = inputs.hidden @ inputs.weight.T
    return logits @ inputs.weight, logits.T @ inputs.hidden


@torch.no_grad()
def _one_product(inputs: Inputs) -> tuple[Tensor, ...]:
    """The logits alone."""
    return (inputs.teacher_hidden @ inputs.weight.T,)


def _plain(step: Step) -> Callable[[Setting, torch.device], Step]:
    return lambda setting, device: step


THREE_PRODUCTS = Peer(FLOOR, _plain(_three_products), note="three plain matrix products")


def _sparse(device: torch.device) -> list[Peer]:
    """Table A."""
    chunk = 1024 if device.type == "cuda" else 128

    def chunked(inputs: Inputs, setting: Setting) -> Tensor:
        return dense.kd_ce_chunked(inputs, setting, chunk)

    peers = [
        THREE_PRODUCTS,
        Peer(OURS, _ours(), truth="kd_ce", note=f"impl {default_impl(device)}"),
        Peer(
            "ours, low memory",
            _ours(memory="slices"),
            truth="kd_ce",
            note="the widest slices of the vocabulary: four products",
        ),
        Peer(
            "ours, least memory",
            _ours(memory="least"),
            truth="kd_ce",
            note="the smallest memory_budget that works",
        ),
        Peer("ours, CE alone", _ours(kd_weight=0.0, ce_weight=1.0), truth="ce", note="kd_weight 0"),
        Peer("eager, scattered p", _from_loss(dense.kd_ce_scattered), truth="kd_ce", note="p as [N, V]"),
        Peer("eager, gathered q", _from_loss(dense.kd_ce_gathered), truth="kd_ce", note="leanest dense form"),
        Peer("compile, scattered p", _from_loss(dense.kd_ce_scattered, compiled=True), truth="kd_ce"),
        Peer("compile, gathered q", _from_loss(dense.kd_ce_gathered, compiled=True), truth="kd_ce"),
        Peer(
            "torch in chunks",
            _from_loss(chunked),
            truth="kd_ce",
            note=f"{chunk} positions, recomputed in backward: four products",
        ),
    ]
    if default_impl(device) != "torch":
        peers.insert(5, Peer("ours, impl torch", _ours(impl="torch"), truth="kd_ce"))
    return peers


def _cross_entropy(device: torch.device) -> list[Peer]:
    """Table B."""
    chunk = LARGE_CHUNK if device.type == "cuda" else 128
    return [
        THREE_PRODUCTS,
        Peer(
            OURS,
            _ours(kd_weight=0.0, ce_weight=1.0),
            truth="ce",
            note=f"impl {default_impl(device)}, kd_weight 0",
        ),
        Peer("eager", _from_loss(dense.ce), truth="ce"),
        Peer("compile", _from_loss(dense.ce, compiled=True), truth="ce"),
        Peer("Liger FLCE", _liger_ce(large=False), ("liger_kernel",), "ce", note="its default chunks"),
        Peer(
            "Liger FLCE, large chunks",
            _liger_ce(large=True),
            ("liger_kernel",),
            "ce",
            note=f"about {LARGE_CHUNK} positions",
        ),
        Peer("cut-cross-entropy, exact", _cut, ("cut_cross_entropy",), "ce", note="filter_eps None"),
        Peer("quack", _quack, ("quack",), "ce", note="chunked, default chunk"),
        Peer("torch linear_cross_entropy", _torch_fused(None), truth="ce", note="default options"),
        Peer(
            "torch linear_cross_entropy, large chunks",
            _torch_fused(chunk),
            truth="ce",
            note=f"{chunk} positions",
        ),
    ]


def _live(device: torch.device) -> list[Peer]:
    """Table C."""
    liger, extra = ("liger_kernel",), "dense forward KL; one teacher product more than the floor"
    return [
        THREE_PRODUCTS,
        Peer(
            OURS,
            _ours(kd_weight=1.0, ce_weight=0.0),
            truth="kd",
            note=f"impl {default_impl(device)}; from the record, no teacher product",
        ),
        Peer(
            "ours, record made first", _record_then_ours, truth="kd", note="teacher_statistics, then the loss"
        ),
        Peer(TEACHER_PRODUCT, _plain(_one_product), note="what the live peers do more"),
        Peer("eager", _from_loss(dense.live_kd), truth="live_kd", subtract=TEACHER_PRODUCT, note=extra),
        Peer("Liger fused JSD", _liger_jsd, liger, "live_kd", TEACHER_PRODUCT, f"beta 0: {extra}"),
        Peer(
            "Liger chunked JSD",
            _liger_chunked_jsd,
            liger,
            "live_kd",
            TEACHER_PRODUCT,
            f"beta 0, compiled: {extra}",
        ),
    ]


def _record(device: torch.device) -> list[Peer]:
    """Table D."""

    def ours(impl: str) -> Callable[[Setting, torch.device], Step]:
        def step(inputs: Inputs, setting: Setting) -> tuple[Tensor, ...]:
            found = teacher_record(
                inputs.teacher_hidden,
                inputs.weight.detach(),
                k=setting.k,
                temperatures=GRID,
                uniforms=inputs.uniforms,
                labels=inputs.labels,
                impl=impl,
            )
            return found.head_logprobs, found.log_rest

        return lambda setting, device: lambda inputs: step(inputs, setting)

    def eager(*, whole: bool) -> Callable[[Setting, torch.device], Step]:
        def prepare(setting: Setting, device: torch.device) -> Step:
            return lambda inputs: dense.record(inputs, setting, whole=whole)

        return prepare

    impl = default_impl(device)
    peers = [
        Peer(FLOOR, _plain(_one_product), note="one plain matrix product"),
        Peer(OURS, ours(impl), truth="record", note=f"impl {impl}"),
        Peer("eager, same record", eager(whole=True), truth="record", note="whole logits, multinomial"),
        Peer("eager, less", eager(whole=False), truth="record", note="topk, logsumexp, multinomial alone"),
    ]
    if impl != "torch":
        peers.insert(2, Peer("ours, impl torch", ours("torch"), truth="record"))
    return peers


def _record_then_ours(setting: Setting, device: torch.device) -> Step:
    """The record from the teacher's hidden states and at once the loss from it."""
    loss = _ours(kd_weight=1.0, ce_weight=0.0)(setting, device)

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        found = teacher_record(
            inputs.teacher_hidden,
            inputs.weight.detach(),
            k=setting.k,
            temperatures=(setting.temperature,),
            uniforms=inputs.uniforms[:, :0],
            impl=default_impl(device),
        )
        targets = inputs.targets._replace(
            ids=found.head_ids.long(),
            head_logprobs=found.head_logprobs,
            log_rest=found.log_rest[:, 0].contiguous(),
        )
        return loss(inputs._replace(targets=targets))

    return step


def _liger_ce(*, large: bool) -> Callable[[Setting, torch.device], Step]:
    def prepare(setting: Setting, device: torch.device) -> Step:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        # Its budget counts hidden states: a factor of f allows f N H / V positions in a chunk.
        factor = math.ceil(LARGE_CHUNK * setting.vocabulary / (setting.positions * setting.hidden))
        options = {"chunk_mem_const": max(1, factor)} if large else {}
        return lambda inputs: _gradients(
            liger_fused_linear_cross_entropy(inputs.hidden, inputs.weight, inputs.labels, **options), inputs
        )

    return prepare


def _liger_jsd(setting: Setting, device: torch.device) -> Step:
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        loss = liger_fused_linear_jsd(
            inputs.hidden,
            inputs.weight,
            inputs.teacher_hidden,
            inputs.weight.detach(),
            jsd_beta=0.0,
            temperature=setting.temperature,
        )
        return _gradients(loss if setting.temperature == 1.0 else loss * setting.temperature**2, inputs)

    return step


def _liger_chunked_jsd(setting: Setting, device: torch.device) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=setting.temperature
    )

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        loss = module(
            inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.weight.detach(), inputs.labels
        )
        return _gradients(loss if setting.temperature == 1.0 else loss * setting.temperature**2, inputs)

    return step


def _cut(setting: Setting, device: torch.device) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    return lambda inputs: _gradients(
        linear_cross_entropy(inputs.hidden, inputs.weight, inputs.labels, filter_eps=None), inputs
    )


def _quack(setting: Setting, device: torch.device) -> Step:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda inputs: _gradients(
        chunked_linear_cross_entropy(inputs.hidden, inputs.weight, inputs.labels), inputs
    )


def _torch_fused(chunk: int | None) -> Callable[[Setting, torch.device], Step]:
    def prepare(setting: Setting, device: torch.device) -> Step:
        fused = getattr(torch.nn.functional, "linear_cross_entropy", None)
        if fused is None or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            version = torch.__version__.split("+")[0]
            raise CannotRunError(f"torch {version} has no linear_cross_entropy in chunks")
        given: dict[str, Any] = {}
        if chunk is not None:
            given = {"batch_chunk_size": chunk, "chunking_method": None}
        options = torch.nn.LinearCrossEntropyOptions(**given)
        return lambda inputs: _gradients(
            fused(inputs.hidden, inputs.weight, inputs.labels, options=options), inputs
        )

    return prepare
