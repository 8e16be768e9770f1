"""data.qpdata: what QuPath itself reads, edits that change nothing else, damage that is named."""

from __future__ import annotations

import gzip
import json
import math
import random
import struct
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry.base import BaseGeometry

from darefine_qupath.annotations import Annotation, Kind, Plane
from darefine_qupath.classes import Color
from darefine_qupath.errors import AnnotationError, ProjectFormatError, ProjectUnsupportedError
from darefine_qupath.javaserial.decode import decode
from darefine_qupath.javaserial.descriptors import ClassDesc, Field
from darefine_qupath.javaserial.encode import encode
from darefine_qupath.javaserial.nodes import JavaArray, JavaObject, Stream
from darefine_qupath.javaserial.strings import JavaString
from darefine_qupath.javaserial.values import NodeError, hash_code, hash_order, whole_number
from darefine_qupath.project.interface import Changes
from darefine_qupath.project.qpdata.build import NodeBuilder
from darefine_qupath.project.qpdata.create import create_image_data
from darefine_qupath.project.qpdata.document import Document
from darefine_qupath.project.qpdata.edit import edit_document
from darefine_qupath.project.qpdata.geometries import filled_area
from darefine_qupath.project.qpdata.objects import ObjectReader
from darefine_qupath.project.qpdata.properties import Opaque
from darefine_qupath.project.qpdata.read import ImageData, read_image_data
from darefine_qupath.project.qpdata.stored import expected_objects, stored_record
from darefine_qupath.project.qpdata.summary import summarize
from darefine_qupath.project.qpdata.verify import verify_edit
from tests.conftest import DATA
from tests.fuzzing import damaged
from tests.qpdata_edits import edited_data

VERSIONS = ("0.4.4", "0.5.1", "0.6.0", "0.7.0")
NAMES = ("annotated", "empty", "multi", "workflow-tma", "paquo", "large")
ID = UUID("12345678-1234-4234-8234-123456789abc")


def _project(version: str, name: str) -> Path:
    return DATA / "qupath" / f"qupath-{version}" / name


def _file(version: str, name: str, entry: str = "1") -> Path:
    return _project(version, name) / "data" / entry / "data.qpdata"


def _read(path: Path) -> ImageData:
    return read_image_data(path.read_bytes(), path=path)


def _expected(folder: Path) -> list[dict[str, Any]]:
    full = folder / "expected-full.json.gz"
    text = gzip.decompress(full.read_bytes()) if full.is_file() else (folder / "expected.json").read_bytes()
    images: list[dict[str, Any]] = json.loads(text)["images"]
    return [image for image in images if image["has_image_data"]]


def _cases() -> Iterator[Any]:
    for version in VERSIONS:
        for name in NAMES:
            for image in _expected(_project(version, name)):
                entry = image["entry_id"]
                # QuPath 0.4 and 0.5 read the objects only where the image file is missing.
                image.setdefault("is_whole", image["read_image_data"] == "ok")
                yield pytest.param(_file(version, name, entry), image, id=f"{version}-{name}-{entry}")


CASES = list(_cases())
WHOLE = [case for case in CASES if case.values[1]["is_whole"]]
FILES = [pytest.param(case.values[0], id=case.id) for case in CASES]


@pytest.fixture(scope="module")
def annotated() -> ImageData:
    return _read(_file("0.6.0", "annotated"))


def _same(ours: Sequence[Annotation], theirs: Sequence[Annotation]) -> bool:
    """Whether records are equal, NaN being one value."""
    return list(ours) == list(theirs)


# -- what QuPath reads


def _check_object(record: Annotation, wanted: dict[str, Any], colors: dict[str, Color]) -> None:
    assert record.kind == wanted["kind"].replace("_", " ")
    assert str(record.id) == wanted["id"]
    assert record.name == wanted["name"]
    assert record.locked == wanted["locked"]
    assert ("root" if record.parent is None else str(record.parent)) == wanted["parent"]
    assert record.path_class == wanted["classification"]
    assert record.color == wanted["object_color"]
    if wanted["class_color"] is not None:
        assert colors[wanted["classification"]].argb == wanted["class_color"]
    assert record.class_probability == pytest.approx(float(wanted["class_probability"]), nan_ok=True)
    measured = {name: float(value) for name, value in wanted["measurements"].items()}
    assert list(record.measurements) == list(measured)
    assert record.measurements == pytest.approx(measured, rel=1e-15, nan_ok=True)
    assert record.metadata == wanted["metadata"]
    assert record.metadata.get("ANNOTATION_DESCRIPTION") == wanted.get("description")
    assert record.is_missing == wanted.get("tma_missing", False)
    if "case_id" in wanted:
        assert record.metadata.get("Case ID") == wanted["case_id"]
    if "nucleus_roi" in wanted:
        _check_shape(record.nucleus, wanted["nucleus_roi"])
    if wanted["roi"] is None:
        assert record.geometry is None
    else:
        _check_roi(record, wanted["roi"])


