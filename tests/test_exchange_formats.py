"""HALO, NDPA and COCO; archives and encodings; where the class stands; what other files are called."""

from __future__ import annotations

import gzip
import itertools
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry import LineString, Point, Polygon, box

from darefine_qupath.classes import Color
from darefine_qupath.errors import ExchangeError
from darefine_qupath.exchange import read_annotations, run_lengths
from darefine_qupath.exchange.shapes import ellipse
from darefine_qupath.geometry import GlassFrame, PixelSize, Size
from darefine_qupath.pipeline.annotation_import import ImportOptions, import_files
from darefine_qupath.pipeline.create import create_from_slides
from darefine_qupath.project import create_project
from darefine_qupath.slides import read_glass_frame
from tests.ndpi_slides import write_ndpi
from tests.test_exchange import SQUARE, aperio, asap, asap_item, qupath_feature, region, write
from tests.tile_slides import ramps, write_pyramid

__all__ = ["write"]

Write = Callable[..., Path]
Points = list[tuple[float, float]]

# HALO


def halo_region(points: Points, kind: str = "Polygon", *, negative: int = 0, comment: str = "") -> str:
    corners = "".join(f'<V X="{x}" Y="{y}" />' for x, y in points)
    said = f'<Comments><Comment Author="a" Body="{comment}" /></Comments>' if comment else "<Comments />"
    return (
        f'<Region Type="{kind}" HasEndcaps="0" NegativeROA="{negative}"><Vertices>{corners}</Vertices>{said}</Region>'
    )


def halo(*regions: str, name: str = "Tumor", color: int = 65535) -> str:
    return (
        f'<Annotations><Annotation Name="{name}" Visible="True" LineColor="{color}"><Regions>{"".join(regions)}'
        f"</Regions></Annotation></Annotations>"
    )


@pytest.mark.parametrize(
    ("kind", "points", "geometry", "roi"),
    [
        ("Polygon", SQUARE, Polygon(SQUARE), None),
        ("Rectangle", [(0, 0), (100, 50)], box(0, 0, 100, 50), "Rectangle"),
        ("Rectangle", [(100, 50), (0, 0)], box(0, 0, 100, 50), "Rectangle"),
        ("Ellipse", [(0, 0), (100, 50)], ellipse(0, 0, 100, 50), "Ellipse"),
        ("Ruler", [(0, 0), (100, 50)], LineString([(0, 0), (100, 50)]), "Line"),
        ("Pin", [(3, 4)], Point(3, 4), "Points"),
    ],
)
def test_halo_types(write: Write, kind: str, points: Points, geometry: object, roi: str | None) -> None:
    imported = read_annotations(write(halo(halo_region(points, kind)), "a.annotations"))
    (annotation,) = imported.annotations
    assert shapely.hausdorff_distance(annotation.geometry, geometry) < 0.01
    assert (annotation.roi, annotation.path_class, imported.format) == (roi, "Tumor", "HALO XML")
    assert imported.colors == {"Tumor": Color(255, 255, 0)}


def test_halo_negative_region_is_a_hole_and_a_bad_one_is_named(write: Write) -> None:
    hole = [(40, 40), (60, 40), (60, 60), (40, 60)]
    regions = [halo_region(SQUARE), halo_region(hole, negative=1), halo_region(SQUARE, "Blob"), halo_region([])]
    imported = read_annotations(write(halo(*regions)))
    assert [annotation.area for annotation in imported.annotations] == [9600]
    assert [str(note) for note in imported.refused] == [
        "region 3 of layer 1 (Tumor): is of the unknown type 'Blob'",
        "region 4 of layer 1 (Tumor): has no vertices",
    ]


def test_halo_class_from_its_comments(write: Write) -> None:
    path = write(halo(halo_region(SQUARE, comment="In situ")))
    assert [record.path_class for record in read_annotations(path, class_from=["comment"]).annotations] == ["In situ"]
    assert [(a.path_class, a.name) for a in read_annotations(path).annotations] == [("Tumor", "In situ")]


# Hamamatsu NDPA

FRAME = GlassFrame((1_000_000, -2_000_000), Size(400, 300), PixelSize(0.5, 0.25))


def ndpa(*states: str) -> str:
    return f'<?xml version="1.0" encoding="utf-8" standalone="yes"?><annotations>{"".join(states)}</annotations>'


