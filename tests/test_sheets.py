"""CSV that spreadsheet programs open without computing what is in it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from darefine_qupath.errors import ReviewError
from darefine_qupath.sheets import write_csv

STARTS = "=+-@\t\r＝＋－＠"
VALUES = st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(VALUES | st.tuples(st.sampled_from(STARTS), st.text()).map("".join), min_size=1, max_size=6))
def test_no_text_begins_like_a_formula_and_all_of_it_is_there(tmp_path: Path, row: list[object]) -> None:
    write_csv(tmp_path / "x.csv", ["=a"] * len(row), [row], ReviewError)
    with (tmp_path / "x.csv").open(encoding="utf-8", newline="") as file:
        header, cells = csv.reader(file)
    assert header == ["'=a"] * len(row)
    for value, cell in zip(row, cells, strict=True):
        if isinstance(value, str):
            assert cell in (value, f"'{value}")
            assert not cell.startswith(tuple(STARTS))
        else:
            assert cell == ("" if value is None else str(value))


def test_numbers_stay_numbers_and_text_stays_in_its_cell(tmp_path: Path) -> None:
    row = ["-2+3", -2.5, 1e-9, 'a";=1+1', "a\r\n=1+1", "x,=1", True, "\ud800"]
    write_csv(tmp_path / "x.csv", list("abcdefgh"), [row], ReviewError)
    written = (tmp_path / "x.csv").read_text(encoding="utf-8").partition("\n")[2].rstrip("\n")
    assert written == '"\'-2+3",-2.5,1e-09,"a"";=1+1","a\n=1+1","x,=1","True","\\ud800"'


def test_a_table_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ReviewError, match=r"x\.csv cannot be written: there is no folder"):
        write_csv(tmp_path / "none" / "x.csv", ["a"], [], ReviewError)
