"""Two stores over the same text, position by position: codec against codec, teacher against teacher.

What is compared. Two records know different ids by name. The finest division of the vocabulary whose every
part has a mass that *both* know exactly is: each id that is in both heads, and one outcome for all other ids.
With S the shared ids, z_T = A_T + R_T and p_i = exp(l_i / T) / z_T of one store, q of the other:

    KL_T = sum_S p_i (log p_i - log q_i) + p_o (log p_o - log q_o),
    p_o  = (R_T + sum over the head without S of exp(l / T)) / z_T,          likewise q_o

This is a true divergence between the two teachers' distributions over that division: 0 for equal records, the
tail bucket's divergence where the heads hold the same ids, and never more than the divergence over the whole
vocabulary (joining outcomes cannot raise it). Draws are not looked at. Counted are the positions that both
loss masks count and both stores recorded.

Shapes: L counted positions of a row, k and m entries of the two heads, G common grid temperatures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs.quantise import without_deep
from sparsekd.logit_store.codecs.ragged import log_sum_exp
from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.row import Row, TeacherRecord, records_at
from sparsekd.logit_store.spacing import evenly
from sparsekd.logit_store.tools.derive import Progress, no_progress
from sparsekd.logit_store.tools.inspect import section, table
from sparsekd.logit_store.tools.spread import Spread

PERCENTILES = (50.0, 99.0, 99.9)

REST_CAVEATS = {
    "exact": "",
    "derived": "its rest is 1 - the head's sum, not measured: a divergence is as good as that, at T = 1 only",
    "unknown": "its rest is unknown, its head sums to 1: a divergence tells little, and may be inf",
    "counts": "it holds draws alone, which are not compared: its divergence is 0 or that of one outcome",
}
"""What people must know of a divergence from or to records that a capture of sparsekd did not make."""


@dataclass(frozen=True)
class Divergence:
    """The divergences at one temperature.

    Attributes:
        temperature: T.
        forward: KL(first || second) at each counted position, nats.
        backward: KL(second || first).
        worst: (split, row, position) of the largest forward divergence; None when no position is counted.
    """

    temperature: float
    forward: Spread
    backward: Spread
    worst: tuple[str, int, int] | None


@dataclass(frozen=True)
class Comparison:
    """What `compare_stores` found.

    Attributes:
        first: the first store.
        second: the second store.
        rows: that were read.
        positions: that were counted.
        divergences: one for each temperature that both grids hold.
        shared: mean share of the larger head that is in both.
        remainder: mean mass of the joined outcome at the first common temperature, in the first store.
        top_agrees: share of positions whose most likely ids are equal.
        true_difference: absolute difference of the true token's log-probabilities, nats.
    """

    first: LogitStore
    second: LogitStore
    rows: int
    positions: int
    divergences: tuple[Divergence, ...]
    shared: float
    remainder: float
    top_agrees: float
    true_difference: Spread

    def text(self) -> str:
        """Returns a page for people."""
        header = ["nats", "mean", *(f"p{percent:g}" for percent in PERCENTILES), "largest"]
        lines = []
        for item in self.divergences:
            for name, spread in (("first || second", item.forward), ("second || first", item.backward)):
                lines.append([f"KL({name}) at T = {item.temperature:g}", *_cells(spread)])
        lines.append(["true token, |difference|", *_cells(self.true_difference)])
        facts = [
            f"rows read         {self.rows:,}",
            f"positions counted {self.positions:,}",
            f"shared head ids   {self.shared:.2%} of the larger head",
            f"joined outcome    {self.remainder:.4f} of the first store's mass on average",
            f"most likely ids   equal at {self.top_agrees:.2%} of the positions",
            f"bytes per token   {bytes_per_token(self.first):.1f} and {bytes_per_token(self.second):.1f}",
        ]
        for item in self.divergences:
            if item.worst is not None:
                split, row, position = item.worst
                facts.append(f"largest at T = {item.temperature:<4g}{split}, row {row}, position {position}")
        note = "over the ids that both heads hold and one outcome for all others: a lower bound"
        names = [_name("first", self.first), _name("second", self.second)]
        caveats = [
            f"{which:<7} {caveat}"
            for which, store in (("first", self.first), ("second", self.second))
            if (caveat := REST_CAVEATS[store.manifest.record.rest])
        ]
        return "\n".join(
            [
                *names,
                *caveats,
                "",
                section("How far they are apart", [*table(header, lines), note]),
                "",
                *facts,
            ]
        )


def compare_stores(
    first: StorePath, second: StorePath, *, rows: int | None = None, progress: Progress = no_progress
) -> Comparison:
    """Compares the records of two stores over the same text.

    Args:
        first: a sealed store with k > 0.
        second: likewise.
        rows: rows of each split to read, spread evenly; None for all.
        progress: told of rows.

    Raises:
        StoreError: tokenizers, splits, lengths or tokens differ (naming the first row and position), a store
            has no head, or the grids have no temperature in common.
    """
    one, other = open_store(first), open_store(second)
    temperatures = _check_comparable(one, other)
    columns = [
        tuple(store.manifest.record.temperatures.index(value) for value in temperatures)
        for store in (one, other)
    ]
    forward = [Spread() for _ in temperatures]
    backward = [Spread() for _ in temperatures]
    highest: list[float] = [-1.0] * len(temperatures)
    worst: list[tuple[str, int, int] | None] = [None] * len(temperatures)
    true_difference = Spread()
    sums = np.zeros(3)
    places = [(split, index) for split in one.manifest.splits for index in evenly(one.rows(split), rows)]
    positions = 0
    for done, (split, index) in enumerate(places, start=1):
        left, right = one.read_row(split, index), other.read_row(split, index)
        _check_tokens(one, other, split, index, left, right)
        both = _counted_in_both(left, right)
        counted = np.flatnonzero(both)
        progress("rows", done, len(places))
        if not counted.size:
            continue
        one_record, other_record = records_at(left, both), records_at(right, both)
        shared = match_heads(one_record.head_ids, other_record.head_ids)
        for number, temperature in enumerate(temperatures):
            p = divided(one_record, shared, temperature, columns[0][number])
            q = divided(other_record, _turned(shared, other_record), temperature, columns[1][number])
            q = _in_order_of(q, shared)
            there = kl(p, q)
            forward[number].add(there)
            backward[number].add(kl(q, p))
            if there.max() > highest[number]:
                highest[number] = float(there.max())
                worst[number] = (split, index, int(counted[there.argmax()]))
            if number == 0:
                sums[1] += np.exp(p[:, -1]).sum()
        larger = max(one_record.head_ids.shape[1], other_record.head_ids.shape[1])
        sums[0] += (shared >= 0).sum() / larger
        sums[2] += (one_record.head_ids[:, 0] == other_record.head_ids[:, 0]).sum()
        with np.errstate(invalid="ignore"):
            difference = np.abs(one_record.true_logprob.astype(np.float64) - other_record.true_logprob)
        true_difference.add(np.where(np.isnan(difference), 0, difference))  # -inf in both
        positions += counted.size
    means = sums / max(positions, 1)
    divergences = tuple(
        Divergence(temperature, forward[number], backward[number], worst[number])
        for number, temperature in enumerate(temperatures)
    )
    return Comparison(
        first=one,
        second=other,
        rows=len(places),
        positions=positions,
        divergences=divergences,
        shared=float(means[0]),
        remainder=float(means[1]),
        top_agrees=float(means[2]),
        true_difference=true_difference,
    )


def match_heads(left: NDArray[np.int32], right: NDArray[np.int32]) -> NDArray[np.int64]:
    """Returns for each entry of `left` [L, k] its column in `right` [L, m], int64 [L, k]; -1 where it is not
    there."""
    order = np.argsort(right, axis=1, kind="stable")
    # One search for all positions: each gets a range of numbers of its own.
    span = np.int64(max(int(left.max()), int(right.max())) + 2)
    base = np.arange(len(left), dtype=np.int64)[:, None] * span + 1
    sorted_right = (np.take_along_axis(right, order, axis=1) + base).ravel()
    found = np.searchsorted(sorted_right, (left + base).ravel()).reshape(left.shape)
    found = np.minimum(found, sorted_right.size - 1)
    hit = (sorted_right[found] == left + base) & (left >= 0)  # below 0: an entry that is not used
    columns = order.ravel()[found]
    return np.where(hit, columns, -1)


def divided(
    record: TeacherRecord, shared: NDArray[np.int64], temperature: float, column: int
) -> NDArray[np.float64]:
    """Returns log-probabilities [L, k + 1] at T: entries that are shared, -inf for the others, the joined
    outcome.

    Args:
        record: at L positions.
        shared: [L, k], below 0 where the entry is not shared.
        temperature: T.
        column: of T in the record's grid.
    """
    # Without what some codecs store as -inf: where one store has it and the other has not, both count as 0.
    head = without_deep(record.head_logprobs).astype(np.float64) / temperature
    rest = record.log_rest[:, column].astype(np.float64)[:, None]
    whole = log_sum_exp(np.concatenate([head, rest], axis=1))[:, None]
    alone = shared < 0
    joined = log_sum_exp(np.concatenate([np.where(alone, head, -np.inf), rest], axis=1))[:, None]
    return np.concatenate([np.where(alone, -np.inf, head), joined], axis=1) - whole


def kl(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns sum p (log p - log q) over the last axis of log-probabilities [L, k + 1]; inf where q alone is
    0."""
    there = ~np.isneginf(p)
    with np.errstate(invalid="ignore"):
        terms = np.exp(p) * (p - q)
    # Rounding may leave a sum of equal distributions a hair below 0.
    return np.maximum(np.where(there, terms, 0.0).sum(axis=1), 0.0)


