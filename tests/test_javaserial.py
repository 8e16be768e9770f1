"""Java's object stream: identical bytes back, handles that follow edits, hostile streams refused."""

from __future__ import annotations

import random
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darefine_qupath.errors import JavaStreamError
from darefine_qupath.javaserial.decode import decode
from darefine_qupath.javaserial.descriptors import ClassDesc, Field, ProxyDesc
from darefine_qupath.javaserial.encode import encode
from darefine_qupath.javaserial.nodes import (
    Aborted,
    JavaArray,
    JavaClass,
    JavaEnum,
    JavaObject,
    LongBlock,
    Reset,
    Stream,
)
from darefine_qupath.javaserial.strings import JavaString, modified_utf8
from tests.conftest import DATA

MAGIC = b"\xac\xed\x00\x05"
FILES = sorted((DATA / "qupath").rglob("data.qpdata"))
S, SW, E, EN = 0x02, 0x03, 0x0C, 0x12


def _id(path: Path) -> str:
    return "-".join(path.relative_to(DATA / "qupath").parts[:-1])


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_files_of_qupath_encode_to_the_identical_bytes(path: Path) -> None:
    data = path.read_bytes()
    assert encode(decode(data)) == data


def test_all_shared_files_encode_to_the_identical_bytes(shared: Path) -> None:
    paths = sorted(shared.rglob("data.qpdata"))
    assert len(paths) > len(FILES)
    for path in paths:
        data = path.read_bytes()
        assert encode(decode(data)) == data, path


# -- streams that Java wrote


def test_a_stream_of_javas_own_classes() -> None:
    # new ObjectOutputStream(...).writeObject(Integer.valueOf(258))
    data = bytes.fromhex(
        "aced000573720011 6a6176612e6c616e672e496e7465676572 12e2a0a4f7818738 02 0001 49 0005 76616c7565 78"
        "72 0010 6a6176612e6c616e672e4e756d626572 86ac951d0b94e08b 02 0000 78 70 00000102"
    )
    stream = decode(data)
    (integer,) = stream.contents
    assert isinstance(integer, JavaObject)
    assert integer.desc.name == "java.lang.Integer"
    assert integer.desc.parent is not None
    assert integer.desc.parent.name == "java.lang.Number"
    assert integer.get("value") == 258
    integer.put("value", -1)
    assert encode(stream) == data[:-4] + b"\xff\xff\xff\xff"
    assert stream.offset_of(integer) == 4
    assert stream.offset_of(object()) is None


@pytest.mark.parametrize("text", ["", "plain", "é – 腫瘍", "\0 nul", "😀 beyond", "\ud800 half", "a" * 70_000])
def test_strings_are_modified_utf8(text: str) -> None:
    data = encode(Stream([JavaString(text)]))
    assert data[4] == (0x7C if len(text) > 65_535 else 0x74)
    (string,) = decode(data).contents
    assert isinstance(string, JavaString)
    assert string.text == text
    assert encode(decode(data)) == data


def test_modified_utf8_is_javas() -> None:
    assert modified_utf8("\0") == b"\xc0\x80"
    assert modified_utf8("😀") == b"\xed\xa0\xbd\xed\xb8\x80"


def test_a_string_that_is_no_text_still_passes_through() -> None:
    data = MAGIC + b"t\x00\x02\xff\xfe"
    assert encode(decode(data)) == data
    with pytest.raises(JavaStreamError, match="not modified UTF-8"):
        _ = decode(data).contents[0].text  # type: ignore[union-attr]


def test_arrays_of_numbers_are_bytes() -> None:
    floats = JavaArray(ClassDesc("[F", 836686056779680834, S), np.array([1.5, -2, np.nan], ">f4").tobytes())
    (array,) = decode(encode(Stream([floats]))).contents
    assert isinstance(array, JavaArray)
    np.testing.assert_array_equal(np.frombuffer(array.data, ">f4"), [1.5, -2, np.nan])  # type: ignore[arg-type]


