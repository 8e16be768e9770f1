"""Measure the stain of tissue by its optical density, and how far two stains are apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["StainStatistics", "stain_distance", "stain_statistics"]

_TISSUE_DENSITY = 0.1
_LEAST_SPREAD = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class StainStatistics:
    """Optical density of tissue, per channel.

    Attributes
    ----------
    mean, std : tuple of float
        Of ``-log10((pixel + 1) / 256)`` in red, green and blue, over the pixels that are not glass.
    num_pixels : int
        How many those were.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_pixels: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; they stand in a checkpoint's provenance under ``"stain"``."""
        return {"mean": list(self.mean), "std": list(self.std), "num_pixels": self.num_pixels}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StainStatistics:
        """Statistics of what `to_json` gave."""
        return msgspec.convert(data, cls)


def stain_statistics(images: Iterable[NDArray[np.uint8]]) -> StainStatistics | None:
    """Measure the optical density of the tissue in some images.

    Parameters
    ----------
    images : iterable of ndarray of uint8, shape (H, W, 3)
        RGB.

    Returns
    -------
    StainStatistics or None
        None when there is no tissue.
    """
    count, total, squares = 0, np.zeros(3), np.zeros(3)
    for image in images:
        density = -np.log10((image.reshape(-1, 3).astype(np.float64) + 1) / 256)
        tissue = density[density.mean(axis=1) > _TISSUE_DENSITY]
        count += len(tissue)
        total += tissue.sum(axis=0)
        squares += (tissue**2).sum(axis=0)
    if not count:
        return None
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return StainStatistics(mean=tuple(mean.tolist()), std=tuple(std.tolist()), num_pixels=count)


def stain_distance(found: StainStatistics, trained: StainStatistics) -> float:
    """How far two stains are apart: the largest shift of a channel's mean, in standard deviations of training."""
    channels = zip(found.mean, trained.mean, trained.std, strict=True)
    return max(abs(here - there) / max(spread, _LEAST_SPREAD) for here, there, spread in channels)
