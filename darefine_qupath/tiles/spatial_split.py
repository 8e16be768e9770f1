"""Split the slides themselves into training and validation, for a project with a single annotated case."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import shapely

from darefine_qupath.errors import TileError
from darefine_qupath.tiles.grouping import TileGroups, parts_to_assign
from darefine_qupath.tiles.index import TileIndex
from darefine_qupath.tiles.roles import Group, Role, Split, fixed_roles, warn_of_missing_classes

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["spatial_split"]

_log = logging.getLogger(__name__)


def spatial_split(
    tiles: TileIndex,
    *,
    validation: float = 0.2,
    test: float = 0.0,
    seed: int = 0,
    fixed: Mapping[str, Role] | None = None,
) -> Split:
    """Split the slides themselves: what remains for a project with a single annotated case.

    Blocks of whole contexts go to one side (squares as large as a context where contexts are centred); if there are
    too few contexts, blocks of slices do, whose context both sides then see. No pixel is in slices of two sides:
    slices that reach over a border take no part. Both sides are still the same tissue, stain and scan, so the
    validation scores are too good; the log says so.

    The parameters are those of `split_tiles`; images with a settled role, and others of their case, are not split.

    Raises
    ------
    TileError
        If even single slices are too few.
    """
    settled = fixed_roles(tiles.images, fixed or {})
    images = {image.id: settled[image.group] for image in tiles.images if image.group in settled}
    is_free = np.array([image.id not in images for image in tiles.images], bool)
    free_tiles = tiles.subset(is_free[tiles.image])
    by_tile = _roles_by_tile(free_tiles, parts_to_assign(validation, test, set()), np.random.default_rng(seed))
    _log.warning(
        "Validation is on other parts of the slides that train (%d of %d tiles at the borders take no part), so its "
        "scores are too good; annotate a second case for an honest split",
        len(free_tiles) - len(by_tile),
        len(free_tiles),
    )
    split = Split(images=images, tiles=by_tile)
    warn_of_missing_classes(tiles, split)
    return split


def _roles_by_tile(tiles: TileIndex, parts: list[tuple[Role, float]], rng: np.random.Generator) -> dict[str, Role]:
    """Give tiles their roles by id, without the tiles that take no part."""
    blocks = next(
        (found for found in (_context_blocks(tiles), _slice_blocks(tiles)) if len(set(found)) > 2 * len(parts)), None
    )
    if blocks is None:
        raise TileError(f"{len(tiles)} tiles are too few to split into training and {[role for role, _ in parts]}")
    groups = TileGroups.of(tiles, blocks)
    roles = groups.assign(list(range(len(groups.names))), parts, rng, has_train=False)
    kept = _without_overlap(tiles, [roles[block] for block in blocks])
    return {name: role for name, role in zip(tiles.ids(), kept, strict=True) if role is not None}


def _context_blocks(tiles: TileIndex) -> list[Group]:
    """Name the image and context of every tile; for centred contexts, image and square of a context's size."""
    corners = tiles.context_xy
    if tiles.spec.placement == "centred":
        sides = np.array([spec.context_px for spec in tiles.pixel_specs])[tiles.image]
        corners = tiles.slice_xy // sides[:, None]
    return _blocks(tiles, corners)


def _slice_blocks(tiles: TileIndex) -> list[Group]:
    sides = np.array([spec.slice_px for spec in tiles.pixel_specs])[tiles.image]
    return _blocks(tiles, tiles.slice_xy // sides[:, None])


def _blocks(tiles: TileIndex, corners: NDArray[np.int32]) -> list[Group]:
    ids = [image.id for image in tiles.images]
    return [(ids[number], *xy) for number, xy in zip(tiles.image.tolist(), corners.tolist(), strict=True)]


def _without_overlap(tiles: TileIndex, roles: list[Role]) -> list[Role | None]:
    """Return roles; None for training tiles that show a pixel of another part, and validation tiles of test."""
    kept: list[Role | None] = list(roles)
    sides = np.array([spec.slice_px for spec in tiles.pixel_specs])[tiles.image]
    # Half a pixel less on every side, so that slices side by side do not meet; a band of its own for every image.
    left, top = tiles.slice_xy[:, 0] + 0.5, tiles.slice_xy[:, 1] + 0.5
    offset = tiles.image * (2.0 * max(image.size.height for image in tiles.images) + 4.0 * sides.max())
    boxes = shapely.box(left, top + offset, left + sides - 1, top + offset + sides - 1)
    order = {"train": 0, "validation": 1, "test": 2}
    rank = np.array([order[role] for role in roles])
    for role in ("validation", "test"):
        others = shapely.STRtree(boxes[rank == order[role]])
        for index in np.flatnonzero(rank < order[role]):
            if len(others.query(boxes[index], predicate="intersects")):
                kept[index] = None
    return kept