def state(shape: str, *, title: str = "Tumor", unit: str = "nanometers") -> str:
    return (
        f'<ndpviewstate id="1"><title>{title}</title><details>d</details><coordformat>{unit}</coordformat>'
        f"<lens>20</lens><x>0</x><y>0</y><z>0</z>{shape}</ndpviewstate>"
    )


def nm(x: float, y: float) -> tuple[int, int]:
    """A pixel of `FRAME` in nanometres about the center of the glass."""
    return round((x - 200) * 500) + 1_000_000, round((y - 150) * 250) - 2_000_000


def freehand(points: Points, *, closed: str = "<closed>1</closed>", name: str = "AnnotateFreehand") -> str:
    rows = "".join("<point><x>{}</x><y>{}</y></point>".format(*nm(x, y)) for x, y in points)
    return (
        f'<annotation type="freehand" displayname="{name}" color="#ff8000"><measuretype>0</measuretype>{closed}'
        f"<pointlist>{rows}</pointlist></annotation>"
    )


CENTER, END = nm(50, 60), nm(150, 60)

NDPA_SHAPES = {
    "closed": (freehand(SQUARE), Polygon(SQUARE), None),
    "open": (freehand(SQUARE, closed="<closed>0</closed>"), LineString(SQUARE), "Polyline"),
    "open by its name": (freehand(SQUARE, closed="", name="AnnotateFreehandLine"), LineString(SQUARE), "Polyline"),
    "circle": (
        f'<annotation type="circle"><x>{CENTER[0]}</x><y>{CENTER[1]}</y><radius>10000</radius></annotation>',
        ellipse(30, 20, 70, 100),
        "Ellipse",
    ),
    "pin": (f'<annotation type="pin"><x>{CENTER[0]}</x><y>{CENTER[1]}</y></annotation>', Point(50, 60), "Points"),
    "ruler": (
        f'<annotation type="linearmeasure"><x1>{CENTER[0]}</x1><y1>{CENTER[1]}</y1><x2>{END[0]}</x2><y2>{END[1]}</y2>'
        f"</annotation>",
        LineString([(50, 60), (150, 60)]),
        "Line",
    ),
}


@pytest.mark.parametrize("kind", NDPA_SHAPES)
def test_ndpa_types(write: Write, kind: str) -> None:
    shape, geometry, roi = NDPA_SHAPES[kind]
    imported = read_annotations(write(ndpa(state(shape)), "a.ndpi.ndpa"), glass=lambda: FRAME)
    (annotation,) = imported.annotations
    assert shapely.hausdorff_distance(annotation.geometry, geometry) < 0.02
    assert (annotation.roi, annotation.path_class, imported.format) == (roi, "Tumor", "NDPA")


@given(
    point=st.tuples(st.floats(0, 1e5), st.floats(0, 1e5)),
    center=st.tuples(st.integers(-(10**8), 10**8), st.integers(-(10**8), 10**8)),
    mpp=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
)
@settings(deadline=None, derandomize=True)
def test_a_glass_frame_gives_back_the_pixel(
    point: tuple[float, float], center: tuple[int, int], mpp: tuple[float, float]
) -> None:
    frame = GlassFrame(center, Size(90_000, 70_001), PixelSize(*mpp))
    from_center = [(value - size / 2) * scale * 1000 for value, size, scale in zip(point, frame.size, mpp, strict=True)]
    place = frame.place(from_center[0] + center[0], from_center[1] + center[1])
    assert place == pytest.approx(point, abs=1e-3)


def test_ndpa_of_an_image_that_does_not_say_where_it_lies(write: Write) -> None:
    path = write(ndpa(state(freehand(SQUARE))), "a.ndpa")
    for glass in (None, lambda: None):
        with pytest.raises(ExchangeError, match=r"hamamatsu\.XOffsetFromSlideCentre.* original \.ndpi slide"):
            read_annotations(path, glass=glass)


def test_ndpa_refuses_by_name(write: Write) -> None:
    states = [
        state(freehand([])),
        state(freehand(SQUARE), unit="pixels"),
        state("<annotation type='blob'/>"),
        state(""),
    ]
    imported = read_annotations(write(ndpa(*states, state(freehand(SQUARE)))), glass=lambda: FRAME)
    assert len(imported.annotations) == 1
    assert [note.reason for note in imported.refused] == [
        "has no points",
        "counts in 'pixels', and not in nanometers",
        "is of the unknown type 'blob'",
        "is a view without a shape",
    ]


