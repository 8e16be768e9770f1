"""Build a dataset of tiles on disk, and go on with one that was killed.

While it is being built, every finished job is a line of ``journal.jsonl``: a build that was killed goes on behind the
last whole line, and ends with the same bytes.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import ClassMap
from darefine_qupath.errors import DarefineError, SlideNotFoundError, TileError
from darefine_qupath.limits import NOTES, parse_json
from darefine_qupath.tiles.dataset import (
    FORMAT,
    MANIFEST,
    PIXELS,
    TILES,
    VERSION,
    canonical_json,
    load_index,
    read_manifest,
    write_index,
)
from darefine_qupath.tiles.index import TileIndex
from darefine_qupath.tiles.jobs import ScannedTiles, TileJob, TileScanner
from darefine_qupath.tiles.scan import TileFilter, TileProgress, index_of_plans, jobs_of, plan_sources, scan_plans
from darefine_qupath.tiles.slide_reader import SlideTileReader
from darefine_qupath.tiles.sources import Opener, TileSource, open_source
from darefine_qupath.tiles.spec import TileSpec
from darefine_qupath.tiles.storage import PixelFolder, Storage

__all__ = ["build_dataset"]

_JOURNAL = "journal.jsonl"
_log = logging.getLogger(__name__)


def build_dataset(
    sources: Sequence[TileSource],
    spec: TileSpec,
    classes: ClassMap,
    out: Path,
    *,
    tile_filter: TileFilter | None = None,
    storage: Storage | None = None,
    workers: int = 0,
    overwrite: bool = False,
    progress: TileProgress | None = None,
    opener: Opener = open_source,
) -> TileIndex:
    """Write the tiles of annotated slides to a folder, or finish one that was begun.

    Parameters
    ----------
    sources : sequence of TileSource
        Images with their annotations.
    spec : TileSpec
        Geometry of the tiles.
    classes : ClassMap
        Names to labels.
    out : Path
        The folder; made when it is not there.
    tile_filter : TileFilter, optional
        Which tiles are kept.
    storage : Storage, optional
        How pixels are stored.
    workers : int
        Worker processes; up to 1 means this process.
    overwrite : bool
        Replace what `out` holds of a dataset of other input.
    progress : callable, optional
        Called with tiles done and tiles in all.
    opener : callable, optional
        Opens the slide of a source.

    Returns
    -------
    TileIndex
        In the order of `sources`, then of `plan_training_tiles`. The same input gives the same bytes.

    Raises
    ------
    TileError
        If no tile is left, if `out` holds a dataset of other input, or if writing fails.
    MissingMppError
        If `spec` is in micrometres and a slide's pixel size is unknown.
    """
    tile_filter, storage = tile_filter or TileFilter(), storage or Storage()
    try:
        request = _request(sources, spec, classes, tile_filter, storage)
        digest = _digest({**request, "spec": spec.for_digest(), "classes": classes.for_digest()})
        state = {"request": digest, "modified": _modified(sources)}
        if _is_complete(out, state, overwrite=overwrite):
            return load_index(out)
        plans = plan_sources(sources, spec, classes, tile_filter, opener)
        folder = PixelFolder(root=out / PIXELS, storage=storage, classes=classes)
        for plan in plans:
            folder.make(plan.image.id)
        scanner = TileScanner(
            SlideTileReader(sources, classes, opener=opener), classes, tile_filter.min_labelled, folder
        )
        with _Journal(out / _JOURNAL, state) as journal:
            scan_plans(plans, scanner, journal.found, workers=workers, progress=progress, note=journal.add)
        index = index_of_plans(plans, journal.found, spec, classes)
        write_index(out, index, [d for job in jobs_of(plans) for d in journal.found[job.key].digests], request, state)
        (out / _JOURNAL).unlink()
    except DarefineError:
        raise
    except OSError as error:
        raise TileError(f"Cannot write the dataset {out}: {error}; free space or give another folder") from error
    return index


def _request(
    sources: Sequence[TileSource], spec: TileSpec, classes: ClassMap, tile_filter: TileFilter, storage: Storage
) -> dict[str, Any]:
    """All that decides what a dataset holds."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "spec": spec.to_json(),
        "classes": classes.to_json(),
        "screening": asdict(tile_filter),
        "storage": asdict(storage),
        "sources": [
            {
                "id": source.id,
                "name": source.name,
                "file": source.path.name,
                "bytes": _stat(source).st_size,
                "mpp": source.mpp,
                "crop_bounds": source.crop_bounds,
                "annotations": _annotations_digest(source.annotations),
                "metadata": dict(sorted(source.metadata.items())),
                "case": source.known_case,
            }
            for source in sources
        ],
    }


