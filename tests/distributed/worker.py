"""What the ranks of a test job run: `worker.py CONFIG.json`, a configuration as nested JSON over the defaults.

Started by torchrun from `conftest.Job`; exits as the command line does.
"""

import json
import sys
import traceback
from dataclasses import fields, is_dataclass
from typing import Any

from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.config import Config
from sparsekd.trainer.errors import UserError


def configured(node: Any, values: dict[str, Any]) -> Any:
    """Sets the given values in a tree of dataclasses; an unknown key is an error."""
    names = {item.name for item in fields(node)}
    for key, value in values.items():
        assert key in names, f"{key} is no option of {type(node).__name__}"
        current = getattr(node, key)
        setattr(node, key, configured(current, value) if is_dataclass(current) else value)
    return node


def main() -> int:
    from sparsekd.trainer.student.train import run

    config = configured(Config(), json.loads(open(sys.argv[1]).read()))
    try:
        run(config, ["test=true"])
    except (UserError, StoreError) as error:
        print(f"refused: {error}", file=sys.stderr, flush=True)
        traceback.print_exc()
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