def test_the_scanner_says_where_an_image_lies(tmp_path: Path) -> None:
    path = write_ndpi(tmp_path / "a.ndpi", (400, 300), center_nm=(1_000_000, -2_000_000))
    assert read_glass_frame(path) == GlassFrame((1_000_000, -2_000_000), Size(400, 300), PixelSize(0.5, 0.5))
    assert read_glass_frame(tmp_path / "none.ndpi") is None


def test_ndpa_into_a_project_of_its_slide(tmp_path: Path) -> None:
    slide = write_ndpi(tmp_path / "a.ndpi", (400, 300), center_nm=(1_000_000, -2_000_000))
    # From the center of the image 50 um to the right, and from there 50 um down: 100 px each.
    corners = [(1_000_000, -2_000_000), (1_050_000, -2_000_000), (1_050_000, -1_950_000)]
    points = "".join(f"<point><x>{x}</x><y>{y}</y></point>" for x, y in corners)
    shape = f'<annotation type="freehand"><closed>1</closed><pointlist>{points}</pointlist></annotation>'
    (tmp_path / "a.ndpi.ndpa").write_text(ndpa(state(shape)))
    project, _ = create_from_slides(tmp_path / "p", [slide], annotations=tmp_path, engine="embedded")
    with project:
        (annotation,) = project.annotations(project.images[0])
    assert annotation.geometry.equals(Polygon([(200, 150), (300, 150), (300, 250)]))
    assert annotation.path_class == "Tumor"


def test_ndpa_beside_a_slide_of_another_scanner_makes_no_project(tmp_path: Path) -> None:
    slide = write_pyramid(tmp_path / "a.tif", ramps(200, 200))
    (tmp_path / "a.ndpa").write_text(ndpa(state(freehand(SQUARE))))
    with pytest.raises(ExchangeError, match=r"a\.ndpa: NDPA counts in nanometers .*XOffsetFromSlideCentre"):
        create_from_slides(tmp_path / "p", [slide], annotations=tmp_path, engine="embedded")
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(("fields", "name"), [((), "Tumor"), (("text",), "ask")])
def test_class_from_goes_through_import(tmp_path: Path, fields: tuple[str, ...], name: str) -> None:
    slide = write_pyramid(tmp_path / "a.tif", ramps(200, 200))
    (tmp_path / "a.xml").write_text(aperio(region(SQUARE, Text="ask"), name="Tumor"))
    with create_project(tmp_path / "p", engine="embedded") as project:
        image = project.add_image(slide)
        (done,) = import_files(project, [(tmp_path / "a.xml", image)], ImportOptions(class_from=fields))
        assert [record.path_class for record in project.annotations(image)] == [name]
    assert done.file.class_notes[0] == f"class from {fields[0] if fields else 'layer'} (1), of 1 objects"


# COCO


def coco_file(*annotations: dict[str, object], images: object = None, **others: object) -> str:
    categories = [{"id": 3, "name": "Tumor", "supercategory": "Tissue", "color": [200, 0, 0]}]
    entries = [{"id": number, "image_id": 1, "category_id": 3, **item} for number, item in enumerate(annotations)]
    images = [{"id": 1, "file_name": "a.png", "width": 200, "height": 100}] if images is None else images
    return json.dumps({"images": images, "categories": categories, "annotations": entries} | others)


def runs(mask: np.ndarray) -> list[int]:
    flat = np.concatenate([[0], mask.T.ravel(), [2]])
    edges = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], edges])).tolist()


MASK = np.zeros((40, 60), np.uint8)
MASK[5:25, 10:30] = 1
MASK[10:15, 12:20] = 0
MASK[30:33, 40:59] = 1
# What pycocotools makes of MASK.
TEXT = "e<d0d000AA5?KA5?KA5?KA5?KA5?KA5?KA5?KA5?:000000000000000000Y=_OXC00000000000000000000000000000000000:"
PARTS = shapely.union_all([box(10, 5, 30, 25) - box(12, 10, 20, 15), box(40, 30, 59, 33)])


