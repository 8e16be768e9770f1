"""Train DA-RefineNet on a QuPath project, predict its slides, put polygons back for review."""

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import ClassMap
from darefine_qupath.errors import DarefineError
from darefine_qupath.geometry import Box

__all__ = ["Annotation", "Box", "ClassMap", "DarefineError", "__version__"]

__version__ = "0.1.0"
