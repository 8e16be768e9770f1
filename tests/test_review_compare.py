from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal
from uuid import UUID

import numpy as np
import pytest
import shapely

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import IGNORE, PathClass
from darefine_qupath.errors import EngineError
from darefine_qupath.geometry import Box
from darefine_qupath.masks import LabelPainter
from darefine_qupath.polygons import ClassPolygon, vectorize
from darefine_qupath.project import Changes, ImageEntry, Project, open_project
from darefine_qupath.review import (
    RunResult,
    WriteOptions,
    compare,
    labels,
    manual_annotations,
    reviewed_annotations,
    sort_objects,
    undo,
    write_back,
    write_page,
)
from tests.fake_project import CLASSES, SLIDE, FakeProject, grid, ours, overlaps, polygon, square, write


@pytest.fixture
def project(tmp_path: Path) -> FakeProject:
    return FakeProject(tmp_path)


def review(project: FakeProject) -> Annotation:
    """One each: locked, reshaped, reclassified, deleted, drawn; one left alone."""
    write(project, [polygon(1 + index % 2, square(1000 * index, 1000)) for index in range(5)])
    locked, moved, other, gone, _ = ours(project)
    project.edit(locked.id, locked=True)
    project.edit(moved.id, geometry=square(1100, 1000))
    project.edit(other.id, path_class="Normal")
    project.delete(gone.id)
    return project.draw(square(0, 6000), "Invasive")


def outcomes(project: Project) -> dict[str, int]:
    return {name: count for name, count in compare(project).counts.items() if count}


ONE_EACH = {"accepted": 1, "reshaped": 1, "reclassified": 1, "rejected": 1, "drawn": 1, "untouched": 1}


def test_review_survives_the_next_prediction_and_its_undo(project: FakeProject) -> None:
    project.draw(square(9000, 7000), "Benign")
    review(project)
    before = project.objects(SLIDE)
    assert outcomes(project) == ONE_EACH
    write(project, grid(5, shift=30), model="m2")
    after = project.objects(SLIDE)
    assert [repr(record) for record in before[:4]] == [repr(record) for record in after[:4]]
    assert overlaps(after) == 0
    assert not any(record.geometry.intersects(square(3000, 1000)) for record in after if record.geometry)
    assert outcomes(project) == {**ONE_EACH, "untouched": len(ours(project)) - 3}
    undo(project)
    assert set(map(repr, project.objects(SLIDE))) == set(map(repr, before))
    assert outcomes(project) == ONE_EACH


def test_report_measures_agreement(project: FakeProject) -> None:
    review(project)
    report = compare(project)
    by_outcome = {item.outcome: item for item in report.images[0].objects}
    assert by_outcome["reshaped"].iou == pytest.approx(3 / 5)
    assert (by_outcome["reclassified"].predicted, by_outcome["reclassified"].final) == ("Benign", "Normal")
    assert by_outcome["rejected"].final is None
    assert by_outcome["drawn"].predicted is None
    assert by_outcome["accepted"].confidence == 0.75
    assert report.classes == ("Benign", "Invasive", "Normal", "(nothing)")
    unit = 400 * 100
    assert (report.confusion.counts / unit).tolist() == [
        [4, 0, 0, 0],
        [0, 3, 0, 1 + 4],
        [4, 0, 0, 0],
        [0, 1 + 4, 0, 0],
    ]
    assert report.iou == {"Benign": 0.5, "Invasive": pytest.approx(3 / 13), "Normal": 0.0}
    assert report.by_class["Benign"]["untouched"] == 1
    assert report.areas_mm2()["Normal"] == {"predicted": 0.0, "final": pytest.approx(0.04)}


