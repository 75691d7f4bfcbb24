"""What run folders tell the report: loss curves, settings, and how two runs differ."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sparsekd.logit_store.trees import flat
from sparsekd.trainer.run.errors import DataError
from sparsekd.trainer.run.tracking import METRICS_NAME, read_metrics


@dataclass(frozen=True)
class Curve:
    """Cross-entropies of one run; lists of a pair have equal length."""

    name: str
    role: str
    train_tokens: list[int]
    train_loss: list[float]
    heldout_tokens: list[int]
    heldout_loss: list[float]


def read_curve(name: str, role: str, folder: Path) -> Curve:
    """Reads the metrics of a run folder.

    Raises:
        DataError: There is none, or it cannot be read.
    """
    place = folder / METRICS_NAME
    if not place.is_file():
        raise DataError(f"report.runs.{name}={folder} has no {METRICS_NAME}; name the folder of a run.")
    try:
        entries = read_metrics(folder)
        train = [entry for entry in entries if entry["kind"] == "train" and entry["ce"] is not None]
        held = [entry for entry in entries if entry["kind"] == "heldout"]
        return Curve(
            name=name,
            role=role,
            train_tokens=[entry["tokens"] for entry in train],
            train_loss=[entry["ce"] for entry in train],
            heldout_tokens=[entry["tokens"] for entry in held],
            heldout_loss=[entry["ce"] for entry in held],
        )
    except (ValueError, KeyError) as error:
        raise DataError(f"{place} cannot be read ({error!r}): restore it, or leave the run out.") from error


def run_settings(folder: Path) -> dict[str, Any]:
    """A run's configuration, flat: dotted key -> value. Empty where the folder has none."""
    place = folder / "config.yaml"
    if not place.is_file():
        return {}
    return flat(OmegaConf.to_container(OmegaConf.load(place)), lists=False)


def run_versions(folder: Path) -> dict[str, str]:
    """Package versions under which a run was trained. Empty where the folder has none."""
    place = folder / "env.json"
    return json.loads(place.read_text(encoding="utf-8"))["versions"] if place.is_file() else {}


def differing_settings(settings: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The keys on which runs differ, each with every run's value ("-" where a run has no such key)."""
    keys = sorted({key for flat in settings.values() for key in flat})
    found = []
    for key in keys:
        values = {name: {key: "-", **flat}[key] for name, flat in settings.items()}
        if len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1:
            found.append((key, values))
    return found
