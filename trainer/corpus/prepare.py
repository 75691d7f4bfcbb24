"""The verb `prepare`: documents -> a token store, with document boundaries kept and documents held out.

The corpus is read in passes, so that it need not fit in memory: one that establishes its identity (the
manifest is written first), one that trains the tokenizer where that is asked for, and one that tokenizes and
packs. A killed run is started again with the same command: it repeats the passes, which is cheap beside
capture, and skips the shards that are already there.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sparsekd.logit_store.codecs.codec import DEFAULT_CODEC
from sparsekd.logit_store.manifest import CodecSpec, Manifest, RecordSpec
from sparsekd.logit_store.manifest_checks import FORMAT_VERSION
from sparsekd.logit_store.places.paths import StorePath, store_path
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.row import Row
from sparsekd.trainer.config.schema import Config, CorpusConfig, require
from sparsekd.trainer.corpus import packing
from sparsekd.trainer.corpus.documents import CorpusDigest, Document, read_documents, source_name
from sparsekd.trainer.corpus.split import split_of
from sparsekd.trainer.corpus.tokenizer import (
    load_tokenizer,
    save_tokenizer,
    tokenize,
    tokenizer_identity,
    train_tokenizer,
)
from sparsekd.trainer.run.errors import DataError

SPLITS = ("train", "heldout")

# Documents that are tokenized together: enough for the tokenizer's threads, little beside its own memory.
BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 4_000_000

SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Survey:
    """What the first pass found.

    Attributes:
        sources: One running digest for each of `corpus.paths`.
        documents: Documents with text, by split.
        empty: Documents without text; they are left out.
    """

    sources: list[CorpusDigest]
    documents: dict[str, int]
    empty: int


def run(config: Config) -> None:
    """Writes the token store of `corpus` to `store.tokens`.

    Raises:
        ConfigError: A needed key is missing, or two keys contradict each other.
        DataError: There is nothing to tokenize, or a document cannot be read.
        StoreError: The store exists with another identity, or cannot be written.
    """
    corpus = config.corpus
    path = store_path(require(config.store.tokens, "store.tokens", "as the folder of the token store"))
    require(corpus.paths, "corpus.paths", "to find documents")
    started = time.monotonic()
    survey = survey_documents(corpus)
    print(
        f"prepare: {sum(survey.documents.values()):,} documents, "
        f"{sum(source.bytes for source in survey.sources):,} bytes; "
        f"{survey.documents['heldout']:,} held out by content hash, {survey.empty:,} empty ones left out",
        flush=True,
    )
    tokenizer, name = _tokenizer(corpus)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, Path(folder))
        manifest = _manifest(config, survey, tokenizer, Path(folder), name)
        create_store(path, manifest, Path(folder))
    shards = write_rows(path, manifest, corpus, survey, tokenizer)
    seal(path, shards)
    _report(open_store(path), survey, path, time.monotonic() - started)


def survey_documents(corpus: CorpusConfig) -> Survey:
    """Reads all documents once, for the corpus's identity and to see that there is something to do.

    Raises:
        DataError: No documents, none with text, or a split that has to have documents has none.
    """
    sources = [CorpusDigest() for _ in corpus.paths]
    documents = dict.fromkeys(SPLITS, 0)
    empty = 0
    for document in read_documents(corpus):
        sources[document.source].add(document.content, _weight_of(document, corpus))
        if document.content:
            documents[_split_of(document, corpus)] += 1
        else:
            empty += 1
    total = sum(documents.values())
    where = ", ".join(corpus.paths)
    if total == 0:
        found = f"{empty:,} documents, all of them empty" if empty else "no documents"
        raise DataError(f"{where} holds {found}; check corpus.paths, corpus.format and corpus.text_field.")
    if corpus.heldout_fraction > 0 and documents["heldout"] == 0:
        raise DataError(
            f"corpus.heldout_fraction={corpus.heldout_fraction:g} of {total:,} documents holds none out; add "
            "documents, raise the fraction, or set it to 0 to go without held-out text."
        )
    if documents["train"] == 0:
        raise DataError(
            f"corpus.heldout_fraction={corpus.heldout_fraction:g} of {total:,} documents leaves none to "
            "train on; add documents or lower the fraction."
        )
    return Survey(sources=sources, documents=documents, empty=empty)


def _weight_of(document: Document, corpus: CorpusConfig) -> float | None:
    return None if corpus.weight_field is None else document.weight


def _split_of(document: Document, corpus: CorpusConfig) -> str:
    return split_of(document.content, fraction=corpus.heldout_fraction, seed=corpus.seed)


def _tokenizer(corpus: CorpusConfig) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer and its name for people."""
    if corpus.tokenizer is not None:
        return load_tokenizer(corpus.tokenizer, corpus.tokenizer_revision), source_name(corpus.tokenizer)
    size: int = require(
        corpus.train_vocabulary_size, "corpus.tokenizer or corpus.train_vocabulary_size", "to make tokens"
    )
    print(f"prepare: training a byte-level BPE with {size:,} entries on the training split", flush=True)
    train_texts = (
        document.text
        for document in read_documents(corpus)
        if document.content and _split_of(document, corpus) == "train"
    )
    tokenizer = train_tokenizer(train_texts, size)
    if len(tokenizer) != size:
        print(
            f"prepare: the text gives {len(tokenizer):,} entries only, corpus.train_vocabulary_size={size:,}",
            flush=True,
        )
    return tokenizer, f"byte-level-bpe-{len(tokenizer)}"


