"""Name the metadata of objects, and the properties of images, that darefine writes."""

from __future__ import annotations

__all__ = ["CLASS", "DIGEST", "MARK", "MODEL", "PLACE", "RUN", "RUNNER_UP", "UNDONE"]

RUN = "darefine.run"
"""Of an image: the run that its data was written by, or saved from. Of an object: the run that made it."""

UNDONE = "darefine.undone"
"""Of an image: the run that was undone last, where that left objects of ours in the image."""

MODEL = "darefine.model"
"""Of every object of ours: id of the model."""

CLASS = "darefine.class"
"""Of every object of ours: the model's class; empty for a container."""

DIGEST = "darefine.digest"
"""Of every object of ours: its digest as it was written."""

RUNNER_UP = "darefine.runner_up"
"""Of an object of ours: the second class."""

MARK = "darefine.review"
"""Of an object (or a measurement of it, 1 or -1): that a script accepted or rejected it."""

PLACE = "darefine.place"
"""Of an annotation that says where to look next."""
