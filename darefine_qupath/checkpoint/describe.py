"""Describe a model for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from darefine_qupath.checkpoint.header import CheckpointHeader
from darefine_qupath.checkpoint.model_file import Checkpoint, read_header
from darefine_qupath.models import Normalization
from darefine_qupath.tiles.spec import TileSpec

__all__ = ["describe"]


def describe(source: Checkpoint | CheckpointHeader | Path | str) -> str:
    """Text about a model, for people, several lines long."""
    if isinstance(source, Path | str):
        source = read_header(source)
    header = source.header if isinstance(source, Checkpoint) else source
    lines = [
        ("model", header.model_id),
        ("network", header.model.title),
        ("weights", f"{header.num_parameters / 1e6:.2f} million values, sha256 {header.weights_sha256[:16]}"),
        ("classes", ", ".join(f"{label} {name}" for label, name in enumerate(header.classes.names))),
        ("tiles", _tiles_text(header.tiles)),
        ("input", _normalization_text(header.normalization)),
        *((key, _value_text(value)) for key, value in header.provenance.items()),
    ]
    width = max(len(key) for key, _ in lines)
    return "\n".join(f"{key:<{width}}  {text}" for key, text in lines)


def _tiles_text(tiles: TileSpec) -> str:
    unit = "um" if tiles.is_physical else "px"
    sides = [getattr(tiles, f"{name}_{unit}") for name in ("slice", "context", "stride")]
    shown = "slice {:g}, context {:g}, stride {:g}".format(*sides)
    fed = f"{tiles.input_px} and {tiles.context_input_px or tiles.input_px} px"
    return f"{shown} {unit if unit == 'um' else 'level-0 px'}, fed as {fed}, {tiles.placement}"


def _normalization_text(normalization: Normalization) -> str:
    shown = f"mean {_numbers(normalization.mean)}, std {_numbers(normalization.std)}"
    context = normalization.context
    return shown if context is None else f"slice {shown}; context {_normalization_text(context)}"


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def _value_text(value: object) -> str:
    if isinstance(value, Mapping) and isinstance(value.get("files"), Mapping):
        value = {**value, "files": len(value["files"])}
    return value if isinstance(value, str) else json.dumps(value)
