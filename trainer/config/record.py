"""The record that a configuration asks for: `capture` makes it, `plan` counts it."""

from sparsekd.logit_store.manifest import RecordSpec
from sparsekd.trainer.config.schema import StoreConfig


def record_spec(store: StoreConfig) -> RecordSpec:
    """What a position's record holds, and where records stand."""
    return RecordSpec(
        k=store.k,
        n=store.n,
        temperatures=tuple(store.temperatures),
        draw_temperature=store.draw_temperature,
        seed=store.seed,
        tail_logprobs=store.tail_logprobs,
        positions=store.positions,
        share=store.share,
    )
