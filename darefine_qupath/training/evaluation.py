"""Count how well a network labels tiles, with their own context or without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from darefine_qupath.classes import IGNORE
from darefine_qupath.devices import autocast
from darefine_qupath.errors import TrainingError
from darefine_qupath.metrics import ConfusionMatrix
from darefine_qupath.models import Normalization, SegmentationNetwork
from darefine_qupath.training.augment import WHITE
from darefine_qupath.training.distributed import ProcessGroup
from darefine_qupath.training.loader import BatchPlan, TileData, load_batches

__all__ = ["ContextMode", "evaluate"]

ContextMode = Literal["normal", "blank", "shuffled"]


@torch.inference_mode()
def evaluate(
    model: SegmentationNetwork,
    data: TileData,
    *,
    normalization: Normalization | None = None,
    device: torch.device | str = "cpu",
    context: ContextMode = "normal",
    batch_size: int = 8,
    workers: int = 0,
    dtype: torch.dtype = torch.float32,
    group: ProcessGroup | None = None,
    before_batch: Callable[[], None] | None = None,
) -> ConfusionMatrix:
    """Count how a network labels every tile of a dataset.

    Parameters
    ----------
    model : SegmentationNetwork
        Moved to `device` and put into evaluation mode; afterwards in the mode it was in.
    data : TileData
        Tiles with their masks.
    normalization : Normalization, optional
        As the network was trained with; without it, the one its encoders ask for, each its own.
    device : torch.device or str
        Where to compute.
    context : {"normal", "blank", "shuffled"}
        ``blank``: every context is white. ``shuffled``: every tile has the context of another tile, which follows from
        the number of tiles alone; the place of the slice in it stays.
    batch_size : int
        Tiles at once.
    workers : int
        Processes that read tiles.
    dtype : torch.dtype
        Other than float32: convolutions compute in it.
    group : ProcessGroup, optional
        Each process takes a part, and all get the same matrix.
    before_batch : callable, optional
        Called before each batch; what it raises ends the count.

    Returns
    -------
    ConfusionMatrix
        Pixels by true and predicted class, over all tiles.

    Raises
    ------
    TrainingError
        If there are no tiles or no such context mode, or the network gives scores that are not finite.
    """
    if context not in get_args(ContextMode):
        raise TrainingError(f"There is no context mode {context!r}; use one of {list(get_args(ContextMode))}")
    if not len(data):
        raise TrainingError("There are no tiles to evaluate; check the split and the annotations of its images")
    if context == "shuffled" and len(data) == 1:
        raise TrainingError("A single tile has no other tile to take a context from; evaluate at least two")
    device, group = torch.device(device), group or ProcessGroup()
    normalization = normalization or Normalization.of(model.config)
    num_classes = model.config.num_classes
    counts = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=device)
    was_training, model = model.training, model.to(device).eval()
    model.expect(normalization)
    planned, pin = _plan_batches(len(data), context, batch_size, group), device.type == "cuda"
    with group.fail_together():
        for loaded in load_batches(data, planned, workers=workers, pin=pin):
            if before_batch is not None:
                before_batch()
            batch = loaded.batch.to(device)
            context_B3HW = _replace_contexts(batch.contexts, context)
            with autocast(device, dtype):
                context_B3HW = normalization.of_context.apply(context_B3HW)
                logits_BKHW = model(normalization.apply(batch.slices), context_B3HW, batch.boxes)
            counts[:-1] += _count_cells(batch.masks.long(), logits_BKHW.argmax(dim=1), num_classes)
            counts[-1] += (~logits_BKHW.isfinite()).any(dim=1).sum()
    model.train(was_training)
    counts = group.sum(counts)
    # Known to all processes alike, so that none waits for another that has given up.
    if counts[-1]:
        raise TrainingError(
            f"The network's scores of {int(counts[-1])} pixels are not finite (NaN or infinite); it cannot be evaluated"
        )
    return ConfusionMatrix(counts[:-1].reshape(num_classes, num_classes).cpu().numpy())


def _plan_batches(num_tiles: int, context: str, batch_size: int, group: ProcessGroup) -> Iterator[BatchPlan]:
    """Plan this process's batches; in random order where contexts are exchanged, as neighbours may share theirs."""
    order = np.arange(num_tiles)
    if context == "shuffled":
        order = np.random.default_rng(num_tiles).permutation(num_tiles)
        # With three or more at once, an even cut never leaves a tile alone with its own context.
        batch_size = max(3, batch_size)
    num_batches = -(-num_tiles // batch_size)
    for step, rows in enumerate(np.array_split(order, num_batches)):
        if step % group.size == group.rank:
            tiles = tuple(int(row) for row in rows)
            yield BatchPlan(epoch=0, step=step, tiles=tiles, positions=tiles)


def _replace_contexts(context_B3HW: Tensor, mode: str) -> Tensor:
    if mode == "blank":
        return torch.full_like(context_B3HW, WHITE)
    return context_B3HW.roll(1, dims=0) if mode == "shuffled" else context_B3HW


def _count_cells(truth_BHW: Tensor, predicted_BHW: Tensor, num_classes: int) -> Tensor:
    counted_BHW = truth_BHW != IGNORE
    cells_P = truth_BHW[counted_BHW] * num_classes + predicted_BHW[counted_BHW]
    return torch.bincount(cells_P, minlength=num_classes**2)
