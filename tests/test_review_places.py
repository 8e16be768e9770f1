from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely

from darefine_qupath.classes import IGNORE
from darefine_qupath.errors import ReviewError
from darefine_qupath.geometry import Box
from darefine_qupath.polygons import ClassPolygon
from darefine_qupath.review import MapLayers, clear_places, manual_annotations, mark_places, next_places
from tests.fake_project import CLASSES, SLIDE, FakeProject, grid, ours, square, write


@pytest.fixture
def project(tmp_path: Path) -> FakeProject:
    return FakeProject(tmp_path)


def region(x: float, *, margin: float = 0.5, side: float = 800) -> ClassPolygon:
    return ClassPolygon(label=1, geometry=square(x, 0, side), margin=margin, confidence=margin)


def test_uncertain_regions_come_first(project: FakeProject) -> None:
    write(project, [region(0), region(2000, margin=0.1), region(4000, margin=0.9)])
    places = next_places(project, count=2)
    assert [place.uncertainty for place in places] == pytest.approx([0.9, 0.5])
    assert [(place.box.x + place.box.width // 2, place.box.y + place.box.height // 2) for place in places] == [
        (2400, 500),
        (500, 500),
    ]
    assert places[0].score > places[1].score


def test_large_and_unfamiliar_regions_come_first(project: FakeProject) -> None:
    write(project, [region(0), region(2000, side=1900), region(4000)])
    assert next_places(project)[0].box.x == 2450
    places = next_places(project, unlike=lambda _, boxes: [float(box.x > 3000) for box in boxes])
    assert [(place.box.x, place.unlike) for place in places] == [(3900, 1.0), (2450, 0.0), (0, 0.0)]


def test_reviewed_regions_need_no_other_look(project: FakeProject) -> None:
    write(project, grid(2))
    project.edit(ours(project)[0].id, locked=True)
    assert [place.object for place in next_places(project)] == [ours(project)[1].id]


def test_places_lie_inside_the_image_and_apart(project: FakeProject) -> None:
    write(project, [ClassPolygon(label=1, geometry=square(x, 7800, 90), margin=0.2) for x in range(9000, 9900, 100)])
    places = next_places(project, side_um=300)
    assert 1 < len(places) < 9
    assert all(Box(0, 0, 10_000, 8_000).contains(place.box) for place in places)


def layers() -> MapLayers:
    labels = np.full((80, 100), IGNORE, np.uint8)
    labels[:, :60] = 1
    labels[40:, 20:40] = 2
    margin = np.full((80, 100), 230, np.uint8)
    margin[10:20, 10:20] = 20
    return MapLayers(labels=labels, margin=margin, box=Box(0, 0, 10_000, 8_000), names=CLASSES.names)


def test_a_score_map_shows_where_inside_a_region_to_look(project: FakeProject) -> None:
    images = [SLIDE]
    places = next_places(project, images, maps={SLIDE.id: layers()}, count=50)
    assert places[0].box == Box(1000, 1000, 1000, 1000)
    assert (places[0].path_class, places[0].object) == ("Benign", None)
    assert all(place.box.right <= 6000 for place in places)
    assert {place.box.x // 1000 for place in places if place.border} == {2, 4, 3}
    assert next_places(project, images, maps=lambda _: layers(), count=50) == places
    project.draw(square(1400, 1400, 200), "Normal")
    assert next_places(project, images, maps={SLIDE.id: layers()})[0].box != places[0].box


def test_a_doubtful_nest_is_not_drowned_by_the_tissue_around_it(project: FakeProject) -> None:
    found = layers()
    margin = np.full_like(found.margin, 250)
    # One place is a little unsure all over; in another a nest of an eighth is very unsure, which is less on average.
    margin[60:70, 40:50] = 200
    margin[30:34, 22:25] = 10
    place = next_places(project, [SLIDE], maps={SLIDE.id: replace(found, margin=margin)}, count=1)[0]
    assert place.box == Box(2000, 3000, 1000, 1000)
    assert place.uncertainty > 0.9


def test_places_become_annotations_and_go_again(project: FakeProject) -> None:
    mine = project.draw(square(9000, 7000), "Benign")
    write(project, grid(9))
    before = project.objects(SLIDE)
    places = next_places(project, count=8)
    for _ in range(2):
        assert mark_places(project, places) == 8
    marks = project.objects(SLIDE)[len(before) :]
    assert [record.name for record in marks] == [f"Review {number:02d}" for number in range(1, 9)]
    assert all(record.path_class is None for record in marks)
    assert manual_annotations(project, SLIDE) == (mine,)
    assert write(project, grid(9)).kept == 9
    project.edit(marks[3].id, path_class="Benign")
    assert [record.name for record in manual_annotations(project, SLIDE)] == [None, "Review 04"]
    assert clear_places(project) == 7
    assert [record.id for record in project.objects(SLIDE)] == [*(record.id for record in before), marks[3].id]


@pytest.mark.parametrize("change", [{"locked": True}, {"path_class": "Benign"}], ids=["locked", "with a class"])
@pytest.mark.parametrize("which", [0, 2, 4])
def test_places_are_marked_again_when_one_is_somebodys(
    project: FakeProject, change: dict[str, object], which: int
) -> None:
    write(project, grid(9))
    places = next_places(project, count=5)
    assert mark_places(project, places) == 5
    kept = next(record for record in project.objects(SLIDE) if record.name == f"Review {which + 1:02d}")
    project.edit(kept.id, **change)
    before = project.objects(SLIDE)
    assert mark_places(project, places) == 4
    assert project.objects(SLIDE) == before
    assert mark_places(project, next_places(project, count=9)) >= 4
    names = [record.name for record in project.objects(SLIDE) if (record.name or "").startswith("Review")]
    assert len(set(names)) == len(names)
    assert replace(kept, **change) in project.objects(SLIDE)  # type: ignore[arg-type]


def test_a_mark_is_that_of_its_place_whatever_its_rank(project: FakeProject) -> None:
    write(project, grid(6))
    places = next_places(project, count=5)
    mark_places(project, places)
    first = {record.geometry: record.id for record in project.objects(SLIDE) if "darefine.place" in record.metadata}
    mark_places(project, places[::-1])
    marks = [record for record in project.objects(SLIDE) if "darefine.place" in record.metadata]
    assert {record.geometry: record.id for record in marks} == first
    by_place = {record.geometry: record.name for record in marks}
    assert [by_place[shapely.box(*place.box.bounds)] for place in places] == [f"Review 0{n}" for n in range(5, 0, -1)]


def test_no_predictions_no_places(project: FakeProject) -> None:
    assert next_places(project) == ()
    with pytest.raises(ReviewError, match="0 places"):
        next_places(project, count=0)
