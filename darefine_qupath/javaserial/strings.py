"""Encode and decode the strings of a stream, which Java writes in UTF-8 of its own (modified UTF-8)."""

from __future__ import annotations

from darefine_qupath.errors import JavaStreamError

__all__ = ["JavaString", "modified_utf8", "text_of"]


def modified_utf8(text: str) -> bytes:
    """Encode text as Java does: NUL as two bytes, a character beyond the BMP as two surrogates of three bytes."""
    if text.isascii() and "\0" not in text:
        return text.encode("ascii")
    units = memoryview(text.encode("utf-16-le", "surrogatepass")).cast("H")
    # The native order of the cast is little-endian on every platform NumPy and GEOS wheels are built for.
    return "".join(map(chr, units)).encode("utf-8", "surrogatepass").replace(b"\0", b"\xc0\x80")


def text_of(raw: bytes) -> str:
    """Text of modified UTF-8; raises `JavaStreamError` where the bytes are none."""
    if raw.isascii():
        return raw.decode("ascii")
    if max(raw) >= 0xF0:
        raise JavaStreamError(f"{raw[:40]!r} is not modified UTF-8")
    try:
        text = raw.replace(b"\xc0\x80", b"\0").decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise JavaStreamError(f"{raw[:40]!r} is not modified UTF-8") from None
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


class JavaString:
    """A string object.

    Parameters
    ----------
    text : str
        Its text.

    Attributes
    ----------
    raw : bytes
        Modified UTF-8, as in the stream.
    is_long : bool
        Whether its length has eight bytes; Java does so from 65,536 bytes on.
    """

    __slots__ = ("is_long", "raw")

    def __init__(self, text: str) -> None:
        self.raw = modified_utf8(text)
        self.is_long = len(self.raw) > 0xFFFF

    @classmethod
    def of_raw(cls, raw: bytes, *, is_long: bool = False) -> JavaString:
        """Make a string of bytes that stand in a stream."""
        string = cls.__new__(cls)
        string.raw = raw
        string.is_long = is_long
        return string

    @property
    def text(self) -> str:
        """Text; raises `JavaStreamError` where the bytes are not modified UTF-8."""
        return text_of(self.raw)

    def __repr__(self) -> str:
        return f"JavaString({self.raw[:40]!r})"
