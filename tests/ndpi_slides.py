"""A made-up NDPI slide: one JPEG, and the tags by which Hamamatsu's scanners say where it lies on the glass."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

_ASCII, _SHORT, _LONG, _RATIONAL, _SIGNED, _FLOAT = 2, 3, 4, 5, 9, 11


def write_ndpi(path: Path, size: tuple[int, int], *, center_nm: tuple[int, int], mpp: float = 0.5) -> Path:
    buffer = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), 200, np.uint8)).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    start = 12
    resolution = start + len(jpeg) + len(jpeg) % 2
    maker = resolution + 8
    lens = struct.unpack("<I", struct.pack("<f", 20.0))[0]
    tags = [
        (256, _LONG, 1, size[0]), (257, _LONG, 1, size[1]), (258, _SHORT, 1, 8), (259, _SHORT, 1, 7),
        (262, _SHORT, 1, 6), (271, _ASCII, 10, maker), (273, _LONG, 1, start), (277, _SHORT, 1, 3),
        (278, _LONG, 1, size[1]), (279, _LONG, 1, len(jpeg)), (282, _RATIONAL, 1, resolution),
        (283, _RATIONAL, 1, resolution), (296, _SHORT, 1, 3), (65420, _LONG, 1, 1), (65421, _FLOAT, 1, lens),
        (65422, _SIGNED, 1, center_nm[0] % 2**32), (65423, _SIGNED, 1, center_nm[1] % 2**32),
        (65424, _SIGNED, 1, 0), (65427, _ASCII, 1, 0),
    ]  # fmt: skip
    body = jpeg + b"\0" * (len(jpeg) % 2) + struct.pack("<II", round(10_000_000 / mpp), 1000) + b"Hamamatsu\0"
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    # After a directory come the offset of the next one and the upper halves of its values.
    path.write_bytes(b"II*\0" + struct.pack("<II", start + len(body), 0) + body + directory + bytes(8 + 4 * len(tags)))
    return path
