"""Legal combinations, and errors that name argument, found and expected."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from sparsekd.kernels.loss import default_impl
from sparsekd.kernels.objective import (
    DIVERGENCES,
    MIXTURE_DIVERGENCES,
    HeadTransform,
    Objective,
    resolve_objective,
)

AUTO = Objective(
    kd_weight=1.0,
    ce_weight=0.0,
    divergence="forward_kl",
    mixture=0.1,
    target_mode="auto",
    temperature=1.0,
    label_smoothing=0.0,
    z_loss=0.0,
)
GRID = (1.0, 2.0, 4.0)


def resolve(k, n, draw_temperature=1.0, **changes):
    return resolve_objective(
        replace(AUTO, **changes), k=k, n=n, temperatures=GRID, draw_temperature=draw_temperature
    )


def test_the_record_settles_the_mode():
    assert resolve(8, 12).target_mode == "sampled"
    assert resolve(0, 50).target_mode == "sampled"
    assert resolve(16, 0).target_mode == "tail_bucket"
    assert resolve(8, 12, target_mode="tail_bucket", temperature=4.0).temperature == 4.0
    assert resolve(8, 12, temperature=2.0, draw_temperature=2.0).target_mode == "sampled"
    assert resolve(8, 0, target_mode="renormalized", divergence="reverse_kl").divergence == "reverse_kl"


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_is_defined_between_outcomes(divergence):
    for mode in ("tail_bucket", "renormalized"):
        resolved = resolve(8, 12, target_mode=mode, divergence=divergence, temperature=2.0)
        assert (resolved.divergence, resolved.target_mode) == (divergence, mode)


def test_a_mixture_is_read_by_those_that_mix_alone():
    assert resolve(8, 0, mixture=7.0).mixture == 7.0
    for divergence in ("skewed_forward_kl", "skewed_reverse_kl"):
        assert resolve(8, 0, divergence=divergence, mixture=0.0).mixture == 0.0
    assert set(MIXTURE_DIVERGENCES) < set(DIVERGENCES)


def test_a_temperature_between_the_grid_s_is_taken():
    for temperature in (1.01, 1.5, 3.0, 3.99):
        assert resolve(8, 0, temperature=temperature).temperature == temperature
    assert resolve(8, 12, target_mode="tail_bucket", temperature=3.0).target_mode == "tail_bucket"


def test_cross_entropy_alone_takes_any_store():
    for k, n in ((0, 0), (16, 0), (0, 50)):
        resolved = resolve(k, n, kd_weight=0.0, ce_weight=1.0, temperature=3.0)
        assert resolved.kd_weight == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"k": 0, "n": 0}, ["kd_weight is 1.0", "k=0, n=0", "kd_weight=0"]),
        ({"k": 8, "n": 0, "target_mode": "sampled"}, ["target_mode", "n=0", "tail_bucket"]),
        ({"k": 0, "n": 8, "target_mode": "tail_bucket"}, ["target_mode", "k=0", "sampled"]),
        ({"k": 0, "n": 8, "target_mode": "renormalized"}, ["target_mode", "k=0", "sampled"]),
        ({"k": 8, "n": 8, "temperature": 2.0}, ["temperature=1", "found 2", "tail_bucket"]),
        ({"k": 0, "n": 8, "temperature": 2.0}, ["temperature=1", "found 2", "capture again"]),
        (
            {"k": 8, "n": 8, "divergence": "reverse_kl"},
            ["divergence 'reverse_kl'", "tail_bucket"],
        ),
        (
            {"k": 8, "n": 0, "target_mode": "truncated", "divergence": "reverse_kl"},
            ["divergence 'reverse_kl'", "truncated", "forward_kl"],
        ),
        ({"k": 8, "n": 0, "temperature": 4.5}, ["temperature is 4.5", "1, 2, 4", "from 1 to 4"]),
        ({"k": 8, "n": 0, "temperature": 0.9}, ["temperature is 0.9", "1, 2, 4", "from 1 to 4"]),
        ({"k": 8, "n": 8, "temperature": 3.0}, ["temperature=1", "found 3", "tail_bucket"]),
        ({"k": 8, "n": 0, "temperature": 0.0}, ["temperature is 0.0", "> 0"]),
        ({"k": 8, "n": 0, "divergence": "jeffreys"}, ["divergence is 'jeffreys'", "forward_kl"]),
        (
            {"k": 8, "n": 8, "target_mode": "sampled", "divergence": "jensen_shannon"},
            ["divergence 'jensen_shannon'", "sampled", "forward_kl", "tail_bucket"],
        ),
        (
            {"k": 8, "n": 0, "target_mode": "truncated", "divergence": "skewed_forward_kl"},
            ["divergence 'skewed_forward_kl'", "truncated", "forward_kl", "tail_bucket"],
        ),
        ({"k": 8, "n": 0, "divergence": "jensen_shannon", "mixture": 0.0}, ["mixture is 0.0", "(0, 1)"]),
        ({"k": 8, "n": 0, "divergence": "jensen_shannon", "mixture": 1.0}, ["mixture is 1.0", "(0, 1)"]),
        ({"k": 8, "n": 0, "divergence": "skewed_forward_kl", "mixture": 1.0}, ["mixture is 1.0", "[0, 1)"]),
        (
            {"k": 8, "n": 0, "divergence": "skewed_reverse_kl", "mixture": float("nan")},
            ["mixture is nan", "[0, 1)", "skewed_reverse_kl"],
        ),
        ({"k": 8, "n": 0, "target_mode": "top"}, ["target_mode is 'top'", "auto", "sampled"]),
        ({"k": 8, "n": 0, "label_smoothing": 1.0}, ["label_smoothing is 1.0", "[0, 1)"]),
        ({"k": 8, "n": 0, "z_loss": -1.0}, ["z_loss is -1.0", ">= 0"]),
        ({"k": 8, "n": 0, "kd_weight": float("nan")}, ["kd_weight is nan"]),
        ({"k": 8, "n": 0, "kd_weight": 0.0, "ce_weight": 0.0}, ["both 0"]),
    ],
    ids=str,
)
def test_illegal_objectives_name_a_legal_one(given, words):
    with pytest.raises(ValueError) as caught:
        resolve(**given)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden": torch.zeros(7, 3, 4)}, ["hidden's shape", "(7, 3, 4)"]),
        ({"hidden": torch.zeros(7, 12, dtype=torch.float16)}, ["hidden's dtype", "float16", "bfloat16"]),
        ({"weight": torch.zeros(57, 13)}, ["weight's shape", "(57, 13)", "12"]),
        ({"weight": torch.zeros(57, 12, dtype=torch.bfloat16)}, ["weight's dtype", "bfloat16", "float32"]),
        ({"bias": torch.zeros(53)}, ["bias's shape", "(53,)", "(57,)"]),
        ({"labels": torch.zeros(6, dtype=torch.int64)}, ["labels's shape", "(6,)", "(7,)"]),
        ({"labels": torch.zeros(7, dtype=torch.int32)}, ["labels's dtype", "int32", "int64"]),
        ({"ce_weights": torch.zeros(7, dtype=torch.float64)}, ["ce_weights's dtype", "float64", "float32"]),
        ({"kd_weights": torch.zeros(6)}, ["kd_weights's shape", "(6,)", "(7,)"]),
        ({"targets": None}, ["targets", "kd_weight"]),
        (
            {"head": HeadTransform(vocabulary_size=58, scale=1.0, softcap=None)},
            ["vocabulary_size is 58", "57"],
        ),
        ({"head": HeadTransform(vocabulary_size=53, scale=0.0, softcap=None)}, ["head.scale", "> 0"]),
        ({"head": HeadTransform(vocabulary_size=53, scale=1.0, softcap=0.0)}, ["head.softcap", "> 0"]),
        ({"objective": AUTO}, ["target_mode is 'auto'", "tail_bucket"]),
        ({"objective": replace(AUTO, target_mode="sampled")}, ["n=0", "tail_bucket"]),
        (
            {"objective": replace(AUTO, target_mode="tail_bucket", divergence="jensen_shannon", mixture=1.0)},
            ["mixture is 1.0", "(0, 1)"],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
def test_bad_arguments_are_named_alike(oracle, impl, change, words):
    case = oracle.make_case(n=0).change(**change)
    with pytest.raises(ValueError) as caught:
        oracle.call(case, impl)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_bad_record_shapes_are_named(oracle):
    case = oracle.make_case()
    for name, value in (
        ("ids", case.targets.ids[:, :7]),
        ("head_logprobs", case.targets.head_logprobs[:6]),
        ("tail_counts", case.targets.tail_counts.double()),
        ("log_rest", case.targets.log_rest[:, None]),
        ("entropy", case.targets.entropy[:3]),
    ):
        with pytest.raises(ValueError, match=r"targets\."):
            oracle.call(case.change(targets=case.targets._replace(**{name: value})), "torch")


def test_implementations_are_named(oracle):
    case = oracle.make_case()
    with pytest.raises(ValueError, match=r"impl is 'cuda', expected one of reference, torch, triton"):
        oracle.call(case, "cuda")
    with pytest.raises(ValueError, match=r"chunk_positions is 0, expected"):
        oracle.call(case, "torch", chunk=0)
    with pytest.raises(ValueError, match=r"float64.*triton"):
        oracle.call(oracle.make_case(dtype=torch.float64), "triton")
    assert default_impl(torch.device("cpu")) == "torch"


def test_triton_refuses_the_cpu_outside_the_interpreter(oracle, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = oracle.make_case()
    monkeypatch.setattr(oracle, "device_of", lambda impl: torch.device("cpu"))
    with pytest.raises(ValueError, match=r"device is cpu, expected cuda .*impl='torch'"):
        oracle.call(case, "triton")


def test_objective_needs_no_torch():
    code = "import sys, sparsekd.kernels.objective; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
