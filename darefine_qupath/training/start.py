"""Check what a run starts from, and derive from its tiles how often each is drawn and how much each class counts."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from darefine_qupath.checkpoint.model_file import read_header
from darefine_qupath.errors import TrainingError
from darefine_qupath.models import ModelConfig, Normalization, SegmentationNetwork
from darefine_qupath.tiles.index import TileIndex
from darefine_qupath.tiles.sampling import expected_shares, tile_weights
from darefine_qupath.training.config import TrainConfig
from darefine_qupath.training.distributed import ProcessGroup
from darefine_qupath.training.loader import TileData
from darefine_qupath.training.losses import inverse_frequency
from darefine_qupath.training.runfolder import RunSettings, read_run

__all__ = [
    "check_batch",
    "check_data",
    "class_weights",
    "digest_tiles",
    "sampling_weights",
    "starting_normalization",
    "warn_of_partial_norms",
]

_log = logging.getLogger(__name__)


def check_data(data: TileData, settings: RunSettings) -> None:
    """Refuse tiles that cannot be learned from: none, or a class without a pixel."""
    if not len(data):
        raise TrainingError("There are no training tiles; annotate regions in QuPath, or look at the split")
    names, tiles = settings.classes.names, data.tiles
    if settings.model.num_classes != len(names):
        raise TrainingError(
            f"The network has {settings.model.num_classes} classes, the class map {len(names)}: {names}"
        )
    missing = [name for name, pixels in zip(names, tiles.class_pixels.tolist(), strict=True) if not pixels]
    if missing and not settings.train.allow_missing_classes:
        raise TrainingError(
            f"No training tile has a pixel of {missing}: annotate some, move an image that has them into the training "
            f"part of the split, take them out of [classes] names, or set allow_missing_classes = true"
        )


def check_batch(config: TrainConfig, group: ProcessGroup) -> None:
    """Refuse a batch of fewer tiles than it has parts."""
    parts = group.size * config.grad_accum_steps
    if config.batch_size < parts:
        raise TrainingError(
            f"A batch of {config.batch_size} tiles cannot be shared by {group.size} process(es) in "
            f"{config.grad_accum_steps} part(s) each; raise --batch-size to at least {parts}"
        )


def sampling_weights(
    tiles: TileIndex, config: TrainConfig, hard: Mapping[str, float] | None
) -> NDArray[np.float64] | None:
    """Return how often each tile comes, 0 for tiles without a label; None where all come alike."""
    labelled = tiles.counts[:, :-1].sum(axis=1) > 0
    if config.balance == 0 and not hard and labelled.all():
        return None
    if not labelled.all():
        _log.warning("%d of %d training tiles have no label and are left out", (~labelled).sum(), len(tiles))
    weights = np.zeros(len(tiles))
    weights[labelled] = tile_weights(tiles.subset(labelled), balance=config.balance, hard=hard)
    return weights


def starting_normalization(model: ModelConfig, begun: Path | None, init_from: Path | None) -> Normalization:
    """Return the normalization of the run or the model that training goes on from, else that of the encoders."""
    if begun is not None:
        return read_run(begun).normalization
    return Normalization.of(model) if init_from is None else read_header(init_from).normalization


def class_weights(tiles: TileIndex, config: TrainConfig, weights: NDArray[np.float64] | None) -> Tensor | None:
    """Return the weights of the classes in the loss, by the pixels that tiles drawn by `weights` show."""
    if config.class_weights == "none":
        return None
    return inverse_frequency(expected_shares(tiles, np.ones(len(tiles)) if weights is None else weights).tolist())


def digest_tiles(data: TileData | None) -> str:
    """Digest which tiles there are and their labels, as far as the index knows them.

    Names and metadata of images do not count: a role that is noted in the project leaves the tiles as they are.
    """
    if data is None:
        return "none"
    tiles = data.tiles
    digest = hashlib.sha256(json.dumps([(image.id, image.size, image.mpp) for image in tiles.images]).encode())
    for column in (tiles.image, tiles.slice_xy, tiles.context_xy, tiles.counts):
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()[:16]


def warn_of_partial_norms(network: SegmentationNetwork, config: TrainConfig, group: ProcessGroup) -> None:
    """Say once that batch norm sees less than a batch, which changes what is learned."""
    shares = 1 if group.device.type == "cuda" else group.size
    if shares * config.grad_accum_steps == 1:
        return
    by = [f"grad_accum_steps = {config.grad_accum_steps}"] * (config.grad_accum_steps > 1)
    by += [f"{shares} processes without a GPU"] * (shares > 1)
    mend = 'freeze_batch_norm = "yes"' if network.encoders else "a network without batch norm of its own"
    _log.warning(
        "Batch norm learns from %s of the batch at a time (%s), which changes the result; avoid it with %s",
        f"1/{shares * config.grad_accum_steps}", " and ".join(by), mend,
    )  # fmt: skip
