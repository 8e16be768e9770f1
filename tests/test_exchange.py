"""Annotation files of other programs: every form, every kind of damage, and what is written back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import geojson
import numpy as np
import pytest
import rasterio
import shapely
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shapely.geometry import LineString, MultiPoint, MultiPolygon, Point, Polygon, box
from shapely.geometry.base import BaseGeometry

from darefine_qupath.annotations import Annotation, Plane
from darefine_qupath.classes import ClassMap, Color, PathClass
from darefine_qupath.errors import ExchangeError, ProjectError
from darefine_qupath.exchange import layers, read_annotations, write_geojson, write_label_tiff
from darefine_qupath.exchange.shapes import ellipse, snapped
from darefine_qupath.geometry import Box, Size
from darefine_qupath.masks import LabelPainter
from darefine_qupath.pipeline.annotation_import import import_files, match_files
from darefine_qupath.pipeline.create import create_from_slides
from darefine_qupath.project import Project, create_project
from tests.tile_slides import ramps, write_pyramid

Points = list[tuple[float, float]]
Write = Callable[..., Path]

WHITE = Color(255, 255, 255)
SQUARE = [(0, 0), (100, 0), (100, 100), (0, 100)]
BOWTIE = [(0, 0), (100, 100), (100, 0), (0, 100)]


def vertices(points: Points) -> str:
    return "<Vertices>" + "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in points) + "</Vertices>"


def region(points: Points, *, kind: int = 0, value: str = "", **attributes: str) -> str:
    given_ = "".join(f' {name}="{text}"' for name, text in attributes.items())
    values = f'<Attributes><Attribute Name="9999" Id="0" Value="{value}"/></Attributes>' if value else "<Attributes/>"
    return f'<Region Id="1" Type="{kind}"{given_}>{values}{vertices(points)}</Region>'


def aperio(*regions: str, name: str = "", description: str = "Description", mpp: str = "0.5") -> str:
    return (
        f'<Annotations MicronsPerPixel="{mpp}"><Annotation Id="1" Name="{name}" LineColor="255"><Attributes>'
        f'<Attribute Name="{description}" Id="0" Value=""/></Attributes><Regions>{"".join(regions)}</Regions>'
        f"</Annotation></Annotations>"
    )


def asap(*annotations: str, groups: str = "") -> str:
    return (
        f'<?xml version="1.0"?><ASAP_Annotations><Annotations>{"".join(annotations)}</Annotations>'
        f"<AnnotationGroups>{groups}</AnnotationGroups></ASAP_Annotations>"
    )


def asap_item(points: Points, *, kind: str = "Polygon", group: str = "None") -> str:
    rows = "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}" />' for i, (x, y) in enumerate(points))
    return (
        f'<Annotation Name="A" Type="{kind}" PartOfGroup="{group}" Color="#F4FA58"><Coordinates>{rows}</Coordinates>'
        f"</Annotation>"
    )


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_text(text: str | bytes, name: str = "a.xml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_text


# Aperio ImageScope


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (aperio(region(SQUARE, value="Benign", Text="other"), name="layer"), "Benign"),
        (aperio(region(SQUARE, Text="Benign"), name="layer"), "Benign"),
        (aperio(region(SQUARE), name="Benign"), "Benign"),
        (aperio(region(SQUARE), description="CaP"), "CaP"),
        (aperio(region(SQUARE)), None),
    ],
    ids=["attribute value", "text", "layer name", "layer description", "none"],
)
def test_aperio_class(write: Write, text: str, expected: str | None) -> None:
    (annotation,) = read_annotations(write(text)).annotations
    assert annotation.path_class == expected


def test_aperio_classes_differ_by_more_than_case(write: Write) -> None:
    text = aperio(region(SQUARE, Text="carcinoma  in situ"), region(SQUARE, Text="Carcinoma In Situ"))
    assert [a.path_class for a in read_annotations(write(text)).annotations] == ["carcinoma in situ"] * 2
    project = read_annotations(write(text), classes=["Carcinoma in situ"])
    assert {a.path_class for a in project.annotations} == {"Carcinoma in situ"}


@pytest.mark.parametrize(
    ("kind", "points", "geometry", "roi"),
    [
        (0, SQUARE, Polygon(SQUARE), None),
        (1, SQUARE, Polygon(SQUARE), None),
        (1, [(0, 0), (100, 50)], box(0, 0, 100, 50), "Rectangle"),
        (2, [(0, 0), (100, 50)], ellipse(0, 0, 100, 50), "Ellipse"),
        (2, [(0, 0), (100, 0), (100, 50), (0, 50)], ellipse(0, 0, 100, 50), "Ellipse"),
        (3, [(0, 0), (100, 50)], LineString([(0, 0), (100, 50)]), "Line"),
        (4, [(0, 0), (100, 50), (7, 9)], LineString([(0, 0), (100, 50), (7, 9)]), "Polyline"),
        (5, [(0, 0), (100, 50)], MultiPoint([(0, 0), (100, 50)]), "Points"),
        (0, [(3, 4)], Point(3, 4), "Points"),
    ],
)
def test_aperio_types(write: Write, kind: int, points: Points, geometry: BaseGeometry, roi: str | None) -> None:
    (annotation,) = read_annotations(write(aperio(region(points, kind=kind)))).annotations
    assert shapely.hausdorff_distance(annotation.geometry, geometry) < 0.01
    assert annotation.roi == roi


def test_aperio_negative_region_is_a_hole_of_its_layer(write: Write) -> None:
    hole = [(40, 40), (60, 40), (60, 60), (40, 60)]
    imported = read_annotations(write(aperio(region(SQUARE, Text="Benign"), region(hole, NegativeROA="1"))))
    (annotation,) = imported.annotations
    assert annotation.area == 100 * 100 - 20 * 20
    assert not annotation.geometry.contains(Point(50, 50))
    assert (imported.cut_outs, imported.num_items) == (1, 2)


def test_aperio_negative_region_that_cuts_nothing_is_refused(write: Write) -> None:
    far = [(500, 500), (600, 500), (600, 600)]
    imported = read_annotations(write(aperio(region(SQUARE), region(far, NegativeROA="1"))))
    assert "cuts no other" in imported.refused[0].reason
    assert imported.annotations[0].area == 100 * 100


def test_aperio_region_inside_a_negative_one_is_refused(write: Write) -> None:
    around = [(-1, -1), (101, -1), (101, 101), (-1, 101)]
    imported = read_annotations(write(aperio(region(SQUARE), region(around, NegativeROA="1"))))
    assert not imported.annotations
    assert "wholly inside the negative" in imported.refused[0].reason


def test_aperio_large_loop_of_an_eight_stays(write: Write) -> None:
    imported = read_annotations(write(aperio(region(BOWTIE))))
    assert imported.annotations[0].area == pytest.approx(5000)
    assert "crossed itself" in imported.repaired[0].reason


def test_aperio_overshoot_of_the_pen_is_dropped(write: Write) -> None:
    # The last strokes cross the first one and enclose a small triangle the other way round.
    shape = [(0, 0), (100, 0), (100, 100), (0, 100), (0, -5), (-5, -5)]
    imported = read_annotations(write(aperio(region(shape))))
    assert imported.annotations[0].area == pytest.approx(10000, rel=2e-3)
    assert "overshot" in imported.repaired[0].reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (region([(0, 0), (50, 0), (100, 0)]), "encloses no area"),
        (region([]), "has no vertices"),
        (region([("x", 1), (2, 3), (4, 5)]), "'x' where a number should be"),
        (region([("nan", 1), (2, 3), (4, 5)]), "'nan' where a number should be"),
    ],
    ids=["flat", "empty", "text", "nan"],
)
def test_aperio_refuses_by_name(write: Write, text: str, reason: str) -> None:
    imported = read_annotations(write(aperio(text, region(SQUARE))))
    assert [note.item for note in imported.refused] == ["region 1 of layer 1"]
    assert reason in imported.refused[0].reason
    assert len(imported.annotations) == 1


def test_aperio_colour_and_pixel_size(write: Write) -> None:
    imported = read_annotations(write(aperio(region(SQUARE, Text="T"), mpp="0.25")), mpp=0.5)
    assert imported.colors == {"T": Color(255, 0, 0)}
    assert imported.mpp == 0.25
    assert "drawn at 0.25 um/px, the image has 0.5" in imported.warnings[0]


def test_aperio_area_that_does_not_fit_is_told(write: Write) -> None:
    text = aperio(region(SQUARE, AreaMicrons="2500"), region(SQUARE, AreaMicrons="2600"))
    assert len(read_annotations(write(text)).warnings) == 1


def test_imagescope_areas_are_those_the_file_states(shared: Path) -> None:
    path = shared / "annotations/aperio/TCGA-EJ-5519-01Z-00-DX1.xml"
    imported = read_annotations(path)
    stated = [193707670.8, 67628.7, 1819485.2]
    areas = [annotation.area * imported.mpp**2 for annotation in imported.annotations]
    assert areas == pytest.approx(stated, rel=0.005)
    assert imported.num_items == 3


def test_imagescope_and_qupath_agree_on_a_slide(shared: Path) -> None:
    ours = read_annotations(shared / "annotations/aperio/TCGA-EJ-5519-01Z-00-DX1.xml").annotations
    qupath = read_annotations(shared / "annotations/geojson/TCGA-EJ-5519-01Z-00-DX1.json").annotations
    tumor, other, negative = (a.geometry for a in qupath)
    for annotation, geometry in zip(ours, (tumor, negative, other), strict=True):
        union = annotation.geometry.union(geometry).area
        assert annotation.geometry.intersection(geometry).area / union > 0.997


def test_every_real_file_gives_every_shape(shared: Path) -> None:
    expected = {"one-sixth.xml": 7, "TCGA-EJ-5519-01Z-00-DX1.xml": 3, "TCGA-EJ-5519-01Z-00-DX1.json": 3}
    expected |= {"qupath-polygon-cell-classified.json": 4, "qupath05.geojson": 3}
    paths = [path for path in (shared / "annotations").rglob("*.*") if path.suffix != ".md"]
    assert len(paths) == 17
    for path in paths:
        imported = read_annotations(path)
        assert (len(imported.annotations), imported.refused) == (expected.get(path.name, 1), ())
        assert all(annotation.geometry.is_valid for annotation in imported.annotations)


# ASAP


@pytest.mark.parametrize(
    ("kind", "points", "geometry"),
    [
        ("Polygon", SQUARE, Polygon(SQUARE)),
        ("Spline", SQUARE, Polygon(SQUARE)),
        ("Rectangle", SQUARE, Polygon(SQUARE)),
        ("Dot", SQUARE[1:2], Point(100, 0)),
        ("PointSet", SQUARE[:3], MultiPoint(SQUARE[:3])),
        ("Measurement", SQUARE[:2], LineString(SQUARE[:2])),
    ],
)
def test_asap_types(write: Write, kind: str, points: Points, geometry: BaseGeometry) -> None:
    (annotation,) = read_annotations(write(asap(asap_item(points, kind=kind)))).annotations
    assert annotation.geometry.normalize() == geometry.normalize()
    assert annotation.path_class is None


def test_asap_group_is_the_class_and_gives_the_colour(write: Write) -> None:
    groups = '<Group Name="Tumor" PartOfGroup="None" Color="#64FE2E"><Attributes /></Group>'
    imported = read_annotations(write(asap(asap_item(SQUARE, group="Tumor"), groups=groups)))
    assert imported.annotations[0].path_class == "Tumor"
    assert imported.colors == {"Tumor": Color(0x64, 0xFE, 0x2E)}


def test_asap_order_and_decimal_comma(write: Write) -> None:
    rows = "".join(f'<Coordinate Order="{i}" X="{x},5" Y="{y}" />' for i, (x, y) in reversed(list(enumerate(SQUARE))))
    item = f'<Annotation Name="A" Type="Polygon" PartOfGroup="None"><Coordinates>{rows}</Coordinates></Annotation>'
    (annotation,) = read_annotations(write(asap(item))).annotations
    assert annotation.geometry.bounds == (0.5, 0, 100.5, 100)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (asap_item(SQUARE, kind="Blob"), "unknown type 'Blob'"),
        (asap_item(SQUARE[:2]), "2 corners"),
        (asap_item([]), "no coordinates"),
    ],
)
def test_asap_refuses_by_name(write: Write, item: str, reason: str) -> None:
    imported = read_annotations(write(asap(asap_item(SQUARE), item)))
    assert [note.item for note in imported.refused] == ["annotation 1 (A)"]
    assert reason in imported.refused[0].reason
    assert len(imported.annotations) == 1


# Files that are no annotations, or mean harm

BILLION = """<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY lol "lol"><!ENTITY lol2 "&lol;&lol;&lol;&lol;&lol;">]>
<Annotations><Annotation Name="&lol2;"/></Annotations>"""
EXTERNAL = """<?xml version="1.0"?><!DOCTYPE a [<!ENTITY xxe SYSTEM "file:///etc/passwd">]>
<Annotations><Annotation Name="&xxe;"/></Annotations>"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BILLION, "declares entities"),
        (EXTERNAL, "declares entities"),
        ("<Annotations><Annotation>", "XML is damaged"),
        ("<html><body/></html>", "its root is <html>"),
        ('{"a": 1}', "JSON without features"),
        ("[1, 2", "not valid JSON"),
        ("[" * 100_000, "nested more than"),
        ("x,y\n1,2\n", "neither Aperio or ASAP"),
        ("", "neither Aperio or ASAP"),
    ],
    ids=[
        "entities",
        "external entity",
        "cut short",
        "html",
        "other json",
        "damaged json",
        "deep json",
        "csv",
        "empty",
    ],
)
def test_other_files_are_refused_by_name(write: Write, text: str, message: str) -> None:
    path = write(text)
    with pytest.raises(ExchangeError, match=message) as error:
        read_annotations(path)
    assert str(path) in str(error.value)


