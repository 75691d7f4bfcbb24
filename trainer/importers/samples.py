"""Labels that a teacher sampled: at each position m ids, an id as often as it came.

Layout of our own, for teachers that answer with tokens and no numbers: lines of JSON (or one array) with
`input_ids` [T] and `sampled_ids` [T][m]. `sampled_ids[t]` were drawn with replacement, at temperature 1 and
without top-k, top-p or penalties, from what the teacher says of the token behind `input_ids[:t + 1]`; null or
empty where it was not asked. What was never asked for is left out of the loss.

They become the draws of a record without a head: the shares of the draws are an unbiased estimate of the
distribution, so the loss and its gradient are, too, up to the teacher's entropy, which no draws tell.

Shapes: T tokens of a text, m samples of a position.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.importers.columns import TableRow, lists_of, read_rows, table_files, vector
from sparsekd.trainer.importers.document import (
    LINES,
    NOT_LISTED,
    Document,
    Format,
    Options,
    Source,
    padded_lists,
)

COLUMNS = ("input_ids", "sampled_ids")

MOST_SAMPLES = 4_096
"""Of one position; more is damage."""


def read_samples(path: Path, options: Options) -> Source:
    """Opens a file, or a folder of files, of such tables.

    Raises:
        StoreError: there is none, or a column is missing.
    """
    files = table_files(path, "tables of sampled ids")

    def documents() -> Iterator[Document]:
        for row in read_rows(files, COLUMNS):
            yield _document(row)

    return Source(files=files, rest="counts", documents=documents)


FORMAT = Format(
    name="samples",
    reads="tables with input_ids and sampled_ids: m ids that the teacher drew at each position",
    suffixes=(".parquet", *LINES),
    fields=(frozenset(COLUMNS),),
    read=read_samples,
    cannot_give=("whether the draws were made at temperature 1 and from the whole vocabulary (assumed)",),
)


def _document(row: TableRow) -> Document:
    where, _ = row
    tokens = vector(row, "input_ids", integer=True)
    drawn = lists_of(row, "sampled_ids", integer=True)
    length = len(tokens)
    if len(drawn.lengths) != length:
        raise StoreError(
            f"{where} has {length} input_ids and {len(drawn.lengths)} sampled_ids, expected equal numbers: "
            "the row is damaged."
        )
    if length and (most := int(drawn.lengths.max())) > MOST_SAMPLES:
        raise StoreError(
            f"{where}, position {int(drawn.lengths.argmax())} has {most:,} samples, expected at most "
            f"{MOST_SAMPLES:,}: the row is damaged."
        )
    ids = padded_lists(drawn.flat, drawn.lengths, NOT_LISTED, where)
    mask = drawn.lengths > 0
    mask[-1:] = False  # no token of the document follows there
    return Document(
        where=where,
        token_ids=tokens,
        loss_mask=mask,
        head_ids=np.full((length, 1), NOT_LISTED, np.int64),
        head_logprobs=np.full((length, 1), -np.inf),
        drawn_ids=ids,
    )
