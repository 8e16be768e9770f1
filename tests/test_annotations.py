"""Annotation records and the labels they paint, against a painter that asks every pixel by itself."""

from __future__ import annotations

import math
from uuid import UUID, uuid4

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry.base import BaseGeometry

from darefine_qupath.annotations import Annotation, Plane, class_counts
from darefine_qupath.classes import IGNORE, ClassMap
from darefine_qupath.errors import AnnotationError, ClassMapError
from darefine_qupath.geometry import Box
from darefine_qupath.masks import LabelPainter, count_unlearnable, unlearnable

CLASSES = ClassMap(names=("A", "B", "C"))
FRAME = Box(0, 0, 40, 40)
properties = settings(deadline=None, derandomize=True, max_examples=100)


def test_records_with_no_probability_are_equal() -> None:
    geometry, identity = shapely.box(0, 0, 1, 1), uuid4()
    record = Annotation(geometry=geometry, id=identity)
    assert record == Annotation(geometry=geometry, id=identity)
    assert record != Annotation(geometry=geometry, id=identity, class_probability=0.5)
    assert record != identity


def painted(*annotations: Annotation, classes: ClassMap = CLASSES, stroke_px: float = 0.0) -> np.ndarray:
    return LabelPainter(annotations, classes, stroke_px=stroke_px).paint(FRAME, (40, 40))


def area(*bounds: float, of: str | None = "A", **more: object) -> Annotation:
    return Annotation(geometry=shapely.box(*bounds), path_class=of, **more)  # type: ignore[arg-type]


def by_pixel(annotations: list[Annotation], classes: ClassMap, box: Box, size: tuple[int, int]) -> np.ndarray:
    """The rules of `LabelPainter` as DESIGN.md words them, pixel centre by pixel centre."""
    x = box.x + (np.arange(size[0]) + 0.5) * box.width / size[0]
    y = box.y + (np.arange(size[1]) + 0.5) * box.height / size[1]
    xx, yy = np.meshgrid(x, y)
    inside = {a.id: shapely.contains_xy(shapely.make_valid(a.geometry), xx, yy) for a in annotations}
    parents = {a.id: a.parent for a in annotations}

    def depth(a: UUID) -> int:
        return 0 if parents[a] is None else 1 + depth(parents[a])

    mask = np.full(xx.shape, classes.unlabelled_label, np.uint8)
    regions = [inside[a.id] for a in annotations if a.path_class == "Region*"]
    if regions:
        mask[:] = classes.region_unlabelled_label
    painters = [a for a in annotations if a.path_class in classes.names]
    best = np.full((*xx.shape, 2), -np.inf)
    for a in painters:
        rank = np.array([depth(a.id), -shapely.make_valid(a.geometry).area])
        wins = inside[a.id] & ((rank[0] > best[..., 0]) | ((rank[0] == best[..., 0]) & (rank[1] >= best[..., 1])))
        mask[wins], best[wins] = classes.label(a.path_class), rank
    if regions:
        mask[~np.logical_or.reduce(regions)] = IGNORE
    for a in annotations:
        if a.path_class == "Ignore*":
            mask[inside[a.id]] = IGNORE
    return mask


# Corners off the grid of pixel centres: on it, two rules for "inside" may both be right.
CORNER = st.tuples(*[st.integers(-20, 60).map(lambda v: v + 0.137)] * 2)


@st.composite
def outlines(draw: st.DrawFn) -> BaseGeometry:
    """Return a blob with up to one hole, or two of them in one, somewhere about `FRAME`."""
    shell = shapely.MultiPoint(draw(st.lists(CORNER, min_size=3, max_size=8, unique=True))).convex_hull.buffer(
        0.731, quad_segs=1
    )
    other = shapely.MultiPoint(draw(st.lists(CORNER, min_size=3, max_size=5, unique=True))).convex_hull.buffer(
        0.317, quad_segs=1
    )
    return draw(
        st.sampled_from([shell, shell.difference(other), shell.union(other), shell.symmetric_difference(other)])
    )


@st.composite
def hierarchies(draw: st.DrawFn, names: tuple[str, ...]) -> list[Annotation]:
    """Return annotations, each below an earlier one or below the root."""
    found: list[Annotation] = []
    for number in range(draw(st.integers(1, 6))):
        parent = draw(st.sampled_from([None, *[a.id for a in found]]))
        outline = draw(outlines().filter(lambda g: not g.is_empty))
        found.append(
            Annotation(id=UUID(int=number), geometry=outline, path_class=draw(st.sampled_from(names)), parent=parent)
        )
    return found


