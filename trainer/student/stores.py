"""The stores that a run learns from are opened: the same files on every rank, alike enough for one batch."""

from collections.abc import Sequence

from sparsekd.kernels.objective import Objective, needed_planes
from sparsekd.logit_store.places.paths import StorePath, store_path
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.trainer.config.checks import shared_objective
from sparsekd.trainer.config.mixture import StoreRequest, check_alike, requested_stores
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.data.batches import rest_formula_of
from sparsekd.trainer.data.sources import Records, Source, Sources
from sparsekd.trainer.run.errors import DataError
from sparsekd.trainer.run.ranks import Ranks, agree, broadcast_object, leave_together, together


def open_sources(config: Config, here: Ranks) -> tuple[Sources, Objective]:
    """Opens the stores of a run, and settles the objective for their records.

    Raises:
        UserError: They do not fit one another or the objective, one has no training rows, or ranks see
            different ones (on the first rank; the others exit).
        StoreError: One cannot be opened (likewise).
    """
    requests = together(here, lambda: requested_stores(config.store, config.data))
    stores = [_open_same_store(store_path(request.path), config.store.access, here) for request in requests]
    objective = together(here, lambda: _objective(config, requests, stores))
    return together(here, lambda: _sources(requests, stores, objective)), objective


def _open_same_store(path: StorePath, access: str, here: Ranks) -> LogitStore:
    store = together(here, lambda: open_store(path, access=access))
    expected = broadcast_object(store.digest)
    problem = agree(
        None
        if store.digest == expected
        else f"{path} has digest {store.digest[:12]} on one rank and {expected[:12]} on the first; "
        "wait until the file system shows the same files everywhere."
    )
    if problem is not None:
        leave_together(here, DataError(problem))
    return store


def _objective(config: Config, requests: Sequence[StoreRequest], stores: Sequence[LogitStore]) -> Objective:
    """The objective on the records of all stores, whose rows may stand in one batch."""
    manifests = {request.name: store.manifest for request, store in zip(requests, stores, strict=True)}
    check_alike(manifests)
    return shared_objective(config.objective, {name: found.record for name, found in manifests.items()})


def _sources(requests: Sequence[StoreRequest], stores: Sequence[LogitStore], objective: Objective) -> Sources:
    members = []
    for request, store in zip(requests, stores, strict=True):
        record = store.manifest.record
        if store.rows("train") == 0:
            raise DataError(f"{store.path} has no training rows; prepare a corpus with more documents.")
        rest = rest_formula_of(objective, store.manifest)
        planes = needed_planes(
            objective, k=record.k, n=record.n, on_grid=rest is None or rest.column is not None
        )
        weight = store.rows("train") if request.weight is None else request.weight
        records = Records(rest, record.share, request.name)
        members.append(Source(request.name, store, weight, planes, records))
    return Sources(members)
