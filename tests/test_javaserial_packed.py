"""Objects that stay bytes: they read, edit and encode as those that were decoded."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import UUID

import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from darefine_qupath.annotations import Annotation, Plane
from darefine_qupath.javaserial.decode import decode
from darefine_qupath.javaserial.encode import encode
from darefine_qupath.javaserial.nodes import Stream
from darefine_qupath.javaserial.packed import PackedObject, distinct_nodes
from darefine_qupath.javaserial.strings import JavaString
from darefine_qupath.project import Changes
from darefine_qupath.project.qpdata import document, read
from darefine_qupath.project.qpdata.create import create_image_data
from darefine_qupath.project.qpdata.document import Document
from darefine_qupath.project.qpdata.edit import edit_document
from darefine_qupath.project.qpdata.read import read_image_data
from darefine_qupath.project.qpdata.verify import verify_edit
from tests.conftest import DATA
from tests.fuzzing import damaged
from tests.qpdata_edits import edited_data

FILES = sorted((DATA / "qupath").rglob("data.qpdata"))


def _packed(stream: Stream) -> list[PackedObject]:
    nodes = [node for _, node in distinct_nodes(stream)]
    return [node for node in nodes if isinstance(node, PackedObject) and node.is_packed]


_STYLES: tuple[dict[str, Any], ...] = (
    {"kind": "detection", "measurements": {"Area": 1.25, "Mean": 2.5}},
    {"kind": "detection", "path_class": "Tumor: Positive", "metadata": {"note": "same for all"}},
    {"kind": "cell", "path_class": "Tumor", "nucleus": shapely.box(1, 1, 2, 2), "class_probability": 0.5},
    {"kind": "annotation", "path_class": "Tumor", "name": "a name", "measurements": {"DA": 0.5}, "locked": True},
)


def _record(number: int, rng: random.Random) -> Annotation:
    """One of a few kinds of object, now and then with something of its own."""
    x, y = rng.randrange(900), rng.randrange(900)
    fields = dict(rng.choice(_STYLES)) | {"id": UUID(int=(4 << 76) + number)}
    own: dict[str, Any] = {
        "path_class": f"Rare {number}",
        "name": f"Number {number}",
        "measurements": {f"Only {number}": 1.0},
        "metadata": {f"key {number}": "v"},
        "plane": Plane(0, 1, 2),
        "color": -70_000 - number,
        "geometry": shapely.Point(x, y).buffer(5.25),
    }
    for name in rng.sample(sorted(own), rng.choice((0, 0, 0, 0, 1, 2))):
        fields[name] = own[name]
    return Annotation(**{"geometry": shapely.Polygon([(x, y), (x + 9, y + 1), (x + 5, y + 8)]), **fields})


@cache
def _file(seed: int, count: int) -> bytes:
    """Image with objects that are much alike, some of them below others."""
    rng = random.Random(seed)
    blank = create_image_data(image_type="OTHER", server=None, entry_id="/p::1", version=rng.choice(("0.5.1", "0.6.0")))
    records = [_record(number, rng) for number in range(count)]
    for number in range(3, count):
        if rng.random() < 0.05:
            parent = records[rng.randrange(3)]
            records[number] = Annotation(geometry=shapely.box(0, number, 5, number + 5), parent=parent.id)
    return edited_data(read_image_data(blank), Changes(add=records))


def _without_packing(act: Callable[[], object]) -> object:
    with mock.patch.object(read, "decode_compact", decode), mock.patch.object(document, "decode_compact", decode):
        return act()


@pytest.mark.parametrize("path", FILES, ids=lambda path: "-".join(path.parts[-5:-1]))
def test_files_of_qupath_read_the_same_and_encode_to_the_identical_bytes(path: Path) -> None:
    data = path.read_bytes()
    assert encode(decode(data, is_compact=True)) == data
    assert read_image_data(data) == _without_packing(lambda: read_image_data(data))


def test_most_of_many_objects_stay_bytes(shared: Path) -> None:
    data = (shared / "qupath" / "qupath-0.6.0" / "big" / "data" / "1" / "data.qpdata").read_bytes()
    stream = decode(data, is_compact=True)
    assert len(_packed(stream)) > 20_400
    assert len(stream.nodes) == len(decode(data).nodes)
    assert encode(stream) == data


@settings(deadline=None, derandomize=True, max_examples=25)
@given(seed=st.integers(0, 2**32), count=st.integers(0, 40), data=st.data())
def test_edits_are_those_of_a_decoded_file(seed: int, count: int, data: st.DataObject) -> None:
    content = _file(seed, count)
    assert encode(decode(content, is_compact=True)) == content
    image = read_image_data(content)
    assert image == _without_packing(lambda: read_image_data(content))
    rng = random.Random(seed + 1)
    fates = data.draw(st.lists(st.sampled_from("kkkrc"), min_size=len(image.objects), max_size=len(image.objects)))
    changed = [
        Annotation(geometry=record.geometry, id=record.id, kind=record.kind, name="changed", roi=record.roi)
        for record, fate in zip(image.objects, fates, strict=True)
        if fate == "c"
    ]
    changes = Changes(
        add=[_record(1000 + number, rng) for number in range(rng.randrange(4))],
        replace=changed,
        remove=[record.id for record, fate in zip(image.objects, fates, strict=True) if fate == "r"],
    )
    edited, touched = edit_document(Document(content), changes, {})
    assert edited == _without_packing(lambda: edit_document(Document(content), changes, {}).content)
    assert encode(decode(edited)) == edited
    verify_edit(Document(content), changes, touched, Document(edited), path=Path("data.qpdata"))


def test_a_reference_into_a_packed_object_opens_it() -> None:
    content = _file(3, 40)
    whole = decode(content)
    compact = decode(content, is_compact=True)
    target = next(node for node in _packed(compact) if node.desc.name.endswith("Object"))
    inner = next(
        node
        for node in whole.nodes[target.number : target.number + target.template.num_nodes]
        if isinstance(node, JavaString) and len(node.raw) == 36
    )
    # Something behind the hierarchy refers to the text inside, and to the object itself.
    whole.contents[-1:] = [inner, whole.nodes[target.number], JavaString("EOF")]
    data = encode(whole)
    stream = decode(data, is_compact=True)
    text, node = stream.contents[-3:-1]
    assert isinstance(node, PackedObject)
    assert not node.is_packed
    assert isinstance(text, JavaString)
    assert text.raw == inner.raw
    assert any(text is part for part in node.data[2].data[2].data)
    assert encode(stream) == data


def test_a_packed_object_that_something_refers_to_is_written_once() -> None:
    compact = decode(_file(4, 40), is_compact=True)
    node = _packed(compact)[1]
    compact.contents[-1:] = [node, JavaString("EOF")]
    data = encode(compact)
    again = decode(data)
    assert encode(again) == data
    assert again.nodes.count(again.contents[-2]) == 1  # type: ignore[arg-type]


def test_a_packed_object_is_decoded_anew_until_it_is_opened() -> None:
    stream = decode(_file(5, 40), is_compact=True)
    node = _packed(stream)[0]
    assert node.data[2] is not node.data[2]
    defined = node.open()
    assert defined[0] is node
    assert len(defined) == node.template.num_nodes
    assert node.data[2] is node.data[2]
    assert node.open() == []


@pytest.mark.parametrize("seed", range(40))
def test_damage_is_said_as_of_a_decoded_file(seed: int) -> None:
    rng = random.Random(seed)
    data = damaged(_file(6, 40), rng)

    def outcome() -> object:
        try:
            return read_image_data(data)
        except ValueError as error:
            return str(error)

    assert outcome() == _without_packing(outcome)
