"""Find the size of a slide's pixels: what the file states, what can be a microscope's, and whose word counts."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass
from xml.etree.ElementTree import Element, ParseError

import tifffile
from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring as parse_xml

from darefine_qupath.errors import MissingMppError
from darefine_qupath.geometry import MPP_LIMITS, PixelSize, is_possible_mpp
from darefine_qupath.slides.reader import number_or_none
from darefine_qupath.slides.slide import Slide

__all__ = [
    "OmeStatement",
    "is_plausible_pixel_size",
    "read_ome",
    "resolve_mpp",
    "size_by_resolution",
    "square_unless_both",
]

_MICROSCOPES = (0.01, 20.0)
"""Micrometres per pixel of a microscope."""


def square_unless_both(x: float | None, y: float | None) -> PixelSize | None:
    """Size of a pixel; the axis that is not stated is as long as the other."""
    if x is None or y is None:
        x = y = y if x is None else x
    return None if x is None or y is None else PixelSize(x, y)


def is_plausible_pixel_size(size: PixelSize | None) -> bool:
    """Whether pixels may be those of a microscope; 72 and 96 dots per inch would be 353 and 265 micrometres."""
    return size is not None and all(_MICROSCOPES[0] <= value <= _MICROSCOPES[1] for value in size)


def size_by_resolution(tiff: tifffile.TiffFile) -> PixelSize | None:
    """Size of a pixel by ImageJ's unit or the resolution tags, unless they hold a mere default."""
    page = tiff.pages.first
    resolution = [_ratio(page.tags.valueof(name)) for name in ("XResolution", "YResolution")]
    unit = getattr(page.tags.valueof("ResolutionUnit"), "name", "")
    scale = {"CENTIMETER": 10_000.0, "INCH": 25_400.0}.get(unit)
    ij_unit = str((tiff.imagej_metadata or {}).get("unit", ""))
    # ImageJ escapes what is not ASCII.
    scale = _UNITS_UM.get(unicodedata.normalize("NFKC", ij_unit.replace("\\u00B5", "\u00b5")), scale)
    if scale is None:
        return None
    found = square_unless_both(*(scale / value if value else None for value in resolution))
    return found if is_plausible_pixel_size(found) else None


def _ratio(value: object) -> float | None:
    if isinstance(value, tuple) and len(value) == 2 and value[1]:
        return float(value[0] / value[1])
    return number_or_none(value) if value is not None else None


_UNITS_UM = {
    "m": 1e6, "dm": 1e5, "cm": 1e4, "mm": 1e3, "\u03bcm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0,
    "nm": 1e-3, "pm": 1e-6, "\u00c5": 1e-4, "in": 25_400.0, "thou": 25.4,
}  # fmt: skip
"""Micrometres in the units of length of the OME schema that microscopes use; pixels are no length."""


@dataclass(frozen=True)
class OmeStatement:
    """What OME-XML says of the first image of a file."""

    pixel_size: PixelSize | None = None
    magnification: float | None = None


def read_ome(text: str) -> OmeStatement:
    """Read the pixel size and the magnification of the first image that OME-XML describes."""
    try:
        elements: dict[str, Element] = {}
        for element in parse_xml(text).iter():
            elements.setdefault(element.tag.rpartition("}")[2], element)
    except (ParseError, DefusedXmlException, ValueError):
        return OmeStatement()
    pixels, objective = elements.get("Pixels"), elements.get("Objective")

    def side(axis: str) -> float | None:
        value = number_or_none(None if pixels is None else pixels.get(f"PhysicalSize{axis}"))
        unit = "" if pixels is None else pixels.get(f"PhysicalSize{axis}Unit", "um")
        # NFKC makes one of the two code points of the micro sign, and of the angstrom.
        scale = _UNITS_UM.get(unicodedata.normalize("NFKC", unit).strip())
        # 250 nm are 0.25 um, not 0.25000000000000006.
        return None if value is None or scale is None else float(f"{value * scale:.12g}")

    power = number_or_none(None if objective is None else objective.get("NominalMagnification"))
    return OmeStatement(
        square_unless_both(side("X"), side("Y")), power if power is not None and 0 < power < math.inf else None
    )


def resolve_mpp(given: float | None, project: float | None, slide: Slide) -> float:
    """Micrometres per pixel of a slide: as given, else by the project, else by the file.

    Parameters
    ----------
    given : float or None
        By the user.
    project : float or None
        QuPath's pixel calibration.
    slide : Slide
        Whose file may know.

    Returns
    -------
    float
        Micrometres per level-0 pixel.

    Raises
    ------
    MissingMppError
        If none of them says, or one says a value outside `MPP_LIMITS`.
    """
    value = next((value for value in (given, project, slide.mpp) if value is not None), None)
    if value is not None and is_possible_mpp(value):
        return value
    if value is not None:
        least, largest = MPP_LIMITS
        raise MissingMppError(
            f"{slide.path}: a pixel size of {value} um is not possible; it must be {least:g} to {largest:g}"
        )
    raise MissingMppError(
        f"{slide.path}: neither the project nor the file knows the pixel size; give it with --mpp, set it in QuPath "
        f"(Image tab, double click on Pixel width), or work in pixels (slice_px, context_px, stride_px)"
    )
