"""Summarize an image as QuPath does in the ``summary.json`` beside each ``data.qpdata``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from darefine_qupath.javaserial.values import hash_order
from darefine_qupath.project.qpdata.build import is_detection
from darefine_qupath.project.qpdata.document import Document

__all__ = ["summarize"]


_SUMMARY_NAMES = {
    "annotation": "Annotations",
    "detection": "Detections",
    "cell": "Cells",
    "tile": "Tiles",
    "tma core": "TMA cores",
}


def _counts(names: Iterable[str]) -> dict[str, int]:
    """Count, in the order in which Java's HashMap gives the names."""
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return {name: counts[name] for name in hash_order(counts)}


def summarize(document: Document, *, size: tuple[int, int] | None = None, timestamp_ms: int) -> dict[str, Any]:
    """``summarize.json`` of an image, as QuPath writes it.

    Parameters
    ----------
    document : Document
        The image.
    size : tuple of int, optional
        Width and height, where the file does not say.
    timestamp_ms : int
        Milliseconds since 1970.

    Returns
    -------
    dict
        Plain JSON values.
    """
    tally = document.tally
    kinds = ["Root objects", *(_SUMMARY_NAMES[kind] for kind, _ in tally)]
    annotations = [path_class or "Unclassified" for kind, path_class in tally if kind == "annotation"]
    detections = [path_class or "Unclassified" for kind, path_class in tally if is_detection(kind)]
    server = _server_summary(document.items.server or {}, size)
    return {
        "timestamp": timestamp_ms,
        "imageType": document.items.image_type,
        **({} if server is None else {"server": server}),
        "hierarchy": {
            "nObjects": len(kinds),
            "objectTypeCounts": _counts(kinds),
            "annotationClassificationCounts": _counts(annotations),
            "detectionClassificationCounts": _counts(detections),
        },
    }


def _server_summary(server: Mapping[str, Any], size: tuple[int, int] | None) -> dict[str, int] | None:
    metadata = server.get("metadata")
    known = metadata if isinstance(metadata, Mapping) else {}
    width, height = size or (known.get("width"), known.get("height"))
    if not isinstance(width, int) or not isinstance(height, int):
        return None
    channels = known.get("channels")
    num_channels = len(channels) if isinstance(channels, list) else 3
    stack = {key: known[key] if isinstance(known.get(key), int) else 1 for key in ("sizeZ", "sizeT")}
    return {"width": width, "height": height, "sizeC": num_channels, **stack}
