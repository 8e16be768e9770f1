from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darefine_qupath.classes import Color, PathClass
from darefine_qupath.errors import ProjectFormatError, ProjectUnsupportedError
from darefine_qupath.geometry import Size
from darefine_qupath.project import class_list, imagefile, lenient_json, qpproj, servers
from darefine_qupath.project.uris import file_uri, local_path, relocated, uri_path

QUPATH = Path(__file__).parent / "data" / "qupath"
PROJECTS = sorted(QUPATH.glob("qupath-*/*/project.qpproj"))
ANY = Path("project.qpproj")

exhaustive = settings(deadline=None, derandomize=True, max_examples=200)


def name_of(path: Path) -> str:
    return "/".join(path.relative_to(QUPATH).parts[:-1])


# -- JSON


@pytest.mark.parametrize("path", PROJECTS, ids=name_of)
def test_an_unchanged_project_file_keeps_its_bytes(path: Path) -> None:
    data = path.read_bytes()
    assert lenient_json.json_bytes(qpproj.parse_project(data, path)) == data


def test_there_are_fixtures_of_four_versions() -> None:
    assert {path.parts[-3] for path in PROJECTS} == {f"qupath-{v}" for v in ("0.4.4", "0.5.1", "0.6.0", "0.7.0")}


@pytest.mark.parametrize("path", sorted(QUPATH.glob("qupath-*/*/classifiers/classes.json")), ids=name_of)
def test_a_class_list_written_anew_has_the_same_bytes(path: Path) -> None:
    data = path.read_bytes()
    assert class_list.classes_json(class_list.parse_classes(data, path), None, path) == data


@pytest.mark.parametrize("path", PROJECTS, ids=name_of)
def test_server_json_is_written_as_that_version_does(path: Path) -> None:
    document = qpproj.parse_project(path.read_bytes(), path)
    checked = 0
    for record in qpproj.entry_records(document, path):
        stored = path.parent / "data" / str(record.id) / "server.json"
        if stored.is_file():
            assert servers.server_json(record.builder, version=qpproj.version_of(document)) == stored.read_bytes()
            checked += 1
    assert checked


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@exhaustive
@given(value=JSON, pretty=st.booleans())
def test_json_comes_back_as_it_was_written(value: object, pretty: bool) -> None:
    data = lenient_json.json_bytes(value, pretty=pretty)
    assert json.dumps(lenient_json.parse_json(data, ANY)) == json.dumps(value)
    assert lenient_json.json_bytes(lenient_json.parse_json(data, ANY), pretty=pretty) == data


@pytest.mark.parametrize(
    "text", ["1.0E-5", "1e400", "-0", "0.50", "NaN", "-Infinity", "123456789012345678901234567890", "9" * 5000]
)
def test_a_number_keeps_its_spelling(text: str) -> None:
    assert (
        lenient_json.json_bytes(lenient_json.parse_json(f"[{text}]".encode(), ANY), pretty=False)
        == f"[{text}]".encode()
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "1.0"), (0.467, "0.467"), (1e-5, "1.0E-5"), (1234567.5, "1234567.5"), (1e7, "1.0E7"), (1.25e20, "1.25E20")],
)
def test_a_new_number_is_spelled_as_java_spells_it(value: float, text: str) -> None:
    assert lenient_json.json_bytes([value], pretty=False) == f"[{text}]".encode()


def test_what_gson_escapes_is_escaped() -> None:
    assert lenient_json.json_bytes("<a b='c'>&\u2028\x00\n\ud800é腫", pretty=False) == (
        rb'"\u003ca b\u003d\u0027c\u0027\u003e\u0026\u2028\u0000\n\ud800' + 'é腫"'.encode()
    )