@given(
    hierarchies(("A", "B", "C", "Ignore*", "Region*")), st.sampled_from(["ignore", "C"]), st.sampled_from([1, 2, 0.5])
)
@properties
def test_every_pixel_has_the_label_that_the_rules_give_it(
    annotations: list[Annotation], unlabelled: str, downsample: float
) -> None:
    classes = ClassMap(names=CLASSES.names, unlabelled=unlabelled, region_unlabelled=unlabelled)
    size = (int(40 / downsample), int(40 / downsample))
    found = LabelPainter(annotations, classes).paint(FRAME, size)
    assert (found == by_pixel(annotations, classes, FRAME, size)).all()


@given(hierarchies(("A", "B", "Ignore*")), st.integers(1, 39), st.integers(1, 39))
@properties
def test_a_box_painted_in_parts_is_the_box_painted_whole(annotations: list[Annotation], x: int, y: int) -> None:
    painter = LabelPainter(annotations, CLASSES)
    parts = [[Box(0, 0, x, y), Box(x, 0, 40 - x, y)], [Box(0, y, x, 40 - y), Box(x, y, 40 - x, 40 - y)]]
    joined = np.block([[painter.paint(box, box.size) for box in row] for row in parts])
    assert (joined == painter.paint(FRAME, (40, 40))).all()


@given(st.integers(0, 2**32 - 1), st.integers(0, 60), st.integers(0, 60))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_a_long_outline_is_cut_to_the_box_without_a_trace(seed: int, x: int, y: int) -> None:
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    radius = 40 + 12 * np.sin(7 * angle) + rng.uniform(-9, 9, 400)
    ring = np.column_stack([50.137 + radius * np.cos(angle), 50.137 + radius * np.sin(angle)])
    outline = shapely.Polygon(ring).buffer(0).difference(shapely.Point(50.1, 50.1).buffer(15.3, quad_segs=64))
    annotation = Annotation(geometry=outline, path_class="B")
    box = Box(x, y, 40, 40)
    found = LabelPainter([annotation], CLASSES).paint(box, (40, 40))
    assert (found == by_pixel([annotation], CLASSES, box, (40, 40))).all()


@given(hierarchies(("A", "B", "Ignore*", "Region*")), st.integers(-30, 60), st.integers(-30, 60), st.integers(1, 30))
@properties
def test_what_nothing_touches_has_no_label(annotations: list[Annotation], x: int, y: int, side: int) -> None:
    painter = LabelPainter(annotations, CLASSES)
    box = Box(x, y, side, side)
    if not painter.touches(box):
        assert (painter.paint(box, (side, side)) == IGNORE).all()


def test_the_deeper_object_wins_though_it_is_larger() -> None:
    small = area(5, 5, 15, 15, of="A")
    below = area(0, 0, 30, 30, of="B", parent=small.id)
    assert (painted(small, below)[0:30, 0:30] == 1).all()
    assert (painted(below, small)[0:30, 0:30] == 1).all()


def test_of_siblings_the_smaller_wins_whatever_their_order() -> None:
    large, small = area(0, 0, 30, 30, of="A"), area(5, 5, 15, 15, of="B")
    for mask in (painted(large, small), painted(small, large)):
        assert (mask[5:15, 5:15] == 1).all()
        assert (mask == 0).sum() == 30 * 30 - 100


def test_an_unclassified_parent_counts_for_the_depth() -> None:
    group = area(0, 0, 40, 40, of=None)
    inner, beside = area(0, 0, 30, 30, of="A", parent=group.id), area(0, 0, 10, 10, of="B")
    assert (painted(group, inner, beside)[:10, :10] == 0).all()


def test_a_parent_of_another_kind_counts_whether_it_is_given_or_not() -> None:
    core = area(0, 0, 40, 40, of=None, kind="tma core")
    inner, beside = area(0, 0, 30, 30, of="A", parent=core.id), area(0, 0, 10, 10, of="B")
    assert (painted(core, inner, beside)[:10, :10] == 0).all()
    assert (painted(inner, beside)[:10, :10] == 0).all()


