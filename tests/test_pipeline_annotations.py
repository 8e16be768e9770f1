"""Annotation files into projects: what is the same, what changed, what is new, and whose it is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from shapely.affinity import translate
from shapely.geometry import box
from shapely.geometry.base import BaseGeometry

from darefine_qupath.annotations import NOBODY, Annotation, Plane, annotators_in, by_annotators
from darefine_qupath.classes import ClassMap, Color
from darefine_qupath.errors import DarefineError, ExchangeError, ProjectError, ProjectWriteError
from darefine_qupath.exchange import Imported, read_annotations, write_geojson
from darefine_qupath.exchange.file_names import NameIndex
from darefine_qupath.exchange.fingerprints import contents
from darefine_qupath.exchange.matching import Origin
from darefine_qupath.exchange.reconcile import reconcile
from darefine_qupath.exchange.shapes import snapped
from darefine_qupath.geometry import Box
from darefine_qupath.masks import LabelPainter, count_unlearnable, unlearnable_words
from darefine_qupath.pipeline.annotation_export import export_geojson, export_labels
from darefine_qupath.pipeline.annotation_import import Import, ImportOptions, import_files, match_files
from darefine_qupath.pipeline.check import check_project
from darefine_qupath.pipeline.create import create_from_slides
from darefine_qupath.pipeline.provenance import LabelCollector
from darefine_qupath.pipeline.selection import collect_training_images
from darefine_qupath.pipeline.settings import Settings
from darefine_qupath.pipeline.tiles import TileRequest, make_tiles
from darefine_qupath.pipeline.train_request import TrainRequest
from darefine_qupath.project import Changes, Project, create_project, open_project
from darefine_qupath.project.embedded import EmbeddedProject
from darefine_qupath.project.qpdata.stored import stored_records
from tests.tile_slides import ramps, write_pyramid

SIZE = (400, 300)
A, B, C = box(10, 10, 60, 60), box(110, 10, 160, 60), box(210, 10, 260, 60)
ID = UUID("6423a977-ffff-48db-affc-cd11632010f0")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of one project and its slide."""
    folder = tmp_path_factory.mktemp("template")
    with create_project(folder / "p", engine="embedded") as project:
        project.add_image(write_pyramid(folder / "slide.tif", ramps(*SIZE)))
    return folder


@pytest.fixture
def project(template: Path, tmp_path: Path) -> Project:
    shutil.copytree(template / "p", tmp_path / "p")
    return open_project(tmp_path / "p", engine="embedded")


def feature(geometry: BaseGeometry, path_class: str | None = "Tumor", **members: object) -> dict[str, object]:
    properties = {} if path_class is None else {"classification": {"name": path_class}}
    shape = json.loads(shapely.to_geojson(geometry))
    return {"type": "Feature", "geometry": shape, "properties": properties, **members}


def write(path: Path, *features: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(features))
    return path


def take(project: Project, *files: Path, dry_run: bool = False, **options: object) -> Import:
    """Import files into the only image; gives what became of the last."""
    pairs = [(file, project.images[0]) for file in files]
    return import_files(project, pairs, ImportOptions(**options), dry_run=dry_run)[-1]


def tally(item: Import) -> tuple[int, int, int, int]:
    return item.added, item.updated, item.removed, item.already


def drawn(project: Project) -> list[tuple[str | None, tuple[float, ...]]]:
    records = project.annotations(project.images[0])
    return sorted((record.path_class, record.geometry.bounds) for record in records)


def edit(project: Project, **changes: object) -> Annotation:
    """Change the first object as a pathologist would."""
    image = project.images[0]
    record = replace(project.objects(image)[0], **changes)
    project.apply(image, Changes(replace=[record]))
    return record


# The same


@pytest.mark.parametrize("identity", [{}, {"id": 7}, {"id": "PathAnnotationObject"}, {"id": str(ID)}], ids=str)
@pytest.mark.parametrize("name", ["a.geojson", "another/a.geojson", "another/name.geojson"])
def test_the_same_objects_come_once(project: Project, tmp_path: Path, identity: dict[str, object], name: str) -> None:
    assert tally(take(project, write(tmp_path / "a.geojson", feature(A, **identity)))) == (1, 0, 0, 0)
    assert tally(take(project, write(tmp_path / name, feature(A, **identity)))) == (0, 0, 0, 1)


def test_order_corners_and_direction_are_no_difference(project: Project, tmp_path: Path) -> None:
    take(project, write(tmp_path / "a.geojson", feature(A), feature(B)))
    turned = [shapely.Polygon([*B.exterior.coords[2:], *B.exterior.coords[1:3]][::-1]), shapely.reverse(A)]
    assert tally(take(project, write(tmp_path / "a.geojson", *map(feature, turned)))) == (0, 0, 0, 2)


def test_one_shape_drawn_twice_stays_two(project: Project, tmp_path: Path) -> None:
    file = write(tmp_path / "a.geojson", feature(A), feature(A))
    assert [tally(take(project, file)) for _ in range(2)] == [(2, 0, 0, 0), (0, 0, 0, 2)]


