"""Write a review as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from darefine_qupath.classes import Color, default_color
from darefine_qupath.review.review_report import OUTCOMES, ReviewReport

if TYPE_CHECKING:
    from collections.abc import Mapping

    from darefine_qupath.classes import PathClass

__all__ = ["render_page", "write_page"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
.bar { display: flex; height: 1.1rem; background: #eee; border-radius: 3px; overflow: hidden; min-width: 12rem }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin: 0 .35rem 0 0 }
.keys span { margin-right: 1rem; white-space: nowrap } .note { color: #666 }
"""
_COLORS = {
    "accepted": "#3c9a5f",
    "reshaped": "#4f7fd9",
    "reclassified": "#e0a030",
    "edited": "#8a63c7",
    "rejected": "#c8323f",
    "drawn": "#1f9fae",
    "untouched": "#cfcfcf",
}


def write_page(report: ReviewReport, path: Path, *, classes: Iterable[PathClass] = ()) -> None:
    """Write the page of a review.

    Parameters
    ----------
    report : ReviewReport
        From `compare`.
    path : Path
        HTML file.
    classes : iterable of PathClass, optional
        Colors of the project's classes.
    """
    path.write_text(render_page(report, classes=classes), encoding="utf-8")


def render_page(report: ReviewReport, *, classes: Iterable[PathClass] = ()) -> str:
    """HTML of the page of a review; see `write_page`."""
    colors = {path_class.name: path_class.color for path_class in classes}
    title = f"Review of {escape(report.project)}"
    body = [
        f"<h1>{title}</h1>",
        _keys(),
        _bar(report.counts),
        "<h2>By class</h2>",
        _by_class(report, colors),
        "<h2>By slide</h2>",
        _by_slide(report),
        *(f'<p class="note">{escape(note)}.</p>' for note in report.notes()),
        "<h2>Agreement</h2>",
        _agreement(report, colors),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _keys() -> str:
    keys = (f'<span><i class="key" style="background:{_COLORS[name]}"></i>{name}</span>' for name in OUTCOMES)
    return f'<p class="keys">{"".join(keys)}</p>'


def _bar(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    parts = (
        f'<i style="width:{100 * counts[name] / total:.3f}%;background:{_COLORS[name]}" title="{name}: '
        f'{counts[name]}"></i>'
        for name in OUTCOMES
        if total and counts[name]
    )
    return f'<div class="bar">{"".join(parts)}</div>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>\n{chr(10).join(lines)}\n</table>"


def _name(name: str, colors: Mapping[str, Color]) -> str:
    color = colors.get(name) or default_color(name)
    return f'<i class="key" style="background:{color.hex}"></i>{escape(name)}'


def _by_class(report: ReviewReport, colors: Mapping[str, Color]) -> str:
    areas, agreement = report.areas_mm2(), report.iou
    rows = []
    for name, counts in report.by_class.items():
        iou = agreement.get(name)
        area = areas.get(name, {"predicted": 0.0, "final": 0.0})
        rows.append(
            [
                _name(name, colors),
                *(str(counts[outcome]) for outcome in OUTCOMES),
                f"{area['predicted']:.3f}",
                f"{area['final']:.3f}",
                "" if iou is None else f"{iou:.3f}",
            ]
        )
    return _table(["Class", *OUTCOMES, "predicted mm²", "final mm²", "IoU"], rows)


def _by_slide(report: ReviewReport) -> str:
    rows = [
        [escape(image.image_name), *(str(image.counts[outcome]) for outcome in OUTCOMES), _bar(image.counts)]
        for image in report.images
    ]
    return _table(["Slide", *OUTCOMES, ""], rows)


def _agreement(report: ReviewReport, colors: Mapping[str, Color]) -> str:
    counts = report.confusion.counts
    total = counts.sum()
    if not total:
        return '<p class="note">Nothing has been reviewed yet.</p>'
    rows = [
        [_name(name, colors), *(f"{100 * value / total:.1f} %" for value in row)]
        for name, row in zip(report.classes, counts, strict=True)
    ]
    head = ["final \\ predicted", *(escape(name) for name in report.classes)]
    return (
        '<p class="note">Share of the area that was accepted, corrected, rejected or drawn; what nobody touched is '
        "not in it.</p>" + _table(head, rows)
    )
