"""What each rank of test_vocabulary_parallel.py runs: its shard of the head against the whole, on gloo.

Prints one JSON line per case from each rank: relative errors against the float64 oracle, and what was sent.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

CASES: list[tuple[str, dict[str, Any]]] = [
    ("torch", {}),
    ("torch", {"temperature": 2.0, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 6.0}),
    ("torch", {"target_mode": "sampled", "count": 23}),
    ("torch", {"divergence": "reverse_kl", "temperature": 2.0, "dtype": torch.float64}),
    ("torch", {"kd_weight": 0.0, "label_smoothing": 0.1}),
    ("torch/slices", {"temperature": 2.0, "label_smoothing": 0.1}),
    ("triton", {"temperature": 2.0, "label_smoothing": 0.1, "count": 5}),
    ("triton", {"target_mode": "sampled", "count": 5}),
]


def oracle_module() -> Any:
    """The module oracle.py beside this file."""
    spec = importlib.util.spec_from_file_location("oracle", Path(__file__).with_name("oracle.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["oracle"] = module
    spec.loader.exec_module(module)
    return module


def bounds_of(rank: int, world_size: int, rows: int) -> slice:
    """Uneven shards: the first rank holds fewer rows than the others, the last what is left."""
    step = rows // world_size + 1
    starts = [0] + [step * part - 3 for part in range(1, world_size)] + [rows]
    return slice(starts[rank], starts[rank + 1])


def counted(sent: list[tuple[str, int]]) -> Callable[..., Any]:
    """all_reduce that also notes its operation and how many numbers it takes."""
    original = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> Any:
        sent.append((str(op).rsplit(".", 1)[-1], tensor.numel()))
        return original(tensor, op=op, group=group)

    return all_reduce


def main() -> None:
    dist.init_process_group("gloo")
    oracle = oracle_module()
    from sparsekd.kernels import memory
    from sparsekd.kernels.shard import VocabularyShard

    rank, world_size = dist.get_rank(), dist.get_world_size()
    # Small enough that the sizes of a call follow the vocabulary: ranks of unequal shards must agree on them.
    memory.CACHED_LOGITS, memory.CACHED_POSITIONS = 120, (1, 64)
    for impl, changes in CASES:
        case = oracle.make_case(seed=40, **changes)
        held = bounds_of(rank, world_size, case.weight.shape[0])
        whole = oracle.dense(case)
        mine = case.change(weight=case.weight[held].clone(), bias=case.bias[held].clone())
        sent: list[tuple[str, int]] = []
        original = dist.all_reduce
        dist.all_reduce = counted(sent)
        try:
            shard = VocabularyShard(group=dist.group.WORLD, start=held.start)
            chunk = None if changes.get("target_mode") == "sampled" else 3
            found = oracle.measured(mine, impl, upstream=0.3, shard=shard, chunk=chunk)
        finally:
            dist.all_reduce = original
        expected = oracle.Result(
            whole.loss,
            whole.kd,
            whole.ce,
            whole.agreement,
            whole.hidden,
            whole.weight[held],
            whole.bias[held],
        )
        errors = {
            name: oracle.relative(getattr(found, name), getattr(expected, name))
            for name in ("loss", "kd", "ce", "agreement", "hidden", "weight", "bias")
        }
        line = {"impl": impl, "changes": str(changes), "rank": rank, "errors": errors, "sent": sent}
        line["loss"] = float(found.loss)
        print(json.dumps(line), flush=True)
    for diverged in range(0, 53, 4):
        # Every id is in the support, where reverse KL takes the -inf of other ranks for a student of 0.
        case = oracle.make_case(seed=40, count=4, k=53, n=0, divergence="reverse_kl", ce_weight=0.0)
        case.weight[diverged] = torch.nan
        held = bounds_of(rank, world_size, case.weight.shape[0])
        mine = case.change(weight=case.weight[held].clone(), bias=case.bias[held].clone())
        shard = VocabularyShard(group=dist.group.WORLD, start=held.start)
        output, _ = oracle.call(mine, "triton", shard=shard)
        print(json.dumps({"diverged": diverged, "loss": float(output.loss)}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    main()
