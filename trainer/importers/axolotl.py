"""axolotl's offline sets: prepared columns of targets, or conversations with lists of log-probabilities.

Layout, as of axolotl-ai-cloud/axolotl commits 08a734b and 139786b (src/axolotl/integrations/kd/): tables in
Parquet or lines of JSON; a prepared folder of Arrow files has to be turned into Parquet.

Prepared: `input_ids` [T], `labels` [T] (-100 where nothing is learnt), `target_token_ids`, `target_logprobs`
and `target_mask`, [T][k] each. The values were scaled to the run's `kd_temperature` and to sum to 1 over the
list; entries with mask 0 or a value at or below -1e8 are filling. Up to axolotl 0.18.0 row j describes token
j (`legacy`), since then token j + 1 (`current`); the columns do not say. The mask does: it is 1 where the
label of the described token is learnt, from the first row that the teacher described on. Where both or
neither would fit, `--alignment` has to say.

Offline: a conversation in `messages` (or `messages_combined`), and in `logprobs` (or
`llm_text_generation_vllm_logprobs`) one list per described token: of log-probabilities, with
`target_token_ids` beside them, or of objects with `logprob` and `token`, which is `token_id:17`. The
conversation is spelled by the tokenizer's chat template, and the lists describe its last tokens, as many as
there are lists; null or empty where vLLM gave nothing. A list holds the text's own token also where it is not
among the most likely. If fewer than half of the lists hold the token that they should describe, template or
tokenizer are others, and the row is refused.

Shapes: T tokens of a text, R lists, k entries of a position.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.importers.columns import (
    Lists,
    TableRow,
    column_names,
    inner_lists,
    lists_of,
    read_rows,
    table_files,
    vector,
)
from sparsekd.trainer.importers.document import (
    LINES,
    NOT_LISTED,
    Document,
    Format,
    Options,
    Source,
    one_line,
    padded_lists,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREPARED = ("input_ids", "labels", "target_token_ids", "target_logprobs", "target_mask")
MESSAGES = ("messages", "messages_combined")
LOGPROBS = ("logprobs", "llm_text_generation_vllm_logprobs")
IDS = "target_token_ids"

NOT_LEARNT = -100
FILLING = -1e8
"""Values at or below it fill lists: -1e9 and -inf are written."""

ALIGNMENTS = {"current": 1, "legacy": 0}
"""Row j describes token j + this."""

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Marks answers in a chat template."""

TOKEN_PREFIX = "token_id:"
FEWEST_LISTS = 16
"""Fewer say nothing about whether they fit their text."""


def read_axolotl(path: Path, options: Options) -> Source:
    """Opens a file, or a folder of files, of either kind.

    Raises:
        StoreError: there is none, or its columns are of neither kind.
    """
    files = table_files(path, "axolotl's tables")
    names = column_names(files[0])
    if set(PREPARED) <= names:

        def prepared() -> Iterator[Document]:
            for row in read_rows(files, PREPARED):
                yield _prepared(row, options.alignment)

        return Source(files=files, rest="unknown", documents=prepared)
    messages = next((name for name in MESSAGES if name in names), None)
    logprobs = next((name for name in LOGPROBS if name in names), None)
    if messages is None or logprobs is None:
        raise StoreError(
            f"{files[0]} has {', '.join(sorted(names))}, expected {', '.join(PREPARED)}, or a conversation "
            f"in {' or '.join(MESSAGES)} with {' or '.join(LOGPROBS)}: rename its columns to these."
        )
    if options.alignment is not None:
        raise StoreError(
            f"{files[0]} holds conversations, whose lists have one alignment: leave --alignment away."
        )

    def offline() -> Iterator[Document]:
        for row in read_rows(files, (messages, logprobs), (IDS,)):
            yield _offline(row, messages, logprobs, options.tokenizer())

    return Source(files=files, rest="derived", documents=offline)


