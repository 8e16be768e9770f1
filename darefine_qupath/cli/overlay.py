"""``darefine overlay``: draw predictions beside slide and truth."""

from __future__ import annotations

from pathlib import Path

import click

from darefine_qupath.cli.options import Command, image_option, project_argument
from darefine_qupath.cli.output import Failures, echo_json, json_option, say
from darefine_qupath.pipeline.overlay import draw_overlays
from darefine_qupath.project import open_project

__all__ = ["overlay"]


@click.command(cls=Command, short_help="Draw predictions over the slides' thumbnails.")
@project_argument
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder; darefine/overlays in the project by default."
)
@click.option("--truth", type=click.Path(path_type=Path), metavar="DIR", help="Folder of <entry id>.geojson.")
@image_option
@json_option
def overlay(project: Path, out: Path | None, truth: Path | None, images: tuple[str, ...], as_json: bool) -> None:
    """Draw every predicted slide of PROJECT: slide, truth where there is one, prediction, and where they differ."""
    failures = Failures()
    with open_project(project, engine="embedded") as opened:
        folder = out or opened.folder / "darefine" / "overlays"
        paths = list(draw_overlays(opened, folder, truth=truth, names=images, on_error=failures.add))
    if as_json:
        echo_json({"pictures": paths, **failures.to_json()})
    else:
        for path in paths:
            say(path)
    failures.end()
