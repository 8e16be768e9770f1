"""Print what commands found: tables, or one JSON object where it is asked for.

Standard output carries results, standard error everything else, so that ``--json`` can be piped.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from darefine_qupath.cli.lines import UNSEEN, note, say, visible
from darefine_qupath.errors import DarefineError

__all__ = [
    "OPEN_IN_QUPATH",
    "Failures",
    "echo_json",
    "json_option",
    "note",
    "number",
    "percent",
    "say",
    "table",
]

OPEN_IN_QUPATH = (
    "If an image is open in QuPath, do not save it there: use File > Reload data. QuPath's Save would overwrite what "
    "was written."
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")


def echo_json(value: Any) -> None:  # noqa: ANN401 - any JSON value
    """Print one JSON object; a NaN becomes null, for strict readers."""
    text = json.dumps(_plain(value), ensure_ascii=False, indent=2)
    # Line ends are ours: inside of texts they are escapes already. All others are the same JSON as escapes.
    text = "\n".join(UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", line) for line in text.split("\n"))
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        # A pipe on Windows has the encoding of the region; escapes are the same JSON in any.
        text = json.dumps(_plain(value), indent=2)
    click.echo(text)


def _plain(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return value.item() if hasattr(value, "item") else str(value)


class Failures:
    """What could not be dealt with while the rest was: said at once, and the command ends with exit code 2."""

    def __init__(self) -> None:
        self._found: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, name: str, error: DarefineError) -> None:
        """Say that an image, or a file, failed."""
        self._found[name] = str(error)
        note(f"Error: {name}: {error}")

    def to_json(self) -> dict[str, dict[str, str]]:
        """Return what failed by name; nothing where nothing did."""
        return {"errors": self._found} if self._found else {}

    def end(self) -> None:
        """End the command, which failed if anything did."""
        if self._found:
            raise click.exceptions.Exit(2)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table; a column of numbers is right-aligned, all but the first."""
    if title is not None:
        say(title)
    rows = [[visible(cell) for cell in row] for row in rows]
    grid = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for index, column in enumerate(columns):
        is_text = index == 0 or any(cell[:1].isalpha() for cell in (row[index] for row in rows))
        grid.add_column(visible(column), justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    # A pipe has no width; a table must not be cut there.
    console = Console(highlight=False)
    width = console.width if console.is_terminal else 200
    Console(highlight=False, width=width, markup=False).print(grid)


def number(value: float | None, digits: int = 3) -> str:
    """Write a number for a table; a dash for None and NaN."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """Write a share for a table."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f} %"
