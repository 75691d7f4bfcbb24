"""Steps whose loss or gradient is far above the usual, found at the next line of metrics: no step waits."""

import math
import statistics
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

_USUAL_STEPS, _FEWEST_STEPS = 128, 16
"""Steps before one, of which the median is the usual, at most; and at least, for a spike to be one."""


@dataclass(frozen=True)
class Spike:
    """A step with its loss (a mean per position) and gradient norm, and the medians of the steps before."""

    step: int
    loss: float
    usual_loss: float
    gradient_norm: float
    usual_gradient_norm: float


class Spikes:
    """Keeps the losses and gradient norms of steps, on the device until a line of metrics is due.

    Args:
        factor: What is so many times the median of the steps before is a spike; 0 looks for none.
        device: Of the losses.
    """

    def __init__(self, factor: float, device: torch.device) -> None:
        self._factor, self._device = factor, device
        self._new: list[tuple[int, Tensor, Tensor]] = []
        self._losses: deque[float] = deque(maxlen=_USUAL_STEPS)
        self._norms: deque[float] = deque(maxlen=_USUAL_STEPS)

    def note(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Keeps a step's figures: this rank's part of the loss, and the norm, both scalars."""
        if self._factor:
            self._new.append((step, loss, norm))

    def losses(self) -> Tensor:
        """This rank's parts of the losses since the last look, float64 (steps,), to be summed."""
        if not self._new:
            return torch.zeros(0, dtype=torch.float64, device=self._device)
        return torch.stack([loss for _, loss, _ in self._new]).double()

    def found(self, losses: Tensor) -> list[Spike]:
        """The spikes since the last look. Waits for the device.

        Args:
            losses: What `losses` gave, summed over all ranks.
        """
        if not self._new:
            return []
        steps = [step for step, _, _ in self._new]
        norms = torch.stack([norm for _, _, norm in self._new]).tolist()
        self._new = []
        spikes = []
        for step, loss, norm in zip(steps, losses.tolist(), norms, strict=True):
            if not math.isfinite(loss) or not math.isfinite(norm):
                continue  # which is told as such
            if len(self._norms) >= _FEWEST_STEPS:
                usual = statistics.median(self._losses), statistics.median(self._norms)
                if self._is_far(loss, usual[0]) or self._is_far(norm, usual[1]):
                    spikes.append(Spike(step, loss, usual[0], norm, usual[1]))
            self._losses.append(loss)
            self._norms.append(norm)
        return spikes

    def _is_far(self, value: float, usual: float) -> bool:
        return value > self._factor * usual > 0