def _check_roi(record: Annotation, wanted: dict[str, Any]) -> None:
    assert record.roi == wanted["roi_name"]
    assert record.plane == Plane(**wanted["plane"])
    assert record.area == pytest.approx(wanted["area"], rel=1e-4, abs=1.0)
    _check_shape(record.geometry, wanted)


def _check_shape(geometry: BaseGeometry | None, wanted: dict[str, Any] | None) -> None:
    if wanted is None:
        assert geometry is None
        return
    assert geometry is not None
    assert geometry.geom_type == wanted["geometry_type"]
    assert geometry.is_valid == wanted["is_valid"]
    left, top, width, height = wanted["bounds"]
    assert geometry.bounds == pytest.approx((left, top, left + width, top + height), abs=0.0051)
    if "wkt" in wanted:
        theirs = shapely.from_wkt(wanted["wkt"])
        assert geometry.area == pytest.approx(theirs.area, abs=0.01)
        assert geometry.length == pytest.approx(theirs.length, abs=0.01)
        if wanted["num_points"] <= 1000:
            assert geometry.hausdorff_distance(theirs) <= 0.02
        assert geometry.symmetric_difference(theirs).area <= 0.01
    elif geometry.geom_type == "Polygon" and wanted["roi_name"] != "Ellipse":
        assert shapely.get_num_coordinates(geometry) - 1 - len(geometry.interiors) <= wanted["num_points"]


@pytest.mark.parametrize(("path", "wanted"), CASES)
def test_read_gives_every_object_that_qupath_reads(path: Path, wanted: dict[str, Any]) -> None:
    image = _read(path)
    assert len(image.objects) == wanted["n_objects"]
    for record, expected in zip(image.objects, wanted["objects"], strict=True):
        _check_object(record, expected, dict(image.colors))
    kinds = Counter(record.kind.replace(" ", "_") for record in image.objects)
    assert kinds == wanted["counts"]
    assert str(image.root_id) == wanted["root"]["id"]


def _property_text(value: object) -> str:
    names = {bool: "java.lang.Boolean", int: "java.lang.Integer", float: "java.lang.Double"}
    if isinstance(value, Opaque):
        return value.java_class
    if isinstance(value, list):
        return f"java.util.ArrayList: [{', '.join(value)}]"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"{names[type(value)]}: {text}" if type(value) in names else text


@pytest.mark.parametrize(("path", "wanted"), WHOLE)
def test_read_gives_what_stands_beside_the_objects(path: Path, wanted: dict[str, Any]) -> None:
    image = _read(path)
    assert image.image_type == wanted["image_type"]
    assert image.data_version == "Data file version 3"
    assert image.locale == "en"
    properties = {name: _property_text(value) for name, value in image.properties.items()}
    # QuPath prints an object with its hash.
    assert properties == {
        name: value.split(":")[0] if "@" in value else value for name, value in wanted["properties"].items()
    }
    assert image.server is not None
    server = wanted["server"]
    if server is not None and "width" in server:
        metadata = image.server["metadata"]
        assert (metadata["width"], metadata["height"]) == (server["width"], server["height"])
    grid = wanted.get("tma_grid")
    assert (image.tma_grid is None) == (grid is None)
    if grid is not None and image.tma_grid is not None:
        names = {record.id: record.name for record in image.objects}
        assert [names[core] for core in image.tma_grid.cores] == grid["cores"]
        assert (image.tma_grid.width, image.tma_grid.height) == (grid["width"], grid["height"])


@pytest.mark.parametrize(("path", "wanted"), WHOLE)
def test_read_gives_the_stains(path: Path, wanted: dict[str, Any]) -> None:
    stains = _read(path).stains
    if wanted["stains"] is None:
        assert stains is None
        return
    assert stains is not None
    assert stains.name == wanted["stains"]["name"]
    assert stains.background == tuple(wanted["stains"]["background"])
    assert [vector.name for vector in stains.vectors] == [vector["name"] for vector in wanted["stains"]["vectors"]]
    for ours, theirs in zip(stains.vectors, wanted["stains"]["vectors"], strict=True):
        assert ours.rgb == pytest.approx(theirs["rgb"], abs=1e-7)
        assert ours.residual == theirs["residual"]


@pytest.mark.parametrize(("path", "wanted"), WHOLE)
def test_read_gives_the_workflow(path: Path, wanted: dict[str, Any]) -> None:
    ours = [(step.java_class, step.name, step.script) for step in _read(path).workflow]
    theirs = [(step["java_class"], step["name"], step["script"]) for step in wanted["workflow"]]
    # Reading an image sets its type and stains once more, which QuPath notes before and after the stored steps.
    starts = [start for start in range(len(theirs) - len(ours) + 1) if theirs[start : start + len(ours)] == ours]
    assert starts
    added = theirs[: starts[0]] + theirs[starts[0] + len(ours) :]
    assert {name for _, name, _ in added} <= {"Set image type", "Set color deconvolution stains"}


