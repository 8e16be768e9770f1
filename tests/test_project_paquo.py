"""The paquo engine: what needs no QuPath, and (marked ``qupath``) both engines and QuPath's own reader compared."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
import shapely

from darefine_qupath.annotations import Annotation, Plane
from darefine_qupath.classes import Color, PathClass
from darefine_qupath.errors import (
    AnnotationError,
    EngineError,
    ProjectError,
    ProjectFormatError,
    ProjectWriteError,
)
from darefine_qupath.project import (
    Changes,
    Project,
    create_project,
    hierarchy_editor,
    jvm,
    list_backups,
    open_project,
    paquo_engine,
    restore,
)
from darefine_qupath.project.qpdata.read import read_image_data
from darefine_qupath.project.qpdata.verify import verify_objects
from darefine_qupath.review import RunResult, undo, write_back
from tests.fake_project import CLASSES, polygon

QUPATH = Path(__file__).parent / "data" / "qupath"
VERSIONS = ("0.4.4", "0.5.1", "0.6.0", "0.7.0")
HERE = os.environ.get("PAQUO_QUPATH_DIR")

needs_qupath = [
    pytest.mark.qupath,
    pytest.mark.skipif(
        not HERE, reason="PAQUO_QUPATH_DIR is not set: there is no QuPath to test the paquo engine with"
    ),
]


def qupath(test: Callable[..., None]) -> Callable[..., None]:
    for mark in needs_qupath:
        test = mark(test)
    return test


Place = Callable[[str], Path]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Copies a fixture project with its images; every copy lies in a folder of its own."""
    count = iter(range(1000))

    def copy(name: str) -> Path:
        home = tmp_path / str(next(count))
        shutil.copytree(QUPATH / name, home / name)
        shutil.copytree(QUPATH / "images", home / "images")
        return home / name

    return copy


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python of its own: a process has one JVM, with one set of options."""
    kept = {key: value for key, value in os.environ.items() if key != "PAQUO_JAVA_OPTS"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=kept | environment, check=False, timeout=300
    )


# -- without QuPath


def options(monkeypatch: pytest.MonkeyPatch, given: object, environment: str | None = None) -> list[str]:
    monkeypatch.delenv("PAQUO_JAVA_OPTS", raising=False)
    if environment is not None:
        monkeypatch.setenv("PAQUO_JAVA_OPTS", environment)
    return [
        option
        for option in jvm._java_options({"java_opts": given}, Path("/nothing"))
        if "Heap" in option or "Xm" in option or "RAM" in option
    ]


@pytest.mark.parametrize(
    ("given", "environment", "wanted"),
    [
        (["-XX:MaxRAMPercentage=50"], None, ["-Xmx2g"]),
        ([], None, ["-Xmx2g"]),
        ("-XX:MaxRAMPercentage=50", "-XX:MaxRAMPercentage=50", ["-XX:MaxRAMPercentage=50"]),
        ("-Xmx6g -ea", "-Xmx6g -ea", ["-Xmx6g"]),
        (["-Xmx512m"], None, ["-Xmx512m"]),
        ("-ea", "-ea", ["-Xmx2g"]),
        (["-XX:MaxHeapSize=1g"], None, ["-XX:MaxHeapSize=1g"]),
    ],
    ids=["paquo-default", "nothing", "the-users-half", "environment", "settings", "no-heap", "long-name"],
)
def test_the_heap_is_bounded_unless_the_user_says(
    given: object, environment: str | None, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert options(monkeypatch, given, environment) == wanted


def test_options_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAQUO_JAVA_OPTS", "-ea")
    found = jvm._java_options({"java_opts": "-ea '-Dname=a b'"}, Path("/nothing"))
    assert found[:2] == ["-ea", "-Dname=a b"]
    assert {"-XX:+DisplayVMOutputToStderr", "-Xrs", "-Djava.awt.headless=true"} <= set(found)


@pytest.mark.parametrize(("release", "wanted"), [("17.0.15", False), ("21.0.2", False), ("25.0.1", True)])
def test_a_new_java_is_told_of_native_code(release: str, wanted: bool, tmp_path: Path) -> None:
    (tmp_path / "release").write_text(f'IMPLEMENTOR="x"\nJAVA_VERSION="{release}"\n')
    assert ("--enable-native-access=ALL-UNNAMED" in jvm._java_options({"java_opts": []}, tmp_path)) == wanted


@pytest.mark.skipif(sys.platform != "linux", reason="the layout of QuPath's folder is another one elsewhere")
def test_qupath_is_found_without_java(tmp_path: Path) -> None:
    code = """
