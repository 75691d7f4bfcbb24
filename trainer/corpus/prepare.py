"""The verb `prepare`: documents -> a token store, with document boundaries kept and documents held out.

The corpus is read in passes, so that it need not fit in memory: one that establishes its identity (the
manifest is written first), one that trains the tokenizer where that is asked for, and one that encodes and
packs. What is no plain text is encoded before the manifest is written, which says what could not be used, and
its tokens wait on disk. A killed run is started again with the same command: it repeats the passes, which is
cheap beside capture, and skips the shards that are already there.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sparsekd.logit_store.codecs.codec import DEFAULT_CODEC
from sparsekd.logit_store.errors import first_line
from sparsekd.logit_store.manifest import CodecSpec, Manifest, RecordSpec
from sparsekd.logit_store.manifest_checks import FORMAT_VERSION
from sparsekd.logit_store.places.paths import StorePath, store_path
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.protocol.writer import create_store, seal
from sparsekd.logit_store.tools.processes import WorkerKilledError
from sparsekd.trainer.config.corpus import CorpusConfig, check_rationale_of, check_tokenizer_of, is_weighted
from sparsekd.trainer.config.schema import Config, StoreConfig, require
from sparsekd.trainer.corpus.documents import (
    CorpusDigest,
    Document,
    digested,
    has_own_heldout,
    read_documents,
    sources_of,
)
from sparsekd.trainer.corpus.encoding import Encoded
from sparsekd.trainer.corpus.files import source_name
from sparsekd.trainer.corpus.findings import Formats, Records, SpecialTokens, Tally
from sparsekd.trainer.corpus.forms import Forms
from sparsekd.trainer.corpus.kept import Kept
from sparsekd.trainer.corpus.rows import write_rows
from sparsekd.trainer.corpus.split import check_places, split_of_document
from sparsekd.trainer.corpus.tokenizer import (
    end_token_id,
    load_tokenizer,
    save_tokenizer,
    tokenizer_identity,
    train_tokenizer,
)
from sparsekd.trainer.corpus.workers import Workers
from sparsekd.trainer.run.errors import DataError, Stopped
from sparsekd.trainer.run.stop import StopWatch, watched

SPLITS = ("train", "heldout")

LARGE_BYTES = 100_000_000
"""Of a corpus that one process encodes for a minute and more."""

# How rows are filled, for the manifest, by corpus.packing.
_PACKING = {
    "documents": "documents in order without gaps; one that crosses a row's end goes on as a new segment",
    "none": "a document, or a piece of one, in each row, then padding",
}


@dataclass(frozen=True)
class Survey:
    """What the first pass found.

    Attributes:
        sources: One running digest for each of `sources_of`.
        documents: Documents with text, by split.
        empty: Documents without text; they are left out.
        formats: What documents look like.
        left_out: Hidden and marker files and folders that are not read.
        forms: What records hold.
        records: Those that cannot be used.
    """

    sources: list[CorpusDigest]
    documents: dict[str, int]
    empty: int
    formats: Formats
    left_out: Tally
    forms: Forms
    records: Records


def run(config: Config, watch: StopWatch | None = None) -> None:
    """Writes the token store of `corpus` to `store.tokens`.

    Args:
        config: The composed configuration.
        watch: What asks this process to stop; None for one of its own.

    Raises:
        ConfigError: A needed key is missing, or two keys contradict each other.
        DataError: There is nothing to tokenize, or a document cannot be read.
        StoreError: The store exists with another identity, or cannot be written.
        Stopped: It was asked to stop; the shards that were written stay.
    """
    with ExitStack() as stack:
        _prepare(config, watch or stack.enter_context(watched(os.environ)))


def _prepare(config: Config, watch: StopWatch) -> None:
    corpus = config.corpus
    path = store_path(require(config.store.tokens, "store.tokens", "as the folder of the token store"))
    require(corpus.paths, "corpus.paths", "to find documents")
    started = time.monotonic()
    survey = survey_documents(corpus, watch)
    how = "from places of their own" if has_own_heldout(corpus) else "by content hash"
    print(
        f"prepare: {sum(survey.documents.values()):,} documents, "
        f"{sum(source.bytes for source in survey.sources):,} bytes; "
        f"{survey.documents['heldout']:,} held out {how}, {survey.empty:,} empty ones left out",
        flush=True,
    )
    processors = len(os.sched_getaffinity(0))
    if corpus.jobs == 1 < processors and sum(source.bytes for source in survey.sources) >= LARGE_BYTES:
        print(f"prepare: corpus.jobs={processors} would use all processors of this machine", flush=True)
    for line in survey.forms.lines():
        print(f"prepare: {line}", flush=True)
    if survey.left_out.count:
        print(
            f"prepare: {survey.left_out.count:,} hidden files, marks of tools and compressed copies in "
            f"folders left out, the first {survey.left_out.first}; one that is text is taken by its name",
            flush=True,
        )
    check_tokenizer_of(survey.forms.kind, corpus)
    check_rationale_of(survey.forms.kind, corpus)
    tokenizer, name = _tokenizer(corpus, watch)
    special = SpecialTokens(tokenizer, corpus)
    with _stopped_with_its_workers(watch), Workers(tokenizer, corpus) as workers, Kept(path) as kept:
        if is_examined := survey.forms.kind != "text" or corpus.truncation != "split":
            survey = examined(corpus, survey, workers, special, kept, watch)
        with tempfile.TemporaryDirectory() as folder:
            save_tokenizer(tokenizer, Path(folder))
            manifest = _manifest(corpus, config.store, survey, tokenizer, Path(folder), name)
            create_store(path, manifest, Path(folder))
        if is_examined and kept.are_all:
            batches = kept.batches()
        else:
            documents = read_documents(corpus)
            batches = _encoded(
                documents, corpus, survey, workers, Records(), None if is_examined else special
            )
        total = sum(survey.documents.values())
        packed = corpus.packing == "documents"
        shards = write_rows(path, manifest, batches, total, workers, watch, packed=packed)
    seal(path, shards)
    _report(open_store(path), survey, special, path, time.monotonic() - started)


@contextmanager
def _stopped_with_its_workers(watch: StopWatch) -> Iterator[None]:
    """Takes a worker that a signal for the whole job has ended, before it could shut its ears, for a stop.

    Raises:
        Stopped: That is what happened.
    """
    try:
        yield
    except WorkerKilledError:
        if watch.request is None:
            raise
        raise Stopped(f"The corpus was being read when this was asked to stop ({watch.request})") from None


def _until_asked(watch: StopWatch, documents: Iterator[Document]) -> Iterator[Document]:
    """The documents of a pass before anything is written.

    Raises:
        Stopped: This process was asked to stop.
    """
    for document in documents:
        if watch.request is not None:
            raise Stopped(f"The corpus was being read when this was asked to stop ({watch.request})")
        yield document


def survey_documents(corpus: CorpusConfig, watch: StopWatch) -> Survey:
    """Reads all documents once, for the corpus's identity and to see that there is something to do.

    Raises:
        DataError: No documents, none with text, or a split that has to have documents has none.
        Stopped: `watch` was asked meanwhile.
    """
    check_places(corpus)
    sources = [CorpusDigest() for _ in sources_of(corpus)]
    documents = dict.fromkeys(SPLITS, 0)
    empty, left_out, formats, forms, records = 0, Tally(), Formats(corpus), Forms(corpus), Records()
    found = _until_asked(watch, read_documents(corpus, left_out.add, records.skip, forms))
    for document in digested(found, sources, corpus):
        if document.content:
            formats.look(document)
            documents[split_of_document(document, corpus)] += 1
        else:
            empty += 1
    survey = Survey(sources, documents, empty, formats, left_out, forms, records)
    _check_any(survey, corpus)
    forms.check()
    formats.check()
    _check_splits(survey, corpus)
    return survey


def examined(
    corpus: CorpusConfig,
    survey: Survey,
    workers: Workers,
    special: SpecialTokens,
    kept: Kept,
    watch: StopWatch,
) -> Survey:
    """The survey after all documents were encoded, so that the manifest can say what was left out.

    Their tokens are in `kept` then.

    Raises:
        DataError: A document cannot be used and `corpus.invalid` does not skip it, or too few are left.
    """
    documents, records = dict.fromkeys(SPLITS, 0), Records()
    found = _until_asked(watch, read_documents(corpus, skipped=records.skip))
    newest = -1
    for batch in _encoded(found, corpus, survey, workers, records, special):
        for part in batch:
            if part.number != newest:
                newest = part.number
                documents[part.split] += 1
        kept.add(batch)
    after = replace(survey, documents=documents, records=records)
    _check_any(after, corpus)
    _check_splits(after, corpus)
    return after


def _encoded(
    documents: Iterator[Document],
    corpus: CorpusConfig,
    survey: Survey,
    workers: Workers,
    records: Records,
    special: SpecialTokens | None,
) -> Iterator[list[Encoded]]:
    """The tokens of all documents, at which `special` looks, unless it has.

    Raises:
        DataError: The corpus changed since the first pass, or a document cannot be used.
    """
    digests = [CorpusDigest() for _ in survey.sources]

    def numbered() -> Iterator[tuple[int, Document]]:
        for number, document in enumerate(digested(documents, digests, corpus)):
            if document.content:
                if special is not None:
                    special.look(document)
                yield number, document

    yield from workers.encoded(numbered(), records)
    if [digest.hexdigest() for digest in digests] != [digest.hexdigest() for digest in survey.sources]:
        raise DataError(
            f"The documents of {', '.join(corpus.paths)} changed while they were read; remove the token "
            "store if one was begun, and run prepare again."
        )


def _check_any(survey: Survey, corpus: CorpusConfig) -> None:
    where = ", ".join(corpus.paths)
    if not any(survey.documents.values()):
        if survey.records.skipped:
            said = "; ".join(survey.records.lines())
            raise DataError(f"{where} holds no document that can be used: {said}.")
        found = f"{survey.empty:,} documents, all of them empty" if survey.empty else "no documents"
        raise DataError(f"{where} holds {found}; check corpus.paths, corpus.format and corpus.text_field.")


def _check_splits(survey: Survey, corpus: CorpusConfig) -> None:
    documents, total = survey.documents, sum(survey.documents.values())
    if has_own_heldout(corpus):
        for split, places in (("train", corpus.paths), ("heldout", corpus.heldout_paths or corpus.paths)):
            if documents[split] == 0:
                raise DataError(
                    f"{', '.join(places)} holds no {'training' if split == 'train' else 'held-out'} "
                    "documents that can be used; check corpus.paths, corpus.heldout_paths and "
                    "corpus.heldout_split."
                )
        return
    if corpus.heldout_fraction > 0 and documents["heldout"] == 0:
        raise DataError(
            f"corpus.heldout_fraction={corpus.heldout_fraction:g} of {total:,} documents holds none out; add "
            "documents, cut text files into more (corpus.sample_by, corpus.separator), raise the fraction, "
            "or set it to 0 to go without held-out text."
        )
    if documents["train"] == 0:
        raise DataError(
            f"corpus.heldout_fraction={corpus.heldout_fraction:g} of {total:,} documents leaves none to "
            "train on; add documents or lower the fraction."
        )


def _tokenizer(corpus: CorpusConfig, watch: StopWatch) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer and its name for people."""
    if corpus.tokenizer is not None:
        tokenizer = load_tokenizer(corpus.tokenizer, corpus.tokenizer_revision)
        if corpus.chat_template is not None:
            tokenizer.chat_template = _chat_template(Path(corpus.chat_template))
        return tokenizer, source_name(corpus.tokenizer)
    size: int = require(
        corpus.train_vocabulary_size, "corpus.tokenizer or corpus.train_vocabulary_size", "to make tokens"
    )
    print(f"prepare: training a byte-level BPE with {size:,} entries on the training split", flush=True)
    train_texts = (
        document.text
        for document in _until_asked(watch, read_documents(corpus))
        if document.content and split_of_document(document, corpus) == "train"
    )
    tokenizer = train_tokenizer(train_texts, size)
    if len(tokenizer) != size:
        print(
            f"prepare: the text gives {len(tokenizer):,} entries only, corpus.train_vocabulary_size={size:,}",
            flush=True,
        )
    return tokenizer, f"byte-level-bpe-{len(tokenizer)}"