def test_parents_in_a_ring_do_not_hang() -> None:
    one, other = uuid4(), uuid4()
    mask = painted(area(0, 0, 9, 9, of="A", id=one, parent=other), area(0, 0, 5, 5, of="B", id=other, parent=one))
    assert (mask[:5, :5] == 1).all()


def test_a_hole_is_a_hole_and_shows_what_lies_below() -> None:
    ring = Annotation(geometry=shapely.box(0, 0, 30, 30) - shapely.box(10, 10, 20, 20), path_class="A")
    assert (painted(ring)[10:20, 10:20] == IGNORE).all()
    assert (painted(ring, area(-1, -1, 40, 40, of="B"))[10:20, 10:20] == 1).all()


def test_ignored_pixels_are_ignored_whatever_else_covers_them() -> None:
    ignored = area(0, 0, 40, 20, of="Ignore*")
    deeper = area(0, 0, 10, 40, of="A", parent=ignored.id)
    mask = painted(ignored, deeper, classes=ClassMap(names=("A",), unlabelled="A"))
    assert (mask[:20] == IGNORE).all()
    assert (mask[20:] == 0).all()


def test_only_the_inside_of_regions_counts() -> None:
    classes = ClassMap(names=("A", "B"), unlabelled="A", region_unlabelled="B")
    mask = painted(area(0, 0, 20, 20, of="Region*"), area(10, 10, 30, 30, of="A"), classes=classes)
    assert (mask[:10, :20] == 1).all()
    assert (mask[10:20, 10:20] == 0).all()
    assert (mask[20:] == IGNORE).all()
    assert (mask[:, 20:] == IGNORE).all()


def test_without_regions_the_unlabelled_policy_holds_everywhere() -> None:
    assert (painted(classes=ClassMap(names=("A", "B"), unlabelled="B", region_unlabelled="A")) == 1).all()
    assert (painted(classes=ClassMap(names=("A",), region_unlabelled="A")) == IGNORE).all()


LINE = shapely.LineString([(0, 10), (40, 10)])


@pytest.mark.parametrize("geometry", [LINE, shapely.Point(10, 10), shapely.MultiPoint([(1, 1), (9, 9)])], ids=str)
def test_lines_and_points_label_nothing_without_a_stroke(geometry: BaseGeometry) -> None:
    record = Annotation(geometry=geometry, path_class="A")
    assert (painted(record) == IGNORE).all()
    assert unlearnable(record) == "without an area (a line or points)"


def test_a_stroke_gives_lines_and_points_a_width() -> None:
    mask = painted(Annotation(geometry=LINE, path_class="A"), stroke_px=4)
    assert (mask[8:12, :] == 0).all()
    assert (mask == 0).sum() == 4 * 40
    assert (painted(area(0, 0, 10, 10), stroke_px=4) == 0).sum() == 100


SPIKE = shapely.Polygon([(0, 0), (9, 9), (0, 0)])


@pytest.mark.parametrize(
    ("record", "stroke_px"),
    [
        (Annotation(geometry=None, path_class="A"), 0),
        (Annotation(geometry=None, path_class="A"), 3),
        (Annotation(geometry=shapely.Polygon(), path_class="A"), 3),
        (Annotation(geometry=SPIKE, path_class="A"), 0),
        (area(0, 0, 9, 9, plane=Plane(z=2)), 0),
        (area(0, 0, 9, 9, plane=Plane(t=1)), 3),
    ],
    ids=["none", "none, stroke", "empty", "no area", "z", "t"],
)
def test_what_has_no_area_on_the_first_plane_is_skipped_and_counted(record: Annotation, stroke_px: float) -> None:
    assert (painted(record, stroke_px=stroke_px) == IGNORE).all()
    assert unlearnable(record, stroke_px=stroke_px) is not None


@pytest.mark.parametrize("kind", ["detection", "cell", "tile", "tma core"])
def test_only_annotations_with_a_class_label(kind: str) -> None:
    records = [area(0, 0, 9, 9, kind=kind), area(0, 0, 9, 9, of=None)]
    assert (painted(*records) == IGNORE).all()
    assert count_unlearnable(records) == {"without a class": 1}


def test_a_figure_of_eight_is_repaired() -> None:
    eight = shapely.Polygon([(0, 0), (20, 20), (20, 0), (0, 20)])
    assert (painted(Annotation(geometry=eight, path_class="A")) == 0).sum() == pytest.approx(200, abs=20)


