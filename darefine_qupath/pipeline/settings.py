"""``darefine.toml``: the settings of a project, read once and checked by their owners.

::

    [classes]
    names = ["Normal", "Benign", "In situ", "Invasive"]   # label order; default: the project's class list
    unlabelled = "ignore"                                 # or the class of what no annotation covers
    region_unlabelled = "ignore"                          # the same inside Region* annotations
    [classes.map]
    "DCIS" = "In situ"                                    # project class = training class
    [classes.colors]
    Invasive = "#c81e28"

    [tiles]      # fields of TileSpec (input_px, slice_um ...), TileFilter (min_labelled ...), Storage (pixels ...)
    [split]      # fields of SplitSpec: validation, test, validation_images, test_images, folds
    [sampling]   # fields of SamplingSpec: max_per_image, max_per_image_class, hard_examples ...
    [model]      # fields of ModelConfig: slice_encoder, context_encoder, fusion, width ...
    [train]      # fields of TrainConfig: preset, epochs, batch_size ...
    [images]     # mpp = 0.25: of every slide, over what QuPath and the files say

A key that nothing reads is an error: a typing mistake must not pass for a setting.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from darefine_qupath.classes import ClassMap, Color, PathClass, is_ignored
from darefine_qupath.errors import ConfigError
from darefine_qupath.geometry import MPP_LIMITS
from darefine_qupath.limits import NOTES, naming, parse_toml, read_file
from darefine_qupath.pipeline.splitting import SamplingSpec, SplitSpec
from darefine_qupath.tiles import spec
from darefine_qupath.tiles.scan import TileFilter
from darefine_qupath.tiles.spec import TileSpec
from darefine_qupath.tiles.storage import Storage

if TYPE_CHECKING:
    from darefine_qupath.models import ModelConfig

__all__ = ["FILE_NAME", "RECORDED_NAME", "Settings", "read_settings", "with_current_names"]

FILE_NAME = "darefine.toml"
RECORDED_NAME = "settings.toml"
"""What a run folder calls its copy, which may be of an earlier version."""

_FORMER_NAMES = {**spec.FORMER_NAMES, "colours": "colors", "hard": "hard_examples"}

T = TypeVar("T")

_CLASS_KEYS = ("names", "unlabelled", "region_unlabelled", "map", "colors")
_SECTIONS = ("classes", "tiles", "split", "sampling", "model", "train", "images")
_KINDS: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "str": (str, "a text"),
    "tuple": (list, "a list of names"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The tables of ``darefine.toml``; empty ones where there is no file.

    Attributes
    ----------
    path : Path or None
        The file; None when there is none.
    classes, tiles, split, sampling, model, train, images : mapping
        Its tables.
    """

    path: Path | None = None
    classes: Mapping[str, Any] = field(default_factory=dict)
    tiles: Mapping[str, Any] = field(default_factory=dict)
    split: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mpp(self) -> float | None:
        """Micrometres per pixel of every slide of the project, over what QuPath and the files say."""
        _refuse_unknown(self.images, ("mpp",), "images", self.path)
        value = self.images.get("mpp")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        least, largest = MPP_LIMITS
        if value is not None and not (is_number and least <= value <= largest):
            raise ConfigError(
                f"{self.path}: [images] mpp = {value!r} must be a positive number, {least:g} to {largest:g} um"
            )
        return value

    def class_map(self, project_classes: Iterable[PathClass], used: Mapping[str, int]) -> ClassMap:
        """Class map of the ``[classes]`` table, completed from the project.

        Parameters
        ----------
        project_classes : iterable of PathClass
            The project's class list: colours, and the label order where the table names none.
        used : mapping of str to int
            Annotations per class. Without a table the training classes are those of the list that are used.

        Raises
        ------
        ConfigError
            If the table has an unknown key, or no class is left.
        ClassMapError
            If the table contradicts itself.
        """
        table = self.classes
        _refuse_unknown(table, _CLASS_KEYS, "classes", self.path)
        self._check_class_values()
        listed = {path_class.name: path_class.color for path_class in project_classes}
        sources = dict(table.get("map", {}))
        names = table.get("names")
        if names is None:
            targets = {sources.get(name, name) for name in used if not is_ignored(name)}
            targets |= {
                table[key] for key in ("unlabelled", "region_unlabelled") if table.get(key, "ignore") != "ignore"
            }
            names = [name for name in listed if name in targets]
            names += sorted(targets - set(names))
        if not names:
            raise ConfigError(
                "The project has no annotation of any class to learn; draw some in QuPath and give each a class "
                "(classes whose name ends in '*' do not count)"
            )
        given = {name: Color.from_hex(text) for name, text in table.get("colors", {}).items()}
        plain = ClassMap(names=tuple(names))
        colors = tuple(
            given.get(name) or listed.get(name) or color for name, color in zip(names, plain.colors, strict=True)
        )
        return ClassMap(
            names=tuple(names),
            colors=colors,
            sources=sources,
            unlabelled=table.get("unlabelled", "ignore"),
            region_unlabelled=table.get("region_unlabelled", "ignore"),
        )

    def _check_class_values(self) -> None:
        for key, value in self.classes.items():
            if key == "names":
                fits, wanted = isinstance(value, list) and _all_text(value), 'a list of names, ["Normal", "Tumor"]'
            elif key in ("map", "colors"):
                fits, wanted = isinstance(value, dict) and _all_text(value.values()), f"a table [classes.{key}] of text"
            else:
                fits, wanted = isinstance(value, str), "the name of a class, or 'ignore'"
            if not fits:
                raise ConfigError(f"{self.path}: [classes] {key} = {value!r} must be {wanted}")

    def tile_spec(self, default: TileSpec, **changes: Any) -> TileSpec:  # noqa: ANN401 - any field
        """Tile spec of the ``[tiles]`` table; `changes` that are not None go over it.

        Sizes given in micrometres replace sizes in pixels and the other way round, as one triple.
        """
        self._check_tile_keys()
        table = {key: value for key, value in self.tiles.items() if key in _names(TileSpec)}
        merged = default.to_json()
        for layer in (table, {key: value for key, value in changes.items() if value is not None}):
            units = {key.rsplit("_", 1)[1] for key in layer if key.split("_")[0] in ("slice", "context", "stride")}
            if "context_input_px" in layer and not {"context_px", "slice_px", "stride_px"} & set(layer):
                units.discard("px")
            for unit, other in (("um", "px"), ("px", "um")):
                if unit in units:
                    merged.update({f"{name}_{other}": None for name in ("slice", "context", "stride")})
            merged.update(layer)
        return TileSpec.from_json(merged)

    def _check_tile_keys(self) -> None:
        _refuse_unknown(self.tiles, [*_names(TileSpec), *_names(TileFilter), *_names(Storage)], "tiles", self.path)
        for key, value in self.tiles.items():
            if key == "placement" or key not in _names(TileSpec):
                continue
            whole = key.endswith("_px")
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                kind = "a whole number of pixels" if whole else "a number of micrometres"
                raise ConfigError(f"{self.path}: [tiles] {key} = {value!r} must be {kind}")

    def tile_filter(self, **changes: Any) -> TileFilter:  # noqa: ANN401 - any field
        """Which tiles are worth having, by the ``[tiles]`` table; `changes` that are not None go over it."""
        self._check_tile_keys()
        return self._build(TileFilter, "tiles", changes)

    def storage(self, **changes: Any) -> Storage:  # noqa: ANN401 - any field
        """How tiles are stored, by the ``[tiles]`` table; `changes` that are not None go over it."""
        self._check_tile_keys()
        return self._build(Storage, "tiles", changes)

    def split_spec(self, **changes: Any) -> SplitSpec:  # noqa: ANN401 - any field
        """How tiles are divided, by the ``[split]`` table; `changes` that are not None or empty go over it."""
        _refuse_unknown(self.split, [name for name in _names(SplitSpec) if name != "fold"], "split", self.path)
        return self._build(SplitSpec, "split", {key: value for key, value in changes.items() if value != ()})

    def sampling_spec(self, **changes: Any) -> SamplingSpec:  # noqa: ANN401 - any field
        """Which training tiles an epoch draws, by the ``[sampling]`` table; `changes` that are not None go over it."""
        _refuse_unknown(self.sampling, _names(SamplingSpec), "sampling", self.path)
        return self._build(SamplingSpec, "sampling", changes)

    def _build(self, kind: type[T], section: str, changes: Mapping[str, Any]) -> T:
        """Record of the keys of a table that are its fields; a value of another type is named with its key."""
        values: dict[str, Any] = {}
        for item in fields(kind):  # type: ignore[arg-type]  # every caller gives a dataclass
            if item.name in getattr(self, section):
                value = getattr(self, section)[item.name]
                _check_kind(value, str(item.type), f"{self.path}: [{section}] {item.name}")
                values[item.name] = tuple(value) if isinstance(value, list) else value
        values.update({key: value for key, value in changes.items() if value is not None})
        return kind(**values)

    def model_config(self, default: ModelConfig, **changes: Any) -> ModelConfig:  # noqa: ANN401 - any field
        """Network of the ``[model]`` table; `changes` that are not None go over it."""
        known = [item.name for item in fields(default) if item.name != "num_classes"]
        _refuse_unknown(self.model, known, "model", self.path)
        given = {key: value for key, value in changes.items() if value is not None}
        return type(default).from_json({**default.to_json(), **self.model, **given})


