"""Reads what Weights & Biases keeps of an offline run: the files that `wandb sync` would send."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsekd.trainer.run.mirror import log_entries


def offline_records(folder: Path) -> Iterator[Any]:
    """The records of all offline starts in a run folder."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for entry in log_entries(path.read_bytes()):
            yield Record.FromString(entry)


def offline_history(folder: Path) -> list[dict[str, Any]]:
    """Every line that W&B was given, with its keys as `train/step`."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in offline_records(folder)
        if record.WhichOneof("record_type") == "history"
    ]


def offline_config(folder: Path) -> dict[str, Any]:
    """The configuration of the newest start."""
    found: dict[str, Any] = {}
    for record in offline_records(folder):
        if record.WhichOneof("record_type") == "run":
            found = {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return found
