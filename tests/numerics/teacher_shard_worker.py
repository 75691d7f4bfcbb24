"""What each rank of test_teacher_shard.py runs: its part of a teacher's head against the whole, on gloo.

Prints one JSON line per case from each rank: of each plane the largest difference, inf where ids differ or
one side alone is a number.
"""

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsekd.kernels.objective import HeadTransform
from sparsekd.kernels.shard import VocabularyShard
from sparsekd.kernels.teacher import teacher_statistics

COUNT, WIDTH = 9, 16
CASES: list[dict[str, Any]] = [
    {},
    {"k": 0},
    {"k": 40},  # more than one rank holds
    {"k": 67},  # nothing is left to draw from
    {"n": 0},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float64, "drawn_at": 2.0},
    {"size": 1999, "n": 3},  # one process draws by parts
    {"size": 1999, "k": 2},
    {"ties": True},
    {"nan": True},
]


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest; of ids and counts inf for any."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if not found.is_floating_point():
        return 0.0 if torch.equal(found, expected) else float("inf")
    same = (found == expected) | (found.isnan() & expected.isnan())
    far = torch.where(same, 0.0, (found - expected).abs()).nan_to_num(nan=float("inf"))
    return float(far.max()) if far.numel() else 0.0


def run(number: int, group: dist.ProcessGroup, case: dict[str, Any]) -> None:
    size, dtype = case.get("size", 67), case.get("dtype", torch.float32)
    generator = torch.Generator().manual_seed(number)
    hidden = torch.randn(COUNT, WIDTH, generator=generator).to(dtype)
    weight = torch.randn(size + 5, WIDTH, generator=generator).to(dtype)
    bias = torch.randn(size + 5, generator=generator).to(dtype)
    if case.get("ties"):  # over the borders of ranks, and in the head's last place
        weight, bias = weight[torch.arange(size + 5) % 4], bias[torch.arange(size + 5) % 4]
    labels = torch.randint(0, size, (COUNT,), generator=generator)
    labels[1] = -100
    uniforms = torch.rand(COUNT, case.get("n", 5), generator=generator, dtype=torch.float64)
    uniforms[2:4] = torch.tensor([0.0, 1 - 2**-53])[:, None]
    parts, rank = dist.get_world_size(group), dist.get_rank(group)
    step = -(-(size + 5) // parts)
    held = slice(rank * step, (rank + 1) * step)
    if case.get("nan"):  # of one id, which one rank holds
        weight[3] = torch.nan
    arguments: dict[str, Any] = {
        "labels": labels,
        "head": HeadTransform(vocabulary_size=size, scale=0.9, softcap=8.0),
        "k": case.get("k", 6),
        "n": uniforms.shape[1],
        "temperatures": (1.0, 2.0, 4.0),
        "draw_temperature": case.get("drawn_at", 1.0),
        "uniforms": uniforms,
        "chunk_positions": 4,
    }
    whole = teacher_statistics(hidden, weight, bias=bias, **arguments)
    shard = VocabularyShard(group=group, start=held.start)
    found = teacher_statistics(hidden, weight[held], bias=bias[held], shard=shard, **arguments)
    planes = whole._fields
    if case.get("nan"):  # what is no distribution has no ids either; every plane of numbers says so
        planes = ("head_logprobs", "log_rest", "true_logprob", "entropy", "rest_entropy")
    far = {name: difference(getattr(found, name), getattr(whole, name)) for name in planes}
    print(json.dumps({"case": str(case), "ranks": parts, "far": far}), flush=True)


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for ranks in range(2, dist.get_world_size() + 1):
        group = dist.new_group(list(range(ranks)))
        if dist.get_rank() < ranks:
            for number, case in enumerate(CASES):
                run(number, group, case)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
