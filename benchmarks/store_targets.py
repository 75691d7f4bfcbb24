"""The store's targets beside what was found, in one table.

They speak of rows of 4,096 positions at V = 128,256; at other sizes the table is printed, too, without a
verdict. `before`: of the last code that kept a record at every position, commit 303d1fe; ratios are means of
four runs' medians on a busy machine, within 0.06 of one another (write: 1.047 to 1.064, so 1.03 is no less).
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from page import table
from store_data import DRAWN, THINNED
from store_errors import nats
from store_measure import Measured, Pair
from store_ours import RAGGED_MASS

DEFAULT, PLAIN, RAGGED = "tkq8 (default)", "plain", f"compact, ragged to {RAGGED_MASS}"
HYBRID, HYBRID_WITH = f"tkq8, {DRAWN[0]}", f"tkq8, {replace(DRAWN[0], tail_logprobs=True)}"
IN_PART, IN_PART_WITH = (f"{name}, planes of `sampled`" for name in (HYBRID, HYBRID_WITH))
PARQUET, MEGATRON = "Parquet int32 + fp16, byte-stream-split, zstd-3", "Megatron-LM"


@dataclass(frozen=True)
class SizeTarget:
    """Bytes per token at most: of a contestant on a data set."""

    name: str
    data: str
    contestant: str
    most: float
    before: float


SIZES = (
    SizeTarget("default, text-like ids", "text", DEFAULT, 147.2, 145.8),
    SizeTarget("default, nearly uniform ids", "uniform", DEFAULT, 182, 174.2),
    SizeTarget("plain", "text", PLAIN, 222, 218.6),
    SizeTarget("compact, ragged", "text", RAGGED, 102, 94.9),
    SizeTarget("hybrid", "text", "tkq8, k=8, n=24", 61.8, 61.2),
    SizeTarget("hybrid, half the draws", "text", "tkq8, k=8, n=12", 50.0, 49.6),
    SizeTarget("draws alone", "text", "tkq8, k=0, n=50", 28.1, 27.9),
    SizeTarget("hybrid, with log-probabilities", "text", "tkq8, k=8, n=24 with log-probabilities", 85, 80.5),
    SizeTarget(
        "hybrid, half the draws, with them", "text", "tkq8, k=8, n=12 with log-probabilities", 64, 61.4
    ),
    SizeTarget("draws alone, with them", "text", "tkq8, k=0, n=50 with log-probabilities", 48, 41.3),
    SizeTarget("default, 60 % prompts", "text", f"tkq8, {THINNED[0]}", 61, 145.8),
    SizeTarget("hybrid, half the draws, 60 % prompts", "text", f"tkq8, {THINNED[1]}", 22, 49.6),
    SizeTarget("hybrid, half the draws, a scattered quarter", "text", f"tkq8, {THINNED[2]}", 15, 49.6),
)


@dataclass(frozen=True)
class RatioTarget:
    """A speed as a multiple of another's in the same turns, at least."""

    name: str
    pair: Pair
    least: float
    before: float


RATIOS_SET = "text"
RATIOS = (
    RatioTarget("read, default / Parquet byte-stream-split", Pair("read", DEFAULT, PARQUET), 1.3, 1.38),
    RatioTarget("write, default / Parquet byte-stream-split", Pair("write", DEFAULT, PARQUET), 1.03, 1.05),
    RatioTarget("read, plain / Megatron-LM", Pair("read", PLAIN, MEGATRON), 1.4, 1.45),
    RatioTarget("read, planes of `sampled` / whole row, hybrid", Pair("read", IN_PART, HYBRID), 1.2, 1.0),
    # What `sampled` does not need of the first is two numbers a position; of this one, all draws' values.
    RatioTarget("the same, with log-probabilities", Pair("read", IN_PART_WITH, HYBRID_WITH), 1.2, 1.0),
)

KL_MOST = (2e-5, 6e-5, 1e-4)
"""Mean, 99.9th percentile and largest KL of the default codec, nats."""

KL_HOT_MOST = 3e-5
"""Mean at the other temperatures of the grid."""

KL_BEFORE, KL_HOT_BEFORE = "1.4e-5 / 4.1e-5 / 7.3e-5", "4.0e-6"
TARGET_VOCABULARY, TARGET_LENGTH = 128_256, 4096
TargetRow = tuple[str, str, str, str, bool]
"""Target, what is wanted, what was found before, what is found, whether that is enough."""


def targets(sets: Sequence[Measured]) -> list[str]:
    """The table in Markdown."""
    by_name = {measured.data.name: measured for measured in sets}
    shapes = {(one.data.vocabulary, one.data.length) for one in sets if one.data.name in ("text", "uniform")}
    at_scale = shapes == {(TARGET_VOCABULARY, TARGET_LENGTH)}
    found = [*_sizes(by_name), *_errors(by_name), *_ratios(by_name)]
    exact = all(result.errors.exact_ids for one in sets for result in one.results if result.is_ours)
    rows = [[*words, _verdict(met) if at_scale else "other sizes"] for *words, met in found]
    rows.append(["ids and counts bit-exact, every codec and data set", "all", "all", "", _verdict(exact)])
    return table(("target", "wanted", "before", "found", "met"), rows, words=(0, 4))


def _verdict(met: bool) -> str:
    return "yes" if met else "**no**"


def _sizes(sets: dict[str, Measured]) -> Iterator[TargetRow]:
    for target in SIZES:
        found = sets[target.data].result(target.contestant).bytes_per_token
        name, most, before = f"bytes/token, {target.name}", f"<= {target.most:g}", f"{target.before:g}"
        yield name, most, before, f"{found:.1f}", found <= target.most


def _errors(sets: dict[str, Measured]) -> Iterator[TargetRow]:
    for name in ("text", "uniform"):
        errors = sets[name].result(DEFAULT).errors
        found = (errors.kl.mean(), float(np.quantile(errors.kl, 0.999)), errors.kl.max())
        met = all(value <= bound for value, bound in zip(found, KL_MOST, strict=True))
        wanted, shown = (" / ".join(map(nats, values)) for values in (KL_MOST, found))
        yield f"KL, default, {name}: mean / p99.9 / max", f"<= {wanted}", KL_BEFORE, shown, met
        hot, most = float(errors.kl_hot.mean()), KL_HOT_MOST
        yield f"KL at T 2, 4, default, {name}", f"<= {nats(most)}", KL_HOT_BEFORE, nats(hot), hot <= most


def _ratios(sets: dict[str, Measured]) -> Iterator[TargetRow]:
    for target in RATIOS:
        ratios = sorted(sets[RATIOS_SET].ratios[target.pair])
        found = statistics.median(ratios)
        low, high = (ratios[round(share * (len(ratios) - 1))] for share in (0.2, 0.8))
        shown = f"{found:.2f} ({low:.2f} to {high:.2f})"
        yield target.name, f">= {target.least:g}", f"{target.before:.2f}", shown, found >= target.least
