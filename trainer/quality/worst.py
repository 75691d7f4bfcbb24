"""The positions on which the student falls furthest behind the teacher, with the text around them."""

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.trainer.data.heldout import SPLIT, HeldOut
from sparsekd.trainer.quality.result import WorstToken

_SHOWN = 8
_CONTEXT_TOKENS = 32


def worst_tokens(
    store: LogitStore,
    held: HeldOut,
    losses: dict[str, NDArray[np.float32]],
    *,
    student: str,
    guesses: NDArray[np.int64],
) -> list[WorstToken]:
    """Positions with the largest student's loss - teacher's loss, at most one of a document.

    Args:
        store: Where the text is.
        held: The counted positions.
        losses: Model -> float32 [N]; the teacher's under "teacher" where it is known, else the student's loss
            alone decides.
        student: Name of the student among them.
        guesses: int64 [N], the student's most likely ids.
    """
    excess = losses[student] - losses["teacher"] if "teacher" in losses else losses[student]
    tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_path)
    found: list[WorstToken] = []
    seen: set[int] = set()
    for index in np.argsort(-excess, kind="stable"):
        if len(found) == _SHOWN:
            break
        document = int(held.document[index])
        if document in seen:
            continue
        seen.add(document)
        row, position = int(held.row[index]), int(held.position[index])
        start = max(position + 1 - _CONTEXT_TOKENS, position + 1 - int(held.context[index]))
        before = store.read_row(SPLIT, row).token_ids[start : position + 1]
        found.append(
            WorstToken(
                document=document,
                row=row,
                position=position,
                context=str(tokenizer.decode(before.tolist())),
                token=str(tokenizer.decode([int(held.true_ids[index])])),
                guess=str(tokenizer.decode([int(guesses[index])])),
                probabilities={name: float(np.exp(-loss[index])) for name, loss in losses.items()},
            )
        )
    return found