import sys
from darefine_qupath.project import jvm
print(jvm.find_qupath())
import jpype
print(jpype.isJVMStarted())
"""
    assert run(code, PAQUO_QUPATH_DIR=str(tmp_path)).stdout.split() == ["None", "False"]
    (tmp_path / "lib" / "app").mkdir(parents=True)
    (tmp_path / "lib" / "runtime" / "lib" / "server").mkdir(parents=True)
    (tmp_path / "lib" / "runtime" / "lib" / "server" / "libjvm.so").touch()
    assert run(code, PAQUO_QUPATH_DIR=str(tmp_path)).stdout.split() == [str(tmp_path), "False"]


def test_a_qupath_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    code = """
from darefine_qupath.errors import EngineError
from darefine_qupath.project import create_project, jvm
for call in (jvm.start_qupath, lambda: create_project("x", engine="paquo")):
    try:
        call()
    except EngineError as error:
        print(error)
"""
    said = run(code, PAQUO_QUPATH_DIR=str(tmp_path)).stdout.splitlines()
    assert len(said) == 2
    assert all(line.startswith("paquo finds no QuPath; run `paquo get_qupath") for line in said)


@pytest.mark.skipif(sys.platform != "linux", reason="the layout of QuPath's folder is another one elsewhere")
def test_a_java_that_does_not_start_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "lib" / "app").mkdir(parents=True)
    (tmp_path / "lib" / "runtime" / "lib" / "server").mkdir(parents=True)
    (tmp_path / "lib" / "runtime" / "lib" / "server" / "libjvm.so").write_bytes(b"not a library")
    code = """
from darefine_qupath.errors import EngineError
from darefine_qupath.project import jvm
try:
    jvm.start_qupath()
except EngineError as error:
    print(error)
"""
    assert run(code, PAQUO_QUPATH_DIR=str(tmp_path)).stdout.startswith("QuPath's Java does not start (")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_qupath_does_not_start_in_a_forked_process() -> None:
    code = """
import os, sys
from darefine_qupath.errors import EngineError
from darefine_qupath.project import jvm
if os.fork() == 0:
    try:
        jvm.start_qupath()
    except EngineError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
"""
    assert "QuPath cannot run in a forked process" in run(code).stdout


def test_reading_starts_no_java(place: Place) -> None:
    code = f"""
import sys
from darefine_qupath.project.paquo_engine import PaquoProject
with PaquoProject(__import__("pathlib").Path({str(place("qupath-0.6.0/annotated"))!r})) as project:
    print(project.engine, len(project.objects(project.images[0])), len(project.images), "jpype" in sys.modules)
"""
    assert run(code).stdout.split() == ["paquo", "35", "2", "False"]


# -- with QuPath: what is read


def shape_of(roi: Any) -> shapely.Geometry | None:  # noqa: ANN401
    """Shape of a Java ROI: a polygon's own corners, else what QuPath makes of it."""
    from paquo.java import WKBWriter  # noqa: PLC0415

    if roi is None:
        return None
    if str(roi.getRoiName()) == "Polygon":
        # QuPath's way to a geometry, through java.awt.geom.Area, cuts the tips off some.
        corners = [(float(point.getX()), float(point.getY())) for point in roi.getAllPoints()]
        if len(corners) > 2 and shapely.Polygon(corners).is_valid:
            return shapely.Polygon(corners)
    return shapely.from_wkb(bytes(memoryview(WKBWriter(2).write(roi.getGeometry()))))


def snapshot(folder: Path, entry_id: str) -> dict[UUID, tuple[object, ...]]:
    """Every object of an image as QuPath's own reader, through paquo, gives it."""
    jvm.start_qupath()
    from paquo.java import PathIO  # noqa: PLC0415

    file = jvm.java_class("java.io.File")(str(folder / "data" / entry_id / "data.qpdata"))
    root = PathIO.readHierarchy(file).getRootObject()
    found = {}
    for item in root.getDescendantObjects(jvm.java_class("java.util.ArrayList")()):
        roi, path_class, parent = item.getROI(), item.getPathClass(), item.getParent()
        names = [str(name) for name in item.getMeasurementList().getMeasurementNames()]
        found[hierarchy_editor.id_of(item)] = (
            str(item.getClass().getSimpleName()),
            None if path_class is None else str(path_class.toString()),
            None if item.getName() is None else str(item.getName()),
            bool(item.isLocked()),
            None if parent.isRootObject() else hierarchy_editor.id_of(parent),
            {name: float(item.getMeasurementList().get(name)) for name in names},
            None if roi is None else str(roi.getRoiName()),
            None if roi is None else (int(roi.getC()), int(roi.getZ()), int(roi.getT())),
            shape_of(roi),
        )
    return found


