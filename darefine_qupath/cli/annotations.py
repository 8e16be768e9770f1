"""``darefine import`` and ``export``: annotation files into a project and out of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from darefine_qupath.annotations import NOBODY
from darefine_qupath.cli.options import (
    COUNT,
    Command,
    Engine,
    annotators_option,
    engine_option,
    image_option,
    options,
    project_argument,
    settings_option,
    whole_number,
)
from darefine_qupath.cli.output import Failures, echo_json, json_option, note, say
from darefine_qupath.pipeline.annotation_export import export_geojson, export_labels
from darefine_qupath.pipeline.annotation_import import Import, ImportOptions, import_files, match_files
from darefine_qupath.pipeline.settings import read_settings
from darefine_qupath.project import open_project

__all__ = ["export", "import_", "import_json", "import_options", "reading_options", "show_imports"]

_NAMED = 20
"""Objects of a file that are named; the others are counted. With --json all are."""


def reading_options() -> Callable[[Any], Any]:
    """Give a command the options that say how annotation files are read."""
    return options(
        "Reading annotation files",
        click.option(
            "--label", "labels", multiple=True, metavar="N=CLASS", help="Class of a label of a mask; may be repeated."
        ),
        click.option(
            "--class-from",
            multiple=True,
            metavar="FIELD",
            help="Field that holds the class of an object: a property, the layer or the text, say; may be repeated.",
        ),
        click.option("--stretch", is_flag=True, help="Scale a mask to its image even if its aspect ratio differs."),
        click.option("--annotator", metavar="NAME", help="Who drew these annotations; keeps raters apart."),
    )


def import_options(
    *, labels: tuple[str, ...], class_from: tuple[str, ...], stretch: bool, annotator: str | None, replaces: bool
) -> ImportOptions:
    """Make `ImportOptions` of the options of `reading_options`."""
    name = None if annotator is None else annotator.strip()
    if name in ("", NOBODY):
        raise click.BadParameter(f"{annotator!r} is no name", param_hint="--annotator")
    if not all(field.strip() for field in class_from):
        raise click.BadParameter("'' is no field", param_hint="--class-from")
    return ImportOptions(
        labels=_labels(labels) or None,
        class_from=class_from,
        stretch=stretch,
        annotator=name,
        replaces=replaces,
    )


@click.command("import", cls=Command, short_help="Add annotation files of other programs to a project.")
@project_argument
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--image", metavar="NAME", help="Image of the annotations; by default the one with the file's name.")
@reading_options()
@click.option(
    "--replace",
    "replaces",
    is_flag=True,
    help="Remove what an earlier import of a file of this name (and annotator) added and this one no longer holds.",
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

    Formats are XML of Aperio ImageScope, HALO and ASAP, Hamamatsu NDPA, GeoJSON and COCO JSON, each also in gzip or
    zip, and label masks (PNG, TIFF).

    Objects that are there already, with the same class and outline, stay as they are. Objects that changed in the file
    are updated where it is clear which one is meant; all others are added. Objects that were edited in QuPath since
    their import are never changed.
    """
    options = import_options(**reading, replaces=replaces)
    with open_project(project, engine=engine) as opened:
        imports = import_files(opened, match_files(opened, files, image), options, dry_run=dry_run)
    if as_json:
        echo_json({"imports": [import_json(item) for item in imports]})
    else:
        show_imports(imports)


def _labels(texts: tuple[str, ...]) -> dict[int, str]:
    labels: dict[int, str] = {}
    for label, name in map(_label, texts):
        if labels.setdefault(label, name) != name:
            raise click.BadParameter(f"label {label} is both {labels[label]} and {name}", param_hint="--label")
    return labels


def _label(text: str) -> tuple[int, str]:
    value, _, name = text.partition("=")
    label = whole_number(value.strip())
    if label is None or not name.strip():
        raise click.BadParameter(f"{text!r} is not N=CLASS", param_hint="--label")
    return label, name.strip()


def import_json(item: Import) -> dict[str, Any]:
    """Return what became of an annotation file as plain JSON values."""
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


def show_imports(imports: tuple[Import, ...]) -> None:
    """Say what became of annotation files."""
    for item in imports:
        counts = [f"{item.added} added", f"{item.updated} updated" if item.updated else ""]
        counts += [f"{item.removed} removed" if item.removed else "", f"{item.already} there already"]
        say(f"{item.file} -> {item.image.name}: {', '.join(count for count in counts if count)}")
        named = (*item.file.repaired, *item.file.refused, *item.notes)
        for each in named[:_NAMED]:
            note(f"  {each}")
        if len(named) > _NAMED:
            note(f"  and {len(named) - _NAMED} more objects; --json names them all")
        for warning in (*item.file.class_notes, *item.file.warnings, *item.remarks):
            note(f"  {warning}")


@click.command(cls=Command, short_help="Write the annotations as GeoJSON or label images.")
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