def test_a_byte_order_mark_is_no_error() -> None:
    assert lenient_json.parse_json(b'\xef\xbb\xbf{"a": 1}', ANY) == {"a": 1}


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b'{"version": "0.6.0", ', r"project.qpproj: this is not JSON: .* \(at byte 21\)"),
        ('{"é": é}'.encode(), r"at byte 7\)"),
        (b'{"a": "\xff"}', r"not UTF-8 text \(at byte 7\)"),
        (b"[" * 100_000, r"nested too deeply \(at byte 0\)"),
        (b"", r"not JSON: .* \(at byte 0\)"),
        (b"[]", r"not an object \(at byte 0\)"),
        (b' {"a": 1}', r"no version, lastID or images \(at byte 1\)"),
        (b'{"version": "0.6.0", "images": {}}', r"not a list of entries \(at byte 31\)"),
        (b'{"a": ' + b"9" * 5000 + b', "images": 0}', r"not a list of entries \(at byte 5018\)"),
        (b'{"images": [{"entryID": 1}]}', r"image 1 \(entry 1\) has no serverBuilder \(at byte 12\)"),
        (b'{"images": [{"entryID": "../1", "serverBuilder": {}}]}', r"entryID '../1', not a number \(at byte 24\)"),
        (b'{"images": [{"entryID": true, "serverBuilder": {}}]}', r"entryID 'True', not a number \(at byte 24\)"),
        (
            '\ufeff{"é": [{}, 1], "images": [{"entryID": 1, "serverBuilder": {}, "metadata": 3}]}'.encode(),
            r"metadata that is not an object \(at byte 78\)",
        ),
        (
            b'{"images": [{"entryID": 1, "serverBuilder": {}}, {"entryID": 1, "serverBuilder": {}}]}',
            r"1 occurs twice \(at byte 61\)",
        ),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_project_is_said_in_one_line(data: bytes, match: str) -> None:
    with pytest.raises(ProjectFormatError, match=match) as caught:
        qpproj.parse_project(data, ANY)
    assert "\n" not in str(caught.value)


def one_image(**entry: object) -> bytes:
    metadata = {"width": 100, "height": 200}
    builder = {"builderType": "uri", "uri": "file:/a.tif", "args": [], "metadata": metadata}
    images = [{"serverBuilder": builder, "entryID": 1, "imageName": "a", **entry}]
    return json.dumps({"version": "0.6.0", "lastID": 1, "images": images}).encode()


def test_half_a_character_in_a_name_can_be_printed_and_stays_in_the_file() -> None:
    data = one_image(imageName="\ud800", metadata={"\udfff": "a\ud801", "b": ["\ud800"]}, description="\ud800")
    document = qpproj.parse_project(data, Path("p"))
    (record,) = qpproj.entry_records(document, Path("p"))
    assert (record.name, record.description) == ("\ufffd", "\ufffd")
    assert record.metadata == {"\ufffd": "a\ufffd", "b": '["\\ud800"]'}
    assert b'"imageName": "\\ud800"' in lenient_json.json_bytes(document)


@pytest.mark.parametrize("depth", [200, 900, 3000])
@pytest.mark.parametrize("key", ["metadata", "tags"])
def test_what_is_nested_deeply_is_refused(depth: int, key: str) -> None:
    data = one_image(**{key: 0}).replace(b'": 0}', b'": ' + b'{"a":' * depth + b"0" + b"}" * depth + b"}")
    with pytest.raises(ProjectFormatError, match="nested too deeply"):
        qpproj.parse_project(data, Path("p"))


@pytest.mark.parametrize("width", [10**30, 2**31, 0, -5, 0.5, "wide", None])
def test_a_size_that_no_image_has_is_named(width: object) -> None:
    server = servers.server_of({"builderType": "uri", "uri": "file:/a", "metadata": {"width": width, "height": 3}})
    assert server.size is None
    assert "in the project file, and no image" in str(server.unsupported)
    assert len(str(server.unsupported)) < 200


def test_a_project_of_qupath_0_1_is_refused_by_name() -> None:
    with pytest.raises(ProjectUnsupportedError, match=r"QuPath 0\.1"):
        qpproj.parse_project(b'{"images": [{"path": "a.svs", "name": "a"}]}', ANY)


def test_a_project_of_an_early_milestone_is_refused_by_name() -> None:
    with pytest.raises(ProjectUnsupportedError, match=r"QuPath v0\.2\.0-m2, which no later QuPath opens"):
        qpproj.parse_project(b'{"version": "v0.2.0-m2", "images": []}', ANY)


def test_unknown_keys_stay() -> None:
    text = b'{\n  "version": "0.6.0",\n  "new": {\n    "x": 1.50\n  },\n  "images": []\n}'
    assert lenient_json.json_bytes(qpproj.parse_project(text, ANY)) == text


# -- classes


