"""A page about a store for people: what it is, how much, what the teacher said, a few positions with text.

Shapes: M recorded positions of a row, G grid temperatures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.manifest import FeatureSpec, Manifest
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.row import IGNORED_LABEL, NO_ID, Row, TeacherRecord, labels_at_records, labels_of
from sparsekd.logit_store.spacing import evenly
from sparsekd.logit_store.tools.spelling import spelling_tokenizer

CONTEXT_TOKENS = 12
CANDIDATES_SHOWN = 6
SOURCES_SHOWN = 4

REST_NOTES = {
    "exact": "",
    "derived": "imported without a rest: its mass is 1 - the head's sum, entropies are lower bounds",
    "unknown": "imported without a normaliser: the head sums to 1, for target_mode=renormalized only",
    "counts": "imported draws alone: the teacher's loss and entropies are unknown, KD is up to its entropy",
}
"""What people must know of records that a capture of sparsekd did not make."""

RULE_NOTES = {
    "counted": "at every position that the loss counts",
    "all": "at every position but padding",
    "masked": "at every masked position",
    "sampled": "at {share:.4g} of the positions that the loss counts in train, chosen evenly by the text; "
    "the loss weighs them by the inverse",
}
"""Where records stand, by the manifest's rule."""

TARGET_NOTES = {
    "next_token": "the token that follows in the document",
    "masked_token": "the token that belongs at the masked position",
    "class": "one class for a document",
}
"""What a label is, by the manifest's target."""


@dataclass(frozen=True)
class RecordMeans:
    """Means over the positions of some rows that the loss counts and that have a record.

    Attributes:
        rows: that were read.
        positions: that were counted.
        tail_mass: float64 [G], probability outside the head at each temperature of the grid.
        teacher_nll: nats, of the true token.
        entropy: nats, at the draw temperature.
        rest_entropy: nats, of the rest at temperature 1.
        distinct_draws: ids among the n draws.
        true_in_head: share of positions whose true token is in the head.
    """

    rows: int
    positions: int
    tail_mass: NDArray[np.float64]
    teacher_nll: float
    entropy: float
    rest_entropy: float
    distinct_draws: float
    true_in_head: float


def tail_masses(record: TeacherRecord, temperatures: Sequence[float]) -> NDArray[np.float64]:
    """Returns R_T / (A_T + R_T), float64 [M, G], with A_T the head's sum of exp(log-probability / T)."""
    masses = np.empty(record.log_rest.shape)
    for column, temperature in enumerate(temperatures):
        head = np.exp(record.head_logprobs.astype(np.float64) / temperature).sum(axis=1)
        rest = np.exp(record.log_rest[:, column].astype(np.float64))
        masses[:, column] = rest / (head + rest)
    return masses


def record_means(rows: Sequence[Row], temperatures: Sequence[float], target: str) -> RecordMeans | None:
    """Returns means over rows with teacher records; None where no position is counted."""
    columns: list[NDArray[np.float64]] = []
    for row in rows:
        record = row.teacher
        assert record is not None and row.recorded is not None
        labels = labels_at_records(row, target)[:, None]
        values = [
            -record.true_logprob,
            record.entropy,
            record.rest_entropy,
            (record.tail_ids != NO_ID).sum(axis=1),
            (record.head_ids == labels).any(axis=1),
        ]
        every = np.column_stack([*values, tail_masses(record, temperatures)])
        columns.append(every[row.loss_mask[row.recorded]])
    together = np.concatenate(columns)
    if not len(together):
        return None
    nll, entropy, rest_entropy, distinct, in_head, *tail = together.mean(axis=0)
    return RecordMeans(
        rows=len(rows),
        positions=len(together),
        tail_mass=np.array(tail),
        teacher_nll=float(nll),
        entropy=float(entropy),
        rest_entropy=float(rest_entropy),
        distinct_draws=float(distinct),
        true_in_head=float(in_head),
    )


