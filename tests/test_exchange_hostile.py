"""Annotation files that mean harm, or only look so: one line for each, and the sound objects beside are read."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from darefine_qupath.errors import ExchangeError
from darefine_qupath.exchange import collector, read_annotations, shapes
from darefine_qupath.exchange.documents import Document
from tests.exchange_samples import SAMPLES, try_exchange
from tests.fuzzing import damaged
from tests.test_exchange import SQUARE, aperio, qupath_feature, region, write

__all__ = ["write"]

Write = Callable[..., Path]


def ring(corners: object) -> str:
    return f'{{"type":"Feature","geometry":{{"type":"Polygon","coordinates":{corners}}},"properties":{{}}}}'


def with_geometry(**members: object) -> str:
    feature = qupath_feature()
    return json.dumps(feature | {"geometry": {**feature["geometry"], **members}})  # type: ignore[dict-item]


def deep(depth: int, inside: str = "1") -> str:
    return "[" * depth + inside + "]" * depth


HOSTILE = {
    "5,000 digits": (ring(f"[[[0,0],[{'1' * 5000},0],[1,1]]]"), "not a number"),
    "300 digits": (ring(f"[[[0,0],[{'1' * 300},0],[1,1]]]"), "where no image reaches"),
    "nested coordinates": (ring(deep(900)), "damaged"),
    "nested collections": (
        '{"type":"GeometryCollection","geometries":[' * 300 + "]}" * 300,
        "collections in collections",
    ),
    "overlapping collection": (
        json.dumps(
            {
                "type": "GeometryCollection",
                "geometries": [
                    {"type": "Polygon", "coordinates": [[[0, 0], [x, 0], [x, 9], [0, 0]]]} for x in range(1, 600)
                ],
            }
        ),
        "crosses itself more than 50,000 times",
    ),
    "1e308": (ring("[[[0,0],[1e308,0],[-1e308,1e308]]]"), "where no image reaches"),
    "NaN": (ring("[[[0,0],[NaN,0],[1,1]]]"), "not a number"),
    "Infinity": (ring("[[[0,0],[-Infinity,0],[1,1]]]"), "not a number"),
    "large plane": (with_geometry(plane={"c": -1, "z": 2**31, "t": 0}), "plane whose z is 2147483648"),
    "plane of 40 digits": (with_geometry(plane={"z": 10**40}), "plane whose z is 1000"),
    "plane as text": (with_geometry(plane={"z": "deep"}), "plane whose z is .*deep"),
    "no plane": (with_geometry(plane=[1]), "has a plane that is a list"),
    "surrogate in a name": (json.dumps(qupath_feature(name="\ud800")), "half a character"),
    "surrogate in a class": (json.dumps(qupath_feature(classification={"name": "\udfff"})), "half a character"),
    "surrogate in metadata": (json.dumps(qupath_feature(metadata={"\ud800": "a"})), "half a character"),
    "surrogate in a measurement": (json.dumps(qupath_feature(measurements={"\ud800": 1})), "half a character"),
    "class of 3,000 parts": (json.dumps(qupath_feature(classification={"names": ["a"] * 3000})), "3000 parts"),
    "class of damaged text": (json.dumps(qupath_feature(classification="{'name': ")), "damaged JSON"),
    "class of endless text": (json.dumps(qupath_feature(classification="[" * 5000)), "5000 characters"),
    "nested text": (json.dumps(qupath_feature(classification="(" * 90 + "[" * 900)), None),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_feature_is_refused_with_its_index_and_the_others_are_read(write: Write, name: str) -> None:
    text, reason = HOSTILE[name]
    sound = json.dumps(qupath_feature())
    imported = read_annotations(write(f'{{"features":[{sound},{text},{sound}]}}', "a.geojson"))
    if reason is None:
        assert len(imported.annotations) == 3
        return
    assert len(imported.annotations) == 2
    (note,) = imported.refused
    assert note.item == "feature 1"
    assert shapely.box(0, 0, 100, 100).equals(imported.annotations[1].geometry)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(note.reason)
    assert "\n" not in str(note)


@pytest.mark.parametrize(
    "color", [math.nan, [math.nan, 1, 2], [1, 2], "#fff", "#12345", "1" * 5000, {}, True, [1e308] * 3]
)
def test_a_color_that_is_none_is_no_color(write: Write, color: object) -> None:
    data = qupath_feature(classification={"name": "Tumor", "color": color}, color=color)
    imported = read_annotations(write(json.dumps([data]), "a.geojson"))
    assert [record.path_class for record in imported.annotations] == ["Tumor"]
    assert imported.colors == {}


def test_children_in_children_end(write: Write) -> None:
    data = qupath_feature()
    for _ in range(150):
        data = qupath_feature(childObjects=[data])
    imported = read_annotations(write(json.dumps([data]), "a.geojson"))
    assert len(imported.annotations) == 100
    assert "lies in more than 100 others" in imported.refused[0].reason


def test_layers_in_layers_count_each_region_once(write: Write) -> None:
    one = f'<Annotation Name="L"><Regions>{region(SQUARE)}'
    text = f"<Annotations>{one * 1500}{'</Regions></Annotation>' * 1500}</Annotations>"
    assert len(read_annotations(write(text)).annotations) == 1500


def test_numbers_of_thousands_of_digits_in_xml(write: Write) -> None:
    text = aperio(region([(0, 0), ("1" * 5000, 1), (5, 5)]), region(SQUARE)).replace('"255"', f'"{"9" * 5000}"')
    imported = read_annotations(write(text))
    assert (len(imported.annotations), imported.colors) == (1, {})
    assert "where a number should be" in imported.refused[0].reason


def star(corners: int, x: float) -> list[list[float]]:
    """A star that crosses itself corners * (corners - 3) / 2 times."""
    angles = np.arange(corners) * 2 * np.pi * (corners // 2) / corners
    points = np.column_stack([1000 + x + 900 * np.cos(angles), 1000 + 900 * np.sin(angles)])
    return [*points.tolist(), points[0].tolist()]


def test_shapes_that_cross_themselves_have_one_budget_per_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "_FILE_CROSSINGS", 2000)
    stars = [{"type": "Polygon", "coordinates": [star(51, x)]} for x in range(20)]
    imported = read_annotations(write(json.dumps([*stars, qupath_feature()]), "a.geojson"))
    assert 1 <= len(imported.repaired) <= 3
    assert len(imported.annotations) == len(imported.repaired) + 1
    assert all("crosses itself" in note.reason for note in imported.refused)


@pytest.mark.parametrize(
    "corners",
    [[*SQUARE] * 400, [(0, 0) if i % 2 else (1000 * math.cos(i), 1000 * math.sin(i)) for i in range(1500)]],
    ids=["one outline again and again", "all through one point"],
)
def test_outlines_that_lie_on_each_other_are_counted_too(write: Write, corners: list[tuple[float, float]]) -> None:
    imported = read_annotations(write(aperio(region(corners), region(SQUARE))))
    assert "crosses itself more than 50,000 times" in imported.refused[0].reason
    assert len(imported.annotations) == 1


@given(data=st.data())
@settings(deadline=None, derandomize=True, max_examples=40)
def test_crossings_are_those_that_pairs_of_segments_have(data: st.DataObject) -> None:
    # A grid on which the side of a line is exact: of points 1e-40 apart no sum of doubles can tell it.
    side = st.integers(0, 6400).map(lambda number: number / 64)
    point = st.tuples(side, side)
    corners = np.array(data.draw(st.lists(point, min_size=4, max_size=12, unique=True)))
    polygon = shapely.Polygon(corners)
    ends = np.roll(corners, -1, axis=0)
    lines = shapely.linestrings(np.stack([corners, ends], axis=1))
    pairs = [(i, j) for i in range(len(lines)) for j in range(i + 1, len(lines))]
    meeting = sum(bool(shapely.intersects(lines[i], lines[j])) for i, j in pairs)
    assert shapes.crossings(polygon, 10**6) == meeting - len(lines)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = {"pipe": tmp_path / "p.xml", "folder": tmp_path, "device": Path("/dev/zero")}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(ExchangeError, match=r"not a regular file|cannot be opened"):
        read_annotations(path)


def spoken_of(path: Path) -> str:
    try:
        return str(read_annotations(path))
    except ExchangeError as error:
        return str(error)


@given(
    data=st.binary(max_size=60),
    start=st.sampled_from([b"{", b"[", b"<", b"<?xml version='1.0'", b"PK\x03\x04", b"\x1f\x8b"]),
)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_any_bytes_are_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, start: bytes
) -> None:
    path = tmp_path_factory.mktemp("any") / "a.bin"
    path.write_bytes(start + data)
    said = spoken_of(path)
    assert said.startswith(str(path))
    assert "\n" not in said


@pytest.mark.parametrize("name", ["zlib", "base64", "punycode", "idna", "unicode_escape", "rot13", "no-such"])
def test_codecs_that_are_no_text_are_not_used(name: str) -> None:
    with pytest.raises(ExchangeError, match="which is not known; save it as UTF-8"):
        _ = Document(None, f'<?xml version="1.0" encoding="{name}"?><a/>'.encode()).text


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_read_and_damaged_ones_are_read_or_refused(tmp_path: Path, name: str) -> None:
    assert try_exchange(name, SAMPLES[name], tmp_path).startswith("read")
    rng = random.Random(name)
    for _ in range(100):
        try_exchange(name, damaged(SAMPLES[name], rng), tmp_path)


def test_what_is_packed_is_damaged_too(tmp_path: Path) -> None:
    rng = random.Random(1)
    outcomes = {
        try_exchange("a.geojson.gz", gzip.compress(damaged(SAMPLES["a.geojson"], rng)), tmp_path) for _ in range(100)
    }
    assert "refused" in outcomes
    assert len(outcomes) > 1


def test_a_large_file_is_read_in_pieces_of_its_own_size(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"[]")
    tracemalloc.start()
    read_annotations(tmp_path / "a")
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


def test_collections_become_one_shape(write: Write) -> None:
    inner = {"type": "GeometryCollection", "geometries": [{"type": "Polygon", "coordinates": [[*SQUARE, SQUARE[0]]]}]}
    other = {"type": "Polygon", "coordinates": [[[50, 0], [150, 0], [150, 100], [50, 100], [50, 0]]]}
    point = {"type": "Point", "coordinates": [1, 1]}
    data = {"type": "GeometryCollection", "geometries": [inner, other, point]}
    (annotation,) = read_annotations(write(json.dumps(data), "a.geojson")).annotations
    assert annotation.geometry.equals(shapely.box(0, 0, 150, 100))


def test_empty_elements_by_the_million_are_refused(write: Write) -> None:
    with pytest.raises(ExchangeError, match="300,002 elements that hold nothing"):
        read_annotations(write(f"<Annotations><Annotation>{'<a/>' * 300_000}</Annotation></Annotations>"))


def test_the_files_of_a_zip_share_what_it_may_unpack_to(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(5):
            archive.writestr(f"{number}.json", b"[]" + b" " * (2 << 20))
    with pytest.raises(ExchangeError, match="unpacks to more than 60 times its size"):
        read_annotations(tmp_path / "a.zip")
