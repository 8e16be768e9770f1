"""Read slides as QuPath sees them: one way to read a box of level-0 pixels at any size, whatever the file.

OpenSlide is the reference, because QuPath reads through it too. `open_slide` picks the reader; every reader gives
whole pixels of a level, and one class (`PyramidSlide`) places, pads and resamples them. `tissue_mask` tells
tissue from glass on a thumbnail.
"""

from darefine_qupath.slides.choice import READERS, ReaderName
from darefine_qupath.slides.digest import file_digest
from darefine_qupath.slides.glass import read_glass_frame
from darefine_qupath.slides.pixel_size import resolve_mpp
from darefine_qupath.slides.pyramid import PyramidSlide, open_slide
from darefine_qupath.slides.slide import Slide
from darefine_qupath.slides.tissue import TissueMask, tissue_mask

__all__ = [
    "READERS",
    "PyramidSlide",
    "ReaderName",
    "Slide",
    "TissueMask",
    "file_digest",
    "open_slide",
    "read_glass_frame",
    "resolve_mpp",
    "tissue_mask",
]
