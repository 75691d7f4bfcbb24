"""What the ranks of a test job run: `worker.py RUNS.json`, a list of training runs, one after another.

Each run is a configuration as nested JSON over the defaults. Sharing one job saves the start of processes and
libraries, which takes longer than a tiny run. Started from `conftest.py`; exits as the command line does.
TIMEOUT_MINUTES is that of a collective, 2 where it is not set.
"""

import faulthandler
import json
import os
import sys
import traceback
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.run.ending import run_as_process
from sparsekd.trainer.run.errors import UserError


def configured(node: Any, values: dict[str, Any]) -> Any:
    """Sets the given values in a tree of dataclasses; an unknown key is an error."""
    names = {item.name for item in fields(node)}
    for key, value in values.items():
        assert key in names, f"{key} is no option of {type(node).__name__}"
        current = getattr(node, key)
        setattr(node, key, configured(current, value) if is_dataclass(current) else value)
    return node


def main() -> int:
    from sparsekd.trainer.run.ranks import ranks
    from sparsekd.trainer.student.loop import train_on

    # A job that hangs says where, in every process, before the test gives up on it.
    faulthandler.dump_traceback_later(280 if "TIMEOUT_MINUTES" in os.environ else 150, exit=True)
    runs = [configured(Config(), values) for values in json.loads(Path(sys.argv[1]).read_text())]
    try:
        minutes = float(os.environ.get("TIMEOUT_MINUTES", 2))
        with ranks(runs[0].launch, timeout_minutes=minutes) as here:
            for config in runs:
                train_on(here, config, [])
    except (UserError, StoreError) as error:
        print(f"refused: {error}", file=sys.stderr, flush=True)
        traceback.print_exc()
        return 2
    return 0


if __name__ == "__main__":
    run_as_process(main)
