"""A training with losses that are no numbers: `poisoning.py RUNS.json`; where and how says the environment.

POISON is "value" (a loss that is none, with a sound gradient) or "gradient" (the other way round); on the
last rank, in the last micro-batch of the steps that POISONED lists.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from sparsekd.trainer.run.ending import run_as_process
from sparsekd.trainer.student.head import DistillationHead, WeightedLoss

sys.path.insert(0, str(Path(__file__).parent))  # a safe path has no folder of the script


def main() -> int:
    import worker

    steps = json.loads(os.environ["POISONED"])
    place = {"batches": 0}
    is_last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
    forward = DistillationHead.forward

    def poisoned(self: DistillationHead, input: torch.Tensor, request: Any = None) -> Any:
        output = forward(self, input, request)
        if not isinstance(output, WeightedLoss) or not torch.is_grad_enabled():
            return output
        place["batches"] += 1
        number, batch = divmod(place["batches"] - 1, 2)
        if not is_last or batch != 1 or number + 1 not in steps:
            return output
        if os.environ["POISON"] == "value":
            return output._replace(loss=output.loss + torch.nan)
        sound = output.loss.clone()
        sound.register_hook(lambda gradient: gradient * torch.nan)
        return output._replace(loss=sound)

    DistillationHead.forward = poisoned  # type: ignore[method-assign]
    return worker.main()


if __name__ == "__main__":
    run_as_process(main)
