"""Whether any rank was asked to stop: all ranks find out at the same point, and none waits for it."""

import torch
from torch import Tensor

from sparsekd.trainer.run.ranks import Ranks, gather
from sparsekd.trainer.run.stop import StopRequest, StopWatch


def asked(here: Ranks, watch: StopWatch) -> StopRequest | None:
    """Why the job is asked to stop, as the lowest rank has it that was asked; None on all where none was.

    A collective that waits for all ranks.
    """
    return next((request for request in gather(here, lambda: watch.request) if request is not None), None)


class Vote:
    """Rides on a reduction that is made anyway, and is read one reduction later.

    By then the device has long passed it, so that reading waits for no work of this step. Every rank calls
    `ballot`, reduces it by a sum with whatever else it reduces, and gives the sum to `count`.
    """

    def __init__(self, watch: StopWatch, device: torch.device) -> None:
        self._watch = watch
        self._device = device
        self._counted: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def ballot(self) -> Tensor:
        """1 where this rank was asked to stop, else 0: float32 scalar."""
        # Not `torch.tensor`, which copies from the host, and so waits for all work of the device.
        return torch.full((), float(self._watch.request is not None), device=self._device)

    def count(self, votes: Tensor) -> None:
        """Takes the reduced ballots, on their way to the host."""
        if self._device.type != "cuda":
            self._counted = [*self._counted[-1:], (votes.clone(), None)]
            return
        here = torch.empty((), dtype=votes.dtype, pin_memory=True)
        here.copy_(votes, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._counted = [*self._counted[-1:], (here, event)]

    def has_passed(self) -> bool:
        """Whether any rank had been asked when the reduction before the last one was made."""
        if len(self._counted) < 2:
            return False
        votes, event = self._counted[0]
        if event is not None:
            event.synchronize()
        return bool(votes.item() > 0)