@pytest.mark.parametrize("version", VERSIONS)
def test_read_gives_twenty_thousand_objects(shared: Path, version: str) -> None:
    folder = shared / "qupath" / f"qupath-{version}" / "big"
    (wanted,) = _expected(folder)
    image = _read(folder / "data" / "1" / "data.qpdata")
    assert len(image.objects) == wanted["n_objects"] == 20_500
    for record, expected in zip(image.objects, wanted["objects"], strict=True):
        assert (str(record.id), record.path_class, record.roi) == (
            expected["id"],
            expected["classification"],
            expected["roi"]["roi_name"],
        )
        measured = {name: float(value) for name, value in expected["measurements"].items()}
        assert record.measurements == measured
    areas = shapely.area([record.geometry for record in image.objects])
    np.testing.assert_allclose(areas, [item["roi"]["area"] for item in wanted["objects"]], rtol=1e-3, atol=0.5)


def test_a_polygon_that_crosses_itself_is_the_area_it_winds_around() -> None:
    corners = [(math.cos(angle), math.sin(angle)) for angle in np.arange(5) * 4 * math.pi / 5]
    star = np.array(corners) * 100
    filled, _ = filled_area([star], max_crossings=20_000)
    assert filled.contains(shapely.Point(0, 0))
    assert filled.geom_type == "Polygon"
    assert shapely.make_valid(shapely.Polygon(star)).area < filled.area < shapely.Polygon(star).convex_hull.area


def test_rings_that_cross_too_often_are_refused() -> None:
    rng = np.random.default_rng(1)
    with pytest.raises(ValueError, match="edges cross more than 20000 times"):
        filled_area([rng.uniform(0, 1000, (500, 2))], max_crossings=20_000)


# -- other layouts


def _stream_of(root_parts: Sequence[Any], *, text: str = '{"dataVersion":3}') -> bytes:
    """File with one root whose content is given."""
    builder = NodeBuilder(Stream(()), is_modern=True, colors={})
    root = builder.external("qupath.lib.objects.PathRootObject", root_parts)
    hierarchy = builder.object("qupath.lib.objects.hierarchy.PathObjectHierarchy", {"rootObject": root})
    title = b"\x00\x13Data file version 3"
    return encode(Stream((title, JavaString(text), hierarchy, JavaString("EOF"))))


def _old_object(builder: NodeBuilder, name: str) -> JavaObject:
    """Annotation as QuPath 0.2 laid it out: no metadata, no identity, no lock."""
    spec = builder.object(
        "qupath.lib.roi.RectangleROI$SerializationProxy", {"c": -1, "x": 1.0, "x2": 5.0, "y": 2.0, "y2": 4.0}
    )
    content = (JavaString(name), None, None, bytes(4), builder.path_class("Tumor"), spec, struct.pack(">d", math.nan))
    return builder.external("qupath.lib.objects.PathAnnotationObject", content)


def test_objects_of_old_versions_have_the_same_identity_each_time() -> None:
    builder = NodeBuilder(Stream(()), is_modern=True, colors={})
    children = [_old_object(builder, "a"), _old_object(builder, "b")]
    data = _stream_of((None, None, None, (2).to_bytes(4, "big"), *children), text="Image path: /x/y.tif")
    first, second = read_image_data(data), read_image_data(data)
    assert _same(first.objects, second.objects)
    assert not first.has_ids
    assert len({record.id for record in first.objects}) == 2
    assert [record.name for record in first.objects] == ["a", "b"]
    assert first.objects[0].path_class == "Tumor"
    assert first.objects[0].geometry.equals(shapely.box(1, 2, 5, 4))
    assert first.server is None
    with pytest.raises(ProjectUnsupportedError, match="whose objects have no identity"):
        edited_data(first, Changes(remove=[first.objects[0].id]))


def test_the_old_measurements_of_32_bits_are_read() -> None:
    builder = NodeBuilder(Stream(()), is_modern=False, colors={})
    name = "qupath.lib.measurements.FloatMeasurement"
    desc = ClassDesc(name, 1, 2, [Field("F", "value"), Field("L", "name", JavaString("Ljava/lang/String;"))])
    items = [JavaObject.of(desc, {"value": value, "name": JavaString(f"m{value}")}) for value in (0.5, -2.25)]
    backing = builder.object("java.util.ArrayList", {"size": 2, "@java.util.ArrayList": (bytes(3) + b"\x02", *items)})
    measured = builder.object("qupath.lib.measurements.DefaultMeasurementList", {"list": backing})
    old = _old_object(builder, "x").data
    node = builder.external("qupath.lib.objects.PathAnnotationObject", (*old[:2], measured, *old[3:]))
    image = read_image_data(_stream_of((None, None, None, (1).to_bytes(4, "big"), node)))
    assert image.objects[0].measurements == {"m0.5": 0.5, "m-2.25": -2.25}


