"""Decode Java's object serialization stream to a tree of nodes, and encode it back to the identical bytes.

The package knows the stream protocol (Java Object Serialization Specification, section 6, protocol version 2) and no
class of any program: no class is loaded and nothing is run, an object is its class descriptor and its data. Where the
stream refers to a node by its handle, the tree holds the same Python object again; handles are numbered anew in the
order in which nodes are written. So an edited tree is written as a valid stream: when the object that first held a
class descriptor or a string is removed, the definition moves to the first use that is left.

`decode` makes the tree of `nodes`, `encode` writes it, `packed` keeps objects that resemble each other as bytes until
somebody looks at them, and `values` reads strings, numbers, lists and maps of Java's own library.

Why not ``javaobj-py3``: both readers of version 0.6.1 give up at the object hierarchy ("stream has ended unexpectedly")
of each of the 36 ``data.qpdata`` files in the tests, written by QuPath 0.4 to 0.7. It is not lossless either: taken by
themselves, the workflow comes back from its older reader and writer in 1,073 of 1,418 bytes and the image properties in
457 of 459, and its newer reader has no writer.
"""
