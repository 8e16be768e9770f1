"""Train a network on tiles and evaluate it: settings, augmentation, losses, the loop, several processes.

>>> from darefine_qupath.training import TrainConfig
>>> TrainConfig.from_mapping({"preset": "modern", "epochs": 10}).optimizer
'adamw'
"""

from __future__ import annotations

from darefine_qupath.training.config import PRESETS, TrainConfig
from darefine_qupath.training.evaluation import ContextMode, evaluate
from darefine_qupath.training.loader import TileData
from darefine_qupath.training.loop import TrainResult, train
from darefine_qupath.training.progress import Reporter, TrainingProgress
from darefine_qupath.training.runfolder import RunFolder, RunSettings, read_run

__all__ = [
    "PRESETS",
    "ContextMode",
    "Reporter",
    "RunFolder",
    "RunSettings",
    "TileData",
    "TrainConfig",
    "TrainResult",
    "TrainingProgress",
    "evaluate",
    "read_run",
    "train",
]
