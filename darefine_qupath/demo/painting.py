"""Paint a generated slide: hematoxylin and eosin concentrations, then color by Beer and Lambert."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image
from rasterio.features import rasterize
from shapely.geometry.base import BaseGeometry

from darefine_qupath.demo.layout import COLLAR_PX, WALL_PX, Layout

__all__ = ["paint"]

FloatMap = NDArray[np.float32]

# Optical density of unit stain in red, green and blue (Ruifrok and Johnston 2001, as QuPath's H&E default).
_HEMATOXYLIN = np.array([0.651, 0.701, 0.290], np.float32)
_EOSIN = np.array([0.216, 0.801, 0.558], np.float32)
_TEXTURE = 1024
_BAND = 512


def paint(layout: Layout, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw a slide.

    Parameters
    ----------
    layout : Layout
        What lies where.
    rng : numpy Generator
        Source of all randomness.

    Returns
    -------
    ndarray of uint8, shape (height, width, 3)
        RGB.
    """
    shape = (layout.size[1], layout.size[0])
    hematoxylin = np.zeros(shape, np.float32)
    eosin = np.zeros(shape, np.float32)
    _paint_stroma(layout, eosin, hematoxylin, rng)
    _paint_surroundings(layout, eosin, hematoxylin, rng)
    _paint_normal(layout, eosin, hematoxylin, rng)
    _paint_nests(layout, eosin, hematoxylin, rng)
    return _to_rgb(hematoxylin, eosin, rng)


def _mask(shapes: Iterable[BaseGeometry], shape: tuple[int, int]) -> NDArray[np.bool_]:
    kept = [geometry for geometry in shapes if not geometry.is_empty]
    if not kept:
        return np.zeros(shape, bool)
    burnt: NDArray[np.uint8] = rasterize(kept, out_shape=shape, fill=0, default_value=1, dtype="uint8")
    return burnt.astype(bool)


