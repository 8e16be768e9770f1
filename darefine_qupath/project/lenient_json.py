"""Read QuPath's JSON files leniently, and write JSON as QuPath's Gson does.

A byte order mark, bare ``NaN`` and ``Infinity`` are read; what was not changed comes out as the same bytes: keys keep
their order, numbers their spelling.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from darefine_qupath.errors import LimitError, ProjectFormatError
from darefine_qupath.limits import NOTES, check_depth

__all__ = ["LIMITS", "JsonObject", "json_bytes", "json_object", "parse_json"]

JsonObject = dict[str, Any]

LIMITS = replace(NOTES, file_bytes=256 << 20)
"""A project of 100,000 images takes less."""

_BOM = b"\xef\xbb\xbf"


class _Number(float):
    """A number that remembers how it was spelled."""

    text: str

    def __new__(cls, text: str) -> _Number:
        number = super().__new__(cls, text)
        number.text = text
        return number


def _integer(text: str) -> int | _Number:
    # Python refuses to convert thousands of digits, and -0 is not 0; such a number is kept as its text.
    return int(text) if len(text) < 300 and text != "-0" else _Number(text)


def parse_json(data: bytes, path: Path) -> Any:  # noqa: ANN401 - JSON is any value
    """Read JSON as QuPath's lenient reader does.

    Parameters
    ----------
    data : bytes
        Content of the file.
    path : Path
        The file, for messages.

    Returns
    -------
    object
        Plain values; a number with a fraction remembers its spelling.

    Raises
    ------
    ProjectFormatError
        With file and byte offset.
    """
    start = len(_BOM) if data.startswith(_BOM) else 0
    try:
        text = data[start:].decode()
        check_depth(data, LIMITS)
        return json.loads(text, parse_float=_Number, parse_int=_integer)
    except UnicodeDecodeError as error:
        raise ProjectFormatError("this is not UTF-8 text", path=path, offset=start + error.start) from None
    except json.JSONDecodeError as error:
        offset = start + len(text[: error.pos].encode())
        raise ProjectFormatError(f"this is not JSON: {error.msg}", path=path, offset=offset) from None
    except (RecursionError, LimitError):
        raise ProjectFormatError("this JSON is nested too deeply", path=path, offset=start) from None


class MisplacedValueError(Exception):
    """A value of a JSON file is not what it should be.

    Parameters
    ----------
    message : str
        What is wrong.
    keys : str or int
        The way to the value, from the outside in.
    """

    def __init__(self, message: str, *keys: str | int) -> None:
        super().__init__(message)
        self.message = message
        self.keys = keys


@contextlib.contextmanager
def locating(data: bytes, path: Path) -> Iterator[None]:
    """Turn a `MisplacedValueError` into a `ProjectFormatError` that names the file and the place of the value."""
    try:
        yield
    except MisplacedValueError as error:
        raise ProjectFormatError(error.message, path=path, offset=_offset_of(data, error.keys)) from None


def _offset_of(data: bytes, keys: Sequence[str | int]) -> int:
    """Byte offset of a value in a JSON file; where a key is missing, of the object that should have it."""
    start = len(_BOM) if data.startswith(_BOM) else 0
    text = data[start:].decode()
    position = _after_blanks(text, 0)
    for key in keys:
        inner = _position_of(text, position, key)
        if inner is None:
            break
        position = inner
    return start + len(text[:position].encode())


def _after_blanks(text: str, position: int) -> int:
    while text[position : position + 1] in tuple(" \t\r\n"):
        position += 1
    return position


def _position_of(text: str, position: int, key: str | int) -> int | None:
    """Find an item of the object or array at `position`; of a key that is there twice the last, as it is read."""
    decoder = json.JSONDecoder(parse_int=str)  # Python refuses to convert thousands of digits
    found = None
    index: str | int = -1
    is_object = text[position] == "{"
    if text[position] not in "{[":
        return None
    position = _after_blanks(text, position + 1)
    while text[position] not in "}]":
        if is_object:
            index, position = decoder.raw_decode(text, position)
            position = _after_blanks(text, _after_blanks(text, position) + 1)
        else:
            index = int(index) + 1
        if index == key:
            found = position
        position = _after_blanks(text, decoder.raw_decode(text, position)[1])
        if text[position] == ",":
            position = _after_blanks(text, position + 1)
    return found


# Gson escapes what could end a script element, and we what UTF-8 cannot hold: half a surrogate pair.
_ESCAPES = {code: f"\\u{code:04x}" for code in (*range(0x20), *map(ord, "<>&='\u2028\u2029"), *range(0xD800, 0xE000))}
_ESCAPES |= {ord(char): f"\\{letter}" for char, letter in zip('\t\b\n\r\f"\\', 'tbnrf"\\', strict=True)}


def _java_double(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    sign = "-" if math.copysign(1, value) < 0 else ""
    exact = Decimal(repr(abs(value)))
    if value == 0 or Decimal("1e-3") <= exact < Decimal("1e7"):
        text = format(exact, "f")
        return sign + (text if "." in text else f"{text}.0")
    digits = "".join(map(str, exact.as_tuple().digits)).rstrip("0")
    return f"{sign}{digits[0]}.{digits[1:] or '0'}E{exact.adjusted()}"


def scalar_text(value: object) -> str:
    if isinstance(value, str):
        return f'"{value.translate(_ESCAPES)}"'
    if isinstance(value, _Number):
        return value.text
    if isinstance(value, float):
        return _java_double(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _encode(value: object, newline: str) -> str:
    """Encode `value`; `newline` is the line break with the present indentation, empty for compact text."""
    deeper = f"{newline}  " if newline else ""
    if isinstance(value, Mapping):
        colon = ": " if newline else ":"
        items = [f"{scalar_text(str(key))}{colon}{_encode(item, deeper)}" for key, item in value.items()]
        opening, closing = "{", "}"
    elif isinstance(value, list | tuple):
        items = [_encode(item, deeper) for item in value]
        opening, closing = "[", "]"
    else:
        return scalar_text(value)
    if not items:
        return opening + closing
    return f"{opening}{deeper}{f',{deeper}'.join(items)}{newline}{closing}"


def json_bytes(value: object, *, pretty: bool = True) -> bytes:
    """Write JSON as QuPath does.

    Parameters
    ----------
    value : object
        Plain values.
    pretty : bool, optional
        Two spaces of indentation, or everything on one line.

    Returns
    -------
    bytes
        UTF-8 without a line break at the end.
    """
    return _encode(value, "\n" if pretty else "").encode()


def json_object(text: str) -> JsonObject | None:
    """Parse a text in which control characters may stand; None where it is no JSON object."""
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