@pytest.mark.parametrize("num_fields", [0, 1])
def test_the_layout_with_a_uuid_object_is_read(num_fields: int) -> None:
    builder = NodeBuilder(Stream(()), is_modern=True, colors={})
    desc = decode(_uuid_stream()).contents[0].desc  # type: ignore[union-attr]
    high, low = ID.int >> 64, ID.int & (2**64 - 1)
    identity = JavaObject.of(desc, {"mostSigBits": high - (high >> 63 << 64), "leastSigBits": low - (low >> 63 << 64)})
    old = _old_object(builder, "x").data
    fields = [builder.metadata({"k": "v"}, None)][:num_fields]
    count = num_fields.to_bytes(4, "big")
    blocks = (count, *fields, bytes(4)) if fields else (count + bytes(4),)
    content = (old[0], None, identity, *blocks, builder.boolean(True), *old[4:])
    node = builder.external("qupath.lib.objects.PathAnnotationObject", content)
    image = read_image_data(_stream_of((None, None, None, (1).to_bytes(4, "big"), node)))
    assert image.objects[0].id == ID
    assert image.objects[0].locked
    assert image.objects[0].metadata == ({"k": "v"} if fields else {})


def _uuid_stream() -> bytes:
    fields = b"".join(b"J" + len(name).to_bytes(2, "big") + name for name in (b"leastSigBits", b"mostSigBits"))
    desc = (
        b"r\x00\x0ejava.util.UUID" + (-4856846361193249489).to_bytes(8, "big", signed=True) + b"\x02\x00\x02" + fields
    )
    return b"\xac\xed\x00\x05s" + desc + b"xp" + bytes(16)


def test_the_old_area_roi_is_read() -> None:
    builder = NodeBuilder(Stream(()), is_modern=True, colors={})
    outer, hole = [(0, 0), (10, 0), (10, 10), (0, 10)], [(2, 2), (2, 4), (4, 4), (4, 2)]
    columns = []
    for axis in (0, 1):
        rings = [JavaArray(builder.desc("[F"), np.array(ring, ">f4")[:, axis].tobytes()) for ring in (outer, hole)]
        columns.append(JavaArray(_renamed(builder.desc("[F"), "[[F"), rings))
    desc = _renamed(
        builder.desc("qupath.lib.roi.PolygonROI$SerializationProxy"), "qupath.lib.roi.AreaROI$SerializationProxy"
    )
    roi = JavaObject.of(desc, {"c": -1, "x": columns[0], "y": columns[1]})
    old = _old_object(builder, "x").data
    node = builder.external("qupath.lib.objects.PathAnnotationObject", (*old[:5], roi, old[6]))
    image = read_image_data(_stream_of((None, None, None, (1).to_bytes(4, "big"), node)))
    assert image.objects[0].roi == "Geometry"
    assert image.objects[0].geometry.equals(shapely.Polygon(outer, [hole]))


def _renamed(desc: ClassDesc, name: str) -> ClassDesc:
    return ClassDesc(name, desc.uid, desc.flags, desc.fields, desc.parent)


def test_a_roi_of_a_foreign_library_is_refused_by_name() -> None:
    builder = NodeBuilder(Stream(()), is_modern=True, colors={})
    name = "qupath.lib.roi.GeometryROI$SerializationProxy"
    desc = _renamed(builder.desc("qupath.lib.roi.PolygonROI$SerializationProxy"), name)
    old = _old_object(builder, "x").data
    node = builder.external("qupath.lib.objects.PathAnnotationObject", (*old[:5], JavaObject.of(desc, {}), old[6]))
    data = _stream_of((None, None, None, (1).to_bytes(4, "big"), node))
    with pytest.raises(
        ProjectFormatError, match=r"GeometryROI\$SerializationProxy holds a geometry of a foreign library.*at byte \d+"
    ):
        read_image_data(data)


# -- damage


def test_what_only_an_edit_looks_at_is_refused_with_its_place() -> None:
    blank = create_image_data(image_type="OTHER", server=None, entry_id="/p::1", version="0.6.0")
    measured = Annotation(geometry=shapely.box(1, 2, 3, 4), kind="detection", measurements={"a": 1.0})
    data = edited_data(read_image_data(blank), Changes(add=[measured]))
    strange = data.replace(b"I\x00\x05value", b"I\x00\x05other")
    assert strange != data
    image = read_image_data(strange)
    with pytest.raises(ProjectFormatError, match=r"java\.lang\.Integer has no field 'value' \(at byte (\d+)\)") as told:
        edited_data(image, Changes(add=[Annotation(geometry=shapely.box(1, 2, 3, 4))]))
    assert strange[told.value.offset or 0 :].startswith(b"s")
    assert b"java.lang.Integer" in strange[told.value.offset or 0 :][:30]