def test_marks_at_the_top_level_reset_the_handles() -> None:
    string = JavaString("a")
    desc = ClassDesc("E", 1, S)
    data = encode(Stream([string, string, Reset(), string, Aborted(JavaObject(desc)), string]))
    assert data.count(b"t\x00\x01a") == 3
    stream = decode(data)
    assert encode(stream) == data
    assert stream.contents[0] is stream.contents[1]
    assert stream.contents[3] is not stream.contents[0]
    assert isinstance(stream.contents[4], Aborted)


def test_every_kind_of_value_comes_back() -> None:
    enum = ClassDesc("Color", 0, EN, parent=ClassDesc("java.lang.Enum", 0, EN))
    proxy = ProxyDesc(
        ["a.B", "c.D"], parent=ClassDesc("java.lang.reflect.Proxy", 7, S, [Field("L", "h", JavaString("Lh;"))])
    )
    red = JavaEnum(enum, JavaString("RED"))
    annotated = ClassDesc("Annotated", 3, S, annotation=(b"from here", red))
    values = [b"", b"x" * 255, b"y" * 256, LongBlock(b"z"), None, red, JavaClass(enum), enum, proxy]
    values += [JavaObject.of(proxy, {"h": red}), JavaObject(annotated), JavaArray(ClassDesc("[[Z", 0, S), (None, None))]
    data = encode(Stream(values))
    stream = decode(data)
    assert encode(stream) == data
    assert [type(value) for value in stream.contents] == [type(value) for value in values]
    assert stream.contents[9].get("h") is stream.contents[5]  # type: ignore[union-attr]


# -- edits


def test_a_definition_moves_to_the_first_use_that_is_left() -> None:
    name = JavaString("shared name")
    desc = ClassDesc("Node", 1, S, [Field("I", "n"), Field("L", "name", JavaString("Ljava/lang/String;"))])
    nodes = [JavaObject.of(desc, {"n": number, "name": name}) for number in range(3)]
    stream = decode(encode(Stream(nodes)))
    first = stream.contents.pop(0)
    assert isinstance(first, JavaObject)
    again = decode(encode(stream))
    assert [node.get("n") for node in again.contents] == [1, 2]  # type: ignore[union-attr]
    assert [node.get("name").text for node in again.contents] == ["shared name"] * 2  # type: ignore[union-attr]
    assert encode(again).count(b"shared name") == 1
    stream.contents.insert(0, first)
    assert encode(stream) == encode(Stream(nodes))


def test_fields_of_all_classes_are_found_by_name() -> None:
    parent = ClassDesc("Parent", 1, SW, [Field("D", "d"), Field("Z", "flag")])
    child = ClassDesc("Child", 1, SW, [Field("B", "b"), Field("L", "o", JavaString("Lo;"))], parent)
    node = JavaObject.of(child, {"d": 0.5, "flag": True, "b": -3, "o": None, "@Parent": (b"p",), "@Child": (None,)})
    (found,) = decode(encode(Stream([node]))).contents
    assert isinstance(found, JavaObject)
    assert [found.get(name) for name in ("d", "flag", "b", "o", "@Parent", "@Child")] == [
        0.5,
        True,
        -3,
        None,
        (b"p",),
        (None,),
    ]
    found.put("o", found)
    assert decode(encode(Stream([found]))).contents[0].get("o").get("b") == -3  # type: ignore[union-attr]
    with pytest.raises(KeyError):
        found.get("nothing")


# -- random streams

texts = st.text(st.characters(codec="utf-16"), max_size=8)
names = st.text("abcXYZ.$é", min_size=1, max_size=12)
PRIMITIVES = "BCDFIJSZ"
WIDTHS = dict(zip(PRIMITIVES, (1, 2, 8, 4, 4, 8, 2, 1), strict=True))


