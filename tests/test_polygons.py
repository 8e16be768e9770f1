from __future__ import annotations

import warnings

import numpy as np
import pytest
import rasterio
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio import features
from rasterio.transform import Affine

from darefine_qupath.classes import IGNORE
from darefine_qupath.errors import PolygonError
from darefine_qupath.geometry import Box
from darefine_qupath.polygons import GRID, ClassPolygon, vectorize
from darefine_qupath.polygons.pieces import BlockPieces, MapPieces
from darefine_qupath.polygons.trace import Rings

Labels = NDArray[np.uint8]


@st.composite
def label_maps(draw: st.DrawFn) -> Labels:
    """Blobs of three classes and nothing, with specks."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    rows, columns, cell = draw(st.integers(1, 8)), draw(st.integers(1, 8)), draw(st.integers(1, 9))
    labels = np.array(draw(st.sampled_from([(0, 1, 2), (0, 1, 2, IGNORE)])), np.uint8)
    coarse = rng.choice(labels, (rows, columns))
    fine = np.kron(coarse, np.ones((cell, cell), np.uint8))
    specks = rng.random(fine.shape) < draw(st.sampled_from([0.0, 0.05, 0.5]))
    fine[specks] = rng.choice(labels, int(specks.sum()))
    return fine


def boxes(labels: Labels) -> st.SearchStrategy[Box]:
    height, width = labels.shape
    return st.builds(
        lambda scale, dx, dy, x, y: Box(x, y, width * scale + dx, height * scale + dy),
        st.integers(1, 9),
        st.integers(0, 3),
        st.integers(0, 3),
        st.integers(-5, 90_000),
        st.integers(-5, 90_000),
    )


def shapes(polygons: tuple[ClassPolygon, ...]) -> NDArray[np.object_]:
    return np.array([item.geometry for item in polygons], np.object_)


def by_label(polygons: tuple[ClassPolygon, ...]) -> dict[int, shapely.Geometry]:
    labels = sorted({item.label for item in polygons})
    return {label: shapely.union_all([p.geometry for p in polygons if p.label == label]) for label in labels}


def centers(labels: Labels, box: Box, label: int) -> NDArray[np.object_]:
    rows, columns = np.nonzero(labels == label)
    x = box.x + (columns + 0.5) * box.width / labels.shape[1]
    y = box.y + (rows + 0.5) * box.height / labels.shape[0]
    return np.asarray(shapely.points(x, y), np.object_)


def overlap(polygons: NDArray[np.object_]) -> float:
    first, second = shapely.STRtree(polygons).query(polygons, predicate="intersects")
    pairs = first < second
    return float(shapely.area(shapely.intersection(polygons[first[pairs]], polygons[second[pairs]])).sum())


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.data())
def test_polygons_cover_what_is_labelled_and_never_overlap(data: st.DataObject) -> None:
    labels = data.draw(label_maps())
    box = data.draw(boxes(labels))
    polygons = vectorize(
        labels,
        box=box,
        min_area_px=data.draw(st.sampled_from([0, 4, 20])),
        simplify_px=data.draw(st.sampled_from([0.0, 1.0, 3.0])),
        smooth=data.draw(st.booleans()),
        block_px=data.draw(st.sampled_from([16, 23, 2048])),
    )
    found = shapes(polygons)
    assert shapely.is_valid(found).all()
    assert overlap(found) == 0.0
    assert shapely.within(found, shapely.box(*box.bounds)).all()
    assert all(item.geometry.geom_type == "Polygon" and item.label != IGNORE for item in polygons)
    # Taken together with what is nothing, the polygons fill the box: no gap between two classes.
    if not (labels == IGNORE).any():
        assert shapely.union_all(found).equals(shapely.box(*box.bounds))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.data())
def test_vertices_survive_float32(data: st.DataObject) -> None:
    labels = data.draw(label_maps())
    found = shapely.get_coordinates(shapes(vectorize(labels, box=data.draw(boxes(labels)), min_area_px=4)))
    assert (found.astype(np.float32).astype(np.float64) == found).all()
    assert (np.round(found / GRID) * GRID == found).all()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(label_maps(), st.sampled_from([16, 2048]))
def test_without_simplification_every_pixel_is_kept(labels: Labels, block_px: int) -> None:
    box = Box(7, 11, labels.shape[1] * 3, labels.shape[0] * 3)
    polygons = vectorize(labels, box=box, min_area_px=0, simplify_px=0, smooth=False, block_px=block_px)
    regions = by_label(polygons)
    for label in (0, 1, 2):
        assert regions.get(label, shapely.Polygon()).area == 9 * (labels == label).sum()
        assert shapely.contains(regions.get(label), centers(labels, box, label)).all()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(label_maps(), st.sampled_from([16, 2048]))
def test_pixel_centres_stay_within_the_tolerance(labels: Labels, block_px: int) -> None:
    sieved = features.sieve(labels, min(30, labels.size - 1), connectivity=4) if labels.size > 2 else labels
    box = Box(0, 0, labels.shape[1] * 8, labels.shape[0] * 8)
    regions = by_label(vectorize(sieved, box=box, min_area_px=0, simplify_px=1.0, block_px=block_px))
    for label in np.unique(sieved[sieved != IGNORE]):
        assert shapely.distance(regions[label], centers(sieved, box, label)).max() <= 2 * 8


@settings(deadline=None, derandomize=True, max_examples=60)
@given(label_maps(), st.sampled_from([5, 20, 60]), st.sampled_from([16, 2048]))
def test_no_region_is_smaller_than_asked(labels: Labels, smallest: int, block_px: int) -> None:
    box = Box(0, 0, labels.shape[1], labels.shape[0])
    options = {"min_area_px": smallest, "simplify_px": 0, "smooth": False, "max_vertices": None}
    polygons = vectorize(labels, box=box, block_px=block_px, **options)  # type: ignore[arg-type]
    assert all(item.geometry.area >= min(smallest, labels.size) for item in polygons)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(label_maps())
def test_blocks_change_the_outline_only_at_the_cuts(labels: Labels) -> None:
    box = Box(0, 0, labels.shape[1] * 4, labels.shape[0] * 4)
    whole = vectorize(labels, box=box, min_area_px=0)
    cut = vectorize(labels, box=box, min_area_px=0, block_px=16)
    assert [item.label for item in cut] == [item.label for item in whole]


def rings_map() -> Labels:
    rows, columns = np.indices((120, 120)) - 60
    radius = np.hypot(rows, columns)
    return ((radius < 50) & (radius > 20)).astype(np.uint8)


def test_holes_stay_holes() -> None:
    polygons = vectorize(rings_map(), box=Box(0, 0, 960, 960), skip_labels=[0])
    assert [item.label for item in polygons] == [1]
    assert len(polygons[0].geometry.interiors) == 1
    assert polygons[0].geometry.area == pytest.approx(np.pi * (400**2 - 160**2), rel=0.02)


def test_stair_steps_are_gone() -> None:
    outline = vectorize(rings_map(), box=Box(0, 0, 960, 960), skip_labels=[0])[0].geometry.exterior
    radius = np.hypot(*(shapely.get_coordinates(outline) - 480).T)
    assert np.abs(radius - 400).max() < 8
    # The stair steps of a disc are 4 / pi times as long as its circumference.
    assert outline.length == pytest.approx(2 * np.pi * 400, rel=0.02)


def test_small_holes_are_filled_with_what_is_in_them() -> None:
    labels = np.zeros((60, 60), np.uint8)
    labels[10:50, 10:50] = 1
    labels[20:30, 20:30] = 2
    labels[40:45, 40:45] = IGNORE
    options = {"box": Box(0, 0, 480, 480), "mpp": 0.5, "min_area_um2": 64.0}
    assert [item.label for item in vectorize(labels, **options)] == [0, 1, 2]  # type: ignore[arg-type]
    filled = vectorize(labels, min_hole_um2=2000.0, **options)  # type: ignore[arg-type]
    assert [item.label for item in filled] == [0, 1]
    assert not filled[1].geometry.interiors
    assert len(filled[0].geometry.interiors) == 1
    assert filled[1].area_um2 == pytest.approx(filled[1].geometry.area / 4)


def test_where_nothing_is_predicted_there_are_no_holes_to_fill() -> None:
    nothing = np.full((9, 9), IGNORE, np.uint8)
    assert vectorize(nothing, box=Box(0, 0, 72, 72), mpp=0.5, min_hole_um2=5000) == ()


def test_specks_go_to_their_largest_neighbour() -> None:
    labels = np.zeros((40, 40), np.uint8)
    labels[:, 20:] = 1
    labels[10:13, 17:20] = 2
    polygons = vectorize(labels, box=Box(0, 0, 320, 320), mpp=0.5, min_area_um2=9 * 16 + 1)
    assert [item.label for item in polygons] == [0, 1]
    assert sum(item.area_um2 or 0 for item in polygons) == 320 * 320 / 4


@given(st.data())
@settings(deadline=None, derandomize=True, max_examples=100)
def test_no_polygon_is_smaller_than_asked_whatever_simplifying_takes(data: st.DataObject) -> None:
    labels = data.draw(label_maps())
    box = data.draw(boxes(labels))
    smallest = data.draw(st.floats(1, 400))
    options = {"simplify_um": data.draw(st.floats(0, 8)), "max_vertices": None, "block_px": 16}
    size = (box.right - data.draw(st.integers(0, 3)), box.bottom)
    found = vectorize(labels, box=box, mpp=0.5, min_area_um2=smallest, image_size=size, **options)  # type: ignore[arg-type]
    outlines = shapes(found)
    for item in found:
        assert item.area_um2 == pytest.approx(item.geometry.area / 4)
        # Only what touches no other along a line may be smaller: there is nothing that it could go to.
        if item.area_um2 < smallest * (1 - 1e-6):
            beside = shapely.intersection(outlines[outlines != item.geometry], item.geometry)
            assert not shapely.length(beside).any()
    assert shapely.is_valid(outlines).all()
    assert overlap(outlines) == 0
    as_it_was = vectorize(labels, box=box, mpp=0.5, min_area_um2=0, image_size=size, **options)  # type: ignore[arg-type]
    if not (labels == IGNORE).any() and len(as_it_was):
        assert shapely.union_all(outlines).equals(shapely.union_all(shapes(as_it_was)))


def test_a_region_that_simplifying_makes_small_goes_to_its_neighbor() -> None:
    labels = np.zeros((40, 40), np.uint8)
    for row in range(5):
        labels[10 + row, 10 + row] = labels[10 + row, 11 + row] = 1
    polygons = vectorize(labels, box=Box(0, 0, 320, 320), mpp=0.5, min_area_um2=160, simplify_um=8)
    assert [item.label for item in polygons] == [0]
    assert polygons[0].area_um2 == 320 * 320 / 4
    assert not polygons[0].geometry.interiors


@pytest.mark.parametrize("block_px", [16, 2048])
def test_the_work_for_runner_ups_is_that_of_the_classes_that_there_are(
    monkeypatch: pytest.MonkeyPatch, block_px: int
) -> None:
    cells, sums = [], []
    pool_of, zone_sums = MapPieces.of, Rings.zone_sums

    def noted(parts: list[BlockPieces]) -> MapPieces:
        pool = pool_of(parts)
        cells.append(pool.runner_up_counts.size / len(pool.labels))
        return pool

    def counted(rings: Rings, layer: NDArray[np.uint8]) -> NDArray[np.float64]:
        sums.append(layer.size)
        return zone_sums(rings, layer)

    monkeypatch.setattr(MapPieces, "of", noted)
    monkeypatch.setattr(Rings, "zone_sums", counted)
    labels = np.kron(np.arange(64, dtype=np.uint8).reshape(8, 8) % 3, np.ones((8, 8), np.uint8))
    seconds = np.where(labels == 0, 254, 3).astype(np.uint8)
    seconds[:8] = IGNORE
    options = {"box": Box(0, 0, 256, 256), "min_area_px": 1, "simplify_px": 0, "smooth": False}
    found = vectorize(labels, runner_up=seconds, block_px=block_px, **options)  # type: ignore[arg-type]
    assert {(item.label == 0, item.runner_up) for item in found} <= {
        (True, 254),
        (False, 3),
        (True, None),
        (False, None),
    }
    # Two classes are ever second, whatever their labels.
    assert max(cells) == 2
    assert sum(sums) <= 2 * labels.size * len(cells)


def test_pixel_settings_hold_where_the_pixel_size_is_unknown() -> None:
    labels = np.zeros((40, 40), np.uint8)
    labels[10:14, 10:14] = 1
    polygons = vectorize(labels, box=Box(0, 0, 40, 40), min_area_um2=1e9, min_area_px=16)
    assert [(item.label, item.area_um2) for item in polygons] == [(0, None), (1, None)]
    assert [item.label for item in vectorize(labels, box=Box(0, 0, 40, 40), min_area_px=17)] == [0]


def test_large_regions_are_split_along_straight_lines() -> None:
    rng = np.random.default_rng(3)
    labels = np.zeros((300, 300), np.uint8)
    for row, column in rng.integers(0, 290, (500, 2)):
        labels[row : row + 6, column : column + 6] = 1
    box = Box(0, 0, 2400, 2400)
    whole = vectorize(labels, box=box, min_area_px=20, max_vertices=None)
    split = vectorize(labels, box=box, min_area_px=20, max_vertices=400, block_px=128)
    assert shapely.get_num_coordinates(shapes(whole)).max() > 1000
    assert shapely.get_num_coordinates(shapes(split)).max() <= 400
    assert overlap(shapes(split)) == 0.0
    assert shapely.union_all(shapes(split)).equals(shapely.box(*box.bounds))
    assert by_label(split)[1].area == pytest.approx(by_label(whole)[1].area, rel=0.03)


@pytest.mark.parametrize("block_px", [16, 2048])
def test_means_are_over_the_pixels_of_each_region(block_px: int) -> None:
    rng = np.random.default_rng(5)
    labels = np.kron(rng.integers(0, 3, (5, 6)), np.ones((9, 9))).astype(np.uint8)
    confidence = rng.integers(0, 256, labels.shape).astype(np.uint8)
    margin = rng.random(labels.shape).astype(np.float32)
    second = rng.integers(0, 3, labels.shape).astype(np.uint8)
    box = Box(0, 0, labels.shape[1] * 2, labels.shape[0] * 2)
    exact = {"min_area_px": 0, "simplify_px": 0, "smooth": False, "block_px": block_px}
    layers = {"confidence": confidence, "margin": margin, "runner_up": second}
    polygons = vectorize(labels, box=box, **layers, **exact)  # type: ignore[arg-type]
    for item in polygons:
        inside = features.rasterize([item.geometry], labels.shape, transform=Affine.scale(2)).astype(bool)
        counts = np.bincount(second[inside], minlength=3)
        assert item.confidence == pytest.approx(confidence[inside].mean() / 255)
        assert item.margin == pytest.approx(margin[inside].mean(), rel=1e-5)
        assert item.runner_up == counts.argmax()
        assert item.runner_up_share == pytest.approx(counts.max() / inside.sum())


def test_nothing_lies_outside_the_image() -> None:
    labels = np.zeros((10, 10), np.uint8)
    polygons = vectorize(labels, box=Box(-16, -16, 160, 160), image_size=(101, 50), min_area_px=0)
    assert [item.geometry.bounds for item in polygons] == [(0, 0, 101, 50)]
    assert vectorize(labels, box=Box(200, 0, 160, 160), image_size=(101, 50)) == ()


@pytest.mark.parametrize("start", range(-9, 0))
def test_a_row_that_hardly_reaches_into_the_image(start: int) -> None:
    labels = np.random.default_rng(4).integers(0, 3, (38, 39), dtype=np.uint8)
    # Rows of 42/38 pixels: the first that reaches into the image may do so by less than can be told apart.
    polygons = vectorize(
        labels, box=Box(3, start, 40, 42), image_size=(41, start + 40), min_area_px=1, simplify_px=1, smooth=False
    )
    found = shapes(polygons)
    assert shapely.is_valid(found).all()
    assert overlap(found) == 0.0
    bottom = start + 40
    assert shapely.area(found).sum() == pytest.approx(38 * bottom, abs=2 * GRID * (38 + bottom))


def test_a_dataset_and_a_function_give_what_the_array_gives(tmp_path: object) -> None:
    labels = rings_map()
    box = Box(0, 0, 960, 960)
    path = f"{tmp_path}/labels.tif"
    with rasterio.open(
        path, "w", driver="GTiff", width=120, height=120, count=1, dtype="uint8", transform=Affine.scale(8)
    ) as file:
        file.write(labels, 1)
    expected = [item.geometry.wkb for item in vectorize(labels, box=box, block_px=50)]
    with rasterio.open(path) as file:
        assert [item.geometry.wkb for item in vectorize(file, box=box, block_px=50)] == expected
    windows = vectorize(
        lambda at: labels[at.y : at.bottom, at.x : at.right], box=box, block_px=50, size=(120, 120), confidence=labels
    )
    assert [item.geometry.wkb for item in windows] == expected


def test_a_map_too_large_for_memory_lies_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [item.geometry.wkb for item in vectorize(rings_map(), box=Box(0, 0, 960, 960))]
    monkeypatch.setattr("darefine_qupath.polygons.sieve.IN_MEMORY_PIXELS", 1000)
    assert [item.geometry.wkb for item in vectorize(rings_map(), box=Box(0, 0, 960, 960))] == expected


def test_threads_leave_warning_filters_alone() -> None:
    before = list(warnings.filters)
    for _ in range(3):
        vectorize(rings_map(), box=Box(0, 0, 960, 960), block_px=16, threads=8)
    assert warnings.filters == before


def test_progress_counts_blocks() -> None:
    seen: list[tuple[int, int]] = []
    vectorize(
        rings_map(), box=Box(0, 0, 960, 960), block_px=60, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"labels": np.zeros((4, 4, 3), np.uint8)}, r"shape \(4, 4, 3\)", id="three axes"),
        pytest.param({"labels": np.zeros((4, 4), np.int32)}, "uint8 .* int32", id="not labels"),
        pytest.param({"labels": lambda _: np.zeros((4, 4), np.uint8)}, "needs its size", id="no size"),
        pytest.param({"confidence": np.zeros((3, 4), np.uint8)}, "4 x 3, the map is 4 x 4", id="sizes"),
        pytest.param({"box": Box(0, 0, 1, 4)}, "must not be finer", id="too fine"),
        pytest.param({"box": Box(5_000_000, 0, 40, 40)}, "loses precision", id="too far"),
        pytest.param({"mpp": 0.0}, "0.0 micrometers per pixel", id="mpp"),
        pytest.param({"simplify_px": -1}, "simplified by -", id="tolerance"),
        pytest.param({"min_area_px": -1}, "smallest area of -1", id="area"),
        pytest.param({"max_vertices": 3}, "allow 400 or more", id="vertices"),
        pytest.param({"block_px": 3}, "use 16 or more", id="blocks"),
    ],
)
def test_what_cannot_be_done_is_said(change: dict[str, object], message: str) -> None:
    given = {"labels": np.zeros((4, 4), np.uint8), "box": Box(0, 0, 40, 40), **change}
    with pytest.raises(PolygonError, match=message):
        vectorize(**given)  # type: ignore[arg-type]
