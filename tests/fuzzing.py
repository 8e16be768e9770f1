"""Damage for files of all kinds: the same for a seeded slice in the tests and for ``scripts/check/fuzz.py``."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

EXTREMES = (
    b"\x00" * 4,
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\x80\x00\x00\x00",
    b"\x00\x00\x00\x01",
    b"\x7f\xc0\x00\x00",
)
JSON_PARTS = (
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b"[]",
    b"{}",
    b'""',
    b"true",
    b"\xff",
    b"\\ud800",
)

NASTY = (
    "null",
    "true",
    "0",
    "-1",
    "2147483648",
    "10000000",
    "1e308",
    "-1e300",
    "NaN",
    "Infinity",
    "9" * 5000,
    '""',
    '"x"',
    '"\\ud800"',
    '"\\u001b]0;owned\\u0007\\u202e"',
    '"\u00b2"',
    '"' + "a" * 70_000 + '"',
    "[]",
    "{}",
    "[[[[1]]]]",
    "[" * 900 + "]" * 900,
    '{"a":' * 900 + "1" + "}" * 900,
)
"""What may stand in the place of any JSON value, as it is spelled."""

_PLACE = "\ue000here\ue000"


def _set_byte(data: bytearray, at: int, rng: random.Random) -> None:
    data[at] = rng.randrange(256)


def _flip_bit(data: bytearray, at: int, rng: random.Random) -> None:
    data[at] ^= 1 << rng.randrange(8)


def _delete(data: bytearray, at: int, rng: random.Random) -> None:
    del data[at : at + rng.choice((1, 2, 4, 64, 1000))]


def _double(data: bytearray, at: int, rng: random.Random) -> None:
    data[at:at] = data[at : at + rng.choice((1, 2, 4, 64, 1000))]


def _scramble(data: bytearray, at: int, rng: random.Random) -> None:
    size = rng.choice((2, 4, 8, 64))
    data[at : at + size] = rng.randbytes(size)


def _extreme(data: bytearray, at: int, rng: random.Random) -> None:
    data[at : at + 4] = rng.choice(EXTREMES)


def _handle(data: bytearray, at: int, rng: random.Random) -> None:
    """Let a back reference of an object stream refer to something else."""
    place = data.find(b"q\x00\x7e", at)
    if place >= 0:
        data[place + 3 : place + 5] = rng.choice((rng.randbytes(2), bytes((0, rng.randrange(256)))))


def _move(data: bytearray, at: int, rng: random.Random) -> None:
    """Put a piece over another one."""
    size, source = rng.choice((5, 12, 40, 200)), rng.randrange(len(data))
    data[at : at + size] = data[source : source + size]


def _json_part(data: bytearray, at: int, rng: random.Random) -> None:
    data[at : at + rng.choice((0, 1, 4))] = rng.choice(JSON_PARTS)


def _cut(data: bytearray, at: int, rng: random.Random) -> None:
    del data[at if rng.random() < 0.5 else max(0, len(data) - rng.randrange(1, 40)) :]


_ANY: tuple[Callable[[bytearray, int, random.Random], None], ...] = (
    _set_byte,
    _flip_bit,
    _delete,
    _double,
    _scramble,
    _move,
    _cut,
)
_STREAM = (*_ANY, _extreme, _handle, _handle)
_JSON = (*_ANY, _json_part, _json_part, _json_part)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return a copy with one to twenty damages, of the kinds that hurt such a file most."""
    ways = _STREAM if data[:2] == b"\xac\xed" else _JSON
    copy = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        if copy:
            rng.choice(ways)(copy, rng.randrange(len(copy)), rng)
    return bytes(copy)


# -- structure


def json_mutants(value: Any, rng: random.Random) -> Iterator[str]:  # noqa: ANN401 - any JSON value
    """Spellings of a JSON value that is `NASTY` in one place, or lacks one; some for every place."""
    for way in _ways(value):
        yield from _spelled(value, way, (*rng.sample(NASTY, 4),))
        if way:
            copy = json.loads(json.dumps(value))
            holder = _at(copy, way[:-1])
            del holder[way[-1]]
            yield json.dumps(copy)


def json_mutant(data: bytes, rng: random.Random) -> bytes:
    """JSON with one to five of its values, or keys, made nasty; bytes that are no JSON are `damaged`."""
    try:
        value = json.loads(data)
    except ValueError:
        return damaged(data, rng)
    text = data.decode()
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        ways = list(_ways(value, limit=2000))
        way = rng.choice(ways)
        kind = rng.random()
        if kind < 0.75 or not way:
            text = next(_spelled(value, way, (rng.choice(NASTY),)))
        else:
            holder = _at(value, way[:-1])
            if kind < 0.85:
                del holder[way[-1]]
            elif isinstance(holder, list):
                holder[way[-1] : way[-1]] = [holder[way[-1]]] * rng.choice((1, 3, 50))
            else:
                holder[rng.choice(("", "x", "type", "\x1b[2J", "a" * 70_000))] = holder.pop(way[-1])
            text = json.dumps(value)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            break
    return text.encode("utf-8", "surrogatepass")


def xml_mutant(data: bytes, rng: random.Random) -> bytes:
    """XML with one to five attributes made nasty, or elements left out, doubled or put into themselves."""
    text = data.decode("utf-8", "replace")
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        attributes = list(re.finditer(r'="([^"]*)"', text))
        elements = list(re.finditer(r"<(\w+)\b[^<>]*(?:/>|>[^<>]*</\1>)|<(\w+)\b[^<>]*>", text))
        if attributes and rng.random() < 0.6:
            found = rng.choice(attributes)
            word = rng.choice(NASTY).strip('"').replace("<", "").replace("&", "").replace('"', "'")
            text = f'{text[: found.start()]}="{word}"{text[found.end() :]}'
        elif elements:
            found = rng.choice(elements)
            name = found[1] or found[2]
            times = rng.choice((0, 2, 30, 900))
            middle = f"<{name}>" * times + found[0] + f"</{name}>" * times if rng.random() < 0.4 else found[0] * times
            text = text[: found.start()] + middle + text[found.end() :]
    return text.encode("utf-8", "replace")


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return a copy damaged as bytes, or as the JSON or XML that it is."""
    start = data.lstrip()[:1]
    if rng.random() < 0.5 and start in (b"{", b"[", b"<"):
        return xml_mutant(data, rng) if start == b"<" else json_mutant(data, rng)
    return damaged(data, rng)


def _ways(value: Any, limit: int = 1 << 30) -> Iterator[tuple[Any, ...]]:  # noqa: ANN401
    """Ways from the outside in to the values of a JSON value."""
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    while waiting and limit:
        way, item = waiting.pop(0)
        limit -= 1
        yield way
        pairs = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
        waiting.extend(((*way, key), part) for key, part in pairs)


def _at(value: Any, way: tuple[Any, ...]) -> Any:  # noqa: ANN401
    for key in way:
        value = value[key]
    return value


def _spelled(value: Any, way: tuple[Any, ...], nasty: tuple[str, ...]) -> Iterator[str]:  # noqa: ANN401
    copy = json.loads(json.dumps(value))
    if way:
        _at(copy, way[:-1])[way[-1]] = _PLACE
    else:
        copy = _PLACE
    text = json.dumps(copy, ensure_ascii=False)
    return (text.replace(f'"{_PLACE}"', each) for each in nasty)
