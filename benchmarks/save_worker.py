"""A rank of the save benchmark: takes steps, saves by turns, and measures how long each way holds it.

Started by `save.py` as one process of each rank; the first writes what was measured to a file.
"""

import itertools
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from transformers import LlamaConfig, LlamaForCausalLM

from sparsekd.trainer.config.engine_settings import deepspeed_config
from sparsekd.trainer.config.schema import EngineConfig, LaunchConfig, OptimizerConfig, ScheduleConfig
from sparsekd.trainer.data.order import BatchShape
from sparsekd.trainer.run.ending import run_as_process
from sparsekd.trainer.run.ranks import Ranks, ranks
from sparsekd.trainer.state.record import Commit
from sparsekd.trainer.state.save import HostCopies, Saver, collected_files
from sparsekd.trainer.student.engine import build_engine, leave_out_compiled_collectives

BEHIND, SYNCHRONOUS = "sparsekd, behind the steps", "sparsekd, synchronous"
DCP, DCP_KEPT = "dcp.async_save", "dcp.async_save, memory kept"
TORCH, TORCH_SYNCED = "torch.save", "torch.save and fsync"
DEEPSPEED = "DeepSpeed save_checkpoint"
NOTHING = "no save"
WAYS = (BEHIND, SYNCHRONOUS, DCP, DCP_KEPT, TORCH, TORCH_SYNCED, DEEPSPEED, NOTHING)
PARTS = ("DeepSpeed's collecting of the state", "copying the state into kept memory", "into fresh memory")
SEED = 0


@dataclass(frozen=True)
class Task:
    """What is to be measured.

    Attributes:
        folder: for checkpoints.
        answer: file of the result.
        hidden: H of the student.
        layers: of it.
        vocabulary: V of it.
        length: tokens of a rank's batch.
        rounds: in each, all ways take turns in an order drawn anew; one more before them is the first save.
        steps: optimizer steps after each save, which are measured.
    """

    folder: str
    answer: str
    hidden: int
    layers: int
    vocabulary: int
    length: int
    rounds: int
    steps: int


@dataclass
class Found:
    """Seconds of one way, the longest over the ranks, by rounds; the first round is the first save.

    Attributes:
        pause: until the next step could begin.
        steps: that the steps after it took.
        whole: from the save's begin until its files were whole, steps included.
    """

    pause: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Way:
    """A way to save.

    Attributes:
        begin: of the state and a step; until it returns the training is held.
        finish: waits until the files are whole.
        is_given: whether the state is collected for it before the clock starts; else it is None.
    """

    begin: Callable[[Any, int], None]
    finish: Callable[[], None] = lambda: None
    is_given: bool = False


def make_engine(task: Task, here: Ranks) -> deepspeed.DeepSpeedEngine:
    """A random Llama under ZeRO-3, as training makes its engine."""
    leave_out_compiled_collectives()
    shape = BatchShape(global_rows=here.world_size, micro_rows=1, world_size=here.world_size)
    settings = deepspeed_config(
        EngineConfig(zero_stage=3, dtype="bfloat16"), OptimizerConfig(), shape, pin_memory=False
    )
    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=task.hidden,
        intermediate_size=task.hidden * 8 // 3,
        num_hidden_layers=task.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=task.vocabulary,
        use_cache=False,
    )
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = LlamaForCausalLM(config)
    return build_engine(model.bfloat16(), settings, OptimizerConfig())


def ways(engine: deepspeed.DeepSpeedEngine, folder: Path, here: Ranks, group: Any) -> dict[str, Way]:
    """All ways by their names."""
    savers = {
        behind: Saver(folder, here, behind=behind, require_owner=lambda: None) for behind in (True, False)
    }
    saves: list[Future[Any]] = []
    kept = DefaultStager(StagingOptions(False, False, False, False))

    def ours(behind: bool) -> Way:
        saver = savers[behind]
        return Way(
            lambda _, step: saver.begin(engine, commit(step, here), lambda path, seconds: None), saver.finish
        )

    def staged(stager: DefaultStager | None) -> Way:
        def begin(state: Any, step: int) -> None:
            tree = {f"rank{here.rank}": state}
            place = folder / f"dcp-{step}"
            saved = dcp.async_save(tree, checkpoint_id=place, process_group=group, async_stager=stager)
            assert isinstance(saved, Future)
            saves.append(saved)

        return Way(begin, lambda: saves.pop().result(), is_given=True)

    def plain(synced: bool) -> Way:
        def begin(state: Any, step: int) -> None:
            place = folder / f"plain-{step}"
            for name, value in state.items():
                path = place / name
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(value, path)
                if synced:
                    with path.open("rb") as file:
                        os.fsync(file.fileno())

        return Way(begin, is_given=True)

    return {
        BEHIND: ours(True),
        SYNCHRONOUS: ours(False),
        DCP: staged(None),
        DCP_KEPT: staged(kept),
        TORCH: plain(False),
        TORCH_SYNCED: plain(True),
        DEEPSPEED: Way(lambda _, step: engine.save_checkpoint(str(folder / f"own-{step}"), tag="engine")),
        NOTHING: Way(lambda state, step: None),
    }


