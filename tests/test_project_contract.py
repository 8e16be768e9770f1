"""What every engine does alike; the paquo half needs a QuPath (PAQUO_QUPATH_DIR) and skips without one."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import pytest
import shapely

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import Color, PathClass
from darefine_qupath.errors import (
    ImageNotFoundError,
    ProjectChangedError,
    ProjectFormatError,
    ProjectNotFoundError,
    ProjectWriteError,
    SlideNotFoundError,
)
from darefine_qupath.project import Changes, Project, create_project, open_project

QUPATH = Path(__file__).parent / "data" / "qupath"
VERSIONS = ("0.4.4", "0.5.1", "0.6.0", "0.7.0")
FIXTURES = [
    pytest.param(f"qupath-{version}/{name}", id=f"{version}-{name}")
    for version in VERSIONS
    for name in ("annotated", "empty", "multi", "paquo", "workflow-tma")
]

EngineName = Literal["embedded", "paquo"]


@pytest.fixture(params=["embedded", pytest.param("paquo", marks=pytest.mark.qupath)])
def engine(request: pytest.FixtureRequest) -> EngineName:
    name: EngineName = request.param
    if name == "paquo" and not os.environ.get("PAQUO_QUPATH_DIR"):
        pytest.skip("PAQUO_QUPATH_DIR is not set: there is no QuPath to test the paquo engine with")
    return name


@pytest.fixture
def annotated(place: Callable[[str], Path], engine: EngineName) -> Iterator[Project]:
    with open_project(place("qupath-0.6.0/annotated"), engine=engine) as project:
        yield project


@pytest.fixture
def fresh(tmp_path: Path, engine: EngineName) -> Iterator[Project]:
    shutil.copytree(QUPATH / "images", tmp_path / "images")
    classes = [PathClass("Benign", Color(80, 120, 220)), PathClass("Ignore*", Color(1, 2, 3))]
    with create_project(tmp_path / "new" / "project", classes=classes, engine=engine) as project:
        yield project


def reopened(project: Project) -> Project:
    return open_project(project.path, engine=project.engine)


# -- reading


@pytest.mark.parametrize("name", FIXTURES)
def test_a_project_is_what_qupath_says_it_is(name: str, place: Callable[[str], Path], engine: EngineName) -> None:
    folder = place(name)
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    with open_project(folder, engine=engine) as project:
        assert project.path == folder / "project.qpproj"
        assert project.name == folder.name
        assert project.version == expected["project"]["version"]
        assert [(c.name, c.color.argb) for c in project.classes] == [
            (c["name"], c["color"]) for c in expected["project"]["classes"]
        ]
        assert len(project.images) == len(expected["images"])
        for image, wanted in zip(project.images, expected["images"], strict=True):
            assert (image.id, image.name, image.description) == (
                wanted["entry_id"],
                wanted["name"],
                wanted["description"],
            )
            assert dict(image.metadata) == wanted["metadata"]
            assert image.exists == wanted["file_exists"]
            assert image.unsupported is None
            server = wanted.get("server")
            if isinstance(server, dict):
                assert (image.width, image.height) == (server["width"], server["height"])
                assert image.mpp == (server["pixel_width"] if server["pixel_unit"] == "µm" else None)
            if "image_type" in wanted:
                assert image.image_type == wanted["image_type"]
            if not wanted["has_image_data"]:
                assert image.image_type == "UNSET"
            assert len(project.objects(image)) == (wanted.get("n_objects") or 0)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_image_of_a_moved_project_is_found(
    version: str, tmp_path: Path, place: Callable[[str], Path], engine: EngineName
) -> None:
    with open_project(place(f"qupath-{version}/multi"), engine=engine) as project:
        slide, missing, _ = project.images
        assert slide.path == tmp_path / "images" / "slide.tif"
        assert slide.uri == f"file:{tmp_path}/images/slide.tif"
        assert slide.exists
        assert not missing.exists
        assert missing.uri == "file:/srv/pathology/images/missing-slide.png"
        assert len(project.annotations(missing)) == 3


def same_shape(record: Annotation, roi: dict[str, Any]) -> bool:
    if "wkt" not in roi or record.geometry is None:
        return "wkt" not in roi
    wanted = shapely.from_wkt(roi["wkt"])
    if wanted.area > 0:
        return bool(record.geometry.symmetric_difference(wanted).area <= 0.01)
    return bool(record.geometry.hausdorff_distance(wanted) <= 0.02)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_read_as_qupath_reads_it(
    version: str, place: Callable[[str], Path], engine: EngineName
) -> None:
    folder = place(f"qupath-{version}/annotated")
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))["images"][0]["objects"]
    with open_project(folder, engine=engine) as project:
        found = {record.id: record for record in project.objects(project.images[0])}
    assert {str(key) for key in found} == {wanted["id"] for wanted in expected}
    for wanted in expected:
        record = found[UUID(wanted["id"])]
        assert record.kind == wanted["kind"]
        assert record.path_class == wanted["classification"]
        assert record.name == wanted["name"]
        assert record.locked == wanted["locked"]
        assert ("root" if record.parent is None else str(record.parent)) == wanted["parent"]
        assert dict(record.metadata) == wanted["metadata"]
        assert list(record.measurements) == list(wanted["measurements"])
        for name, value in wanted["measurements"].items():
            number = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}.get(value, value)
            assert record.measurements[name] == pytest.approx(number, nan_ok=True)
        if wanted["roi"] is None:
            assert record.geometry is None
            continue
        assert record.roi == wanted["roi"]["roi_name"]
        assert record.plane._asdict() == wanted["roi"]["plane"]
        assert same_shape(record, wanted["roi"]), wanted["name"]


def test_reading_leaves_every_byte(place: Callable[[str], Path], engine: EngineName) -> None:
    folder = place("qupath-0.6.0/annotated")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with open_project(folder, engine=engine) as project:
        for image in project.images:
            project.objects(image)
        assert project.classes
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_an_image_is_found_by_id_and_by_name(annotated: Project) -> None:
    assert annotated.image("2").name == "plain.png"
    assert annotated.image("plain.png").id == "2"
    with pytest.raises(ImageNotFoundError, match="No image 'x' in"):
        annotated.image("x")


def test_what_is_no_project_is_said(tmp_path: Path, engine: EngineName) -> None:
    with pytest.raises(ProjectNotFoundError, match="There is no QuPath project at"):
        open_project(tmp_path / "nothing", engine=engine)
    with pytest.raises(ProjectNotFoundError, match="There is no QuPath project at"):
        open_project(tmp_path, engine=engine)
    (tmp_path / "project.qpproj").write_text('{"version": ')
    with pytest.raises(ProjectFormatError, match=r"project.qpproj: this is not JSON.* \(at byte 12\)"):
        open_project(tmp_path, engine=engine)


# -- objects

HOLED = shapely.box(100, 100, 300, 300).difference(shapely.box(150, 150, 200, 200))
SHAPES = {
    "box": shapely.box(10, 20, 110.25, 70.5),
    "polygon": shapely.Polygon([(0, 0), (100, 10), (120, 90), (30, 60)]),
    "hole": HOLED,
    "multipolygon": shapely.MultiPolygon([shapely.box(0, 0, 10, 10), shapely.box(20, 20, 30, 30)]),
}


def record(shape: shapely.Geometry, **more: object) -> Annotation:
    return Annotation(geometry=shape, path_class="Invasive", **more)  # type: ignore[arg-type]


def assert_stored(found: Annotation, wanted: Annotation) -> None:
    assert found.geometry is not None
    assert wanted.geometry is not None
    assert found.geometry.is_valid
    assert found.geometry.symmetric_difference(wanted.geometry).area <= 0.02
    assert (found.id, found.kind, found.path_class, found.name) == (
        wanted.id,
        wanted.kind,
        wanted.path_class,
        wanted.name,
    )
    assert (found.locked, dict(found.metadata)) == (wanted.locked, dict(wanted.metadata))
    assert dict(found.measurements) == pytest.approx(dict(wanted.measurements))


def comparable(records: tuple[Annotation, ...]) -> dict[UUID, tuple[object, ...]]:
    return {
        r.id: (r.kind, r.path_class, r.name, r.locked, r.parent, r.roi, r.plane, dict(r.metadata), r.geometry)
        for r in records
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_new_objects_come_back_and_the_others_stay(
    version: str, place: Callable[[str], Path], engine: EngineName
) -> None:
    new = [
        record(shape, name=name, locked=True, measurements={"DA-RefineNet: confidence": 0.75}, metadata={"k": "v"})
        for name, shape in SHAPES.items()
    ]
    with open_project(place(f"qupath-{version}/annotated"), engine=engine) as project:
        image = project.images[0]
        before = comparable(project.objects(image))
        applied = project.apply(image, Changes(add=new))
        with reopened(project) as again:
            after = {r.id: r for r in again.objects(image)}
    assert (applied.added, applied.replaced, applied.removed) == (4, 0, 0)
    assert applied.num_objects == len(before) + 4 == len(after)
    for wanted in new:
        assert_stored(after.pop(wanted.id), wanted)
    assert comparable(tuple(after.values())) == before


def test_an_object_is_replaced_in_its_place(annotated: Project) -> None:
    image = annotated.images[0]
    before = {r.id: r for r in annotated.objects(image)}
    parent = next(r for r in before.values() if any(child.parent == r.id for child in before.values()))
    changed = replace(parent, name="changed", path_class="Benign", geometry=HOLED, roi=None)
    applied = annotated.apply(image, Changes(replace=[changed]))
    after = {r.id: r for r in annotated.objects(image)}
    assert (applied.added, applied.replaced, applied.num_objects) == (0, 1, len(before))
    assert_stored(after[parent.id], changed)
    assert after[parent.id].parent == parent.parent
    assert [r.id for r in after.values() if r.parent == parent.id] == [
        r.id for r in before.values() if r.parent == parent.id
    ]


def test_children_of_a_removed_object_move_up(annotated: Project) -> None:
    image = annotated.images[0]
    before = {r.id: r for r in annotated.objects(image)}
    parent = next(r for r in before.values() if any(child.parent == r.id for child in before.values()))
    children = {r.id for r in before.values() if r.parent == parent.id}
    applied = annotated.apply(image, Changes(remove=[parent.id]))
    after = {r.id: r for r in annotated.objects(image)}
    assert applied.removed == 1
    assert after.keys() == before.keys() - {parent.id}
    assert {after[key].parent for key in children} == {parent.parent}


def test_a_new_object_can_lie_below_another(annotated: Project) -> None:
    image = annotated.images[0]
    outer = record(shapely.box(0, 0, 500, 500))
    inner = record(shapely.box(100, 100, 200, 200), parent=outer.id)
    annotated.apply(image, Changes(add=[outer, inner]))
    assert {r.id: r.parent for r in annotated.objects(image)}[inner.id] == outer.id


def test_a_class_that_new_objects_bring_is_listed_once(annotated: Project) -> None:
    before = annotated.classes
    image = annotated.images[0]
    annotated.apply(image, Changes(add=[record(SHAPES["box"]), Annotation(geometry=HOLED, path_class="New one")]))
    with reopened(annotated) as again:
        assert again.classes[: len(before)] == before
        assert [c.name for c in again.classes[len(before) :]] == ["New one"]


def test_an_image_without_data_gets_its_first_objects(place: Callable[[str], Path], engine: EngineName) -> None:
    with open_project(place("qupath-0.6.0/empty"), engine=engine) as project:
        image = project.images[0]
        assert image.image_type == "UNSET"
        assert (image.width, image.height, image.mpp) == (2048, 1536, 0.5)
        wanted = record(HOLED)
        applied = project.apply(image, Changes(add=[wanted]))
        with reopened(project) as again:
            (found,) = again.annotations(image)
    assert_stored(found, wanted)
    assert (applied.num_objects, applied.backup) == (1, None)


def test_objects_that_changed_on_disk_are_not_overwritten(annotated: Project) -> None:
    image = annotated.images[0]
    annotated.objects(image)
    with open_project(annotated.path, engine="embedded") as other:
        other.apply(image, Changes(add=[record(SHAPES["box"])]))
    with pytest.raises(ProjectChangedError, match="changed since it was read"):
        annotated.apply(image, Changes(add=[record(SHAPES["hole"])]))


@pytest.mark.parametrize("name", ["annotated", "empty"])
def test_a_change_is_made_to_the_version_that_it_was_thought_out_for(
    name: str, place: Callable[[str], Path], engine: EngineName
) -> None:
    with open_project(place(f"qupath-0.6.0/{name}"), engine=engine) as project:
        image = project.images[0]
        state = project.state(image)
        assert (state.objects, bool(state.version)) == (project.objects(image), name == "annotated")
        with open_project(project.path, engine="embedded") as other:
            applied = other.apply(image, Changes(add=[record(SHAPES["box"])]))
        assert len(project.objects(image)) == len(state.objects) + 1
        stored = (project.folder / "data" / image.id / "data.qpdata").read_bytes()
        with pytest.raises(ProjectChangedError, match="changed since it was read"):
            project.apply(image, Changes(add=[record(SHAPES["hole"])]), version=state.version)
        assert (project.folder / "data" / image.id / "data.qpdata").read_bytes() == stored
        now = project.state(image).version
        assert now == applied.digest
        assert project.apply(image, Changes(add=[record(SHAPES["hole"])]), version=now).added == 1


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("added", [0, 1], ids=["alone", "with objects"])
def test_image_properties_are_set_and_taken_out(
    version: str, added: int, place: Callable[[str], Path], engine: EngineName
) -> None:
    with open_project(place(f"qupath-{version}/annotated"), engine=engine) as project:
        image = project.images[0]
        before, objects = dict(project.state(image).properties), comparable(project.objects(image))
        before.pop("PROJECT_ENTRY_ID", None)
        for value in ("000001-1", "größer \U0001f52c", None):
            new = [record(SHAPES["hole"]) for _ in range(added)]
            project.apply(image, Changes(add=new, properties={"darefine.run": value}))
            with reopened(project) as again:
                found = dict(again.state(image).properties)
                after = comparable(again.objects(image))
            found.pop("PROJECT_ENTRY_ID", None)
            assert found == before | ({} if value is None else {"darefine.run": value})
            assert {key: after[key] for key in objects} == objects


def test_properties_alone_leave_the_other_bytes_and_push_out_no_backup(annotated: Project) -> None:
    image = annotated.images[0]
    path = annotated.folder / "data" / image.id / "data.qpdata"
    first = annotated.apply(image, Changes(properties={"darefine.run": "a"}))
    content = path.read_bytes()
    annotated.apply(image, Changes(properties={"darefine.run": "longer"}))
    assert path.read_bytes() != content
    annotated.apply(image, Changes(properties={"darefine.run": "a"}))
    assert path.read_bytes() == content
    assert (first.num_objects, first.backup) == (35, None)


def test_an_image_without_data_gets_its_first_property(place: Callable[[str], Path], engine: EngineName) -> None:
    with open_project(place("qupath-0.6.0/empty"), engine=engine) as project:
        image = project.images[0]
        project.apply(image, Changes(properties={"darefine.run": "a"}), version="")
        assert project.state(image).properties["darefine.run"] == "a"
        assert project.objects(image) == ()


def test_an_image_of_another_project_is_refused(annotated: Project) -> None:
    stranger = replace(annotated.images[0], id="77")
    for call in (annotated.objects, lambda image: annotated.apply(image, Changes())):
        with pytest.raises(ImageNotFoundError, match="77"):
            call(stranger)


# -- classes and images


def test_the_class_list_is_written(annotated: Project) -> None:
    classes = [PathClass("Zebra", Color(1, 2, 3)), *annotated.classes[:2]]
    annotated.set_classes(classes)
    assert annotated.classes == tuple(classes)
    with reopened(annotated) as again:
        assert again.classes == tuple(classes)


def test_a_new_project_is_filled(fresh: Project, tmp_path: Path) -> None:
    assert fresh.images == ()
    assert [c.name for c in fresh.classes] == ["Benign", "Ignore*"]
    slide = fresh.add_image(tmp_path / "images" / "slide.tif", metadata={"split": "train"})
    plain = fresh.add_image(tmp_path / "images" / "plain.png", name="renamed", mpp=0.25, image_type="BRIGHTFIELD_OTHER")
    fresh.apply(slide, Changes(add=[record(HOLED)]))
    with reopened(fresh) as again:
        first, second = again.images
        assert (first.id, first.name, first.width, first.height, first.mpp) == ("1", "slide.tif", 2048, 1536, 0.5)
        assert (first.image_type, dict(first.metadata)) == ("BRIGHTFIELD_H_E", {"split": "train"})
        assert (second.name, second.mpp, second.image_type) == ("renamed", 0.25, "BRIGHTFIELD_OTHER")
        assert second.path == plain.path == tmp_path / "images" / "plain.png"
        assert (len(again.objects(first)), len(again.objects(second))) == (1, 0)
        assert (again.folder / "data" / "1" / "thumbnail.jpg").stat().st_size > 1000


def test_a_project_is_not_made_twice(fresh: Project) -> None:
    with pytest.raises(ProjectWriteError, match="There is a project already"):
        create_project(fresh.folder, engine=fresh.engine)


def test_an_image_that_is_not_there_cannot_be_added(fresh: Project, tmp_path: Path) -> None:
    with pytest.raises(SlideNotFoundError, match="There is no image"):
        fresh.add_image(tmp_path / "nothing.svs")
    assert fresh.images == ()


def test_one_file_can_be_several_images(fresh: Project, tmp_path: Path) -> None:
    for _ in range(2):
        fresh.add_image(tmp_path / "images" / "plain.png")
    first, second = fresh.images
    fresh.apply(first, Changes(add=[record(HOLED)]))
    assert (len(fresh.objects(first)), len(fresh.objects(second))) == (1, 0)
    with pytest.raises(ImageNotFoundError, match=r"2 images are named 'plain.png'; give the entry id, one of 1, 2"):
        fresh.image("plain.png")


def test_an_image_is_taken_out_and_its_id_not_given_again(annotated: Project, tmp_path: Path) -> None:
    document = json.loads(annotated.path.read_text(encoding="utf-8"))
    document["images"].pop()
    annotated.path.write_text(json.dumps(document), encoding="utf-8")
    with reopened(annotated) as again:
        assert [image.id for image in again.images] == ["1"]
        assert (again.folder / "data" / "2" / "data.qpdata").exists()
        assert again.add_image(tmp_path / "images" / "plain.png").id == "3"


def test_metadata_are_written(annotated: Project) -> None:
    annotated.add_metadata({annotated.images[1].id: {"split": "test", "größe": "groß"}})
    image = annotated.images[1]
    assert dict(image.metadata) == {"split": "test", "größe": "groß"}
    with reopened(annotated) as again:
        assert again.images[1].metadata == image.metadata
        assert again.images[0].metadata == annotated.images[0].metadata
        assert len(again.objects(again.images[0])) == 35


def test_metadata_are_added_to(annotated: Project) -> None:
    first, second = annotated.images[:2]
    annotated.add_metadata({first.id: {"kept": "a"}})
    former = dict(first.metadata)
    annotated.add_metadata({first.id: {"split": "test"}, second.id: {"split": "train"}})
    assert annotated.image(first.id).metadata == former | {"kept": "a", "split": "test"}
    assert annotated.image(second.id).metadata["split"] == "train"
