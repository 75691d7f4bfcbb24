"""What the loss says it reads of a record is what it reads: nothing more, which may be missing, nor less."""

import pytest
import torch

from sparsekd.kernels.objective import DIVERGENCES, needed_planes
from sparsekd.kernels.targets import SparseTargets
from sparsekd.kernels.temperature import grid_column, rest_at_temperature, rest_formula
from sparsekd.kernels.triton_assess import FUSED_MODES

GRID = (1.0, 2.0, 4.0)
COUNT, VOCABULARY = 6, 53
OUTPUTS = ("loss", "kd", "ce", "agreement", "hidden", "weight")
CASES = (
    *((k, "sampled", "forward_kl", temperature) for k in (0, 5) for temperature in (1.0, 2.0)),
    *((5, "truncated", "forward_kl", temperature) for temperature in (1.0, 3.0)),
    *((5, mode, divergence, 3.0) for mode in ("tail_bucket", "renormalized") for divergence in DIVERGENCES),
    (5, "tail_bucket", "forward_kl", 4.0),
    (5, "renormalized", "reverse_kl", 1.0),
)
# The interpreter is slow, and only what is one kernel is not the plain functions again.
FUSED = tuple(case for case in CASES if case[1] in FUSED_MODES and case[2] == "forward_kl")


def record_planes(oracle, *, k, n, temperature):
    """A store's planes of COUNT positions of a dense teacher."""
    generator = torch.Generator().manual_seed(70)
    logits = torch.randn(COUNT, VOCABULARY, generator=generator, dtype=torch.float64) * 2
    targets = oracle.record(logits, k=k, n=n, temperature=temperature, generator=generator)
    rest = logits.log_softmax(1).scatter(1, targets.ids[:, :k], -torch.inf)
    law = rest.softmax(1)
    return {
        "head_ids": targets.ids[:, :k],
        "head_logprobs": targets.head_logprobs,
        "tail_ids": targets.ids[:, k:],
        "tail_counts": targets.tail_counts,
        "log_rest": torch.stack([(rest / point).logsumexp(1) for point in GRID], 1).float(),
        "rest_entropy": -(law * law.clamp_min(1e-300).log()).sum(1).float(),
        "entropy": targets.entropy,
    }


def targets_of(planes, formula):
    return SparseTargets(
        ids=torch.cat([planes["head_ids"], planes["tail_ids"]], 1),
        head_logprobs=planes["head_logprobs"],
        tail_counts=planes["tail_counts"],
        log_rest=rest_at_temperature(formula, planes["log_rest"], planes["rest_entropy"]),
        entropy=planes["entropy"],
    )


def other(name, value):
    """Legal values that are not those of the plane."""
    if name == "head_ids":
        return value.roll(1, 0)
    if name == "tail_ids":
        return torch.where(value >= 0, (value + 1) % VOCABULARY, -1)
    if name == "tail_counts":
        return value * torch.arange(1.0, value.shape[1] + 1)
    # No common shift, which a renormalisation would not notice.
    return value * 1.5


@pytest.mark.parametrize(
    ("impl", "k", "mode", "divergence", "temperature"),
    [
        *((impl, *case) for impl in ("reference", "torch") for case in CASES),
        *(("triton", *case) for case in FUSED),
    ],
)
def test_neither_more_nor_less_is_read(oracle, impl, k, mode, divergence, temperature):
    case = oracle.make_case(
        seed=70,
        count=COUNT,
        k=k,
        target_mode=mode,
        divergence=divergence,
        mixture=0.3,
        temperature=temperature,
    )
    planes = record_planes(oracle, k=k, n=6, temperature=temperature)
    formula = rest_formula(temperature, temperatures=GRID, rest_size=VOCABULARY - k)
    on_grid = grid_column(temperature, GRID) is not None
    needed = needed_planes(case.objective, k=k, n=6, on_grid=on_grid)
    assert needed <= planes.keys()

    def outputs(given):
        found = oracle.measured(case.change(targets=targets_of(given, formula)), impl)
        return [getattr(found, name) for name in OUTPUTS]

    whole = outputs(planes)
    # What is not needed may be missing: nothing is there but fill.
    unread = {name: torch.zeros_like(value) for name, value in planes.items() if name not in needed}
    unread |= {name: value - 1 for name, value in unread.items() if name.endswith("_ids")}
    assert all(torch.equal(one, two) for one, two in zip(whole, outputs(planes | unread), strict=True))
    for name in needed:
        changed = outputs(planes | {name: other(name, planes[name])})
        assert not all(torch.equal(one, two) for one, two in zip(whole, changed, strict=True)), name


def test_the_baseline_reads_no_plane(oracle):
    for k, n in ((0, 0), (5, 6), (0, 6), (5, 0)):
        assert needed_planes(oracle.objective(kd_weight=0.0), k=k, n=n, on_grid=False) == frozenset()


def test_what_each_mode_reads(oracle):
    head, tail = {"head_ids", "head_logprobs"}, {"tail_ids", "tail_counts"}
    for mode, k, on_grid, expected in (
        ("tail_bucket", 5, True, head | {"log_rest"}),
        ("tail_bucket", 5, False, head | {"log_rest", "rest_entropy"}),
        ("truncated", 5, False, head | {"log_rest", "rest_entropy"}),
        ("renormalized", 5, False, head),
        ("sampled", 5, True, head | tail | {"log_rest", "entropy"}),
        ("sampled", 0, True, tail | {"entropy"}),
    ):
        found = needed_planes(oracle.objective(target_mode=mode), k=k, n=6, on_grid=on_grid)
        assert found == expected, mode
    with pytest.raises(ValueError, match="no draws"):
        needed_planes(oracle.objective(target_mode="sampled"), k=5, n=0, on_grid=True)
