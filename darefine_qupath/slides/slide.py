"""Define what a slide gives: pixels of any box of level-0 pixels at any size."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from darefine_qupath.geometry import Box, Size

__all__ = ["Slide"]


class Slide(Protocol):
    """An image that can be read at any place and size."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def size(self) -> Size:
        """Width and height of level 0 as QuPath sees it: cropped to OpenSlide's bounds."""

    @property
    def mpp(self) -> float | None:
        """Micrometres per pixel by the file; None where it does not say, or its pixels are not square."""

    @property
    def levels(self) -> tuple[Size, ...]:
        """Width and height of every level in the same frame, finest first."""

    def read(self, box: Box, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Pixels of `box`, resampled to `size` (width, height): RGB, shape (height, width, 3), white outside."""

    def close(self) -> None:
        """Give the file back."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...