def test_what_was_exported_is_there_already(project: Project, tmp_path: Path) -> None:
    image = project.images[0]
    curved = shapely.Point(200, 150).buffer(40.123).difference(box(190, 140, 210, 160))
    project.apply(image, Changes(add=[Annotation(geometry=shape, path_class="Tumor") for shape in (A, curved)]))
    export_geojson(project, tmp_path)
    assert tally(take(project, tmp_path / f"{image.id}.geojson")) == (0, 0, 0, 2)


@given(st.tuples(st.floats(-1e3, 3e5), st.floats(-1e3, 3e5)), st.lists(st.floats(5, 500), min_size=3, max_size=12))
def test_content_outlives_storage_at_any_place_of_a_slide(center: tuple[float, float], radii: list[float]) -> None:
    turns = 2 * np.pi * np.arange(len(radii)) / len(radii)
    corners = np.column_stack([np.cos(turns), np.sin(turns)]) * np.array(radii)[:, None] + center
    shape, _ = snapped(shapely.Polygon(corners))
    record = Annotation(geometry=shape, path_class="Tumor")
    (once,) = stored_records([(record, None)])
    (twice,) = stored_records([(once, None)])
    assert contents([record]) == contents([once]) == contents([twice])


# What changed


def test_a_corrected_file_adds_what_is_new(project: Project, tmp_path: Path) -> None:
    take(project, write(tmp_path / "first/a.geojson", feature(A), feature(B)))
    assert tally(take(project, write(tmp_path / "second/a.geojson", feature(A), feature(C), feature(B)))) == (
        1,
        0,
        0,
        2,
    )
    assert drawn(project) == [("Tumor", shape.bounds) for shape in (A, B, C)]


@pytest.mark.parametrize(
    "corrected", [feature(translate(B, 5, 3)), feature(B, "Stroma"), feature(B.buffer(2), "Stroma")], ids=str
)
def test_what_was_corrected_in_place_is_updated_and_named(
    project: Project, tmp_path: Path, corrected: dict[str, object]
) -> None:
    take(project, write(tmp_path / "a.geojson", feature(A), feature(B)))
    done = take(project, write(tmp_path / "a.geojson", feature(A), corrected))
    assert tally(done) == (0, 1, 0, 1)
    assert [str(note) for note in done.notes] == ["feature 1: updated; it was Tumor at (135, 35)"]
    assert len(drawn(project)) == 2


def test_an_object_of_the_same_id_is_updated_wherever_its_file_lies(project: Project, tmp_path: Path) -> None:
    take(project, write(tmp_path / "first/a.geojson", feature(A, id=str(ID))))
    done = take(project, write(tmp_path / "other/b.geojson", feature(C, "Stroma", id=str(ID))))
    assert tally(done) == (0, 1, 0, 0)
    assert drawn(project) == [("Stroma", C.bounds)]


def test_a_class_that_was_read_from_another_field_is_an_update(project: Project, tmp_path: Path) -> None:
    file = write(tmp_path / "a.geojson", {**feature(A), "properties": {"kind": "Tumor"}})
    assert "1 objects cannot train: 1 without a class" in take(project, file).file.warnings
    assert tally(take(project, file, class_from=("kind",))) == (0, 1, 0, 0)
    assert drawn(project) == [("Tumor", A.bounds)]


def test_a_new_name_is_updated_too(project: Project, tmp_path: Path) -> None:
    take(project, write(tmp_path / "a.geojson", feature(A)))
    named = feature(A)
    named["properties"]["name"] = "margin"  # type: ignore[index]
    assert tally(take(project, write(tmp_path / "a.geojson", named))) == (0, 1, 0, 0)
    assert project.annotations(project.images[0])[0].name == "margin"


def test_where_two_can_be_meant_it_is_added_and_named(project: Project, tmp_path: Path) -> None:
    take(project, write(tmp_path / "a.geojson", feature(A), feature(translate(A, 2, 0))))
    done = take(project, write(tmp_path / "a.geojson", feature(translate(A, 1, 1))))
    assert tally(done) == (1, 0, 0, 0)
    assert "may be a new form of several objects" in str(done.notes[0])


EDITS = [
    {"geometry": translate(A, 3, 0)},
    {"path_class": "Stroma"},
    {"locked": True},
    {"name": "seen"},
    {"metadata": {"checked": "yes"}},
    {"color": -65536},
]


@pytest.mark.parametrize("change", EDITS, ids=lambda change: next(iter(change)))
def test_what_was_edited_in_the_project_is_never_changed(
    project: Project, tmp_path: Path, change: dict[str, object]
) -> None:
    file = write(tmp_path / "a.geojson", feature(A, id=str(ID)))
    take(project, file)
    if "metadata" in change:
        change = {"metadata": {**project.objects(project.images[0])[0].metadata, "checked": "yes"}}
    edited = edit(project, **change)
    assert tally(take(project, file, replaces=True)) == (0, 0, 0, 1)
    done = take(project, write(file, feature(B, "Tumor", id=str(ID))), replaces=True)
    assert tally(done) == (1, 0, 0, 0)
    assert "differs from the object of its id, which was drawn or edited in the project" in str(done.notes[0])
    assert "1 objects that a.geojson brought before were edited in the project since, and stay" in done.remarks
    (kept,) = (record for record in project.objects(project.images[0]) if record.id == ID)
    assert (kept.path_class, kept.geometry.bounds) == (edited.path_class, edited.geometry.bounds)


