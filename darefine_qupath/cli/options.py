"""Declare the options that several commands share, and list options under headings in ``--help``."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from darefine_qupath.geometry import MPP_LIMITS

__all__ = [
    "COUNT",
    "WHOLE",
    "Command",
    "Engine",
    "FiniteRange",
    "annotators_option",
    "engine_option",
    "image_option",
    "mpp_option",
    "options",
    "project_argument",
    "setting",
    "settings_option",
    "whole_number",
]


Engine = Literal["auto", "embedded", "paquo"]

_OTHERS = "Other options"


class Command(click.Command):
    """A command whose ``--help`` lists options under the headings that `options` gave them."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, heading by heading."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if isinstance(param, click.Option) and record is not None:
                sections.setdefault(getattr(param, "heading", _OTHERS), []).append(record)
        for heading, records in sorted(sections.items(), key=lambda section: section[0] == _OTHERS):
            with formatter.section(heading):
                formatter.write_dl(records)


def options(heading: str, *decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Give a command the options of `click.option` decorators, under a heading of its ``--help``."""

    def decorate(function: Any) -> Any:  # noqa: ANN401 - click's decorators
        for decorator in reversed(decorators):
            function = decorator(function)
            function.__click_params__[-1].heading = heading
        return function

    return decorate


class FiniteRange(click.FloatRange):
    """A range of numbers without NaN and infinity, which `click.FloatRange` lets through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        """Read a number."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


class WholeNumber(click.ParamType[int]):
    """A whole number that fits the columns of any library, without the words of `click.IntRange` in every help."""

    name = "integer"

    def __init__(self, least: int | None = None) -> None:
        self._range = click.IntRange(least, (1 << 31) - 1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        """Read a number."""
        return self._range.convert(value, param, ctx)


WHOLE = WholeNumber()
"""A whole number; its owner knows the least and the most that make sense."""
COUNT = WholeNumber(1)
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
    help="Micrometres per pixel of every slide; overrides project and file.",
)
annotators_option = click.option(
    "--annotator",
    "annotators",
    multiple=True,
    metavar="NAME",
    help="Only annotations by this annotator, or - for those without one; may be repeated.",
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
