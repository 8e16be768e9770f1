"""The numbers of Java's stream protocol, version 2: tags, flags, the first handle, and how numbers are packed."""

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
# TC_REFERENCE and a handle.
REFERENCE = struct.Struct(">BI")

TC_NULL = 0x70
TC_REFERENCE = 0x71
TC_CLASSDESC = 0x72
TC_OBJECT = 0x73
TC_STRING = 0x74
TC_ARRAY = 0x75
TC_CLASS = 0x76
TC_BLOCKDATA = 0x77
TC_ENDBLOCKDATA = 0x78
TC_RESET = 0x79
TC_BLOCKDATALONG = 0x7A
TC_EXCEPTION = 0x7B
TC_LONGSTRING = 0x7C
TC_PROXYCLASSDESC = 0x7D
TC_ENUM = 0x7E

SC_WRITE_METHOD = 0x01
SC_SERIALIZABLE = 0x02
SC_EXTERNALIZABLE = 0x04
SC_BLOCK_DATA = 0x08
SC_ENUM = 0x10

FIRST_HANDLE = 0x7E0000
WIDTHS = {"B": 1, "C": 2, "D": 8, "F": 4, "I": 4, "J": 8, "S": 2, "Z": 1}
ARRAY_CODES = {*WIDTHS, "[", "L"}
# No Java class has so many superclasses; the limit keeps the cost of a hostile chain linear.
MAX_SUPERCLASSES = 256