@pytest.mark.parametrize("path", FILES)
def test_a_file_cut_anywhere_is_refused(path: Path) -> None:
    data = path.read_bytes()
    for size in range(0, len(data), max(1, len(data) // 60)):
        with pytest.raises(ProjectFormatError, match=r"data\.qpdata: "):
            read_image_data(data[:size], path=path)


def test_a_file_without_its_end_says_so(annotated: ImageData) -> None:
    without = annotated.data[: annotated.data.rindex(b"t\x00\x03EOF")]
    with pytest.raises(ProjectFormatError, match="ends without its closing 'EOF'"):
        read_image_data(without, path=annotated.path)


def test_an_object_that_is_its_own_child_is_refused() -> None:
    stream = decode(_stream_of((None, None, None, bytes(4))))
    root = stream.contents[2].get("rootObject")  # type: ignore[union-attr]
    root.data = (None, None, None, (1).to_bytes(4, "big"), root)
    with pytest.raises(ProjectFormatError, match="in the hierarchy twice"):
        read_image_data(encode(stream))


def test_values_shared_a_million_times_do_not_fill_memory() -> None:
    builder = NodeBuilder(Stream(()), is_modern=True, colors={})
    long_list = builder.measurements({f"m{number}": 0.0 for number in range(3000)}, is_wide=False)
    children = []
    for number in range(3000):
        record = Annotation(geometry=None, kind="detection", id=UUID(int=number))
        content = list(builder.path_object(record, None, None, (), is_wide=False))
        content[3] = long_list
        children.append(builder.external("qupath.lib.objects.PathDetectionObject", content))
    data = _stream_of((None, None, None, len(children).to_bytes(4, "big"), *children))
    with pytest.raises(ProjectFormatError, match="shared so often"):
        read_image_data(data)


HOSTILE = sorted((DATA / "hostile").glob("laughs*.qpdata"))


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in HOSTILE])
def test_keys_that_share_lists_without_end_are_read_by_their_class(path: Path) -> None:
    tracemalloc.start()
    try:
        image = _read(path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert "java.util.ArrayList" in {*image.properties, *map(str, *[v for v in image.properties.values() if v])}


def test_a_colour_that_is_no_number_is_named() -> None:
    with pytest.raises(ProjectFormatError, match=r"B-4991\.qpdata: .* where a whole number should be \(at byte \d+\)"):
        _read(DATA / "hostile" / "qpdata-B-4991.qpdata")


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300, 0.5, -(2.0**31) - 1])
def test_a_whole_number_is_one_that_java_holds(value: float) -> None:
    double = ClassDesc("java.lang.Double", 1, 2, [Field("D", "value", None)], None)
    with pytest.raises(NodeError, match="where a whole number should be"):
        whole_number(JavaObject.of(double, {"value": value}))