def read_settings(folder: Path, path: Path | None = None) -> Settings:
    """Read the settings of a project.

    Parameters
    ----------
    folder : Path
        Folder of the project; its ``darefine.toml`` is read when it is there.
    path : Path, optional
        Another file, which must be there.

    Raises
    ------
    ConfigError
        If the file is missing although named, no regular file, not TOML, or has an unknown table.
    """
    file = path or folder / FILE_NAME
    # A link to nothing must not pass for no settings.
    if not file.is_symlink() and not file.exists():
        if path is not None:
            raise ConfigError(f"No settings file {path}")
        return Settings()
    with naming(file, ConfigError):
        tables = parse_toml(read_file(file, NOTES), NOTES)
    _refuse_unknown(tables, _SECTIONS, None, file)
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: {name} must be a table, [{name}]")
    return Settings(path=file, **(with_current_names(tables) if file.name == RECORDED_NAME else tables))


def with_current_names(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return what an earlier version recorded under the names of today."""
    named = {
        section: {_FORMER_NAMES.get(key, key): value for key, value in table.items()}
        for section, table in tables.items()
    }
    # Commands that neither train nor predict need not wait for torch.
    from darefine_qupath.training import config  # noqa: PLC0415

    return {**named, "train": config.with_current_names(named.get("train", {}))}


def _names(kind: type) -> list[str]:
    return [item.name for item in fields(kind)]


def _check_kind(value: object, annotation: str, where: str) -> None:
    """Refuse a value of another type than a field has, told by the beginning of its annotation."""
    wanted = next((kind for kind in _KINDS if annotation.startswith(kind)), "str")
    types, name = _KINDS[wanted]
    fits = isinstance(value, types) and not isinstance(value, bool)
    if not fits or (isinstance(value, list) and not _all_text(value)):
        raise ConfigError(f"{where} = {value!r} must be {name}")


def _all_text(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _refuse_unknown(table: Mapping[str, Any], known: Iterable[str], section: str | None, file: Path | None) -> None:
    known = tuple(known)
    for key in table:
        if key not in known:
            renamed = _FORMER_NAMES.get(key)
            near = [renamed] if renamed in known else difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
            where = "table" if section is None else f"[{section}] key"
            raise ConfigError(f"{file}: unknown {where} {key!r}{hint}")
