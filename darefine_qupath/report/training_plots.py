"""Plot the curves of a training and its confusion matrix with matplotlib.

Figures are made without pyplot, which keeps state between calls and may want a screen.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from darefine_qupath.classes import ClassMap
from darefine_qupath.metrics import ConfusionMatrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

__all__ = ["plot_confusion", "plot_curves", "save_figure"]

_INK = "#202020"
_LONGEST_NAME = 18


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    with warnings.catch_warnings():
        # A sign of a class name that the font lacks becomes a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(path, format="png")


def plot_curves(records: Sequence[Mapping[str, Any]], classes: ClassMap) -> Figure:
    """Plot loss and validation IoU over the epochs.

    Parameters
    ----------
    records : sequence of mapping
        Lines of ``metrics.jsonl``, with ``epoch``, ``loss``, ``miou`` and ``iou`` per class.
    classes : ClassMap
        Colours of the lines.

    Returns
    -------
    Figure
        Loss on the left, mIoU (black) and the IoU of each class on the right.
    """
    figure = Figure(figsize=(12, 4.8), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _plot_line(left, [(record["epoch"], record.get("loss")) for record in records], _INK, "training loss")
    left.set_ylim(bottom=0)
    for name, color in zip(classes.names, classes.colors, strict=True):
        points = [(record["epoch"], record["iou"].get(name)) for record in records if record.get("miou") is not None]
        _plot_line(right, points, color.hex, name)
    _plot_line(right, [(record["epoch"], record.get("miou")) for record in records], _INK, "mIoU", width=2.5)
    right.set_ylim(0, 1)
    key = right.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    _show_plainly(*key.get_texts())
    last = max([record["epoch"] for record in records], default=2)
    for axes, title in ((left, "training loss"), (right, "validation IoU")):
        axes.set_title(title, loc="left")
        axes.set_xlabel("epoch")
        axes.set_xlim(1, max(last, 2))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.grid(color="#e4e4e4")
    return figure


def _plot_line(
    axes: Axes, points: Sequence[tuple[int, float | None]], color: str, name: str, *, width: float = 1.6
) -> None:
    known = [(epoch, value) for epoch, value in points if value is not None]
    last = f" {known[-1][1]:.3f}" if known else ""
    # A label that begins with an underscore would be left out of the key.
    label = f"{_shortened(name)}{last}"
    axes.plot(
        [epoch for epoch, _ in known], [value for _, value in known], color=color, linewidth=width,
        marker="o" if len(known) < 40 else None, markersize=3, label=f" {label}" if label.startswith("_") else label,
    )  # fmt: skip


def plot_confusion(matrix: ConfusionMatrix, classes: ClassMap) -> Figure:
    """Plot a confusion matrix, each row in per cent of its true pixels, with the IoU of each class.

    Parameters
    ----------
    matrix : ConfusionMatrix
        Truth in rows.
    classes : ClassMap
        Names and colours, in label order.

    Returns
    -------
    Figure
        Right answers blue, wrong ones red.
    """
    counts, num_classes = matrix.counts.astype(np.float64), classes.num_classes
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    signed = np.where(np.eye(num_classes, dtype=bool), shares, -shares)
    size = 2.6 + 0.84 * num_classes
    figure = Figure(figsize=(size + 1.2, size), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    axes = figure.subplots()
    axes.imshow(signed, cmap="RdBu", vmin=-1.2, vmax=1.2)
    for row, column in np.ndindex(shares.shape):
        share = shares[row, column]
        text = f"{100 * share:.1f}" if totals[row, 0] else "-"
        axes.text(column, row, text, ha="center", va="center", color="white" if share > 0.6 else _INK)
    names = [_shortened(name) for name in classes.names]
    axes.set_xticks(range(num_classes), names, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(num_classes), names)
    for row, iou in enumerate(matrix.iou):
        shown = "-" if math.isnan(iou) else f"{iou:.3f}"
        axes.text(num_classes - 0.35, row, f"IoU {shown}", ha="left", va="center", color=_INK)
    axes.set_xlabel("prediction")
    axes.set_ylabel("truth (rows add up to 100 %)")
    axes.set_title(f"mIoU {matrix.mean_iou:.3f}   accuracy {matrix.accuracy:.3f}", loc="left")
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        _show_plainly(*labels)
        for label, color in zip(labels, classes.colors, strict=True):
            label.set_bbox({"facecolor": (*(value / 255 for value in color), 0.35), "edgecolor": "none", "pad": 2})
    return figure


def _show_plainly(*texts: Text) -> None:
    """Show a dollar sign in a class name as it is: it begins no formula."""
    for text in texts:
        text.set_parse_math(False)


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