def test_what_nobody_thought_of_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    path = _file("0.6.0", "annotated")
    monkeypatch.setattr(ObjectReader, "_roi", lambda *_: 1 // 0)
    with pytest.raises(ProjectFormatError, match=r"data\.qpdata: The image data cannot be read: .*by zero"):
        _read(path)
    document = Document(path.read_bytes(), path=path)
    with pytest.raises(ProjectFormatError, match=r"data\.qpdata: The image data cannot be read: .*by zero"):
        document.records([1])


def test_half_a_character_is_shown_as_qupath_shows_it(annotated: ImageData) -> None:
    named = _edited(annotated, Changes(add=[_new(name="abc", metadata={"k": "xyz"})]))
    data = named.data.replace(b"\0\3abc", b"\0\3\xed\xa0\x80").replace(b"\0\3xyz", b"\0\3\xed\xbf\xbf")
    found = read_image_data(data).objects[-1]
    assert (found.name, found.metadata) == ("\ufffd", {"k": "\ufffd"})
    assert encode(Document(data).stream) == data


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"plane": Plane(z=2**31)}, "on plane .* which QuPath cannot hold"),
        ({"plane": Plane(t=-(10**30))}, "on plane .* which QuPath cannot hold"),
        ({"path_class": ": ".join("a" * 900)}, "has 900 parts; QuPath derives a class at most"),
    ],
)
def test_what_java_cannot_hold_is_not_written(annotated: ImageData, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        edited_data(annotated, Changes(add=[_new(**fields)]))


def test_a_hierarchy_may_be_deep() -> None:
    builder = NodeBuilder(Stream(()), is_modern=True, colors={})
    node = None
    for number in range(5_000):
        record = Annotation(geometry=None, id=UUID(int=number))
        content = builder.path_object(record, None, None, () if node is None else (node,), is_wide=True)
        node = builder.external("qupath.lib.objects.PathAnnotationObject", content)
    data = _stream_of((None, None, builder.metadata({}, ID), None, (1).to_bytes(4, "big"), node))
    image = read_image_data(data)
    assert len(image.objects) == 5_000
    gone = [record.id for record in image.objects[5:]]
    assert len(read_image_data(edited_data(image, Changes(remove=gone))).objects) == 5


@pytest.mark.parametrize("name", ["annotated", "workflow-tma"])
def test_damaged_files_are_read_or_refused(name: str) -> None:
    path = _file("0.7.0", name)
    read = named = 0
    rng = random.Random(7)
    data = path.read_bytes()
    for _ in range(400):
        try:
            image = read_image_data(copy := damaged(data, rng), path=path)
        except ProjectFormatError as error:
            named += error.path == path and error.offset is not None
        else:
            read += 1
            assert encode(decode(copy)) == copy
            assert all(record.kind for record in image.objects)
    assert read > 0
    assert read + named == 400


# -- edits


POLYGON = shapely.Polygon([(10, 10), (60.25, 12), (55, 70.5), (20, 60)])
SHAPES = {
    "Polygon": POLYGON,
    "Rectangle": shapely.box(1, 2, 30.5, 40.25),
    "hole": shapely.Polygon(shapely.box(0, 0, 50, 50).exterior, [shapely.box(10, 10, 20, 20).exterior]),
    "multi": shapely.MultiPolygon([shapely.box(0, 0, 5, 5), shapely.box(10, 0, 15, 5)]),
    "Line": shapely.LineString([(0, 0), (10, 5)]),
    "Polyline": shapely.LineString([(0, 0), (10, 5), (20, 0)]),
    "Points": shapely.MultiPoint([(1, 2), (3, 4)]),
    "point": shapely.Point(7, 8),
    "lines": shapely.MultiLineString([[(0, 0), (1, 1)], [(5, 5), (6, 7)]]),
}
ROIS = {"hole": "Geometry", "multi": "Geometry", "point": "Points", "lines": "Geometry"}


def _new(shape: str = "Polygon", **fields: Any) -> Annotation:  # noqa: ANN401
    return Annotation(geometry=SHAPES[shape], **{"path_class": "Tumor", "name": shape, **fields})


def _edited(image: ImageData, changes: Changes, **colors: Color) -> ImageData:
    edited = read_image_data(edited_data(image, changes, colors), path=image.path)
    by_id = {record.id: record for record in expected_objects(image, changes)}
    assert {record.id: record for record in edited.objects} == by_id
    _, touched = edit_document(Document(image.data), changes, colors)
    verify_edit(Document(image.data), changes, touched, Document(edited.data), path=Path("data.qpdata"))
    return edited


@pytest.mark.parametrize("path", FILES)
def test_adding_and_removing_gives_the_original_bytes(path: Path) -> None:
    image = _read(path)
    new = [_new(shape, measurements={"a": 1.5, "b": math.nan}, metadata={"k": "ä"}) for shape in SHAPES]
    new += [_new(kind=kind, measurements={"a": 0.1}, path_class="A: B: C") for kind in ("detection", "tile")]
    new += [_new(kind="cell", nucleus=shapely.box(20, 20, 30, 30), class_probability=0.25, locked=True, color=-5)]
    if image.objects:
        new.append(_new(parent=image.objects[0].id, plane=Plane(1, 2, 3)))
    edited = _edited(image, Changes(add=new))
    assert len(edited.objects) == len(image.objects) + len(new)
    assert edited_data(edited, Changes(remove=[record.id for record in new])) == image.data


@pytest.mark.parametrize("shape", SHAPES)
def test_a_geometry_becomes_the_roi_that_qupath_makes_of_it(annotated: ImageData, shape: str) -> None:
    record = _new(shape, id=ID)
    found = _edited(annotated, Changes(add=[record])).objects[-1]
    assert found.roi == ROIS.get(shape, shape)
    assert found.geometry.equals(record.geometry)
    assert found == replace(stored_record(record), parent=None)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_object_of_ours_is_laid_out_as_one_of_qupaths(version: str) -> None:
    """Every object, taken out and put back from its record, encodes to as many bytes of the same classes."""
    image = _read(_file(version, "annotated"))
    emptied = _edited(image, Changes(remove=[record.id for record in image.objects]))
    again = _edited(emptied, Changes(add=image.objects), **dict(image.colors))
    for ours, theirs in zip(again.objects, image.objects, strict=True):
        # Two things a record does not hold: the raw polygon that crosses itself, and 64-bit values of a detection.
        if "bow tie" in (theirs.name or "") or "g1" in theirs.measurements:
            continue
        assert ours == theirs
    names = [
        Counter(getattr(node, "desc", node).name for node in decode(each.data).nodes if hasattr(node, "desc"))
        for each in (image, again)
    ]
    for name in (
        "qupath.lib.objects.PathAnnotationObject",
        "qupath.lib.objects.MetadataMap",
        "qupath.lib.objects.classes.PathClass",
    ):
        assert names[0][name] == names[1][name]


def test_new_objects_share_the_class_of_the_others(annotated: ImageData) -> None:
    data = edited_data(
        annotated,
        Changes(add=[_new(path_class="Tumor: Positive"), _new(path_class="Fresh")]),
        {"Fresh": Color(1, 2, 3)},
    )
    classes = [
        node for node in decode(data).nodes if isinstance(node, JavaObject) and node.desc.name.endswith(".PathClass")
    ]
    former = [
        node
        for node in decode(annotated.data).nodes
        if isinstance(node, JavaObject) and node.desc.name.endswith(".PathClass")
    ]
    assert len(classes) == len(former) + 1
    assert read_image_data(data).colors["Fresh"] == Color(1, 2, 3)


@pytest.mark.parametrize("path", FILES)
def test_replacing_with_the_same_changes_nothing(path: Path) -> None:
    image = _read(path)
    if image.objects:
        assert edited_data(image, Changes(replace=image.objects)) == image.data


def test_a_change_of_name_class_and_lock_leaves_the_roi_as_it_is(annotated: ImageData) -> None:
    bow_tie = next(record for record in annotated.objects if "bow tie" in (record.name or ""))
    new = replace(bow_tie, name="now", path_class="Stroma", locked=True)
    edited = _edited(annotated, Changes(replace=[new]))
    found = next(record for record in edited.objects if record.id == bow_tie.id)
    assert found == new
    assert found.roi == "Polygon"
    assert edited_data(edited, Changes(replace=[bow_tie])) == annotated.data


def test_replacing_keeps_place_and_children(annotated: ImageData) -> None:
    outer = next(record for record in annotated.objects if record.name == "outer")
    edited = _edited(
        annotated, Changes(replace=[replace(outer, geometry=POLYGON, measurements={"x": 2.0}, metadata={"m": "n"})])
    )
    assert [record.id for record in edited.objects] == [record.id for record in annotated.objects]
    assert [record.parent for record in edited.objects] == [record.parent for record in annotated.objects]


@pytest.mark.parametrize("value", [1e300, -1e300, 1e13, 131_072.01, 5e-324])
def test_numbers_of_any_size_are_read(value: float) -> None:
    builder = NodeBuilder(Stream(()), is_modern=True, colors={})
    name = "qupath.lib.roi.RectangleROI$SerializationProxy"
    roi = builder.object(name, {"c": -1, "x": value, "x2": value + abs(value), "y": 0.0, "y2": 1.0})
    old = _old_object(builder, "x").data
    node = builder.external("qupath.lib.objects.PathAnnotationObject", (*old[:5], roi, old[6]))
    (record,) = read_image_data(_stream_of((None, None, None, (1).to_bytes(4, "big"), node))).objects
    assert record.geometry.bounds[0] == pytest.approx(value, abs=0.005)


def test_children_of_a_removed_object_take_its_place(annotated: ImageData) -> None:
    names = {record.name: record for record in annotated.objects}
    edited = _edited(
        annotated, Changes(remove=[names["outer"].id, names["middle"].id], add=[_new(parent=names["middle"].id)])
    )
    kept = [record.id for record in annotated.objects if record.name not in ("outer", "middle")]
    assert [record.id for record in edited.objects][: len(kept)] == kept
    assert all(record.parent not in (names["outer"].id, names["middle"].id) for record in edited.objects)
    assert edited.objects[-1].parent is None


def test_new_objects_may_stand_below_each_other(annotated: ImageData) -> None:
    top, below = _new(name="top"), _new(name="below")
    edited = _edited(annotated, Changes(add=[replace(below, parent=top.id), top]))
    assert [record.name for record in edited.objects[-2:]] == ["top", "below"]
    first, second = replace(top, parent=below.id), replace(below, parent=top.id)
    with pytest.raises(AnnotationError, match="each other's parents"):
        edited_data(annotated, Changes(add=[first, second]))


def test_an_object_that_connections_refer_to_can_be_removed() -> None:
    image = _read(_file("0.6.0", "workflow-tma"))
    gone = [record.id for record in image.objects if record.kind == "detection"][:2]
    assert len(_edited(image, Changes(remove=gone)).objects) == len(image.objects) - 2


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (Changes(remove=[ID]), AnnotationError, f"has no object {ID}"),
        (Changes(replace=[_new(id=ID)]), AnnotationError, f"has no object {ID}"),
        (Changes(add=[_new(id=ID), _new(id=ID)]), AnnotationError, "more than once"),
        (Changes(add=[_new(parent=ID)]), AnnotationError, "to stand below"),
        (Changes(add=[_new(kind="tma core")]), ProjectUnsupportedError, "cannot be added"),
        (Changes(add=[_new(metadata={"Object ID": "x"})]), AnnotationError, "names the object's identity"),
        (Changes(add=[_new(path_class="a: ")]), AnnotationError, "not a class name"),
        (Changes(add=[Annotation(geometry=shapely.Polygon())]), AnnotationError, "no finite extent"),
        (Changes(add=[Annotation(geometry=shapely.Point(math.inf, 0))]), AnnotationError, "no finite extent"),
        (
            Changes(add=[Annotation(geometry=shapely.Polygon([(0, 0), (2, 2), (2, 0), (0, 2)]))]),
            AnnotationError,
            "not valid",
        ),
        (
            Changes(add=[Annotation(geometry=shapely.GeometryCollection([POLYGON, shapely.Point(0, 0)]))]),
            AnnotationError,
            "parts of one type",
        ),
    ],
)
def test_changes_that_make_no_sense_are_refused(
    annotated: ImageData, changes: Changes, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        edited_data(annotated, changes)


def test_kind_parent_and_identity_cannot_be_changed(annotated: ImageData) -> None:
    first, second = annotated.objects[:2]
    with pytest.raises(AnnotationError, match="cannot become a detection"):
        edited_data(annotated, Changes(replace=[replace(first, kind="detection")]))
    with pytest.raises(AnnotationError, match="keeps its place"):
        edited_data(annotated, Changes(replace=[replace(first, parent=second.id)]))
    with pytest.raises(AnnotationError, match="already"):
        edited_data(annotated, Changes(add=[first]))


def test_a_core_of_the_grid_is_not_removed() -> None:
    image = _read(_file("0.5.1", "workflow-tma"))
    core = next(record for record in image.objects if record.kind == "tma core")
    with pytest.raises(ProjectUnsupportedError, match="core of the TMA grid"):
        edited_data(image, Changes(remove=[core.id]))
    edited = _edited(image, Changes(replace=[replace(core, is_missing=True, name="gone")]))
    assert edited.objects[0].is_missing


def test_objects_with_one_identity_are_read_and_not_edited(annotated: ImageData) -> None:
    first, second = annotated.objects[:2]
    doubled = read_image_data(annotated.data.replace(str(second.id).encode(), str(first.id).encode()))
    assert doubled.duplicates == {first.id}
    assert len(doubled.objects) == len(annotated.objects)
    with pytest.raises(ProjectUnsupportedError, match="share their identity"):
        edited_data(doubled, Changes(remove=[first.id]))
    edited = read_image_data(edited_data(doubled, Changes(add=[_new()])))
    assert len(edited.objects) == len(annotated.objects) + 1


coordinates = st.floats(-1e5, 1e5, allow_nan=False).map(lambda value: round(value, 3))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.tuples(coordinates, coordinates), min_size=3, max_size=12))
def test_what_is_stored_is_what_is_read(corners: list[tuple[float, float]]) -> None:
    hull = shapely.MultiPoint(corners).convex_hull.simplify(0)
    image = _read(_file("0.7.0", "empty", "2"))
    if hull.geom_type != "Polygon" or not hull.is_valid:
        return
    record = Annotation(geometry=hull, id=uuid5(ID, str(corners)))
    found = _edited(image, Changes(add=[record])).objects[0]
    assert found == stored_record(record)
    assert found.geometry.hausdorff_distance(hull) <= 0.02
    assert stored_record(found).geometry == found.geometry


