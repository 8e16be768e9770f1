"""``darefine review`` and ``next``: what became of the predictions, and where to look next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from darefine_qupath.cli.options import COUNT, Command, Engine, engine_option, image_option, project_argument
from darefine_qupath.cli.output import Failures, echo_json, json_option, note, number, table
from darefine_qupath.pipeline.next_places import find_places
from darefine_qupath.project import open_project
from darefine_qupath.review import ReviewPlace, ReviewReport, clear_places, compare, mark_places, write_page

__all__ = ["next_", "review"]


@click.command(cls=Command, short_help="Show what the pathologist did with the predictions.")
@project_argument
@image_option
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write one line per object.")
@click.option("--page", type=click.Path(path_type=Path), help="Write a page (HTML).")
@json_option
def review(project: Path, images: tuple[str, ...], csv_path: Path | None, page: Path | None, as_json: bool) -> None:
    """Compare what was written into PROJECT with what is there now.

    Predictions are accepted, reshaped, reclassified or deleted; objects are drawn where there was none.
    """
    failures = Failures()
    with open_project(project, engine="embedded") as opened:
        report = compare(opened, [opened.image(name) for name in images] or None, on_error=failures.add)
        if page is not None:
            write_page(report, page, classes=opened.classes)
    if csv_path is not None:
        report.write_csv(csv_path)
    _show_review(report, failures, as_json=as_json)
    failures.end()


@click.command("next", cls=Command, short_help="List the places where a look helps most.")
@project_argument
@image_option
@click.option("-n", "--count", type=COUNT, default=20, show_default=True, help="How many places.")
@click.option("--mark", is_flag=True, help="Put them into QuPath as annotations Review 01, 02 ...")
@click.option("--clear", is_flag=True, help="Remove those annotations again, and list nothing.")
@engine_option
@json_option
def next_(
    project: Path, images: tuple[str, ...], count: int, mark: bool, clear: bool, engine: Engine, as_json: bool
) -> None:
    """List the places of PROJECT where a look at the prediction helps most, best first."""
    if mark and clear:
        raise click.UsageError("Give --mark or --clear, not both")
    failures = Failures()
    with open_project(project, engine=engine if mark or clear else "embedded") as opened:
        chosen = [opened.image(name) for name in images] or None
        if clear:
            removed = clear_places(opened, chosen, on_error=failures.add)
            if as_json:
                echo_json({"removed": removed, **failures.to_json()})
            else:
                note(f"{removed} review annotations removed")
        else:
            places = find_places(opened, chosen, count=count, on_error=failures.add)
            if mark:
                marked = mark_places(opened, places, on_error=failures.add)
                note(f"{marked} review annotations are in the project")
            _show_places(places, failures, as_json=as_json)
    failures.end()


def _show_places(places: Sequence[ReviewPlace], failures: Failures, *, as_json: bool) -> None:
    if as_json:
        echo_json({"places": [place.to_json() for place in places], **failures.to_json()})
        return
    if not places:
        note("Nothing has been predicted in this project yet; run darefine predict")
        return
    rows = [
        (
            str(rank),
            p.image_name,
            f"{p.box.x}, {p.box.y}",
            p.path_class,
            *(number(value, 2) for value in (p.score, p.uncertainty, p.size, p.border, p.unlike)),
        )
        for rank, p in enumerate(places, 1)
    ]
    table(["place", "image", "x, y", "class", "score", "unsure", "large", "border", "unlike"], rows)


def _show_review(report: ReviewReport, failures: Failures, *, as_json: bool) -> None:
    if as_json:
        echo_json({**report.to_json(), **failures.to_json()})
        return
    if not report.images:
        if not failures:
            note("Nothing has been predicted in this project yet; run darefine predict")
        return
    outcomes = list(report.counts)
    by_class = [(name, *(str(counts[o]) for o in outcomes)) for name, counts in report.by_class.items()]
    table(["class", *outcomes], [*by_class, ("all", *(str(report.counts[o]) for o in outcomes))])
    by_image = [(image.image_name, *(str(image.counts[o]) for o in outcomes)) for image in report.images]
    table(["image", *outcomes], by_image)
    for line in report.notes():
        note(f"Warning: {line}")
    agreement = {name: value for name, value in report.iou.items() if value is not None}
    if agreement:
        table(["class", "IoU of what was reviewed"], [(name, number(value)) for name, value in agreement.items()])
