"""Fingerprint annotations by their content, and by the details that a person edits beside it."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import numpy as np
import shapely
from numpy.typing import NDArray

from darefine_qupath.annotations import Annotation
from darefine_qupath.exchange.shapes import on_grid

__all__ = ["contents", "details_of", "digest"]

_OUR_METADATA = "darefine."


def contents(records: Sequence[Annotation]) -> list[str]:
    """Fingerprint annotations by kind, class, plane and geometry, not by their ids or order.

    Parameters
    ----------
    records : sequence of Annotation
        As they are stored or read back.

    Returns
    -------
    list of str
        Equal where the annotations are the same at QuPath's precision.
    """
    geometries = np.array([record.geometry for record in records], object)
    stored = shapely.normalize(shapely.transform(shapely.force_2d(geometries), _as_stored))
    shapes = shapely.to_wkb(stored, byte_order=1)
    return [
        digest(f"{record.kind}|{record.path_class}|{tuple(record.plane)}|", 16, shape or b"")
        for record, shape in zip(records, shapes.tolist(), strict=True)
    ]


def _as_stored(coordinates: NDArray[np.float64]) -> NDArray[np.float64]:
    # QuPath keeps corners as 32-bit numbers: this gives the same for a coordinate and for what is read back of it.
    with np.errstate(over="ignore"):
        return on_grid(coordinates).astype(np.float32).astype(np.float64)


def details_of(record: Annotation) -> str:
    """Fingerprint of what a person changes in an object beside its content; measurements are QuPath's."""
    others = sorted((key, text) for key, text in record.metadata.items() if not key.startswith(_OUR_METADATA))
    return digest(repr((record.name, record.locked, record.color, others)), 8)


def digest(text: str, length: int, data: bytes = b"") -> str:
    """First digits of the SHA-256 of a text, and of the bytes that follow it."""
    return sha256(text.encode("utf-8", "surrogatepass") + data).hexdigest()[:length]