names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    name=st.none() | names,
    metadata=st.dictionaries(names.filter(lambda key: key != "Object ID"), st.text(max_size=40), max_size=4),
    measurements=st.dictionaries(names, st.floats(), max_size=20),
    kind=st.sampled_from(["annotation", "detection", "tile"]),
    color=st.none() | st.integers(-(2**31), 2**31 - 1),
)
def test_texts_and_numbers_come_back(
    name: str | None, metadata: dict[str, str], measurements: dict[str, float], kind: Kind, color: int | None
) -> None:
    image = _read(_file("0.4.4", "empty", "2"))
    metadata = {key: value.encode("utf-16", "replace").decode("utf-16") for key, value in metadata.items()}
    record = _new(name=name, metadata=metadata, measurements=measurements, kind=kind, color=color)
    found = _edited(image, Changes(add=[record])).objects[0]
    assert (found.name, found.metadata, found.color) == (name, metadata, color)
    assert list(found.measurements) == list(measurements)


# -- new files and summaries


@pytest.mark.parametrize("version", VERSIONS)
def test_a_new_file_is_what_qupath_saves_of_an_empty_image(version: str) -> None:
    theirs = _read(_file(version, "empty", "2"))
    data = create_image_data(
        image_type=theirs.image_type,
        server=theirs.server,
        entry_id=theirs.properties["PROJECT_ENTRY_ID"],
        version=version,
        root_id=theirs.root_id,
    )
    ours = read_image_data(data)
    # 0.4 and 0.5 also note the server's path, and all of them the steps that set type and stains.
    same = ("image_type", "stains", "objects", "root_id", "properties", "locale", "server", "qupath_version", "has_ids")
    for name in same:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.workflow == ()
    hierarchy = data.index(b"qupath.lib.objects.hierarchy.PathObjectHierarchy")
    assert (
        data[hierarchy : hierarchy + 100]
        == theirs.data[(at := theirs.data.index(data[hierarchy : hierarchy + 48])) : at + 100]
    )


