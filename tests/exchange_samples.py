"""Annotation files of every format, small and whole, for ``scripts/check/fuzz.py`` and its slice in the tests."""

from __future__ import annotations

import gzip
import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from darefine_qupath.errors import ExchangeError
from darefine_qupath.exchange import read_annotations
from darefine_qupath.geometry import GlassFrame, PixelSize, Size
from tests.fuzzing import damaged, json_mutant, xml_mutant

__all__ = ["SAMPLES", "packed_mutant", "try_exchange"]

_RING = [[0, 0], [100, 0], [100, 100], [40, 60], [0, 100], [0, 0]]
_BOWTIE = [[0, 0], [100, 100], [100, 0], [0, 100], [0, 0]]
_FRAME = GlassFrame((1000.0, -2000.0), Size(400, 300), PixelSize(0.5, 0.5))


def _feature(coordinates: object, kind: str = "Polygon", **properties: object) -> dict[str, object]:
    geometry = {"type": kind, "coordinates": coordinates, "plane": {"c": -1, "z": 0, "t": 0}}
    return {"type": "Feature", "geometry": geometry, "properties": {"objectType": "annotation", **properties}}


def _geojson() -> bytes:
    child = _feature([_RING], classification={"names": ["Tumor", "Positive"], "color": [1, 2, 3]}, color=[9, 9, 9])
    features = [
        _feature([_RING], classification={"name": "Tumor", "color": [200, 0, 0]}, childObjects=[child], isLocked=True),
        _feature([_BOWTIE], classification="{'name': 'Stroma', 'color': '[1, 2, 3]'}", name="b"),
        _feature(
            [[_RING], [_BOWTIE]], "MultiPolygon", measurements=[{"name": "a", "value": "NaN"}], metadata={"k": "v"}
        ),
        _feature([[1, 2], [3, 4]], "LineString", measurements={"a": 1.5}),
        _feature([[1, 2], [3, 4]], "MultiPoint", label="x"),
        {**_feature([_RING]), "id": "6423a977-ffff-48db-affc-cd11632010f0", "nucleusGeometry": {"type": "Point"}},
    ]
    return json.dumps({"type": "FeatureCollection", "features": features}).encode()


def _vertices(tag: str) -> str:
    return "<Vertices>" + "".join(f'<{tag} X="{x}" Y="{y}"/>' for x, y in _RING) + "</Vertices>"


def _aperio() -> bytes:
    kinds = "".join(f'<Region Id="{kind}" Type="{kind}" Text="t">{_vertices("Vertex")}</Region>' for kind in range(6))
    hole = f'<Region Type="0" NegativeROA="1" AreaMicrons="9">{_vertices("Vertex")}</Region>'
    layer = f'<Annotation Id="1" Name="Tumor" LineColor="255"><Regions>{kinds}{hole}</Regions></Annotation>'
    return f'<?xml version="1.0"?><Annotations MicronsPerPixel="0.5">{layer}{layer}</Annotations>'.encode()


def _halo() -> bytes:
    kinds = ("Polygon", "Rectangle", "Ellipse", "Ruler", "Pin")
    regions = "".join(
        f'<Region Type="{kind}" HasEndcaps="0" NegativeROA="{number % 2}">{_vertices("V")}</Region>'
        for number, kind in enumerate(kinds)
    )
    layer = f'<Annotation Name="Tumor" Visible="True" LineColor="65535"><Regions>{regions}</Regions></Annotation>'
    return f"<Annotations>{layer}</Annotations>".encode()


def _asap() -> bytes:
    corners = "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (x, y) in enumerate(_RING))
    items = "".join(
        f'<Annotation Name="a" Type="{kind}" PartOfGroup="Tumor" Color="#F4FA58"><Coordinates>{corners}</Coordinates>'
        f"</Annotation>"
        for kind in ("Polygon", "Spline", "Dot", "PointSet", "Measurement")
    )
    groups = '<AnnotationGroups><Group Name="Tumor" Color="#64FE2E"/></AnnotationGroups>'
    return f"<ASAP_Annotations><Annotations>{items}</Annotations>{groups}</ASAP_Annotations>".encode()


