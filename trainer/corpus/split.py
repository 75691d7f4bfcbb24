"""Which documents are held out: a question to a document's content, not to its place.

So the choice does not depend on order or on what else is in the corpus, and equal documents land on one side:
a text that is trained on never stands among the held-out ones as a copy.
"""

import hashlib
import os

from sparsekd.trainer.config.corpus import CorpusConfig
from sparsekd.trainer.corpus.documents import Document, has_own_heldout, sources_of
from sparsekd.trainer.corpus.files import list_files
from sparsekd.trainer.run.errors import DataError

# 64 bits of the digest, read as a fraction of 1.
DIGEST_BYTES = 8


def is_heldout(content: bytes, *, fraction: float, seed: int) -> bool:
    """Whether a document belongs to the held-out split.

    Args:
        content: The document's UTF-8 bytes.
        fraction: Expected share of distinct documents held out, in [0, 1).
        seed: Another seed makes another choice.

    Returns:
        True where BLAKE2b of the content, keyed with the seed and read as a number in [0, 1), is below
        `fraction`.
    """
    key = seed.to_bytes(8, "little")
    digest = hashlib.blake2b(content, digest_size=DIGEST_BYTES, key=key).digest()
    return int.from_bytes(digest, "little") < int(fraction * 2 ** (8 * DIGEST_BYTES))


def split_of(content: bytes, *, fraction: float, seed: int) -> str:
    """The store's split to which a document belongs: "train" or "heldout"."""
    return "heldout" if is_heldout(content, fraction=fraction, seed=seed) else "train"


def split_of_document(document: Document, corpus: CorpusConfig) -> str:
    """The store's split to which a document belongs, by its place where held-out ones have their own."""
    if has_own_heldout(corpus):
        return "train" if document.source < len(corpus.paths) else "heldout"
    return split_of(document.content, fraction=corpus.heldout_fraction, seed=corpus.seed)


def check_places(corpus: CorpusConfig) -> None:
    """Checks that held-out documents with places of their own are not those that are trained on.

    Raises:
        DataError: A file, or a dataset's split, is among both, or a path cannot be read.
    """
    trained: dict[str, str] = {}
    for source in sources_of(corpus) if corpus.heldout_paths else []:  # the trained ones come first
        names = [os.path.realpath(source.given)]
        if corpus.format != "dataset":
            found = list_files(
                source.given, corpus.include, corpus.exclude, compressed=corpus.format != "parquet"
            )
            names = [os.path.realpath(file.path) for file in found]
        for name in names:
            if not source.heldout:
                trained.setdefault(name, source.given)
            elif name in trained:
                raise DataError(
                    f"{name} is trained on, as corpus.paths={trained[name]} has it, and held out, as "
                    f"corpus.heldout_paths={source.given} has it: a student is judged by what it learned; "
                    "leave it out of one of them (corpus.exclude takes patterns of names in folders)."
                )