def test_missing_file() -> None:
    with pytest.raises(ExchangeError, match="cannot be opened"):
        read_annotations("nowhere.xml")


def test_byte_order_marks(write: Write) -> None:
    assert read_annotations(write("\ufeff" + aperio(region(SQUARE)))).num_items == 1
    assert read_annotations(write(aperio(region(SQUARE)).encode("utf-16"))).num_items == 1
    assert read_annotations(write("\ufeff[]", "a.json")).num_items == 0


def test_many_vertices_come_whole(write: Write) -> None:
    angles = np.linspace(0, 2 * np.pi, 50_000, endpoint=False)
    points = np.column_stack([30000 + 20000 * np.cos(angles), 30000 + 20000 * np.sin(angles)]).round(3)
    (annotation,) = read_annotations(write(aperio(region(points.tolist())))).annotations
    assert shapely.get_num_coordinates(annotation.geometry) == 50_001
    assert annotation.area == pytest.approx(math.pi * 20000**2, rel=1e-6)


def test_a_scribble_ends(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darefine_qupath.exchange.collector._MAX_CROSSINGS", 500)
    points = np.random.default_rng(0).integers(0, 10000, (100, 2)).tolist()
    imported = read_annotations(write(aperio(region(points), region(SQUARE))))
    assert "crosses itself more than 500 times" in imported.refused[0].reason
    assert len(imported.annotations) == 1


# GeoJSON


def qupath_feature(**properties: object) -> dict[str, object]:
    ring = [list(point) for point in [*SQUARE, SQUARE[0]]]
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": properties}


@pytest.mark.parametrize(
    ("classification", "name", "color"),
    [
        ({"name": "Tumor", "colorRGB": -3670016}, "Tumor", Color(200, 0, 0)),
        ({"name": "Tumor", "color": [200, 0, 0]}, "Tumor", Color(200, 0, 0)),
        ({"name": "Tumor", "color": [200, 0, 0, 128]}, "Tumor", Color(200, 0, 0)),
        ({"names": ["Tumor", "Positive"], "color": [1, 2, 3]}, "Tumor: Positive", Color(1, 2, 3)),
        (
            {"parentClass": {"name": "Tumor"}, "name": "Positive", "colorRGB": -1},
            "Tumor: Positive",
            WHITE,
        ),
        ("Tumor", "Tumor", None),
        ({"name": None}, None, None),
        (None, None, None),
    ],
)
def test_geojson_classification(write: Write, classification: object, name: str | None, color: Color | None) -> None:
    imported = read_annotations(write(json.dumps(qupath_feature(classification=classification)), "a.geojson"))
    assert imported.annotations[0].path_class == name
    assert imported.colors == ({name: color} if color else {})


@pytest.mark.parametrize("form", ["collection", "list", "single", "geometry"])
def test_geojson_forms(write: Write, form: str) -> None:
    one = qupath_feature()
    data = {
        "collection": {"type": "FeatureCollection", "features": [one]},
        "list": [one],
        "single": one,
        "geometry": one["geometry"],
    }[form]
    assert read_annotations(write(json.dumps(data), "a.json")).annotations[0].area == 10000


@pytest.mark.parametrize(
    ("identity", "properties", "kind"),
    [
        ("PathDetectionObject", {}, "detection"),
        ("PathCellObject", {}, "cell"),
        (None, {"object_type": "tile"}, "tile"),
        ("6423a977-ffff-48db-affc-cd11632010f0", {"objectType": "tmaCore"}, "tma core"),
        ("6423a977-ffff-48db-affc-cd11632010f0", {}, "annotation"),
    ],
)
def test_geojson_kinds(write: Write, identity: str | None, properties: dict[str, object], kind: str) -> None:
    data = qupath_feature(**properties) | ({"id": identity} if identity else {})
    (annotation,) = read_annotations(write(json.dumps(data), "a.json")).annotations
    assert annotation.kind == kind
    assert (str(annotation.id) == identity) == (identity is not None and "-" in identity)


@pytest.mark.parametrize(
    "measurements", [[{"name": "a", "value": 1.5}, {"name": "b", "value": "NaN"}], {"a": 1.5, "b": "NaN"}]
)
def test_geojson_measurements(write: Write, measurements: object) -> None:
    data = qupath_feature(measurements=measurements, metadata={"k": 1}, isLocked=True, name="n", color=[255, 0, 0])
    (annotation,) = read_annotations(write(json.dumps(data), "a.json")).annotations
    assert annotation.measurements["a"] == 1.5
    assert math.isnan(annotation.measurements["b"])
    assert (annotation.metadata, annotation.locked, annotation.name) == ({"k": "1"}, True, "n")
    assert Color.from_argb(annotation.color) == Color(255, 0, 0)


def test_geojson_children_know_their_parent(write: Write) -> None:
    data = qupath_feature(childObjects=[qupath_feature(name="child")]) | {"id": "6423a977-ffff-48db-affc-cd11632010f0"}
    parent, child = read_annotations(write(json.dumps(data), "a.json")).annotations
    assert (child.name, child.parent) == ("child", parent.id)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (17, "is no Feature but 17"),
        ({"type": "Feature", "geometry": None, "properties": {}}, "has no geometry but null"),
        ({"type": "Feature", "geometry": {"type": "Circle"}}, "has no geometry"),
        ({"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[0, 0], ["a", 1]]]}}, "damaged"),
        ({"type": "Feature", "geometry": {"type": "Polygon", "coordinates": 3}}, "damaged"),
        ({"type": "Feature", "geometry": {"type": "Polygon", "coordinates": []}}, "no coordinates"),
        ({"type": "Polygon", "coordinates": [[[0, 0], [1, 0], [2, 0], [0, 0]]]}, "no area"),
        (qupath_feature() | {"properties": [1]}, "properties that are"),
    ],
)
def test_geojson_bad_feature_is_refused_with_its_index(write: Write, bad: object, reason: str) -> None:
    imported = read_annotations(write(json.dumps([qupath_feature(), bad, qupath_feature()]), "a.json"))
    assert [note.item for note in imported.refused] == ["feature 1"]
    assert reason in imported.refused[0].reason
    assert len(imported.annotations) == 2


ID = "6423a977-ffff-48db-affc-cd11632010f0"


def test_second_shape_of_an_id_gets_a_new_one_and_keeps_its_children(write: Write) -> None:
    other = qupath_feature(name="other", childObjects=[qupath_feature(name="child")])
    imported = read_annotations(write(json.dumps([qupath_feature() | {"id": ID}, other | {"id": ID}]), "a.json"))
    first, second, child = imported.annotations
    assert (str(first.id), child.parent) == (ID, second.id)
    assert second.id != first.id
    assert [note.item for note in imported.repaired] == ["feature 1"]


def test_geojson_object_that_stands_twice_comes_once(write: Write) -> None:
    data = qupath_feature() | {"id": ID}
    imported = read_annotations(write(json.dumps([data, data]), "a.json"))
    assert (len(imported.annotations), [note.item for note in imported.refused]) == (1, ["feature 1"])


@pytest.mark.parametrize(
    ("members", "properties", "own"),
    [
        ({"id": ID}, {}, True),
        ({}, {"id": ID}, True),
        ({"id": 7}, {}, False),
        ({"id": "cell-7"}, {}, False),
        ({}, {}, False),
    ],
)
def test_only_a_uuid_is_an_id_of_its_own(
    write: Write, members: dict[str, object], properties: dict[str, object], *, own: bool
) -> None:
    imported = read_annotations(write(json.dumps(qupath_feature(**properties) | members), "a.json"))
    assert imported.own_ids == ({UUID(ID)} if own else set())
    assert imported.items == ("feature 0",)


def test_ruler_without_length_is_one_bad_object(write: Write) -> None:
    ruler = {"type": "LineString", "coordinates": [[5, 5], [5, 5]]}
    imported = read_annotations(write(json.dumps([ruler, qupath_feature()]), "a.json"))
    assert [str(note) for note in imported.refused] == ["feature 0: has points that are all the same"]
    assert len(imported.annotations) == 1


def test_geojson_form_is_qupaths(tmp_path: Path) -> None:
    annotation = Annotation(
        id=UUID(int=5),
        geometry=box(1, 2, 3.14159, 4),
        path_class="Tumor: Positive",
        name="n",
        locked=True,
        measurements={"a": 1.0, "b": math.nan},
        metadata={"darefine.run": "r"},
        plane=Plane(-1, 2, 0),
    )
    path = tmp_path / "o.geojson"
    assert write_geojson([annotation], path, classes=[PathClass("Tumor: Positive", Color(1, 2, 3))]) == 1
    collection = geojson.loads(path.read_text())
    assert collection.is_valid
    (feature,) = collection["features"]
    assert (feature["type"], feature["id"]) == ("Feature", str(UUID(int=5)))
    assert feature["geometry"]["plane"] == {"c": -1, "z": 2, "t": 0}
    assert [3.14, 2.0] in feature["geometry"]["coordinates"][0]
    assert feature["properties"] == {
        "objectType": "annotation",
        "name": "n",
        "classification": {"names": ["Tumor", "Positive"], "color": [1, 2, 3]},
        "isLocked": True,
        "measurements": {"a": 1.0, "b": "NaN"},
        "metadata": {"darefine.run": "r"},
    }


def test_geojson_has_the_members_of_a_real_export(shared: Path, tmp_path: Path) -> None:
    real = shared / "annotations/geojson/qupath05.geojson"
    write_geojson(read_annotations(real).annotations, tmp_path / "o.geojson")
    theirs, ours = (json.loads(path.read_text()) for path in (real, tmp_path / "o.geojson"))
    assert ours == theirs


GRID = st.integers(-(10**6), 10**6).map(lambda value: value / 100)


@given(points=st.lists(st.tuples(GRID, GRID), min_size=3, max_size=12))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_geojson_round_trip_keeps_every_corner(tmp_path_factory: pytest.TempPathFactory, points: Points) -> None:
    geometry, _ = snapped(Polygon(points))
    path = tmp_path_factory.mktemp("geojson") / "o.geojson"
    written = write_geojson([Annotation(geometry=geometry, path_class="T")], path)
    imported = read_annotations(path)
    assert written == len(imported.annotations) == (geometry is not None)
    assert not imported.repaired
    for annotation in imported.annotations:
        assert annotation.geometry.equals(geometry)


@given(points=st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)), min_size=3, max_size=15))
@settings(deadline=None, derandomize=True, max_examples=150)
def test_snapped_is_valid_and_on_the_grid(points: Points) -> None:
    geometry, repaired = snapped(Polygon(points))
    if geometry is None:
        return
    assert geometry.is_valid
    corners = shapely.get_coordinates(geometry) * 100
    assert np.allclose(corners, corners.round(), atol=1e-4)
    assert repaired or geometry.area == pytest.approx(Polygon(points).area, abs=0.02 * Polygon(points).length + 1e-3)


