"""sparsekd for notebooks and drivers: one function for each verb of the command line (docs/api.md).

    import sparsekd

    folder = sparsekd.train(["store.path=runs/a/store", "student.path=models/small", "run.name=kd"])

Nothing heavy is imported before its first use.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsekd.logit_store.errors import StoreError
    from sparsekd.logit_store.protocol.reader import open_store
    from sparsekd.trainer.config.schema import Config
    from sparsekd.trainer.door.api import (
        capture,
        compose,
        evaluate,
        export,
        generate,
        plan,
        prepare,
        report,
        train,
    )
    from sparsekd.trainer.run.ending import run_as_process
    from sparsekd.trainer.run.errors import Stopped, UserError

    __version__: str

__all__ = [
    "Config",
    "Stopped",
    "StoreError",
    "UserError",
    "__version__",
    "capture",
    "compose",
    "evaluate",
    "export",
    "generate",
    "open_store",
    "plan",
    "prepare",
    "report",
    "run_as_process",
    "train",
]

_HOMES = {
    "Config": "sparsekd.trainer.config.schema",
    "StoreError": "sparsekd.logit_store.errors",
    "Stopped": "sparsekd.trainer.run.errors",
    "UserError": "sparsekd.trainer.run.errors",
    "open_store": "sparsekd.logit_store.protocol.reader",
    "run_as_process": "sparsekd.trainer.run.ending",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("sparsekd")
    if name not in __all__:
        raise AttributeError(f"module 'sparsekd' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "sparsekd.trainer.door.api")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