def test_a_class_keeps_its_colour_and_unknown_keys() -> None:
    former = b'{"pathClasses":[{"name":"A","color":-1,"note":"x"},{"name":"B"}],"more":[]}'
    listed = class_list.parse_classes(former, ANY)
    merged = class_list.merged_classes(listed, [PathClass("A", Color(1, 2, 3)), PathClass("C", Color(0, 0, 255))])
    written = json.loads(class_list.classes_json(merged, former, ANY))
    assert written["pathClasses"][0] == {"name": "A", "color": -1, "note": "x"}
    assert [item["name"] for item in written["pathClasses"]] == ["A", "B", "C"]
    assert written["pathClasses"][2]["color"] == -16776961
    assert written["more"] == []


@pytest.mark.parametrize("text", ["[]", '{"pathClasses": 3}', '{"pathClasses": [{"color": 1}]}'])
def test_a_wrong_class_list_is_an_error(text: str) -> None:
    with pytest.raises(ProjectFormatError, match="class"):
        class_list.parse_classes(text.encode(), ANY)


# -- servers


def uri_builder(**more: object) -> dict[str, Any]:
    return {"builderType": "uri", "uri": "file:/a.tif", "args": [], **more}


@pytest.mark.parametrize(
    ("builder", "match"),
    [
        ({"builderType": "rotated", "rotation": "ROTATE_90", "builder": uri_builder()}, r"rotated \(ROTATE_90\)"),
        ({"builderType": "rotated", "rotation": "ROTATE_180", "builder": uri_builder()}, r"rotated \(ROTATE_180\)"),
        ({"builderType": "cropped", "region": {}, "builder": uri_builder()}, "'cropped'.* cropped to a part"),
        ({"builderType": "affine", "builder": uri_builder()}, "transformed by a matrix"),
        ({"builderType": "channels", "builder": uri_builder(), "channels": []}, "channels of several images"),
        ({"builderType": "sparse", "regions": []}, "regions of several images"),
        ({"builderType": "z_projected", "builder": uri_builder()}, "projected over a stack"),
        ({"builderType": "brandNew", "builder": uri_builder()}, "'brandNew'.*not known here"),
        ({"builderType": "pyramidize", "builder": {"builderType": "cropped", "builder": uri_builder()}}, "'cropped'"),
        ({"uri": "file:/a.tif"}, "no builderType"),
        ({"builderType": [], "uri": "file:/a.tif"}, "no builderType"),
        (uri_builder(args=["--series", "2"]), "image number 3 of a file"),
        (uri_builder(args=["--series=1"]), "image number 2 of a file"),
        (uri_builder(args=["--name", "macro image"]), "'macro image' of a file"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.get("builderType")),
)
def test_a_server_that_shows_something_else_is_refused_by_name(builder: dict[str, Any], match: str) -> None:
    reason = servers.server_of(builder).unsupported
    assert reason is not None
    assert re.search(match, reason)


@pytest.mark.parametrize(
    "kind",
    [
        "affine",
        "channels",
        "color",
        "color_deconvolved",
        "cropped",
        "normalized",
        "sliced",
        "sparse",
        "swapRedBlue",
        "typeConvert",
        "z_concatenated",
        "z_projected",
    ],
)
@pytest.mark.parametrize("place", ["outside", "inside"])
def test_every_wrapper_of_qupath_is_refused_by_its_name(kind: str, place: str) -> None:
    builder = {"builderType": kind, "builder": uri_builder(), "metadata": {"width": 5, "height": 6}}
    if place == "inside":
        builder = {"builderType": "pyramidize", "builder": builder}
    server = servers.server_of(builder)
    assert f"({kind!r})" in str(server.unsupported)
    assert "not known here" not in str(server.unsupported)
    assert server.uri == "file:/a.tif"


SERVER_KEYS = ("builderType", "uri", "args", "metadata", "builder", "builders", "channels", "rotation", "width")


@exhaustive
@given(builder=st.dictionaries(st.sampled_from(SERVER_KEYS), JSON | st.sampled_from(["uri", "rotated", "pyramidize"])))
def test_any_server_is_read_or_refused_by_name(builder: dict[str, Any]) -> None:
    server = servers.server_of(builder)
    assert server.unsupported is not None or builder["builderType"] in ("uri", "rotated", "pyramidize")
    assert isinstance(server.uri, str | None)
    assert server.has_metadata is (server.size is not None)


@pytest.mark.parametrize(
    "builder",
    [
        uri_builder(),
        uri_builder(args=["--series", "0"]),
        uri_builder(args=["--no-crop"]),
        {"builderType": "rotated", "rotation": "ROTATE_NONE", "builder": uri_builder()},
        {"builderType": "pyramidize", "builder": uri_builder(), "metadata": {"width": 5, "height": 6}},
    ],
    ids=["plain", "series 0", "no crop", "not rotated", "pyramidal"],
)
def test_a_server_that_shows_the_file_is_taken(builder: dict[str, Any]) -> None:
    server = servers.server_of(builder)
    assert server.unsupported is None
    assert server.uri == "file:/a.tif"


def test_a_wrapped_server_has_the_size_of_the_wrapper() -> None:
    inner = uri_builder(metadata={"width": 100, "height": 50})
    wrapped = {"builderType": "cropped", "builder": inner, "metadata": {"width": 10, "height": 5}}
    assert servers.server_of(wrapped).size == Size(10, 5)
    del wrapped["metadata"]
    assert servers.server_of(wrapped).size is None


def test_wrapping_without_end_is_refused() -> None:
    builder = uri_builder()
    for _ in range(200):
        builder = {"builderType": "pyramidize", "builder": builder}
    assert "more than 100 times" in str(servers.server_of(builder).unsupported)


def calibrated(value: object, unit: str = "µm") -> dict[str, Any]:
    quantity = {"value": value, "unit": unit}
    return uri_builder(metadata={"pixelCalibration": {"pixelWidth": quantity, "pixelHeight": quantity}})


@pytest.mark.parametrize("unit", ["µm", "μm", "um"])
def test_mpp_is_read_in_micrometres(unit: str) -> None:
    assert servers.server_of(calibrated(0.25, unit)).pixel_size == (0.25, 0.25)


@pytest.mark.parametrize(
    ("value", "unit"), [(1.0, "px"), (0.25, "mm"), (float("nan"), "µm"), (0, "µm"), (-1.0, "µm"), ("1", "µm")]
)
def test_what_is_not_a_pixel_size_is_none(value: object, unit: str) -> None:
    stored = servers.server_of(calibrated(value, unit)).pixel_size
    assert stored is None or stored.side is None


@pytest.mark.parametrize("version", ["0.4.4", "0.5.1", "0.6.0", "0.7.0"])
@pytest.mark.parametrize(("name", "index"), [("slide.tif", 0), ("plain.png", 2)])
def test_our_metadata_of_a_file_are_qupaths_own(version: str, name: str, index: int) -> None:
    path = QUPATH / f"qupath-{version}" / "multi" / "project.qpproj"
    stored = qpproj.parse_project(path.read_bytes(), path)["images"][index]["serverBuilder"]
    found = imagefile.probe(QUPATH / "images" / name)
    metadata = servers.image_metadata(
        name=stored["metadata"]["name"],
        levels=found.levels,
        tile=found.tile,
        mpp=found.pixel_size,
        magnification=found.magnification,
        has_timepoints=found.provider == servers.IMAGEJ and servers.is_since(version, 0, 6),
    )
    ours = servers.server_builder(stored["uri"], provider=found.provider, args=found.args, metadata=metadata)
    assert lenient_json.json_bytes(ours) == lenient_json.json_bytes(stored)


@pytest.mark.parametrize(
    ("base", "level", "downsample"),
    [
        ((5000, 5000), (312, 312), 16.0),
        ((11747, 16557), (183, 258), 64.0),
        ((46000, 32914), (11500, 8228), 4.0),
        ((3000, 3000), (1000, 1000), 3.0),
        ((1000, 1000), (400, 400), 2.5),
    ],
)
def test_a_level_gets_the_downsample_that_was_meant(
    base: tuple[int, int], level: tuple[int, int], downsample: float
) -> None:
    metadata = servers.image_metadata(
        name="x", levels=[Size(*base), Size(*level)], tile=Size(256, 256), mpp=None, magnification=20.0
    )
    assert metadata["levels"][1]["downsample"] == downsample
    assert list(metadata)[-3:] == ["magnification", "preferredTileWidth", "preferredTileHeight"]


# -- URIs


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:/a/b.svs", "/a/b.svs"),
        ("file:///a/b.svs", "/a/b.svs"),
        ("file://localhost/a/b.svs", "/a/b.svs"),
        ("FILE:/a/b.svs", "/a/b.svs"),
        ("file:/my%20slides/Gr%C3%B6%C3%9Fe%231.svs", "/my slides/Größe#1.svs"),
        ("file:/腫瘍/é.svs", "/腫瘍/é.svs"),
        ("file:/C:/slides/a.svs", "C:/slides/a.svs"),
        ("file:///C:/slides/a.svs", "C:/slides/a.svs"),
        ("file://server/share/a.svs", "//server/share/a.svs"),
        ("file:////server/share/a.svs", "//server/share/a.svs"),
        ("file://///server/share/a.svs", "//server/share/a.svs"),
        ("https://omero.org/webclient/?show=image-1", None),
        ("file:a/b.svs", None),
        ("a/b.svs", None),
        ("", None),
    ],
)
def test_the_path_in_a_uri(uri: str, path: str | None) -> None:
    assert uri_path(uri) == path


