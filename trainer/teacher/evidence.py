"""What a loaded teacher says of the ids that stored records hold, beside these: for `faults.judge`.

Shapes: L positions of a row, M recorded ones, N of all rows, K entries of a record, V vocabulary, H hidden.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.row import NO_ID, Row, next_tokens, segment_lasts
from sparsekd.trainer.data.inputs import model_inputs
from sparsekd.trainer.models.causal_lm import dense_logits, hidden_states
from sparsekd.trainer.models.opened import OpenModel
from sparsekd.trainer.teacher.faults import Evidence, Values

POSITIONS_AT_ONCE = 256
"""Positions whose logits exist at one time: two float32 [C, V], 260 MB at V = 128,256."""


def evidence_of(teacher: OpenModel, rows: Sequence[Row], manifest: Manifest) -> Evidence | None:
    """Runs the teacher over rows with records that have a head, twice: as they are, and with one more token
    in front of each document; None where no record stands in them.

    Args:
        teacher: Loaded and checked.
        rows: Of the store.
        manifest: Of the store; its target is the next token.
    """
    parts = [part for row in rows if (part := _of_row(teacher, row)) is not None]
    if not parts:
        return None
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Evidence(**columns, relative=manifest.record.rest == "unknown")


@torch.inference_mode()
def _of_row(teacher: OpenModel, row: Row) -> dict[str, NDArray] | None:
    record, recorded = row.teacher, row.recorded
    assert record is not None and recorded is not None
    if not recorded.any():
        return None
    length, k = len(row.token_ids), record.head_ids.shape[1]
    places = np.flatnonzero(recorded)
    ids = np.full((length, k), NO_ID, np.int64)
    ids[places] = record.head_ids
    starts = np.zeros(length, np.bool_)
    starts[row.segment_starts] = True
    ends = np.zeros(length, np.bool_)
    ends[segment_lasts(row)] = True
    hidden = hidden_states(teacher.decoder, *model_inputs([row], teacher.device))[0]
    # Padding at the end does not pass the teacher; nothing is recorded there.
    hidden = torch.nn.functional.pad(hidden, (0, 0, 0, length - len(hidden)))  # (L, H)
    following = next_tokens(row)[:, None]
    # What position q says of the ids of its own record, of the next one's and of the one's before.
    wanted = [
        ids,
        np.roll(ids, -1, axis=0),
        np.roll(ids, 1, axis=0),
        np.where(following < 0, NO_ID, following),
    ]
    (here, of_next, of_last, true), ranked = _said(teacher, hidden, wanted, k)
    before, after = np.roll(of_next, 1, axis=0), np.roll(of_last, -1, axis=0)
    before[starts], after[ends] = np.nan, np.nan
    doubled, doubled_before = _with_one_more(teacher, row, ids)
    return {
        "stored": np.where(record.head_ids == NO_ID, np.nan, record.head_logprobs.astype(np.float64)),
        "here": here[places],
        "before": before[places],
        "after": after[places],
        "doubled": doubled[places],
        "doubled_before": doubled_before[places],
        "ranked": ranked[places],
        "seen": _seen(row, ids)[places],
        "true_stored": record.true_logprob.astype(np.float64),
        "true_here": true[places, 0],
    }


def _with_one_more(teacher: OpenModel, row: Row, ids: NDArray[np.int64]) -> tuple[Values, Values]:
    """What the teacher says of the ids, [L, K] each, where each document has one more token in front: at
    their position, and at the one before.

    That token is the one of the model's beginning of text, or the document's first where it has none.
    """
    front = getattr(teacher.model.config, "bos_token_id", None)
    here, before = np.full(ids.shape, np.nan), np.full(ids.shape, np.nan)
    for start, last in zip(row.segment_starts, segment_lasts(row), strict=True):
        # No longer than a row, for which the model's length was found fit.
        tokens = row.token_ids[start : last + 1][: len(row.token_ids) - 1].astype(np.int64)
        first = front if isinstance(front, int) else int(tokens[0])
        longer = torch.from_numpy(np.append(first, tokens))[None].to(teacher.device)
        positions = torch.arange(longer.shape[1], device=teacher.device)[None]
        hidden = hidden_states(teacher.decoder, longer, positions)[0]
        own = ids[start : start + len(tokens)]
        nothing = np.full((1, ids.shape[1]), NO_ID)
        (said, early), _ = _said(
            teacher, hidden, [np.concatenate([nothing, own]), np.concatenate([own, nothing])], 0
        )
        here[start : start + len(tokens)], before[start : start + len(tokens)] = said[1:], early[:-1]
    return here, before


def _said(
    teacher: OpenModel, hidden: Tensor, wanted: Sequence[NDArray[np.int64]], k: int
) -> tuple[list[Values], Values]:
    """The log-probabilities of the wanted ids at L positions, NaN where none is wanted, and the k largest."""
    found: list[list[NDArray]] = [[] for _ in wanted]
    largest = []
    for start in range(0, len(hidden), POSITIONS_AT_ONCE):
        part = slice(start, start + POSITIONS_AT_ONCE)
        logprobs = dense_logits(hidden[part], teacher.head, teacher.transform).log_softmax(-1)
        largest.append(logprobs.topk(k).values.double().cpu().numpy())
        for ids, values in zip(wanted, found, strict=True):
            here = torch.from_numpy(ids[part]).to(logprobs.device)
            said = logprobs.gather(1, here.clamp_min(0)).double().masked_fill(here < 0, torch.nan)
            values.append(said.cpu().numpy())
    return [np.concatenate(values) for values in found], np.concatenate(largest)


def _seen(row: Row, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether an id is among its document's tokens up to the position, bool [L, K]."""
    seen = np.zeros(ids.shape, np.bool_)
    for start, last in zip(row.segment_starts, segment_lasts(row), strict=True):
        had: set[int] = set()
        for place in range(start, last + 1):
            had.add(int(row.token_ids[place]))
            seen[place] = [number in had for number in ids[place].tolist()]
    return seen
