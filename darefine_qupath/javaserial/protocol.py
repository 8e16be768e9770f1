"""List the numbers of Java's stream protocol, version 2: tags, flags, the first handle, and how numbers are packed."""

from __future__ import annotations

import struct

MAGIC = b"\xac\xed\x00\x05"

U2 = struct.Struct(">H")
I4 = struct.Struct(">i")
U4 = struct.Struct(">I")
I8 = struct.Struct(">q")
F8 = struct.Struct(">d")
# What follows a class descriptor's name: serial version UID, flags, number of fields.
DESC_HEAD = struct.Struct(">qBH")
# `Tag.REFERENCE` and a handle.
REFERENCE = struct.Struct(">BI")

FIRST_HANDLE = 0x7E0000
WIDTHS = {"B": 1, "C": 2, "D": 8, "F": 4, "I": 4, "J": 8, "S": 2, "Z": 1}
ARRAY_CODES = {*WIDTHS, "[", "L"}
# No Java class has so many superclasses; the limit keeps the cost of a hostile chain linear.
MAX_SUPERCLASSES = 256


class Tag:
    """First byte of everything in a stream."""

    NULL = 0x70
    REFERENCE = 0x71
    CLASS_DESC = 0x72
    OBJECT = 0x73
    STRING = 0x74
    ARRAY = 0x75
    CLASS = 0x76
    BLOCK_DATA = 0x77
    END_BLOCK_DATA = 0x78
    RESET = 0x79
    BLOCK_DATA_LONG = 0x7A
    EXCEPTION = 0x7B
    LONG_STRING = 0x7C
    PROXY_CLASS_DESC = 0x7D
    ENUM = 0x7E


class Flag:
    """Flags of a class descriptor."""

    WRITE_METHOD = 0x01
    SERIALIZABLE = 0x02
    EXTERNALIZABLE = 0x04
    BLOCK_DATA = 0x08
    ENUM = 0x10
