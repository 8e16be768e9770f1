"""QuPath's ``data.qpdata``: reading and editing the objects of an image.

`read` gives an `ImageData`.
"""

from darefine_qupath.project.qpread import ImageData, Opaque, Stains, StainVector, TmaGrid, WorkflowStep, read

__all__ = ["ImageData", "Opaque", "StainVector", "Stains", "TmaGrid", "WorkflowStep", "read"]
