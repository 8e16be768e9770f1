"""Generated slides: real pyramids, all classes, and tumour classes that only their surroundings tell apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide
import pytest
import shapely
from rasterio.features import geometry_mask
from rasterio.transform import Affine

from darefine_qupath.demo import CLASSES, DemoSlide, draw_slide
from darefine_qupath.demo.layout import COLLAR_PX, TUMOR_CLASSES, WALL_PX, plan_layout
from darefine_qupath.errors import ConfigError

SIZE = (2048, 2048)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> DemoSlide:
    return draw_slide(tmp_path_factory.mktemp("demo") / "slide.tif", seed=5, size=SIZE)


def test_openslide_opens_the_pyramid(slide: DemoSlide) -> None:
    with openslide.OpenSlide(slide.path) as opened:
        assert opened.dimensions == SIZE
        assert opened.level_dimensions[:3] == ((2048, 2048), (1024, 1024), (512, 512))
        assert float(opened.properties["openslide.mpp-x"]) == pytest.approx(0.5)


def test_every_class_is_annotated_inside_the_slide(slide: DemoSlide) -> None:
    assert {record.path_class for record in slide.annotations} == {path_class.name for path_class in CLASSES}
    whole = shapely.box(0, 0, *SIZE)
    for record in slide.annotations:
        assert record.geometry.is_valid
        assert whole.contains(record.geometry)


def test_the_same_seed_draws_the_same_slide(slide: DemoSlide, tmp_path: Path) -> None:
    again = draw_slide(tmp_path / "again.tif", seed=5, size=SIZE)
    assert again.annotations == slide.annotations
    assert again.path.read_bytes() == slide.path.read_bytes()


def test_another_seed_draws_another_slide(slide: DemoSlide, tmp_path: Path) -> None:
    other = draw_slide(tmp_path / "other.tif", seed=6, size=SIZE)
    assert other.annotations[0].geometry != slide.annotations[0].geometry


def test_a_slide_too_small_for_four_classes_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot hold four classes"):
        plan_layout((800, 800), np.random.default_rng(1))


@pytest.mark.parametrize("seed", range(8))
def test_cues_lie_beyond_the_collar_of_every_nest(seed: int) -> None:
    layout = plan_layout((6144, 6144), np.random.default_rng(seed))
    assert {nest.path_class for nest in layout.nests} == set(TUMOR_CLASSES)
    for nest in layout.nests:
        halo = nest.shape.buffer(COLLAR_PX - 1)
        assert layout.territories[nest.path_class].contains(halo)
        assert all(not halo.intersects(other.shape) for other in layout.nests if other is not nest)


def test_tumour_classes_look_alike_inside_and_differ_around(slide: DemoSlide) -> None:
    middle_of_the_wall = (COLLAR_PX + WALL_PX / 2) * min(SIZE) / 3600
    inside, around = _mean_colors(slide, -40), _mean_colors(slide, middle_of_the_wall)
    within = [np.abs(inside[a] - inside[b]).max() for a in TUMOR_CLASSES for b in TUMOR_CLASSES]
    apart = [np.abs(around[a] - around[b]).max() for a in TUMOR_CLASSES for b in TUMOR_CLASSES if a < b]
    assert max(within) < 4
    assert min(apart) > 12


def _mean_colors(slide: DemoSlide, grow: float) -> dict[str, np.ndarray]:
    """Mean colour of each tumour class's interior (negative `grow`), or of what lies just beyond its collar."""
    with openslide.OpenSlide(slide.path) as opened:
        pixels = np.asarray(opened.read_region((0, 0), 0, SIZE).convert("RGB"), float)
    means = {}
    for name in TUMOR_CLASSES:
        filled = [
            shapely.Polygon(part.exterior)
            for record in slide.annotations
            if record.path_class == name
            for part in shapely.get_parts(record.geometry)
        ]
        holes = [
            shapely.Polygon(ring).buffer(20)
            for r in slide.annotations
            for p in shapely.get_parts(r.geometry)
            for ring in p.interiors
        ]
        zones = [s.buffer(grow) if grow < 0 else s.buffer(grow + 15).difference(s.buffer(grow - 15)) for s in filled]
        zone = shapely.union_all(zones).difference(shapely.union_all(holes))
        chosen = geometry_mask([zone], out_shape=SIZE[::-1], transform=Affine.identity(), invert=True)
        means[name] = pixels[chosen].mean(axis=0)
    return means
