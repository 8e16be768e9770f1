"""Training curves and the confusion matrix as pictures, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from darefine_qupath.classes import ClassMap, Color
from darefine_qupath.metrics import ConfusionMatrix

__all__ = ["draw_confusion", "draw_curves"]

_INK, _GRAY, _GRID, _PAPER = "#202020", "#707070", "#e4e4e4", "#ffffff"
_BLACK = Color(32, 32, 32)


@dataclass(frozen=True)
class _Line:
    name: str
    color: Color
    points: Sequence[tuple[float, float]]
    width: int = 2


@dataclass(frozen=True)
class _Panel:
    """A rectangle of a picture with axes of its own."""

    box: tuple[int, int, int, int]
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def place(self, x: float, y: float) -> tuple[float, float]:
        left, top, right, bottom = self.box
        across = (x - self.x_range[0]) / max(self.x_range[1] - self.x_range[0], 1e-9)
        up = (y - self.y_range[0]) / max(self.y_range[1] - self.y_range[0], 1e-9)
        return left + across * (right - left), bottom - up * (bottom - top)


def draw_curves(records: Sequence[Mapping[str, Any]], classes: ClassMap) -> Image.Image:
    """Draw loss and validation IoU over the epochs.

    Parameters
    ----------
    records : sequence of mapping
        Lines of ``metrics.jsonl``, with ``epoch``, ``loss``, ``miou`` and ``iou`` per class.
    classes : ClassMap
        Colours of the lines.

    Returns
    -------
    Image
        RGB, 1200 x 480 pixels: loss on the left, mIoU (black) and the IoU of each class on the right.
    """
    picture = Image.new("RGB", (1200, 480), _PAPER)
    draw = ImageDraw.Draw(picture)
    epochs = (1.0, float(max([record["epoch"] for record in records], default=2)))
    epochs = (epochs[0], max(epochs[1], 2.0))
    losses = [(record["epoch"], record["loss"]) for record in records if record.get("loss") is not None]
    top = _round_up(max([loss for _, loss in losses], default=1.0))
    _draw_panel(draw, _Panel((70, 50, 560, 420), epochs, (0.0, top)), "loss", [_Line("training loss", _BLACK, losses)])
    checked = [record for record in records if record.get("miou") is not None]
    lines = [
        _Line(name, color, [(r["epoch"], r["iou"][name]) for r in checked if r["iou"].get(name) is not None])
        for name, color in zip(classes.names, classes.colors, strict=True)
    ]
    lines.append(_Line("mIoU", _BLACK, [(record["epoch"], record["miou"]) for record in checked], width=3))
    _draw_panel(draw, _Panel((650, 50, 1000, 420), epochs, (0.0, 1.0)), "validation IoU", lines)
    _draw_key(draw, (1015, 55), lines)
    return picture


def _draw_panel(draw: ImageDraw.ImageDraw, panel: _Panel, title: str, lines: Sequence[_Line]) -> None:
    left, top, right, bottom = panel.box
    draw.text((left, top - 28), title, fill=_INK, font=_font(17))
    for part in range(5):
        value = panel.y_range[0] + (panel.y_range[1] - panel.y_range[0]) * part / 4
        y = panel.place(panel.x_range[0], value)[1]
        draw.line([(left, y), (right, y)], fill=_GRID)
        draw.text((left - 8, y), f"{value:.3g}", fill=_GRAY, font=_font(13), anchor="rm")
    for epoch in _ticks(*panel.x_range):
        x = panel.place(epoch, panel.y_range[0])[0]
        draw.text((x, bottom + 8), f"{epoch}", fill=_GRAY, font=_font(13), anchor="mt")
    draw.text(((left + right) / 2, bottom + 28), "epoch", fill=_GRAY, font=_font(13), anchor="mt")
    draw.rectangle(panel.box, outline=_GRAY)
    for line in lines:
        _draw_line(draw, panel, line)


def _draw_line(draw: ImageDraw.ImageDraw, panel: _Panel, line: _Line) -> None:
    points = [panel.place(x, y) for x, y in line.points]
    if len(points) > 1:
        draw.line(points, fill=tuple(line.color), width=line.width, joint="curve")
    for x, y in points if len(points) < 40 else points[-1:]:
        draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=tuple(line.color))


def _draw_key(draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[_Line]) -> None:
    x, y = at
    for line in lines:
        draw.line([(x, y + 8), (x + 18, y + 8)], fill=tuple(line.color), width=line.width + 1)
        last = f" {line.points[-1][1]:.3f}" if line.points else ""
        draw.text((x + 24, y), f"{_short(line.name, 14)}{last}", fill=_INK, font=_font(13))
        y += 22


def draw_confusion(matrix: ConfusionMatrix, classes: ClassMap) -> Image.Image:
    """Draw a confusion matrix, each row in per cent of its true pixels.

    Parameters
    ----------
    matrix : ConfusionMatrix
        Truth in rows.
    classes : ClassMap
        Names and colours, in label order.

    Returns
    -------
    Image
        RGB; each class also has its IoU.
    """
    num_classes, cell, left, top = classes.num_classes, 84, 180, 90
    picture = Image.new("RGB", (left + cell * (num_classes + 1) + 30, top + cell * num_classes + 40), _PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((16, 14), f"mIoU {matrix.mean_iou:.3f}   accuracy {matrix.accuracy:.3f}", fill=_INK, font=_font(17))
    draw.text((16, 40), "rows: truth, columns: prediction, % of the row", fill=_GRAY, font=_font(13))
    iou = matrix.iou
    for row, (name, color) in enumerate(zip(classes.names, classes.colors, strict=True)):
        middle = top + cell * row + cell / 2
        draw.rectangle([14, middle - 7, 28, middle + 7], fill=tuple(color))
        draw.text((36, middle), _short(name, 18), fill=_INK, font=_font(14), anchor="lm")
        draw.text((left + cell * row + cell / 2, top - 8), _short(name, 10), fill=_INK, font=_font(14), anchor="ms")
        shown = "-" if math.isnan(iou[row]) else f"{iou[row]:.3f}"
        draw.text((left + cell * num_classes + cell / 2 + 10, middle), shown, fill=_INK, font=_font(16), anchor="mm")
        _draw_cells(draw, matrix, row, (left, top + cell * row), cell)
    draw.text((left + cell * num_classes + cell / 2 + 10, top - 8), "IoU", fill=_INK, font=_font(14), anchor="ms")
    return picture


def _draw_cells(
    draw: ImageDraw.ImageDraw, matrix: ConfusionMatrix, row: int, corner: tuple[int, int], cell: int
) -> None:
    total = int(matrix.counts[row].sum())
    for column, count in enumerate(matrix.counts[row].tolist()):
        share = count / total if total else 0.0
        x, y = corner[0] + cell * column, corner[1]
        paint = _mixed((36, 92, 160) if row == column else (190, 60, 50), share)
        draw.rectangle([x, y, x + cell - 2, y + cell - 2], fill=paint)
        text = f"{100 * share:.1f}" if total else "-"
        middle = (x + cell / 2, y + cell / 2)
        draw.text(middle, text, fill=_PAPER if share > 0.5 else _INK, font=_font(16), anchor="mm")


def _mixed(color: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    red, green, blue = (round(244 + (channel - 244) * share) for channel in color)
    return red, green, blue


def _ticks(low: float, high: float) -> range:
    """Whole numbers on an axis, at most eight."""
    step = max(1, math.ceil((high - low) / 7))
    return range(int(low), int(high) + 1, step)


def _round_up(value: float) -> float:
    """Round to the next number with one digit, so that an axis ends at a plain value."""
    if not value > 0 or not math.isfinite(value):
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return math.ceil(value / unit) * unit


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
