"""Objects that come back from a file otherwise than they were written are noticed, and so is each field."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
import shapely

from darefine_qupath.annotations import Annotation
from darefine_qupath.errors import ProjectWriteError
from darefine_qupath.project.qpdata.verify import verify_objects

ONE, TWO = UUID(int=1), UUID(int=2)


def annotation(identity: UUID = ONE, **more: object) -> Annotation:
    return Annotation(id=identity, geometry=shapely.box(0, 0, 10, 10), measurements={"a": math.nan}, **more)  # type: ignore[arg-type]


def test_the_same_objects_pass() -> None:
    ours = [annotation(), annotation(TWO)]
    verify_objects(ours, [annotation(TWO, roi="Rectangle"), annotation(roi="Rectangle")], path=Path("x"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"geometry": shapely.box(0, 0, 10, 10.01)}, "another geometry"),
        ({"geometry": None}, "another geometry"),
        ({"path_class": "Tumor"}, "another path_class"),
        ({"locked": True}, "another locked"),
        ({"name": "x"}, "another name"),
        ({"parent": TWO}, "another parent"),
        ({"measurements": {"a": 1.0}}, "another measurements"),
        ({"measurements": {}}, "another measurements"),
        ({"metadata": {"a": "b"}}, "another metadata"),
        ({"class_probability": 0.5}, "another class_probability"),
        ({"id": TWO}, "1 objects were written and 1 read back"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_object_that_changed_is_noticed(change: dict[str, object], match: str) -> None:
    with pytest.raises(ProjectWriteError, match=match):
        verify_objects([annotation()], [replace(annotation(), **change)], path=Path("x"))  # type: ignore[arg-type]


def test_missing_and_doubled_objects_are_noticed() -> None:
    one, two = annotation(), annotation(TWO)
    for found in ([one], [one, one], [one, two, two], []):
        with pytest.raises(ProjectWriteError, match="objects were written"):
            verify_objects([one, two], found, path=Path("x"))


def test_a_changed_roi_type_is_noticed_where_it_was_known() -> None:
    with pytest.raises(ProjectWriteError, match="another roi"):
        verify_objects([annotation(roi="Rectangle")], [annotation(roi="Polygon")], path=Path("x"))