def test_report_is_a_table_and_a_page(project: FakeProject, tmp_path: Path) -> None:
    review(project)
    report = compare(project)
    report.write_csv(tmp_path / "review.csv")
    with (tmp_path / "review.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["outcome"] for row in rows) == sorted(ONE_EACH)
    assert {row["predicted_um2"] for row in rows} == {"40000.0", "0.0"}
    assert json.loads(json.dumps(report.to_json()))["counts"]["rejected"] == 1
    write_page(report, tmp_path / "review.html", classes=[PathClass("Benign")])
    page = (tmp_path / "review.html").read_text(encoding="utf-8")
    assert "#808080" in page
    assert "src=" not in page
    assert "href=" not in page
    HTMLParser().feed(page)


def test_names_are_escaped_on_the_page(project: FakeProject, tmp_path: Path) -> None:
    write(project, grid(1))
    project.draw(square(0, 6000), "<b>&")
    write_page(compare(project), tmp_path / "review.html")
    page = (tmp_path / "review.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;" in page
    assert "<b>&" not in page


def test_a_project_without_runs_has_an_empty_review(project: FakeProject, tmp_path: Path) -> None:
    project.draw(square(0, 0), "Benign")
    report = compare(project)
    assert (report.images, set(report.counts.values())) == ((), {0})
    report.write_csv(tmp_path / "review.csv")
    write_page(report, tmp_path / "review.html")
    assert "Nothing has been reviewed yet" in (tmp_path / "review.html").read_text(encoding="utf-8")


def test_unreviewed_predictions_never_train(project: FakeProject) -> None:
    mine = project.draw(square(9000, 7000), "Benign")
    write(project, grid(4), options=WriteOptions(class_suffix=" (predicted)", container=True))
    assert manual_annotations(project, SLIDE) == (mine,)
    assert reviewed_annotations(project, SLIDE).annotations == (mine,)


def test_reviewed_labels_are_in_their_final_class(project: FakeProject) -> None:
    write(project, grid(4), options=WriteOptions(class_suffix=" (predicted)", kind="detection"))
    first, second, *_ = ours(project)
    project.edit(first.id, metadata={**first.metadata, "darefine.review": "accepted"})
    project.edit(second.id, path_class="Normal")
    labels = manual_annotations(project, SLIDE)
    assert [(record.id, record.path_class, record.kind) for record in labels] == [
        (first.id, "Benign", "annotation"),
        (second.id, "Normal", "annotation"),
    ]
    assert manual_annotations(project, SLIDE, taken_over=False) == ()


def test_rejected_areas_are_ignored_unless_redrawn(project: FakeProject) -> None:
    drawn = review(project)
    redrawn = project.draw(square(3000, 1000, 200), "Normal")
    labels = reviewed_annotations(project, SLIDE)
    assert labels.drawn == (drawn.id, redrawn.id)
    assert (len(labels.reviewed), len(labels.rejected)) == (3, 1)
    mask = LabelPainter(labels.annotations, CLASSES).paint(Box(3000, 1000, 400, 400), (4, 4))
    assert mask.tolist() == [[0, 0, IGNORE, IGNORE]] * 2 + [[IGNORE] * 4] * 2
    ignored = [record for record in labels.annotations if record.path_class == "Ignore*"]
    assert ignored[0].geometry is not None
    assert ignored[0].geometry.area == 400**2 - 200**2


def test_a_rejected_area_meets_only_what_was_drawn_on_it(project: FakeProject, monkeypatch: pytest.MonkeyPatch) -> None:
    write(project, grid(6))
    for record in ours(project):
        project.delete(record.id)
    for number in range(400):
        project.draw(square(20 * number + 5, 1300, 10), "Normal")
    met = []
    union = shapely.union_all
    monkeypatch.setattr(labels.shapely, "union_all", lambda shapes: met.append(len(shapes)) or union(shapes))  # type: ignore[func-returns-value]
    found = reviewed_annotations(project, SLIDE)
    assert [record.area for record in found.annotations if record.path_class == "Ignore*"] == [400**2 - 20 * 100] * 6
    assert sum(met) <= 6 * 22


def predicted(columns: range, shift: int) -> tuple[ClassPolygon, ...]:
    """Five squares of a network's map of the fixtures' image, and a stripe over what QuPath's user drew."""
    labels = np.full((192, 256), IGNORE, np.uint8)
    for number, column in enumerate(columns):
        labels[70 + shift : 82 + shift, column : column + 12] = number % 3
    labels[20:40] = 1
    return vectorize(labels, box=Box(0, 0, 2048, 1536), mpp=0.5, confidence=np.full_like(labels, 51))


def by_place(project: Project, image: ImageEntry) -> list[Annotation]:
    found = [item.current for item in sort_objects(project, image).predictions if item.current is not None]
    return sorted((r for r in found if r.geometry.bounds[1] > 500), key=lambda r: r.geometry.bounds)  # type: ignore[union-attr]


def test_from_annotations_to_polygons_and_back(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "qupath" / "qupath-0.6.0" / "annotated", tmp_path / "project")
    project = open_project(tmp_path / "project", engine="embedded")
    image = project.images[0]
    rows = (("Normal", shapely.Point(760, 650).buffer(120)), ("Benign", shapely.box(1000, 560, 1300, 780)))
    ring = shapely.Point(1700, 700).buffer(150).difference(shapely.Point(1700, 700).buffer(60))
    shapes = {**dict(rows), "Invasive": ring}
    drawn = [Annotation(geometry=shape, path_class=name) for name, shape in shapes.items()]
    mask = LabelPainter(drawn, CLASSES).paint(Box(0, 0, 2048, 1536), (512, 384))
    write_back(project, image, vectorize(mask, box=Box(0, 0, 2048, 1536), mpp=0.5), model="m", classes=CLASSES)
    again = [item.current for item in sort_objects(project, image).predictions]
    assert {record.path_class for record in again if record} == set(shapes)
    for record in again:
        assert record is not None
        assert record.geometry is not None
        shape = shapes[record.path_class or ""]
        # One border pixel of the mask: 4 level-0 pixels along the outline.
        assert record.geometry.symmetric_difference(shape).area < 4 * shape.length
        assert record.area == pytest.approx(shape.area, rel=0.02)
        assert len(record.geometry.interiors) == len(shape.interiors)


@pytest.fixture
def folder(data: Path, tmp_path: Path, version: str) -> Path:
    """Project that a QuPath wrote, its images beside it: QuPath needs them to save."""
    shutil.copytree(data / "qupath" / f"qupath-{version}" / "annotated", tmp_path / f"qupath-{version}" / "annotated")
    shutil.copytree(data / "qupath" / "images", tmp_path / "images")
    return tmp_path / f"qupath-{version}" / "annotated"


def plain(records: Sequence[Annotation]) -> dict[UUID, str]:
    """Everything about objects but what they lie below: removing a container moves what is left in it up."""
    return {record.id: repr(replace(record, parent=None)) for record in records}


@pytest.mark.parametrize("version", ["0.4.4", "0.5.1", "0.6.0", "0.7.0"])
@pytest.mark.parametrize("kind", ["annotation", "detection"])
@pytest.mark.parametrize("engine", ["embedded", pytest.param("paquo", marks=pytest.mark.qupath)])
def test_scenario_on_a_project_that_qupath_wrote(
    folder: Path, kind: Literal["annotation", "detection"], engine: Literal["embedded", "paquo"]
) -> None:
    try:
        project = open_project(folder, engine=engine)
    except EngineError as error:
        pytest.skip(str(error))
    image = project.images[0]
    stored = folder / "data" / image.id / "data.qpdata"
    theirs = project.objects(image)
    options = WriteOptions(kind=kind, container=True)

    def predict(model: str, shift: int) -> RunResult:
        polygons = predicted(range(90, 240, 30), shift)
        return write_back(project, image, polygons, model=model, classes=CLASSES, options=options)

    bytes_at_first = stored.read_bytes()
    for _ in range(3):
        predict("m1", 0)
    assert len(project.objects(image)) == len(theirs) + 1 + len(sort_objects(project, image).predictions)
    locked, moved, other, gone, _ = by_place(project, image)
    assert moved.geometry is not None
    assert gone.geometry is not None
    changed = [
        replace(locked, locked=True),
        replace(moved, geometry=shapely.affinity.translate(moved.geometry, 40.5, 10.25)),
        replace(other, path_class="Normal" if other.path_class != "Normal" else "Benign"),
    ]
    drawn = Annotation(geometry=shapely.box(1800, 900, 1990, 1000), path_class="Invasive")
    project.apply(image, Changes(replace=changed, remove=[gone.id], add=[drawn]))
    before, bytes_before = project.objects(image), stored.read_bytes()
    assert {**outcomes(project), "untouched": 1} == ONE_EACH

    result = predict("m2", 1)
    assert (result.adopted, result.rejected, result.suppressed) == (3, 1, 2)
    now = {record.id: record for record in project.objects(image)}
    kept = plain([record for record in before if record.metadata.get("darefine.model") != "m1"])
    kept |= plain([record for record in before if record.id in {item.id for item in changed}])
    assert {key: plain([now[key]])[key] for key in kept} == kept
    new = [record for key, record in now.items() if key not in kept and record.name != "DA-RefineNet m2"]
    assert not any(record.geometry.intersects(gone.geometry) for record in new if record.geometry)
    standing = [r for r in now.values() if r.kind == "annotation" and r.path_class and r.id in kept and r.plane.z == 0]
    assert sum(overlaps([a, b]) for a in new for b in [*standing, *(now[r.id] for r in changed)] if b.area) == 0

    undo(project)
    assert list(map(repr, project.objects(image))) == list(map(repr, before))
    assert stored.read_bytes() == bytes_before
    assert {**outcomes(project), "untouched": 1} == ONE_EACH
    # The first runs' state was edited since: what the pathologist did stays, the rest is as it was.
    undo(project), undo(project), undo(project)
    left = plain(project.objects(image))
    assert set(left) == {record.id for record in (*theirs, *changed, drawn)}
    assert {record.id: left[record.id] for record in theirs} == plain(theirs)
    assert bytes_at_first != stored.read_bytes()


@pytest.mark.parametrize("version", ["0.6.0"])
@pytest.mark.parametrize("engine", ["embedded", pytest.param("paquo", marks=pytest.mark.qupath)])
def test_undo_of_every_run_gives_the_first_file_back(folder: Path, engine: Literal["embedded", "paquo"]) -> None:
    try:
        project = open_project(folder, engine=engine)
    except EngineError as error:
        pytest.skip(str(error))
    image = project.images[0]
    stored = folder / "data" / image.id / "data.qpdata"
    states = []
    for model, shift in (("m1", 0), ("m1", 0), ("m2", 3), ("m1", 0)):
        states.append((stored.read_bytes(), project.objects(image)))
        write_back(project, image, predicted(range(90, 240, 30), shift), model=model, classes=CLASSES)
    for content, objects in reversed(states):
        undo(project)
        assert stored.read_bytes() == content
        assert project.objects(image) == objects


@pytest.mark.parametrize("version", ["0.7.0"])
def test_undo_without_the_backup_gives_the_same_objects_back(folder: Path) -> None:
    project = open_project(folder, engine="embedded")
    image = project.images[0]
    write_back(project, image, predicted(range(90, 240, 30), 0), model="m1", classes=CLASSES)
    before = project.objects(image)
    write_back(project, image, predicted(range(90, 240, 30), 3), model="m2", classes=CLASSES)
    for backup in (folder / "darefine" / "backups" / image.id).iterdir():
        backup.unlink()
    undo(project)
    assert sorted(map(repr, project.objects(image))) == sorted(map(repr, before))