@pytest.mark.parametrize(
    ("drawn", "geometry"),
    [
        ({"segmentation": [[0, 0, 100, 0, 100, 100, 0, 100]]}, Polygon(SQUARE)),
        ({"segmentation": [[0, 0, 9, 0, 9, 9], [20, 0, 30, 0, 30, 9]]}, None),
        ({"segmentation": {"counts": runs(MASK), "size": [40, 60]}}, PARTS),
        ({"segmentation": {"counts": TEXT, "size": [40, 60]}}, PARTS),
        ({"bbox": [10, 20, 30, 40]}, box(10, 20, 40, 60)),
        ({"segmentation": [], "bbox": [10, 20, 30, 40]}, box(10, 20, 40, 60)),
    ],
    ids=["polygon", "two parts", "runs", "runs as text", "box", "box without outline"],
)
def test_coco_forms(write: Write, drawn: dict[str, object], geometry: shapely.Geometry | None) -> None:
    size = (60, 40) if isinstance(drawn.get("segmentation"), dict) else (200, 100)
    images = [{"id": 1, "file_name": "a.png", "width": size[0], "height": size[1]}]
    imported = read_annotations(write(coco_file(drawn, images=images), "a.json"), image_size=size)
    (annotation,) = imported.annotations
    assert annotation.geometry.equals(geometry) if geometry else annotation.area == 40.5 + 45
    assert (annotation.path_class, imported.format) == ("Tumor", "COCO JSON")
    assert imported.colors == {"Tumor": Color(200, 0, 0)}


@given(mask=st.integers(1, 7).flatmap(lambda w: st.lists(st.lists(st.booleans(), min_size=w, max_size=w), min_size=1)))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_coco_run_lengths_mark_the_pixels_of_the_mask(
    tmp_path_factory: pytest.TempPathFactory, mask: list[list[bool]]
) -> None:
    pixels = np.array(mask, np.uint8)
    counts = {"counts": runs(pixels), "size": list(pixels.shape)}
    path = tmp_path_factory.mktemp("coco") / "a.json"
    path.write_text(coco_file({"segmentation": counts}, images=[]))
    area = sum(annotation.area for annotation in read_annotations(path).annotations) if pixels.any() else 0
    assert area == pixels.sum()


def test_coco_takes_the_image_of_its_name(write: Write) -> None:
    images = [{"id": 1, "file_name": "x/A.PNG"}, {"id": 2, "file_name": "b.png"}]
    path = write(coco_file({"bbox": [0, 0, 9, 9]}, {"bbox": [0, 0, 5, 5], "image_id": 2}, images=images), "all.json")
    found = read_annotations(path, image_name="a.svs")
    assert ([record.area for record in found.annotations], len(found.warnings)) == ([81], 1)
    with pytest.raises(ExchangeError, match=r"COCO of 2 images \('x/A.PNG', 'b.png'\), of which 0 .*'c.svs'"):
        read_annotations(path, image_name="c.svs")


def test_coco_of_a_smaller_picture_is_enlarged_and_of_another_shape_refused(write: Write) -> None:
    path = write(coco_file({"bbox": [10, 10, 20, 20]}), "a.json")
    imported = read_annotations(path, image_size=(800, 400))
    assert imported.annotations[0].geometry.bounds == (40, 40, 120, 120)
    assert "enlarged 4 times" in imported.warnings[0]
    with pytest.raises(ExchangeError, match="an image of 200 x 100 pixels, this one has 800 x 800"):
        read_annotations(path, image_size=(800, 800))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"segmentation": {"counts": [5], "size": [2, 2]}}, "do not cover its 2 x 2 pixels"),
        ({"segmentation": {"counts": [4], "size": [2, 2]}}, "mark no pixel"),
        ({"segmentation": {"counts": [-4, 8], "size": [2, 2]}}, "do not cover"),
        ({"segmentation": {"counts": "\x7f", "size": [2, 2]}}, "text is damaged"),
        ({"segmentation": {"counts": "o", "size": [2, 2]}}, "cut short"),
        ({"segmentation": {"counts": [0, 10**10], "size": [10**5, 10**5]}}, "more than the 100,000,000 pixels"),
        ({"segmentation": {"counts": [0, 4]}}, "without the size"),
        ({"segmentation": [[0, 0, 1]]}, "polygon of 3 numbers"),
        ({"segmentation": [["a"] * 6]}, "could not convert"),
        ({"bbox": [0, 0, float("nan"), 1]}, "not a number"),
        ({"keypoints": [1, 2, 3]}, "neither a segmentation nor a box"),
    ],
)
def test_coco_bad_annotation_is_refused_with_its_index(write: Write, bad: dict[str, object], reason: str) -> None:
    imported = read_annotations(write(coco_file({"bbox": [0, 0, 9, 9]}, bad, images=[]), "a.json"))
    assert [note.item for note in imported.refused] == ["annotation 1"]
    assert reason in imported.refused[0].reason
    assert len(imported.annotations) == 1