FORMAT = Format(
    name="axolotl",
    reads="axolotl's offline sets: prepared target_* columns, or messages with logprobs",
    suffixes=(".parquet", *LINES),
    fields=(
        frozenset(PREPARED),
        *(frozenset({messages, logprobs}) for messages in MESSAGES for logprobs in LOGPROBS),
    ),
    read=read_axolotl,
    cannot_give=(
        "the temperature of the log-probabilities (1 is assumed)",
        "whether an id is among the most likely (the text's own token is listed in any case)",
        "a loss mask, where messages are given and their template marks no answers (every described token "
        "counts)",
    ),
    flags=("alignment",),
)


def _prepared(row: TableRow, alignment: str | None) -> Document:
    where, _ = row
    tokens, labels = (vector(row, name, integer=True) for name in PREPARED[:2])
    ids = lists_of(row, "target_token_ids", integer=True)
    values = lists_of(row, "target_logprobs", integer=False)
    masks = lists_of(row, "target_mask", integer=True)
    length = len(tokens)
    if not length == len(labels) == len(ids.lengths) == len(values.lengths) == len(masks.lengths):
        counts = [len(labels), len(ids.lengths), len(values.lengths), len(masks.lengths)]
        raise StoreError(
            f"{where} has {length} input_ids and {counts} {', '.join(PREPARED[1:])}, expected equal numbers: "
            "the row is damaged."
        )
    other = np.flatnonzero((labels != NOT_LEARNT) & (labels != tokens))
    if other.size:
        raise StoreError(
            f"{where}, position {other[0]}: the label is {labels[other[0]]} and the token "
            f"{tokens[other[0]]}, expected equal ones or {NOT_LEARNT}: the row is damaged."
        )
    _check_lengths(where, ids, values, "target_logprobs")
    _check_lengths(where, ids, masks, "target_mask")
    head_ids, head_logprobs = _table(where, ids, values)
    kept = padded_lists(masks.flat, masks.lengths, 0, where) != 0
    shift = _shift(where, kept.any(axis=1), labels != NOT_LEARNT, alignment)
    head_ids = np.where(kept, head_ids, NOT_LISTED)
    # What row j says goes to the position before the token that it describes.
    position = 1 - shift
    moved_ids = np.full(head_ids.shape, NOT_LISTED, np.int64)
    moved_values = np.full(head_ids.shape, -np.inf)
    moved_ids[: length - position] = head_ids[position:]
    moved_values[: length - position] = head_logprobs[position:]
    mask = np.append(labels[1:] != NOT_LEARNT, False)[:length]
    mask &= (moved_ids != NOT_LISTED).any(axis=1)
    mask[-1:] = False
    return Document(where, tokens, mask, moved_ids, moved_values)


def _shift(where: str, described: NDArray[np.bool_], learnt: NDArray[np.bool_], alignment: str | None) -> int:
    """Returns s where row j describes token j + s, [T] each."""
    if alignment is not None:
        return ALIGNMENTS[alignment]
    fitting = []
    for shift in ALIGNMENTS.values():
        expected = np.append(learnt[shift:], np.zeros(shift, np.bool_))
        first = int(described.argmax())
        if described.any() and (described[first:] == expected[first:]).all():
            fitting.append(shift)
    if described.any() and len(fitting) != 1:
        raise StoreError(
            f"{where}: target_mask fits labels {'both ways' if fitting else 'neither way'}, so it is not "
            "certain which tokens its rows describe: give --alignment legacy where axolotl up to 0.18.0 "
            "prepared them, --alignment current since."
        )
    return fitting[0] if fitting else 1


def _offline(row: TableRow, messages: str, logprobs: str, tokenizer: "PreTrainedTokenizerBase") -> Document:
    where, cells = row
    tokens, answers = _spelled(where, cells[messages], messages, tokenizer)
    ids, values = _listed(row, logprobs)
    length, lists = len(tokens), len(ids.lengths)
    if lists > length:
        raise StoreError(
            f"{where} has {lists} {logprobs} and its {messages} {length} tokens, expected at most as many: "
            "the chat template or the tokenizer is another."
        )
    listed_ids, listed_values = _table(where, ids, values)
    front = length - lists
    described = tokens[front:]
    given = ids.lengths > 0
    fitting = (listed_ids == described[:, None]).any(axis=1)
    if given.sum() >= FEWEST_LISTS and fitting.sum() < given.sum() / 2:
        raise StoreError(
            f"{where}: {int(fitting.sum())} of {int(given.sum())} lists hold the token that they should "
            "describe: the chat template or the tokenizer is another than the one that was used."
        )
    # The list of the first token of all has no position before it.
    begin = 1 if front == 0 else 0
    head_ids = np.full((length, listed_ids.shape[1]), NOT_LISTED, np.int64)
    head_logprobs = np.full(head_ids.shape, -np.inf)
    head_ids[front - 1 + begin : length - 1] = listed_ids[begin:]
    head_logprobs[front - 1 + begin : length - 1] = listed_values[begin:]
    mask = (head_ids != NOT_LISTED).any(axis=1)
    if answers is not None:
        mask &= np.append(answers[1:], False)
    return Document(where, tokens, mask, head_ids, head_logprobs)


