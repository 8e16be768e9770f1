"""Java's object serialization stream, decoded to a tree and encoded back to the identical bytes.

The module knows the stream protocol (Java Object Serialization Specification, section 6, protocol version 2) and no
class of any program: no class is loaded and nothing is run, an object is its class descriptor and its data. What the
stream refers to by a handle is, in the tree, the same Python object again; handles are numbered anew in the order in
which nodes are written. That is what makes an edited tree a right stream: when the object that first held a class
descriptor or a string is taken out, the definition moves to the first use that is left.

The nodes of the tree are in `javanodes`. A file with tens of thousands of objects can be decoded so that those that are
alike stay bytes until they are looked at (`javapacked`).
"""

from darefine_qupath.javaserial.decode import decode, first_of
from darefine_qupath.javaserial.encode import encode

__all__ = ["decode", "encode", "first_of"]