@pytest.mark.parametrize("kinds", list(itertools.product((int, str, float), repeat=2)), ids=str)
def test_coco_ids_are_the_same_number_in_any_form(write: Write, kinds: tuple[type, type]) -> None:
    here, there = kinds
    table = {
        "images": [{"id": here(number), "file_name": f"{number}.png"} for number in (1, 2)],
        "categories": [{"id": here(1), "name": "Tumor"}, {"id": here(2), "name": "Stroma"}],
        "annotations": [
            {"image_id": there(image), "category_id": there(category), "bbox": [0, 0, category, image]}
            for image in (1, 2)
            for category in (1, 2)
        ],
    }
    found = read_annotations(write(json.dumps(table), "a.json"), image_name="2.svs").annotations
    assert [(record.path_class, record.area) for record in found] == [("Tumor", 2), ("Stroma", 4)]


def test_coco_keys_that_are_no_ids_match_nothing(write: Write) -> None:
    path = write(
        coco_file({"bbox": [0, 0, 9, 9], "category_id": [3]}, categories=[{"id": None, "name": "X"}]), "a.json"
    )
    assert [record.path_class for record in read_annotations(path).annotations] == [None]


@pytest.mark.parametrize("wrap", [lambda entries: entries, lambda entries: {"annotations": entries, "categories": []}])
def test_coco_of_several_images_without_their_table_is_refused(write: Write, wrap: Callable[..., object]) -> None:
    entries = [{"image_id": number, "category_id": 1, "bbox": [0, 0, 9, 9]} for number in (1, 2)]
    with pytest.raises(ExchangeError, match=r"annotations of 2 images \(image_id 1, 2\) without a list of images"):
        read_annotations(write(json.dumps(wrap(entries)), "a.json"))
    assert len(read_annotations(write(json.dumps(wrap(entries[:1])), "a.json")).annotations) == 1


def test_coco_whose_annotations_are_all_of_other_images_is_refused(write: Write) -> None:
    with pytest.raises(ExchangeError, match="the image_id of none of its 1 annotations is the id of its only image"):
        read_annotations(write(coco_file({"bbox": [0, 0, 9, 9], "image_id": 7}), "a.json"))


@pytest.mark.parametrize("images", [None, []], ids=["by its entry", "by the project"])
def test_coco_masks_of_another_size_than_the_image_are_refused(write: Write, images: object) -> None:
    mask = {"segmentation": {"counts": [40, 20, 140], "size": [20, 10]}}
    turned = {"segmentation": {"counts": [0, 20000], "size": [200, 100]}}
    path = write(coco_file(mask, turned, {"bbox": [0, 0, 9, 9]}, images=images), "a.json")
    refused = read_annotations(path, image_size=(200, 100)).refused
    assert [note.reason for note in refused] == [
        f"has a mask of {size} pixels, its image has 200 x 100" for size in ("10 x 20", "100 x 200")
    ]


def test_coco_of_an_image_of_another_name_is_said(write: Write) -> None:
    path = write(coco_file({"bbox": [0, 0, 9, 9]}), "a.json")
    assert "its image is 'a.png', taken for 'b.svs'" in read_annotations(path, image_name="b.svs").warnings[0]
    assert not read_annotations(path, image_name="A.svs").warnings


@pytest.mark.parametrize(("table", "name"), [("categories", "name"), ("images", "file_name")])
def test_coco_ids_that_mean_two_things_are_refused(write: Write, table: str, name: str) -> None:
    entries = [{"id": 1, name: "x"}, {"id": "1", name: "y"}]
    with pytest.raises(ExchangeError, match=f"two {table} have the id 1: 'x' and 'y'"):
        read_annotations(write(coco_file({"bbox": [0, 0, 9, 9]}, **{table: entries}), "a.json"))


@pytest.mark.parametrize("value", ["1", "true", " True "])
def test_negative_regions_are_so_in_any_spelling(write: Write, value: str) -> None:
    text = aperio(region(SQUARE), region([(10, 10), (20, 10), (20, 20)], NegativeROA=value))
    (record,) = read_annotations(write(text)).annotations
    assert record.area == 10_000 - 50


JUNK = [{"names": ["Tumor", None]}, {"name": {"a": 1}}, {"name": ["x"]}, {"names": [["x"]]}, {"names": [True]}]


@pytest.mark.parametrize("value", JUNK, ids=str)
def test_class_names_that_are_none_are_refused(write: Write, value: object) -> None:
    found = read_annotations(write(json.dumps(qupath_feature(classification=value)), "a.geojson"))
    assert (len(found.annotations), len(found.refused)) == (0, 1)
    assert "has a class name that is" in found.refused[0].reason


