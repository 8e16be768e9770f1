"""Options that several commands share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from darefine_qupath.geometry import MPP_LIMITS

__all__ = [
    "COUNT",
    "WHOLE",
    "FiniteRange",
    "annotators_option",
    "engine_option",
    "image_option",
    "mpp_option",
    "project_argument",
    "setting",
    "settings_option",
    "whole_number",
]


class FiniteRange(click.FloatRange):
    """A range of numbers without NaN and infinity, which `click.FloatRange` lets through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        """Read a number."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


WHOLE = click.IntRange(max=(1 << 31) - 1)
"""A whole number that fits the columns of any library; its owner knows the least and the most that make sense."""
COUNT = click.IntRange(1, WHOLE.max)
"""Such a number from 1."""

project_argument = click.argument("project", type=click.Path(path_type=Path))
"""A project file or its folder; the engine says what is wrong with it."""

engine_option = click.option(
    "--engine",
    type=click.Choice(["auto", "embedded", "paquo"]),
    default="auto",
    show_default=True,
    help="auto takes QuPath through paquo where it is installed, else the embedded engine.",
)
image_option = click.option(
    "--image", "images", multiple=True, metavar="NAME", help="Only this image (name or entry id); may be repeated."
)
mpp_option = click.option(
    "--mpp",
    type=FiniteRange(*MPP_LIMITS),
    help="Micrometres per pixel of every slide, over project and file.",
)
annotators_option = click.option(
    "--annotator",
    "annotators",
    multiple=True,
    metavar="NAME",
    help="Only annotations imported as this annotator's, - for those of none; may be repeated.",
)
settings_option = click.option(
    "--settings", type=click.Path(path_type=Path), help="Settings file; darefine.toml beside the project by default."
)


def whole_number(text: str) -> int | None:
    """Read a number of at most nine digits, 0 to 9 and no others; None where the text is none."""
    return int(text) if len(text) <= 9 and text.isascii() and text.isdigit() else None


def setting(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """Turn ``key=value`` words into a table, numbers and true/false into what they mean."""
    table: dict[str, Any] = {}
    for word in values:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{word!r} is not key=value")
        table[key.strip().replace("-", "_")] = _value(text.strip())
    return table


def _value(text: str) -> Any:  # noqa: ANN401 - what TOML would make of it
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float) if text.isascii() else ():
        try:
            number = kind(text)
        except ValueError:
            continue
        if not math.isfinite(number):
            raise click.BadParameter(f"{text!r} is not a finite number")
        return number
    if "," in text:
        return [_value(part) for part in text.split(",") if part]
    return text
