"""Compare a slide with those a model was trained on, before its prediction starts: pixel size, stain, damage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from darefine_qupath.errors import PredictionError, SlideError
from darefine_qupath.geometry import is_possible_mpp
from darefine_qupath.limits import naming
from darefine_qupath.prediction.slide_warnings import SlideWarning
from darefine_qupath.prediction.stain import StainStatistics, stain_distance, stain_statistics
from darefine_qupath.tiles.reading import read_slice

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from darefine_qupath.geometry import Box
    from darefine_qupath.prediction.plan import SlidePlan
    from darefine_qupath.slides import Slide
    from darefine_qupath.tiles.spec import TileSpec

__all__ = ["check_slide"]

_STAIN_LIMIT = 1.0
"""Measured on real slides: regions of one case lie 0.1 to 0.3 apart, another case of the laboratory 0.8, other
laboratories 0.9 to 1.6."""

_MPP_LIMIT = 1.25
_PROBES = 32
_PROBE_PX = 128


def check_slide(
    slide: Slide, plan: SlidePlan, *, tiles: TileSpec, mpp: float | None, provenance: Mapping[str, Any]
) -> tuple[SlideWarning, ...]:
    """Compare a slide with what a model was trained on.

    Parameters
    ----------
    slide : Slide
        The slide.
    plan : SlidePlan
        What would be predicted.
    tiles : TileSpec
        Of the model.
    mpp : float or None
        Micrometers per level-0 pixel.
    provenance : mapping
        Of the checkpoint; ``"mpp"`` (the training slides' mean or a list) and ``"stain"`` (see `StainStatistics`) are
        looked at where they are there.

    Returns
    -------
    tuple of SlideWarning
        Empty when nothing is amiss.
    """
    if not plan.num_slices:
        return (SlideWarning(kind="no tissue", message="0 slices to predict: no tissue was found", value=0.0),)
    images, unreadable = _probe(slide, plan)
    found = [_check_mpp(tiles, mpp, provenance.get("mpp")), _check_stain(images, provenance.get("stain"))]
    if unreadable:
        found.append(_unreadable(unreadable, len(images) + len(unreadable)))
    return tuple(warning for warning in found if warning is not None)


def _probe(slide: Slide, plan: SlidePlan) -> tuple[list[NDArray[np.uint8]], list[Box]]:
    """Read slices evenly spread over the plan as prediction will read them: another level may be whole."""
    boxes = [box for row in plan.rows for group in row.groups for box in group.slices]
    step = max(1, len(boxes) // _PROBES)
    images, unreadable = [], []
    every = max(1, plan.spec.input_px // _PROBE_PX)
    for box in boxes[step // 2 :: step][:_PROBES]:
        try:
            images.append(read_slice(slide, box, plan.spec)[::every, ::every])
        except SlideError:
            unreadable.append(box)
    return images, unreadable


def _unreadable(boxes: Sequence[Box], num_probes: int) -> SlideWarning:
    return SlideWarning(
        kind="unreadable",
        message=f"{len(boxes)} of {num_probes} sampled places cannot be read; they will have no prediction",
        value=len(boxes) / num_probes,
    )


def _check_mpp(tiles: TileSpec, mpp: float | None, trained: Any) -> SlideWarning | None:  # noqa: ANN401 - JSON
    if mpp is None:
        return None
    values = trained if isinstance(trained, list | tuple) else [trained]
    known = [float(value) for value in values if isinstance(value, int | float) and is_possible_mpp(value)]
    if known:
        ratio = min((mpp / value for value in known), key=lambda ratio: abs(math.log(ratio)))
        if max(ratio, 1 / ratio) <= _MPP_LIMIT:
            return None
        near = mpp / ratio
        message = f"the slide has {mpp:.4g} um per pixel, {ratio:.2f} times the {near:.4g} of training"
        return SlideWarning(kind="mpp", message=message, value=ratio)
    if tiles.slice_um is None:
        return None
    ratio = mpp / (tiles.slice_um / tiles.input_px)
    if ratio <= _MPP_LIMIT:
        return None
    message = f"the slide has {mpp:.4g} um per pixel, {ratio:.2f} times coarser than the network's input"
    return SlideWarning(kind="mpp", message=message, value=ratio)


def _check_stain(images: Iterable[NDArray[np.uint8]], trained: object) -> SlideWarning | None:
    found = stain_statistics(images)
    if found is None or not isinstance(trained, Mapping):
        return None
    with naming("The stain in the model's header", PredictionError):
        known = StainStatistics.from_json(trained)
    distance = stain_distance(found, known)
    if distance <= _STAIN_LIMIT:
        return None
    message = f"the stain is {distance:.2f} standard deviations from that of training (more than {_STAIN_LIMIT:g})"
    return SlideWarning(kind="stain", message=message, value=distance)
