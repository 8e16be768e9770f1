"""Write tables as CSV whose cells no spreadsheet program takes for formulas."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from darefine_qupath.errors import DarefineError
from darefine_qupath.filesystem import atomic_write

__all__ = ["write_csv"]

# OWASP's list ("CSV Injection"), with the wide forms that Excel reads alike.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]], error: type[DarefineError]) -> None:
    """Write a table as CSV (UTF-8), whole or not at all.

    Text that a spreadsheet would take for a formula gets an apostrophe before it, and all text stands in quotes, so
    that no text begins a cell of its own. Numbers stay numbers, negative ones too; None is an empty cell.

    Parameters
    ----------
    path : Path
        The file.
    columns : sequence of str
        What stands above the columns.
    rows : iterable of sequence
        Text, numbers and None.
    error : type of DarefineError
        Raised where the file cannot be written.

    Raises
    ------
    DarefineError
        `error`, with path and reason.
    """
    with (
        atomic_write(path, error) as temporary,
        # Half a character (of a name that was damaged) is written as an escape.
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow([_cell(name) for name in columns])
        writer.writerows([_cell(value) for value in row] for row in rows)


def _cell(value: object) -> object:
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    text = str(value)
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text
