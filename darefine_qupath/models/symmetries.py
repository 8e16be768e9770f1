"""Apply the eight symmetries of the square to images and boxes: random in training, averaged over in prediction.

A symmetry is a number from 0 to 7: bit 0 flips left-right, bit 1 up-down, and bit 2 then swaps rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SYMMETRIES", "restore_image", "transform_boxes", "transform_image"]

SYMMETRIES = tuple(range(8))
"""All of them; 0 changes nothing."""


def transform_image(image_HW: Tensor, symmetry: int) -> Tensor:
    """Apply a symmetry to the last two dimensions."""
    image_HW = _flip(image_HW, symmetry)
    return image_HW.transpose(-1, -2) if symmetry & 4 else image_HW


def restore_image(image_HW: Tensor, symmetry: int) -> Tensor:
    """Undo `transform_image`."""
    return _flip(image_HW.transpose(-1, -2) if symmetry & 4 else image_HW, symmetry)


def transform_boxes(box_B4: Tensor, symmetry: int) -> Tensor:
    """Move boxes with the image they lie in.

    Parameters
    ----------
    box_B4 : Tensor, shape (..., 4)
        Left, top, right and bottom as fractions of the image's sides.
    symmetry : int
        What was done to the image.

    Returns
    -------
    Tensor, shape (..., 4)
    """
    left, top, right, bottom = box_B4.unbind(-1)
    if symmetry & 1:
        left, right = 1 - right, 1 - left
    if symmetry & 2:
        top, bottom = 1 - bottom, 1 - top
    return torch.stack([top, left, bottom, right] if symmetry & 4 else [left, top, right, bottom], -1)


def _flip(image_HW: Tensor, symmetry: int) -> Tensor:
    axes = [axis for bit, axis in ((1, -1), (2, -2)) if symmetry & bit]
    return image_HW.flip(axes) if axes else image_HW
