"""``darefine tiles``: cut training tiles, with the options that ``train`` shares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from darefine_qupath.cli.options import (
    WHOLE,
    Command,
    FiniteRange,
    annotators_option,
    image_option,
    mpp_option,
    options,
    project_argument,
    settings_option,
)
from darefine_qupath.cli.output import echo_json, json_option, note, percent, table
from darefine_qupath.cli.progress import show_progress
from darefine_qupath.pipeline.splitting import save_roles
from darefine_qupath.pipeline.tiles import TileRequest, Tiles, divide_tiles, make_tiles
from darefine_qupath.report.contact_sheet import check_sheet, contact_sheet
from darefine_qupath.tiles.roles import Role

__all__ = ["SPLIT_KEYS", "chosen", "label_options", "split_options", "tile_options", "tile_request", "tiles"]

SPLIT_KEYS = ("validation", "test", "validation_images", "test_images")
_TILE_KEYS = ("input_px", "slice_um", "context_um", "stride_um", "slice_px", "context_px", "stride_px", "placement")


def label_options(*more: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Give a command the options that say which annotations of which images it learns from."""
    return options(
        "What to learn from",
        *more,
        image_option,
        annotators_option,
        click.option("--unlabelled", metavar="CLASS", help="Class of what no annotation covers, or 'ignore'."),
        mpp_option,
    )


def tile_options() -> Callable[[Any], Any]:
    """Give a command the options of `TileSpec` and of how tiles are stored."""
    return options(
        "Tiles",
        click.option("--input-px", type=WHOLE, help="Pixels of slice and context as the network sees them."),
        click.option("--slice-um", type=FiniteRange(0, min_open=True), help="Side of a slice in micrometres."),
        click.option("--context-um", type=FiniteRange(0, min_open=True), help="Side of a context in micrometres."),
        click.option("--stride-um", type=FiniteRange(0, min_open=True), help="Step between slices in micrometres."),
        click.option("--slice-px", type=WHOLE, help="Side of a slice in level-0 pixels, instead of micrometres."),
        click.option("--context-px", type=WHOLE, help="Side of a context in level-0 pixels."),
        click.option("--stride-px", type=WHOLE, help="Step between slices in level-0 pixels."),
        click.option(
            "--placement",
            type=click.Choice(["parent", "centred"]),
            help="Contexts on a grid (paper), or around each slice.",
        ),
        click.option(
            "--min-labelled", type=FiniteRange(0, 1), help="Leave out slices with a smaller labelled share; 0.01."
        ),
        click.option("--pixels", type=click.Choice(["jpeg", "webp"]), help="Store tiles as JPEG, or lossless as WebP."),
        click.option("--quality", type=click.IntRange(1, 100), help="Of the JPEG; 95."),
    )


def split_options(*more: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Give a command the options of `SplitSpec`."""
    return options(
        "Validation and test",
        click.option(
            "--validation",
            type=FiniteRange(0, 0.9),
            help="Share of the tiles for validation, 0.2; whole cases where there are several.",
        ),
        click.option("--test", type=FiniteRange(0, 0.9), help="Share of the tiles to hold back, 0."),
        click.option(
            "--validation-image",
            "--val-image",
            "validation_images",
            multiple=True,
            metavar="NAME",
            help="Validate on this image or case, and train on all others; may be repeated.",
        ),
        click.option(
            "--test-image",
            "test_images",
            multiple=True,
            metavar="NAME",
            help="Hold this image or case back: it gives no tiles; may be repeated.",
        ),
        *more,
        click.option(
            "--save-roles", is_flag=True, help="Write into the project which images train, validate and test."
        ),
    )


def chosen(given: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Choose some of the options by their keys."""
    return {key: given[key] for key in keys}


def tile_request(project: Path, given: dict[str, Any], **more: Any) -> TileRequest:  # noqa: ANN401 - other fields
    """Make a request of the options of `label_options` and `tile_options`."""
    return TileRequest(
        project=project,
        settings=given["settings"],
        images=given["images"],
        mpp=given["mpp"],
        annotators=given["annotators"],
        unlabelled=given["unlabelled"],
        tiles=chosen(given, _TILE_KEYS),
        screening={"min_labelled": given["min_labelled"]},
        storage=chosen(given, ("pixels", "quality")),
        **more,
    )


@click.command(cls=Command, short_help="Cut the training tiles of a project.")
@project_argument
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder for the dataset; without it tiles are only counted."
)
@click.option(
    "--preview", type=click.Path(path_type=Path), help="Draw a contact sheet of slices, contexts and masks (PNG)."
)
@label_options()
@tile_options()
@split_options()
@settings_option
@json_option
def tiles(
    project: Path,
    out: Path | None,
    preview: Path | None,
    as_json: bool,
    **given: Any,  # noqa: ANN401 - label, tile and split options
) -> None:
    """Cut the training tiles of PROJECT, count what is in them, and show some.

    Without --out nothing is written: the tiles are counted, and drawn where --preview asks for it. `darefine train`
    cuts its tiles by itself; this command is for looking at them first, and for deciding which images are held back.
    """
    if preview is not None:
        check_sheet(preview)
    request = tile_request(project, given)
    with show_progress("Cutting tiles") as listener:
        made = make_tiles(request, out, test_images=given["test_images"], listener=listener)
    index = made.index
    if preview is not None:
        contact_sheet(index, made.reader, preview)
        note(f"Contact sheet: {preview}")
    roles = _roles(request, made, chosen(given, SPLIT_KEYS), save=given["save_roles"])
    pixels = index.class_pixels
    rows = list(zip(index.classes.names, pixels.tolist(), index.class_tiles.tolist(), strict=True))
    if as_json:
        classes = {name: {"pixels": count, "tiles": number_of} for name, count, number_of in rows}
        found = {"num_tiles": len(index), "num_images": len(index.images), "classes": classes, "out": out}
        echo_json({**found, "roles": roles} if roles else found)
        return
    total = max(1, int(pixels.sum()))
    table(
        ["class", "mask pixels", "share", "tiles"],
        [(name, f"{count:,}", percent(count / total), f"{number_of:,}") for name, count, number_of in rows],
        title=f"{len(index):,} tiles of {len(index.images)} images",
    )
    if roles:
        names = (
            {source.id: source.name for source in made.training_set.sources} if made.training_set is not None else {}
        )
        table(["image", "role"], [(names.get(key, key), role) for key, role in sorted(roles.items())])
    if out is not None:
        note(f"Dataset: {out}")


def _roles(request: TileRequest, made: Tiles, changes: dict[str, Any], *, save: bool) -> dict[str, Role]:
    """Role of every image where a split was asked for, written into the project if that was too."""
    if not save and not any(value not in (None, ()) for value in changes.values()):
        return {}
    split = divide_tiles(request, made, changes)
    if split.is_spatial:
        raise click.UsageError(
            "Only one case is annotated, and a case has one role as a whole; darefine train can split it in parts"
        )
    roles: dict[str, Role] = {**split.images, **dict.fromkeys(made.held_back, "test")}
    if save:
        note(f"{save_roles(request.project, roles)} images have another role in the project than before")
    return roles
