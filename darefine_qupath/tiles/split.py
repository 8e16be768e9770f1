"""Who trains, who validates, who tests: whole cases, never tiles of one slide on both sides.

A `Split` gives every image one role. `TilePart` is the only way from an index to training tiles, and it refuses tiles
of another role; so a tile of a test slide in training is impossible by construction. A project with one annotated case
cannot be split so: `spatial_split` then parts the slide itself, and says that it does.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import shapely

from darefine_qupath.errors import TileError
from darefine_qupath.tiles.index import TileImage, TileIndex

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "ROLE_KEY",
    "Role",
    "Split",
    "TilePart",
    "explicit_roles",
    "k_folds",
    "roles_of_metadata",
    "spatial_split",
    "split_images",
    "split_tiles",
]

Role = Literal["train", "validation", "test"]

ROLE_KEY = "darefine.role"
"""Metadata key under which a project image carries its role."""

_ROLES: tuple[Role, ...] = ("train", "validation", "test")
_ALL_SUBSETS = 12
_RANDOM_SUBSETS = 4000
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Roles of images or, where one slide had to be parted, of its tiles.

    Attributes
    ----------
    images : mapping of str to str
        Image id to role.
    tiles : mapping of str to str
        Tile id to role, of images that `images` does not name; tiles between the parts are in none. Empty unless
        `spatial_split` made it.
    """

    images: Mapping[str, Role]
    tiles: Mapping[str, Role] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, role in (*self.images.items(), *self.tiles.items()):
            if role not in _ROLES:
                raise TileError(f"The role of {key!r} is {role!r}; it must be one of {list(_ROLES)}")

    @property
    def is_spatial(self) -> bool:
        """Whether one slide stands on both sides: scores on such a validation part flatter."""
        return bool(self.tiles)

    def roles(self, tiles: TileIndex) -> list[Role | None]:
        """Role of every tile; None for a tile that takes no part."""
        by_image = [self.images.get(image.id) for image in tiles.images]
        if not self.tiles:
            return [by_image[number] for number in tiles.image.tolist()]
        pairs = zip(tiles.image.tolist(), tiles.ids(), strict=True)
        return [by_image[number] or self.tiles.get(name) for number, name in pairs]

    def part(self, tiles: TileIndex, role: Role) -> TilePart:
        """Return the tiles of one role."""
        chosen = np.array([found == role for found in self.roles(tiles)], bool)
        return TilePart(role=role, tiles=tiles.subset(chosen), split=self)

    def metadata(self, image_id: str) -> dict[str, str]:
        """Metadata that notes an image's role in the project; empty for an image without one."""
        return {ROLE_KEY: self.images[image_id]} if image_id in self.images else {}

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; `from_json` gives the same split back."""
        return {"images": dict(self.images), "tiles": dict(self.tiles)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Split:
        """Split of what `to_json` gave."""
        return cls(images=data["images"], tiles=data["tiles"])


@dataclass(frozen=True, kw_only=True)
class TilePart:
    """Tiles of one role, and the proof that they are.

    Attributes
    ----------
    role : str
        ``"train"``, ``"validation"`` or ``"test"``.
    tiles : TileIndex
        Only tiles of that role.
    split : Split
        Where the roles come from.

    Raises
    ------
    TileError
        If a tile has another role.
    """

    role: Role
    tiles: TileIndex
    split: Split

    def __post_init__(self) -> None:
        roles = self.split.roles(self.tiles)
        wrong = [index for index, role in enumerate(roles) if role != self.role]
        if wrong:
            record = self.tiles[wrong[0]]
            raise TileError(
                f"{len(wrong)} tiles are not {self.role} tiles; {record.id} of {record.image.name} has the role "
                f"{roles[wrong[0]]}"
            )

    def __len__(self) -> int:
        return len(self.tiles)


def roles_of_metadata(images: Iterable[TileImage]) -> dict[str, Role]:
    """Roles that the images' own metadata give, under `ROLE_KEY`, by image id."""
    found = {image.id: image.metadata[ROLE_KEY].strip() for image in images if ROLE_KEY in image.metadata}
    wrong = {name: role for name, role in found.items() if role not in _ROLES}
    if wrong:
        raise TileError(f"The metadata {ROLE_KEY} of these images is not one of {list(_ROLES)}: {wrong}")
    return cast("dict[str, Role]", found)