def bytes_per_token(store: LogitStore) -> float:
    """Returns the stored bytes of the shards over their tokens."""
    indices = [store.index(split) for split in store.manifest.splits]
    return sum(index.file_bytes for index in indices) / max(sum(index.counts.tokens for index in indices), 1)


def _counted_in_both(left: Row, right: Row) -> NDArray[np.bool_]:
    """Returns bool of the row's positions: the loss counts and a record stands, in both rows."""
    assert left.recorded is not None and right.recorded is not None
    return left.loss_mask & left.recorded & right.loss_mask & right.recorded


def _turned(shared: NDArray[np.int64], record: TeacherRecord) -> NDArray[np.int64]:
    """Returns for each entry of the second head whether it is shared: [L, m], 0 or -1."""
    turned = np.full((len(shared), record.head_ids.shape[1]), -1, np.int64)
    rows, columns = np.nonzero(shared >= 0)
    turned[rows, shared[rows, columns]] = 0
    return turned


def _in_order_of(q: NDArray[np.float64], shared: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns the second store's [L, m + 1] in the order of the first one's entries, [L, k + 1]."""
    picked = np.take_along_axis(q, np.maximum(shared, 0), axis=1)
    return np.concatenate([np.where(shared < 0, -np.inf, picked), q[:, -1:]], axis=1)


def _check_comparable(one: LogitStore, other: LogitStore) -> list[float]:
    """Returns the temperatures that both grids hold."""
    for store in (one, other):
        if store.manifest.record.k == 0:
            raise StoreError(f"{store.path} has no head (k = 0), so there is nothing to compare id by id.")
    pairs: list[tuple[str, object, object]] = [
        ("tokenizer.digest", one.manifest.tokenizer.digest[:12], other.manifest.tokenizer.digest[:12]),
        ("target", one.manifest.target, other.manifest.target),
        ("sequence_length", one.manifest.sequence_length, other.manifest.sequence_length),
        ("splits", one.manifest.splits, other.manifest.splits),
        *((f"rows of {split}", one.rows(split), other.rows(split)) for split in one.manifest.splits
          if split in other.manifest.splits),
    ]  # fmt: skip
    for name, left, right in pairs:
        if left != right:
            raise StoreError(
                f"{one.path} and {other.path} are not over the same text: {name} is {left} and {right}; "
                "compare stores that were captured from one token store."
            )
    common = [
        value for value in one.manifest.record.temperatures if value in other.manifest.record.temperatures
    ]
    if not common:
        raise StoreError(
            f"{one.path} and {other.path} have no temperature in common: "
            f"{list(one.manifest.record.temperatures)} and {list(other.manifest.record.temperatures)}."
        )
    return common


def _check_tokens(one: LogitStore, other: LogitStore, split: str, index: int, left: Row, right: Row) -> None:
    bad = np.flatnonzero(left.token_ids != right.token_ids)
    if bad.size:
        place = int(bad[0])
        raise StoreError(
            f"{one.path} and {other.path} are not over the same text: split {split}, row {index}, position "
            f"{place} holds token {left.token_ids[place]} and token {right.token_ids[place]}; compare "
            "stores that were captured from one token store."
        )


def _cells(spread: Spread) -> list[str]:
    values: Sequence[float] = [spread.mean, *(spread.percentile(p) for p in PERCENTILES), spread.maximum]
    return [f"{value:.3g}" if spread.count else "-" for value in values]


def _name(which: str, store: LogitStore) -> str:
    manifest = store.manifest
    teacher = manifest.teacher.name if manifest.teacher is not None else "none"
    return f"{which:<7} {store.path}: {teacher}, k = {manifest.record.k}, codec {manifest.codec.name}"