def test_ellipse_survives_geojson(tmp_path: Path) -> None:
    shape, _ = snapped(ellipse(10, 20, 110, 70))
    write_geojson([Annotation(geometry=shape, roi="Ellipse")], tmp_path / "o.geojson")
    (annotation,) = read_annotations(tmp_path / "o.geojson").annotations
    assert annotation.roi == "Ellipse"
    assert annotation.area == pytest.approx(math.pi * 50 * 25)


def test_a_failed_write_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "o.geojson"
    path.write_text("former")
    broken = Annotation(geometry=box(0, 0, 1, 1), metadata={"a": object()})  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        write_geojson([broken], path)
    assert [file.name for file in tmp_path.iterdir()] == ["o.geojson"]
    assert path.read_text() == "former"
    with pytest.raises(ExchangeError, match="cannot be written"):
        write_geojson([], tmp_path / "none" / "o.geojson")


# Label masks


def test_label_mask_with_a_palette(tmp_path: Path) -> None:
    mask = np.zeros((30, 40), np.uint8)
    mask[5:15, 10:30] = 2
    mask[8:10, 12:14] = 0
    image = Image.fromarray(mask, "P")
    image.putpalette([0, 0, 0, 1, 1, 1, 200, 30, 40])
    image.save(tmp_path / "m.png")
    imported = read_annotations(tmp_path / "m.png", labels={2: "Invasive"}, image_size=(160, 120))
    (annotation,) = imported.annotations
    assert annotation.geometry.bounds == (40, 20, 120, 60)
    assert annotation.area == (200 - 4) * 16
    assert imported.colors == {"Invasive": Color(200, 30, 40)}


