"""Four small rows that show, before anything is made with a model, that we read it rightly.

Each is cut in two. In a store whose rows hold several documents these are two documents, and what the model
makes of the second must not depend on the first; else they are a document and padding, and it is the other
way round. The rows differ in one thing each: one has another text in the part that must not be seen, one is
the first row once more, which shows what is noise, and one has another token within the part that is looked
at, which shows how much a token that is seen does. In that row nothing may change before this token, or the
model sees what it is to predict.

Not the logits alone are compared but what every layer and each of its parts makes of the rows: at its
random start a small model may add a thousandth to a number whose rounding is that large, and learn to use
it later.

And the logits that we make from hidden states must be the model's own, or its head does something that we
do not know.

Shapes: L tokens of a probe row, V vocabulary, H width of what a part of the model makes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.trainer.models.causal_lm import decoder_and_head
from sparsekd.trainer.run.errors import ModelError

# Enough for attention over several tokens in each part, and small beside a forward pass. Odd, as no width is.
PROBE_TOKENS = 63

# Relative norms. Logits of two routes differ by a few roundings of the dtype (output, scale, cap).
HEAD_BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}
# Of what is not seen, beside what a token that is seen does. Rows of one batch go through equal shapes:
# of 123 small models at random start, in float32 and bfloat16 on the CPU, 75 gave exactly 0 and the
# others 1.3 and more. What kernels that choose their order of sums at run time do is in the noise of
# equal rows.
ISOLATION_BOUND = 5e-2
NOISE_FACTOR = 4.0


class ProbeRows(NamedTuple):
    """The rows: one, another text in what is not seen, the first once more, another token in the rest."""

    token_ids: Tensor  # (4, L) int64
    position_ids: Tensor  # (4, L) int64
    looked_at: slice  # positions that must not depend on the others
    changed: int  # the position among them that has another token in the last row
    packed: bool


def holds_several(store: LogitStore) -> bool:
    """Whether rows of a store hold more documents, or pieces of some, than there are rows."""
    return any(store.index(split).counts.segments > store.rows(split) for split in store.manifest.splits)


def probe_rows(
    store: LogitStore, device: torch.device, vocabulary_size: int, *, packed: bool | None = None
) -> ProbeRows:
    """Rows of a store's first tokens, cut into two parts each.

    Args:
        store: The store.
        device: Where they go.
        vocabulary_size: The model's true one.
        packed: Whether documents share rows; None: as they do in the store.
    """
    packed = holds_several(store) if packed is None else packed
    split = next(name for name in store.manifest.splits if store.rows(name))
    length = min(PROBE_TOKENS, store.manifest.sequence_length)
    length -= length > 2 and length % 2 == 0
    border = max(1, length // 2)
    looked_at = slice(border, length) if packed else slice(0, border)
    unseen = slice(0, border) if packed else slice(border, length)
    tokens = torch.from_numpy(store.read_text(split, 0).token_ids[:length]).long()
    changed = (looked_at.start + looked_at.stop) // 2
    rows = tokens.repeat(4, 1)
    rows[1, unseen] = (rows[1, unseen] + vocabulary_size // 2) % vocabulary_size
    rows[3, changed] = (rows[3, changed] + vocabulary_size // 2) % vocabulary_size
    positions = torch.cat([torch.arange(border), torch.arange(length - border)])
    return ProbeRows(rows.to(device), positions.expand(4, -1).to(device), looked_at, changed, packed)


class Deviation(NamedTuple):
    """How much what a part of a model makes of the rows differs, in units of what a token that is seen does.

    Attributes:
        part: Of the model, by name.
        unseen: At the positions that are looked at, where another text stands elsewhere.
        later: Before a token that changed.
    """

    part: str
    unseen: float
    later: float


@contextmanager
def watched_parts(model: PreTrainedModel, rows: ProbeRows) -> Iterator[list[Deviation]]:
    """Fills a list with what the parts of a model make of the rows, while these go through it.

    Looked at is what has the width of a hidden state, for nothing else goes from layer to layer. Scores of
    attention, of which a part may leave some out only later, have other widths.
    """
    width = decoder_and_head(model)[1].in_features
    found: list[Deviation] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            made = output[0] if isinstance(output, tuple) and output else output
            is_of_rows = isinstance(made, Tensor) and made.ndim == 3 and made.is_floating_point()
            shape = (*rows.token_ids.shape, width)
            if is_of_rows and made.shape in (shape, (1, rows.token_ids.numel(), width)):
                found.append(_deviation(name, made.reshape(shape), rows))

        return hook

    # A convolution's positions stand last.
    parts = [(name, part) for name, part in model.named_modules() if not isinstance(part, nn.Conv1d)]
    handles = [part.register_forward_hook(watch(name)) for name, part in parts]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _deviation(part: str, made: Tensor, rows: ProbeRows) -> Deviation:
    """Of (4, L, H) in any dtype."""
    rounding = torch.finfo(made.dtype).eps
    made = torch.nan_to_num(made.detach().double())
    differences = (made - made[:1]).norm(dim=-1)  # (4, L)
    _, unseen, noise, seen = differences
    behind = slice(rows.changed + 1, rows.looked_at.stop)
    before = slice(rows.looked_at.start, rows.changed)
    rounded = rounding * float(made[0].norm(dim=-1).max())
    floor = max(NOISE_FACTOR * float(noise.max()), rounded)
    unit = max(_largest(seen[behind]), rounded, 1e-30)
    sizes = (_largest(unseen[rows.looked_at]), _largest(seen[before]))
    return Deviation(part, *(0.0 if size <= floor else size / unit for size in sizes))


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


@torch.no_grad()
def check_probe(
    own: Tensor, ours: Tensor, parts: list[Deviation], rows: ProbeRows, *, key: str, model_name: str
) -> None:
    """Raises when we misread the head, or a position depends on what it must not see.

    Args:
        own: (4, L, V or more), logits that the model itself returns, in its dtype.
        ours: (4, L, V) float32, from `causal_lm.dense_logits`.
        parts: From `watched_parts`.
        rows: What all were made of.
        key: The configuration group or key of the model, for messages.
        model_name: Its class.

    Raises:
        ModelError: naming the deviation and what to do.
    """
    compared = [*parts, _deviation("the logits", ours, rows)]
    later = max(compared, key=lambda each: each.later)
    if later.later > ISOLATION_BOUND:
        raise ModelError(
            f"The {key}, a {model_name}, sees the tokens that it is to predict (what {later.part} makes of a "
            "position depends on later ones); choose a causal language model."
        )
    deviation = _relative(own[..., : ours.shape[-1]].float(), ours)
    if not deviation <= HEAD_BOUNDS[own.dtype]:
        raise ModelError(
            f"The head of the {key} gives logits that differ from the model's own by {deviation:.2e} "
            f"(relative norm; at most {HEAD_BOUNDS[own.dtype]:.0e} is rounding): {model_name} transforms "
            "logits in a way that sparsekd does not know; report the model type."
        )
    unseen = max(compared, key=lambda each: each.unseen)
    if unseen.unseen <= ISOLATION_BOUND:
        return
    size = f"(in {unseen.part} {unseen.unseen:.1e} of what a token of its own does)"
    if rows.packed:
        raise ModelError(
            f"In the {key}, a {model_name}, a document of a packed row depends on the one before it {size}: "
            "it does not read borders from position_ids. Prepare the text with corpus.packing=none, which "
            "gives each document rows of its own, try attention=sdpa or eager, or use another model."
        )
    raise ModelError(
        f"In the {key}, a {model_name}, a document depends on the padding behind it {size}; use another "
        "model."
    )


def _relative(reference: Tensor, other: Tensor) -> float:
    return float((reference - other).norm() / reference.norm().clamp_min(1e-30))