class _Streams:
    """Draws values of a stream; everything drawn so far may be drawn again, as a back reference."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.known: list[Any] = []
        self.descs: list[Any] = []

    def string(self) -> JavaString:
        known = [node for node in self.known if isinstance(node, JavaString)]
        if known and self.draw(st.booleans()):
            return self.draw(st.sampled_from(known))
        return self._keep(JavaString(self.draw(texts)))

    def _keep(self, node: Any) -> Any:  # noqa: ANN401
        self.known.append(node)
        return node

    def desc(self, flags: tuple[int, ...], depth: int = 0) -> Any:  # noqa: ANN401
        known = [desc for desc in self.descs if desc.flags in flags]
        if known and self.draw(st.booleans()):
            return self.draw(st.sampled_from(known))
        chosen = self.draw(st.sampled_from(flags))
        fields = []
        if chosen in (S, SW):
            codes = self.draw(st.lists(st.sampled_from(PRIMITIVES), max_size=3)) + self.draw(
                st.lists(st.sampled_from("[L"), max_size=2)
            )
            fields = [
                Field(code, f"{self.draw(names)}{at}", None if code in PRIMITIVES else self.string())
                for at, code in enumerate(codes)
            ]
        parent = self.desc((S, SW), depth + 1) if chosen in (S, SW) and depth < 3 and self.draw(st.booleans()) else None
        annotation = tuple(self.values(2)) if depth == 0 and self.draw(st.integers(0, 9)) == 0 else ()
        uid = self.draw(st.integers(-(2**63), 2**63 - 1))
        desc = ClassDesc(self.draw(names), uid, chosen, fields, parent, annotation)
        self.descs.append(desc)
        return desc

    def values(self, depth: int) -> list[Any]:
        return [self.content(depth) for _ in range(self.draw(st.integers(0, 3)))]

    def content(self, depth: int) -> Any:  # noqa: ANN401
        return self.draw(st.binary(max_size=300)) if self.draw(st.booleans()) else self.value(depth)

    def value(self, depth: int) -> Any:  # noqa: ANN401
        kinds = ["none", "string", "known", "class", "enum", "numbers"] + (
            ["object", "external", "array"] if depth else []
        )
        kind = self.draw(st.sampled_from(kinds))
        if kind == "known" and self.known:
            return self.draw(st.sampled_from(self.known))
        return getattr(self, f"_{kind}", lambda _: None)(depth)

    def _string(self, _: int) -> JavaString:
        return self.string()

    def _class(self, _: int) -> JavaClass:
        return self._keep(JavaClass(self.desc((S, SW, E, EN))))

    def _enum(self, _: int) -> JavaEnum:
        return self._keep(JavaEnum(self.desc((EN,)), self.string()))

    def _numbers(self, _: int) -> JavaArray:
        code = self.draw(st.sampled_from(PRIMITIVES))
        count = self.draw(st.integers(0, 5))
        return self._keep(
            JavaArray(
                ClassDesc(f"[{code}", 1, S),
                self.draw(st.binary(min_size=count * WIDTHS[code], max_size=count * WIDTHS[code])),
            )
        )

    def _array(self, depth: int) -> JavaArray:
        node = self._keep(JavaArray(ClassDesc("[Ljava.lang.Object;", 1, S)))
        node.data = tuple(self.value(depth - 1) for _ in range(self.draw(st.integers(0, 3))))
        return node

    def _external(self, depth: int) -> JavaObject:
        node = self._keep(JavaObject(self.desc((E,))))
        node.data = tuple(self.values(depth - 1))
        return node

    def _object(self, depth: int) -> JavaObject:
        node = self._keep(JavaObject(self.desc((S, SW))))
        data: list[Any] = []
        for step in node.desc.steps:
            if step > 0:
                data.append(self.draw(st.binary(min_size=step, max_size=step)))
            elif step:
                data.extend(self.value(depth - 1) for _ in range(-step))
            else:
                data.append(tuple(self.values(depth - 1)))
        node.data = tuple(data)
        return node


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    made = _Streams(draw)
    return Stream([made.content(4) for _ in range(draw(st.integers(1, 4)))])


def _shape(value: Any, known: dict[int, int]) -> Any:  # noqa: ANN401
    """Nested tuples that are equal for equal trees, back references numbered."""
    if value is None or isinstance(value, bytes):
        return value
    if id(value) in known:
        return known[id(value)]
    known[id(value)] = len(known)
    if isinstance(value, JavaString):
        return ("string", value.raw)
    if isinstance(value, ClassDesc):
        fields = tuple((field.code, field.name, _shape(field.type, known)) for field in value.fields)
        return (
            value.name,
            value.uid,
            value.flags,
            fields,
            _shapes(value.annotation, known),
            _shape(value.parent, known),
        )
    head = (type(value).__name__, _shape(value.desc, known))
    if isinstance(value, JavaEnum):
        return (*head, _shape(value.constant, known))
    data = getattr(value, "data", ())
    return (*head, data if isinstance(data, bytes) else _shapes(data, known))


def _shapes(values: Any, known: dict[int, int]) -> Any:  # noqa: ANN401
    return tuple(_shapes(value, known) if isinstance(value, tuple) else _shape(value, known) for value in values)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(streams())
def test_any_stream_comes_back_identical(stream: Stream) -> None:
    data = encode(stream)
    decoded = decode(data)
    assert _shapes(decoded.contents, {}) == _shapes(stream.contents, {})
    assert encode(decoded) == data


# -- hostile streams

OBJECT_ARRAY = b"r\x00\x13[Ljava.lang.Object;" + bytes(8) + b"\x02\x00\x00xp"
EXTERNAL = b"r\x00\x01X" + bytes(8) + b"\x0c\x00\x00xp"


def test_deep_nesting_needs_no_recursion() -> None:
    depth = 20 * sys.getrecursionlimit()
    arrays = MAGIC + b"u" + OBJECT_ARRAY + b"\0\0\0\1" + b"uq\x00\x7e\x00\x00\0\0\0\1" * (depth - 1) + b"p"
    assert encode(decode(arrays)) == arrays
    objects = MAGIC + b"s" + EXTERNAL + b"sq\x00\x7e\x00\x00" * (depth - 1) + b"x" * depth
    assert encode(decode(objects)) == objects


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"s" + b"r\x00\x01X" + bytes(8) + b"\x04\x00\x00xp", "X is externalized by stream protocol 1"),
        (b"s" + b"r\x00\x01X" + bytes(8) + b"\x06\x00\x00xp", "both serializable and externalizable"),
        (b"s" + b"r\x00\x01X" + bytes(8) + b"\x00\x00\x00xp", "X is not a class that has serialized objects"),
        (b"s" + b"r\x00\x01X" + bytes(8) + b"\x02\x00\x01Q\x00\x01axp", "unknown type code 'Q'"),
        (
            b"s" + b"r\x00\x01X" + bytes(8) + b"\x02\x00\x02L\x00\x01at\x00\x01LI\x00\x01bxp",
            "primitive field after a reference",
        ),
        (b"sp", "class of an object is null"),
        (b"q\x00\x7e\x00\x00", "Handle 0 refers to nothing"),
        (b"q\x00\x00\x00\x01", "refers to nothing"),
        (b"u" + OBJECT_ARRAY + b"\xff\xff\xff\xff", "array of -1 elements"),
        (b"u" + EXTERNAL + bytes(4), "array of class 'X'"),
        (b"~" + EXTERNAL, "X is not an enum"),
        (b"u" + OBJECT_ARRAY + b"\0\0\0\1w\1a", "Byte 0x77 where a value should begin"),
        (b"s" + EXTERNAL + b"y", "a reset inside an object"),
        (b"s" + EXTERNAL + b"{", "the writer failed here"),
        (b"x", "Byte 0x78 where a value should begin"),
        (b"\x00", "Byte 0x00 where a value should begin"),
        (b"z\xff\xff\xff\xff", "negative size -1"),
        (b"|" + b"\xff" * 8, "negative length -1"),
        (b"}\xff\xff\xff\xff", "proxy of -1 interfaces"),
        (b"t\x00\x01asq\x00\x7e\x00\x00", "is not a class descriptor"),
        (b"r\x00\x01\xffX" + bytes(20), "not modified UTF-8"),
        (b"r\x00\x02\xc1\x81" + bytes(20), "not modified UTF-8"),
        (b"r\x00\x01\x00" + bytes(20), "not encoded as Java encodes it"),
    ],
)
def test_what_the_protocol_does_not_allow_is_refused_with_its_place(body: bytes, match: str) -> None:
    with pytest.raises(JavaStreamError, match=match) as caught:
        decode(MAGIC + body)
    assert caught.value.offset is not None
    assert 4 <= caught.value.offset <= 4 + len(body)


@pytest.mark.parametrize("data", [b"", b"\xac\xed\x00", b"PK\x03\x04", b"\xac\xed\x00\x04"])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(JavaStreamError, match="Not a Java object stream"):
        decode(data)


@pytest.mark.parametrize(
    "body",
    [
        b"|" + (2**62).to_bytes(8, "big"),
        b"z" + (2**31 - 1).to_bytes(4, "big"),
        b"u" + OBJECT_ARRAY + (2**31 - 1).to_bytes(4, "big"),
        b"u" + OBJECT_ARRAY.replace(b"\x13[Ljava.lang.Object;", b"\x02[D") + (2**31 - 1).to_bytes(4, "big"),
        b"s" + b"r\x00\x01X" + bytes(8) + b"\x02\xff\xff",
    ],
)
def test_sizes_are_not_believed(body: bytes) -> None:
    with pytest.raises(JavaStreamError, match="ends early") as caught:
        decode(MAGIC + body)
    assert caught.value.offset == len(MAGIC + body)


def test_a_class_with_too_many_superclasses_is_refused() -> None:
    part = b"r\x00\x01X" + bytes(8) + b"\x02\x00\x00x"
    with pytest.raises(JavaStreamError, match="More than 256 superclasses"):
        decode(MAGIC + b"s" + part * 100_000 + b"p")


def test_annotations_of_classes_do_not_nest_without_end() -> None:
    part = b"r\x00\x01X" + bytes(8) + b"\x02\x00\x00"
    with pytest.raises(JavaStreamError, match="nested too deep"):
        decode(MAGIC + part * 10_000)


def test_a_class_is_not_used_before_it_is_described() -> None:
    with pytest.raises(JavaStreamError, match="not yet described"):
        decode(MAGIC + b"sr\x00\x01X" + bytes(8) + b"\x02\x00\x00sq\x00\x7e\x00\x00xp")


def test_a_truncation_is_refused_or_ends_between_values() -> None:
    data = next(path for path in FILES if "annotated" in str(path)).read_bytes()
    stream = decode(data)
    starts = [offset for value in stream.contents if (offset := stream.offset_of(value)) is not None]
    for size in sorted({*range(6, len(data), 101), *starts}):
        if size in starts:
            assert len(decode(data[:size]).contents) < len(stream.contents)
        else:
            with pytest.raises(JavaStreamError, match="ends early"):
                decode(data[:size])


def test_random_bytes_are_refused_or_come_back() -> None:
    rng = random.Random(5)
    tags = b"pqrstuvwxyz{|}~\x00\x01\x7e\x02LI["
    accepted = 0
    for _ in range(3000):
        data = MAGIC + bytes(rng.choice(tags) for _ in range(rng.randrange(1, 30)))
        try:
            stream = decode(data)
        except JavaStreamError:
            continue
        accepted += 1
        assert encode(stream) == data
    assert accepted > 10


def test_the_data_of_numbers_is_kept_bit_by_bit() -> None:
    signalling = struct.pack(">I", 0x7FA00001)
    node = JavaObject(ClassDesc("F", 1, S, [Field("F", "value")]), (signalling,))
    (found,) = decode(encode(Stream([node]))).contents
    assert found.data == (signalling,)  # type: ignore[union-attr]
