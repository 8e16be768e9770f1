"""Plots of a training: that they show what was measured, whatever the classes are called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from darefine_qupath.classes import ClassMap
from darefine_qupath.metrics import ConfusionMatrix
from darefine_qupath.report.training_plots import plot_confusion, plot_curves, save_figure

CLASSES = ClassMap(names=("Normal", "_Benign", "$x_1", "Karzinom 癌 of a very long name"))


def record(epoch: int, iou: float | None) -> dict[str, object]:
    values = dict.fromkeys(CLASSES.names, iou)
    return {"epoch": epoch, "loss": 1 / epoch, "miou": iou, "iou": values}


@pytest.mark.parametrize("count", [0, 1, 3, 60])
def test_curves_show_every_class(tmp_path: Path, count: int) -> None:
    records = [record(epoch, None if epoch == 1 else epoch / 100) for epoch in range(1, count + 1)]
    figure = plot_curves(records, CLASSES)
    loss, iou = figure.axes
    assert loss.lines[0].get_ydata() == pytest.approx([1 / epoch for epoch in range(1, count + 1)])
    assert [len(np.asarray(line.get_xdata())) for line in iou.lines] == [max(0, count - 1)] * 5
    legend = iou.get_legend()
    assert legend is not None
    names = [text.get_text() for text in legend.get_texts()]
    last = f" {count / 100:.3f}" if count > 1 else ""
    assert names == [f"Normal{last}", f" _Benign{last}", f"$x_1{last}", f"Karzinom 癌 of a v…{last}", f"mIoU{last}"]
    save_figure(figure, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1200, 480)


def test_a_confusion_matrix_shows_shares_of_the_truth(tmp_path: Path) -> None:
    counts = np.array([[3, 1, 0, 0], [0, 0, 0, 0], [0, 0, 5, 0], [0, 0, 0, 7]])
    figure = plot_confusion(ConfusionMatrix(counts), CLASSES)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[:8] == ["75.0", "25.0", "0.0", "0.0", "-", "-", "-", "-"]
    assert texts[16:] == ["IoU 0.750", "IoU 0.000", "IoU 1.000", "IoU 1.000"]
    save_figure(figure, tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").stat().st_size > 0