def test_what_holds_cells_is_not_taken_out(project: Project, tmp_path: Path) -> None:
    take(project, write(tmp_path / "a.geojson", feature(A), feature(B)))
    (holder,) = (record for record in project.objects(project.images[0]) if record.geometry.bounds == A.bounds)
    cell = Annotation(geometry=box(20, 20, 30, 30), kind="detection", parent=holder.id)
    project.apply(project.images[0], Changes(add=[cell]))
    assert tally(take(project, write(tmp_path / "a.geojson", feature(C)), replaces=True)) == (1, 0, 1, 0)
    assert drawn(project) == [("Tumor", A.bounds), ("Tumor", C.bounds)]


def test_what_was_drawn_in_the_project_is_never_changed(project: Project, tmp_path: Path) -> None:
    project.apply(project.images[0], Changes(add=[Annotation(id=ID, geometry=A, path_class="Tumor")]))
    assert tally(take(project, write(tmp_path / "a.geojson", feature(B, id=str(ID))), replaces=True)) == (1, 0, 0, 0)
    assert [bounds for _, bounds in drawn(project)] == [A.bounds, B.bounds]


# --replace and --annotator


def test_replace_takes_out_what_the_file_lost(project: Project, tmp_path: Path) -> None:
    take(project, write(tmp_path / "first/a.geojson", feature(A), feature(B)))
    corrected = write(tmp_path / "second/a.geojson", feature(A), feature(C))
    stays = take(project, corrected)
    assert tally(stays) == (1, 0, 0, 1)
    assert "1 objects that a.geojson brought before are not in this file and stay" in stays.remarks[0]
    assert tally(take(project, corrected, replaces=True)) == (0, 0, 1, 2)
    assert drawn(project) == [("Tumor", shape.bounds) for shape in (A, C)]


def test_replace_leaves_other_files_and_raters_alone(project: Project, tmp_path: Path) -> None:
    take(project, write(tmp_path / "b.geojson", feature(A)))
    take(project, write(tmp_path / "x/a.geojson", feature(B)), annotator="X")
    assert tally(take(project, write(tmp_path / "y/a.geojson", feature(C)), annotator="Y", replaces=True)) == (
        1,
        0,
        0,
        0,
    )
    assert len(drawn(project)) == 3


@pytest.mark.parametrize("second", [feature(translate(A, 4, 0), "Stroma"), feature(C, "Stroma"), feature(A)], ids=str)
def test_a_second_raters_file_of_the_same_name_changes_nothing(
    project: Project, tmp_path: Path, second: dict[str, object]
) -> None:
    take(project, write(tmp_path / "A/slide.geojson", feature(A, id=str(ID))), annotator="Anna")
    done = take(project, write(tmp_path / "B/slide.geojson", second | {"id": str(ID)}), annotator="Bert")
    assert tally(done) == (1, 0, 0, 0)
    assert ("Tumor", A.bounds) in drawn(project)
    assert len(drawn(project)) == 2
    assert tally(take(project, tmp_path / "B/slide.geojson", annotator="Bert")) == (0, 0, 0, 1)
    assert tally(take(project, tmp_path / "A/slide.geojson", annotator="Anna")) == (0, 0, 0, 1)


def test_raters_without_a_name_are_not_taken_for_each_other(project: Project, tmp_path: Path) -> None:
    take(project, write(tmp_path / "A/slide.geojson", feature(A)))
    done = take(project, write(tmp_path / "B/slide.geojson", feature(translate(A, 4, 0), "Stroma")))
    assert tally(done) == (1, 0, 0, 0)
    assert "if it is another rater's, with --annotator NAME" in done.remarks[0]


def test_export_chooses_by_annotator_and_keeps_it(project: Project, tmp_path: Path) -> None:
    for name, shape in (("Anna", A), ("Bert", B), (None, C)):
        take(project, write(tmp_path / "in.geojson", feature(shape)), annotator=name)
    for names, expected in ((["Anna"], [A]), (["Bert", NOBODY], [B, C]), ([], [A, B, C])):
        export_geojson(project, tmp_path / "out", annotators=names)
        records = read_annotations(tmp_path / "out/1.geojson").annotations
        assert sorted(record.geometry.bounds for record in records) == [shape.bounds for shape in expected]
    assert len(by_annotators(records, ["Anna"])) == 1
    with pytest.raises(ProjectError, match=r"There are no annotations by 'Ana'; annotators are -, Anna, Bert"):
        export_labels(project, Settings(), tmp_path / "labels", downsample=4, annotators=["Ana"])


@pytest.mark.parametrize("labels", ["manual", "reviewed"])
def test_training_learns_from_the_chosen_annotators(project: Project, tmp_path: Path, labels: str) -> None:
    for name, shape in (("Anna", A), ("Bert", B)):
        take(project, write(tmp_path / "in.geojson", feature(shape)), annotator=name)
    learnt = LabelCollector(labels, ["Bert"])  # type: ignore[arg-type]
    (record,) = learnt(project, project.images[0])
    assert record.geometry.bounds == B.bounds
    assert learnt.objects["1"]["drawn"] == (str(record.id),)
    with pytest.raises(ProjectError, match="There are no annotations by 'Cara'"):
        make_tiles(TileRequest(project=project.path, annotators=("Cara",)), None)


