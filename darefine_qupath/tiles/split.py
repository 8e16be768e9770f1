"""Split tiles into training, validation and test: whole cases, never tiles of one slide on both sides.

A project with one annotated case cannot be split so: `spatial_split` then splits the slide itself, and says that it
does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from darefine_qupath.errors import TileError
from darefine_qupath.tiles.grouping import TileGroups, parts_to_assign
from darefine_qupath.tiles.index import TileIndex
from darefine_qupath.tiles.roles import Group, Role, Split, fixed_roles, warn_of_missing_classes
from darefine_qupath.tiles.spatial_split import spatial_split

__all__ = ["k_folds", "split_images", "split_tiles"]


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
        Share of the tiles, as nearly as whole cases allow; 0 for none.
    seed : int, optional
        Which of equally good splits.
    fixed : mapping of str to str, optional
        Image id to role where that is settled, by `explicit_roles` or `roles_of_metadata`; images of the same case
        follow.

    Returns
    -------
    Split
        Of `split_images`, or of `spatial_split` where a single annotated case is left to train and to validate on.
    """
    settled = fixed_roles(tiles.images, fixed or {})
    groups = {tiles.images[number].group for number in np.unique(tiles.image).tolist()}
    taken = {settled[group] for group in groups if group in settled}
    parts = dict(parts_to_assign(validation, test, taken))
    if len(groups - set(settled)) == 1 and "train" not in taken and parts:
        left = 0.0 if "test" in taken else test
        return spatial_split(tiles, validation=validation, test=left, seed=seed, fixed=fixed)
    return split_images(tiles, validation=validation, test=test, seed=seed, fixed=fixed)


def split_images(
    tiles: TileIndex,
    *,
    validation: float = 0.2,
    test: float = 0.0,
    seed: int = 0,
    fixed: Mapping[str, Role] | None = None,
) -> Split:
    """Split by case, or by image where no case is named, with every class on every side if that can be.

    The parameters are those of `split_tiles`. Images without tiles are in the split only if `fixed` names them or their
    case.

    Raises
    ------
    TileError
        If there are fewer cases than parts (for a single one see `split_tiles`), or one case has two fixed roles.
    """
    settled = fixed_roles(tiles.images, fixed or {})
    cases = TileGroups.of(tiles, [tiles.images[number].group for number in tiles.image.tolist()])
    free = [number for number, case in enumerate(cases.names) if case not in settled]
    taken = {settled[case] for case in cases.names if case in settled}
    parts = parts_to_assign(validation, test, taken)
    has_train = "train" in taken
    _check_enough(len(free), len(parts), has_train)
    roles = {**settled, **cases.assign(free, parts, np.random.default_rng(seed), has_train=has_train)}
    split = Split(images={image.id: roles[image.group] for image in tiles.images if image.group in roles})
    warn_of_missing_classes(tiles, split)
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
    settled = fixed_roles(tiles.images, dict.fromkeys(test, "test"))
    cases = TileGroups.of(tiles, [tiles.images[number].group for number in tiles.image.tolist()])
    free = [number for number, case in enumerate(cases.names) if case not in settled]
    if not 2 <= k <= len(free):
        raise TileError(f"{len(free)} annotated cases give 2 to {len(free)} folds, not {k}")
    fold_of = {cases.names[number]: fold for number, fold in cases.deal(free, k, np.random.default_rng(seed)).items()}
    splits = []
    for fold in range(k):
        roles: dict[Group, Role] = {n: "validation" if f == fold else "train" for n, f in fold_of.items()}
        roles.update(settled)
        splits.append(Split(images={image.id: roles[image.group] for image in tiles.images if image.group in roles}))
    return tuple(splits)


def _check_enough(num_free: int, num_parts: int, has_train: bool) -> None:
    needed = num_parts + (not has_train)
    if num_free == 0 and not has_train:
        raise TileError("Every annotated case has a role and none of them trains; leave some to train on")
    if num_free < needed:
        raise TileError(
            f"{num_free} annotated cases cannot be split into {needed} parts; annotate more, ask for fewer parts, or "
            f"split within the slides"
        )
