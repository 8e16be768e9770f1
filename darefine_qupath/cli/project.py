"""Commands on projects: create, info, check, import, export, restore."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from darefine_qupath.annotations import NOBODY
from darefine_qupath.cli.options import (
    COUNT,
    annotators_option,
    engine_option,
    image_option,
    mpp_option,
    project_argument,
    settings_option,
    whole_number,
)
from darefine_qupath.cli.output import Failures, echo_json, json_option, note, progress_bar, say, table
from darefine_qupath.pipeline.annotation_export import export_geojson, export_labels
from darefine_qupath.pipeline.annotation_import import Import, ImportOptions, import_files, match_files
from darefine_qupath.pipeline.check import check_project
from darefine_qupath.pipeline.create import create_from_slides
from darefine_qupath.pipeline.info import ImageSummary, ProjectSummary, summarize
from darefine_qupath.pipeline.settings import read_settings
from darefine_qupath.project import list_backups, open_project
from darefine_qupath.project import restore as restore_backup

__all__ = ["check", "create", "export", "import_", "info", "restore"]

Engine = Literal["auto", "embedded", "paquo"]

_NAMED = 20
"""Objects of a file that are named; the others are counted. With --json all are."""

_READING_OPTIONS = (
    click.option(
        "--label", "labels", multiple=True, metavar="N=CLASS", help="Class of a label of a mask; may be repeated."
    ),
    click.option(
        "--class-from",
        multiple=True,
        metavar="FIELD",
        help="Where the class of an object stands: a property, layer or text, say; may be repeated.",
    ),
    click.option("--stretch", is_flag=True, help="Scale a mask of another aspect ratio to its image all the same."),
    click.option("--annotator", metavar="NAME", help="Whose annotations these are; keeps raters apart."),
)


def _reading_options(command: Any) -> Any:  # noqa: ANN401 - click's decorators
    for option in reversed(_READING_OPTIONS):
        command = option(command)
    return command


def _import_options(
    *, labels: tuple[str, ...], class_from: tuple[str, ...], stretch: bool, annotator: str | None, replaces: bool
) -> ImportOptions:
    name = None if annotator is None else annotator.strip()
    if name in ("", NOBODY):
        raise click.BadParameter(f"{annotator!r} is no name", param_hint="--annotator")
    return ImportOptions(
        labels=dict(_label(text) for text in labels) or None,
        class_from=class_from,
        stretch=stretch,
        annotator=name,
        replaces=replaces,
    )


@click.command(short_help="Make a QuPath project of slides and their annotation files.")
@click.argument("project", type=click.Path(path_type=Path))
@click.argument("slides", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--annotations",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of files named like the slides: XML of Aperio, HALO or ASAP, NDPA, GeoJSON, COCO, label masks.",
)
@_reading_options
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
    options = _import_options(**reading, replaces=False)
    with progress_bar("Adding images") as report:
        opened, imports = create_from_slides(
            project, slides, annotations=annotations, options=options, mpp=mpp, engine=engine, progress=report
        )
    with opened:
        summary = summarize(opened)
    if as_json:
        echo_json(
            {"project": summary.path, "images": len(summary.images), "imports": [_import_json(i) for i in imports]}
        )
        return
    _show_imports(imports)
    _show_project(summary)


@click.command(short_help="Show the images, classes and annotations of a project.")
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


@click.command(short_help="Look for what would spoil training: misfits, bad shapes, missing files.")
@project_argument
@mpp_option
@settings_option
@json_option
def check(project: Path, mpp: float | None, settings: Path | None, as_json: bool) -> None:
    """Look for what would spoil training on PROJECT, or put its annotations in the wrong place.

    Every annotation is rasterised over its pixels at two levels of its slide. Found are levels that lie beside each
    other, annotations on glass, outside the image or of no valid shape, classes with few pixels, images without pixel
    size, missing, damaged and duplicate images. Exit code 1 when there is an error among the findings.
    """
    with open_project(project, engine="embedded") as opened, progress_bar("Checking") as report:
        findings = check_project(opened, read_settings(opened.folder, settings), mpp=mpp, progress=report)
    if as_json:
        echo_json({"findings": [vars(finding) for finding in findings]})
    elif findings:
        for found in findings:
            say(f"{found.level}: {f'{found.image}: ' if found.image else ''}{found.message}")
    else:
        note("Nothing found.")
    if any(finding.level == "error" for finding in findings):
        raise click.exceptions.Exit(1)


@click.command("import", short_help="Add annotation files of other programs to a project.")
@project_argument
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--image", metavar="NAME", help="Image of the annotations; by default the one with the file's name.")
@_reading_options
@click.option(
    "--replace",
    "replaces",
    is_flag=True,
    help="Take out what an earlier import of a file of this name (and annotator) brought and this one does not hold.",
)
@click.option("--dry-run", is_flag=True, help="Only read the files, and say what would be done.")
@engine_option
@json_option
def import_(
    project: Path,
    files: tuple[Path, ...],
    image: str | None,
    replaces: bool,
    dry_run: bool,
    engine: Engine,
    as_json: bool,
    **reading: Any,  # noqa: ANN401 - see the options above
) -> None:
    """Add the annotations of FILES to PROJECT.

    Read are XML of Aperio ImageScope, HALO and ASAP, Hamamatsu NDPA, GeoJSON and COCO JSON, each also in gzip or zip,
    and label masks (PNG, TIFF).

    What is there already, by class and outline, stays as it is. What the file has changed is updated where only one
    object can be meant; all else is added. What was edited in QuPath since it was imported is never changed.
    """
    options = _import_options(**reading, replaces=replaces)
    with open_project(project, engine=engine) as opened:
        imports = import_files(opened, match_files(opened, files, image), options, dry_run=dry_run)
    if as_json:
        echo_json({"imports": [_import_json(item) for item in imports]})
    else:
        _show_imports(imports)


def _which(text: str) -> int | str:
    """Rank of a backup, or the beginning of its name, which is a date and so has more digits."""
    rank = whole_number(text) if len(text) < 4 else None
    return text if rank is None else rank


def _label(text: str) -> tuple[int, str]:
    value, _, name = text.partition("=")
    label = whole_number(value.strip())
    if label is None or not name.strip():
        raise click.BadParameter(f"{text!r} is not N=CLASS", param_hint="--label")
    return label, name.strip()


def _import_json(item: Import) -> dict[str, Any]:
    return {
        "file": item.file.path,
        "format": item.file.format,
        "image": item.image.name,
        "added": item.added,
        "updated": item.updated,
        "removed": item.removed,
        "already": item.already,
        "repaired": [str(each) for each in item.file.repaired],
        "refused": [str(each) for each in item.file.refused],
        "class_notes": list(item.file.class_notes),
        "notes": [str(each) for each in item.notes],
        "warnings": [*item.file.warnings, *item.remarks],
    }


def _show_imports(imports: tuple[Import, ...]) -> None:
    for item in imports:
        counts = [f"{item.added} added", f"{item.updated} updated" if item.updated else ""]
        counts += [f"{item.removed} taken out" if item.removed else "", f"{item.already} there already"]
        say(f"{item.file} -> {item.image.name}: {', '.join(count for count in counts if count)}")
        named = (*item.file.repaired, *item.file.refused, *item.notes)
        for each in named[:_NAMED]:
            note(f"  {each}")
        if len(named) > _NAMED:
            note(f"  and {len(named) - _NAMED} more objects; --json names them all")
        for warning in (*item.file.class_notes, *item.file.warnings, *item.remarks):
            note(f"  {warning}")


@click.command(short_help="Write the annotations as GeoJSON or label images.")
@project_argument
@click.option("--geojson", type=click.Path(path_type=Path), metavar="DIR", help="One FeatureCollection per image.")
@click.option("--labels", type=click.Path(path_type=Path), metavar="DIR", help="One label TIFF per annotated image.")
@click.option("--downsample", type=COUNT, default=8, show_default=True, help="Of the label images.")
@annotators_option
@image_option
@settings_option
@engine_option
@json_option
def export(
    project: Path,
    geojson: Path | None,
    labels: Path | None,
    downsample: int,
    annotators: tuple[str, ...],
    images: tuple[str, ...],
    settings: Path | None,
    engine: Engine,
    as_json: bool,
) -> None:
    """Write the annotations of PROJECT: GeoJSON in QuPath's form (<entry id>.geojson), label TIFFs in class colours."""
    if geojson is None and labels is None:
        raise click.UsageError("Give --geojson DIR or --labels DIR")
    found: dict[str, Any] = {}
    failures = Failures()
    with open_project(project, engine=engine) as opened:
        if geojson is not None:
            found["geojson"] = export_geojson(opened, geojson, images, annotators=annotators, on_error=failures.add)
        if labels is not None:
            table_settings = read_settings(opened.folder, settings)
            found["labels"] = export_labels(
                opened,
                table_settings,
                labels,
                downsample=downsample,
                names=images,
                annotators=annotators,
                on_error=failures.add,
            )
    if as_json:
        echo_json(found | failures.to_json())
        failures.end()
        return
    for entry, count in found.get("geojson", {}).items():
        say(f"{geojson}/{entry}.geojson: {count} features")
    for entry, size in found.get("labels", {}).items():
        say(f"{labels}/{entry}.tif: {size[0]} x {size[1]}")
    failures.end()


@click.command(short_help="Bring back an earlier state of an image's annotations.")
@project_argument
@click.argument("image")
@click.option("--list", "list_only", is_flag=True, help="Only list the backups.")
@click.option("--which", default="1", show_default=True, help="1 = the newest, or the beginning of a backup's name.")
@json_option
def restore(project: Path, image: str, list_only: bool, which: str, as_json: bool) -> None:
    """Bring back an earlier state of the objects of IMAGE (name or entry id) in PROJECT.

    Every write keeps the former file; the last five are kept. What is replaced now becomes a backup itself.
    """
    if list_only:
        names = [backup.path.name for backup in list_backups(project, image)]
        if as_json:
            echo_json({"backups": names})
        else:
            say(*(names or ["There are no backups."]))
        return
    applied = restore_backup(project, image, _which(which))
    if as_json:
        echo_json({"objects": applied.num_objects, "backup": applied.backup, "warnings": list(applied.warnings)})
        return
    say(f"{image} has {applied.num_objects} objects now; what was there is in {applied.backup}")
    for warning in applied.warnings:
        note(f"Warning: {warning}")
