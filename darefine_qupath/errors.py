"""Define every error that darefine raises on purpose, in one tree.

::

    DarefineError
    ├── LimitError                (ValueError)         a file asks for more than any honest one
    ├── GeometryError             (ValueError)         a box, size or downsample that makes no sense
    ├── JavaStreamError           (ValueError)         bytes that are no object stream of Java
    ├── ConfigError               (ValueError)         darefine.toml or an option is wrong
    ├── ClassMapError             (ValueError)         a path class is unknown or mapped twice
    ├── DeviceError               (RuntimeError)       a device cannot be used, or its memory is too small
    ├── AnnotationError           (ValueError)         a geometry or record cannot be used
    ├── SlideError                (OSError)            an image cannot be read
    │   ├── SlideNotFoundError    (FileNotFoundError)  the file is not there
    │   └── SlideFormatError      (ValueError)         no reader opens the file
    ├── MissingMppError           (ValueError)         the pixel size is unknown
    ├── ProjectError              (RuntimeError)       anything about a QuPath project
    │   ├── ProjectNotFoundError  (FileNotFoundError)  no such project
    │   ├── ProjectFormatError    (ValueError)         a project file is damaged, with file and offset
    │   ├── ProjectUnsupportedError (NotImplementedError) valid, but not something we can do safely
    │   ├── ProjectChangedError                        the file changed since it was read
    │   ├── ProjectLockedError                         another darefine process is writing
    │   ├── ProjectWriteError     (OSError)            the write failed; the former state stands
    │   ├── ImageNotFoundError    (LookupError)        no such image in the project
    │   └── EngineError                                paquo or its QuPath does not work here
    ├── ExchangeError             (ValueError)         an annotation file of another program is wrong
    ├── TileError                 (ValueError)         no tiles, or a dataset that does not fit
    ├── ModelError                (ValueError)         a network configuration that cannot be built
    ├── CheckpointError           (ValueError)         a model file is of another kind or damaged
    ├── TrainingError             (RuntimeError)       training cannot start or go on
    │   └── TrainingStoppedError                       a signal ended it; its state is saved
    ├── PredictionError           (RuntimeError)       prediction cannot start or go on
    ├── PolygonError              (ValueError)         a label map cannot become polygons
    └── ReviewError               (ValueError)         a run or a review that does not fit the project

A message says what is wrong, with which value, and what to do. The command line prints it as one line and exits with
code 2; it never shows a traceback for one of these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "AnnotationError",
    "CheckpointError",
    "ClassMapError",
    "ConfigError",
    "DarefineError",
    "DeviceError",
    "EngineError",
    "ExchangeError",
    "GeometryError",
    "ImageNotFoundError",
    "JavaStreamError",
    "LimitError",
    "MissingMppError",
    "ModelError",
    "PolygonError",
    "PredictionError",
    "ProjectChangedError",
    "ProjectError",
    "ProjectFormatError",
    "ProjectLockedError",
    "ProjectNotFoundError",
    "ProjectUnsupportedError",
    "ProjectWriteError",
    "ReviewError",
    "SlideError",
    "SlideFormatError",
    "SlideNotFoundError",
    "TileError",
    "TrainingError",
    "TrainingStoppedError",
]


class DarefineError(Exception):
    """Base of every error this package raises on purpose."""


class LimitError(DarefineError, ValueError):
    """A file is larger, deeper or slower to read than any honest one."""


class GeometryError(DarefineError, ValueError):
    """A box, size or downsample makes no sense."""


class JavaStreamError(DarefineError, ValueError):
    """Bytes are no object stream of Java, or a damaged one.

    Parameters
    ----------
    message : str
        What is wrong, with the value.
    offset : int, optional
        Byte offset in the stream.
    """

    def __init__(self, message: str, *, offset: int | None = None) -> None:
        self.message = message
        self.offset = offset
        super().__init__(message if offset is None else f"{message} (at byte {offset})")


class ConfigError(DarefineError, ValueError):
    """A setting in darefine.toml or on the command line is wrong."""


class ClassMapError(DarefineError, ValueError):
    """A path class is unknown or mapped twice."""


class DeviceError(DarefineError, RuntimeError):
    """A device cannot be used, or its memory is too small."""


class AnnotationError(DarefineError, ValueError):
    """A geometry or a record cannot be used."""


class SlideError(DarefineError, OSError):
    """An image cannot be read."""


class SlideNotFoundError(SlideError, FileNotFoundError):
    """The image file is not there."""


class SlideFormatError(SlideError, ValueError):
    """No reader opens the image file."""


class MissingMppError(DarefineError, ValueError):
    """The pixel size in micrometres is needed and unknown."""


class ProjectError(DarefineError, RuntimeError):
    """Anything about a QuPath project."""


class ProjectNotFoundError(ProjectError, FileNotFoundError):
    """There is no project at this path."""


class ProjectFormatError(ProjectError, ValueError):
    """A project file is damaged or is not what its name says.

    Parameters
    ----------
    message : str
        What is wrong, with the value.
    path : Path, optional
        The file.
    offset : int, optional
        Byte offset in the file.
    """

    def __init__(self, message: str, *, path: Path | None = None, offset: int | None = None) -> None:
        self.message = message
        self.path = path
        self.offset = offset
        where = "" if path is None else f"{path}: "
        at = "" if offset is None else f" (at byte {offset})"
        super().__init__(f"{where}{message}{at}")


class ProjectUnsupportedError(ProjectError, NotImplementedError):
    """The project is valid, but this cannot be done safely."""


class ProjectChangedError(ProjectError):
    """A project file changed since it was read."""


class ProjectLockedError(ProjectError):
    """Another darefine process is writing to the project."""


class ProjectWriteError(ProjectError, OSError):
    """A write failed; the project is as it was before."""


class ImageNotFoundError(ProjectError, LookupError):
    """The project has no such image."""


class EngineError(ProjectError):
    """The paquo engine or its QuPath does not work here."""


class ExchangeError(DarefineError, ValueError):
    """An annotation file of another program is wrong."""


class TileError(DarefineError, ValueError):
    """There are no tiles, or a dataset does not fit."""


class ModelError(DarefineError, ValueError):
    """A network configuration cannot be built."""


class CheckpointError(DarefineError, ValueError):
    """A model file is damaged or of another kind."""


class TrainingError(DarefineError, RuntimeError):
    """Training cannot start or go on."""


class TrainingStoppedError(TrainingError):
    """Training was asked to stop; its state is saved and it can be resumed."""


class PredictionError(DarefineError, RuntimeError):
    """Prediction cannot start or go on."""


class PolygonError(DarefineError, ValueError):
    """A label map cannot become polygons."""


class ReviewError(DarefineError, ValueError):
    """A run or a review does not fit the project."""
