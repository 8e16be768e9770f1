"""``darefine create``, ``info`` and ``check``: make a QuPath project, and look into one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from darefine_qupath.cli.annotations import import_json, import_options, reading_options, show_imports
from darefine_qupath.cli.options import Command, Engine, engine_option, mpp_option, project_argument, settings_option
from darefine_qupath.cli.output import echo_json, json_option, note, say, table
from darefine_qupath.cli.progress import show_progress
from darefine_qupath.pipeline.check import check_project
from darefine_qupath.pipeline.create import create_from_slides
from darefine_qupath.pipeline.info import ImageSummary, ProjectSummary, summarize
from darefine_qupath.pipeline.settings import read_settings
from darefine_qupath.project import open_project

__all__ = ["check", "create", "info"]


@click.command(cls=Command, short_help="Make a QuPath project of slides and their annotation files.")
@click.argument("project", type=click.Path(path_type=Path))
@click.argument("slides", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--annotations",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of files named like the slides: XML of Aperio, HALO or ASAP, NDPA, GeoJSON, COCO, label masks.",
)
@reading_options()
@mpp_option
@engine_option
@json_option
def create(
    project: Path,
    slides: tuple[Path, ...],
    annotations: Path | None,
    mpp: float | None,
    engine: Engine,
    as_json: bool,
    **reading: Any,  # noqa: ANN401 - see the options above
) -> None:
    """Make the QuPath project PROJECT (a new folder) of SLIDES: image files, or folders of them.

    \b
    darefine create bach WSI/*.svs --annotations WSI
    """  # noqa: D301 - click wants the backspace
    how = import_options(**reading, replaces=False)
    with show_progress("Adding images") as listener:
        opened, imports = create_from_slides(
            project, slides, annotations=annotations, options=how, mpp=mpp, engine=engine, listener=listener
        )
    with opened:
        summary = summarize(opened)
    if as_json:
        echo_json(
            {"project": summary.path, "images": len(summary.images), "imports": [import_json(i) for i in imports]}
        )
        return
    show_imports(imports)
    _show_project(summary)


@click.command(cls=Command, short_help="Show the images, classes and annotations of a project.")
@project_argument
@engine_option
@json_option
def info(project: Path, engine: Engine, as_json: bool) -> None:
    """Show the images, classes and annotations of PROJECT (a .qpproj or its folder)."""
    with open_project(project, engine=engine) as opened:
        summary = summarize(opened)
    if as_json:
        echo_json(_summary_json(summary))
    else:
        _show_project(summary)


def _summary_json(summary: ProjectSummary) -> dict[str, Any]:
    return {
        "path": summary.path,
        "version": summary.version,
        "engine": summary.engine,
        "classes": list(summary.class_names),
        "images": [
            {
                "id": image.entry.id,
                "name": image.entry.name,
                "path": image.entry.path,
                "uri": image.entry.uri,
                "exists": image.entry.exists,
                "width": image.entry.width,
                "height": image.entry.height,
                "mpp": image.entry.mpp,
                "image_type": image.entry.image_type,
                "metadata": dict(image.entry.metadata),
                "objects": image.num_objects,
                "problem": image.problem,
                "annotations": {item.name: item.num_annotations for item in image.classes},
                "area_px": {item.name: item.area_px for item in image.classes},
            }
            for image in summary.images
        ],
    }


def _show_project(summary: ProjectSummary) -> None:
    title = f"{summary.path}  QuPath {summary.version}, {summary.engine} engine, {len(summary.images)} images"
    rows = [
        (image.entry.id, image.entry.name, _size(image), _mpp(image), str(image.num_objects), _annotated(image))
        for image in summary.images
    ]
    table(["id", "image", "size", "µm/px", "objects", "annotations"], rows, title=title)
    note(f"Classes: {', '.join(summary.class_names) or 'none'}")
    for image in summary.images:
        if image.problem is not None:
            note(f"{image.entry.name}: {image.problem}")


def _size(image: ImageSummary) -> str:
    return "-" if image.entry.width is None else f"{image.entry.width} x {image.entry.height}"


def _mpp(image: ImageSummary) -> str:
    return "-" if image.entry.mpp is None else f"{image.entry.mpp:.4g}"


def _annotated(image: ImageSummary) -> str:
    return ", ".join(f"{item.name} {item.num_annotations}" for item in image.classes) or "-"


@click.command(cls=Command, short_help="Look for what would spoil training: misplaced or bad shapes, missing files.")
@project_argument
@mpp_option
@settings_option
@json_option
def check(project: Path, mpp: float | None, settings: Path | None, as_json: bool) -> None:
    """Look for what would spoil training on PROJECT, or put its annotations in the wrong place.

    It reports annotations on glass, outside the image or of no valid shape, slides whose levels are shifted against
    each other under an annotation, classes with few pixels, images without pixel size, and missing, damaged and
    duplicate images. Exit code 1 when there is an error among the findings.
    """
    with open_project(project, engine="embedded") as opened, show_progress("Checking") as listener:
        findings = check_project(opened, read_settings(opened.folder, settings), mpp=mpp, listener=listener)
    if as_json:
        echo_json({"findings": [vars(finding) for finding in findings]})
    elif findings:
        for found in findings:
            say(f"{found.level}: {f'{found.image}: ' if found.image else ''}{found.message}")
    else:
        note("Nothing found.")
    if any(finding.level == "error" for finding in findings):
        raise click.exceptions.Exit(1)