KINDS = {
    "annotation": "PathAnnotationObject",
    "detection": "PathDetectionObject",
    "cell": "PathCellObject",
    "tile": "PathTileObject",
    "tma core": "TMACoreObject",
}


def assert_as_qupath(records: tuple[Annotation, ...], seen: dict[UUID, tuple[Any, ...]]) -> None:
    """Compare our records with what QuPath reads."""
    assert {record.id for record in records} == seen.keys()
    for record in records:
        *plain, measurements, roi, plane, geometry = seen[record.id]
        assert plain == [KINDS[record.kind], record.path_class, record.name, record.locked, record.parent]
        assert list(measurements) == list(record.measurements)
        assert list(measurements.values()) == pytest.approx(list(record.measurements.values()), nan_ok=True, rel=1e-6)
        assert roi == record.roi
        if record.geometry is not None:
            assert plane == tuple(record.plane)
            assert geometry.is_empty == record.geometry.is_empty
            assert geometry.is_empty or geometry.hausdorff_distance(record.geometry) <= 0.02
            assert geometry.symmetric_difference(record.geometry).area <= 0.006 * record.geometry.length


@qupath
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["annotated", "workflow-tma", "paquo"])
def test_our_reader_reads_what_qupath_reads(version: str, name: str, place: Place) -> None:
    folder = place(f"qupath-{version}/{name}")
    with open_project(folder, engine="embedded") as project:
        for image in project.images:
            if (folder / "data" / image.id / "data.qpdata").exists():
                assert_as_qupath(project.objects(image), snapshot(folder, image.id))


# -- with QuPath: what is written


def star(x: float, y: float, corners: int = 40) -> shapely.Polygon:
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    radius = np.where(np.arange(corners) % 2, 20.337, 35.811)
    return shapely.Polygon(np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1))


HOLED = shapely.box(100, 100, 300, 300).difference(star(200, 200)).difference(shapely.box(110, 110, 120.5, 120.25))
PARENT = UUID("00000000-0000-4000-8000-000000000001")


ADD = Changes(add=[Annotation(geometry=HOLED, path_class="Invasive")])


def new_objects() -> list[Annotation]:
    """One of everything that can be added."""
    return [
        Annotation(geometry=shapely.box(0, 0, 400, 400), path_class="Invasive", id=PARENT, name="außen ✓", locked=True),
        Annotation(
            geometry=HOLED,
            path_class="Neu: Teil",
            parent=PARENT,
            measurements={"a": 0.1, "NaN": math.nan, "größe": 1e300},
        ),
        Annotation(
            geometry=shapely.MultiPolygon([star(500, 500), star(700, 500)]), metadata={"darefine.run": "r1", "ü": ""}
        ),
        Annotation(geometry=star(900, 300), path_class="Benign", plane=Plane(1, 2, 3), color=-65536 & 0xFFFFFFFF),
        Annotation(geometry=shapely.box(10.25, 20.5, 50, 60).envelope, roi="Ellipse", class_probability=0.25),
        Annotation(geometry=star(50, 900), roi="Geometry", name=""),
        Annotation(geometry=shapely.LineString([(0, 0), (10.01, 10.07)])),
        Annotation(geometry=shapely.LineString([(0, 0), (10.01, 10.07), (30, 5)])),
        Annotation(geometry=shapely.MultiLineString([[(0, 0), (1, 1)], [(5, 5), (9, 5)]])),
        Annotation(geometry=shapely.Point(7, 8)),
        Annotation(geometry=shapely.MultiPoint([(7, 8), (9.5, 10.25)])),
        Annotation(
            geometry=star(300, 900), kind="detection", measurements={"Score": 0.123456789}, path_class="Positive"
        ),
        Annotation(geometry=shapely.box(1, 1, 3, 3), kind="tile", measurements={"Score": 1.0, "b": -2.5}),
        Annotation(geometry=star(600, 900), kind="cell", nucleus=shapely.Point(600, 900).buffer(5), parent=PARENT),
    ]