def explicit_roles(images: Collection[TileImage], lists: Mapping[Role, Collection[str]]) -> dict[str, Role]:
    """Roles by lists of images.

    Parameters
    ----------
    images : collection of TileImage
        All images.
    lists : mapping of str to collection of str
        Per role the images, by id, name or case.

    Returns
    -------
    dict of str to str
        Image id to role.

    Raises
    ------
    TileError
        If an entry names no image, or an image is in two lists.
    """
    roles: dict[str, Role] = {}
    for role, names in lists.items():
        for name in names:
            hits = [image for image in images if name in (image.id, image.name, image.case)]
            if not hits:
                known = ", ".join(repr(image.name) for image in images)
                raise TileError(f"The {role} list names {name!r}, which is not an image; there are {known}")
            for image in hits:
                if roles.setdefault(image.id, role) != role:
                    raise TileError(f"Image {image.name!r} is in the lists of {roles[image.id]} and of {role}")
    return roles


def split_images(
    tiles: TileIndex,
    *,
    validation: float = 0.2,
    test: float = 0.0,
    seed: int = 0,
    fixed: Mapping[str, Role] | None = None,
) -> Split:
    """Split by case, or by image where no case is named, with every class on every side if that can be.

    Parameters
    ----------
    tiles : TileIndex
        All tiles.
    validation, test : float, optional
        Share of the tiles to come near to; 0 for none.
    seed : int, optional
        Which of equally good splits.
    fixed : mapping of str to str, optional
        Image id to role where that is settled, by `explicit_roles` or `roles_of_metadata`; images of the same case
        follow.

    Returns
    -------
    Split
        Images without tiles are in it only if `fixed` names them or their case.

    Raises
    ------
    TileError
        If there are fewer cases than parts (for a single one see `split_tiles`), or one case has two fixed roles.
    """
    settled = _settled(tiles.images, fixed or {})
    units = _Units.of(tiles, [tiles.images[number].group for number in tiles.image.tolist()])
    roles: dict[Group, Role] = {**settled}
    free = [unit for unit, name in enumerate(units.names) if name not in settled]
    taken = {settled[name] for name in units.names if name in settled}
    parts = _parts(validation, test, taken)
    _check_enough(len(free), len(parts), "train" in taken)
    rng = np.random.default_rng(seed)
    for number, (role, share) in enumerate(parts):
        left_over = len(parts) - 1 - number + ("train" not in taken)
        chosen = units.pick(free, share, rng, most=len(free) - left_over)
        roles.update((units.names[unit], role) for unit in chosen)
        free = [unit for unit in free if unit not in chosen]
    roles.update((units.names[unit], "train") for unit in free)
    split = Split(images={image.id: roles[image.group] for image in tiles.images if image.group in roles})
    _report(tiles, split)
    return split


def k_folds(tiles: TileIndex, k: int, *, seed: int = 0, test: Collection[str] = ()) -> tuple[Split, ...]:
    """Make splits in which every case validates once.

    Parameters
    ----------
    tiles : TileIndex
        All tiles.
    k : int
        Number of folds, at least 2.
    seed : int, optional
        Which of equally good folds.
    test : collection of str, optional
        Ids of images that are test images in every fold, with all of their case.

    Returns
    -------
    tuple of Split
        Fold `i` validates on part `i` and trains on the others; the folds share the classes out as evenly as whole
        cases allow.

    Raises
    ------
    TileError
        If there are fewer than `k` cases.
    """
    settled = _settled(tiles.images, dict.fromkeys(test, "test"))
    units = _Units.of(tiles, [tiles.images[number].group for number in tiles.image.tolist()])
    free = [unit for unit, name in enumerate(units.names) if name not in settled]
    if not 2 <= k <= len(free):
        raise TileError(f"{len(free)} annotated cases give 2 to {len(free)} folds, not {k}")
    fold_of = {units.names[unit]: fold for unit, fold in units.deal(free, k, np.random.default_rng(seed)).items()}
    splits = []
    for fold in range(k):
        roles: dict[Group, Role] = {n: "validation" if f == fold else "train" for n, f in fold_of.items()}
        roles.update(settled)
        splits.append(Split(images={image.id: roles[image.group] for image in tiles.images if image.group in roles}))
    return tuple(splits)