@pytest.mark.parametrize(("value", "name"), [({"names": [None]}, None), (2.0, "2"), (2, "2"), (2.5, "2.5")], ids=str)
def test_class_of_null_or_number(write: Write, value: object, name: str | None) -> None:
    found = read_annotations(write(json.dumps(qupath_feature(classification=value)), "a.geojson"))
    assert [record.path_class for record in found.annotations] == [name]


def test_coco_box_without_area_is_refused_in_words(write: Write) -> None:
    found = read_annotations(write(coco_file({"bbox": [5, 5, 0, 0]}, {"bbox": [0, 0, 9, 9]}), "a.json"))
    assert [note.reason for note in found.refused] == ["encloses no area"]


def test_coco_results_and_other_fields(write: Write) -> None:
    results = write(json.dumps([{"image_id": 1, "category_id": 7, "bbox": [0, 0, 9, 9], "score": 0.5}]), "r.json")
    assert (
        read_annotations(results).class_notes[0].startswith('1 of 1 without class; the file has category_id (e.g. "7")')
    )
    path = write(coco_file({"bbox": [0, 0, 9, 9], "attributes": {"grade": "G2"}}), "a.json")
    for field, name in (("supercategory", "Tissue"), ("grade", "G2"), ("category", "Tumor")):
        assert [record.path_class for record in read_annotations(path, class_from=[field]).annotations] == [name]


def test_run_lengths_as_text_are_what_pycocotools_writes() -> None:
    assert run_lengths.uncompressed(TEXT).tolist() == runs(MASK)


# Archives and encodings


def test_zip_with_a_readme_is_read_and_says_so(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "drawn in spring")
        archive.writestr("a.geojson", FEATURE)
    found = read_annotations(tmp_path / "a.zip")
    assert len(found.annotations) == 1
    assert "left out, readme.txt: it is text that is neither XML nor JSON" in found.warnings[0]


FEATURE = json.dumps(qupath_feature(classification={"name": "Tumör"}), ensure_ascii=False)


@pytest.mark.parametrize(
    "data",
    [
        gzip.compress(FEATURE.encode()),
        FEATURE.encode("utf-16"),
        FEATURE.encode("utf-16-le"),
        FEATURE.encode("utf-32"),
        FEATURE.encode("utf-8-sig"),
        gzip.compress(FEATURE.encode("utf-16")),
    ],
    ids=["gzip", "utf-16", "utf-16 without mark", "utf-32", "utf-8 with mark", "utf-16 in gzip"],
)
def test_geojson_packed_and_encoded(write: Write, data: bytes) -> None:
    assert [record.path_class for record in read_annotations(write(data, "a.geojson.gz")).annotations] == ["Tumör"]


@pytest.mark.parametrize(
    ("declared", "codec"),
    [
        ("utf-8", "utf-8"),
        ("ISO-8859-1", "latin-1"),
        ("windows-1252", "cp1252"),
        ("utf-16", "utf-16"),
        ("utf-16", "utf-8"),
        ("gb18030", "gb18030"),
        ("", "utf-8-sig"),
    ],
)
def test_xml_in_the_encoding_it_declares(write: Write, declared: str, codec: str) -> None:
    head = f'<?xml version="1.0" encoding="{declared}"?>' if declared else ""
    path = write((head + aperio(region(SQUARE, Text="Tumör"))).encode(codec))
    assert [record.path_class for record in read_annotations(path).annotations] == ["Tumör"]


def test_text_that_is_not_what_it_says_is_refused(write: Write) -> None:
    with pytest.raises(ExchangeError, match=r"not utf-8 text, by its byte .*; save it as UTF-8"):
        read_annotations(write(FEATURE.encode("latin-1"), "a.geojson"))


