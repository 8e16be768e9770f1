"""Divide tiles into training, validation and test; store the roles of images in the project."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from darefine_qupath.errors import ConfigError, TileError
from darefine_qupath.project import open_project
from darefine_qupath.tiles.index import TileIndex
from darefine_qupath.tiles.roles import ROLE_KEY, Role, Split, explicit_roles, roles_of_metadata
from darefine_qupath.tiles.sampling import cap_tiles
from darefine_qupath.tiles.sources import TileSource
from darefine_qupath.tiles.split import k_folds, split_images, split_tiles

__all__ = ["SamplingSpec", "SplitSpec", "divide", "hold_back", "save_roles"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitSpec:
    """How tiles are divided; the ``[split]`` table of the settings.

    Attributes
    ----------
    validation : float
        Share of the tiles that validates, in whole cases where there are several; 0 for none.
    test : float
        Share of the tiles that is held back.
    validation_images : tuple of str
        Names, ids or cases of images that validate; all others train.
    test_images : tuple of str
        Names, ids or cases of images that give no tiles.
    folds : int
        Number of folds of a cross-validation; 0 for none.
    fold : int
        Which of them validates, from 1; 0 for all, one after the other.
    """

    validation: float = 0.2
    test: float = 0.0
    validation_images: tuple[str, ...] = ()
    test_images: tuple[str, ...] = ()
    folds: int = 0
    fold: int = 0

    def __post_init__(self) -> None:
        for name, share in (("validation", self.validation), ("test", self.test)):
            if not 0 <= share <= 0.9:
                raise ConfigError(f"{name} = {share} must be a share of the tiles, 0 to 0.9")
        if self.validation + self.test > 0.95:
            raise ConfigError(f"validation = {self.validation} and test = {self.test} leave nothing to train on")
        if self.folds < 0 or self.folds == 1:
            raise ConfigError(f"folds = {self.folds} must be 2 or more, or 0 for none")
        if self.fold and not self.folds:
            raise ConfigError(f"fold = {self.fold} needs the number of folds too")
        if not 0 <= self.fold <= self.folds:
            raise ConfigError(f"fold = {self.fold} must be one of the folds, 1 to {self.folds}")
        if self.folds and self.validation_images:
            raise ConfigError("In a cross-validation every case validates once: give folds or validation_images")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSpec:
    """Which training tiles an epoch draws from; the ``[sampling]`` table of the settings.

    Attributes
    ----------
    max_per_image : int
        Most training tiles of an image; 0 for no limit.
    max_per_image_class : int
        Most training tiles of an image with the same rarest class; 0 for no limit.
    hard_examples : str
        Run folder or model file whose mistakes decide which tiles come more often; empty for none.
    hard_boost : float
        How much more often a tile comes that the former model has all wrong than one it has all right: 1 + this.
    """

    max_per_image: int = 0
    max_per_image_class: int = 0
    hard_examples: str = ""
    hard_boost: float = 3.0

    def __post_init__(self) -> None:
        for name, cap in (("max_per_image", self.max_per_image), ("max_per_image_class", self.max_per_image_class)):
            if cap < 0:
                raise ConfigError(f"{name} = {cap} must be a number of tiles, or 0 for no limit")
        if not 0 <= self.hard_boost <= 100:
            raise ConfigError(f"hard_boost = {self.hard_boost} must lie between 0 and 100")

    @property
    def hard_model(self) -> Path | None:
        """The model file of `hard_examples`; None for none."""
        if not self.hard_examples:
            return None
        path = Path(self.hard_examples)
        return path / "model.safetensors" if path.is_dir() else path

    def cap(self, tiles: TileIndex, *, seed: int) -> TileIndex:
        """Thin out what there is too much of; the same tiles for the same seed."""
        kept = cap_tiles(
            tiles,
            per_image=self.max_per_image or None,
            per_image_class=self.max_per_image_class or None,
            seed=seed,
        )
        if len(kept) < len(tiles):
            _log.info("The limits per image and class leave %d of %d tiles", len(kept), len(tiles))
        return kept


def hold_back(sources: Sequence[TileSource], named: Collection[str]) -> tuple[tuple[TileSource, ...], tuple[str, ...]]:
    """Leave test images out before a tile is cut.

    Parameters
    ----------
    sources : sequence of TileSource
        Annotated images.
    named : collection of str
        Names, ids or cases of test images, beside those whose metadata says so. Images of the same case follow.

    Returns
    -------
    tuple of TileSource
        What is left.
    tuple of str
        Ids of the test images.

    Raises
    ------
    TileError
        If nothing is left.
    """

    def is_test(source: TileSource) -> bool:
        by_metadata = source.metadata.get(ROLE_KEY, "").strip() == "test"
        return by_metadata or bool({source.id, source.name, source.known_case} & set(named))

    cases = {source.known_case for source in sources if is_test(source)} - {None}
    held_back = {source.id for source in sources if is_test(source) or source.known_case in cases}
    kept = tuple(source for source in sources if source.id not in held_back)
    if not kept:
        raise TileError("Every annotated image is a test image; leave some to train on")
    return kept, tuple(sorted(held_back))


def divide(tiles: TileIndex, spec: SplitSpec, *, seed: int) -> Split:
    """Divide tiles by what is asked for and by the roles that the project's metadata give.

    Parameters
    ----------
    tiles : TileIndex
        All tiles; none of images that are held back.
    spec : SplitSpec
        What is asked for. Images that it names go over roles in metadata, shares go below them.
    seed : int
        Which of equally good splits.

    Returns
    -------
    Split
        With `folds`, that of `fold`, which must be given. Metadata that says train or validation does not count then.
    """
    fixed = roles_of_metadata(tiles.images)
    if spec.folds:
        return _choose_fold(tiles, spec, fixed, seed)
    if spec.validation_images:
        fixed = {key: role for key, role in fixed.items() if role != "validation"}
        fixed.update(explicit_roles(tiles.images, {"validation": spec.validation_images}))
    return split_tiles(tiles, validation=spec.validation, test=spec.test, seed=seed, fixed=fixed)


def _choose_fold(tiles: TileIndex, spec: SplitSpec, fixed: Mapping[str, Role], seed: int) -> Split:
    test = {image for image, role in fixed.items() if role == "test"}
    if spec.test and not test:
        held_back = split_images(tiles, validation=0, test=spec.test, seed=seed)
        test = {image for image, role in held_back.images.items() if role == "test"}
    return k_folds(tiles, spec.folds, seed=seed, test=test)[spec.fold - 1]


def save_roles(project: Path, roles: Mapping[str, Role]) -> int:
    """Write the roles of images into the project, as metadata that QuPath shows and every later split keeps to.

    Parameters
    ----------
    project : Path
        Project file or folder.

    Returns
    -------
    int
        Images whose metadata changed.
    """
    with open_project(project, engine="embedded") as opened:
        changed = {
            image.id: {ROLE_KEY: roles[image.id]}
            for image in opened.images
            if image.id in roles and image.metadata.get(ROLE_KEY) != roles[image.id]
        }
        opened.add_metadata(changed)
    return len(changed)
