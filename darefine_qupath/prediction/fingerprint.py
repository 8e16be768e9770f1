"""Compute the fingerprint of a prediction: two with the same one have the same scores."""

from __future__ import annotations

import hashlib
import json

from darefine_qupath import __version__
from darefine_qupath.checkpoint.header import CheckpointHeader
from darefine_qupath.checkpoint.model_file import Checkpoint
from darefine_qupath.prediction.options import PredictOptions
from darefine_qupath.slides import Slide, file_digest

__all__ = ["compute_fingerprint"]


_METHOD = 3
"""Counts the changes to how scores come about between two versions of the software."""


def compute_fingerprint(
    slide: Slide, checkpoint: Checkpoint | CheckpointHeader, *, mpp: float | None, options: PredictOptions
) -> str:
    """Digest of everything that decides a slide's scores: image, reader, model, tiles, options, software.

    Parameters
    ----------
    slide : Slide
        The image: its name, its size, its file's length, time and some of its bytes; not its folder, since projects
        move.
    checkpoint : Checkpoint or CheckpointHeader
        The model.
    mpp : float or None
        Micrometers per level-0 pixel.
    options : PredictOptions
        Of which those count that change scores. An ``"auto"`` is a choice of its own: a map that was begun on one
        machine is as good on another.

    Returns
    -------
    str
        32 hexadecimal digits.
    """
    stat = slide.path.stat()
    values = {
        "image": [slide.path.name, stat.st_size, stat.st_mtime_ns, *slide.size, file_digest(slide.path)],
        # A slide of another kind than ours has no choice of readers.
        "reader": getattr(slide, "reader", type(slide).__name__),
        "software": [__version__, _METHOD],
        "model": checkpoint.model_id,
        "mpp": mpp,
        "options": options.score_settings(),
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
