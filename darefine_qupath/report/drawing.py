"""Draw text, color keys and borders of labels on pictures with Pillow."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import ImageDraw, ImageFont

from darefine_qupath.classes import Color

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["INK", "draw_box", "draw_key", "draw_text", "find_borders", "key_width", "text_width"]

INK = (30, 30, 30)


def draw_text(
    pen: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, *, size: int, width: float | None = None
) -> None:
    """Write text, its end left out where it is wider than `width` pixels."""
    while width is not None and text_width(text, size) > width:
        text = f"{text[:-4]}..."
    pen.text(corner, text, fill=INK, font=_font(size))


def text_width(text: str, size: int) -> float:
    """Width of a text in pixels."""
    return _font(size).getlength(text)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def draw_key(
    pen: ImageDraw.ImageDraw, corner: tuple[int, int], entries: Iterable[tuple[str, Color]], *, size: int
) -> None:
    """Draw names behind boxes of their colors, in a row."""
    x, y = corner
    for name, color in entries:
        draw_box(pen, (x, y), color, side=size + 2)
        draw_text(pen, (x + size + 10, y), name, size=size)
        x += key_width([name], size)


def key_width(names: Iterable[str], size: int) -> int:
    """Width of a key in pixels."""
    return sum(size + 10 + round(text_width(name, size)) + size + 12 for name in names)


def draw_box(pen: ImageDraw.ImageDraw, corner: tuple[float, float], color: Color, *, side: int) -> None:
    """Draw the box of a color."""
    x, y = corner
    pen.rectangle((x, y, x + side, y + side), fill=tuple(color), outline=INK)


def find_borders(labels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Mark the pixels on both sides of every border between labels."""
    edge = np.zeros(labels.shape, bool)
    differs_x = labels[:, 1:] != labels[:, :-1]
    differs_y = labels[1:] != labels[:-1]
    edge[:, 1:] |= differs_x
    edge[:, :-1] |= differs_x
    edge[1:] |= differs_y
    edge[:-1] |= differs_y
    return edge