def _soft(shapes: Iterable[BaseGeometry], shape: tuple[int, int], blur: int) -> FloatMap:
    """Mask with an edge about `blur` pixels wide, by drawing it small and enlarging it."""
    small = Image.fromarray(_mask(shapes, shape).astype(np.uint8) * 255)
    small = small.resize((max(1, shape[1] // blur), max(1, shape[0] // blur)), Image.Resampling.BOX)
    soft = small.resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(soft, np.float32) / np.float32(255)


def _fibers(rng: np.random.Generator, *, length: float, width: float, angle: float) -> FloatMap:
    """Periodic texture of wavy fibres in -1..1, shaped in Fourier space."""
    freq = np.fft.fftfreq(_TEXTURE)
    fx, fy = np.meshgrid(freq, freq)
    along = fx * np.cos(angle) + fy * np.sin(angle)
    across = -fx * np.sin(angle) + fy * np.cos(angle)
    envelope = np.exp(-((along * length) ** 2) - (across * width) ** 2) - np.exp(-((fx**2 + fy**2) * (6 * length) ** 2))
    noise = np.fft.fft2(rng.normal(size=(_TEXTURE, _TEXTURE)))
    texture = np.fft.ifft2(noise * np.maximum(envelope, 0)).real
    fibers: FloatMap = np.clip(texture / (3 * texture.std()), -1, 1).astype(np.float32)
    return fibers


def _cover(texture: FloatMap, shape: tuple[int, int]) -> FloatMap:
    repeats = (-(-shape[0] // texture.shape[0]), -(-shape[1] // texture.shape[1]))
    return np.tile(texture, repeats)[: shape[0], : shape[1]]


def _paint_stroma(layout: Layout, eosin: FloatMap, hematoxylin: FloatMap, rng: np.random.Generator) -> None:
    tissue = _soft([layout.tissue], eosin.shape, 4)
    one = _cover(_fibers(rng, length=60, width=9, angle=rng.uniform(0, np.pi)), eosin.shape)
    two = _cover(_fibers(rng, length=45, width=7, angle=rng.uniform(0, np.pi)), eosin.shape)
    eosin += tissue * (0.42 + 0.16 * one + 0.14 * two)
    hematoxylin += tissue * 0.05
    _stamp_nuclei(hematoxylin, _sparse_points(layout.tissue, 0.000035, rng), rng, length=(15, 21), ratio=0.38)


def _paint_surroundings(layout: Layout, eosin: FloatMap, hematoxylin: FloatMap, rng: np.random.Generator) -> None:
    """Paint what tells the classes apart; kept out of every nest's collar."""
    scale = min(1.0, min(layout.size) / 3600)
    collars = {
        name: shapely.union_all([n.shape.buffer(COLLAR_PX * scale) for n in layout.nests if n.path_class == name])
        for name in layout.territories
    }
    loose = _soft([layout.territories["Benign"].difference(collars["Benign"])], eosin.shape, 48)
    veil = _cover(_fibers(rng, length=30, width=22, angle=0.4), eosin.shape)
    eosin += loose * (0.14 + 0.06 * veil - eosin)
    hematoxylin += loose * (0.20 + 0.08 * veil - hematoxylin)
    dense = layout.territories["Invasive"].difference(collars["Invasive"])
    desmoplastic = _soft([dense], eosin.shape, 48)
    coarse = _cover(_fibers(rng, length=120, width=14, angle=rng.uniform(0, np.pi)), eosin.shape)
    eosin += desmoplastic * (0.95 + 0.45 * coarse - eosin)
    _stamp_nuclei(hematoxylin, _sparse_points(dense, 0.00016, rng), rng, length=(9, 11), ratio=0.95)
    walls = [
        nest.shape.buffer((COLLAR_PX + WALL_PX) * scale).difference(nest.shape.buffer(COLLAR_PX * scale))
        for nest in layout.nests
        if nest.path_class == "In situ"
    ]
    wall = _soft(walls, eosin.shape, 8)
    eosin += wall * (1.15 + 0.12 * coarse - eosin)
    hematoxylin += wall * (0.16 - hematoxylin)


def _paint_normal(layout: Layout, eosin: FloatMap, hematoxylin: FloatMap, rng: np.random.Generator) -> None:
    for lobule in layout.fat:
        cells = _fat_cells(lobule, rng)
        _paint_local(eosin, cells, rim=3, inside=0.02, edge=0.5)
        _paint_local(hematoxylin, cells, rim=3, inside=0.0, edge=0.06)
    for gland in layout.glands:
        outline = np.asarray(gland.exterior.coords)[:-1]
        inner = gland.buffer(-26)
        _paint_local(eosin, [gland], rim=2, inside=0.35, edge=0.5)
        if not inner.is_empty:
            _paint_local(eosin, [inner], rim=2, inside=0.04, edge=0.3)
            _paint_local(hematoxylin, [inner], rim=0, inside=0.0, edge=0.0)
        center = outline.mean(axis=0)
        ring = np.concatenate([center + (outline - center) * factor for factor in (0.9, 0.8)])
        _stamp_nuclei(hematoxylin, ring[:: max(1, len(ring) // 60)], rng, length=(14, 18), ratio=0.7)


def _fat_cells(lobule: BaseGeometry, rng: np.random.Generator) -> list[BaseGeometry]:
    left, top, right, bottom = lobule.bounds
    spacing = 78
    grid = [
        (x + rng.uniform(-16, 16), y + rng.uniform(-16, 16))
        for x in np.arange(left, right, spacing)
        for y in np.arange(top, bottom, spacing)
    ]
    cells = shapely.get_parts(shapely.voronoi_polygons(shapely.MultiPoint(grid)))
    inside = [cell.buffer(-26).buffer(23) for cell in cells if lobule.contains(cell)]
    return [cell for cell in inside if not cell.is_empty]


def _paint_local(canvas: FloatMap, shapes: list[BaseGeometry], *, rim: int, inside: float, edge: float) -> None:
    """Fill shapes with a value and draw their rim, touching only the pixels around them."""
    if not shapes:
        return
    left, top, right, bottom = (int(value) for value in shapely.total_bounds(shapes))
    left, top = max(0, left - 4), max(0, top - 4)
    window = canvas[top : bottom + 5, left : right + 5]
    moved = [shapely.transform(shape, lambda points: points - (left, top)) for shape in shapes]
    window[_mask(moved, window.shape)] = inside
    if rim:
        window[_mask([shape.boundary.buffer(rim / 2) for shape in moved], window.shape)] = edge


def _paint_nests(layout: Layout, eosin: FloatMap, hematoxylin: FloatMap, rng: np.random.Generator) -> None:
    shapes = [nest.shape for nest in layout.nests]
    body = _soft(shapes, eosin.shape, 4)
    grain = _cover(_fibers(rng, length=10, width=10, angle=0), eosin.shape)
    eosin += body * (0.34 + 0.07 * grain - eosin)
    hematoxylin += body * (0.12 + 0.05 * grain - hematoxylin)
    lumens = [shapely.Polygon(ring) for shape in shapes for ring in shape.interiors]
    for canvas, value in ((eosin, 0.05), (hematoxylin, 0.0)):
        _paint_local(canvas, lumens, rim=2, inside=value, edge=0.25)
    for shape in shapes:
        _stamp_nuclei(hematoxylin, _packed_points(shape.buffer(-9), 21, rng), rng, length=(15, 21), ratio=0.78)


def _packed_points(shape: BaseGeometry, spacing: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Jittered hexagonal grid inside a shape."""
    left, top, right, bottom = shape.bounds
    rows = np.arange(top, bottom, spacing * 0.87)
    columns = np.arange(left, right, spacing)
    x, y = np.meshgrid(columns, rows)
    x = x + (np.arange(len(rows)) % 2)[:, None] * spacing / 2
    points = np.stack([x.ravel(), y.ravel()], axis=1) + rng.normal(0, spacing * 0.14, (x.size, 2))
    points = points[rng.random(len(points)) < 0.93]
    return _inside(shape, points)


def _sparse_points(shape: BaseGeometry, density: float, rng: np.random.Generator) -> NDArray[np.float64]:
    if shape.is_empty:
        return np.empty((0, 2))
    left, top, right, bottom = shape.bounds
    number = rng.poisson(density * (right - left) * (bottom - top))
    points = rng.uniform((left, top), (right, bottom), (number, 2))
    return _inside(shape, points)


def _inside(shape: BaseGeometry, points: NDArray[np.float64]) -> NDArray[np.float64]:
    hit: NDArray[np.bool_] = shapely.contains_xy(shape, points)
    return points[hit]


def _stamp_nuclei(
    canvas: FloatMap,
    points: NDArray[np.float64],
    rng: np.random.Generator,
    *,
    length: tuple[float, float],
    ratio: float,
) -> None:
    """Add nuclei to the haematoxylin map: soft ellipses with mottled chromatin."""
    stamps = [_nucleus(rng, length, ratio) for _ in range(40)]
    half = stamps[0].shape[0] // 2
    height, width = canvas.shape
    kinds = rng.integers(len(stamps), size=len(points))
    for (x, y), kind in zip(np.round(points).astype(int), kinds, strict=True):
        if half <= x < width - half and half <= y < height - half:
            window = canvas[y - half : y + half + 1, x - half : x + half + 1]
            np.maximum(window, stamps[kind], out=window)


def _nucleus(rng: np.random.Generator, length: tuple[float, float], ratio: float) -> FloatMap:
    half = int(np.ceil(length[1] / 2)) + 2
    grid = np.arange(-half, half + 1)
    x, y = np.meshgrid(grid, grid)
    angle = rng.uniform(0, np.pi)
    major = rng.uniform(*length) / 2
    minor = major * np.clip(rng.normal(ratio, 0.06), 0.25, 1)
    along = (x * np.cos(angle) + y * np.sin(angle)) / major
    across = (-x * np.sin(angle) + y * np.cos(angle)) / minor
    distance = np.sqrt(along**2 + across**2)
    body = np.clip((1.08 - distance) * major / 2.2, 0, 1)
    small = rng.normal(0, 1, (2 * half // 3 + 2, 2 * half // 3 + 2)).astype(np.float32)
    chromatin = np.asarray(Image.fromarray(small).resize(x.shape, Image.Resampling.BICUBIC))
    rim = np.exp(-(((distance - 0.9) / 0.18) ** 2))
    stain = rng.normal(0.85, 0.10) + 0.10 * chromatin + 0.16 * rim
    nucleus: FloatMap = (body * np.clip(stain, 0.3, 1.5)).astype(np.float32)
    return nucleus


def _to_rgb(hematoxylin: FloatMap, eosin: FloatMap, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Turn stain into light, band by band; a scanner's stain strength and noise differ per slide."""
    strength = rng.normal(1, 0.05, 2).astype(np.float32)
    background = np.array([244, 242, 246], np.float32)
    rgb = np.empty((*eosin.shape, 3), np.uint8)
    grain = rng.normal(0, 2.2, (_BAND, eosin.shape[1], 1)).astype(np.float32)
    for top in range(0, eosin.shape[0], _BAND):
        band = slice(top, top + _BAND)
        density = hematoxylin[band, :, None] * (strength[0] * 1.35 * _HEMATOXYLIN) + np.maximum(
            eosin[band, :, None], 0
        ) * (strength[1] * _EOSIN)
        light = background * np.exp(-density) + grain[: density.shape[0]]
        rgb[band] = np.clip(light, 0, 255)
    return rgb
