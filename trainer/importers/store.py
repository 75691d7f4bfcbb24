"""From a source's documents to a sealed store: two passes, one to learn what there is, one to write it.

Documents stay whole, for the teacher saw each from its beginning: they are packed into rows, several to a row
where they fit, and what remains of a row is padding. A document that is longer than a row is cut at its end.
What is a row of a token store stays a row.

All importers write here alone; they know documents, not rows.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import CodecSpec, Manifest, RecordSpec, TeacherIdentity, TokenizerIdentity
from sparsekd.logit_store.manifest_checks import FORMAT_VERSION
from sparsekd.logit_store.places.files import sha256_of
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.row import (
    PADDING_DOCUMENT,
    RECORD_NAMES,
    Row,
    TeacherRecord,
    take_records,
    weight_runs,
    weights_of_positions,
)
from sparsekd.logit_store.tools.derive import Progress, no_progress, write_stream
from sparsekd.trainer.importers.document import NOT_LISTED, Document, Format, Source
from sparsekd.trainer.importers.records import put_in_order, record_of, record_of_draws

OPEN_ROWS = 8
"""Rows that wait for a document that fits: more waste less padding and hold more memory."""

SPLITS = ("train", "heldout")
"""Training asks for both; an import fills the first."""

NOT_GIVEN = {
    "derived": (
        "log R (1 - the sum of what is listed, at temperature 1 only)",
        "the entropies (lower bounds: what is not listed counts as one outcome)",
    ),
    "unknown": (
        "a normaliser: probabilities are relative to what is listed, for target_mode=renormalized only",
    ),
    "counts": (
        "probabilities: the draws are an unbiased estimate of them, for target_mode=sampled at temperature 1",
        "the entropies and the true tokens' log-probabilities (unknown: KD is up to the teacher's entropy)",
    ),
}
"""What a source lacks by its `rest`."""

TRUE_NOT_GIVEN = "log-probabilities of true tokens that are not listed (upper bounds)"


@dataclass(frozen=True)
class ImportSettings:
    """How a source becomes a store.

    Attributes:
        tokenizer: identity of the tokenizer that made the ids.
        tokenizer_files: its files.
        teacher: identity of the teacher, as far as it is known.
        codec: of the new store.
        sequence_length: L; None for the longest document.
        k: head entries, or draws of sampled ids; None for as many as every counted position lists.
        mask_short: leave positions that list fewer than k ids out of the loss, instead of refusing them.
        rows_per_shard: of the new store.

    Where the source's tokens are those of a token store, tokenizer, sequence length and rows per shard are
    that store's, and not looked at here.
    """

    tokenizer: TokenizerIdentity
    tokenizer_files: Path
    teacher: TeacherIdentity
    codec: CodecSpec
    sequence_length: int | None
    k: int | None
    mask_short: bool
    rows_per_shard: int


@dataclass(frozen=True)
class Survey:
    """What the first pass found.

    Attributes:
        documents: that have a counted position.
        skipped: documents without one.
        cut_tokens: tokens beyond L.
        k: head entries, or draws of sampled ids.
        sequence_length: L.
        masked: positions left out because they list fewer than k ids.
        above_one: share of counted positions whose listed probabilities summed to more than 1.
        largest_excess: by how much at most.
        weighted: whether any document has other weights than 1.
    """

    documents: int
    skipped: int
    cut_tokens: int
    k: int
    sequence_length: int
    masked: int
    above_one: float
    largest_excess: float
    weighted: bool = False


@dataclass(frozen=True)
class ImportResult:
    """What `import_source` made.

    Attributes:
        digest: of the new store.
        survey: what was found.
        layout: of the source.
        source: what it was made from.
    """

    digest: str
    survey: Survey
    layout: Format
    source: Source

    def text(self) -> str:
        """Returns the report for people."""
        survey = self.survey
        lines = [
            f"read       {survey.documents:,} documents of {self.layout.name} in "
            f"{len(self.source.files):,} files",
            f"rows       {survey.sequence_length:,} tokens each, "
            + (
                f"k = 0, n = {survey.k} draws"
                if self.source.rest == "counts"
                else f"k = {survey.k}, the rest is {self.source.rest}"
            ),
            f"digest     {self.digest}",
        ]
        if survey.skipped:
            lines.append(f"skipped    {survey.skipped:,} documents without a token that counts")
        if survey.cut_tokens:
            lines.append(f"cut        {survey.cut_tokens:,} tokens of documents longer than a row")
        if survey.masked:
            lines.append(f"masked     {survey.masked:,} positions that list fewer than {survey.k} ids")
        if survey.above_one:
            lines.append(
                f"scaled     {survey.above_one:.2%} of the positions list probabilities that sum to more "
                f"than 1, by up to {survey.largest_excess:.2g}: rounding of the source"
            )
        lines += [f"not given  {phrase}" for phrase in not_given(self.layout, self.source)]
        return "\n".join(lines)


def not_given(layout: Format, source: Source) -> tuple[str, ...]:
    """Returns what a store holds and this source does not, one phrase each."""
    true = () if source.gives_true or source.rest != "derived" else (TRUE_NOT_GIVEN,)
    return (*NOT_GIVEN[source.rest], *true, *layout.cannot_give)


def import_source(
    layout: Format,
    source: Source,
    target: StorePath,
    settings: ImportSettings,
    progress: Progress = no_progress,
) -> ImportResult:
    """Writes a source's documents to a new store; the same call continues one that was cut off.

    Args:
        layout: of the source.
        source: what an importer opened.
        target: the new store.
        settings: how.
        progress: told of documents, files and shards.

    Raises:
        StoreError: the source is damaged, does not fit its description or the tokenizer, or lists too few
            ids; the message names the place. Nothing was written then.
    """
    survey = _survey(source, settings, progress)
    manifest = _manifest(layout, source, settings, survey, file_identities(source.files, progress))
    files = settings.tokenizer_files if source.tokens is None else source.tokens.tokenizer_path
    content: dict[str, Iterable[Row]] = {split: () for split in manifest.splits}
    content[source.split] = pack(_pieces(source, manifest), manifest)
    digest = write_stream(target, manifest, files, content, progress)
    return ImportResult(digest, survey, layout, source)


def _manifest(
    layout: Format,
    source: Source,
    settings: ImportSettings,
    survey: Survey,
    files: list[dict[str, object]],
) -> Manifest:
    tokens = source.tokens
    packing = "whole documents, several to a row where they fit, then padding; longer ones are cut"
    corpus = (
        {"packing": packing} if tokens is None else {**tokens.manifest.dataset, "token_store": tokens.digest}
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        target="next_token",
        sequence_length=survey.sequence_length,
        rows_per_shard=settings.rows_per_shard,
        splits=SPLITS,
        dataset={
            **corpus,
            "imported": {
                "format": layout.name,
                "files": files,
                "documents": survey.documents,
                "skipped_documents": survey.skipped,
                "cut_tokens": survey.cut_tokens,
                "masked_positions": survey.masked,
                "not_given": list(not_given(layout, source)),
                **source.details,
            },
        },
        tokenizer=settings.tokenizer,
        record=RecordSpec(
            k=0 if source.rest == "counts" else survey.k,
            n=survey.k if source.rest == "counts" else 0,
            temperatures=(1.0,),
            draw_temperature=1.0,
            seed=0,
            rest=source.rest,
        ),
        teacher=settings.teacher,
        codec=settings.codec,
        planes=("weights",) if survey.weighted else (),
    )
    if tokens is None:
        return manifest
    kept = ("target", "outcomes", "planes", "sequence_length", "rows_per_shard", "splits", "tokenizer")
    return replace(manifest, **{name: getattr(tokens.manifest, name) for name in kept})


def file_identities(files: Iterable[Path], progress: Progress) -> list[dict[str, object]]:
    """Returns name, length and sha256 of each file, for the manifest."""
    paths = list(files)
    found: list[dict[str, object]] = []
    for done, path in enumerate(paths, start=1):
        found.append({"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)})
        progress("files hashed", done, len(paths))
    return found


def pack(pieces: Iterable[Row], manifest: Manifest) -> Iterator[Row]:
    """Returns full rows of whole documents; a pure function of the documents and L.

    A document goes to the first waiting row that has room; where none has, the fullest is closed.

    Args:
        pieces: documents as rows of their own length, at most L.
        manifest: of the store.
    """
    length = manifest.sequence_length
    waiting: list[list[Row]] = []
    room: list[int] = []
    for piece in pieces:
        size = len(piece.token_ids)
        place = next((index for index, free in enumerate(room) if free >= size), None)
        if place is None:
            if len(waiting) == OPEN_ROWS:
                closed = min(range(OPEN_ROWS), key=room.__getitem__)
                yield join(waiting.pop(closed), manifest)
                room.pop(closed)
            waiting.append([])
            room.append(length)
            place = len(waiting) - 1
        waiting[place].append(piece)
        room[place] -= size
    for parts in waiting:
        yield join(parts, manifest)


def join(parts: list[Row], manifest: Manifest) -> Row:
    """Returns documents as one row of L positions, with padding behind them."""
    missing = manifest.sequence_length - sum(len(part.token_ids) for part in parts)
    if missing:
        parts = [*parts, _padding(missing, manifest)]
    before = np.cumsum([0] + [len(part.token_ids) for part in parts[:-1]])
    starts = [part.segment_starts + start for part, start in zip(parts, before, strict=True)]
    records = [part.teacher for part in parts]
    mask = np.concatenate([part.loss_mask for part in parts])
    every = {name: np.concatenate([getattr(record, name) for record in records]) for name in RECORD_NAMES}
    return Row(
        token_ids=np.concatenate([part.token_ids for part in parts]),
        loss_mask=mask,
        segment_starts=np.concatenate(starts).astype(np.int32),
        segment_documents=np.concatenate([part.segment_documents for part in parts]),
        # An importer gives a record for every position; kept are those that the loss counts.
        teacher=take_records(TeacherRecord(**every), mask),
        optional=weight_runs(np.concatenate([weights_of_positions(part) for part in parts]))
        if "weights" in manifest.planes
        else {},
    )


def _pieces(source: Source, manifest: Manifest) -> Iterator[Row]:
    """Returns the documents that count, each as a row of its own length."""
    number = 0
    for document in source.documents():
        document = _cut(document, manifest.sequence_length)
        if document.loss_mask.any():
            yield _piece(document, number, manifest)
            number += 1


def _piece(document: Document, number: int, manifest: Manifest) -> Row:
    size, record = manifest.tokenizer.vocabulary_size, manifest.record
    checked = put_in_order(document, record.rest, size)
    starts, documents = document.segment_starts, document.segment_documents
    counts = document.loss_mask & (checked.listed >= record.k + record.n)
    optional = {}
    if document.weights is not None and "weights" in manifest.planes:
        counts &= document.weights > 0
        optional = weight_runs(document.weights)
    return Row(
        token_ids=document.token_ids.astype(np.int32),
        loss_mask=counts,
        segment_starts=np.zeros(1, np.int32) if starts is None else starts.astype(np.int32),
        segment_documents=np.array([number], np.int64) if documents is None else documents,
        teacher=record_of(document, checked, record.rest, record.k, size)
        if document.drawn_ids is None
        else record_of_draws(document, record.n),
        optional=optional,
    )


def _padding(length: int, manifest: Manifest) -> Row:
    """Returns padding: the end-of-text token (or id 0) with records that say nothing."""
    blank = Document(
        where="padding",
        token_ids=np.full(length, manifest.tokenizer.eos_token_id or 0, np.int64),
        loss_mask=np.zeros(length, np.bool_),
        head_ids=np.full((length, 1), NOT_LISTED, np.int64),
        head_logprobs=np.full((length, 1), -np.inf),
        drawn_ids=np.full((length, 1), NOT_LISTED, np.int64) if manifest.record.n else None,
    )
    return _piece(blank, PADDING_DOCUMENT, manifest)


class Tally:
    """Counts what documents list at the positions that count.

    Attributes:
        documents: with such a position.
        skipped: without one.
        counted: positions.
    """

    def __init__(self) -> None:
        self.documents = self.skipped = self.counted = 0
        self._above = 0
        self._largest = 0.0
        self._by_listed: dict[int, tuple[int, str]] = {}  # ids listed -> (positions, the first of them)

    def add(self, document: Document, rest: str, vocabulary_size: int) -> None:
        """Checks and counts one document."""
        mask = document.loss_mask
        if not mask.any():
            self.skipped += 1
            return
        checked = put_in_order(document, rest, vocabulary_size)
        self.documents += 1
        self.counted += int(mask.sum())
        self._above += int((checked.excess[mask] > 0).sum())
        self._largest = max(self._largest, float(checked.excess[mask].max()))
        for listed, positions in zip(*np.unique(checked.listed[mask], return_counts=True), strict=True):
            place = int(np.flatnonzero(mask & (checked.listed == listed))[0])
            before, first = self._by_listed.get(int(listed), (0, f"{document.where}, position {place}"))
            self._by_listed[int(listed)] = (before + int(positions), first)

    def survey(self, settings: ImportSettings, sequence_length: int, cut_tokens: int) -> Survey:
        """Returns what was found; refuses a k that some counted position cannot serve."""
        k, masked = self._choose_k(settings)
        return Survey(
            documents=self.documents,
            skipped=self.skipped,
            cut_tokens=cut_tokens,
            k=k,
            sequence_length=sequence_length,
            masked=masked,
            above_one=self._above / self.counted,
            largest_excess=self._largest,
        )

    def _choose_k(self, settings: ImportSettings) -> tuple[int, int]:
        """Returns (k, counted positions that list fewer ids)."""
        fewest, most = min(self._by_listed), max(self._by_listed)
        first = self._by_listed[fewest][1]
        k = settings.k
        if k is None:
            k = most if settings.mask_short else fewest
        if not 1 <= k <= most:
            reason = "no position lists more" if k else f"{first} lists none"
            raise StoreError(
                f"k is {k}, but it must be from 1 to {most} ({reason}): give --k, or --short mask to leave "
                "positions that list fewer ids out of the loss."
            )
        short = sum(positions for listed, (positions, _) in self._by_listed.items() if listed < k)
        if short and not settings.mask_short:
            raise StoreError(
                f"{first} lists {fewest} ids, and {short:,} of {self.counted:,} counted positions list fewer "
                f"than k = {k}: give --k {max(fewest, 1)} to keep fewer everywhere, or --short mask to leave "
                "these positions out of the loss."
            )
        return k, short


def _survey(source: Source, settings: ImportSettings, progress: Progress) -> Survey:
    tokens = source.tokens
    tokenizer = settings.tokenizer if tokens is None else tokens.manifest.tokenizer
    length = settings.sequence_length if tokens is None else tokens.manifest.sequence_length
    tally = Tally()
    longest = cut_tokens = 0
    weighted = False
    for done, document in enumerate(source.documents(), start=1):
        weighted = weighted or _is_weighted(document)
        longest = max(longest, len(document.token_ids))
        if length is not None:
            cut_tokens += max(0, len(document.token_ids) - length)
            document = _cut(document, length)
        tally.add(document, source.rest, tokenizer.vocabulary_size)
        progress("documents read", done, 0)
    if not tally.documents:
        raise StoreError(
            f"No document of {source.files[0].parent} has a token that counts: there is nothing to import."
        )
    return replace(tally.survey(settings, length or longest, cut_tokens), weighted=weighted)


def _is_weighted(document: Document) -> bool:
    """Returns whether a document has other weights than 1 where it counts.

    Raises:
        StoreError: a weight is negative or no finite number.
    """
    if document.weights is None:
        return False
    weights = document.weights[document.loss_mask]
    bad = np.flatnonzero(document.loss_mask & ~((document.weights >= 0) & np.isfinite(document.weights)))
    if bad.size:
        raise StoreError(
            f"{document.where}, position {bad[0]} has the loss weight {document.weights[bad[0]]:g}, expected "
            "a finite number, 0 or more: the capture is damaged, or its description does not fit it."
        )
    return bool((weights != 1).any())


def _cut(document: Document, length: int) -> Document:
    """Returns the first `length` tokens; the last one then has no next token."""
    if len(document.token_ids) <= length:
        return document
    mask = document.loss_mask[:length].copy()
    mask[-1] = False
    true, weights, drawn = document.true_logprob, document.weights, document.drawn_ids
    return replace(
        document,
        token_ids=document.token_ids[:length],
        loss_mask=mask,
        head_ids=document.head_ids[:length],
        head_logprobs=document.head_logprobs[:length],
        true_logprob=None if true is None else true[:length],
        weights=None if weights is None else weights[:length],
        drawn_ids=None if drawn is None else drawn[:length],
    )