def spatial_split(
    tiles: TileIndex,
    *,
    validation: float = 0.2,
    test: float = 0.0,
    seed: int = 0,
    fixed: Mapping[str, Role] | None = None,
) -> Split:
    """Part the slides themselves: what remains for a project with a single annotated case.

    Blocks of whole contexts go to one side (squares as large as a context where contexts are centred); if there are
    too few contexts, blocks of slices do, whose context both sides then see. No pixel is in slices of two sides:
    slices that reach over a border take no part. Both sides still are the same tissue, stain and scan, so the
    validation scores flatter; the log says so.

    Parameters
    ----------
    tiles : TileIndex
        All tiles.
    validation, test : float, optional
        Share of the tiles to come near to; 0 for none.
    seed : int, optional
        Which of equally good splits.
    fixed : mapping of str to str, optional
        Image id to role, as for `split_images`; these images, and others of their case, are not parted.

    Returns
    -------
    Split
        With a role per tile.

    Raises
    ------
    TileError
        If even single slices are too few.
    """
    settled = _settled(tiles.images, fixed or {})
    images = {image.id: settled[image.group] for image in tiles.images if image.group in settled}
    is_free = np.array([image.id not in images for image in tiles.images], bool)
    parted = tiles.subset(is_free[tiles.image])
    by_tile = _parted(parted, _parts(validation, test, set()), np.random.default_rng(seed))
    _log.warning(
        "Validation is on other parts of the slides that train (%d of %d tiles at the borders take no part), so its "
        "scores flatter; annotate a second case for an honest split",
        len(parted) - len(by_tile),
        len(parted),
    )
    split = Split(images=images, tiles=by_tile)
    _report(tiles, split)
    return split


def split_tiles(
    tiles: TileIndex,
    *,
    validation: float = 0.2,
    test: float = 0.0,
    seed: int = 0,
    fixed: Mapping[str, Role] | None = None,
) -> Split:
    """Split by case where there are enough of them, and else within the slides.

    Parameters
    ----------
    tiles : TileIndex
        All tiles.
    validation, test : float, optional
        Share of the tiles to come near to; 0 for none.
    seed : int, optional
        Which of equally good splits.
    fixed : mapping of str to str, optional
        Image id to role where that is settled.

    Returns
    -------
    Split
        Of `split_images`, or of `spatial_split` where a single annotated case is left to train and to validate on.
    """
    settled = _settled(tiles.images, fixed or {})
    groups = {tiles.images[number].group for number in np.unique(tiles.image).tolist()}
    taken = {settled[group] for group in groups if group in settled}
    parts = dict(_parts(validation, test, taken))
    if len(groups - set(settled)) == 1 and "train" not in taken and parts:
        left = 0.0 if "test" in taken else test
        return spatial_split(tiles, validation=validation, test=left, seed=seed, fixed=fixed)
    return split_images(tiles, validation=validation, test=test, seed=seed, fixed=fixed)


Group = tuple[Any, ...]


def _parts(validation: float, test: float, taken: Collection[Role]) -> list[tuple[Role, float]]:
    """Parts to choose one after the other, each with its share of what is left."""
    if validation < 0 or test < 0 or validation + test >= 1:
        raise TileError(f"validation = {validation} and test = {test} must be shares that leave some to train on")
    parts: list[tuple[Role, float]] = [("test", test), ("validation", validation / (1 - test))]
    return [(role, share) for role, share in parts if share > 0 and role not in taken]


def _parted(tiles: TileIndex, parts: list[tuple[Role, float]], rng: np.random.Generator) -> dict[str, Role]:
    """Roles by tile id, without the tiles that take no part."""
    blocks = next(
        (found for found in (_context_blocks(tiles), _slice_blocks(tiles)) if len(set(found)) > 2 * len(parts)), None
    )
    if blocks is None:
        raise TileError(f"{len(tiles)} tiles are too few to part into training and {[role for role, _ in parts]}")
    units = _Units.of(tiles, blocks)
    roles: dict[Group, Role] = dict.fromkeys(units.names, "train")
    free = list(range(len(units.names)))
    for number, (role, share) in enumerate(parts):
        chosen = units.pick(free, share, rng, most=len(free) - len(parts) + number)
        roles.update((units.names[unit], role) for unit in chosen)
        free = [unit for unit in free if unit not in chosen]
    kept = _without_overlap(tiles, [roles[block] for block in blocks])
    return {name: role for name, role in zip(tiles.ids(), kept, strict=True) if role is not None}


def _check_enough(num_free: int, num_parts: int, has_train: bool) -> None:
    needed = num_parts + (not has_train)
    if num_free == 0 and not has_train:
        raise TileError("Every annotated case has a role and none of them trains; leave some to train on")
    if num_free < needed:
        raise TileError(
            f"{num_free} annotated cases cannot be split into {needed} parts; annotate more, ask for fewer parts, or "
            f"split within the slides"
        )


