"""Export a model as ONNX, with its header in the metadata."""

from __future__ import annotations

import json
from pathlib import Path

from darefine_qupath.checkpoint.header import HEADER_KEY
from darefine_qupath.checkpoint.model_file import Checkpoint
from darefine_qupath.errors import CheckpointError
from darefine_qupath.filesystem import atomic_write
from darefine_qupath.models.onnx import export_network

__all__ = ["export_onnx"]


def export_onnx(checkpoint: Checkpoint, path: Path | str) -> None:
    """Write the network as ONNX, with the tile sizes of the model and any batch size.

    Inputs are ``slice`` and, where the network has a context, ``context`` (float32, (B, 3, size, size), normalized as
    ``normalization`` in the metadata says, which has a ``context`` of its own where that differs) and for ``aligned``
    fusion ``box`` (B, 4); the output is ``logits``. The header of the model file is in the metadata.

    Parameters
    ----------
    checkpoint : Checkpoint
        The model.
    path : Path or str
        The file to write.

    Raises
    ------
    ModelError
        If the packages of the extra ``onnx`` are not installed.
    CheckpointError
        If the file cannot be written.
    """
    path = Path(path)
    tiles = checkpoint.tiles
    with atomic_write(path, CheckpointError) as temporary:
        export_network(
            checkpoint.build(),
            temporary,
            slice_px=tiles.input_px,
            context_px=tiles.context_input_px or tiles.input_px,
            metadata={HEADER_KEY: json.dumps(checkpoint.header.to_json())},
        )
