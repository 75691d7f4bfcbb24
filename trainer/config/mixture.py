"""The stores that `train` reads: one, `store.path`, or a mixture of several, `data.mixture`."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sparsekd.logit_store.manifest import Manifest
from sparsekd.trainer.config.schema import DataConfig, StoreConfig, require
from sparsekd.trainer.run.errors import ConfigError

_KEYS = ("path", "weight")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
MOST_SOURCES = 256
_LARGEST_WEIGHT = 1e12  # tokens would be weights; more are not summed exactly


@dataclass(frozen=True)
class StoreRequest:
    """A store that training reads.

    Attributes:
        key: of the configuration, that names it.
        name: of the source in the mixture; "" for a run's only store.
        path: a folder or an address.
        weight: in proportion to which rows are taken from it; None for as many as it has.
    """

    key: str
    name: str
    path: str
    weight: float | None


def requested_stores(store: StoreConfig, data: DataConfig) -> list[StoreRequest]:
    """The stores that a configuration names, a mixture's by their names in the alphabet's order.

    Raises:
        ConfigError: There is none, both keys are set, or an entry of the mixture has another form.
    """
    if not data.mixture:
        path = require(store.path, "store.path", "as the store that train reads (data.mixture names several)")
        return [StoreRequest("store.path", "", path, None)]
    if store.path is not None:
        raise ConfigError(
            f"store.path={store.path} and data.mixture ({', '.join(map(str, data.mixture))}) are both set; "
            "give one store, or name it in the mixture as well."
        )
    if len(data.mixture) > MOST_SOURCES:
        raise ConfigError(
            f"data.mixture has {len(data.mixture)} sources, at most {MOST_SOURCES} are taken; merge stores "
            "of one kind by `sparsekd store merge`."
        )
    found = [_request(name, entry) for name, entry in data.mixture.items()]
    weighed = [request.name for request in found if request.weight is not None]
    if 0 < len(weighed) < len(found):
        raise ConfigError(
            f"data.mixture gives a weight to {', '.join(weighed)} alone; give every source one, or none, "
            "which takes from each as many rows as it has."
        )
    return sorted(found, key=lambda request: request.name)


def _request(name: Any, entry: Any) -> StoreRequest:
    key = f"data.mixture.{name}"
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ConfigError(
            f"data.mixture has a source named {str(name)[:80]!r}; a name is up to 64 letters, digits, dots, "
            "underscores and hyphens."
        )
    if not isinstance(entry, Mapping) or "path" not in entry or not set(entry) <= set(_KEYS):
        raise ConfigError(
            f"{key} is {str(entry)[:80]}, expected the form {{path: runs/a/store, weight: 0.7}}, its weight "
            "left away or not."
        )
    path, weight = entry["path"], entry.get("weight")
    if not isinstance(path, str) or not path:
        raise ConfigError(
            f"{key}.path is {path!r}, expected the folder or address of a store (in quotes, if it looks like "
            "a number)."
        )
    if weight is not None and (type(weight) not in (int, float) or not 0 < weight <= _LARGEST_WEIGHT):
        raise ConfigError(f"{key}.weight is {str(weight)[:40]}, expected a number above 0, such as 0.7.")
    return StoreRequest(key, name, path, None if weight is None else float(weight))


def check_alike(manifests: Mapping[str, Manifest]) -> None:
    """Checks that rows of several stores may stand in one batch.

    Records may differ in k, n, temperatures and rule. That the objective suits each of them is for
    `checks.resolved_objective` to say.

    Args:
        manifests: By the names of the sources.

    Raises:
        ConfigError: naming two sources and what differs.
    """
    (first, wanted), *others = ((name, _alike(manifest)) for name, manifest in manifests.items())
    for name, found in others:
        for what in (what for what in wanted if wanted[what] != found.get(what, wanted[what])):
            raise ConfigError(
                f"data.mixture: {first} and {name} differ in {what} ({_short(wanted[what])}, "
                f"{_short(found[what])}); rows of one batch must have the same: prepare and capture "
                "them alike, or leave one out."
            )


def _alike(manifest: Manifest) -> dict[str, Any]:
    tokenizer = asdict(manifest.tokenizer)
    tokenizer.pop("name")  # for people
    return {
        "target": manifest.target,
        "outcomes": manifest.outcomes,
        "sequence length": manifest.sequence_length,
        **{f"tokenizer {name}": value for name, value in tokenizer.items()},
        **({"draw temperature": manifest.record.draw_temperature} if manifest.teacher else {}),
    }


def _short(value: Any) -> str:
    return str(value)[:24]
