"""Read numbers, colors and texts as other programs write them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping

from darefine_qupath.classes import Color
from darefine_qupath.errors import ClassMapError, ExchangeError

__all__ = ["band_color", "hex_color", "number", "plain_text", "scalars", "short_json"]


def number(text: str | None, item: str) -> float:
    """Read a coordinate; some writers use a decimal comma.

    Raises
    ------
    ExchangeError
        If it is none.
    """
    try:
        value = float((text or "").strip().replace(",", "."))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ExchangeError(f"{item} has {text!r} where a number should be")
    return value


def hex_color(text: str | None) -> Color | None:
    """Color that is written as ``#rrggbb``; None for anything else."""
    try:
        return Color.from_hex((text or "").strip())
    except ClassMapError:
        return None


def band_color(value: object) -> Color | None:
    """Color that is written as a list of red, green and blue; None for anything else."""
    if not isinstance(value, (list, tuple)) or len(value) < 3 or not all(isinstance(band, int) for band in value[:3]):
        return None
    return Color(*(min(max(int(band), 0), 255) for band in value[:3]))


def plain_text(value: str | float) -> str:
    """Text of a value; a table program writes 2.0 for the label 2."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def scalars(properties: Mapping[str, object], without: Iterable[str] = ()) -> dict[str, str]:
    """Texts and numbers among the properties of an object: what may be its class."""
    skipped = frozenset(without)
    return {
        name: plain_text(value)
        for name, value in properties.items()
        if name not in skipped and isinstance(value, (str, int, float)) and str(value).strip()
    }


def short_json(value: object) -> str:
    """Beginning of a value as JSON; not all of it, which may be as large as it likes."""
    if isinstance(value, (list, dict)) and value:
        return "a list" if isinstance(value, list) else f"an object of {', '.join(map(short_json, list(value)[:3]))}"
    text = json.dumps(value[:40] if isinstance(value, str) else value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."