def inspect_text(path: StorePath, *, positions: int = 4, sample_rows: int = 64) -> str:
    """Returns the page.

    Args:
        path: of a sealed store.
        positions: how many decoded positions to show.
        sample_rows: how many rows of each split to read, spread evenly; the page says how many it read.

    Raises:
        StoreError: there is no readable store.
    """
    store = open_store(path)
    samples = {split: _sample(store, split, sample_rows) for split in store.manifest.splits}
    parts = [_title(store), identity(store.manifest), _amounts(store), plane_table(store)]
    if store.manifest.teacher is not None:
        parts.append(_means_table(store, samples))
    if positions > 0:
        parts.append(_examples(store, samples, positions))
    return "\n\n".join(part for part in parts if part) + "\n"


def _sample(store: LogitStore, split: str, count: int) -> dict[int, Row]:
    """Returns {row number: row} for at most `count` rows spread over a split."""
    return {index: store.read_row(split, index) for index in evenly(store.rows(split), count)}


def _title(store: LogitStore) -> str:
    kind = "logit store" if store.manifest.teacher is not None else "token store (no teacher planes)"
    return f"{kind}  {store.path}\nformat {store.manifest.format_version}, sealed, digest {store.digest}"


def identity(manifest: Manifest) -> str:
    """Returns the section on what a store holds and where that came from."""
    tokenizer, record, teacher = manifest.tokenizer, manifest.record, manifest.teacher
    classes = (
        "" if manifest.outcomes is None else f" of {len(manifest.outcomes):,}: {_some(manifest.outcomes)}"
    )
    pairs: list[tuple[str, str]] = [("target", TARGET_NOTES[manifest.target] + classes)]
    if teacher is not None:
        revision = f" at {teacher.revision}" if teacher.revision else ""
        versions = ", ".join(f"{name} {version}" for name, version in sorted(teacher.versions.items()))
        grid = ", ".join(f"{value:g}" for value in record.temperatures)
        draws = (
            f" + {record.n} draws at T = {record.draw_temperature:g} (seed {record.seed})" if record.n else ""
        )
        pairs += [
            ("teacher", f"{teacher.name}{revision}, weights {teacher.weights_digest[:12]}"),
            ("", f"{teacher.dtype}, logits in {teacher.logits_dtype}, by {teacher.engine}"),
            ("", versions),
            ("record", f"k = {record.k} exact head entries, n = {record.n}{draws}"),
            ("", RULE_NOTES[record.positions].format(share=record.share)),
            ("", f"log R at T = {grid}"),
            *(
                ("features" if spec is manifest.features[0] else "", _feature_text(spec))
                for spec in manifest.features
            ),
            ("", REST_NOTES[record.rest]),
        ]
    else:
        pairs.append(("record", "tokens, loss mask and documents only (k = 0, n = 0)"))
    template = (
        f", chat template {tokenizer.chat_template_digest[:12]}" if tokenizer.chat_template_digest else ""
    )
    pairs += [
        (
            "tokenizer",
            f"{tokenizer.name}, {tokenizer.vocabulary_size:,} ids, {tokenizer.digest[:12]}{template}",
        ),
        ("rows", f"{manifest.sequence_length:,} tokens each, {manifest.rows_per_shard:,} per shard"),
        (
            "codec",
            manifest.codec.name + "".join(f", {k} = {v}" for k, v in manifest.codec.parameters.items()),
        ),
    ]
    pairs += [
        ("dataset" if line == 0 else "", text) for line, text in enumerate(_dataset_lines(manifest.dataset))
    ]
    return section("What it is", [f"{name:<10} {text}".rstrip() for name, text in pairs if text])


def _feature_text(spec: FeatureSpec) -> str:
    how = ""
    if spec.projection != "none":
        how = f" of {spec.source_width} ({spec.projection}, {spec.kept:.1%} of the variance)"
    where = "every position but padding" if spec.positions == "all" else "the recorded positions"
    return f"hidden states of layer {spec.layer}: {spec.width} numbers{how}, {spec.kind}, at {where}"


