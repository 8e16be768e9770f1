"""Damage for the files of a project: the same for a seeded slice in the tests and for ``scripts/fuzz``."""

from __future__ import annotations

import random
from collections.abc import Callable

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