def _ndpa() -> bytes:
    points = "".join(f"<point><x>{x * 500}</x><y>{y * 500}</y></point>" for x, y in _RING)
    shapes = (
        f'<annotation type="freehand" color="#ff0000"><closed>1</closed><pointlist>{points}</pointlist></annotation>',
        '<annotation type="circle"><x>1</x><y>2</y><radius>30000</radius></annotation>',
        '<annotation type="pin"><x>1</x><y>2</y></annotation>',
        '<annotation type="linearmeasure"><x1>1</x1><y1>2</y1><x2>90000</x2><y2>4</y2></annotation>',
    )
    states = "".join(
        f'<ndpviewstate id="{i}"><title>Tumor</title><coordformat>nanometers</coordformat>{shape}</ndpviewstate>'
        for i, shape in enumerate(shapes)
    )
    return f'<?xml version="1.0" encoding="utf-8"?><annotations>{states}</annotations>'.encode()


def _coco() -> bytes:
    drawn: list[dict[str, object]] = [
        {"segmentation": [[0, 0, 100, 0, 100, 100]], "attributes": {"grade": 2}},
        {"segmentation": {"counts": [5, 3, 4], "size": [3, 4]}, "iscrowd": 1},
        {"segmentation": {"counts": "534", "size": [3, 4]}},
        {"bbox": [1, 2, 30, 40]},
    ]
    table = {
        "images": [{"id": 1, "file_name": "a.png", "width": 200, "height": 150}],
        "categories": [{"id": 3, "name": "Tumor", "supercategory": "tissue", "color": [1, 2, 3]}],
        "annotations": [{"id": number, "image_id": 1, "category_id": 3, **item} for number, item in enumerate(drawn)],
    }
    return json.dumps(table).encode()


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.geojson", _geojson())
        archive.writestr("b.xml", _aperio())
    return buffer.getvalue()


def _mask(form: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.zeros((30, 40), np.uint8)
    pixels[5:20, 5:20] = 1
    pixels[10:12, 8:10] = 2
    image = Image.fromarray(pixels, "P")
    image.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
    image.save(buffer, form)
    return buffer.getvalue()


SAMPLES: dict[str, bytes] = {
    "a.geojson": _geojson(),
    "aperio.xml": _aperio(),
    "halo.annotations": _halo(),
    "asap.xml": _asap(),
    "a.ndpa": _ndpa(),
    "coco.json": _coco(),
    "a.geojson.gz": gzip.compress(_geojson(), mtime=0),
    "a.zip": _zip(),
    "mask.png": _mask("PNG"),
    "mask.tif": _mask("TIFF"),
    "utf16.xml": _aperio().decode().encode("utf-16"),
}


def _structural(data: bytes, rng: random.Random) -> bytes:
    """Damage values of JSON or XML, so that it is still such; anything else anyhow."""
    if data.startswith(b"{"):
        return json_mutant(data, rng)
    return xml_mutant(data, rng) if data.startswith(b"<") else damaged(data, rng)


def packed_mutant(name: str, rng: random.Random, damage: Callable[[bytes, random.Random], bytes] = damaged) -> bytes:
    """Damage a sample, or half the time what is packed in it, where it is an archive."""
    data = SAMPLES[name]
    if rng.random() < 0.5:
        damage = _structural
    if rng.random() < 0.5 and name.endswith(".gz"):
        return gzip.compress(damage(gzip.decompress(data), rng))
    if rng.random() < 0.5 and name.endswith(".zip"):
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(buffer, "w") as copy:
            for member in archive.namelist():
                copy.writestr(member, damage(archive.read(member), rng))
        return buffer.getvalue()
    return damage(data, rng)


def try_exchange(name: str, data: bytes, folder: Path) -> str:
    """Read a damaged file; what came of it, if that is no fault of ours.

    Raises
    ------
    AssertionError
        If an error does not name the file in one line, or what was read cannot be used.
    """
    path = folder / name
    path.write_bytes(data)
    try:
        found = read_annotations(path, mpp=0.5, image_size=(400, 300), image_name="a.png", glass=lambda: _FRAME)
    except ExchangeError as error:
        return _refusal(str(error), path)
    assert len(found.items) == len(found.annotations), "items are not those of the annotations"
    for record in found.annotations:
        assert record.geometry is not None
        assert record.geometry.is_valid, "a shape that is not valid"
        assert not record.geometry.is_empty, "a shape that is empty"
        (record.path_class or "").encode()
    return "read, some refused" if found.refused else "read"


def _refusal(said: str, path: Path) -> str:
    assert said.startswith(str(path)), f"an error that does not name the file: {said}"
    assert "\n" not in said, f"an error of several lines: {said}"
    return "refused"