@pytest.mark.parametrize(
    ("uri", "windows", "path"),
    [
        ("file:/C:/my%20slides/a.svs", True, PureWindowsPath(r"C:\my slides\a.svs")),
        ("file://server/share/a.svs", True, PureWindowsPath(r"\\server\share\a.svs")),
        ("file:////server/share/a.svs", True, PureWindowsPath(r"\\server\share\a.svs")),
        ("file:/C:/not-utf8-%FF.svs", True, PureWindowsPath("C:/not-utf8-\udcff.svs")),
        ("file:/a/b.svs", False, PurePosixPath("/a/b.svs")),
        ("file:/C:/a.svs", False, PurePosixPath("/C:/a.svs")),
        ("http://x/a.svs", True, None),
        ("file:/a%00b.svs", False, None),
    ],
)
def test_the_file_of_a_uri(uri: str, windows: bool, path: object) -> None:
    assert local_path(uri, windows=windows) == path


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        (PurePosixPath("/a b/c.svs"), "file:/a%20b/c.svs"),
        (PurePosixPath("/é/腫瘍.svs"), "file:/é/腫瘍.svs"),
        (PurePosixPath("/a#b?c%d[e].svs"), "file:/a%23b%3Fc%25d%5Be%5D.svs"),
        (PurePosixPath("/a&b=c'd.svs"), "file:/a&b=c'd.svs"),
        (PureWindowsPath(r"C:\my slides\a.svs"), "file:/C:/my%20slides/a.svs"),
        (PureWindowsPath(r"\\server\share\a.svs"), "file:////server/share/a.svs"),
        (PurePosixPath("/non\u00a0breaking.svs"), "file:/non%C2%A0breaking.svs"),
        (PurePosixPath("/not-utf8-\udcff.svs"), "file:/not-utf8-%FF.svs"),
    ],
)
def test_the_uri_of_a_file(path: PurePosixPath, uri: str) -> None:
    assert file_uri(path) == uri
    assert local_path(uri, windows=isinstance(path, PureWindowsPath)) == path


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: name not in (".", "..")
)


