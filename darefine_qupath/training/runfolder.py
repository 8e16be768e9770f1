"""Name, write and read the files of a run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from darefine_qupath.classes import ClassMap
from darefine_qupath.errors import TrainingError
from darefine_qupath.filesystem import atomic_write, remove_temporaries
from darefine_qupath.limits import NOTES, naming, parse_json, read_file
from darefine_qupath.models import ModelConfig, Normalization
from darefine_qupath.report.training_plots import save_figure
from darefine_qupath.tiles.spec import TileSpec
from darefine_qupath.training.config import TrainConfig

__all__ = ["RunFolder", "RunSettings", "read_run"]

FORMAT = "darefine-run"
VERSION = 1

# What may differ when a run goes on, on another machine or with more patience: it does not change what is learned.
_MAY_CHANGE = frozenset(
    {
        "preset",
        "device",
        "workers",
        "precision",
        "compile",
        "channels_last",
        "grad_accum_steps",
        "early_stop_patience",
        "checkpoint_minutes",
        "checkpoint_steps",
    }
)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Everything a run was started with.

    Attributes
    ----------
    model : ModelConfig
        The network.
    train : TrainConfig
        The recipe.
    tiles : TileSpec
        Geometry of the tiles.
    classes : ClassMap
        What the logits mean.
    normalization : Normalization
        How pixels become input.
    provenance : mapping
        Where the tiles come from, as JSON values.
    data : mapping of str to str
        Digests of the training and validation tiles.
    """

    model: ModelConfig
    train: TrainConfig
    tiles: TileSpec
    classes: ClassMap
    normalization: Normalization
    provenance: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; `from_json` gives the same settings back."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "train": self.train.to_json(),
            "model": self.model.to_json(),
            "tiles": self.tiles.to_json(),
            "classes": self.classes.to_json(),
            "normalization": self.normalization.to_json(),
            "provenance": dict(self.provenance),
            "data": dict(self.data),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunSettings:
        """Read what `to_json` gave, in this version or in darefine 0.1."""
        return cls(
            train=TrainConfig.from_json(data["train"]),
            model=ModelConfig.from_json(data["model"]),
            tiles=TileSpec.from_json(data["tiles"]),
            classes=ClassMap.from_json(data["classes"]),
            normalization=Normalization.from_json(
                data["normalization" if "normalization" in data else "normalisation"]
            ),
            provenance=data["provenance"],
            data=data["data"],
        )

    def differences(self, other: RunSettings) -> list[str]:
        """Name what differs between two runs and decides what is learned, as ``section.key was -> is``."""
        mine, others = self.to_json(), other.to_json()
        found = []
        for section in ("train", "model", "tiles", "classes", "normalization", "data"):
            for key in sorted({*mine[section], *others[section]} - (_MAY_CHANGE if section == "train" else set())):
                was, now = mine[section].get(key), others[section].get(key)
                if was != now:
                    found.append(f"{section}.{key} {was!r} -> {now!r}")
        return found


class RunFolder:
    """Files of a run by name.

    Parameters
    ----------
    path : Path
        The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / "model.safetensors"
        self.last = path / "last.safetensors"
        self.state = path / "state.safetensors"
        self.settings = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.curves = path / "curves.png"
        self.confusion = path / "confusion.png"
        self.readme = path / "README.txt"

    def begin(self, settings: RunSettings) -> None:
        """Make the folder and write the settings.

        Raises
        ------
        TrainingError
            If it holds a run already, or cannot be written.
        """
        if self.settings.exists() or self.state.exists() or self.best.exists():
            raise TrainingError(
                f"{self.path} holds a training run already; go on with it (darefine train --resume {self.path}) or "
                f"give another folder"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write(self.settings, json.dumps(settings.to_json(), indent=2) + "\n")
            self._write(self.readme, _readme(settings))
        except OSError as error:
            raise TrainingError(f"The run folder {self.path} cannot be written: {error}") from error

    def check(self, settings: RunSettings) -> None:
        """Refuse to go on with other settings than the run was started with.

        Raises
        ------
        TrainingError
            Names every setting that differs.
        """
        differences = read_run(self.path).differences(settings)
        if differences:
            raise TrainingError(
                f"{self.path} was started with other settings: {'; '.join(differences)}. Resume with those of "
                f"{self.settings.name}, or start a new run"
            )

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line to the metrics."""
        with self.metrics.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record, allow_nan=False) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """Return the lines of the metrics, oldest first; a last line that was cut off does not count."""
        if not self.metrics.is_file():
            return []
        with naming(f"{self.metrics} is damaged; move it away to go on without it", TrainingError):
            lines = read_file(self.metrics, NOTES).splitlines(keepends=True)
            found = [parse_json(line, NOTES) for line in lines if line.endswith(b"}\n")]
            # What every reader asks of a line.
            return [{**record, "step": int(record["step"])} for record in found]

    def forget_after(self, step: int) -> None:
        """Drop the lines of epochs that ended after `step`, which are trained again, and what a killed process left."""
        remove_temporaries(self.path)
        kept = [record for record in self.records() if record["step"] <= step]
        self._write(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))

    def write_figure(self, path: Path, figure: Figure) -> None:
        """Write a figure, whole or not at all."""
        with atomic_write(path, TrainingError) as temporary:
            save_figure(figure, temporary)

    def _write(self, path: Path, text: str) -> None:
        with atomic_write(path, TrainingError) as temporary:
            temporary.write_text(text, encoding="utf-8")


def read_run(path: Path) -> RunSettings:
    """Read what a run was started with.

    Parameters
    ----------
    path : Path
        The run's folder.

    Returns
    -------
    RunSettings

    Raises
    ------
    TrainingError
        If the folder holds no run, or one of another version.
    """
    file = RunFolder(path).settings
    if not file.is_file():
        raise TrainingError(f"{path} holds no training run (no {file.name}); give the folder that darefine train wrote")
    damaged = f"{file} is damaged; start a new run"
    with naming(damaged, TrainingError):
        data = parse_json(read_file(file, NOTES), NOTES)
        kind, version = data["format"], data["version"]
    if (kind, version) != (FORMAT, VERSION):
        raise TrainingError(f"{file} is {kind} version {version}; expected {FORMAT} version {VERSION}")
    with naming(damaged, TrainingError):
        return RunSettings.from_json(data)


def _readme(settings: RunSettings) -> str:
    names: Sequence[str] = settings.classes.names
    return f"""A training run of darefine: {settings.model.title}, classes {", ".join(names)}.

model.safetensors  the model: weights of the validation with the best mIoU, with everything prediction needs.
                   Use it: darefine predict PROJECT --model model.safetensors
                   What it is: darefine show model.safetensors
last.safetensors   the model after the last epoch, in the same form; written at the very end.
state.safetensors  what training goes on from (darefine train --resume FOLDER); not needed for prediction.
config.json        every setting the run was started with, and digests of its tiles.
request.json       the command it was started with; settings.toml the darefine.toml of then.
metrics.jsonl      one line per epoch: loss, learning rate, speed, mIoU, IoU per class and more.
curves.png         loss and IoU over the epochs.
confusion.png      true (rows) against predicted classes (columns) of the best validation.
tensorboard/       the same numbers for TensorBoard, where it is installed.
"""