def _some(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > SOURCES_SHOWN else ""
    return ", ".join(names[:SOURCES_SHOWN]) + more


def _dataset_lines(dataset: dict[str, Any]) -> list[str]:
    lines = []
    for name, value in dataset.items():
        if isinstance(value, list) and len(value) > SOURCES_SHOWN:
            lines.append(f"{name}: {len(value):,} entries, the first {_short(value[0])}")
        else:
            lines.append(f"{name}: {_short(value)}")
    return lines


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list):
        return "; ".join(_short(item) for item in value) or "none"
    text = str(value)
    is_digest = len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)
    return text[:12] if is_digest else text


def _amounts(store: LogitStore) -> str:
    header = ["split", "shards", "rows", "tokens", "counted", "recorded", "padding", "documents", "bytes"]
    lines, totals = [], np.zeros(8, np.int64)
    for split in store.manifest.splits:
        index = store.index(split)
        counts = index.counts
        amounts = [index.shards, index.rows, counts.tokens, counts.tokens_counted]
        amounts += [counts.tokens_recorded, counts.tokens_padding, counts.segments, index.file_bytes]
        lines.append([split, *_amount_cells(amounts)])
        totals += np.array(amounts)
    if len(lines) > 1:
        lines.append(["all", *_amount_cells(totals.tolist())])
    note = "counted: by the loss; recorded: with a teacher's record; documents: whole ones and pieces"
    return section("How much", [*table(header, lines), note])


def _amount_cells(amounts: Sequence[int]) -> list[str]:
    shards, rows, tokens, counted, recorded, padding, documents, size = amounts
    share = f"{padding / tokens:.1%}" if tokens else "-"
    numbers = [f"{number:,}" for number in (shards, rows, tokens, counted, recorded)]
    return [*numbers, share, f"{documents:,}", f"{size:,}"]


def plane_table(store: LogitStore) -> str:
    """Returns the bytes per token of each plane, largest first, and of what is around them."""
    indices = [store.index(split) for split in store.manifest.splits]
    tokens = sum(index.counts.tokens for index in indices)
    size = sum(index.file_bytes for index in indices)
    planes = {name: sum(index.plane_bytes[name] for index in indices) for name in indices[0].plane_bytes}
    planes = dict(sorted(planes.items(), key=lambda item: -item[1]))
    planes["container"] = size - sum(planes.values())
    planes["all"] = size
    lines = [[name, f"{amount / tokens:.2f}", f"{amount / size:.1%}"] for name, amount in planes.items()]
    return section("Bytes per token", table(["plane", "bytes", "share"], lines))


def _means_table(store: LogitStore, samples: dict[str, dict[int, Row]]) -> str:
    record = store.manifest.record
    means = {
        split: record_means(list(rows.values()), record.temperatures, store.manifest.target)
        for split, rows in samples.items()
        if rows
    }
    present = {split: value for split, value in means.items() if value is not None}
    if not present:
        return section(
            "What the teacher said", ["no position of the rows that were read is counted by the loss"]
        )

    columns = list(present.values())
    lines = [
        ["teacher's loss (nats)", *(f"{mean.teacher_nll:.4f}" for mean in columns)],
        ["teacher's perplexity", *(f"{np.exp(mean.teacher_nll):.2f}" for mean in columns)],
        [f"entropy at T = {record.draw_temperature:g} (nats)", *(f"{mean.entropy:.4f}" for mean in columns)],
        ["entropy of the rest (nats)", *(f"{mean.rest_entropy:.4f}" for mean in columns)],
    ]
    if record.rest == "counts":
        lines = [[line[0], *("unknown" for _ in columns)] for line in lines]
    for grid, temperature in enumerate(record.temperatures):
        lines.append(
            [f"tail mass at T = {temperature:g}", *(f"{mean.tail_mass[grid]:.4f}" for mean in columns)]
        )
    if record.k:
        lines.append(["true token in the head", *(f"{mean.true_in_head:.1%}" for mean in columns)])
    if record.n:
        lines.append(
            [f"distinct ids of {record.n} draws", *(f"{mean.distinct_draws:.2f}" for mean in columns)]
        )
    lines.append(["rows read", *(f"{mean.rows:,}" for mean in columns)])
    lines.append(["positions", *(f"{mean.positions:,}" for mean in columns)])
    return section("What the teacher said, on average", table(["", *present], lines))


