"""QuPath's ``data.qpdata``: the objects of an image, read, edited and made anew.

`read` gives an `ImageData`; `edit` gives the bytes of the changed file, `create` those of a new one; `stored` and
`expected` say what will be read back, `summary` what stands in the ``summary.json`` beside the file.
"""

from darefine_qupath.project.qpread import ImageData, Opaque, Stains, StainVector, TmaGrid, WorkflowStep, read
from darefine_qupath.project.qpwrite import create, edit, expected, stored, stored_geometry, summary

__all__ = [
    "ImageData",
    "Opaque",
    "StainVector",
    "Stains",
    "TmaGrid",
    "WorkflowStep",
    "create",
    "edit",
    "expected",
    "read",
    "stored",
    "stored_geometry",
    "summary",
]
