"""How fast a run is: tokens and seconds of its steps, waits, memory, and use of the device's arithmetic."""

import resource
import time

import torch
import torch.distributed as dist

from sparsekd.trainer.run.ranks import Ranks

_PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
_SLOWER = {"PCIe", "NVL", "MIG"}


class Speed:
    """Measures the steps between two lines of metrics on each rank; a line has the worst of all ranks.

    Args:
        here: This rank.
        step_tokens: Tokens of a step, over all ranks.
        token_flops: Of the model for each token (see `token_flops`); None where that is not known.
    """

    def __init__(self, here: Ranks, *, step_tokens: int, token_flops: float | None) -> None:
        self._here, self._step_tokens = here, step_tokens
        name = torch.cuda.get_device_name(here.device) if here.device.type == "cuda" else ""
        self._peak = peak_flops(name)
        self._token_flops = token_flops
        self.begin()

    def begin(self) -> None:
        """Begins anew, now."""
        self._steps, self._began, self._paused = 0, time.perf_counter(), 0.0

    def took_step(self) -> None:
        """Counts a step."""
        self._steps += 1

    def pause(self, seconds: float) -> None:
        """Takes so many seconds out: those of evaluations and checkpoints."""
        self._paused += seconds

    def line(self, seconds_waited: float) -> dict[str, float]:
        """The figures since the last line, by their names in metrics.jsonl; one collective, and begins anew.

        Call it when the numbers of the last step have come: a GPU works behind the program's back.

        Args:
            seconds_waited: In which this rank's steps had no rows.
        """
        now = time.perf_counter()
        seconds = now - self._began - self._paused
        own = [seconds / self._steps, seconds_waited / seconds, peak_memory(self._here.device) / 2**30]
        worst = torch.tensor(own, dtype=torch.float64, device=self._here.device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        step_seconds, data_wait_share, peak_memory_gib = worst.tolist()
        self._steps, self._began, self._paused = 0, now, 0.0
        record = {
            "tokens_per_second": self._step_tokens / step_seconds,
            "step_seconds": step_seconds,
            "data_wait_share": data_wait_share,
            "peak_memory_gib": peak_memory_gib,
        }
        if self._peak is not None and self._token_flops is not None:
            of_rank = record["tokens_per_second"] * self._token_flops / self._here.world_size
            record["model_flops_utilisation"] = of_rank / self._peak
        return record


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: of a GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def token_flops(
    *, parameters: int, layers: int, attention_width: int, sequence_length: int, routed: bool = False
) -> float | None:
    """Floating-point operations of a training step for each token: 6 for each parameter, and attention's.

    As in appendix B of PaLM (arXiv 2204.02311): what is computed again in backward does not count, all of a
    row's positions count as seen by each, and an embedding counts as if it were multiplied.

    Args:
        parameters: Of the whole model.
        layers: With attention.
        attention_width: Heads times the width of each.
        sequence_length: Positions of a row.
        routed: Whether a token meets only some of the parameters, as in a mixture of experts.

    Returns:
        None for a routed model.
    """
    if routed:
        return None
    return 6.0 * parameters + 12.0 * layers * attention_width * sequence_length


def peak_flops(name: str) -> float | None:
    """Dense bfloat16 operations per second of a GPU by its name; None where they are not known for sure.

    From NVIDIA's data sheets, halved where a sheet counts sparse ones: A100 312, H100 SXM and H200 SXM 989,
    B200 2250 TFLOP/s. Slower boards of the same chip (PCIe, NVL; the A100's PCIe board is as fast) and slices
    of a GPU (MIG) are left out.
    """
    words = name.replace("-", " ").split()
    chip = next((word for word in words if word in _PEAKS), None)
    if chip is None or _SLOWER.intersection(words) - ({"PCIe"} if chip == "A100" else set()):
        return None
    return _PEAKS[chip]
