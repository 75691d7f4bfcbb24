"""What a teacher said of some rows and how fast, as a plan takes it."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.row import Row


@dataclass(frozen=True)
class Measured:
    """Some rows that a teacher has recorded for a plan.

    Attributes:
        rows: rows with their records, each with its split.
        manifest: of the store in which they would stand, without hidden states.
        loading_seconds: until the teacher was there and checked.
        pass_seconds: of the teacher over the rows, records included.
        encode_seconds: of the rows' encoding, which `capture` does beside the next rows' pass.
        where: device, dtype and implementation, for people.
        loss: mean negative log-likelihood of the true token in nats; None where no position counts.
        tail: mean probability outside the head at temperature 1, likewise.
        noise: see `draws_noise`; None without draws or where no position counts.
    """

    rows: Sequence[tuple[str, Row]]
    manifest: Manifest
    loading_seconds: float
    pass_seconds: float
    encode_seconds: float
    where: str
    loss: float | None
    tail: float | None
    noise: float | None

    @property
    def tokens_per_second(self) -> float:
        return len(self.rows) * self.manifest.sequence_length / self.pass_seconds
