"""Plan where tissue, territories and nests lie on a generated slide: shapes only, no pixels.

Benign, In situ and Invasive nests are filled with the same packed nuclei and wear the same collar of plain stroma.
What tells them apart lies beyond the collar, further from the nest than a slice reaches and within reach of its
context: loose pale stroma (Benign), a duct wall (In situ), dense desmoplastic fibres (Invasive).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry import Polygon
from shapely.geometry.base import BaseGeometry

from darefine_qupath.errors import ConfigError

__all__ = ["COLLAR_PX", "TUMOR_CLASSES", "WALL_PX", "Layout", "Nest", "plan_layout"]

TUMOR_CLASSES = ("Benign", "In situ", "Invasive")
COLLAR_PX = 150
"""Width of the collar of plain stroma that every nest wears, in level-0 pixels."""
WALL_PX = 70
"""Width of a duct wall outside the collar."""

_MIN_SIDE = 1600
_MARGIN = 0.04
_NEST_RADIUS = (290, 400)


@dataclass(frozen=True, kw_only=True, slots=True)
class Nest:
    """A region of packed nuclei.

    Attributes
    ----------
    path_class : str
        One of `TUMOR_CLASSES`.
    shape : Polygon
        Outline in level-0 pixels; a hole is a lumen.
    """

    path_class: str
    shape: Polygon


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Everything that lies on one slide.

    Attributes
    ----------
    size : tuple of int
        Width and height in level-0 pixels.
    tissue : Polygon
        The rest is glass.
    territories : mapping of str to geometry
        One per class: what the surroundings look like there. Disjoint.
    nests : tuple of Nest
        Inside the territory of their class.
    glands : tuple of Polygon
        Normal glands, in the Normal territory.
    fat : tuple of Polygon
        Fat lobules, in the Normal territory.
    """

    size: tuple[int, int]
    tissue: Polygon
    territories: dict[str, BaseGeometry]
    nests: tuple[Nest, ...]
    glands: tuple[Polygon, ...]
    fat: tuple[Polygon, ...]


def plan_layout(size: tuple[int, int], rng: np.random.Generator) -> Layout:
    """Lay out a slide with all four classes.

    Parameters
    ----------
    size : tuple of int
        Width and height in level-0 pixels, each at least 1600.
    rng : numpy Generator
        Source of all randomness.

    Returns
    -------
    Layout
        Shapes in level-0 pixels.

    Raises
    ------
    ConfigError
        If the slide is too small to hold every class.
    """
    if min(size) < _MIN_SIDE:
        raise ConfigError(
            f"A generated slide of {size[0]} x {size[1]} px cannot hold four classes; use at least {_MIN_SIDE}"
        )
    tissue = _tissue(size, rng)
    territories = _territories(size, tissue, rng)
    nests = tuple(
        Nest(path_class=name, shape=shape)
        for name in TUMOR_CLASSES
        for shape in _nests(territories[name], min(size), rng)
    )
    normal = territories["Normal"]
    fat = tuple(_scatter(normal, (330, 520), gap=60, tries=60, rng=rng))
    room = normal.difference(shapely.union_all([shape.buffer(40) for shape in fat])) if fat else normal
    glands = tuple(_scatter(room, (70, 120), gap=50, tries=200, rng=rng))
    return Layout(size=size, tissue=tissue, territories=territories, nests=nests, glands=glands, fat=fat)


def wobbly(
    x: float, y: float, radius: float, rng: np.random.Generator, *, wobble: float = 0.12, corners: int = 72
) -> Polygon:
    """Smooth closed outline around a centre: a circle with a few random harmonics."""
    angle = np.linspace(0, 2 * math.pi, corners, endpoint=False)
    reach = np.ones(corners)
    for harmonic in range(2, 7):
        reach += wobble * rng.normal() / harmonic * np.cos(harmonic * angle + rng.uniform(0, 2 * math.pi))
    points = np.stack([x + radius * reach * np.cos(angle), y + radius * reach * np.sin(angle)], axis=1)
    return Polygon(np.round(points, 2))


def _tissue(size: tuple[int, int], rng: np.random.Generator) -> Polygon:
    """Draw a rounded rectangle with a wavy edge, leaving a margin of glass."""
    width, height = size
    angle = np.linspace(0, 2 * math.pi, 160, endpoint=False)
    wave = 1 + sum(0.012 * rng.normal() * np.cos(k * angle + rng.uniform(0, 2 * math.pi)) for k in range(3, 9))
    power = 5.0  # a superellipse: nearly a rectangle, with round corners
    reach = wave / (np.abs(np.cos(angle)) ** power + np.abs(np.sin(angle)) ** power) ** (1 / power)
    half = 0.5 - _MARGIN
    points = np.stack(
        [width * (0.5 + half * reach * np.cos(angle)), height * (0.5 + half * reach * np.sin(angle))], axis=1
    )
    return Polygon(points).intersection(shapely.box(8, 8, width - 8, height - 8))


def _territories(size: tuple[int, int], tissue: Polygon, rng: np.random.Generator) -> dict[str, BaseGeometry]:
    """Cut the tissue by two wavy lines into quarters and deal them out to the classes."""
    width, height = size
    left = Polygon([*_wave(height, width, rng)[:, ::-1], (0, height), (0, 0)])
    upper = Polygon([*_wave(width, height, rng), (width, 0), (0, 0)])
    quarters = [
        left.intersection(upper),
        upper.difference(left),
        left.difference(upper),
        shapely.box(0, 0, width, height).difference(left).difference(upper),
    ]
    names = rng.permutation(["Normal", *TUMOR_CLASSES])
    return {str(name): quarter.intersection(tissue) for name, quarter in zip(names, quarters, strict=True)}


def _wave(length: float, across: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Line along an axis of `length`, waving about the middle of `across`; shape (100, 2)."""
    along = np.linspace(0, length, 100)
    middle = np.full(100, across * rng.uniform(0.48, 0.52))
    for harmonic in (1, 2, 3, 5):
        middle += across * 0.012 * rng.normal() * np.sin(2 * np.pi * harmonic * along / length + rng.uniform(0, 6))
    return np.stack([along, middle], axis=1)


def _nests(territory: BaseGeometry, side: int, rng: np.random.Generator) -> list[Polygon]:
    # A small slide has small nests; there at least one fits into every quadrant.
    scale = min(1.0, side / 3600)
    radius = (_NEST_RADIUS[0] * scale, _NEST_RADIUS[1] * scale)
    halo = (COLLAR_PX + WALL_PX) * scale
    shapes = _scatter(territory.buffer(-halo), radius, gap=2 * halo + 30, tries=1500, rng=rng, wobble=0.16)
    if shapes and rng.random() < 0.6:
        x, y = shapes[0].centroid.coords[0]
        lumen = wobbly(x, y, radius[0] * 0.3, rng)
        shapes[0] = Polygon(shapes[0].exterior, [lumen.exterior])
    return shapes


def _scatter(
    room: BaseGeometry,
    radius: tuple[float, float],
    *,
    gap: float,
    tries: int,
    rng: np.random.Generator,
    wobble: float = 0.12,
) -> list[Polygon]:
    """Drop outlines into `room` until none fits any more, `gap` pixels apart."""
    placed: list[Polygon] = []
    if room.is_empty:
        return placed
    shapely.prepare(room)
    left, top, right, bottom = room.bounds
    for _ in range(tries):
        outline = wobbly(rng.uniform(left, right), rng.uniform(top, bottom), rng.uniform(*radius), rng, wobble=wobble)
        if room.contains(outline) and all(outline.distance(other) >= gap for other in placed):
            placed.append(outline)
    return placed
