"""Read and write tiles on disk.

A dataset folder holds ``dataset.json`` (what it was made from, written last), ``tiles.jsonl`` (one tile a line) and
``images/<image id>/{slice,context,mask}/<x>_<y>.*``; each context is stored once however many slices share it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from darefine_qupath.classes import ClassMap
from darefine_qupath.errors import TileError
from darefine_qupath.filesystem import atomic_write
from darefine_qupath.limits import DATA, NOTES, naming, parse_json, read_file
from darefine_qupath.tiles.index import TileImage, TileIndex, TileRecord
from darefine_qupath.tiles.slide_reader import TilePixels
from darefine_qupath.tiles.spec import TileSpec
from darefine_qupath.tiles.storage import PixelFolder, Storage

__all__ = ["DatasetReader", "canonical_json", "dataset_digest", "load_index", "read_manifest", "write_index"]

FORMAT = "darefine-tiles"
VERSION = 1

MANIFEST = "dataset.json"
TILES = "tiles.jsonl"
PIXELS = "images"


def load_index(folder: Path) -> TileIndex:
    """Read the index of a dataset folder.

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
    manifest = read_manifest(folder)
    with naming(f"The dataset {folder} is damaged; build it again", TileError):
        spec, classes = TileSpec.from_json(manifest["spec"]), ClassMap.from_json(manifest["classes"])
        images = tuple(TileImage.from_json(data) for data in manifest["images"])
        numbers = {image.id: number for number, image in enumerate(images)}
        lines = read_file(folder / TILES, DATA).splitlines()
        if len(lines) != manifest["num_tiles"]:
            raise TileError(f"it has {len(lines)} of {manifest['num_tiles']} tiles")
        rows = np.array([_row(parse_json(line, NOTES), numbers) for line in lines], np.int64)
        index = TileIndex.of_rows(spec, classes, images, rows)
        _ = index.pixel_specs  # the spec fits the pixel size of every image, or is refused here
        return index


def dataset_digest(folder: Path) -> str:
    """Read the digest (SHA-256) of a finished dataset's geometry, classes, images, tiles and every stored pixel."""
    return str(read_manifest(folder)["digest"])


class DatasetReader:
    """Read tiles from a dataset folder; pickles.

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
        manifest = read_manifest(folder)
        with naming(folder / MANIFEST, TileError):
            self._files = PixelFolder(
                root=folder / PIXELS,
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


def canonical_json(data: Any) -> bytes:  # noqa: ANN401 - any JSON value
    """Write JSON in the one form that digests are taken of."""
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()


def write_index(
    folder: Path, index: TileIndex, digests: Sequence[str], request: Mapping[str, Any], state: Mapping[str, Any]
) -> None:
    """Write the tiles of a dataset, each with the digest of its pixels, and last its manifest.

    `request` is all that decides what the dataset holds; `state` has its digest, and when its slides were written.
    """
    _write_tiles(folder / TILES, index, digests)
    _write_manifest(folder, index, request, state)


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
    manifest["digest"] = sha256(canonical_json(manifest) + (out / TILES).read_bytes()).hexdigest()
    # Not in the digest: a copy of a slide gives the same tiles.
    manifest["modified"] = state["modified"]
    with atomic_write(out / MANIFEST, TileError) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a finished dataset."""
    path = folder / MANIFEST
    if not path.exists():
        raise TileError(f"{folder} holds no finished dataset; build it with darefine tiles")
    with naming(f"{path} is damaged; build the dataset again", TileError):
        manifest = parse_json(read_file(path, NOTES), NOTES)
        kind, version = manifest["format"], manifest["version"]
    if (kind, version) != (FORMAT, VERSION):
        raise TileError(f"{path} is {kind!r} version {version}, not {FORMAT!r} version {VERSION}; build it again")
    return dict(manifest)
