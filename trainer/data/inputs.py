"""Rows of a store become what a model's forward pass takes.

Shapes: B rows, L tokens of a row.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sparsekd.logit_store.row import Row, position_ids


def model_inputs(rows: Sequence[Row], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Token ids, and position ids that restart at each document, int64 (B, L) each.

    Args:
        rows: B rows of equal length.
        device: Where they go; None leaves them on the CPU.
    """
    token_ids = np.stack([row.token_ids for row in rows]).astype(np.int64)
    positions = np.stack([position_ids(row) for row in rows]).astype(np.int64)
    return torch.from_numpy(token_ids).to(device), torch.from_numpy(positions).to(device)