def _manifest(
    config: Config, survey: Survey, tokenizer: PreTrainedTokenizerBase, folder: Path, name: str
) -> Manifest:
    corpus = config.corpus
    sources = [
        {
            "name": source_name(given),
            "documents": digest.documents,
            "bytes": digest.bytes,
            "sha256": digest.hexdigest(),
        }
        for given, digest in zip(corpus.paths, survey.sources, strict=True)
    ]
    dataset = {
        "sources": sources,
        "documents": {**survey.documents, "empty": survey.empty},
        "heldout": {"fraction": corpus.heldout_fraction, "seed": corpus.seed, "by": "blake2b of the content"},
        "packing": "documents in order without gaps; one that crosses a row's end goes on as a new segment",
    }
    if corpus.weight_field is not None:
        dataset["weights"] = f"of documents, from the field {corpus.weight_field}"
    return Manifest(
        format_version=FORMAT_VERSION,
        target="next_token",
        sequence_length=corpus.sequence_length,
        rows_per_shard=config.store.rows_per_shard,
        splits=SPLITS,
        dataset=dataset,
        tokenizer=tokenizer_identity(tokenizer, folder, name),
        record=RecordSpec(k=0, n=0, temperatures=(), draw_temperature=1.0, seed=0),
        teacher=None,
        # A table of frequent ids would have to be made of the very tokens that are to be written.
        codec=CodecSpec(DEFAULT_CODEC if config.store.codec == "compact" else config.store.codec, {}),
        planes=() if corpus.weight_field is None else ("weights",),
    )


def write_rows(
    path: StorePath,
    manifest: Manifest,
    corpus: CorpusConfig,
    survey: Survey,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, int]:
    """Tokenizes, packs and writes every document.

    Args:
        path: The store, created with `manifest`.
        manifest: Its manifest.
        corpus: Where documents come from.
        survey: What the first pass found; this pass must find the same.
        tokenizer: The store's tokenizer.

    Returns:
        Number of shards by split.

    Raises:
        DataError: The corpus changed since the first pass.
        StoreError: A shard cannot be written.
    """
    length, per_shard = manifest.sequence_length, manifest.rows_per_shard
    weighted = "weights" in manifest.planes
    streams = dict.fromkeys(SPLITS, packing.EMPTY)
    waiting: dict[str, list[Row]] = {split: [] for split in SPLITS}
    written = dict.fromkeys(SPLITS, 0)
    digests = [CorpusDigest() for _ in corpus.paths]
    read, tokens = 0, 0
    last_line = started = time.monotonic()
    for batch in _batches(corpus, digests):
        ids = tokenize(tokenizer, [document.text for _, document in batch])
        sides = [_split_of(document, corpus) for _, document in batch]
        for split in SPLITS:
            chosen = [index for index, side in enumerate(sides) if side == split and len(ids[index])]
            stream = packing.append(
                streams[split],
                [ids[index] for index in chosen],
                [batch[index][0] for index in chosen],
                [batch[index][1].weight for index in chosen],
            )
            rows, streams[split] = packing.take_rows(stream, length, weighted=weighted)
            waiting[split] += rows
            while len(waiting[split]) >= per_shard:
                write_shard(path, manifest, split, written[split], waiting[split][:per_shard])
                written[split] += 1
                waiting[split] = waiting[split][per_shard:]
        read += len(batch)
        tokens += sum(len(document_ids) for document_ids in ids)
        if time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            speed = tokens / (last_line - started)
            total = sum(survey.documents.values())
            print(f"prepare: {read:,} of {total:,} documents, {tokens:,} tokens, {speed:,.0f}/s", flush=True)
    if [digest.hexdigest() for digest in digests] != [digest.hexdigest() for digest in survey.sources]:
        raise DataError(
            f"The documents of {', '.join(corpus.paths)} changed while they were read; remove the unfinished "
            f"token store {path} and run prepare again."
        )
    if tokens == 0:
        raise DataError(f"The tokenizer {manifest.tokenizer.name} makes no token of any document.")
    end = manifest.tokenizer.eos_token_id
    assert end is not None  # load_tokenizer
    for split in SPLITS:
        waiting[split] += packing.take_last_row(streams[split], length, end, weighted=weighted)
        if waiting[split]:  # never more than a full shard: one row was added to less than that
            write_shard(path, manifest, split, written[split], waiting[split])
            written[split] += 1
    return written


def _batches(corpus: CorpusConfig, digests: list[CorpusDigest]) -> Iterator[list[tuple[int, Document]]]:
    """Documents with text and their number in the corpus, in batches; every document goes into `digests`."""
    batch: list[tuple[int, Document]] = []
    characters = 0
    for number, document in enumerate(read_documents(corpus)):
        digests[document.source].add(document.content, _weight_of(document, corpus))
        if not document.content:
            continue
        batch.append((number, document))
        characters += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _report(store: LogitStore, survey: Survey, path: StorePath, seconds: float) -> None:
    tokenizer = store.manifest.tokenizer
    total = sum(store.index(split).file_bytes for split in SPLITS)
    print(f"prepare: {path} is sealed after {seconds:.0f} s, {total:,} bytes of rows")
    print(f"prepare: tokenizer {tokenizer.name}, {tokenizer.vocabulary_size:,} ids")
    for split in SPLITS:
        counts = store.index(split).counts
        share = counts.tokens_padding / max(counts.tokens, 1)
        print(
            f"prepare: {split:8} {survey.documents[split]:,} documents, "
            f"{counts.tokens - counts.tokens_padding:,} tokens, {store.rows(split):,} rows of "
            f"{store.manifest.sequence_length:,}, padding {share:.2%}"
        )
    print(
        f"next: sparsekd capture teacher.path=TEACHER store.tokens={path} store.path=STORE   "
        f"(or train without a teacher: sparsekd train objective=ce_only store.path={path})",
        flush=True,
    )