def _modified(sources: Sequence[TileSource]) -> dict[str, int]:
    """When each slide file was last written, in nanoseconds: a repaired slide may have the size of the damaged one."""
    return {source.id: _stat(source).st_mtime_ns for source in sources}


def _stat(source: TileSource) -> os.stat_result:
    try:
        return source.path.stat()
    except OSError as error:
        raise SlideNotFoundError(f"{source.name}: there is no slide {source.path} ({error.strerror})") from None


def _annotations_digest(annotations: Iterable[Annotation]) -> str:
    """Digest of what decides a mask: kinds, classes, outlines and who lies below whom."""
    order: dict[Any, int] = {None: -1}
    digest = sha256()
    for record in annotations:
        order[record.id] = len(order)
        outline = b"" if record.geometry is None else record.geometry.wkb
        digest.update(repr((record.kind, record.path_class, order.get(record.parent, -1), len(outline))).encode())
        digest.update(outline)
    return digest.hexdigest()


def _digest(data: Any) -> str:  # noqa: ANN401 - any JSON value
    return sha256(canonical_json(data)).hexdigest()


def _is_complete(out: Path, state: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Whether `out` holds just this dataset; clear it of another one, or refuse."""
    held, is_finished = _held_state(out), (out / MANIFEST).exists()
    if held is None:
        return False
    if held["request"] != state["request"] and not overwrite:
        raise TileError(
            f"{out} holds a dataset of other slides, annotations or settings; overwrite it or give another folder"
        )
    if held == state:
        return is_finished
    if held["request"] == state["request"]:
        changed = [key for key, time in state["modified"].items() if held["modified"].get(key) != time]
        if is_finished and not overwrite:
            _log.warning(
                "%s was cut before the slides of %s were written the last time (image ids); if their pixels changed, "
                "give another folder",
                out,
                ", ".join(changed),
            )
            return True
        _log.info("The slides of %s were written since tiles were cut (image ids); they are cut again", changed)
    # The manifest goes first: a folder cleared by half must not look finished.
    for name in (MANIFEST, TILES, _JOURNAL):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / PIXELS, ignore_errors=True)
    return False


def _held_state(out: Path) -> dict[str, Any] | None:
    """Digest and times of the slides that `out` was or is being built for; None when it holds no dataset of ours."""
    journal = out / _JOURNAL
    if (out / MANIFEST).exists():
        found: Mapping[str, Any] | None = read_manifest(out)
    elif journal.exists():
        with journal.open("rb") as lines:
            found = _parsed(lines.readline())
    else:
        return None
    return None if found is None else {"request": found.get("request"), "modified": dict(found.get("modified", {}))}


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Read one line of a journal; None for the torn last line of a build that was killed."""
    if not line.endswith(b"\n"):
        return None
    try:
        data = parse_json(line, NOTES)
    except ValueError:
        return None
    return data if isinstance(data, dict) else None


class _Journal:
    """Keep finished jobs on disk as they come.

    Parameters
    ----------
    path : Path
        The file; what it holds of the same request is kept.
    state : mapping
        Digest of the request, and when its slides were written.
    """

    def __init__(self, path: Path, state: Mapping[str, Any]) -> None:
        self.found: dict[str, ScannedTiles] = {}
        header = canonical_json(state) + b"\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._file.seek(0)
        kept = len(header) if self._file.readline() == header else 0
        for line in iter(self._file.readline, b"") if kept else ():
            entry = _parsed(line)
            if entry is None:
                break
            self.found[entry["job"]] = ScannedTiles(np.array(entry["rows"], np.int64), tuple(entry["digests"]))
            kept += len(line)
        self._file.truncate(kept)
        if not kept:
            self._append(header)

    def add(self, job: TileJob, found: ScannedTiles) -> None:
        """Note a finished job, whose files are written; one on a damaged spot is tried again by the next build."""
        if found.unreadable or found.mended:
            return
        self._append(canonical_json({"job": job.key, "rows": found.rows.tolist(), "digests": found.digests}) + b"\n")

    def _append(self, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