def test_label_mask_touching_corners_stay_two_polygons(tmp_path: Path) -> None:
    mask = np.zeros((4, 4), np.uint16)
    mask[0, 0] = mask[1, 1] = 7
    with rasterio.open(tmp_path / "m.tif", "w", driver="GTiff", width=4, height=4, count=1, dtype="uint16") as dataset:
        dataset.write(mask, 1)
    imported = read_annotations(tmp_path / "m.tif")
    assert [(a.path_class, a.area) for a in imported.annotations] == [("Label 7", 1), ("Label 7", 1)]


@pytest.mark.parametrize("mode", ["RGB", "F"])
def test_pictures_are_no_label_masks(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "m.tif")
    with pytest.raises(ExchangeError, match="no label mask"):
        read_annotations(tmp_path / "m.tif")


def test_damaged_mask(tmp_path: Path) -> None:
    (tmp_path / "m.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(ExchangeError, match="cannot be read"):
        read_annotations(tmp_path / "m.png")


CLASSES = ClassMap(names=("Normal", "Tumor"), unlabelled="Normal")


@pytest.mark.parametrize(("downsample", "image_size"), [(1, (700, 530)), (4, (4099, 2500)), (7, (3000, 9000))])
def test_label_tiff_is_what_the_painter_paints(tmp_path: Path, downsample: int, image_size: tuple[int, int]) -> None:
    tumor = Annotation(geometry=Polygon([(100, 100), (650, 130), (300, 500)]), path_class="Tumor")
    painter = LabelPainter([tumor], CLASSES)
    path = tmp_path / "m.tif"
    size = write_label_tiff(painter, image_size, path, downsample=downsample)
    assert size == Size(-(-image_size[0] // downsample), -(-image_size[1] // downsample))
    with rasterio.open(path) as dataset:
        mask, palette, blocks = dataset.read(1), dataset.colormap(1), dataset.block_shapes
    box_ = Box(0, 0, size.width * downsample, size.height * downsample)
    assert (mask == painter.paint(box_, size, image_size=image_size)).all()
    assert blocks == [(512, 512)]
    assert palette[1][:3] == tuple(CLASSES.colors[1])


def test_label_mask_round_trip(tmp_path: Path) -> None:
    shapes = MultiPolygon([box(8, 8, 80, 40), box(100, 8, 120, 40)])
    painter = LabelPainter([Annotation(geometry=shapes, path_class="Tumor")], ClassMap(names=("Normal", "Tumor")))
    write_label_tiff(painter, (200, 100), tmp_path / "m.tif", downsample=4)
    imported = read_annotations(tmp_path / "m.tif")
    tumor = [a.geometry for a in imported.annotations if a.path_class == "Tumor"]
    assert shapely.union_all(tumor).equals(shapes)
    assert {a.path_class for a in imported.annotations} == {"Tumor", "Ignore*"}
    assert imported.colors["Tumor"] == painter.class_map.colors[1]
    assert [file.name for file in tmp_path.iterdir()] == ["m.tif"]


def own_mask(path: Path, *names: str | None, step: int = 1, downsample: object = 4) -> Path:
    """Write a mask of ours with a square for each label, and keep every `step`-th pixel with its notes."""
    painter = LabelPainter([Annotation(geometry=box(8, 8, 80, 40), path_class="Tumor")], CLASSES)
    write_label_tiff(painter, (200, 100), path, downsample=4)
    with rasterio.open(path) as dataset:
        pixels = dataset.read(1)[::step, ::step].copy()
    pixels[:3, :3] = 2
    notes = json.dumps({"names": ["Normal", "Tumor", *names], "downsample": downsample, "image_size": [200, 100]})
    height, width = pixels.shape
    with rasterio.open(path, "w", driver="GTiff", width=width, height=height, count=1, dtype="uint8") as dataset:
        dataset.write(pixels, 1)
        dataset.update_tags(DAREFINE_LABELS=notes)
    return path


@pytest.mark.parametrize("names", [(), (None,)], ids=["no name", "null"])
def test_labels_painted_into_our_mask_are_named_where_they_have_no_class(
    tmp_path: Path, names: tuple[None, ...]
) -> None:
    found = read_annotations(own_mask(tmp_path / "m.tif", *names), image_size=(200, 100))
    assert {record.path_class for record in found.annotations} == {"Normal", "Tumor"}
    assert "label 2 (9 px) has no class and is left out" in found.warnings[0]
    named = read_annotations(own_mask(tmp_path / "m.tif", "Stroma"), image_size=(200, 100))
    assert (len(named.annotations), named.warnings) == (3, ())


@pytest.mark.parametrize("image_size", [None, (200, 100)])
@pytest.mark.parametrize(("step", "downsample"), [(2, 4), (1, True), (1, 7)])
def test_our_mask_that_another_program_reduced_lies_where_it_did(
    tmp_path: Path, image_size: tuple[int, int] | None, step: int, downsample: object
) -> None:
    found = read_annotations(own_mask(tmp_path / "m.tif", step=step, downsample=downsample), image_size=image_size)
    (tumor,) = (record for record in found.annotations if record.path_class == "Tumor")
    assert np.allclose(tumor.geometry.bounds, (8, 8, 80, 40), atol=4 * step)
    said = [warning for warning in found.warnings if "it was scaled to the image of 200 x 100" in warning]
    assert len(said) == (downsample is not True)


def test_mask_of_several_pages_is_refused_and_a_pyramid_is_not(tmp_path: Path) -> None:
    path, whole = tmp_path / "m.tif", np.zeros((64, 64), np.uint8)
    whole[8:16, 8:16] = 1
    tifffile.imwrite(path, np.stack([np.zeros_like(whole), whole]), photometric="minisblack")
    with pytest.raises(ExchangeError, match="2 pages, of which more than one is a whole mask"):
        read_annotations(path)
    with tifffile.TiffWriter(path) as pyramid:
        pyramid.write(whole, photometric="minisblack")
        pyramid.write(whole[::2, ::2], photometric="minisblack")
    assert [record.area for record in read_annotations(path).annotations] == [64]


@pytest.mark.parametrize(("labels", "said"), [((1, 254, 255), 1), ((1, 255, 256), 0)], ids=["8 bits", "instances"])
def test_255_of_many_instances_is_one_of_them(tmp_path: Path, labels: tuple[int, ...], said: int) -> None:
    mask = np.zeros((8, 32), np.uint16)
    for number, label in enumerate(labels):
        mask[2:4, 4 * number : 4 * number + 2] = label
    tifffile.imwrite(tmp_path / "m.tif", mask)
    found = read_annotations(tmp_path / "m.tif")
    assert sum(record.path_class == "Ignore*" for record in found.annotations) == said == len(found.warnings)


def test_an_exact_spelling_wins_and_a_merge_of_two_is_said(write: Write, tmp_path: Path) -> None:
    both = aperio(region(SQUARE, value="tumor"), region(SQUARE, value="Tumor"), region(SQUARE, value="TUMOR"))
    for known, names, said in (
        (["Tumor", "tumor"], ["tumor", "Tumor", "Tumor"], "one: 'TUMOR' as 'Tumor'"),
        ([], ["tumor"] * 3, "one: 'Tumor' as 'tumor', 'TUMOR' as 'tumor'"),
    ):
        found = read_annotations(write(both), classes=known)
        assert [record.path_class for record in found.annotations] == names
        assert found.warnings[-1].endswith(said)
    tifffile.imwrite(tmp_path / "m.tif", np.eye(4, dtype=np.uint8))
    found = read_annotations(tmp_path / "m.tif", labels={1: "tumor"}, classes=["Tumor"])
    assert {record.path_class for record in found.annotations} == {"Tumor"}


def test_label_tiff_needs_a_downsample(tmp_path: Path) -> None:
    with pytest.raises(ExchangeError, match="at least 1, got 0"):
        write_label_tiff(LabelPainter([], CLASSES), (10, 10), tmp_path / "m.tif", downsample=0)


# Into a project


@pytest.fixture
def namesakes(tmp_path: Path) -> tuple[Path, Path]:
    """Two slides of one name in two folders, one with a file of annotations beside it."""
    slides = []
    for number, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        slides.append(write_pyramid(tmp_path / folder / "slide.tif", ramps(200 + number, 200)))
    (tmp_path / "a" / "slide.xml").write_text(aperio(region(SQUARE, value="Tumor")))
    return slides[0], slides[1]


def drawn(project: Project) -> dict[str, int]:
    return {image.id: len(project.annotations(image)) for image in project.images}


def test_two_images_of_one_name_stay_two_and_get_their_own_annotations(
    tmp_path: Path, namesakes: tuple[Path, Path]
) -> None:
    with create_project(tmp_path / "p", engine="embedded") as project:
        first, second = (project.add_image(slide) for slide in namesakes)
        assert (first.name, second.name) == ("slide.tif", "slide.tif")
        file = tmp_path / "a" / "slide.xml"
        with pytest.raises(ExchangeError, match=r"2 images .* with an id: 1 \(.*a.slide\.tif\), 2 \("):
            match_files(project, [file], None)
        with pytest.raises(ProjectError, match=r"2 images are named 'slide\.tif'; give the entry id, one of 1, 2"):
            match_files(project, [file], "slide.tif")
        import_files(project, match_files(project, [file], "2"))
        assert drawn(project) == {"1": 0, "2": 1}


def test_a_file_never_goes_to_two_slides_of_its_name(tmp_path: Path, namesakes: tuple[Path, Path]) -> None:
    with pytest.raises(ExchangeError, match=r"slide\.xml: 2 slides have this file's name"):
        create_from_slides(tmp_path / "p", namesakes, annotations=tmp_path / "a", engine="embedded")
    assert not (tmp_path / "p").exists()


def test_slides_beside_their_annotations_become_a_project_by_one_command(
    tmp_path: Path, namesakes: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = namesakes[0].parent
    (folder / "other.xml").write_text(aperio(region(SQUARE, value="Tumor")))
    # The folder and a slide in it: the slide comes once, and is no label mask.
    project, imports = create_from_slides(tmp_path / "p", [folder, namesakes[0]], annotations=folder, engine="embedded")
    with project:
        assert drawn(project) == {"1": 1}
    assert [item.file.path.name for item in imports] == ["slide.xml"]
    assert "1 annotation files match no slide by their name: other.xml" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (aperio(region([(0, 0), (9, 0), (5, 0)], value="Tumor")), "holds no annotation that can be used"),
        ('<!DOCTYPE a [<!ENTITY e "x">]><Annotations>&e;</Annotations>', "entit"),
    ],
    ids=["nothing of use", "entities"],
)
def test_no_project_is_made_when_an_annotation_file_is_bad(
    tmp_path: Path, namesakes: tuple[Path, Path], text: str, message: str
) -> None:
    folder = namesakes[0].parent
    (folder / "slide.xml").write_text(text)
    with pytest.raises(ExchangeError, match=message):
        create_from_slides(tmp_path / "p", [folder], annotations=folder, engine="embedded")
    assert not (tmp_path / "p").exists()


# Holes: cost, and several regions at once


def square(x: float, y: float, side: float, **attributes: str) -> str:
    return region([(x, y), (x + side, y), (x + side, y + side), (x, y + side)], **attributes)


def test_aperio_negative_region_over_several_cuts_each_of_them(write: Write) -> None:
    positives = [square(0, 0, 100), square(100, 0, 100), square(200, 0, 100), square(500, 0, 100)]
    imported = read_annotations(write(aperio(*positives, square(50, 25, 200, NegativeROA="1"))))
    assert [annotation.area for annotation in imported.annotations] == [6250, 2500, 6250, 10000]
    assert (imported.cut_outs, imported.num_items, imported.refused) == (1, 5, ())


def test_aperio_hole_cuts_only_its_own_layer(write: Write) -> None:
    two = aperio(square(0, 0, 100)).replace("</Annotations>", "") + aperio(
        square(0, 0, 100), square(25, 25, 50, NegativeROA="1")
    ).removeprefix('<Annotations MicronsPerPixel="0.5">')
    assert [annotation.area for annotation in read_annotations(write(two)).annotations] == [10000, 7500]


@pytest.mark.parametrize(("regions", "holes"), [(400, 400), (1, 400), (400, 0)])
def test_aperio_holes_cost_a_cut_per_region_and_hole(
    write: Write, monkeypatch: pytest.MonkeyPatch, regions: int, holes: int
) -> None:
    cut: list[int] = []
    union = layers._union
    monkeypatch.setattr(layers, "_union", lambda shapes: cut.append(len(shapes)) or union(shapes))
    places = [(100 * (i % 20), 100 * (i // 20)) for i in range(400)]
    items = [square(x, y, 90) for x, y in places] if regions > 1 else [square(0, 0, 2000)]
    imported = read_annotations(
        write(aperio(*items, *(square(x + 20, y + 20, 30, NegativeROA="1") for x, y in places[:holes])))
    )
    assert (len(cut), sum(cut)) == (min(regions, holes), holes)
    whole = 90**2 * 400 if regions > 1 else 2000**2
    assert sum(annotation.area for annotation in imported.annotations) == whole - holes * 900


def test_aperio_holes_of_all_in_all_are_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_MAX_CUT", 100)
    items = [square(0, 0, 1000)] * 30 + [square(10, 10, 20, NegativeROA="1")] * 30
    with pytest.raises(ExchangeError, match="layer 1 lie in so many others at once"):
        read_annotations(write(aperio(*items)))