def zipped(tmp_path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/"), data)
    return tmp_path / "a.zip"


def test_zip_of_several_files(tmp_path: Path) -> None:
    identity = {"id": "6423a977-ffff-48db-affc-cd11632010f0"}
    one = json.dumps([qupath_feature() | identity, 17]).encode()
    path = zipped(tmp_path, MACOSX__x=b"", first=one, second=one, third=aperio(region(SQUARE)).encode())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/._first", b"\0\1")
    (tmp_path / "b.zip").write_bytes(path.read_bytes())
    with pytest.raises(ExchangeError, match=r"MACOSX/x: it is empty"):
        read_annotations(path)
    imported = read_annotations(zipped(tmp_path, first=one, second=one, third=aperio(region(SQUARE)).encode()))
    assert (len(imported.annotations), len({record.id for record in imported.annotations})) == (3, 3)
    assert [note.item for note in imported.refused] == ["first, feature 1", "second, feature 1"]
    assert imported.format == "Aperio XML and GeoJSON"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(bytes(20 << 20)), "unpacks to more than 60 times its size"),
        (gzip.compress(FEATURE.encode())[:-20], "damaged where it is packed"),
        (gzip.compress(gzip.compress(b"{}")), "archive in an archive"),
        (b"PK\x03\x04 and no more", "zip that cannot be read"),
    ],
    ids=["bomb", "cut short", "nested", "damaged zip"],
)
def test_archives_that_cannot_be_read(write: Write, data: bytes, message: str) -> None:
    with pytest.raises(ExchangeError, match=message):
        read_annotations(write(data, "a.gz"))


def test_archives_of_other_things(tmp_path: Path) -> None:
    sheet = zipped(tmp_path, **{"[Content_Types].xml": b"", "xl__workbook.xml": b""})
    with pytest.raises(ExchangeError, match="document or table of Office"):
        read_annotations(sheet)
    with pytest.raises(ExchangeError, match="label mask in an archive; unpack it"):
        read_annotations(zipped(tmp_path, mask=b"\x89PNG\r\n\x1a\n"))
    with pytest.raises(ExchangeError, match="zip of 0 files"):
        read_annotations(zipped(tmp_path))


# Where the class stands


def classes_of(path: Path, *fields: str) -> list[str | None]:
    return [record.path_class for record in read_annotations(path, class_from=fields).annotations]


def test_a_remark_in_the_text_is_no_class_where_the_layer_has_a_name(write: Write) -> None:
    path = write(aperio(region(SQUARE, Text="1"), region(SQUARE, Text="ask A. B."), region(SQUARE), name="Tumor"))
    assert classes_of(path) == ["Tumor"] * 3
    assert read_annotations(path).class_notes == (
        "class from layer (3), of 3 objects",
        'other words stand in text (e.g. "1"); --class-from FIELD takes them as the class',
    )
    assert classes_of(path, "text") == ["1", "ask A. B.", None]
    assert read_annotations(path, class_from=["text"]).class_notes == (
        "class from text (2), of 3 objects",
        '1 of 3 without class; the file has layer (e.g. "Tumor"): --class-from FIELD says which is the class',
    )
    assert classes_of(path, "text", "layer") == ["1", "ask A. B.", "Tumor"]


@pytest.mark.parametrize("name", ["Layer 1", "layer", "Annotation 12", ""])
def test_a_layer_that_nobody_named_is_the_class_only_where_nothing_else_is(write: Write, name: str) -> None:
    path = write(aperio(region(SQUARE, Text="Benign"), region(SQUARE), name=name))
    assert classes_of(path) == ["Benign", name or None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            aperio(region(SQUARE)),
            "'grade' is no field for a class here; choose among attribute, layer, text, description",
        ),
        (asap(asap_item(SQUARE)), "'grade' is no field .* choose among group, name"),
        (halo(halo_region(SQUARE)), "'grade' is no field .* choose among layer, comment"),
        (json.dumps(qupath_feature(stage="T1")), r'no object has a class in grade; .* are stage \(e.g. "T1"\)'),
    ],
    ids=["Aperio", "ASAP", "HALO", "GeoJSON"],
)
def test_a_field_that_is_not_there_is_refused_with_those_that_are(write: Write, text: str, message: str) -> None:
    with pytest.raises(ExchangeError, match=message):
        read_annotations(write(text), class_from=["grade"])


def test_fields_of_objects_without_class_are_named(write: Write) -> None:
    fields = [{"class": "Tumor"}, {"label": "Stroma"}, {"name": "Tumor"}, {"Classification": "Tumor"}, {"grade": 2}]
    path = write(json.dumps([qupath_feature(**properties) for properties in fields]), "a.geojson")
    (line,) = read_annotations(path).class_notes
    assert line.startswith("5 of 5 without class; the file has class")
    assert all(f"{name} (e.g. " in line for properties in fields for name in properties)
    assert classes_of(path, "class", "LABEL", "grade") == ["Tumor", "Stroma", None, None, "2"]


def test_asap_class_from_its_name(write: Write) -> None:
    path = write(asap(asap_item(SQUARE)))
    assert classes_of(path, "name") == ["A"]
    assert read_annotations(path).class_notes[0].startswith("1 of 1 without class; the file has name")