def _spelled(
    where: str, cell: Any, name: str, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
    """Returns a conversation's tokens [T], and which are answers where the template marks them."""
    template = tokenizer.chat_template
    if template is None:
        raise StoreError(
            f"{where}: {name} need a chat template, and the tokenizer has none: give --tokenizer the folder "
            "that was used, with its chat_template.jinja."
        )
    marks = isinstance(template, str) and GENERATION.search(template) is not None
    try:
        # In a table every message has every field: what is null was not there.
        messages = [
            {key: value for key, value in message.items() if value is not None} for message in cell.as_py()
        ]
        made: Any = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=marks
        )
        tokens = np.asarray(made["input_ids"], np.int64)
        answers = np.asarray(made["assistant_masks"], np.bool_) if marks else None
    except Exception as error:  # a template may raise anything about what it is given
        raise StoreError(
            f"{where}: {name} cannot be spelled by the tokenizer's chat template ({one_line(error)}): the "
            "row is damaged, or the template another."
        ) from error
    if tokens.ndim != 1 or not tokens.size:
        raise StoreError(f"{where}: {name} are no conversation: the row is damaged.")
    return tokens, answers


def _listed(row: TableRow, logprobs: str) -> tuple[Lists, Lists]:
    """Returns the lists of ids and of log-probabilities."""
    where, cells = row
    inner = inner_lists(row, logprobs)
    if not pa.types.is_struct(inner.type.value_type):
        if IDS not in cells:
            raise StoreError(f"{where} lacks {IDS}, without which its {logprobs} are of unknown ids.")
        ids, values = lists_of(row, IDS, integer=True), lists_of(row, logprobs, integer=False)
        if len(ids.lengths) != len(values.lengths):
            raise StoreError(
                f"{where} has {len(ids.lengths)} {IDS} and {len(values.lengths)} {logprobs}, expected equal "
                "numbers: the row is damaged."
            )
        _check_lengths(where, ids, values, logprobs)
        return ids, values
    lengths = inner.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = inner.flatten()
    try:
        names, numbers = (flat.field(name).to_pylist() for name in ("token", "logprob"))
        found = [int(name.removeprefix(TOKEN_PREFIX)) for name in names]
        if not all(name.startswith(TOKEN_PREFIX) for name in names):
            raise ValueError(f"a token is not {TOKEN_PREFIX}NUMBER")
        return Lists(np.array(found, np.int64), lengths), Lists(np.array(numbers, np.float64), lengths)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise StoreError(
            f"{where}: {logprobs} hold no objects with token and logprob ({one_line(error)}); ask vLLM with "
            '"return_tokens_as_token_ids": true.'
        ) from error


def _check_lengths(where: str, ids: Lists, other: Lists, name: str) -> None:
    bad = np.flatnonzero(ids.lengths != other.lengths)
    if bad.size:
        raise StoreError(
            f"{where}, position {bad[0]} lists {ids.lengths[bad[0]]} {IDS} and {other.lengths[bad[0]]} "
            f"{name}, expected equal numbers: the row is damaged."
        )


def _table(where: str, ids: Lists, values: Lists) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns ids and values as [R, k], without what fills them."""
    head_ids = padded_lists(ids.flat, ids.lengths, NOT_LISTED, where)
    head_logprobs = padded_lists(values.flat, values.lengths, -np.inf, where)
    return np.where(head_logprobs <= FILLING, NOT_LISTED, head_ids), head_logprobs
