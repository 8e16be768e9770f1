"""Define the options of a prediction, and report how far it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from darefine_qupath.devices import Precision
from darefine_qupath.errors import PredictionError

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

__all__ = ["PredictOptions", "PredictionProgress"]


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """How slides are predicted.

    Attributes
    ----------
    device : str
        ``"auto"`` (CUDA, else MPS, else CPU) or what torch calls it.
    precision : {"auto", "fp32", "bf16", "fp16"}
        ``"auto"`` takes the fastest that the device computes natively. ``"fp32"`` is float32, never TF32.
    batch_size : int or None
        Slices at once; None chooses. Halved when memory runs out.
    overlap : float or None
        Part of a slice that its neighbor sees too, 0 to 0.9; None is as trained, but at least a quarter.
    context_overlap : float
        How far parent contexts overlap, 0 to 0.9: the part of the slices fitting into one that is left to its
        neighbors, so that slices lie around the middle of their context and see tissue on all sides. Every slice is
        predicted once; a larger overlap costs more contexts, not more slices.
    tta : bool
        Average over the eight symmetries of the square; about eight times slower.
    workers : int or None
        Threads that read ahead; None chooses.
    tissue : bool
        Predict tissue only; glass is marked as not predicted.
    within : shapely geometry or None
        Predict only inside it; level-0 pixels.
    output_stride : {1, 2, 4}
        Input pixels of the network per map pixel. The networks compute scores at a quarter of their input's
        resolution, so a finer map holds nothing more than interpolation.
    compile : bool
        Use ``torch.compile``; worth its start-up time on many slides.
    strict : bool
        Make the warnings about a slide errors.
    resume : bool
        Go on where a killed run stopped, and skip finished slides; False starts over.
    reader : str
        Which reader opens the slide; see `darefine_qupath.slides`.
    crop_bounds : bool
        Crop to OpenSlide's bounds, as QuPath does unless told ``--no-crop``.
    share_context : bool
        Encode each context once for all its slices; False does it for every slice, to compare.
    """

    device: str = "auto"
    precision: Precision = "auto"
    batch_size: int | None = None
    overlap: float | None = None
    context_overlap: float = 0.45
    tta: bool = False
    workers: int | None = None
    tissue: bool = True
    within: BaseGeometry | None = None
    output_stride: int = 4
    compile: bool = False
    strict: bool = False
    resume: bool = True
    reader: str = "auto"
    crop_bounds: bool = True
    share_context: bool = True

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise PredictionError(f"precision is {self.precision!r}; it must be one of {list(get_args(Precision))}")
        for name in ("batch_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PredictionError(f"{name} is {value}; it must be at least 1, or left out")
        for name in ("overlap", "context_overlap"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 0.9:
                raise PredictionError(f"{name} is {value}; it must be a fraction from 0 to 0.9")
        if self.output_stride not in (1, 2, 4):
            raise PredictionError(f"output_stride is {self.output_stride}; it must be 1, 2 or 4")
        if self.within is not None and (self.within.is_empty or not self.within.is_valid):
            raise PredictionError("The area to predict within is empty or not a valid geometry")

    def score_settings(self) -> dict[str, Any]:
        """Return, as plain JSON values, the choices that change scores; the others only change how long it takes."""
        return {
            "precision": self.precision,
            "overlap": self.overlap,
            "context_overlap": self.context_overlap,
            "tta": self.tta,
            "tissue": self.tissue,
            "within": None if self.within is None else self.within.normalize().wkb_hex,
            "output_stride": self.output_stride,
            "crop_bounds": self.crop_bounds,
        }


@dataclass(frozen=True, slots=True)
class PredictionProgress:
    """How far the prediction of a slide is.

    Attributes
    ----------
    slide : str
        File name.
    done, total : int
        Slices; those of an earlier, interrupted run count as done.
    seconds : float
        Since this run began with the slide.
    fresh : int
        Slices done by this run.
    slides_done, num_slides : int
        Of several slides, how many are finished, and how many there are.
    all_seconds_left : float or None
        Time left for all slides at this run's rate, those that have not begun taken to be like the others; None while
        nothing is known.
    key : str
        Of several slides, which: two in different folders may have one file name.
    """

    slide: str
    done: int
    total: int
    seconds: float
    fresh: int
    slides_done: int = 0
    num_slides: int = 1
    all_seconds_left: float | None = None
    key: str = ""

    @property
    def rate(self) -> float:
        """Slices per second of this run; 0 before the first."""
        return self.fresh / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Time left at this rate; None while nothing is known."""
        return (self.total - self.done) / self.rate if self.rate > 0 else None