@exhaustive
@given(parts=st.lists(NAMES, min_size=2, max_size=4))
def test_a_path_survives_its_uri(parts: list[str]) -> None:
    path = PurePosixPath("/root", *parts)
    assert local_path(file_uri(path), windows=False) == path


@pytest.mark.parametrize(
    ("uri", "project", "found"),
    [
        ("file:/old/images/a.svs", "file:/old/p/project.qpproj", "/new/images/a.svs"),
        ("file:///old/images/a.svs", "file:/old/p/project.qpproj", "/new/images/a.svs"),
        ("file:/old/p/in/a%20b.svs", "file:/old/p/project.qpproj", "/new/p/in/a b.svs"),
        ("file:/C:/Old/images/a.svs", "file:/c:/old/p/project.qpproj", "/new/images/a.svs"),
        ("file://server/share/images/a.svs", "file:////server/share/p/project.qpproj", "/new/images/a.svs"),
        ("file:/D:/images/a.svs", "file:/C:/p/project.qpproj", None),
        ("file://server/one/a.svs", "file://server/two/p/project.qpproj", None),
        ("https://x/a.svs", "file:/old/p/project.qpproj", None),
    ],
)
def test_where_an_image_of_a_moved_project_is(uri: str, project: str, found: str | None) -> None:
    path = relocated(uri, project_uri=project, folder=Path("/new/p"))
    assert (None if path is None else path.as_posix()) == found