def test_an_outline_that_runs_back_over_itself_keeps_its_area() -> None:
    spike = shapely.Polygon([(0, 0), (20, 0), (20, 20), (20, 38), (20, 20), (0, 20)])
    assert (painted(Annotation(geometry=spike, path_class="A")) == 0).sum() == 400


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_coordinates_that_are_not_finite_are_refused(value: float) -> None:
    with np.errstate(invalid="ignore"):
        broken = Annotation(geometry=shapely.Polygon([(0, 0), (value, 9), (9, 0)]), path_class="A")
    with pytest.raises(AnnotationError, match="A Polygon has coordinates that are not finite"):
        LabelPainter([broken], CLASSES)


def test_unknown_classes_are_listed_with_their_counts() -> None:
    with pytest.raises(ClassMapError, match=r"'Fat' \(2\)"):
        LabelPainter([area(0, 0, 1, 1, of="Fat"), area(0, 0, 1, 1, of="Fat"), area(0, 0, 1, 1)], CLASSES)


def test_class_counts_leave_out_the_unclassified() -> None:
    records = [area(0, 0, 1, 1, of=name) for name in ("B", "A", None, "B", "Ignore*")]
    assert class_counts(records) == {"A": 1, "B": 2, "Ignore*": 1}
    assert list(class_counts(records)) == ["A", "B", "Ignore*"]


def test_what_overhangs_the_image_is_ignored() -> None:
    painter = LabelPainter([], ClassMap(names=("A",), unlabelled="A"))
    mask = painter.paint(Box(-10, -20, 40, 40), (20, 20), image_size=(20, 10))
    assert (mask[10:15, 5:15] == 0).all()
    assert (mask == 0).sum() == 50


def test_a_painter_knows_whether_regions_say_where_to_look() -> None:
    assert LabelPainter([area(1, 2, 3, 4), area(5, 6, 7, 8.5, of="Region*")], CLASSES).has_regions
    assert not LabelPainter([area(1, 2, 3, 4), area(0, 0, 99, 99, of="Ignore*")], CLASSES).has_regions


def test_touches_looks_at_regions_and_labels() -> None:
    here, there = Box(0, 0, 9, 9), Box(30, 30, 9, 9)
    region, label = area(0, 0, 9, 9, of="Region*"), area(0, 0, 40, 40)
    assert not LabelPainter([area(0, 0, 9, 9)], CLASSES).touches(there)
    assert LabelPainter([region, label], CLASSES).touches(here)
    assert not LabelPainter([region, label], CLASSES).touches(there)
    assert not LabelPainter([region], CLASSES).touches(here)
    assert LabelPainter([region], ClassMap(names=("A",), region_unlabelled="A")).touches(here)


def test_a_box_that_one_shape_covers_needs_no_drawing_below_it() -> None:
    mask = painted(area(3, 3, 9, 9, of="B"), area(-9, -9, 99, 99, of="A"), area(-9, -9, 90, 90, of="C"))
    assert set(np.unique(mask)) == {1, 2}
    assert (mask[3:9, 3:9] == 1).all()


def test_an_annotation_of_a_million_corners_is_drawn_where_it_is() -> None:
    angle = np.linspace(0, 2 * np.pi, 1_000_000, endpoint=False)
    radius = 20_000 + 50 * np.sin(5000 * angle)
    ring = np.column_stack([radius * np.cos(angle), radius * np.sin(angle)])
    painter = LabelPainter([Annotation(geometry=shapely.Polygon(ring), path_class="A")], CLASSES)
    assert (painter.paint(Box(-500, -500, 1000, 1000), (50, 50)) == 0).all()
    edge = painter.paint(Box(19_000, -1000, 2000, 2000), (100, 100))
    assert 0.4 < (edge == 0).mean() < 0.6


def test_the_area_of_an_ellipse_is_exact() -> None:
    geometry = shapely.affinity.scale(shapely.Point(0, 0).buffer(1, quad_segs=25), 30, 10)
    assert Annotation(geometry=geometry, roi="Ellipse").area == pytest.approx(math.pi * 300)
    assert Annotation(geometry=geometry).area < math.pi * 300
    assert Annotation(geometry=None).area == 0