def _chat_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"corpus.chat_template={path} cannot be read ({first_line(error)}); give a file with a Jinja "
            "template."
        ) from error


def _manifest(
    corpus: CorpusConfig,
    settings: StoreConfig,
    survey: Survey,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    name: str,
) -> Manifest:
    sources = [
        {
            "name": source_name(source.given),
            "documents": digest.documents,
            "bytes": digest.bytes,
            "sha256": digest.hexdigest(),
            **({"heldout": True} if source.heldout else {}),
        }
        for source, digest in zip(sources_of(corpus), survey.sources, strict=True)
    ]
    by = "blake2b of the content"
    heldout: dict[str, Any] = {"fraction": corpus.heldout_fraction, "seed": corpus.seed, "by": by}
    if has_own_heldout(corpus):
        heldout = {"by": "place"}
    dataset: dict[str, Any] = {
        "sources": sources,
        "documents": {**survey.documents, "empty": survey.empty},
        "heldout": heldout,
        "packing": _PACKING[corpus.packing],
    }
    if survey.forms.kind != "text":
        dataset["kind"] = survey.forms.kind
        dataset["learned"] = corpus.train_on
    if corpus.chat_template_kwargs:
        dataset["chat_template_kwargs"] = dict(corpus.chat_template_kwargs)
    if corpus.truncation != "split":
        dataset["longer_than_a_row"] = corpus.truncation
    if survey.records.skipped:
        dataset["left_out"] = survey.records.skipped
    if not corpus.split_special_tokens:
        dataset["special_tokens"] = "where the text spells them"
    if corpus.weight_field is not None:
        dataset["weights"] = f"of documents, from the field {corpus.weight_field}"
    if corpus.rationale_weight != 1:
        dataset["rationale"] = {"weight": corpus.rationale_weight, "marks": list(corpus.rationale_marks)}
    end = end_token_id(tokenizer, corpus.end_token)
    return Manifest(
        format_version=FORMAT_VERSION,
        target="next_token",
        sequence_length=corpus.sequence_length,
        rows_per_shard=settings.rows_per_shard,
        splits=SPLITS,
        dataset=dataset,
        tokenizer=tokenizer_identity(tokenizer, folder, name, end=end),
        record=RecordSpec(k=0, n=0, temperatures=(), draw_temperature=1.0, seed=0),
        teacher=None,
        # A table of frequent ids would have to be made of the very tokens that are to be written.
        codec=CodecSpec(DEFAULT_CODEC if settings.codec == "compact" else settings.codec, {}),
        planes=("weights",) if is_weighted(corpus) else (),
    )


