"""Weigh tiles by the mistakes of a former model, so that the next one sees its errors more often."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from darefine_qupath.checkpoint.model_file import Checkpoint, load_checkpoint
from darefine_qupath.classes import IGNORE, ClassMap
from darefine_qupath.devices import full_float32
from darefine_qupath.errors import TrainingError
from darefine_qupath.tiles.spec import TileSpec
from darefine_qupath.training.loader import BatchPlan, load_batches
from darefine_qupath.training.tile_dataset import TileDataset

__all__ = ["hard_weights"]

_BATCH = 8


@torch.inference_mode()
def hard_weights(
    path: Path, data: TileDataset, *, boost: float, device: torch.device | str = "cpu", workers: int = 0
) -> dict[str, float]:
    """Weights by the share of its labelled pixels that a former model gets wrong on each tile.

    Parameters
    ----------
    path : Path
        Model file of the former run.
    boost : float
        A tile that is all wrong has the weight 1 + this, one that is all right has 1.
    workers : int
        Processes that read tiles.

    Returns
    -------
    dict of str to float
        By tile id, as `darefine_qupath.tiles.sampling.tile_weights` takes them.

    Raises
    ------
    TrainingError
        If the model sees other tiles or knows other classes.
    """
    former = load_checkpoint(path)
    _check_fit(path, former, data.tiles.classes, data.tiles.spec)
    network = former.build().to(device)
    weights: dict[str, float] = {}
    for loaded in load_batches(data, _plan_in_order(len(data)), workers=workers):
        batch = loaded.batch.to(torch.device(device))
        contexts = former.normalization.of_context.apply(batch.contexts)
        with full_float32():
            logits = network(former.normalization.apply(batch.slices), contexts, batch.boxes)
        masks = batch.masks.long()
        counted = masks != IGNORE
        wrong = ((logits.argmax(dim=1) != masks) & counted).sum(dim=(1, 2)) / counted.sum(dim=(1, 2)).clamp(min=1)
        weights.update(zip(loaded.ids, (1 + boost * wrong).tolist(), strict=True))
    return weights


def _plan_in_order(number: int) -> list[BatchPlan]:
    starts = range(0, number, _BATCH)
    chosen = [tuple(range(start, min(start + _BATCH, number))) for start in starts]
    return [BatchPlan(epoch=0, step=step, tiles=tiles, positions=tiles) for step, tiles in enumerate(chosen)]


def _check_fit(path: Path, former: Checkpoint, classes: ClassMap, spec: TileSpec) -> None:
    differences: Mapping[str, tuple[object, object]] = {
        "classes": (list(former.classes.names), list(classes.names)),
        "tiles": (former.tiles.to_json(), spec.to_json()),
    }
    for what, (had, has) in differences.items():
        if had != has:
            raise TrainingError(
                f"{path} was trained on other {what} ({had}, not {has}); --hard-examples needs a model of the same "
                f"classes and tiles"
            )