@pytest.mark.parametrize(
    ("value", "name", "color"),
    [
        ('{ "name": "Tumor", "color": [ 200, 0, 0 ] }', "Tumor", Color(200, 0, 0)),
        ("{'name': 'Tumor', 'color': [200, 0, 0]}", "Tumor", Color(200, 0, 0)),
        ("{'name': 'Tumor', 'colorRGB': -3670016}", "Tumor", Color(200, 0, 0)),
        ('{"names": ["Tumor", "Positive"], "color": "[200, 0, 0]"}', "Tumor: Positive", Color(200, 0, 0)),
        ('["Tumor", "Positive"]', "Tumor: Positive", None),
        ('"Tumor"', "Tumor", None),
        ({"name": "Tumor", "color": "#c80000"}, "Tumor", Color(200, 0, 0)),
        ({"name": "Tumor", "color": "-3670016"}, "Tumor", Color(200, 0, 0)),
        ({"name": "Tumor", "color": "rgb(200, 0, 0)"}, "Tumor", Color(200, 0, 0)),
        ({"name": "Tumor", "color": "[200 0 0]"}, "Tumor", Color(200, 0, 0)),
        ("null", None, None),
        ("nan", None, None),
        (float("nan"), None, None),
    ],
)
def test_values_that_went_through_a_table(write: Write, value: object, name: str | None, color: Color | None) -> None:
    imported = read_annotations(write(json.dumps(qupath_feature(classification=value)), "a.geojson"))
    assert [record.path_class for record in imported.annotations] == [name]
    assert imported.colors == ({name: color} if color else {})


def test_a_mask_has_no_fields(tmp_path: Path) -> None:
    (tmp_path / "m.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ExchangeError, match=r"label mask, which has no fields; .*--label"):
        read_annotations(tmp_path / "m.png", class_from=["class"])


# What other files are called

OTHERS = {
    "a.ndpi": (b"II*\0", r"slide \(ndpi\).* NDP.view keeps its shapes in a\.ndpi\.ndpa"),
    "a.svs": (b"II*\0", r"slide \(svs\)"),
    "data.qpdata": (b"\xac\xed\x00\x05t", "data.qpdata of a QuPath project"),
    "a.csv": (b"x,y\n1,2\n", r"table \(CSV\), beginning with 'x,y'"),
    "a.tsv": (b"x\ty\n1\t2\n", r"table \(CSV\)"),
    "a.txt": (b"hello there", "text that is neither XML nor JSON"),
    "a.geojson": (b"  \n", "it is empty"),
    "a.jpg": (b"\xff\xd8\xff\xe0", "JPEG picture"),
    "a.h5": (b"\x89HDF\r\n", "HDF5"),
    "a.npy": (b"\x93NUMPY", "array of NumPy"),
    "a.db": (b"SQLite format 3\0", "SQLite"),
    "a.pdf": (b"%PDF-1.4", "PDF"),
    "a.pkl": (b"\x80\x04\x95", "pickle"),
    "voc.xml": (b"<annotation><object/></annotation>", "PASCAL VOC"),
    "cvat.xml": (b"<annotations><image/></annotations>", "CVAT"),
    "sedeen.xml": (b"<session/>", "Sedeen"),
    "page.xml": (b"<!DOCTYPE html><html><body/></html>", "web page|entities"),
    "other.xml": (b'<a:root xmlns:a="x"/>', "unknown kind, its root is <root>"),
    "labelme.json": (b'{"shapes": [], "imagePath": ""}', "LabelMe"),
    "via.json": (b'{"_via_img_metadata": {}}', "VGG Image Annotator"),
    "project.qpproj": (b'{"createTimestamp": 1, "images": []}', "QuPath project"),
    "classes.json": (b'{"pathClasses": []}', "classes of a QuPath project"),
    "studio.json": (b'[{"annotations": [], "data": {}}]', "Label Studio"),
    "topo.json": (b'{"type": "Topology", "arcs": [], "objects": {}}', "TopoJSON"),
    "other.json": (b'{"spam": 1, "eggs": 2}', "its keys are 'spam', 'eggs'"),
    "list.json": (b"[1, 2]", "list of other things"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_file_is_called_by_its_name(write: Write, name: str) -> None:
    data, message = OTHERS[name]
    path = write(data, name)
    with pytest.raises(ExchangeError, match=message) as error:
        read_annotations(path)
    assert str(error.value).startswith(f"{path}: it ")