def _examples(store: LogitStore, samples: dict[str, dict[int, Row]], positions: int) -> str:
    speller = _speller(store)
    shown = {
        (split, index): row.loss_mask if row.recorded is None else row.loss_mask & row.recorded
        for split, rows in samples.items()
        for index, row in rows.items()
    }
    counted = [
        (split, index, samples[split][index], np.flatnonzero(places))
        for (split, index), places in shown.items()
        if places.any()
    ]
    if not counted:
        return ""
    lines: list[str] = []
    positions = min(positions, sum(len(places) for *_, places in counted))
    for number in range(positions):
        split, index, row, places = counted[number * len(counted) // positions]
        # Spread over the rows as well, at a place that is not always the same.
        place = int(places[(number + 1) * len(places) // (positions + 1)])
        lines += [*_example(store, split, index, row, place, speller), ""]
    return section("A few positions", lines[:-1])


def _example(
    store: LogitStore, split: str, index: int, row: Row, place: int, spell: Callable[[Sequence[int]], str]
) -> list[str]:
    outcomes = store.manifest.outcomes

    def spell_outcome(number: int) -> str:
        return spell([number]) if outcomes is None else outcomes[number]

    start = int(row.segment_starts[row.segment_starts <= place].max())
    first = max(start, place + 1 - CONTEXT_TOKENS)
    context = row.token_ids[first : place + 1].tolist()
    cut = "... " if first > start else ""
    true = int(labels_of(row, store.manifest.target)[place])
    named = "none" if true == IGNORED_LABEL else spell_outcome(true)
    lines = [f"{split}, row {index}, position {place}: {cut}{spell(context)}"]
    if row.teacher is None or row.recorded is None:
        return [*lines, f"    label  {named}"]
    record, place = row.teacher, int(np.count_nonzero(row.recorded[:place]))
    temperatures = store.manifest.record.temperatures
    known = store.manifest.record.rest != "counts"
    chance = f"{np.exp(record.true_logprob[place]):6.1%}" if known else "     ?"
    lines.append(f"    true   {chance}  {named}")
    ids, values = record.head_ids[place], np.exp(record.head_logprobs[place])
    for rank in range(min(CANDIDATES_SHOWN, int((ids != NO_ID).sum()))):  # a head may be cut short
        name = "head" if rank == 0 else ""
        mark = "  <- true" if ids[rank] == true else ""
        lines.append(f"    {name:<6} {values[rank]:6.1%}  {spell_outcome(int(ids[rank]))}{mark}")
    mass = ", ".join(
        f"{value:.1%} at T = {temperature:g}"
        for value, temperature in zip(tail_masses(record, temperatures)[place], temperatures, strict=True)
    )
    lines.append(f"    rest   {mass}")
    drawn = [
        (int(c), int(i)) for i, c in zip(record.tail_ids[place], record.tail_counts[place], strict=True) if c
    ]
    if drawn:
        drawn.sort(key=lambda pair: (-pair[0], pair[1]))
        some = ", ".join(f"{count}x {spell_outcome(token)}" for count, token in drawn[:CANDIDATES_SHOWN])
        lines.append(f"    drawn  {some}" + (", ..." if len(drawn) > CANDIDATES_SHOWN else ""))
    return lines


def _speller(store: LogitStore) -> Callable[[Sequence[int]], str]:
    """Returns what makes quoted text of ids; without tokenizer.json it shows the ids themselves."""
    tokenizer = spelling_tokenizer(store)
    if tokenizer is None:
        return lambda ids: "ids " + " ".join(str(number) for number in ids)
    # Quotes and escapes make spaces and line ends visible, which are tokens like any other.
    return lambda ids: repr(tokenizer.decode(list(ids), skip_special_tokens=False))


def section(title: str, lines: Sequence[str]) -> str:
    """Returns lines under an underlined title."""
    return "\n".join([title, "-" * len(title), *lines])


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Returns lines in which the first column is left-aligned and the others right-aligned."""
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [header, *lines]
    ]
