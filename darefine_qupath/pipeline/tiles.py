"""Cut the training tiles of a project."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from darefine_qupath.errors import TileError
from darefine_qupath.pipeline.listener import SILENT, Listener
from darefine_qupath.pipeline.provenance import LabelCollector, Labels, Objects
from darefine_qupath.pipeline.request import ProjectRequest
from darefine_qupath.pipeline.selection import TrainingSet, check_annotators, collect_training_images, every_annotation
from darefine_qupath.pipeline.settings import Settings
from darefine_qupath.pipeline.splitting import divide, hold_back
from darefine_qupath.project import Project, open_project
from darefine_qupath.tiles.build import build_dataset
from darefine_qupath.tiles.dataset import DatasetReader
from darefine_qupath.tiles.index import TileIndex, case_of
from darefine_qupath.tiles.roles import Split
from darefine_qupath.tiles.scan import index_tiles
from darefine_qupath.tiles.slide_reader import SlideTileReader, TileReader
from darefine_qupath.tiles.spec import TileSpec

__all__ = ["TileRequest", "Tiles", "divide_tiles", "make_tiles"]


@dataclass(frozen=True, kw_only=True)
class TileRequest(ProjectRequest):
    """Which tiles of which project.

    Attributes
    ----------
    labels : str
        ``"manual"`` or ``"reviewed"``.
    annotators : tuple of str
        Of what a person drew, only what is by these; see `by_annotators`.
    unlabelled : str or None
        Class of what no annotation covers, or ``"ignore"``; over the settings.
    tiles : mapping
        Fields of `TileSpec` over the settings.
    screening, storage : mapping
        Fields of `TileFilter` and `Storage` over the settings.
    workers : int
        Processes that cut tiles.
    """

    labels: Labels = "manual"
    annotators: tuple[str, ...] = ()
    unlabelled: str | None = None
    tiles: Mapping[str, Any] = field(default_factory=dict)
    screening: Mapping[str, Any] = field(default_factory=dict)
    storage: Mapping[str, Any] = field(default_factory=dict)
    workers: int = max(1, (os.cpu_count() or 1) - 1)

    def read_settings(self) -> Settings:
        """Read the settings of the project, with `unlabelled` over them."""
        settings = super().read_settings()
        if self.unlabelled is None:
            return settings
        names = settings.classes.get("names")
        if names is not None and self.unlabelled not in (*names, "ignore"):
            raise TileError(f"--unlabelled {self.unlabelled!r} is neither 'ignore' nor one of {names}")
        return replace(settings, classes={**settings.classes, "unlabelled": self.unlabelled})


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tiles and where their pixels are.

    Attributes
    ----------
    index : TileIndex
        What they are.
    reader : TileReader
        Gives their pixels.
    training_set : TrainingSet or None
        What they were cut from; None for a dataset that stood there already.
    held_back : tuple of str
        Entry ids of test images, which give no tiles.
    objects : mapping
        By entry id, the objects of the project that give the labels; see `LabelCollector`.
    identity : mapping
        What a model that learns from them is to know of project and slides, for a training run; see `identity_of`.
    """

    index: TileIndex
    reader: TileReader
    training_set: TrainingSet | None
    held_back: tuple[str, ...] = ()
    objects: Mapping[str, Objects] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)


def make_tiles(
    request: TileRequest,
    out: Path | None,
    *,
    test_images: Sequence[str] = (),
    default_spec: TileSpec | None = None,
    overwrite: bool = True,
    listener: Listener = SILENT,
) -> Tiles:
    """Find the tiles of a project, and write them where a folder is given.

    Parameters
    ----------
    out : Path or None
        Dataset folder; None leaves the pixels in the slides.
    test_images : sequence of str, optional
        Names, ids or cases of images that give no tiles, beside those whose metadata says so.
    default_spec : TileSpec, optional
        Geometry where neither request nor settings say; the paper's by default.
    overwrite : bool, optional
        Replace tiles of other input in `out`.
    listener : Listener, optional
        Hears how many tiles are cut.
    """
    settings = request.read_settings()
    spec = settings.tile_spec(default_spec or _default_tiles(), **request.tiles)
    tile_filter, storage = settings.tile_filter(**request.screening), settings.storage(**request.storage)
    labels = LabelCollector(request.labels, request.annotators)
    # Reading needs no QuPath, and a JVM must never run in a process that forks workers.
    with open_project(request.project, engine="embedded") as project:
        _check_names(project, test_images)
        check_annotators(every_annotation(project, project.images), request.annotators)
        training_set = collect_training_images(project, settings, labels, names=request.images, mpp=request.mpp)
    sources, held_back = hold_back(training_set.sources, test_images)
    classes, workers = training_set.classes, request.workers
    on_tiles = partial(listener.on_items, "Cutting tiles")
    reader: TileReader
    if out is None:
        index = index_tiles(sources, spec, classes, tile_filter=tile_filter, workers=workers, progress=on_tiles)
        reader = SlideTileReader(sources, classes)
    else:
        index = build_dataset(
            sources,
            spec,
            classes,
            out,
            tile_filter=tile_filter,
            storage=storage,
            workers=workers,
            overwrite=overwrite,
            progress=on_tiles,
        )
        reader = DatasetReader(out)
    return Tiles(
        index=index,
        reader=reader,
        training_set=training_set,
        held_back=held_back,
        objects=labels.of({source.id for source in sources}),
    )


def _check_names(project: Project, names: Sequence[str]) -> None:
    """Refuse a name of no image and no case: it would silently hold nothing back."""
    cases = {case_of(image.metadata) for image in project.images}
    for name in names:
        if name not in cases:
            project.image(name)


def divide_tiles(request: TileRequest, tiles: Tiles, changes: Mapping[str, Any], *, seed: int = 0) -> Split:
    """Divide tiles by the settings of their project; `changes` are fields of `SplitSpec` that go over them."""
    return divide(tiles.index, request.read_settings().split_spec(**changes), seed=seed)


def _default_tiles() -> TileSpec:
    """Return the paper's tiles; on a machine without a GPU seen at 256 instead of 500 pixels."""
    return (
        TileSpec.paper()
        if torch.cuda.is_available()
        else TileSpec(input_px=256, slice_px=1000, context_px=5000, stride_px=500)
    )
