"""Draw a slide, its truth, its prediction and their difference side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from darefine_qupath.classes import IGNORE, ClassMap, Color
from darefine_qupath.errors import GeometryError
from darefine_qupath.report.drawing import draw_key, draw_text, find_borders, key_width

__all__ = ["Panel", "draw_panels", "mark_differences", "paint_labels"]

_GAP = 16
_SMALLEST_TEXT = 16
_TEXT_SHARE = 1 / 36
"""Size of the text as a share of a picture's width: large pictures are shown smaller than they are."""
_OPACITY = 0.5
# Violet is no class in the usual palettes, so what is wrong is not taken for a tumour.
_RIGHT, _WRONG = Color(60, 170, 90), Color(150, 40, 200)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture of a row.

    Attributes
    ----------
    title : str
        Stands above it.
    labels : ndarray of uint8, shape (height, width), or None
        Labels to lay over the slide; None shows the slide alone.
    """

    title: str
    labels: NDArray[np.uint8] | None = None


def paint_labels(
    thumbnail: NDArray[np.uint8], labels: NDArray[np.uint8], colors: Sequence[Color], *, hidden: int | None = None
) -> NDArray[np.uint8]:
    """Lay labels over a slide: a tint, and a full-colour line at every border.

    Parameters
    ----------
    thumbnail : ndarray of uint8, shape (height, width, 3)
        RGB.
    labels : ndarray of uint8, shape (height, width)
        `IGNORE` leaves the slide as it is.
    colors : sequence of Color
        One per label.
    hidden : int, optional
        A label that gets no tint (Normal, say).

    Returns
    -------
    ndarray of uint8, shape (height, width, 3)
        RGB.

    Raises
    ------
    GeometryError
        If the sizes differ.
    """
    if labels.shape != thumbnail.shape[:2]:
        raise GeometryError(f"Labels of {labels.shape} do not lie on a picture of {thumbnail.shape[:2]}")
    palette = np.zeros((256, 3), np.float32)
    palette[: len(colors)] = colors
    opacity = np.zeros(256, np.float32)
    opacity[: len(colors)] = _OPACITY
    if hidden is not None:
        opacity[hidden] = 0.12
    alpha = np.where(find_borders(labels), np.where(opacity > 0, 1, 0)[labels], opacity[labels])[..., None]
    painted: NDArray[np.uint8] = (thumbnail * (1 - alpha) + palette[labels] * alpha).astype(np.uint8)
    return painted


def mark_differences(truth: NDArray[np.uint8], prediction: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """0 where both agree, 1 where they do not, `IGNORE` where either says nothing."""
    known = (truth != IGNORE) & (prediction != IGNORE)
    return np.where(known, (truth != prediction).astype(np.uint8), np.uint8(IGNORE))


def draw_panels(
    path: Path,
    thumbnail: NDArray[np.uint8],
    panels: Sequence[Panel],
    class_map: ClassMap,
    *,
    title: str = "",
    hidden: int | None = None,
    compare: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None = None,
) -> None:
    """Write a row of pictures with a color key as PNG.

    Parameters
    ----------
    path : Path
        Target.
    thumbnail : ndarray of uint8, shape (height, width, 3)
        The slide.
    panels : sequence of Panel
        From left to right.
    class_map : ClassMap
        Names and colours.
    title : str, optional
        Stands above everything.
    hidden : int, optional
        A label that gets hardly any tint.
    compare : tuple of two ndarray, optional
        Truth and prediction; adds a panel that shows where they differ.
    """
    height, width = thumbnail.shape[:2]
    drawn = [
        (
            panel.title,
            thumbnail
            if panel.labels is None
            else paint_labels(thumbnail, panel.labels, class_map.colors, hidden=hidden),
        )
        for panel in panels
    ]
    if compare is not None:
        wrong = mark_differences(*compare)
        drawn.append(("Difference", paint_labels(_grayed(thumbnail), wrong, (_RIGHT, _WRONG), hidden=0)))
    text = max(_SMALLEST_TEXT, round(width * _TEXT_SHARE))
    line = 2 * text - 2
    top = _GAP + (line if title else 0)
    entries = list(zip(class_map.names, class_map.colors, strict=True))
    if compare is not None:
        entries.append(("Wrong", _WRONG))
    # The key may be wider than the pictures of a small slide.
    across = max(len(drawn) * (width + _GAP), key_width((name for name, _ in entries), text)) + _GAP
    canvas = Image.new("RGB", (across, top + line + height + _GAP + line + _GAP), (255, 255, 255))
    pen = ImageDraw.Draw(canvas)
    draw_text(pen, (_GAP, _GAP // 2), title, size=text + text // 4)
    for index, (name, picture) in enumerate(drawn):
        x = _GAP + index * (width + _GAP)
        draw_text(pen, (x, top), name, size=text)
        canvas.paste(Image.fromarray(picture), (x, top + line))
    draw_key(pen, (_GAP, top + line + height + _GAP), entries, size=text)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, optimize=True)


def _grayed(thumbnail: NDArray[np.uint8]) -> NDArray[np.uint8]:
    gray = thumbnail.mean(axis=2, keepdims=True)
    return np.repeat((gray * 0.6 + 100).astype(np.uint8), 3, axis=2)
