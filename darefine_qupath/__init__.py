"""Train DA-RefineNet on a QuPath project, predict its slides, put polygons back for review."""

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import ClassMap, PathClass
from darefine_qupath.errors import DarefineError
from darefine_qupath.geometry import Box
from darefine_qupath.project import Changes, ImageEntry, Project, create_project, open_project

__all__ = [
    "Annotation",
    "Box",
    "Changes",
    "ClassMap",
    "DarefineError",
    "ImageEntry",
    "PathClass",
    "Project",
    "__version__",
    "create_project",
    "open_project",
]

__version__ = "0.1.0"