def test_runs_noted_before_there_were_annotators_are_read(tmp_path: Path) -> None:
    request = TrainRequest(tiles=TileRequest(project=tmp_path), out=tmp_path)
    noted = request.to_json()
    del noted["tiles"]["annotators"]
    assert TrainRequest.from_json(noted) == TrainRequest.from_json(request.to_json())


def test_two_files_of_one_name_are_refused_with_replace(project: Project, tmp_path: Path) -> None:
    files = [write(tmp_path / folder / "a.geojson", feature(shape)) for folder, shape in (("A", A), ("B", B))]
    with pytest.raises(ExchangeError, match="have the same name and go into the same image; with --replace"):
        take(project, *files, replaces=True)
    assert drawn(project) == []
    assert tally(take(project, files[0], files[0], replaces=True)) == (0, 0, 0, 1)


def test_replace_removes_nothing_while_objects_of_the_file_are_refused(project: Project, tmp_path: Path) -> None:
    take(project, write(tmp_path / "a.geojson", feature(A), feature(B, "Stroma")))
    damaged = feature(B, "Stroma")
    damaged["geometry"]["coordinates"][0][1][0] = None  # type: ignore[index]
    done = take(project, write(tmp_path / "a.geojson", feature(A), damaged), replaces=True)
    assert tally(done) == (0, 0, 0, 1)
    assert "1 objects that a.geojson brought before are not in this file and stay, because some" in done.remarks[0]
    assert [bounds for _, bounds in drawn(project)] == [B.bounds, A.bounds]


@pytest.mark.parametrize("name", ["b.geojson", "a (1).geojson"])
@pytest.mark.parametrize("changed", [feature(A, "Benign"), feature(translate(A, 0.02, 0))], ids=["class", "outline"])
def test_what_lies_on_an_object_of_another_file_is_named(
    project: Project, tmp_path: Path, name: str, changed: dict[str, object]
) -> None:
    take(project, write(tmp_path / "a.geojson", feature(A)))
    done = take(project, write(tmp_path / name, changed))
    assert tally(done) == (1, 0, 0, 0)
    assert "lies on Tumor at (35, 35), which a.geojson brought; added beside it" in str(done.notes[0])


@pytest.mark.parametrize("change", [{"path_class": "Necrosis"}, {"locked": True}], ids=str)
@pytest.mark.parametrize("replaces", [False, True])
def test_what_lies_on_an_edited_object_is_named(
    project: Project, tmp_path: Path, change: dict[str, object], replaces: bool
) -> None:
    take(project, write(tmp_path / "a.geojson", feature(A)))
    was = edit(project, **change).path_class
    done = take(project, write(tmp_path / "a.geojson", feature(A, "Benign")), replaces=replaces)
    assert tally(done) == (1, 0, 0, 0)
    assert f"lies on {was} at (35, 35), which a.geojson brought and was edited" in str(done.notes[0])


def test_what_lies_on_a_drawn_object_is_named_and_on_a_prediction_not(project: Project, tmp_path: Path) -> None:
    image = project.images[0]
    drawn_one = Annotation(geometry=A, path_class="Stroma")
    predicted = Annotation(geometry=B, path_class="Stroma", metadata={"darefine.run": "x"})
    project.apply(image, Changes(add=[drawn_one, predicted]))
    done = take(project, write(tmp_path / "a.geojson", feature(A), feature(B)))
    assert [str(note) for note in done.notes] == [
        "feature 0: lies on Stroma at (35, 35), which was drawn in the project; added beside it, look at both"
    ]


def test_a_prediction_that_a_rater_exported_is_his_and_comes_once(project: Project, tmp_path: Path) -> None:
    exported = feature(A, id=str(ID))
    exported["properties"]["metadata"] = {"darefine.run": "x"}  # type: ignore[index]
    file = write(tmp_path / "a.geojson", exported)
    assert tally(take(project, file, annotator="Anna")) == (1, 0, 0, 0)
    assert tally(take(project, file, annotator="Anna", replaces=True)) == (0, 0, 0, 1)
    assert len(by_annotators(project.annotations(project.images[0]), ["Anna"])) == 1


def test_an_annotator_given_later_is_said(project: Project, tmp_path: Path) -> None:
    file = write(tmp_path / "a.geojson", feature(A), feature(B))
    take(project, file)
    done = take(project, file, annotator="Anna")
    assert tally(done) == (2, 0, 0, 0)
    assert "2 of those added are in the project without an annotator too" in done.remarks


# One bad object, and all or nothing

BAD = [
    feature(shapely.LineString([(5, 5), (5, 5)])),
    feature(B, "a::b"),
    feature(B, ":"),
    feature(B, "half \ud800"),
    feature(box(5, 5, 5.001, 5.001)),
]


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_one_bad_object_never_refuses_the_file(project: Project, tmp_path: Path, bad: dict[str, object]) -> None:
    done = take(project, write(tmp_path / "a.geojson", feature(A), bad, feature(C)))
    assert tally(done) == (2, 0, 0, 0)
    assert [note.item for note in done.file.refused] == ["feature 1"]
    assert [path_class.name for path_class in project.classes] == ["Tumor"]