def _report(
    store: LogitStore, survey: Survey, special: SpecialTokens, path: StorePath, seconds: float
) -> None:
    tokenizer = store.manifest.tokenizer
    total = sum(store.index(split).file_bytes for split in SPLITS)
    print(f"prepare: {path} is sealed after {seconds:.0f} s, {total:,} bytes of rows")
    print(f"prepare: tokenizer {tokenizer.name}, {tokenizer.vocabulary_size:,} ids")
    for split in SPLITS:
        counts = store.index(split).counts
        learned = f"{counts.tokens_counted:,} of them learned, " if survey.forms.kind != "text" else ""
        share = counts.tokens_padding / max(counts.tokens, 1)
        print(
            f"prepare: {split:8} {survey.documents[split]:,} documents, "
            f"{counts.tokens - counts.tokens_padding:,} tokens, {learned}{store.rows(split):,} rows of "
            f"{store.manifest.sequence_length:,}, padding {share:.2%}"
        )
    pieces = sum(store.index(split).counts.segments - survey.documents[split] for split in SPLITS)
    if pieces > 0 and survey.forms.kind != "text":
        print(
            f"prepare: {pieces:,} rows begin inside of a record, without what stood before; longer rows "
            "(corpus.sequence_length) make them fewer, and corpus.packing=none with corpus.truncation=cut or "
            "drop keeps every record whole"
        )
    for line in (*survey.formats.lines(), *survey.records.lines(), *special.lines()):
        print(f"prepare: {line}")
    print(
        f"next: sparsekd capture teacher.path=TEACHER store.tokens={path} store.path=STORE   "
        f"(or train without a teacher: sparsekd train objective=ce_only store.path={path})",
        flush=True,
    )
