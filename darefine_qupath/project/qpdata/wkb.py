"""Check the well-known binary of a geometry before a reader in C follows it."""

from __future__ import annotations

__all__ = ["check_wkb"]


_MAX_WKB_DEPTH = 8


def check_wkb(blob: bytes) -> None:
    """Refuse bytes that would be followed too deep or beyond their end.

    Raises
    ------
    ValueError
        Says what is wrong.
    """
    position = 0
    pending = [1]
    try:
        while pending:
            if pending[-1] == 0:
                pending.pop()
                continue
            pending[-1] -= 1
            position, children = _wkb_header(blob, position)
            if children:
                pending.append(children)
            if position > len(blob) or len(pending) > _MAX_WKB_DEPTH:
                break
    except IndexError:
        position = len(blob) + 1
    if len(pending) > _MAX_WKB_DEPTH:
        raise ValueError("A geometry ROI is nested too deep")
    if position > len(blob):
        raise ValueError("The geometry of a ROI is damaged")


def _wkb_header(blob: bytes, position: int) -> tuple[int, int]:
    """Position behind a geometry (or behind the head of one with parts), and the number of parts."""
    order = "big" if blob[position] == 0 else "little"

    def uint(at: int) -> int:
        if at + 4 > len(blob):
            raise IndexError
        return int.from_bytes(blob[at : at + 4], order)  # type: ignore[arg-type]

    code = uint(position + 1)
    dimensions = 2 + bool(code & 0x80000000) + bool(code & 0x40000000)
    shape = code & 0x0FFFFFFF
    dimensions += (0, 1, 1, 2)[shape // 1000] if shape < 4000 else 0
    position += 9 if code & 0x20000000 else 5
    kind = shape % 1000
    if kind == 1:
        return position + 8 * dimensions, 0
    count = uint(position)
    position += 4
    if kind == 2:
        return position + 8 * dimensions * count, 0
    if kind == 3:
        for _ in range(count):
            position += 4 + 8 * dimensions * uint(position)
        return position, 0
    if kind in (4, 5, 6, 7):
        return position, count
    raise IndexError