def test_children_of_a_bad_object_move_up(project: Project, tmp_path: Path) -> None:
    bad = feature(A, "a::b")
    bad["properties"]["childObjects"] = [feature(box(20, 20, 30, 30))]  # type: ignore[index]
    whole = feature(box(0, 0, 200, 200), "Region*")
    whole["properties"]["childObjects"] = [bad]  # type: ignore[index]
    take(project, write(tmp_path / "a.geojson", whole))
    parent, child = project.objects(project.images[0])
    assert child.parent == parent.id


def test_class_names_and_colours_are_those_of_the_file(project: Project, tmp_path: Path) -> None:
    odd = feature(A)
    odd["properties"]["classification"] = {"name": "a:b", "color": [1, 2, 3]}  # type: ignore[index]
    take(project, write(tmp_path / "a.geojson", odd))
    assert [(item.name, item.color) for item in project.classes] == [("a: b", Color(1, 2, 3))]


def test_nothing_is_written_unless_all_of_it_will_be(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = write(tmp_path / "a.geojson", feature(A))
    (tmp_path / "b.geojson").write_text("{")
    with pytest.raises(ExchangeError, match=r"b\.geojson"):
        take(project, good, tmp_path / "b.geojson")
    assert (drawn(project), project.classes) == ([], ())

    def fail(*_: object, **__: object) -> None:
        raise ProjectWriteError("the disk is full")

    monkeypatch.setattr(EmbeddedProject, "_store", fail)
    with pytest.raises(ProjectWriteError, match="the disk is full"):
        take(project, good)
    assert (drawn(project), project.classes) == ([], ())


def test_nothing_is_written_when_a_later_image_cannot_be_read(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = project.images[0]
    second = project.add_image(write_pyramid(tmp_path / "second.tif", ramps(*SIZE)))
    data = project.path.parent / "data" / second.id / "data.qpdata"
    file = write(tmp_path / "a.geojson", feature(A))
    with monkeypatch.context() as patch:
        data.parent.mkdir(exist_ok=True, parents=True)
        data.write_bytes(b"junk")
        with pytest.raises(DarefineError, match="Not a Java object stream"):
            import_files(project, [(file, first), (file, second)])
        assert drawn(project) == []
        data.unlink()
        store = EmbeddedProject._store

        def fail(self: EmbeddedProject, image: str, *rest: object, **named: object) -> object:
            if image == second.id:
                raise ProjectWriteError("the disk is full")
            return store(self, image, *rest, **named)  # type: ignore[arg-type]

        patch.setattr(EmbeddedProject, "_store", fail)
        with pytest.raises(ProjectWriteError, match=r"the disk is full; imported before that: .*a\.geojson"):
            import_files(project, [(file, first), (file, second)])


def test_a_dry_run_counts_as_the_import_would(project: Project, tmp_path: Path) -> None:
    files = [write(tmp_path / "a.geojson", feature(A)), write(tmp_path / "b/a.geojson", feature(A), feature(B))]
    assert tally(take(project, *files, dry_run=True)) == (1, 0, 0, 1)
    assert drawn(project) == []
    assert tally(take(project, *files)) == (1, 0, 0, 1)


@pytest.mark.parametrize("before", [None, "notes.txt"])
def test_create_that_fails_leaves_nothing_and_can_be_run_again(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    target, slide = tmp_path / "deep" / "p", template / "slide.tif"
    if before:
        target.mkdir(parents=True)
        (target / before).touch()
    write(tmp_path / "notes/slide.geojson", feature(A))

    def fail(*_: object, **__: object) -> None:
        raise ProjectWriteError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddedProject, "apply", fail)
        with pytest.raises(ProjectWriteError, match="the disk is full"):
            create_from_slides(target, [slide], annotations=tmp_path / "notes", engine="embedded")
    assert sorted(path.name for path in (tmp_path / "deep").rglob("*")) == (["notes.txt", "p"] if before else [])
    with pytest.raises(ProjectError, match="no QuPath project at"):
        open_project(target)
    made, _ = create_from_slides(target, [slide], annotations=tmp_path / "notes", engine="embedded")
    with pytest.raises(ProjectError, match="There is a project already"):
        create_from_slides(target, [slide], engine="embedded")
    assert drawn(made) == [("Tumor", A.bounds)]


def creating(target: Path, slides: list[Path], stop: str) -> int:
    """Run create in a process of its own that ends while it adds its second image; gives its exit code."""
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from darefine_qupath.pipeline.create import create_from_slides\n"
        "from darefine_qupath.pipeline.listener import Listener\n"
        "class Stop(Listener):\n"
        f"    def on_items(self, *_): {stop}\n"
        "slides = [Path(each) for each in sys.argv[2:]]\n"
        "create_from_slides(Path(sys.argv[1]), slides, engine='embedded', listener=Stop())"
    )
    arguments = [sys.executable, "-c", code, str(target), *map(str, slides)]
    return subprocess.run(arguments, check=False, capture_output=True).returncode


@pytest.mark.parametrize("stop", ["os.kill(os.getpid(), signal.SIGTERM)", "os._exit(9)", "1 / 0"])
def test_create_that_was_killed_is_refused_when_opened_and_can_be_run_again(
    template: Path, tmp_path: Path, stop: str
) -> None:
    target, slides = tmp_path / "p", [template / "slide.tif"]
    (target / "data").mkdir(parents=True)
    (target / "data/keep.txt").touch()
    assert creating(target, slides, stop) != 0
    is_clean = stop == "1 / 0"
    left = sorted(path.name for path in target.rglob("*"))
    assert left == ["data", "keep.txt"] if is_clean else ".project.qpproj.creating" in left
    with pytest.raises(ProjectError, match=None if is_clean else "its making was stopped half way"):
        open_project(target)
    project, _ = create_from_slides(target, slides, engine="embedded")
    assert [image.id for image in project.images] == ["1"]
    assert (target / "data/keep.txt").exists()
    assert not (target / ".project.qpproj.creating").exists()


def test_masks_beside_the_slides_are_no_slides(
    template: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(template / "slide.tif", tmp_path / "s.tif")
    shutil.copy(template / "slide.tif", tmp_path / "other_seg.tif")
    mask(tmp_path / "s_mask.png", 1)
    made, _ = create_from_slides(tmp_path / "p", [tmp_path], engine="embedded")
    assert [image.name for image in made.images] == ["other_seg.tif", "s.tif"]
    assert "1 files are named like masks of other slides and were not added as images: s_mask.png" in caplog.text
    caplog.clear()
    made, imports = create_from_slides(tmp_path / "q", [tmp_path], annotations=tmp_path, engine="embedded")
    assert [(item.file.path.name, item.image.name, item.added) for item in imports] == [("s_mask.png", "s.tif", 1)]
    assert not caplog.text


# Masks


def mask(path: Path, *values: int, size: tuple[int, int] = (40, 30)) -> Path:
    """Write a mask with a block for each value on a ground of 0."""
    pixels = np.zeros(size[::-1], np.uint8)
    for number, value in enumerate(values):
        pixels[5:10, 5 + 8 * number : 10 + 8 * number] = value
    Image.fromarray(pixels).save(path)
    return path


def test_255_alone_has_no_class_until_it_is_given(project: Project, tmp_path: Path) -> None:
    file = mask(tmp_path / "m.png", 255)
    with pytest.raises(ExchangeError, match=r"only label is 255 .* --label 255=CLASS"):
        take(project, file)
    take(project, file, labels={255: "Tumor"})
    assert drawn(project) == [("Tumor", (50, 50, 100, 100))]


def test_what_a_mask_leaves_out_or_takes_for_granted_is_said(project: Project, tmp_path: Path) -> None:
    file = mask(tmp_path / "m.png", 1, 2, 255)
    assert "label 255 (25 px) was taken for Ignore*" in take(project, file, dry_run=True).file.warnings[0]
    chosen = take(project, file, labels={2: "Tumor"}, dry_run=True)
    assert "label 1, 255 (50 px) has no --label and is left out" in chosen.file.warnings[0]
    with pytest.raises(ExchangeError, match=r"no pixel has the label 3; the mask has 0, 1, 2, 255"):
        take(project, file, labels={3: "Tumor"})
    assert "every pixel is 0" in take(project, mask(tmp_path / "n.png")).file.warnings[0]


@pytest.mark.parametrize("size", [(400, 300), (40, 30), (41, 30), (134, 100), (133, 99), (800, 600)])
def test_a_mask_of_the_images_shape_is_taken(project: Project, tmp_path: Path, size: tuple[int, int]) -> None:
    assert take(project, mask(tmp_path / "m.png", 1, size=size)).added == 1


@pytest.mark.parametrize("size", [(300, 300), (300, 400), (400, 200), (40, 34)])
def test_a_mask_of_another_shape_is_refused_unless_stretched(
    project: Project, tmp_path: Path, size: tuple[int, int]
) -> None:
    file = mask(tmp_path / "m.png", 1, size=size)
    with pytest.raises(ExchangeError, match=r"another aspect ratio .* --stretch"):
        take(project, file)
    assert take(project, file, stretch=True).added == 1


@given(
    st.integers(200, 200_000), st.integers(200, 200_000), st.floats(1, 64), st.sampled_from([np.floor, np.ceil, round])
)
def test_any_downsample_makes_a_mask_of_the_images_shape(
    width: int, height: int, downsample: float, rounding: object
) -> None:
    from darefine_qupath.exchange.label_masks import _check_shape  # noqa: PLC0415

    size = tuple(max(1, int(rounding(side / downsample))) for side in (width, height))  # type: ignore[operator]
    _check_shape(Path("m.png"), size, (width, height), None)


def test_a_mask_of_ours_knows_its_image(project: Project, tmp_path: Path) -> None:
    take(project, write(tmp_path / "a.geojson", feature(A)))
    export_labels(project, Settings(), tmp_path / "labels", downsample=4)
    image = replace(project.images[0], width=500)
    with pytest.raises(ExchangeError, match=r"made of an image of 400 x 300 px, this one has 500 x 300"):
        import_files(project, [(tmp_path / "labels/1.tif", image)])


# Which image


@pytest.mark.parametrize(
    ("file", "image"),
    [
        *((f"Patient1{rest}", "Patient1.svs") for rest in (".xml", ".svs.geojson", ".SVS.xml", "_mask.png")),
        *(
            (f"Patient1{rest}", "Patient1.svs")
            for rest in (".svs_mask.png", ".svs.mask.tif", ".labels.tif", "-mask.png")
        ),
        ("Patient1.geojson.gz", "Patient1.svs"),
        ("Patient1.svs.geojson.gz", "Patient1.svs"),
        ("Patient1.ndpi.ndpa", "Patient1.ndpi"),
        ("slide.geojson", "slide.ome.tif"),
        ("slide.ome.tif.geojson", "slide.ome.tif"),
        ("slide_mask.xml", "slide_mask.svs"),
        ("a.b.c.xml", "a.b.c.svs"),
    ],
)
def test_file_finds_its_image(file: str, image: str) -> None:
    others = ("Patient2.svs", "slide2.svs", "a.b.svs", "mask.svs")
    index = NameIndex([(name, (name,)) for name in (*others, image)])
    assert index.owners(file) == [image]


@pytest.mark.parametrize(
    ("file", "image", "is_found"),
    [
        ("Pra\u0308p 1.geojson", "Pr\u00e4p 1.svs", True),
        ("Pr\u00e4p 1.geojson", "Pra\u0308p 1.svs", True),
        ("S1.geojson", "S1.1", False),
        ("S1.1.geojson", "S1.1", True),
        ("a.geojson", "a.jp2", True),
    ],
)
def test_accents_and_numbers_in_names(file: str, image: str, is_found: bool) -> None:
    assert NameIndex([(image, (image,))]).owners(file) == [image] * is_found


def test_zip_of_another_images_files_is_refused_by_name(project: Project, tmp_path: Path) -> None:
    project.add_image(write_pyramid(tmp_path / "second.tif", ramps(*SIZE)))
    with zipfile.ZipFile(tmp_path / "slide.zip", "w") as archive:
        archive.writestr("slide.geojson", json.dumps([feature(A)]))
        archive.writestr("x/second.geojson", json.dumps([feature(B)]))
    for image in (None, "slide.tif"):
        with pytest.raises(ExchangeError, match=r"holds second\.geojson, which has the name of another image"):
            match_files(project, [tmp_path / "slide.zip"], image)
    slides = [image.path for image in project.images if image.path]
    with pytest.raises(ExchangeError, match=r"holds second\.geojson"):
        create_from_slides(tmp_path / "q", slides, annotations=tmp_path, engine="embedded")


BARCODE, UID, OTHER = "TCGA-EJ-5519-01Z-00-DX1", str(ID), str(uuid4())


@pytest.mark.parametrize(
    ("file", "images", "owners"),
    [
        (f"{BARCODE}.xml", [f"{BARCODE}.{UID.upper()}.svs"], [0]),
        (f"{BARCODE}_mask.png", [f"{BARCODE}.{UID}.svs"], [0]),
        (f"{BARCODE}.{UID}.xml", [f"{BARCODE}.svs"], [0]),
        (f"{BARCODE}.{UID}.svs.geojson", [f"{BARCODE}.{OTHER}.svs", f"{BARCODE}.{UID}.svs"], [1]),
        (f"{BARCODE}.{UID}.xml", [f"{BARCODE}.{OTHER}.svs"], []),
        (f"{BARCODE}.xml", [f"{BARCODE}.{OTHER}.svs", f"{BARCODE}.{UID}.svs"], [0, 1]),
        (f"{BARCODE[:-1]}2.xml", [f"{BARCODE}.{UID}.svs"], []),
    ],
)
def test_tcga_names(file: str, images: list[str], owners: list[int]) -> None:
    assert NameIndex((number, (name,)) for number, name in enumerate(images)).owners(file) == owners


def test_files_that_no_image_claims_are_all_named(
    project: Project, template: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strangers = [tmp_path / "x.xml", tmp_path / "y_mask.png"]
    with pytest.raises(ExchangeError, match=r"x\.xml, .*y_mask\.png: no image of the project has this file's name"):
        match_files(project, strangers, None)
    for file in strangers:
        file.touch()
    mask(tmp_path / "slide.tif_mask.png", 1)
    _, imports = create_from_slides(tmp_path / "q", [template / "slide.tif"], annotations=tmp_path, engine="embedded")
    assert [item.file.path.name for item in imports] == ["slide.tif_mask.png"]
    assert "2 annotation files match no slide by their name: x.xml, y_mask.png" in caplog.text


# What cannot train

LINE = shapely.LineString([(0, 0), (50, 50)])
OBJECTS = [
    Annotation(geometry=A, path_class="Tumor"),
    Annotation(geometry=A),
    Annotation(geometry=A, path_class="Tumor", plane=Plane(z=3)),
    Annotation(geometry=box(500, 10, 600, 60), path_class="Tumor"),
    Annotation(geometry=box(-100, -100, 0, 0), path_class="Tumor"),
    Annotation(geometry=box(-10, -10, 20, 20), path_class="Tumor"),
    Annotation(geometry=LINE, path_class="Tumor"),
]
COUNTED = (
    "5 objects cannot train: 1 on another plane than z = 0, t = 0, 2 outside the image, 1 without a class, "
    "1 without an area (a line or points)"
)


def test_all_verbs_count_alike_what_cannot_train(
    project: Project, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_geojson([*OBJECTS, Annotation(geometry=B, kind="detection", path_class="Tumor")], tmp_path / "a.geojson")
    said = take(project, tmp_path / "a.geojson").file.warnings
    assert COUNTED in said
    assert "1 objects are no annotations and do not train: 1 of kind detection" in said
    assert COUNTED in [finding.message for finding in check_project(project, Settings(), mpp=0.5)]
    export_labels(project, Settings(), tmp_path, downsample=4)
    collect_training_images(project, Settings(), LabelCollector("manual"))
    assert caplog.messages.count(f"slide.tif: {COUNTED}") == 2


SEVERAL = "annotations of several annotators (Anna, Bert); where they overlap, the smaller shape counts; --annotator"


def test_several_annotators_of_one_image_are_said_unless_one_is_chosen(
    project: Project, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, path_class in (("Anna", "Tumor"), ("Bert", "Stroma")):
        take(project, write(tmp_path / "a.geojson", feature(A, path_class)), annotator=name)
    assert any(finding.message.startswith(SEVERAL) for finding in check_project(project, Settings(), mpp=0.5))
    export_labels(project, Settings(), tmp_path, downsample=4)
    collect_training_images(project, Settings(), LabelCollector("manual"))
    assert [message.startswith(f"1 images have {SEVERAL}") for message in caplog.messages] == [True, True]
    caplog.clear()
    export_labels(project, Settings(), tmp_path, downsample=4, annotators=["Anna"])
    collect_training_images(project, Settings(), LabelCollector("manual", ["Anna"]))
    assert not caplog.messages


def test_predictions_are_of_no_annotator_until_one_takes_them_over() -> None:
    predicted = Annotation(geometry=A, path_class="Tumor", metadata={"darefine.run": "x"})
    taken_over = replace(predicted, metadata={**predicted.metadata, "darefine.annotator": "Anna"})
    assert annotators_in([predicted, Annotation(geometry=A, path_class="Region*")]) == set()
    assert annotators_in([taken_over, Annotation(geometry=A, path_class="Tumor")]) == {"Anna", NOBODY}


@pytest.mark.parametrize("bound", ["Region*", "Ignore*"])
def test_what_bounds_the_work_and_is_nobodys_counts_for_every_annotator(bound: str) -> None:
    records = [Annotation(geometry=shape, path_class=name) for shape, name in ((A, bound), (B, "Tumor"))]
    annas = replace(records[0], metadata={"darefine.annotator": "Anna"})
    assert by_annotators([*records, annas], ["Bert"]) == (records[0],)


@pytest.mark.parametrize("record", OBJECTS, ids=range(len(OBJECTS)))
def test_what_is_counted_is_what_labels_nothing(record: Annotation) -> None:
    painter = LabelPainter([record], ClassMap(names=("Tumor",)))
    frame = box(0, 0, *SIZE)
    is_blank = not painter.touches(Box.of(SIZE)) or not frame.intersection(record.geometry).area
    assert bool(count_unlearnable([record], SIZE)) == is_blank


def test_what_darefine_puts_beside_annotations_is_not_counted() -> None:
    marks = [Annotation(geometry=A, metadata={key: "1"}) for key in ("darefine.run", "darefine.place")]
    assert unlearnable_words(count_unlearnable(marks, SIZE)) == ""


# Growth


def found(shapes: Sequence[BaseGeometry]) -> Imported:
    records = tuple(Annotation(geometry=shape, path_class="Tumor") for shape in shapes)
    return Imported(path=Path("a.geojson"), format="GeoJSON", annotations=records, items=tuple(map(str, shapes)))


GRID = [box(x, y, x + 8, y + 8) for x in range(0, 600, 10) for y in range(0, 600, 10)]
HEAP = [box(0, 0, 900 + number, 900) for number in range(600)]


@pytest.mark.parametrize(
    ("shapes", "step", "updated"), [(GRID, (1, 1), len(GRID)), (HEAP, (0, 0.5), 0)], ids=["side by side", "in a heap"]
)
def test_matching_looks_at_each_object_a_few_times(
    monkeypatch: pytest.MonkeyPatch, shapes: Sequence[BaseGeometry], step: tuple[float, float], updated: int
) -> None:
    calls = []
    union = shapely.union
    monkeypatch.setattr(shapely, "union", lambda *pair: calls.append(pair) or union(*pair))
    origin = Origin(path=Path("a.geojson"), image="1")
    first = reconcile(found(shapes), (), origin).add
    plan = reconcile(found([translate(shape, *step) for shape in shapes]), first, origin)
    assert (len(plan.update), len(plan.add)) == (updated, len(shapes) - updated)
    assert len(plan.notes) == len(shapes)
    assert len(calls) < 10 * len(shapes)
