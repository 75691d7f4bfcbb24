"""NeMo-Aligner's captures: lines of JSON with top logits and their normaliser.

Layout, as of NVIDIA/NeMo-Aligner commit af2b3bd (examples/nlp/synthetic_data_gen/compute_topk_logits.py and
nemo_aligner/utils/distributed.py). One line per sample: `tokens` [T] (the inputs), `labels` [T] (the next
token at each), `loss_mask` [T] of 0 and 1 (whether the label counts), all padded at the end to the longest of
a batch; `topk_logits` [T][k] with the largest logit of the position taken off; `topk_token_ids` [T][k];
`log_sum_exp_logits` [T], over the whole vocabulary and with the same amount taken off. So a log-probability
is logit - log_sum_exp. Both were computed in the model's precision: in bfloat16 the normaliser is good to 0.4
%.

Position t of a line describes its label, token t + 1. What follows the last label that counts is left away:
it is padding, or counts nowhere. Without `log_sum_exp_logits` the rest is unknown.

Shapes: T positions of a line, k entries.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.importers.document import (
    LINES,
    Document,
    Format,
    Options,
    Source,
    labelled_document,
    source_files,
)
from sparsekd.trainer.importers.jsonl import array_of, read_objects

KEYS = ("tokens", "labels", "loss_mask", "topk_logits", "topk_token_ids")
NORMALISER = "log_sum_exp_logits"


def read_nemo(path: Path, options: Options) -> Source:
    """Opens a file, or a folder of files, of NeMo-Aligner's lines.

    Raises:
        StoreError: there is none, or its first line has other fields.
    """
    files = source_files(path, LINES, "NeMo-Aligner's lines")
    first = next((item for file in files for item in read_objects(file)), None)
    if first is None:
        raise StoreError(f"{path} is empty.")
    _check_keys(*first)
    normalised = NORMALISER in first[1]

    def documents() -> Iterator[Document]:
        for file in files:
            for where, line in read_objects(file):
                _check_keys(where, line)
                yield _document(where, line, normalised)

    return Source(files=files, rest="derived" if normalised else "unknown", documents=documents)


FORMAT = Format(
    name="nemo",
    reads="NeMo-Aligner's lines of JSON (compute_topk_logits.py)",
    suffixes=LINES,
    fields=(frozenset(KEYS),),
    read=read_nemo,
    cannot_give=(
        "the precision of the logits, which is the model's",
        "document boundaries inside a sample",
    ),
)


def _check_keys(where: str, line: Mapping[str, Any]) -> None:
    if missing := [name for name in KEYS if name not in line]:
        raise StoreError(f"{where} lacks {', '.join(missing)}, which compute_topk_logits.py writes.")


def _document(where: str, line: Mapping[str, Any], normalised: bool) -> Document:
    if normalised != (NORMALISER in line):
        raise StoreError(
            f"{where}: {NORMALISER} is in some lines and not in others: import the two kinds apart."
        )
    tokens = array_of(line["tokens"], np.int64, 1, "tokens", where)
    labels = array_of(line["labels"], np.int64, 1, "labels", where)
    mask = array_of(line["loss_mask"], np.float64, 1, "loss_mask", where)
    logits = array_of(line["topk_logits"], np.float64, 2, "topk_logits", where)
    ids = array_of(line["topk_token_ids"], np.int64, 2, "topk_token_ids", where)
    length = len(tokens)
    if not (len(labels) == len(mask) == len(logits) == len(ids) == length and logits.shape == ids.shape):
        raise StoreError(
            f"{where}: tokens, labels, loss_mask, topk_logits and topk_token_ids have {length}, "
            f"{len(labels)}, {len(mask)}, {len(logits)} and {len(ids)} positions, expected equal numbers: "
            "the line is damaged."
        )
    if not np.isin(mask, (0, 1)).all():
        raise StoreError(f"{where}: loss_mask holds {mask[~np.isin(mask, (0, 1))][0]:g}, expected 0 and 1.")
    if normalised:
        normaliser = array_of(line[NORMALISER], np.float64, 1, NORMALISER, where)
        if len(normaliser) != length:
            raise StoreError(f"{where}: {NORMALISER} has {len(normaliser)} positions, expected {length}.")
        with np.errstate(invalid="ignore"):  # infinite ones are refused by name, with the others
            logits = logits - normaliser[:, None]
    return labelled_document(where, tokens, labels, mask == 1, ids, logits)
