"""Give tiles as torch tensors: the `Dataset` over an index and its pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from darefine_qupath.tiles.index import TileIndex
from darefine_qupath.tiles.slide_reader import TileReader

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["TileDataset", "TileItem"]


class TileItem(NamedTuple):
    """One tile; the default collate function makes a batch of the same names.

    Attributes
    ----------
    slice : Tensor of uint8, shape (3, input_px, input_px)
        RGB; white outside the slide.
    context : Tensor of uint8, shape (3, context_input_px, context_input_px)
        RGB; white outside the slide.
    mask : Tensor of uint8, shape (input_px, input_px)
        Labels of the slice, `IGNORE` where nothing is known; a loss wants ``mask.long()``.
    id : str
        Tile id.
    """

    slice: Tensor
    context: Tensor
    mask: Tensor
    id: str


class TileDataset(Dataset[TileItem]):
    """Tiles of an index, read where the index's pixels are.

    Parameters
    ----------
    tiles : TileIndex
        Which tiles, in which order.
    reader : TileReader
        `DatasetReader` for a dataset on disk, `SlideTileReader` for slides read while training.
    """

    def __init__(self, tiles: TileIndex, reader: TileReader) -> None:
        self.tiles = tiles
        self.reader = reader

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: int) -> TileItem:
        record = self.tiles[index]
        pixels = self.reader.read(record)
        return TileItem(
            slice=_channels_first(pixels.slice),
            context=_channels_first(pixels.context),
            mask=torch.from_numpy(pixels.mask),
            id=record.id,
        )


def _channels_first(pixels: NDArray[np.uint8]) -> Tensor:
    # A copy: contexts are shared between tiles, and what a transform writes must not show up in the next one.
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())
