"""Tiles on disk.

A dataset folder holds ``dataset.json`` (what it was made from, written last), ``tiles.jsonl`` (one tile a line) and
``images/<image id>/{slice,context,mask}/<x>_<y>.*``; each context is stored once however many slices share it.
While it is being built, every finished job is a line of ``journal.jsonl``: a build that was killed goes on behind the
last whole line, and ends with the same bytes.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import ClassMap
from darefine_qupath.errors import DarefineError, SlideError, SlideNotFoundError, TileError
from darefine_qupath.filesystem import atomic_write
from darefine_qupath.limits import DATA, NOTES, naming, parse_json, read_file
from darefine_qupath.tiles.index import TileImage, TileIndex, TileRecord
from darefine_qupath.tiles.scan import (
    Finder,
    Found,
    ImagePlan,
    Job,
    Progress,
    Screening,
    check_index,
    plan_sources,
    run_jobs,
)
from darefine_qupath.tiles.sources import Opener, SlideReader, TilePixels, TileSource, open_source
from darefine_qupath.tiles.spec import TileSpec
from darefine_qupath.tiles.storage import PixelFolder, Storage

__all__ = ["DatasetReader", "build_dataset", "dataset_digest", "load_index"]

FORMAT = "darefine-tiles"
VERSION = 1

_MANIFEST = "dataset.json"
_TILES = "tiles.jsonl"
_JOURNAL = "journal.jsonl"
_PIXELS = "images"
_log = logging.getLogger(__name__)


def build_dataset(
    sources: Sequence[TileSource],
    spec: TileSpec,
    classes: ClassMap,
    out: Path,
    *,
    screening: Screening | None = None,
    storage: Storage | None = None,
    workers: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
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
    screening : Screening, optional
        Which tiles are worth having.
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
        In the order of `sources`, then of `plan_tiles`. The same input gives the same bytes.

    Raises
    ------
    TileError
        If no tile is left, if `out` holds a dataset of other input, or if writing fails.
    MissingMppError
        If `spec` is in micrometres and a slide's pixel size is unknown.
    """
    screening, storage = screening or Screening(), storage or Storage()
    try:
        request = _request(sources, spec, classes, screening, storage)
        digest = _digest({**request, "spec": spec.for_digest(), "classes": classes.for_digest()})
        state = {"request": digest, "modified": _modified(sources)}
        if _is_complete(out, state, overwrite=overwrite):
            return load_index(out)
        plans = plan_sources(sources, spec, classes, screening, opener)
        folder = PixelFolder(root=out / _PIXELS, storage=storage, classes=classes)
        for plan in plans:
            folder.make(plan.image.id)
        finder = Finder(SlideReader(sources, classes, opener=opener), classes, screening.min_labelled, folder)
        with _Journal(out / _JOURNAL, state) as journal:
            _do_missing(plans, finder, journal, workers, progress)
        index = _index(plans, journal.found, spec, classes)
        _write_tiles(out / _TILES, index, [d for job in _jobs(plans) for d in journal.found[job.key].digests])
        _write_manifest(out, index, request, state)
    except DarefineError:
        raise
    except OSError as error:
        raise TileError(f"Cannot write the dataset {out}: {error}; free space or give another folder") from error
    return index


def load_index(folder: Path) -> TileIndex:
    """Index of a dataset folder.

    Parameters
    ----------
    folder : Path
        What `build_dataset` wrote.

    Returns
    -------
    TileIndex
        All its tiles.

    Raises
    ------
    TileError
        If there is no finished dataset, or it is damaged or of another version.
    """
    manifest = _manifest(folder)
    with naming(f"The dataset {folder} is damaged; build it again", TileError):
        spec, classes = TileSpec.from_json(manifest["spec"]), ClassMap.from_json(manifest["classes"])
        images = tuple(TileImage.from_json(data) for data in manifest["images"])
        numbers = {image.id: number for number, image in enumerate(images)}
        lines = read_file(folder / _TILES, DATA).splitlines()
        if len(lines) != manifest["num_tiles"]:
            raise TileError(f"it has {len(lines)} of {manifest['num_tiles']} tiles")
        rows = np.array([_row(parse_json(line, NOTES), numbers) for line in lines], np.int64)
        index = TileIndex.of_rows(spec, classes, images, rows)
        _ = index.pixel_specs  # the spec fits the pixel size of every image, or is refused here
        return index