def _settled(images: Collection[TileImage], fixed: Mapping[str, Role]) -> dict[Group, Role]:
    """Return fixed roles by group."""
    roles: dict[Group, Role] = {}
    for image in images:
        role = fixed.get(image.id)
        if role is not None and roles.setdefault(image.group, role) != role:
            raise TileError(f"Images of case {image.case!r} are fixed as {roles[image.group]} and as {role}")
    unknown = set(fixed) - {image.id for image in images}
    if unknown:
        raise TileError(f"Roles are given to images that are not there: {sorted(unknown)}")
    return roles


@dataclass(frozen=True)
class _Units:
    """What a split keeps together, with what it holds.

    Attributes
    ----------
    names : list of tuple
        Sorted, so that the order of the images does not matter.
    content : ndarray of float64, shape (U, K + 1)
        Share of each class's pixels and, last, of the tiles.
    """

    names: list[Group]
    content: NDArray[np.float64]

    @classmethod
    def of(cls, tiles: TileIndex, groups: list[Group]) -> _Units:
        names = sorted(set(groups))
        numbers = {name: number for number, name in enumerate(names)}
        content = np.zeros((len(names), tiles.classes.num_classes + 1))
        columns = np.column_stack([tiles.counts[:, :-1], np.ones(len(tiles), np.int64)])
        np.add.at(content, [numbers[group] for group in groups], columns)
        return cls(names, content / np.maximum(content.sum(axis=0), 1))

    def pick(self, free: list[int], share: float, rng: np.random.Generator, *, most: int) -> set[int]:
        """Units that hold nearly `share` of everything in `free`, at most `most`; every class on both sides first."""
        order = rng.permutation(free)
        candidates = _subsets(len(order), share, rng)
        candidates = candidates[(candidates.sum(axis=1) >= 1) & (candidates.sum(axis=1) <= most)]
        content = self.content[order]
        content = content[:, content.sum(axis=0) > 0]
        picked = candidates @ (content / content.sum(axis=0))
        # A class that training lacks is worse than one that validation lacks, and both are worse than uneven shares.
        lacks_rest, lacks_picked = (picked > 1 - 1e-12).sum(axis=1), (picked < 1e-12).sum(axis=1)
        unevenness = np.abs(picked - share).mean(axis=1).round(9)
        best = np.lexsort((unevenness, lacks_picked, lacks_rest))[0]
        return {int(unit) for unit in order[candidates[best]]}

    def deal(self, free: list[int], k: int, rng: np.random.Generator) -> dict[int, int]:
        """Fold of each unit: the largest first, each where it evens the folds out most."""
        order = sorted(rng.permutation(free).tolist(), key=lambda unit: -self.content[unit].max())
        folds = np.zeros((k, self.content.shape[1]))
        fold_of: dict[int, int] = {}
        for number, unit in enumerate(order):
            empty = [fold for fold in range(k) if fold not in fold_of.values()]
            must_fill = len(order) - number <= len(empty)
            unevenness = {}
            for fold in empty if must_fill else range(k):
                trial = folds.copy()
                trial[fold] += self.content[unit]
                unevenness[fold] = trial.std(axis=0).sum()
            best = min(unevenness, key=lambda fold: unevenness[fold])
            folds[best] += self.content[unit]
            fold_of[unit] = best
        return fold_of


def _subsets(number: int, share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Candidate subsets, shape (candidates, number): all of a few units, else random ones of about the right size."""
    if number <= _ALL_SUBSETS:
        return np.array(list(product((False, True), repeat=number)), bool).reshape(-1, number)
    wanted = np.clip(np.round(number * share * rng.uniform(0.5, 1.5, _RANDOM_SUBSETS)), 1, number - 1)
    ranks = rng.permuted(np.tile(np.arange(number), (_RANDOM_SUBSETS, 1)), axis=1)
    return np.asarray(ranks < wanted[:, None])


def _context_blocks(tiles: TileIndex) -> list[Group]:
    """Image and context of every tile; for centred contexts, image and square of a context's size."""
    corners = tiles.context_xy
    if not tiles.spec.is_parent:
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
    """Roles, None for training tiles that show a pixel of another part and validation tiles that show one of test."""
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


def _report(tiles: TileIndex, split: Split) -> None:
    """Say once which classes a part lacks."""
    roles = split.roles(tiles)
    everywhere = tiles.class_tiles > 0
    for role in dict.fromkeys(role for role in roles if role is not None):
        chosen = np.array([found == role for found in roles], bool)
        has = tiles.subset(chosen).class_tiles > 0
        lacking = [name for name, here, there in zip(tiles.classes.names, has, everywhere, strict=True) if there > here]
        if lacking:
            _log.warning("The %s part has no %s: too few cases hold it", role, ", ".join(lacking))
