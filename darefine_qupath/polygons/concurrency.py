"""Give the threads that work on blocks one lock, and scratch memory of their own."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SCRATCH", "WARNINGS_LOCK"]

# rasterio and shapely silence warnings around some calls, which is not safe between threads: filters stay changed.
WARNINGS_LOCK = threading.Lock()


class _Scratch(threading.local):
    """Memory that a thread uses again and again: fresh pages cost more than the sums that are put into them."""

    def __init__(self) -> None:
        self._kept: dict[type, NDArray[Any]] = {}

    def room(self, shape: tuple[int, int], dtype: type) -> NDArray[Any]:
        """Array of any content, until the thread asks for one of this type again."""
        size = shape[0] * shape[1]
        if dtype not in self._kept or self._kept[dtype].size < size:
            self._kept[dtype] = np.empty(size, dtype)
        return self._kept[dtype][:size].reshape(shape)


SCRATCH = _Scratch()
