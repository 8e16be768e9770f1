"""QuPath's ``data.qpdata``: the objects of an image, read, edited and made anew.

`read` gives an `ImageData`; `edit` gives the bytes of the changed file, `create` those of a new one; `stored` and
`expected` say what will be read back, `summary` what stands in the ``summary.json`` beside the file. `Document` is a
file opened to be edited, and `verify` compares what an edit made with what it was made of.
"""

from darefine_qupath.project.qpdata.create import create, expected, stored, stored_geometry, stored_records, summary
from darefine_qupath.project.qpdata.edit import Document, Edited, edit, verify
from darefine_qupath.project.qpdata.items import Opaque, Stains, StainVector, TmaGrid, WorkflowStep, image_type_of
from darefine_qupath.project.qpdata.read import ImageData, read

__all__ = [
    "Document",
    "Edited",
    "ImageData",
    "Opaque",
    "StainVector",
    "Stains",
    "TmaGrid",
    "WorkflowStep",
    "create",
    "edit",
    "expected",
    "image_type_of",
    "read",
    "stored",
    "stored_geometry",
    "stored_records",
    "summary",
    "verify",
]
