"""Read the stains of a brightfield image, and write QuPath's default ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from darefine_qupath.javaserial.nodes import JavaObject
from darefine_qupath.javaserial.strings import JavaString
from darefine_qupath.javaserial.values import NodeError, text
from darefine_qupath.project.lenient_json import json_object

__all__ = ["DEFAULT_STAINS", "StainVector", "Stains", "default_stains", "read_stains"]

_HEMATOXYLIN = (0.6511078257574492, 0.7011930431234068, 0.29049426072255424)
_EOSIN = (0.21589893562087106, 0.8011960501132093, 0.5580972485873467)
_DAB = (0.26916687204956063, 0.5682411743268502, 0.777593185920953)
DEFAULT_STAINS = {
    "BRIGHTFIELD_H_E": ("H&E default", ("Hematoxylin", _HEMATOXYLIN), ("Eosin", _EOSIN)),
    "BRIGHTFIELD_H_DAB": ("H-DAB default", ("Hematoxylin", _HEMATOXYLIN), ("DAB", _DAB)),
    "BRIGHTFIELD_OTHER": ("H-DAB default", ("Hematoxylin", _HEMATOXYLIN), ("DAB", _DAB)),
}


class StainVector(NamedTuple):
    """A stain: name, unit vector in red, green, blue optical density, and whether it is what the others leave."""

    name: str
    rgb: tuple[float, float, float]
    residual: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Stains:
    """Colour deconvolution of a brightfield image.

    Attributes
    ----------
    name : str
        As shown in QuPath.
    vectors : tuple of StainVector
        Always three; the third is computed where the file names two.
    background : tuple of float
        Red, green and blue of no stain.
    """

    name: str
    vectors: tuple[StainVector, ...]
    background: tuple[float, float, float]


def _triple(value: object, node: JavaObject) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(part) for part in str(value).split())
    except ValueError:
        raise NodeError(f"{value!r} is not a stain vector", node) from None
    return red, green, blue


def _unit(vector: tuple[float, float, float]) -> tuple[float, float, float]:
    length = math.sqrt(sum(part * part for part in vector))
    if not length > 0:
        return vector
    return vector[0] / length, vector[1] / length, vector[2] / length


def _cross(a: tuple[float, float, float], b: tuple[float, float, float]) -> tuple[float, float, float]:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def read_stains(node: JavaObject) -> Stains:
    """Read the node of the stains."""
    described = next((text(part) for part in node.data if isinstance(part, JavaString)), None)
    values = json_object(described or "")
    if values is None:
        raise NodeError("The colour deconvolution stains cannot be read", node)
    vectors = []
    for number in (1, 2, 3):
        if f"Stain {number}" in values:
            rgb = _unit(_triple(values.get(f"Values {number}"), node))
            vectors.append(StainVector(str(values[f"Stain {number}"]), rgb, residual=False))
    if len(vectors) == 2:
        vectors.append(StainVector("Residual", _unit(_cross(vectors[0].rgb, vectors[1].rgb)), residual=True))
    background = _triple(values.get("Background", "255 255 255"), node)
    return Stains(name=str(values.get("Name", "")), vectors=tuple(vectors), background=background)


def default_stains(image_type: str, *, is_modern: bool) -> str:
    """Describe the stains of an image type as QuPath writes them; since 0.6 with all digits."""
    name, *stains = DEFAULT_STAINS[image_type]
    digits = "{!r}" if is_modern else "{:.8f}"
    parts = {"Name": name}
    for number, (stain, values) in enumerate(stains, 1):
        parts |= {f"Stain {number}": stain, f"Values {number}": " ".join(digits.format(value) for value in values)}
    parts["Background"] = " 255 255 255"
    described = ", ".join(f'"{key}" : "{value}"' for key, value in parts.items())
    return f"{{{described}}}"
