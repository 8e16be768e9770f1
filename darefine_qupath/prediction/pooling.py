"""Average what is known of input pixels over the pixels of the score map: logits, and the window that blends slices."""

# B batch, K classes, H W input pixels, h w map pixels
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["pool_logits", "pooled_length", "pooled_window", "smooth_window"]


_EDGE = 1e-3
"""Weight of a slice's outermost pixel against its center: small, but a pixel that one slice alone sees counts."""


@lru_cache(maxsize=64)
def smooth_window(length: int) -> NDArray[np.float32]:
    """Weight along one axis of a slice: a raised cosine on a small floor, symmetric, largest in the middle.

    Two such windows half a length apart sum to a constant (but for the floor), so that slices of 50 % overlap
    weigh every pixel alike.

    Parameters
    ----------
    length : int
        Pixels of the network's input.

    Returns
    -------
    ndarray of float32, shape (length,)
        Weights in (0, 1]; read-only.
    """
    position = (np.arange(length) + 0.5) / length
    window: NDArray[np.float32] = (_EDGE + (1 - _EDGE) * np.sin(np.pi * position) ** 2).astype(np.float32)
    window.setflags(write=False)
    return window


def pooled_length(length: int, phase: int, stride: int) -> int:
    """Map pixels that `length` input pixels touch when they start `phase` input pixels into a map pixel."""
    return -(-(phase + length) // stride)


@lru_cache(maxsize=256)
def pooled_window(length: int, phase: int, stride: int) -> NDArray[np.float32]:
    """Mean of the window over each map pixel; input pixels outside the slice count as 0.

    Parameters
    ----------
    length : int
        Input pixels of a slice.
    phase : int
        Input pixels between the first map pixel's edge and the slice's, 0 to `stride` - 1.
    stride : int
        Input pixels per map pixel.

    Returns
    -------
    ndarray of float32, shape (pooled_length(length, phase, stride),)
        Weights; read-only.
    """
    num = pooled_length(length, phase, stride)
    padded = np.zeros(num * stride, np.float32)
    padded[phase : phase + length] = smooth_window(length)
    pooled: NDArray[np.float32] = padded.reshape(num, stride).mean(axis=1)
    pooled.setflags(write=False)
    return pooled


def pool_logits(logits_BKHW: Tensor, phases: Sequence[tuple[int, int]], stride: int) -> Tensor:
    """Average logits over map pixels, of each over the part that the slice covers.

    The result has room for any phase, so that every batch of a slide has the same shape.
    """
    if stride == 1:
        return logits_BKHW
    batch, classes, height, width = logits_BKHW.shape
    down, right = (pooled_length(side, stride - 1, stride) for side in (height, width))
    # Not channels-last: torch pools a handful of channels several times slower so.
    padded = torch.zeros((batch, classes, down * stride, right * stride), device=logits_BKHW.device)
    share_Bhw = np.empty((batch, down, right), np.float32)
    for index, (row, column) in enumerate(phases):
        padded[index, :, row : row + height, column : column + width] = logits_BKHW[index]
        share_Bhw[index] = np.outer(_covered(height, row, stride, down), _covered(width, column, stride, right))
    share_B1hw = torch.from_numpy(np.maximum(share_Bhw, 1 / stride**2)).to(logits_BKHW.device)[:, None]
    return F.avg_pool2d(padded, stride) / share_B1hw


@lru_cache(maxsize=256)
def _covered(length: int, phase: int, stride: int, num: int) -> NDArray[np.float32]:
    """Part of each of `num` map pixels, along one axis, that a slice covers."""
    inside = np.zeros(num * stride, np.float32)
    inside[phase : phase + length] = 1
    part: NDArray[np.float32] = inside.reshape(num, stride).mean(axis=1)
    return part
