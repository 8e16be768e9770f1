"""Load tiles in batches: which tiles, in which order, read ahead by worker processes.

The order of an epoch is a function of the seed and the epoch. A batch is the same set of tiles however many processes
share it and wherever a run was interrupted.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import default_collate

from darefine_qupath.errors import DarefineError, TrainingError
from darefine_qupath.models import box_within
from darefine_qupath.tiles.index import TileIndex
from darefine_qupath.tiles.sampling import epoch_order
from darefine_qupath.tiles.slide_reader import SlideTileReader
from darefine_qupath.training.augment import TileBatch
from darefine_qupath.training.config import TrainConfig
from darefine_qupath.training.tile_dataset import TileItem

__all__ = [
    "BatchPlan",
    "LoadedBatch",
    "TileData",
    "load_batches",
    "num_workers",
    "plan_epoch",
    "plan_run",
    "steps_per_epoch",
]

_MOST_WORKERS = 16

_Boxed = tuple[TileItem, Tensor]
_Collated = tuple[TileBatch, tuple[str, ...]] | DarefineError


class TileData(Protocol):
    """What training needs of a dataset; `darefine_qupath.training.tile_dataset.TileDataset` is one."""

    tiles: TileIndex

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> TileItem: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """Part of a batch that one process has.

    Attributes
    ----------
    epoch, step : int
        Counted from 0; the step is the one within the epoch.
    tiles : tuple of int
        Positions in the dataset.
    positions : tuple of int
        Places in the order of the epoch, for the augmentation.
    """

    epoch: int
    step: int
    tiles: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedBatch:
    """A part of a batch with its pixels.

    Attributes
    ----------
    plan : BatchPlan
        What was planned.
    batch : TileBatch
        On the CPU; in pinned memory where a CUDA device is to have it.
    ids : tuple of str
        Tile ids.
    """

    plan: BatchPlan
    batch: TileBatch
    ids: tuple[str, ...]


def steps_per_epoch(num_tiles: int, config: TrainConfig) -> int:
    """Return the optimizer steps of an epoch; the last batch is filled up from the start of the order."""
    return -(-(config.samples_per_epoch or num_tiles) // config.batch_size)


def plan_epoch(
    tiles: TileIndex,
    config: TrainConfig,
    weights: NDArray[np.float64] | None,
    epoch: int,
    *,
    rank: int = 0,
    size: int = 1,
) -> list[BatchPlan]:
    """Plan this process's part of every batch of an epoch.

    Parameters
    ----------
    tiles : TileIndex
        The training tiles.
    config : TrainConfig
        `seed`, `batch_size` and `samples_per_epoch` count.
    weights : ndarray of float64, shape (N,), or None
        How often each tile comes; see `darefine_qupath.tiles.sampling.tile_weights`.
    epoch : int
        Counted from 0.
    rank, size : int
        This process and how many there are; process r has every `size`-th tile of a batch from the r-th.

    Returns
    -------
    list of BatchPlan
        One per step.
    """
    order = epoch_order(tiles, weights, seed=config.seed, epoch=epoch, num_samples=config.samples_per_epoch or None)
    steps = steps_per_epoch(len(tiles), config)
    filled = np.resize(order, steps * config.batch_size)
    planned = []
    for step in range(steps):
        positions = range(step * config.batch_size + rank, (step + 1) * config.batch_size, size)
        chosen = tuple(int(filled[position]) for position in positions)
        planned.append(BatchPlan(epoch=epoch, step=step, tiles=chosen, positions=tuple(positions)))
    return planned


def plan_run(
    tiles: TileIndex,
    config: TrainConfig,
    weights: NDArray[np.float64] | None,
    start: tuple[int, int],
    *,
    rank: int = 0,
    size: int = 1,
) -> Iterator[BatchPlan]:
    """Plan every batch from epoch and step `start` to the end of the last epoch."""
    for epoch in range(start[0], config.epochs):
        planned = plan_epoch(tiles, config, weights, epoch, rank=rank, size=size)
        yield from planned[start[1] if epoch == start[0] else 0 :]


def num_workers(config: TrainConfig, size: int = 1) -> int:
    """Return the number of worker processes: as set, else the spare cores, at most 16."""
    if config.workers >= 0:
        return config.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST_WORKERS, max(1, cores // size - 1))


def load_batches(
    data: TileData, planned: Iterator[BatchPlan] | Sequence[BatchPlan], *, workers: int, pin: bool = False
) -> Iterator[LoadedBatch]:
    """Read batches ahead, in order.

    Parameters
    ----------
    data : TileData
        Where the tiles are.
    planned : iterable of BatchPlan
        Which tiles; taken only as far ahead as the workers read.
    workers : int
        Worker processes; 0 reads in this one.
    pin : bool
        Put the pixels where a CUDA device copies them from without waiting.

    Yields
    ------
    LoadedBatch
        One per item of `planned`.

    Raises
    ------
    DarefineError
        What the reader of the tiles says of one that it cannot read.
    TrainingError
        If a worker was killed.
    """
    log: list[BatchPlan] = []
    loader = DataLoader(
        _BoxedTiles(data),
        batch_sampler=_PlanSampler(iter(planned), log),
        num_workers=workers,
        multiprocessing_context=_worker_context(data) if workers else None,
        collate_fn=_collate,
        pin_memory=pin,
        worker_init_fn=_ignore_signals if workers else None,
        prefetch_factor=4 if workers else None,
    )
    batches = iter(loader)
    try:
        while (found := _next_batch(batches)) is not None:
            if isinstance(found, DarefineError):
                raise found
            yield LoadedBatch(plan=log.pop(0), batch=found[0], ids=found[1])
    finally:
        # An error keeps hold of them until Python ends, which waits without end for workers that no signal reaches.
        if workers:
            batches._shutdown_workers()  # type: ignore[attr-defined]


def _next_batch(batches: Iterator[_Collated]) -> _Collated | None:
    try:
        return next(batches, None)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise TrainingError(
            f"A process that reads tiles was killed ({str(error).splitlines()[0]}), often for want of memory, or of "
            f"shared memory in a container: lower workers; 0 reads without such processes"
        ) from error


def _worker_context(data: TileData) -> BaseContext | None:
    """Choose how workers start; None for the platform's own way.

    Workers that read slides do not fork from this process: handles, and the threads of a reader that has been used
    here, must not follow. Nor do those of one process among several, whatever they read: NCCL and gloo have threads and
    locks that do not outlive a fork. They fork from a server that has loaded the libraries and nothing else.
    """
    must_not_fork = isinstance(getattr(data, "reader", None), SlideTileReader) or _is_among_several()
    if not must_not_fork or "forkserver" not in get_all_start_methods():
        return None
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, SlideTileReader.__module__])
    return context


def _is_among_several() -> bool:
    return distributed.is_available() and distributed.is_initialized()


class _BoxedTiles(Dataset[_Boxed | DarefineError]):
    """Tiles with their boxes, or why one cannot be read; pickles for workers as the data does."""

    def __init__(self, data: TileData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> _Boxed | DarefineError:
        pair = self.data.tiles[index].pair
        try:
            item = self.data[index]
        except DarefineError as error:
            # Raised in a worker, it would reach the user with the worker's traceback as its text.
            return error
        return item, torch.tensor(box_within(pair.slice, pair.context), dtype=torch.float32)


class _PlanSampler:
    """Sampler of planned batches; keeps each plan in a log, as the loader returns only the pixels."""

    def __init__(self, planned: Iterator[BatchPlan], log: list[BatchPlan]) -> None:
        self._planned = planned
        self._log = log

    def __iter__(self) -> Iterator[list[int]]:
        for plan in self._planned:
            self._log.append(plan)
            yield list(plan.tiles)


def _collate(items: list[_Boxed | DarefineError]) -> _Collated:
    for item in items:
        if isinstance(item, DarefineError):
            return item
    tiles, boxes = zip(*cast("list[_Boxed]", items), strict=True)
    batch = TileBatch(
        slices=default_collate([tile.slice for tile in tiles]),
        contexts=default_collate([tile.context for tile in tiles]),
        masks=default_collate([tile.mask for tile in tiles]),
        boxes=torch.stack(boxes),
    )
    return batch, tuple(tile.id for tile in tiles)


def _ignore_signals(_worker: int) -> None:
    """Leave Ctrl-C and a terminated process group to the main process, which ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
