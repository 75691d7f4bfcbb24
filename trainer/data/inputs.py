"""Rows of a store become what a model's forward pass takes.

Shapes: B rows, L tokens of a row, M that pass a model.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sparsekd.logit_store.row import Row, is_real, position_ids

_WHOLE = 64
"""Positions that a forward pass is a multiple of: of few lengths kernels are chosen or compiled once each."""


def real_length(row: Row) -> int:
    """Positions until padding alone follows; 1 where nothing else is."""
    return int(np.flatnonzero(is_real(row)).max(initial=0)) + 1


def model_inputs(rows: Sequence[Row], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Token ids, and position ids that restart at each document, int64 (B, M) each.

    M is L, or less where all rows end in padding: no position depends on later ones, and rows of one document
    each (corpus.packing=none) may be padding for the most part. It is a multiple of 64, or L.

    Args:
        rows: B rows of equal length.
        device: Where they go; None leaves them on the CPU.
    """
    length = len(rows[0].token_ids)
    real = max(map(real_length, rows))
    until = min(length, -(-real // _WHOLE) * _WHOLE)
    token_ids = np.stack([row.token_ids[:until] for row in rows]).astype(np.int64)
    positions = np.stack([position_ids(row)[:until] for row in rows]).astype(np.int64)
    return torch.from_numpy(token_ids).to(device), torch.from_numpy(positions).to(device)
