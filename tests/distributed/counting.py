"""A training whose collectives are counted, each with who called it: `counting.py RUNS.json OUTPUT`.

Where the environment says so, the last rank claims to be the slowest by far.
"""

import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.run.ending import run_as_process

COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "barrier", "monitored_barrier", "all_to_all", "all_to_all_single"),
    *(
        "all_gather",
        "all_gather_into_tensor",
        "all_gather_coalesced",
        "gather",
        "scatter",
        "_all_gather_base",
    ),
    *("reduce_scatter", "reduce_scatter_tensor", "_reduce_scatter_base", "all_reduce_coalesced"),
    *("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"),
    *("send", "recv", "isend", "irecv", "batch_isend_irecv"),
)
MUCH = 1e6
sys.path.insert(0, str(Path(__file__).parent))  # a safe path has no folder of the script
counts: Counter[str] = Counter()


def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return function(*args, **kwargs)

    return call


def main() -> int:
    # Before DeepSpeed is imported, which keeps some of them.
    for name in COLLECTIVES:
        function = counted(name, getattr(dist, name)) if hasattr(dist, name) else None
        for module in (dist, dist.distributed_c10d):
            if function is not None and hasattr(module, name):
                setattr(module, name, function)

    from worker import configured

    from sparsekd.trainer.run.ranks import ranks
    from sparsekd.trainer.student import loop, speed

    parts: dict[str, list[dict[str, int]]] = {"step": [], "log": []}

    def of_part(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before = counts.copy()
            result = function(*args, **kwargs)
            parts[part].append(dict(counts - before))
            return result

        return call

    loop.take_step = of_part("step", loop.take_step)
    loop.log_step = of_part("log", loop.log_step)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if os.environ.get("SLOW") and rank == world_size - 1:
        line = speed.Speed.line
        speed.peak_memory = lambda device: int(MUCH) << 30

        def slow_line(self: speed.Speed, seconds_waited: float) -> dict[str, float]:
            self._began -= MUCH
            return line(self, 3 * MUCH)

        speed.Speed.line = slow_line  # type: ignore[method-assign]
    (values,) = json.loads(Path(sys.argv[1]).read_text())
    config = configured(Config(), values)
    with ranks(config.launch, timeout_minutes=2) as here:
        loop.train_on(here, config, [])
        if here.is_first:
            Path(values["run"]["root"], "counts.json").write_text(json.dumps(parts))
    return 0


if __name__ == "__main__":
    run_as_process(main)