def dataset_digest(folder: Path) -> str:
    """Digest of a finished dataset: of its geometry, classes, images, tiles and every stored pixel (SHA-256)."""
    return str(_manifest(folder)["digest"])


class DatasetReader:
    """Tiles from a dataset folder; pickles.

    Parameters
    ----------
    folder : Path
        What `build_dataset` wrote.

    Raises
    ------
    TileError
        If there is no finished dataset, or it is of another version.
    """

    def __init__(self, folder: Path) -> None:
        manifest = _manifest(folder)
        with naming(folder / _MANIFEST, TileError):
            self._files = PixelFolder(
                root=folder / _PIXELS,
                storage=Storage(**manifest["storage"]),
                classes=ClassMap.from_json(manifest["classes"]),
            )

    def read(self, record: TileRecord) -> TilePixels:
        """Read one tile.

        Raises
        ------
        TileError
            If a file is missing or damaged.
        """
        image_id, pair = record.image.id, record.pair
        try:
            return TilePixels(
                self._files.read(image_id, "slice", pair.slice),
                self._files.read(image_id, "context", pair.context),
                self._files.read(image_id, "mask", pair.slice),
            )
        except (OSError, SyntaxError) as error:  # Pillow's PNG reader raises SyntaxError for a broken chunk
            raise TileError(f"Tile {record.id} cannot be read ({error}); build the dataset again") from error


def _request(
    sources: Sequence[TileSource], spec: TileSpec, classes: ClassMap, screening: Screening, storage: Storage
) -> dict[str, Any]:
    """All that decides what a dataset holds."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "spec": spec.to_json(),
        "classes": classes.to_json(),
        "screening": asdict(screening),
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


def _canonical(data: Any) -> bytes:  # noqa: ANN401 - any JSON value
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()


def _digest(data: Any) -> str:  # noqa: ANN401 - any JSON value
    return sha256(_canonical(data)).hexdigest()


def _is_complete(out: Path, state: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Whether `out` holds just this dataset; clear it of another one, or refuse."""
    held, is_finished = _held_state(out), (out / _MANIFEST).exists()
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
    for name in (_MANIFEST, _TILES, _JOURNAL):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / _PIXELS, ignore_errors=True)
    return False


def _held_state(out: Path) -> dict[str, Any] | None:
    """Digest and times of the slides that `out` was or is being built for; None when it holds no dataset of ours."""
    journal = out / _JOURNAL
    if (out / _MANIFEST).exists():
        found: Mapping[str, Any] | None = _manifest(out)
    elif journal.exists():
        with journal.open("rb") as lines:
            found = _parsed(lines.readline())
    else:
        return None
    return None if found is None else {"request": found.get("request"), "modified": dict(found.get("modified", {}))}


def _parsed(line: bytes) -> dict[str, Any] | None:
    """One line of a journal; None for the torn last line of a build that was killed."""
    if not line.endswith(b"\n"):
        return None
    try:
        data = parse_json(line, NOTES)
    except ValueError:
        return None
    return data if isinstance(data, dict) else None


