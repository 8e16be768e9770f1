"""What a training run is asked to do, as Python values and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from darefine_qupath.pipeline.settings import with_current_names
from darefine_qupath.pipeline.tiles import TileRequest

__all__ = ["TILES_FOLDER", "TrainRequest"]

TILES_FOLDER = "tiles"
"""Folder of the tiles in a run folder."""


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """A training run on a project.

    Attributes
    ----------
    tiles : TileRequest
        What to learn from.
    out : Path
        The run folder.
    model, train, split, sampling : mapping
        Fields of `ModelConfig`, `TrainConfig`, `SplitSpec` and `SamplingSpec` over the settings.
    on_the_fly : bool
        Read slides while training instead of writing tiles first.
    dataset : Path or None
        Folder of the tiles, which several runs may share; ``tiles`` in the run folder by default.
    save_roles : bool
        Write into the project which images train, validate and are held back.
    init_from : Path or None
        Model file to start from. Its network and tiles are the defaults of this run.
    fine_tune : bool
        When learning from reviewed labels without `init_from`, start from the model whose predictions were reviewed.
    """

    tiles: TileRequest
    out: Path
    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    split: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    on_the_fly: bool = False
    dataset: Path | None = None
    save_roles: bool = False
    init_from: Path | None = None
    fine_tune: bool = True

    @property
    def tiles_at(self) -> Path | None:
        """Folder of the tiles; None where slides are read while training."""
        return None if self.on_the_fly else self.dataset or self.out / TILES_FOLDER

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; `from_json` gives the same request back, with absolute paths."""
        return json.loads(json.dumps(asdict(self), default=_absolute))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainRequest:
        """Make the request of what `to_json` gave, in earlier versions too."""
        data = {"save_roles" if key == "note_roles" else key: value for key, value in data.items()}
        tiles = dict(data["tiles"])
        tables = with_current_names({key: data[key] for key in ("model", "train", "split", "sampling")})
        tiles.update(
            project=Path(tiles["project"]),
            settings=None if tiles["settings"] is None else Path(tiles["settings"]),
            images=tuple(tiles["images"]),
            annotators=tuple(tiles.get("annotators", ())),
            tiles=with_current_names({"tiles": tiles["tiles"]})["tiles"],
        )
        split = {key: tuple(value) if isinstance(value, list) else value for key, value in tables["split"].items()}
        paths = {key: None if data[key] is None else Path(data[key]) for key in ("dataset", "init_from")}
        changed = {**tables, **paths, "tiles": TileRequest(**tiles), "split": split, "out": Path(data["out"])}
        return cls(**{**data, **changed})


def _absolute(value: object) -> str:
    """Write a path so that it means the same from any working directory."""
    return str(Path(str(value)).absolute())
