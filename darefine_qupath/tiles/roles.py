"""Give images the role of training, validation or test, and tiles only where they have that role.

A `Split` gives every image one role. `TilePart` is the only way from an index to training tiles, and it refuses tiles
of another role; so a tile of a test slide in training is impossible by construction.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np

from darefine_qupath.errors import TileError
from darefine_qupath.tiles.index import TileImage, TileIndex

__all__ = [
    "ROLE_KEY",
    "Group",
    "Role",
    "Split",
    "TilePart",
    "explicit_roles",
    "fixed_roles",
    "roles_of_metadata",
    "warn_of_missing_classes",
]

Role = Literal["train", "validation", "test"]
Group = tuple[Any, ...]
"""What a split keeps together: a case, an image, or a block of tiles on a slide."""

ROLE_KEY = "darefine.role"
"""Metadata key under which a project image carries its role."""

_ROLES: tuple[Role, ...] = ("train", "validation", "test")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Roles of images or, where one slide had to be split, of its tiles.

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
        """Whether one slide is on both sides: scores on such a validation part are too good."""
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
        """Return the metadata that saves an image's role in the project; empty for an image without one."""
        return {ROLE_KEY: self.images[image_id]} if image_id in self.images else {}

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; `from_json` gives the same split back."""
        return {"images": dict(self.images), "tiles": dict(self.tiles)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Split:
        """Rebuild the split that `to_json` wrote."""
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
    """Read the roles in the images' own metadata, under `ROLE_KEY`, by image id."""
    found = {image.id: image.metadata[ROLE_KEY].strip() for image in images if ROLE_KEY in image.metadata}
    wrong = {name: role for name, role in found.items() if role not in _ROLES}
    if wrong:
        raise TileError(f"The metadata {ROLE_KEY} of these images is not one of {list(_ROLES)}: {wrong}")
    return cast("dict[str, Role]", found)


def explicit_roles(images: Collection[TileImage], lists: Mapping[Role, Collection[str]]) -> dict[str, Role]:
    """Give images their roles by lists of names.

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


def fixed_roles(images: Collection[TileImage], fixed: Mapping[str, Role]) -> dict[Group, Role]:
    """Return roles that are settled, by what a split keeps together."""
    roles: dict[Group, Role] = {}
    for image in images:
        role = fixed.get(image.id)
        if role is not None and roles.setdefault(image.group, role) != role:
            raise TileError(f"Images of case {image.case!r} are fixed as {roles[image.group]} and as {role}")
    unknown = set(fixed) - {image.id for image in images}
    if unknown:
        raise TileError(f"Roles are given to images that are not there: {sorted(unknown)}")
    return roles


def warn_of_missing_classes(tiles: TileIndex, split: Split) -> None:
    """Say once which classes a part lacks."""
    roles = split.roles(tiles)
    everywhere = tiles.class_tiles > 0
    for role in dict.fromkeys(role for role in roles if role is not None):
        chosen = np.array([found == role for found in roles], bool)
        has = tiles.subset(chosen).class_tiles > 0
        lacking = [name for name, here, there in zip(tiles.classes.names, has, everywhere, strict=True) if there > here]
        if lacking:
            _log.warning("The %s part has no %s: too few cases hold it", role, ", ".join(lacking))