class _Journal:
    """Finished jobs, on disk as they come.

    Parameters
    ----------
    path : Path
        The file; what it holds of the same request is kept.
    state : mapping
        Digest of the request, and when its slides were written.
    """

    def __init__(self, path: Path, state: Mapping[str, Any]) -> None:
        self.found: dict[str, Found] = {}
        header = _canonical(state) + b"\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._file.seek(0)
        kept = len(header) if self._file.readline() == header else 0
        for line in iter(self._file.readline, b"") if kept else ():
            entry = _parsed(line)
            if entry is None:
                break
            self.found[entry["job"]] = Found(np.array(entry["rows"], np.int64), tuple(entry["digests"]))
            kept += len(line)
        self._file.truncate(kept)
        if not kept:
            self._append(header)

    def add(self, job: Job, found: Found) -> None:
        """Note a finished job, whose files are written; one on a damaged spot is tried again by the next build."""
        self.found[job.key] = found
        if found.unreadable or found.mended:
            return
        self._append(_canonical({"job": job.key, "rows": found.rows.tolist(), "digests": found.digests}) + b"\n")

    def _append(self, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _jobs(plans: Iterable[ImagePlan]) -> Iterator[Job]:
    return (job for number, plan in enumerate(plans) for job in plan.jobs(number))


def _do_missing(
    plans: Sequence[ImagePlan], finder: Finder, journal: _Journal, workers: int, progress: Progress | None
) -> None:
    total = sum(len(plan.corners) for plan in plans)
    done = sum(len(job.pairs) for job in _jobs(plans) if job.key in journal.found)
    if done:
        _log.info("%d of %d tiles were done before", done, total)
    missing = (job for job in _jobs(plans) if job.key not in journal.found)
    unreadable: list[str] = []
    mended: list[str] = []
    for job, found in run_jobs(missing, finder, workers):
        journal.add(job, found)
        unreadable += found.unreadable
        mended += found.mended
        done += len(job.pairs)
        if progress is not None:
            progress(done, total)
    if unreadable and not any(len(found.rows) for found in journal.found.values()):
        raise SlideError(unreadable[0])
    if unreadable:
        _log.warning("%d tiles cannot be read and are left out; the first: %s", len(unreadable), unreadable[0])
    if mended:
        _log.warning("%d contexts are white where the slide is damaged; the first: %s", len(mended), mended[0])


def _index(plans: Sequence[ImagePlan], found: Mapping[str, Found], spec: TileSpec, classes: ClassMap) -> TileIndex:
    tables = [found[job.key].rows.reshape(-1, 6 + classes.num_classes) for job in _jobs(plans)]
    rows = np.concatenate(tables) if tables else ()
    index = TileIndex.of_rows(spec, classes, tuple(plan.image for plan in plans), rows)
    check_index(index, sum(len(plan.corners) for plan in plans))
    return index


def _write_tiles(path: Path, index: TileIndex, digests: Sequence[str]) -> None:
    with atomic_write(path, TileError) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for record, digest in zip(index, digests, strict=True):
            tile = {
                "image": record.image.id,
                "slice": [record.pair.slice.x, record.pair.slice.y, *record.pair.slice.size],
                "context": [record.pair.context.x, record.pair.context.y, *record.pair.context.size],
                "counts": list(record.counts),
                "ignored": record.ignored,
                "sha256": digest,
            }
            file.write(json.dumps(tile) + "\n")


def _row(tile: Mapping[str, Any], numbers: Mapping[str, int]) -> tuple[int, ...]:
    return (numbers[tile["image"]], *tile["slice"][:2], *tile["context"][:2], *tile["counts"], tile["ignored"])


def _write_manifest(out: Path, index: TileIndex, request: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    manifest = {
        **{key: request[key] for key in ("format", "version", "spec", "classes", "screening", "storage")},
        "request": state["request"],
        "images": [image.to_json() for image in index.images],
        "num_tiles": len(index),
        "class_pixels": dict(zip(index.classes.names, index.class_pixels.tolist(), strict=True)),
    }
    manifest["digest"] = sha256(_canonical(manifest) + (out / _TILES).read_bytes()).hexdigest()
    # Not in the digest: a copy of a slide gives the same tiles.
    manifest["modified"] = state["modified"]
    with atomic_write(out / _MANIFEST, TileError) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / _JOURNAL).unlink()


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    if not path.exists():
        raise TileError(f"{folder} holds no finished dataset; build it with darefine tiles")
    with naming(f"{path} is damaged; build the dataset again", TileError):
        manifest = parse_json(read_file(path, NOTES), NOTES)
        kind, version = manifest["format"], manifest["version"]
    if (kind, version) != (FORMAT, VERSION):
        raise TileError(f"{path} is {kind!r} version {version}, not {FORMAT!r} version {VERSION}; build it again")
    return dict(manifest)
