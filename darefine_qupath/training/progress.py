"""Report how far training is, and measure its speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic

__all__ = ["Reporter", "Stopwatch", "TrainingProgress"]


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """How far a run is.

    Attributes
    ----------
    stage : str
        ``"step"`` after each optimiser step, ``"epoch"`` after each epoch and its validation.
    epoch, epochs : int
        Epoch, counted from 1, and how many there are.
    step, steps : int
        Steps done in this epoch and how many it has.
    loss : float
        Mean over the steps of this epoch so far.
    learning_rate : float
        Of the decoder, at this step.
    images_per_second : float
        Tiles trained per second, over the last steps of all processes.
    seconds_left : float
        Until the last epoch is done.
    miou : float or None
        Of the last validation.
    best_miou : float or None
        Of the best.
    iou : mapping of str to float or None
        Per class, of the last validation; None for a class that was neither there nor predicted.
    """

    stage: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    learning_rate: float
    images_per_second: float
    seconds_left: float
    miou: float | None = None
    best_miou: float | None = None
    iou: Mapping[str, float | None] = field(default_factory=dict)


Reporter = Callable[[TrainingProgress], None]
"""Called with each `TrainingProgress`, in the main process only."""


class Stopwatch:
    """Speed of training, validation and waiting for data included, since the run was started or resumed."""

    def __init__(self) -> None:
        self.start = self._previous = monotonic()
        self._steps = 0
        self._recent: float | None = None

    def step(self) -> None:
        """Count a step that has just ended."""
        now = monotonic()
        took, self._previous = now - self._previous, now
        self._steps += 1
        self._recent = took if self._recent is None else 0.9 * self._recent + 0.1 * took

    def skip(self) -> None:
        """Leave out of the recent speed what was done since the last step, such as a validation."""
        self._previous = monotonic()

    def images_per_second(self, batch_size: int) -> float:
        """Tiles per second over the last steps; 0 before the first."""
        return batch_size / max(self._recent, 1e-9) if self._recent else 0.0

    def seconds_left(self, steps_left: int) -> float:
        """Time for so many steps more, at the mean speed since the start."""
        return (monotonic() - self.start) / max(self._steps, 1) * steps_left
