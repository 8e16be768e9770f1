"""Compare geometries, records and nodes: what is the same, down to the last number or byte."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from operator import attrgetter
from typing import Any

from shapely.geometry.base import BaseGeometry

from darefine_qupath.annotations import Annotation
from darefine_qupath.javaserial.descriptors import ClassDesc, ProxyDesc
from darefine_qupath.javaserial.nodes import Aborted, JavaArray, JavaClass, JavaEnum, JavaObject
from darefine_qupath.javaserial.packed import Template, is_packed
from darefine_qupath.javaserial.strings import JavaString
from darefine_qupath.project.qpdata.hierarchy import ObjectParts

__all__ = ["NodeComparison", "changed_field", "same_geometry", "same_numbers", "same_roi", "same_value"]


def same_geometry(ours: BaseGeometry | None, theirs: BaseGeometry | None) -> bool:
    """Whether geometries have the same coordinates in the same order."""
    if ours is None or theirs is None:
        return ours is theirs
    return ours is theirs or bool(ours.equals_exact(theirs, 0) and ours.geom_type == theirs.geom_type)


def same_roi(record: Annotation, former: Annotation | None) -> bool:
    """Whether a record has the ROI that its former one had."""
    return former is not None and record.plane == former.plane and same_geometry(record.geometry, former.geometry)


def same_value(one: object, two: object) -> bool:
    """Whether values are equal; NaN equals NaN."""
    return one == two or (isinstance(one, float) and isinstance(two, float) and math.isnan(one) and math.isnan(two))


def same_numbers(ours: Mapping[str, object], theirs: Mapping[str, object]) -> bool:
    """Whether mappings (measurements, metadata) hold the same values in the same order; NaN equals NaN."""
    return list(ours) == list(theirs) and all(map(same_value, ours.values(), theirs.values()))


# The kind of ROI is QuPath's to choose where a record leaves it open.
_PLAIN = tuple(
    item.name
    for item in fields(Annotation)
    if item.name not in ("geometry", "nucleus", "roi", "measurements", "metadata")
)
_plain_values = attrgetter(*_PLAIN)


def changed_field(ours: Annotation, theirs: Annotation) -> str | None:
    """Name the first field in which a record that was read back differs; None where none does."""
    for name in ("geometry", "nucleus"):
        if not same_geometry(getattr(ours, name), getattr(theirs, name)):
            return name
    if ours.roi is not None and ours.roi != theirs.roi:
        return "roi"
    if _plain_values(ours) != _plain_values(theirs):
        for name in _PLAIN:
            if not same_value(getattr(ours, name), getattr(theirs, name)):
                return name
    for name in ("measurements", "metadata"):
        if not same_numbers(getattr(ours, name), getattr(theirs, name)):
            return name
    return None


class NodeComparison:
    """Compares nodes of two streams by what they hold, and by what they share."""

    def __init__(self) -> None:
        self.partners: dict[int, object] = {}
        """Nodes of the other stream, by ids of those of the one that were found the same."""
        self.kept: list[object] = []
        """Nodes that were compared: while they live, none of their ids is given away."""
        self.forms: dict[tuple[Template, Template], bool] = {}

    def assume_same(self, one: object, two: object) -> None:
        """Do not look into these again."""
        self.partners[id(one)] = two

    def same_object(self, one: JavaObject, two: JavaObject) -> bool:
        """Whether objects of the hierarchy are the same but for their children."""
        if is_packed(one) and is_packed(two) and self._same_form(one.template, two.template):  # type: ignore[attr-defined]
            return bool(one.gaps == two.gaps)  # type: ignore[attr-defined]
        return self.same((one.desc, _own(one)), (two.desc, _own(two)))

    def _same_form(self, one: Template, two: Template) -> bool:
        known = self.forms.get((one, two))
        if known is None:
            known = self.forms[one, two] = (
                _blanked(one) == _blanked(two)
                and len(one.references) == len(two.references)
                and all(
                    ours[:2] == theirs[:2] and self.same(ours.node, theirs.node)
                    for ours, theirs in zip(one.references, two.references, strict=True)
                )
            )
        return known

    def same(self, one: object, two: object) -> bool:
        """Whether values are the same, and all that they refer to."""
        pending = [(one, two)]
        while pending:
            ours, theirs = pending.pop()
            if isinstance(ours, tuple):
                if not isinstance(theirs, tuple) or len(ours) != len(theirs):
                    return False
                pending.extend(zip(ours, theirs, strict=True))
            elif ours is None or isinstance(ours, (bytes, str, int)):
                if ours.__class__ is not theirs.__class__ or ours != theirs:
                    return False
            elif id(ours) in self.partners:
                if self.partners[id(ours)] is not theirs:
                    return False
            else:
                self.partners[id(ours)] = theirs
                self.kept += (ours, theirs)
                if _node_class(ours) is not _node_class(theirs):
                    return False
                pending.append((_values_of(ours), _values_of(theirs)))
        return True


def _own(node: JavaObject) -> tuple[Any, ...]:
    """Leave out the children of an object, and their number."""
    parts = ObjectParts(node)
    content = parts.content
    count: bytes = content[parts.first_child - 1]
    return (*content[: parts.first_child - 1], count[:-4], *content[parts.tail :])


def _blanked(template: Template) -> list[tuple[bytearray, int]]:
    """Shared bytes without the handles in them."""
    literals = template.literals()
    for part, offset, _ in template.references:
        literals[part][offset + 1 : offset + 5] = bytes(4)
    return list(zip(literals, [*(part.gap for part in template.parts), 0], strict=True))


def _node_class(node: object) -> type:
    return JavaObject if isinstance(node, JavaObject) else node.__class__


def _values_of(node: Any) -> tuple[Any, ...]:  # noqa: ANN401 - any node
    """All that makes a node what it is."""
    if isinstance(node, JavaString):
        return node.raw, node.is_long
    if isinstance(node, (JavaObject, JavaArray)):
        return node.desc, node.data
    if isinstance(node, JavaEnum):
        return node.desc, node.constant
    if isinstance(node, JavaClass):
        return (node.desc,)
    if isinstance(node, ClassDesc):
        fields = tuple((item.code, item.name, item.type) for item in node.fields)
        return node.name, node.uid, node.flags, fields, node.parent, node.annotation
    if isinstance(node, ProxyDesc):
        return node.interfaces, node.parent, node.annotation
    return (node.exception,) if isinstance(node, Aborted) else ()
