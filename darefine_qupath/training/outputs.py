"""Write what an epoch leaves in the run folder: metrics, model files, pictures, TensorBoard's numbers."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from darefine_qupath.checkpoint.environment import environment
from darefine_qupath.checkpoint.model_file import Checkpoint, save_checkpoint
from darefine_qupath.metrics import ConfusionMatrix
from darefine_qupath.models import SegmentationNetwork
from darefine_qupath.report.training_plots import plot_confusion, plot_curves
from darefine_qupath.training.runfolder import RunFolder, RunSettings

__all__ = ["RunOutputs", "write_tensorboard"]

_NOT_METRICS = ("epoch", "step", "images_per_second", "seconds", "learning_rate")


class RunOutputs:
    """Files of a run that are written at the end of an epoch.

    Parameters
    ----------
    folder : RunFolder
        Where they go.
    settings : RunSettings
        What goes into the model files beside the weights.
    """

    def __init__(self, folder: RunFolder, settings: RunSettings) -> None:
        self.folder, self.settings = folder, settings
        self.environment = environment()

    def write_epoch(
        self,
        record: Mapping[str, Any],
        network: SegmentationNetwork,
        matrix: ConfusionMatrix | None,
        *,
        is_best: bool,
        is_last: bool,
    ) -> None:
        """Write the files of an epoch.

        Parameters
        ----------
        record : mapping
            A line of the metrics.
        network : SegmentationNetwork
            The weights that count.
        matrix : ConfusionMatrix or None
            Of the validation, if there was one.
        is_best : bool
            Whether these weights are the model of the run so far.
        is_last : bool
            Whether this is the last epoch.
        """
        folder, classes = self.folder, self.settings.classes
        folder.append(record)
        if is_best:
            save_checkpoint(folder.best, self._checkpoint(record, network))
            if matrix is not None:
                folder.write_figure(folder.confusion, plot_confusion(matrix, classes))
        if is_last:
            save_checkpoint(folder.last, self._checkpoint(record, network))
        folder.write_figure(folder.curves, plot_curves(folder.records(), classes))
        write_tensorboard(folder.path / "tensorboard", record)

    def _checkpoint(self, record: Mapping[str, Any], network: SegmentationNetwork) -> Checkpoint:
        settings = self.settings
        return Checkpoint(
            state=network.state_dict(),
            model=settings.model,
            tiles=settings.tiles,
            classes=settings.classes,
            normalization=settings.normalization,
            provenance={
                **settings.provenance,
                "tiles": dict(settings.data),
                "recipe": settings.train.to_json(),
                "epoch": record["epoch"],
                "step": record["step"],
                "metrics": {key: value for key, value in record.items() if key not in _NOT_METRICS},
                "environment": self.environment,
            },
        )


def write_tensorboard(folder: Path, record: Mapping[str, Any]) -> None:
    """Repeat the numbers of an epoch for TensorBoard, where it is installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return
    writer = import_module("torch.utils.tensorboard").SummaryWriter(str(folder))
    for name in ("loss", "learning_rate", "images_per_second", "miou", "accuracy"):
        if record.get(name) is not None:
            writer.add_scalar(name, record[name], record["epoch"])
    for name, value in record.get("iou", {}).items():
        if value is not None:
            writer.add_scalar(f"iou/{name}", value, record["epoch"])
    writer.close()
