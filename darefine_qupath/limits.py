"""Bound what files may ask for, and name the file in whatever goes wrong while it is read.

Files come from other programs, other people and half-finished copies. Every parser reads them so::

    with naming(path, ExchangeError):
        budget = Budget(DATA)
        data = parse_json(read_file(path, DATA), DATA)
        for index, item in enumerate(data):
            with naming(f"object {index}", ExchangeError):
                budget.spend()

Nothing inside `naming` leaves it as anything but the named error, in one line: neither a number of 5,000 digits nor a
list nested 900 deep, a pipe where a file should be, a missing key or a geometry that GEOS refuses.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from darefine_qupath.errors import DarefineError, LimitError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "DATA",
    "NOTES",
    "Budget",
    "Limits",
    "check_depth",
    "check_values",
    "naming",
    "open_file",
    "parse_json",
    "parse_toml",
    "proper_text",
    "read_file",
    "require_finite",
    "spoken",
    "whole_text",
    "wording",
]

_log = logging.getLogger(__name__)

_BOM = b"\xef\xbb\xbf"
_MAX_WORDS = 300
_MAX_DIGITS = 400
# Nobody writes that many settings, and the reader takes the square of a key's parts.
_LARGEST_TOML = 1 << 20
_MOST_KEY_PARTS = 16
_TOML_TEXTS = re.compile(
    rb'''"""(?:[^\\]|\\.)*?(?:"""|\Z)|\'{3}.*?(?:\'{3}|\Z)|"(?:[^"\\\n]|\\.)*"?|'[^'\n]*'?|\#[^\n]*''', re.DOTALL
)
_TOML_ENDS = re.compile(rb"[=,\n{}\[\]]")
_BRACKETS = b"[{]}"
_OTHERS = bytes(set(range(256)) - set(_BRACKETS))
_MAY_BE_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one file may ask for."""

    file_bytes: int
    """Size of the file, and of anything that is unpacked from it."""
    depth: int = 100
    """Levels of nesting: lists in lists, objects in objects, XML elements in elements."""
    steps: int
    """Values, objects, vertices or whatever the parser counts with `Budget.spend`."""
    seconds: float
    """Time to read it; the last resort where steps differ in price."""


DATA = Limits(file_bytes=4 << 30, steps=200_000_000, seconds=600)
"""For what people draw and measure: annotation files, ``data.qpdata``."""
NOTES = Limits(file_bytes=64 << 20, steps=4_000_000, seconds=60)
"""For what programs say about files: settings, headers, indices, run records."""


class Budget:
    """What one file has asked for so far.

    Parameters
    ----------
    limits : Limits
        What it may ask for.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.steps = 0
        self.depth = 0
        self._until = time.monotonic() + limits.seconds

    def spend(self, count: int = 1) -> None:
        """Count steps, before they are taken.

        Raises
        ------
        LimitError
            If they are too many together, or took too long.
        """
        self.steps += count
        if self.steps > self.limits.steps:
            raise LimitError(f"it asks for more than {self.limits.steps:,} steps of work")
        if time.monotonic() > self._until:
            raise LimitError(f"reading it takes longer than {self.limits.seconds:g} s")

    @contextmanager
    def deeper(self) -> Iterator[None]:
        """Go one level down, for parsers that call themselves.

        Raises
        ------
        LimitError
            If that is too deep.
        """
        if self.depth >= self.limits.depth:
            _refuse_depth(self.limits)
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1


@contextmanager
def naming(where: object, error: type[DarefineError]) -> Iterator[None]:
    """Turn whatever happens inside into one line that says where.

    Parameters
    ----------
    where : object
        A file, or an object in it ("feature 3"); these may stand in each other.
    error : type of DarefineError
        Raised for what has no name yet. What already names the place passes as it is.

    Raises
    ------
    DarefineError
        Always of this tree. Ctrl-C and warnings pass.
    """
    try:
        yield
    except Warning:
        raise
    except DarefineError as problem:
        if str(where) in str(problem):
            raise
        raise error(f"{where}: {problem}") from problem
    except Exception as problem:
        raise error(f"{where}: {spoken(problem)}") from problem


@contextmanager
def wording(error: type[DarefineError]) -> Iterator[None]:
    """Turn whatever happens inside into one line, for a caller that says of which image it is.

    Parameters
    ----------
    error : type of DarefineError
        Raised for what has no name yet; errors of this tree pass as they are.

    Raises
    ------
    DarefineError
        Always of this tree. Ctrl-C and warnings pass.
    """
    try:
        yield
    except (DarefineError, Warning):
        raise
    except Exception as problem:
        _log.debug("What was behind it:", exc_info=True)
        raise error(spoken(problem)) from problem


def spoken(problem: BaseException) -> str:
    """Say in one short line, for a person, what an exception of Python or of a library means."""
    if isinstance(problem, RecursionError):
        return "it is nested too deeply"
    if isinstance(problem, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(problem, KeyError):
        return f"{_short(repr(problem.args[0]) if problem.args else 'a value')} is missing"
    if isinstance(problem, UnicodeDecodeError):
        return f"it is not {problem.encoding} text (byte {problem.start})"
    if isinstance(problem, UnicodeEncodeError):
        return "it holds half a character (a lone surrogate), which no file can keep"
    if isinstance(problem, json.JSONDecodeError):
        return f"it is not valid JSON ({_short(str(problem))})"
    if isinstance(problem, tomllib.TOMLDecodeError):
        return f"it is not valid TOML ({_short(str(problem))})"
    if isinstance(problem, OSError) and problem.strerror:
        return f"it cannot be read ({_short(problem.strerror)})"
    if isinstance(problem, (TypeError, AttributeError)):
        return f"a value is of another type than it should be ({_short(str(problem))})"
    return _short(str(problem)) or type(problem).__name__


def _short(text: str) -> str:
    if "set_int_max_str_digits" in text:  # Python's words for a whole number that it does not read
        return "it holds a number of thousands of digits"
    line = " ".join(text.split())
    return line if len(line) <= _MAX_WORDS else f"{line[:_MAX_WORDS]}..."


def read_file(path: Path, limits: Limits) -> bytes:
    """Read a whole file, if it is one.

    Parameters
    ----------
    path : Path
        The file; links are followed.
    limits : Limits
        How large it may be.

    Returns
    -------
    bytes

    Raises
    ------
    LimitError
        If it is a pipe or a device, which may never end, or is too large.
    OSError
        If the system refuses.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        # Room is made for all that is asked for, and so no more is than the file seems to need.
        data = file.read(size + 1) if size <= limits.file_bytes else b""
        if len(data) > size:
            data += file.read(limits.file_bytes - len(data) + 1)
    if max(size, len(data)) > limits.file_bytes:
        raise LimitError(f"it is larger than {limits.file_bytes:,} bytes")
    return data


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, if it is one; nothing else is waited for.

    Parameters
    ----------
    path : Path
        The file; links are followed.

    Yields
    ------
    BinaryIO

    Raises
    ------
    LimitError
        If it is a pipe or a device, which may never end.
    OSError
        If the system refuses; a folder too.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise LimitError("it is not a regular file")
        yield file


def _without_waiting(path: str, flags: int) -> int:
    # A pipe would be opened only once somebody writes into it.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def parse_json(data: bytes | str, limits: Limits, *, non_finite: bool = False, half_characters: bool = False) -> Any:  # noqa: ANN401 - JSON is any value
    """Read JSON that may be hostile.

    Parameters
    ----------
    data : bytes or str
        UTF-8 text, with or without a byte order mark.
    limits : Limits
        How deeply it may be nested.
    non_finite : bool, optional
        Take NaN, Infinity and -Infinity, which QuPath writes, and whole numbers of thousands of digits, which become
        infinite; else they are refused. A number too large for a float (1e999) is infinite in either case.
    half_characters : bool, optional
        Take lone surrogates, for a caller that looks at each text with `proper_text`; else they are refused.

    Returns
    -------
    object
        Any JSON value.

    Raises
    ------
    ValueError
        If it is not JSON, is nested too deeply (`LimitError`), holds a whole number of thousands of digits, or what is
        not asked for.
    """
    coded = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    text = coded.removeprefix(_BOM).decode("utf-8", "surrogatepass" if isinstance(data, str) else "strict")
    check_depth(coded, limits)
    value = _loaded(text) if non_finite else json.loads(text, parse_constant=_refuse_constant)
    if not half_characters and (_MAY_BE_HALF.search(coded) or isinstance(data, str)):
        for found in _texts(value):
            proper_text(found)
    return value


def _loaded(text: str) -> Any:  # noqa: ANN401 - JSON is any value
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        # A call per number costs much, and next to no file needs it.
        return json.loads(text, parse_int=_whole_number)


def _whole_number(text: str) -> int | float:
    return int(text) if len(text) <= _MAX_DIGITS else math.copysign(math.inf, -1 if text.startswith("-") else 1)


def parse_toml(data: bytes, limits: Limits) -> dict[str, Any]:
    """Read TOML that may be hostile.

    Parameters
    ----------
    data : bytes
        UTF-8 text.
    limits : Limits
        How deeply it may be nested, and how many values it may hold.

    Returns
    -------
    dict
        The tables; every number is finite.

    Raises
    ------
    ValueError
        If it is not TOML, or goes beyond the limits.
    """
    if len(data) > _LARGEST_TOML:
        raise LimitError(f"it is larger than {_LARGEST_TOML:,} bytes")
    bare = _TOML_TEXTS.sub(b"", data)
    _check_brackets(bare, limits)
    if any(key.count(b".") >= _MOST_KEY_PARTS for key in _TOML_ENDS.split(bare)):
        raise LimitError(f"it has a key of more than {_MOST_KEY_PARTS} parts")
    tables = tomllib.loads(data.removeprefix(_BOM).decode())
    check_values(tables, limits)
    return tables


def check_values(value: object, limits: Limits) -> None:
    """Refuse tables and lists that are too deep or too many, numbers that are not finite, and half characters.

    Parameters
    ----------
    value : object
        Dictionaries, lists and what is in them.
    limits : Limits
        Depth and number of values.

    Raises
    ------
    ValueError
        If there is such a value.
    """
    budget = Budget(limits)
    for item, depth in _walk(value):
        budget.spend()
        if depth > limits.depth:
            _refuse_depth(limits)
        if isinstance(item, float) and not math.isfinite(item):
            raise ValueError(f"{item} where a finite number should be")
        if isinstance(item, str):
            proper_text(item)


def require_finite(settings: object, error: type[DarefineError], where: str = "") -> None:
    """Refuse NaN and infinity in a record of settings, wherever they come from.

    NaN passes every comparison that is asked the wrong way round, and infinity every lower bound.

    Parameters
    ----------
    settings : dataclass
        Its fields may be numbers, or lists of them.
    error : type of DarefineError
        What is raised.
    where : str, optional
        Stands before the name of the field.

    Raises
    ------
    DarefineError
        Of the type given; says the name and the value.
    """
    for item in fields(settings):  # type: ignore[arg-type]  # every caller gives a dataclass
        value = getattr(settings, item.name)
        numbers = value if isinstance(value, tuple | list) else (value,)
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            raise error(f"{where}{item.name} = {value} must be finite")


def proper_text(text: str) -> str:
    """Give the text back, if a file can keep it.

    Raises
    ------
    UnicodeEncodeError
        If it holds a lone surrogate.
    """
    text.encode()
    return text


def whole_text(text: str) -> str:
    """Give the text with every half of a character (a lone surrogate) replaced by U+FFFD, as QuPath shows it."""
    try:
        return proper_text(text)
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _walk(value: object) -> Iterator[tuple[object, int]]:
    """Give every value and key, with its depth, without calling itself."""
    waiting: list[tuple[object, int]] = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        yield item, depth
        if isinstance(item, dict):
            waiting.extend((part, depth + 1) for pair in item.items() for part in pair)
        elif isinstance(item, list):
            waiting.extend((part, depth + 1) for part in item)


def _texts(value: object) -> Iterator[str]:
    return (item for item, _ in _walk(value) if isinstance(item, str))


def check_depth(data: bytes, limits: Limits) -> None:
    """Look how deep the brackets of JSON go, outside of its strings, before a parser goes there.

    Parameters
    ----------
    data : bytes
        JSON.
    limits : Limits
        How deep they may go.

    Raises
    ------
    LimitError
        If that is too deep.
    """
    if data.count(b"[") + data.count(b"{") <= limits.depth:
        return
    # Escapes pair up from the left, so what is left of a quote after these two is a quote that begins or ends a string.
    bare = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    _check_brackets(b"".join(bare.split(b'"')[::2]), limits)


def _check_brackets(bare: bytes, limits: Limits) -> None:
    brackets = bare.translate(None, _OTHERS)
    # Upwards for [ and {, downwards for ] and }: "[" is 0x5B, "]" 0x5D, and the braces are 32 further.
    steps = 1 - (np.frombuffer(brackets, np.uint8) & 0x07 == 5) * np.int8(2)
    if steps.cumsum(dtype=np.int32).max(initial=0) > limits.depth:
        _refuse_depth(limits)


def _refuse_depth(limits: Limits) -> NoReturn:
    raise LimitError(f"it is nested more than {limits.depth} levels deep")


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} where a finite number should be")
