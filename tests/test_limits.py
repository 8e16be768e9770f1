"""Files that ask for too much, and what is said of them."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path

import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from darefine_qupath.errors import ExchangeError, GeometryError, LimitError, ProjectFormatError
from darefine_qupath.limits import (
    DATA,
    NOTES,
    Budget,
    Limits,
    check_values,
    naming,
    parse_json,
    parse_toml,
    read_file,
)

SMALL = Limits(file_bytes=100, depth=5, steps=10, seconds=60)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text('[]{}\\"a'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text('[]{}\\"a'), inner),
)


def depth_of(value: object) -> int:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return isinstance(value, (dict, list)) + max(map(depth_of, inner), default=0)


@given(VALUES, st.booleans())
def test_json_is_read_as_deep_as_the_limit_and_no_deeper(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    depth = depth_of(value)
    at_most = Limits(file_bytes=1, depth=depth, steps=1, seconds=1)
    assert parse_json(text, at_most) == value
    assert parse_json(text.encode(), at_most) == value
    if depth:
        less = Limits(file_bytes=1, depth=depth - 1, steps=1, seconds=1)
        with pytest.raises(LimitError, match=f"nested more than {depth - 1} levels"):
            parse_json(text.encode(), less)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 900 + "]" * 900, "nested more than 100 levels"),
        ('{"a":' * 100_000, "nested more than 100 levels"),
        ("9" * 5000, "digits"),
        ("[NaN]", "NaN where a finite number"),
        ("[-Infinity]", "-Infinity where a finite number"),
        (r'{"\ud800": 1}', "lone surrogate"),
        (r'"\uDFFF"', "lone surrogate"),
        ('{"a": "', "not valid JSON"),
        (b"\xff\xfe", "not utf-8 text"),
        (b"", "not valid JSON"),
    ],
)
def test_hostile_json_is_one_named_line(text: str | bytes, said: str) -> None:
    with pytest.raises(ExchangeError, match=f"^x.json: .*{said}") as caught, naming("x.json", ExchangeError):
        parse_json(text, NOTES)
    assert "\n" not in str(caught.value)


def test_what_qupath_writes_may_be_asked_for() -> None:
    assert parse_json("[Infinity]", NOTES, non_finite=True) == [float("inf")]
    assert parse_json(rb'["\ud800"]', NOTES, half_characters=True) == ["\ud800"]
    assert parse_json(b'\xef\xbb\xbf["\\ud83d\\ude00"]', NOTES) == ["\U0001f600"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"a = " + b"[" * 900 + b"]" * 900, "nested"),
        (b"[" + b".".join([b"a"] * 900) + b"]", "key of more than 16 parts"),
        (b"a = " + b"9" * 5000, "digits"),
        (b"\n".join([b'\'a.b\' . "c\\".d"' + b".e" * 15 + b" = 1"]), "key of more than 16 parts"),
        (b"a = " + b'"\\' * 100_000, "not valid TOML"),
        (b"a = nan", "finite"),
        (b"a = [1, -inf]", "finite"),
        (b"a = ", "not valid TOML"),
        (b"a = '\xff'", "not utf-8 text"),
    ],
)
def test_hostile_toml_is_one_named_line(text: bytes, said: str) -> None:
    with pytest.raises(ExchangeError, match=f"^x.toml: .*{said}"), naming("x.toml", ExchangeError):
        parse_toml(text, NOTES)


def test_values_are_counted() -> None:
    with pytest.raises(LimitError, match="more than 10 steps"):
        check_values([0] * 10, SMALL)
    check_values([0] * 9, SMALL)


def test_only_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert len(read_file(tmp_path / "a", SMALL)) == 100
    (tmp_path / "b").write_bytes(b"x" * 101)
    with pytest.raises(LimitError, match="larger than 100 bytes"):
        read_file(tmp_path / "b", SMALL)
    with pytest.raises(ExchangeError, match="none: it cannot be read"), naming(tmp_path / "none", ExchangeError):
        read_file(tmp_path / "none", SMALL)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here")
def test_a_pipe_and_a_device_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(LimitError, match="not a regular file"):
            read_file(path, DATA)


def test_a_budget_bounds_steps_depth_and_time() -> None:
    budget = Budget(SMALL)
    budget.spend(10)
    with pytest.raises(LimitError, match="more than 10 steps"):
        budget.spend()
    with pytest.raises(LimitError, match="nested more than 5 levels"):
        descend(Budget(SMALL))
    late = Budget(Limits(file_bytes=1, steps=10, seconds=0))
    time.sleep(0.001)
    with pytest.raises(LimitError, match="longer than 0 s"):
        late.spend()


def descend(budget: Budget) -> None:
    with budget.deeper():
        descend(budget)


def raise_(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    "happens",
    [
        lambda: {}["a"],
        lambda: None.a,  # type: ignore[attr-defined]
        lambda: 1 + "a",  # type: ignore[operator]
        lambda: float(10**400),
        lambda: struct.unpack("i", b""),
        lambda: "\ud800".encode(),
        lambda: shapely.from_wkt("POLYGON ((0 0"),
        lambda: raise_(RecursionError()),
        lambda: raise_(MemoryError()),
        lambda: raise_(OSError(28, "No space\nleft")),
        lambda: raise_(GeometryError("A box")),
        lambda: raise_(Exception("a library's own\nkind")),
    ],
)
def test_whatever_happens_gets_the_name_of_file_and_object(happens: object) -> None:
    with (
        pytest.raises(ProjectFormatError, match=r"^x\.qpdata: object 3: ") as caught,
        naming("x.qpdata", ProjectFormatError),
        naming("object 3", ProjectFormatError),
    ):
        happens()  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_what_has_a_name_keeps_it_and_a_stop_is_a_stop() -> None:
    with pytest.raises(ExchangeError, match=r"^a.xml is odd$"), naming("a.xml", ProjectFormatError):
        raise ExchangeError("a.xml is odd")
    with pytest.raises(KeyboardInterrupt), naming("a.xml", ExchangeError):
        raise KeyboardInterrupt
