"""Refuse TIFFs that were cut short: OpenSlide opens them, and fails only where something is missing."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tifffile

from darefine_qupath.errors import SlideError
from darefine_qupath.geometry import Size

__all__ = ["refuse_beyond_end", "refuse_cut_short", "refuse_incomplete", "tiff_pages"]

_SUB_IFDS = 330
_TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_POINTERS = {4: "I", 13: "I", 16: "Q", 18: "Q"}
_MAX_DIRECTORY = 1 << 16
"""Bytes of a directory that are looked at: 3,000 entries, where files have 30."""
_MAX_DIRECTORIES = 4096


def refuse_cut_short(path: Path) -> None:
    """Refuse a TIFF with a directory, or a value of one (the description, the tiles' places), beyond its end.

    Parameters
    ----------
    path : Path
        A TIFF or BigTIFF.

    Raises
    ------
    SlideError
        If it has.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        for part in _parts(file):
            if part.stop > size:
                raise SlideError(
                    f"{path}: the file ends at byte {size:,}, and a part that it announces begins at {part.start:,} "
                    f"and ends at {part.stop:,}; it was cut short, copy it again"
                )


def refuse_beyond_end(path: Path, pages: Sequence[tifffile.TiffPage]) -> None:
    """Refuse a TIFF with tiles that lie beyond its end.

    Parameters
    ----------
    path : Path
        The file.
    pages : sequence of TiffPage
        Its levels.

    Raises
    ------
    SlideError
        With the number of tiles that are lost.
    """
    size = path.stat().st_size
    lost = total = 0
    for page in pages:
        ends = np.asarray(page.dataoffsets, np.uint64) + np.asarray(page.databytecounts, np.uint64)
        lost, total = lost + int((ends > size).sum()), total + len(ends)
    if lost:
        raise SlideError(
            f"{path}: {lost} of {total} tiles lie beyond the end of the file at byte {size:,}; it was cut short, copy "
            f"it again"
        )


def refuse_incomplete(path: Path, levels: Sequence[Size]) -> None:
    """Refuse a file with tiles beyond its end, as far as it is a TIFF whose levels are pages.

    Parameters
    ----------
    path : Path
        The file.
    levels : sequence of Size
        Width and height of every level by OpenSlide, which opens such a file and fails where it is read.

    Raises
    ------
    SlideError
        With the number of tiles that are lost.
    """
    refuse_beyond_end(path, [page for page in tiff_pages(path) if (page.imagewidth, page.imagelength) in levels])


def tiff_pages(path: Path) -> list[tifffile.TiffPage]:
    """Pages of a TIFF; none where the file is something else."""
    try:
        with tifffile.TiffFile(path) as tiff:
            if tiff.is_ndpi:
                return []
            return [page for page in tiff.pages if isinstance(page, tifffile.TiffPage)]
    except (tifffile.TiffFileError, ValueError, KeyError, IndexError, OSError):
        return []


def _parts(file: BinaryIO) -> Iterator[range]:
    """Bytes of the image file directories and of their values, as announced: perhaps beyond the end."""
    header = file.read(16)
    order = "<" if header[:2] == b"II" else ">"
    is_big = len(header) == 16 and struct.unpack(order + "H", header[2:4])[0] == 43
    layout = _Layout(order, "Q", "Q") if is_big else _Layout(order, "H", "I")
    start = 8 if is_big else 4
    waiting, seen = layout.pointers(header[start : start + layout.pointer_size]), {0}
    while waiting and len(seen) <= _MAX_DIRECTORIES:
        offset = waiting.pop()
        if offset in seen:
            continue
        seen.add(offset)
        file.seek(offset)
        parts, following = layout.directory(file, offset)
        yield from parts
        waiting += following


@dataclass(frozen=True)
class _Layout:
    """How a TIFF writes numbers: its byte order, the letter of a count of entries and that of a place in the file."""

    order: str
    count: str
    pointer: str

    @property
    def pointer_size(self) -> int:
        return struct.calcsize(self.pointer)

    def pointers(self, raw: bytes) -> list[int]:
        number = len(raw) // self.pointer_size
        return list(struct.unpack_from(f"{self.order}{number}{self.pointer}", raw))

    def directory(self, file: BinaryIO, offset: int) -> tuple[list[range], list[int]]:
        """Parts that belong to the directory at `offset`, where the file stands, and where the next ones are."""
        head = file.read(struct.calcsize(self.count))
        if len(head) < struct.calcsize(self.count):
            return [range(offset, offset + struct.calcsize(self.count))], []
        (number,) = struct.unpack(self.order + self.count, head)
        entry = struct.Struct(f"{self.order}HH{self.pointer}{self.pointer_size}s")
        end = offset + len(head) + number * entry.size + self.pointer_size
        raw = file.read(min(number * entry.size, _MAX_DIRECTORY))
        parts, following = [range(offset, end)], self.pointers(file.read(self.pointer_size))
        for tag, kind, count, value in entry.iter_unpack(raw[: len(raw) // entry.size * entry.size]):
            size = count * _TYPE_SIZES.get(kind, 0)
            if size > self.pointer_size:
                begin = self.pointers(value)[0]
                parts.append(range(begin, begin + size))
                file.seek(begin)
            if tag == _SUB_IFDS and kind in _POINTERS:
                places = file.read(min(size, _MAX_DIRECTORY)) if size > self.pointer_size else value[:size]
                following += _Layout(self.order, self.count, _POINTERS[kind]).pointers(places)
        return parts, following