@qupath
@pytest.mark.parametrize("version", VERSIONS)
def test_both_engines_write_the_same(version: str, place: Place) -> None:
    new = new_objects()
    read = {}
    for engine in ("embedded", "paquo"):
        folder = place(f"qupath-{version}/annotated")
        with open_project(folder, engine=engine) as project:
            image = project.images[0]
            before = len(project.objects(image))
            assert project.apply(image, Changes(add=new)).num_objects == before + len(new)
        with open_project(folder, engine="embedded") as again:
            read[engine] = again.objects(again.images[0])
            assert [c.name for c in again.classes][-2:] == ["Neu: Teil", "Positive"]
        assert_as_qupath(read[engine], snapshot(folder, image.id))
    verify_objects(read["embedded"], read["paquo"], path=folder)


@qupath
def test_qupath_reads_a_thousand_polygons_of_the_embedded_engine(place: Place) -> None:
    new = [
        Annotation(
            geometry=star(40 + 75 * (n % 40), 40 + 75 * (n // 40), 100),
            path_class="Invasive",
            name=str(n),
            measurements={"n": float(n)},
        )
        for n in range(1000)
    ]
    folder = place("qupath-0.6.0/annotated")
    with open_project(folder, engine="embedded") as project:
        project.apply(project.images[0], Changes(add=new))
        assert_as_qupath(project.objects(project.images[0]), snapshot(folder, "1"))


@qupath
def test_a_thousand_polygons_arrive_through_qupath(place: Place) -> None:
    new = [
        Annotation(geometry=star(40 + 75 * (n % 40), 40 + 75 * (n // 40), 100), path_class="Invasive")
        for n in range(1000)
    ]
    with open_project(place("qupath-0.6.0/annotated"), engine="paquo") as project:
        image = project.images[0]
        before = project.objects(image)
        assert project.apply(image, Changes(add=new)).added == 1000
        assert project.apply(image, Changes(remove=[record.id for record in new])).removed == 1000
        verify_objects(before, project.objects(image), path=project.path)


def everything(folder: Path, entry_id: str) -> dict[str, object]:
    """All that a file says beside its objects."""
    path = folder / "data" / entry_id / "data.qpdata"
    data = read_image_data(path.read_bytes(), path=path)
    return {
        "type": data.image_type,
        "stains": data.stains and (data.stains.name, [np.round(v.rgb, 6).tolist() for v in data.stains.vectors]),
        "workflow": data.workflow,
        "grid": data.tma_grid,
        "properties": {key: value for key, value in data.properties.items() if key != "PROJECT_ENTRY_ID"},
        "colors": dict(data.colors),
        "root": data.root_id,
    }


@qupath
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["annotated", "workflow-tma"])
def test_qupath_saves_what_the_embedded_engine_wrote_without_loss(version: str, name: str, place: Place) -> None:
    folder = place(f"qupath-{version}/{name}")
    extra = Annotation(geometry=HOLED, path_class="Invasive")
    with open_project(folder, engine="embedded") as project:
        image = project.images[0]
        project.apply(image, Changes(add=new_objects()))
        before, rest = project.objects(image), everything(folder, image.id)
    with open_project(folder, engine="paquo") as project:
        project.apply(image, Changes(add=[extra]))
        project.apply(image, Changes(remove=[extra.id]))
        verify_objects(before, project.objects(image), path=folder)
    assert everything(folder, image.id) == rest


@qupath
@pytest.mark.parametrize("version", VERSIONS)
def test_saving_again_changes_nothing(version: str, place: Place) -> None:
    folder = place(f"qupath-{version}/annotated")
    path = folder / "data" / "1" / "data.qpdata"
    saved = []
    with open_project(folder, engine="paquo") as project:
        image = project.images[0]
        for _ in range(3):
            same = project.objects(image)[0]
            project.apply(image, Changes(replace=[same]))
            saved.append(path.read_bytes())
    assert saved[1] == saved[2]


@qupath
def test_every_part_of_an_object_is_replaced(place: Place) -> None:
    folders = {engine: place("qupath-0.6.0/annotated") for engine in ("embedded", "paquo")}
    read = {}
    for engine, folder in folders.items():
        with open_project(folder, engine=engine) as project:
            image = project.images[0]
            changed = [
                replace(
                    record,
                    name="n" if record.name is None else None,
                    locked=not record.locked,
                    path_class=None if record.path_class else "Tumor: Positive",
                    metadata={"k": "v"},
                    measurements={"m": 0.5},
                    class_probability=0.75,
                    color=None if record.color is not None else 0x00336699,
                    geometry=None if record.geometry is None else shapely.affinity.translate(record.geometry, 3, 4),
                    nucleus=None if record.nucleus is None else shapely.affinity.translate(record.nucleus, 3, 4),
                )
                for record in project.objects(image)
                if record.geometry is not None and not record.geometry.is_empty
            ]
            project.apply(image, Changes(replace=changed))
            read[engine] = project.objects(image)
        assert_as_qupath(read[engine], snapshot(folder, "1"))
    verify_objects(read["embedded"], read["paquo"], path=folder)
    assert len(changed) > 25


@qupath
def test_children_move_up_through_several_removed_objects(place: Place) -> None:
    ids = [UUID(int=n + 1) for n in range(5)]
    chain = [
        Annotation(geometry=shapely.box(0, 0, 500 - 50 * n, 500 - 50 * n), id=ids[n], parent=ids[n - 1] if n else None)
        for n in range(5)
    ]
    more = Annotation(geometry=star(50, 50), parent=ids[2])
    parents, orders = {}, {}
    for engine in ("embedded", "paquo"):
        with open_project(place("qupath-0.7.0/annotated"), engine=engine) as project:
            image = project.images[0]
            project.apply(image, Changes(add=chain))
            project.apply(image, Changes(add=[more], remove=[ids[1], ids[2], ids[4]]))
            parents[engine] = {record.id: record.parent for record in project.objects(image)}
            orders[engine] = [record.id for record in project.objects(image)]
    assert parents["embedded"] == parents["paquo"]
    assert orders["embedded"] == orders["paquo"]
    assert parents["paquo"][ids[3]] == parents["paquo"][more.id] == ids[0]


@qupath
def test_a_class_keeps_the_colour_of_each_project(tmp_path: Path) -> None:
    # A class is one object in the JVM, whatever project it comes from.
    shutil.copytree(QUPATH / "images", tmp_path / "images")
    colors = [Color(10, 20, 30), Color(200, 100, 50)]
    projects = [
        create_project(tmp_path / str(n), classes=[PathClass("Benign", color)], engine="paquo")
        for n, color in enumerate(colors)
    ]
    for project in projects:
        project.add_image(tmp_path / "images" / "plain.png")
    for _ in range(2):
        for project in projects:
            project.apply(project.images[0], Changes(add=[Annotation(geometry=HOLED, path_class="Benign")]))
    for n, (project, color) in enumerate(zip(projects, colors, strict=True)):
        assert everything(tmp_path / str(n), "1")["colors"] == {"Benign": color}
        assert project.classes == (PathClass("Benign", color),)


@qupath
@pytest.mark.parametrize("first", ["embedded", "paquo"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_is_known_again_after_qupath_saved_it(version: str, first: str, place: Place) -> None:
    folder = place(f"qupath-{version}/empty")
    shapes = [star(1500 + 100 * n, 1200, 60) for n in range(3)]
    shapes += [shapely.box(1400, 100, 1900, 500).difference(star(1600, 300)), shapely.box(1400, 600, 1500.33, 700.77)]
    polygons = [polygon(1 + n % 2, shapely.set_precision(shape, 0.01)) for n, shape in enumerate(shapes)]

    def write(engine: str, model: str) -> RunResult:
        with open_project(folder, engine=engine) as project:
            return write_back(project, project.images[0], polygons, model=model, classes=CLASSES)

    assert write(first, "m1").added == len(polygons)
    with open_project(folder, engine="paquo") as project:
        project.apply(project.images[0], ADD)
        before = project.objects(project.images[0])
    again = write("paquo" if first == "embedded" else "embedded", "m2")
    assert (again.removed + again.kept, again.adopted, again.rejected, again.clipped) == (len(polygons), 0, 0, 0)
    with open_project(folder, engine="paquo") as project:
        undo(project)
        verify_objects(before, project.objects(project.images[0]), path=folder)


@qupath
def test_objects_of_a_rotated_image_are_written_in_a_moved_project(place: Place) -> None:
    folder = place("qupath-0.6.0/annotated")
    document = json.loads((folder / "project.qpproj").read_text(encoding="utf-8"))
    entry = document["images"][0]
    entry["serverBuilder"] = {
        "builderType": "rotated",
        "builder": entry["serverBuilder"],
        "rotation": "ROTATE_90",
    }
    (folder / "project.qpproj").write_text(json.dumps(document), encoding="utf-8")
    with open_project(folder, engine="paquo") as project:
        image = project.images[0]
        assert image.unsupported is not None
        assert project.apply(image, ADD).num_objects == 36
        assert_as_qupath(project.objects(image), snapshot(folder, "1"))


@qupath
def test_qupath_opens_a_project_that_was_made(tmp_path: Path) -> None:
    shutil.copytree(QUPATH / "images", tmp_path / "images")
    with create_project(tmp_path / "new", classes=[PathClass("A", Color(1, 2, 3))], engine="paquo") as project:
        project.add_image(tmp_path / "images" / "slide.tif", name="Schnitt ä", metadata={"split": "train"})
        project.add_image(tmp_path / "images" / "plain.png", mpp=0.25, image_type="OTHER")
        project.apply(project.images[0], Changes(add=[Annotation(geometry=HOLED, path_class="A")]))
    from paquo.projects import QuPathProject  # noqa: PLC0415

    with QuPathProject(tmp_path / "new" / "project.qpproj", mode="r") as opened:
        first, second = opened.images
        assert (first.image_name, dict(first.metadata), first.image_type.name) == (
            "Schnitt ä",
            {"split": "train"},
            "BRIGHTFIELD_H_E",
        )
        assert (first.width, first.height, second.image_type.name) == (2048, 1536, "OTHER")
        assert [a.path_class.name for a in first.hierarchy.annotations] == ["A"]
        assert first.hierarchy.annotations[0].roi.hausdorff_distance(HOLED) <= 0.02
        assert "A" in [c.name for c in opened.path_classes]
        assert first.java_object.getThumbnail().getWidth() > 100
        calibration = second.java_object.readImageData().getServer().getPixelCalibration()
        assert float(calibration.getAveragedPixelSizeMicrons()) == 0.25


def seen_of(server: Any) -> dict[str, Any]:  # noqa: ANN401
    """What QuPath says of an image server, but for its pixel size."""
    metadata = server.getMetadata()
    levels = [metadata.getLevel(number) for number in range(metadata.nLevels())]
    return {
        "class": str(server.getClass().getSimpleName()),
        "size": (int(server.getWidth()), int(server.getHeight())),
        "levels": [(float(level.getDownsample()), int(level.getWidth()), int(level.getHeight())) for level in levels],
        "magnification": str(metadata.getMagnification()),
        "tile": (int(metadata.getPreferredTileWidth()), int(metadata.getPreferredTileHeight())),
        "rgb": bool(metadata.isRGB()),
        "channels": [str(channel.getName()) for channel in metadata.getChannels()],
    }


@qupath
def test_qupath_opens_and_saves_a_project_of_the_embedded_engine(tmp_path: Path) -> None:
    slides = tmp_path / "Präparate #1, 100 %"
    shutil.copytree(QUPATH / "images", slides)
    with create_project(tmp_path / "new", classes=[PathClass("A", Color(1, 2, 3))], engine="embedded") as project:
        project.add_image(slides / "slide.tif", name="Schnitt ä", metadata={"split": "train"})
        project.add_image(slides / "slide.tif", name="again", mpp=0.125, image_type="FLUORESCENCE")
        project.add_image(slides / "plain.png", mpp=0.25, image_type="OTHER")
        project.apply(project.images[0], Changes(add=[replace(record, parent=None) for record in new_objects()]))
        images = project.images
        before = [project.objects(image) for image in images]
    jvm.start_qupath()
    from paquo.projects import QuPathProject  # noqa: PLC0415

    seen = []
    with QuPathProject(project.path, mode="r+") as opened:
        assert [c.name for c in opened.path_classes if c is not None][:1] == ["A"]
        assert [dict(image.metadata) for image in opened.images] == [dict(image.metadata) for image in images]
        for image in opened.images:
            data = image.java_object.readImageData()
            mpp = float(data.getServer().getPixelCalibration().getAveragedPixelSizeMicrons())
            seen.append((seen_of(data.getServer()), mpp, str(data.getImageType().name())))
            assert image.java_object.getThumbnail().getWidth() > 100
            data.setProperty("touched", "yes")
            image.java_object.saveImageData(data)
        opened.java_object.syncChanges()
    for image, (found, mpp, image_type) in zip(images, seen, strict=True):
        assert image.path is not None
        assert (found["size"], mpp, image_type) == ((image.width, image.height), image.mpp, image.image_type)
        with contextlib.closing(paquo_engine._build_server(image.path)) as own:
            assert found == seen_of(own)  # what QuPath finds in the file by itself
    with open_project(project.path, engine="embedded") as again:
        # QuPath escapes other letters of a URI than Java does; the file is the same.
        assert [replace(image, uri=None) for image in again.images] == [replace(image, uri=None) for image in images]
        for image, objects in zip(again.images, before, strict=True):
            verify_objects(objects, again.objects(image), path=project.path)
            assert read_image_data((again.folder / "data" / image.id / "data.qpdata").read_bytes()).properties[
                "touched"
            ]


# -- with QuPath: nothing is lost


def unchanged_after(project: Project, call: Callable[[], object], error: type[ProjectError], match: str) -> None:
    def files() -> dict[Path, bytes]:
        return {
            path: path.read_bytes() for path in project.folder.rglob("*") if path.is_file() and path.name != ".lock"
        }

    before = files()
    with pytest.raises(error, match=match):
        call()
    assert files() == before


@qupath
@pytest.mark.parametrize("version", VERSIONS)
def test_an_image_that_is_missing_is_an_error(version: str, place: Place) -> None:
    with open_project(place(f"qupath-{version}/multi"), engine="paquo") as project:
        missing = next(image for image in project.images if not image.exists)
        assert len(project.annotations(missing)) == 3
        unchanged_after(project, lambda: project.apply(missing, ADD), ProjectWriteError, "while its file .* is missing")


@qupath
@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: data[: len(data) // 2], lambda _: b"x"])
def test_damaged_data_never_reach_qupath(damage: Callable[[bytes], bytes], place: Place) -> None:
    folder = place("qupath-0.6.0/annotated")
    path = folder / "data" / "1" / "data.qpdata"
    path.write_bytes(damage(path.read_bytes()))
    with open_project(folder, engine="paquo") as project:
        image = project.images[0]
        unchanged_after(project, lambda: project.apply(image, ADD), ProjectFormatError, "data.qpdata")


@qupath
def test_an_object_that_does_not_arrive_is_an_error(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = hierarchy_editor.HierarchyEditor._add
    monkeypatch.setattr(
        hierarchy_editor.HierarchyEditor, "_add", lambda editor, records, gone: real(editor, records[1:], gone)
    )
    with open_project(place("qupath-0.6.0/annotated"), engine="paquo") as project:
        image = project.images[0]
        unchanged_after(
            project, lambda: project.apply(image, ADD), ProjectWriteError, "36 objects were written and 35 read back"
        )


@qupath
def test_an_object_that_arrives_otherwise_is_an_error(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = hierarchy_editor.HierarchyEditor._roi
    monkeypatch.setattr(
        hierarchy_editor.HierarchyEditor,
        "_roi",
        lambda editor, shape, roi, plane: real(editor, shape.convex_hull, roi, plane),
    )
    with open_project(place("qupath-0.6.0/annotated"), engine="paquo") as project:
        image = project.images[0]
        unchanged_after(
            project, lambda: project.apply(image, ADD), ProjectWriteError, "came back with another geometry"
        )


@qupath
def test_objects_that_qupath_does_not_read_are_an_error(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = paquo_engine._OpenImage.__init__

    def forgetful(opened: Any, content: bytes, builder: Any) -> None:  # noqa: ANN401
        real(opened, content, builder)
        opened.hierarchy.getRootObject().clearChildObjects()

    monkeypatch.setattr(paquo_engine._OpenImage, "__init__", forgetful)
    with open_project(place("qupath-0.6.0/annotated"), engine="paquo") as project:
        image = project.images[0]
        unchanged_after(project, lambda: project.apply(image, ADD), ProjectWriteError, "QuPath reads 0 of 35 objects")


@qupath
def test_what_qupath_drops_is_an_error(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = paquo_engine._OpenImage.written

    def forgetful(opened: Any) -> bytes:  # noqa: ANN401
        opened.data.getHistoryWorkflow().clear()
        return real(opened)

    monkeypatch.setattr(paquo_engine._OpenImage, "written", forgetful)
    with open_project(place("qupath-0.6.0/workflow-tma"), engine="paquo") as project:
        image = project.images[0]
        unchanged_after(project, lambda: project.apply(image, ADD), ProjectWriteError, "does not keep the history of")


@qupath
def test_an_error_in_java_is_one_of_ours(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: object) -> bytes:
        jvm.java_class("java.lang.Integer").parseInt("no number")
        raise AssertionError

    monkeypatch.setattr(paquo_engine._OpenImage, "written", failing)
    with open_project(place("qupath-0.6.0/annotated"), engine="paquo") as project:
        image = project.images[0]
        unchanged_after(
            project,
            lambda: project.apply(image, ADD),
            ProjectWriteError,
            "QuPath cannot save 'slide.*: .*no number.*nothing was changed",
        )


@qupath
def test_both_engines_refuse_alike(place: Place) -> None:
    with open_project(place("qupath-0.6.0/annotated"), engine="paquo") as project:
        image = project.images[0]
        with pytest.raises(AnnotationError, match="has no object 00000000-0000-0000-0000-000000000007"):
            project.apply(image, Changes(remove=[UUID(int=7)]))
        bowtie = shapely.Polygon([(0, 0), (10, 10), (10, 0), (0, 10)])
        with pytest.raises(AnnotationError, match="is not valid"):
            project.apply(image, Changes(add=[Annotation(geometry=bowtie)]))


@qupath
def test_the_former_state_is_kept_and_comes_back(place: Place) -> None:
    folder = place("qupath-0.5.1/annotated")
    path = folder / "data" / "1" / "data.qpdata"
    former = path.read_bytes()
    with open_project(folder, engine="paquo") as project:
        applied = project.apply(project.images[0], ADD)
    assert applied.backup is not None
    assert applied.backup.read_bytes() == former != path.read_bytes()
    assert [backup.path for backup in list_backups(folder, "1")] == [applied.backup]
    restore(folder, "1")
    assert path.read_bytes() == former
    assert not list(folder.rglob("*.bkp"))


@qupath
def test_a_file_that_is_no_image_cannot_be_added(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    with create_project(tmp_path / "new", engine="paquo") as project:
        with pytest.raises((ProjectError, OSError), match=r"QuPath cannot open .*text.png"):
            project.add_image(tmp_path / "text.png")
        assert project.images == ()


# -- with QuPath: the process


@qupath
def test_java_has_a_bounded_heap_and_leaves_standard_output_alone(place: Place) -> None:
    code = f"""
import json
from darefine_qupath.annotations import Annotation
from darefine_qupath.project import Changes, open_project
import shapely
with open_project({str(place("qupath-0.6.0/annotated"))!r}, engine="paquo") as project:
    applied = project.apply(project.images[0], Changes(add=[Annotation(geometry=shapely.box(0, 0, 9, 9))]))
import jpype
jpype.JClass("java.lang.System").out.println("a line that Java prints")
runtime = jpype.JClass("java.lang.Runtime").getRuntime()
print(json.dumps({{"objects": applied.num_objects, "heap": int(runtime.maxMemory())}}))
"""
    said = run(code)
    assert "a line that Java prints" in said.stderr
    found = json.loads(said.stdout)
    assert found["objects"] == 36
    assert 1.9 * 2**30 <= found["heap"] <= 2 * 2**30
    assert json.loads(run(code, PAQUO_JAVA_OPTS="-Xmx300m").stdout)["heap"] <= 300 * 2**20


@qupath
@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_stays_a_keyboard_interrupt() -> None:
    code = f"""
import os, time
from darefine_qupath.project import jvm
jvm.start_qupath()
try:
    os.kill(os.getpid(), {int(signal.SIGINT)})
    time.sleep(30)
except KeyboardInterrupt:
    print("interrupted")
"""
    said = run(code)
    assert (said.stdout.strip(), said.returncode) == ("interrupted", 0)


@qupath
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_forked_after_the_start_is_told() -> None:
    code = """
import os
from darefine_qupath.errors import EngineError
from darefine_qupath.project import jvm
jvm.start_qupath()
if os.fork() == 0:
    try:
        jvm.start_qupath()
    except EngineError:
        os._exit(7)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    assert run(code).stdout.strip() == "7"


def test_the_engine_error_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(jvm, "find_qupath", lambda: None)
    with pytest.raises(EngineError, match="paquo finds no QuPath; run `paquo get_qupath"):
        open_project(tmp_path, engine="paquo")