@pytest.mark.parametrize("image_type", ["BRIGHTFIELD_H_DAB", "BRIGHTFIELD_OTHER", "FLUORESCENCE", "OTHER", "UNSET"])
def test_only_brightfield_images_have_stains(image_type: str) -> None:
    image = read_image_data(create_image_data(image_type=image_type, server=None, entry_id="/p::1", version="0.6.0"))
    assert image.image_type == image_type
    assert (image.stains is not None) == image_type.startswith("BRIGHTFIELD")


def test_an_unknown_image_type_is_refused() -> None:
    with pytest.raises(ProjectUnsupportedError, match="'XRAY' is not an image type"):
        create_image_data(image_type="XRAY", server=None, entry_id="/p::1", version="0.6.0")


@pytest.mark.parametrize("path", FILES)
def test_the_summary_is_qupaths(path: Path) -> None:
    theirs = json.loads((path.parent / "summary.json").read_text())
    ours = summarize(Document(path.read_bytes(), path=path), timestamp_ms=theirs["timestamp"])
    if (theirs["server"]["sizeZ"], theirs["server"]["sizeT"]) != (1, 1):
        pytest.skip("a stack")
    assert ours == theirs
    assert list(ours["hierarchy"]["objectTypeCounts"]) == list(theirs["hierarchy"]["objectTypeCounts"])


def test_hash_codes_are_javas() -> None:
    assert hash_code("Hello") == 69609650
    assert hash_code("polygenelubricants") == 0x80000000
    # As QuPath wrote it in the annotated project.
    assert hash_order(["Nucleus: Area µm^2", "Mean", "nan"]) == ["Mean", "Nucleus: Area µm^2", "nan"]
