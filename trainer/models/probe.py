"""Two small rows that show, before anything is made with a model, that we read it rightly.

Both hold two documents. The second document is the same in both rows, the first is not: what the model says
of the second must be the same, or attention crosses documents. And the logits that we make from hidden states
must be the model's own, or its head does something that we do not know.

Shapes: L tokens of a probe row, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.trainer.run.errors import ModelError

# Enough for attention over several tokens in each document, and small beside a forward pass.
PROBE_TOKENS = 64

# Relative norms. Logits of two routes differ by a few roundings of the dtype (output, scale, cap).
HEAD_BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}
# Two equal documents go through equal shapes, so what is left is the noise of kernels that choose their order
# of sums at run time (0 in every model that was tried on the CPU). Where documents do see each other, random
# weights of width 32 gave from 5e-3 (Bloom) to 0.7 (RWKV) in hidden states.
ISOLATION_BOUNDS = {torch.bfloat16: 3e-3, torch.float16: 1e-3, torch.float32: 1e-4}


class ProbeRows(NamedTuple):
    """The two rows; `border` is where their second document begins."""

    token_ids: Tensor  # (2, L) int64
    position_ids: Tensor  # (2, L) int64
    border: int


def probe_rows(store: LogitStore, device: torch.device, vocabulary_size: int) -> ProbeRows:
    """Two rows of a store's first tokens, cut into two documents each."""
    manifest = store.manifest
    split = next(name for name in manifest.splits if store.rows(name))
    length = min(PROBE_TOKENS, manifest.sequence_length)
    border = max(1, length // 2)
    tokens = torch.from_numpy(store.read_row(split, 0).token_ids[:length]).long()
    other = tokens.clone()
    other[:border] = (tokens[:border] + 1) % vocabulary_size
    positions = torch.cat([torch.arange(border), torch.arange(length - border)])
    return ProbeRows(torch.stack([tokens, other]).to(device), positions.expand(2, -1).to(device), border)


@torch.no_grad()
def check_probe(own: Tensor, ours: Tensor, rows: ProbeRows, *, key: str, model_name: str) -> None:
    """Raises when we misread the head, or documents of a row see one another.

    Args:
        own: (2, L, V or more), logits that the model itself returns, in its dtype.
        ours: (2, L, V) float32, from `causal_lm.dense_logits`.
        rows: What both were made of.
        key: The configuration group or key of the model, for messages.
        model_name: Its class.

    Raises:
        ModelError: naming the deviation and what to do.
    """
    deviation = _relative(own[..., : ours.shape[-1]].float(), ours)
    if not deviation <= HEAD_BOUNDS[own.dtype]:
        raise ModelError(
            f"The head of the {key} gives logits that differ from the model's own by {deviation:.2e} "
            f"(relative norm; at most {HEAD_BOUNDS[own.dtype]:.0e} is rounding): {model_name} transforms "
            "logits in a way that sparsekd does not know; report the model type."
        )
    first, second = ours[:, rows.border :]
    deviation = _relative(first, second)
    if not deviation <= ISOLATION_BOUNDS[own.dtype]:
        raise ModelError(
            f"In the {key}, a {model_name}, a document of a packed row depends on the one before it (logits "
            f"differ by {deviation:.1e} in relative norm, at most {ISOLATION_BOUNDS[own.dtype]:.0e} is "
            "rounding): it does not read borders from position_ids; set attention=sdpa or eager for it, or "
            "use another model."
        )


def _relative(reference: Tensor, other: Tensor) -> float:
    return float((reference - other).norm() / reference.norm().clamp_min(1e-30))