def commit(step: int, here: Ranks) -> Commit:
    """A record as a run would write it."""
    settings = {
        "numbers": {"engine": {"dtype": "bfloat16", "zero_stage": 3}, "train": {"global_batch_rows": 1}},
        "bits": {},
        "course": {
            "schedule": asdict(ScheduleConfig()),
            "steps": 10_000,
            "learning_rate": 1e-3,
        },
    }
    return Commit(
        step=step,
        rows_consumed=step,
        tokens=step,
        sums=((),) * here.world_size,
        world_size=here.world_size,
        threads_per_rank=1,
        store_digest="0" * 64,
        settings=settings,
        config_digest="0" * 64,
        versions={},
        files={},
    )


def take_steps(engine: deepspeed.DeepSpeedEngine, task: Task, count: int) -> None:
    """Optimizer steps on random ids."""
    for _ in range(count):
        ids = torch.randint(task.vocabulary, (1, task.length))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()


def longest(values: list[float]) -> list[float]:
    """Each value's largest over the ranks."""
    box = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return [float(value) for value in box]


def measure(task: Task, here: Ranks) -> dict[str, Any]:
    """All rounds; what the first rank writes."""
    folder = Path(task.folder)
    group = dist.new_group(backend="gloo")  # a thread's collectives must not meet those of the steps
    engine = make_engine(task, here)
    take_steps(engine, task, 2)
    contestants = ways(engine, folder, here, group)
    found = {name: Found() for name in contestants}
    chance, step, bytes_of = random.Random(SEED), 0, dict.fromkeys(contestants, 0)
    for _ in range(task.rounds + 1):
        for name in chance.sample(list(contestants), len(contestants)):
            way, step = contestants[name], step + 1
            state = collected_files(engine, folder) if way.is_given else None
            dist.barrier()
            began = time.perf_counter()
            way.begin(state, step)
            pause = time.perf_counter() - began
            take_steps(engine, task, task.steps)
            steps = time.perf_counter() - began - pause
            way.finish()
            values = longest([pause, steps, time.perf_counter() - began])
            for values_of, value in zip(asdict(found[name]), values, strict=True):
                getattr(found[name], values_of).append(value)
            bytes_of[name] = clear(folder, here)
    parts = parts_of_a_save(engine, folder, task.rounds)
    total = sum(parameter.ds_numel for parameter in engine.module.parameters())
    return {
        "parameters": total,
        "bytes": bytes_of,
        "ways": {name: asdict(value) for name, value in found.items()},
        "parts": dict(zip(PARTS, parts, strict=True)),
    }


def clear(folder: Path, here: Ranks) -> int:
    """Removes what was written, and leaves no writing to the next way; returns how many bytes it were."""
    dist.barrier()
    size = 0
    if here.is_first:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        shutil.rmtree(folder)
        folder.mkdir()
        os.sync()
    dist.barrier()
    return size


def parts_of_a_save(engine: deepspeed.DeepSpeedEngine, folder: Path, rounds: int) -> list[float]:
    """Least seconds of what an asynchronous save does before it returns, the longest over the ranks."""
    copies = HostCopies()
    copies.of(collected_files(engine, folder))
    least = [float("inf")] * len(PARTS)
    for _ in range(max(rounds, 2)):
        times = [time.perf_counter()]
        state = collected_files(engine, folder)
        times.append(time.perf_counter())
        copies.of(state)
        times.append(time.perf_counter())
        HostCopies().of(state)
        times.append(time.perf_counter())
        seconds = longest([after - before for before, after in itertools.pairwise(times)])
        least = [min(pair) for pair in zip(least, seconds, strict=True)]
    return least


def main() -> int:
    """Measures the task that the command line holds."""
    task = Task(**json.loads(sys.argv[1]))
    with ranks(LaunchConfig(device="cpu"), timeout_minutes=10) as here:
        result = measure(task, here)
        if here.is_first:
            Path(task.answer).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    run_as_process(main)
