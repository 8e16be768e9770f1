"""Commands that learn: tiles, train, show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from darefine_qupath.checkpoint import describe, read_header
from darefine_qupath.cli.options import image_option, mpp_option, project_argument, setting, settings_option
from darefine_qupath.cli.output import Report, echo_json, json_option, note, number, percent, progress_bar, table
from darefine_qupath.models import ENCODERS
from darefine_qupath.pipeline.learning import (
    TileRequest,
    TrainRequest,
    make_tiles,
    resume_training,
    train_on_project,
)
from darefine_qupath.tiles.preview import contact_sheet
from darefine_qupath.tiles.screening import Screening
from darefine_qupath.training import Progress, TrainResult

__all__ = ["show", "tiles", "train"]

_TILE_OPTIONS = (
    click.option("--size-px", type=int, help="Pixels of slice and context as the network sees them."),
    click.option("--slice-um", type=float, help="Side of a slice in micrometres."),
    click.option("--context-um", type=float, help="Side of a context in micrometres."),
    click.option("--stride-um", type=float, help="Step between slices in micrometres."),
    click.option("--slice-px", type=int, help="Side of a slice in level-0 pixels, instead of micrometres."),
    click.option("--context-px", type=int, help="Side of a context in level-0 pixels."),
    click.option("--stride-px", type=int, help="Step between slices in level-0 pixels."),
    click.option(
        "--placement",
        type=click.Choice(["parent", "centred"]),
        help="Contexts on a grid (paper), or around each slice.",
    ),
)
_TILE_KEYS = ("size_px", "slice_um", "context_um", "stride_um", "slice_px", "context_px", "stride_px", "placement")


def _tile_options(command: Any) -> Any:  # noqa: ANN401 - click's decorators
    for option in reversed(_TILE_OPTIONS):
        command = option(command)
    return command


@click.command(short_help="Cut the training tiles of a project.")
@project_argument
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder for the dataset; left out, tiles are only counted."
)
@click.option(
    "--preview", type=click.Path(path_type=Path), help="Draw a contact sheet of slices, contexts and masks (PNG)."
)
@click.option("--unlabelled", metavar="CLASS", help="Class of what no annotation covers, or 'ignore'.")
@click.option(
    "--min-labelled", type=float, default=0.01, show_default=True, help="Least share of a slice with a label."
)
@_tile_options
@image_option
@mpp_option
@settings_option
@json_option
def tiles(
    project: Path,
    out: Path | None,
    preview: Path | None,
    unlabelled: str | None,
    min_labelled: float,
    images: tuple[str, ...],
    mpp: float | None,
    settings: Path | None,
    as_json: bool,
    **changes: Any,  # noqa: ANN401 - tile options
) -> None:
    """Cut the training tiles of PROJECT, count what is in them, and show some.

    Without --out nothing is written: the tiles are counted, and drawn where --preview asks for it. `darefine train`
    cuts its tiles by itself; this command is for looking at them first.
    """
    request = TileRequest(
        project=project,
        settings=settings,
        images=images,
        mpp=mpp,
        unlabelled=unlabelled,
        tiles=changes,
        screening=Screening(min_labelled=min_labelled),
    )
    with progress_bar("Cutting tiles") as report:
        made = make_tiles(request, out, progress=lambda done, total: report(done, total, ""))
    index = made.index
    if preview is not None:
        contact_sheet(index, made.reader, preview)
        note(f"Contact sheet: {preview}")
    pixels = index.class_pixels
    rows = list(zip(index.classes.names, pixels.tolist(), index.class_tiles.tolist(), strict=True))
    if as_json:
        classes = {name: {"pixels": count, "tiles": number_of} for name, count, number_of in rows}
        echo_json({"num_tiles": len(index), "num_images": len(index.images), "classes": classes, "out": out})
        return
    total = max(1, int(pixels.sum()))
    table(
        ["class", "mask pixels", "share", "tiles"],
        [(name, f"{count:,}", percent(count / total), f"{number_of:,}") for name, count, number_of in rows],
        title=f"{len(index):,} tiles of {len(index.images)} images",
    )
    if out is not None:
        note(f"Dataset: {out}")


@click.command(short_help="Train a network on a project.")
@click.argument("project", type=click.Path(path_type=Path), required=False)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Run folder; the model is its model.safetensors.")
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Go on with a run that was stopped.")
@click.option("--preset", type=click.Choice(["paper", "modern"]), help="Recipe that the other settings start from.")
@click.option("--epochs", type=int, help="Passes over the tiles.")
@click.option("--batch-size", type=int, help="Tiles per step.")
@click.option("--encoder", type=click.Choice(ENCODERS), help="Encoder of the slice and, unless given, of the context.")
@click.option("--context-encoder", type=click.Choice(ENCODERS), help="Encoder of the context.")
@click.option(
    "--fusion", type=click.Choice(["attention", "add", "concat", "aligned"]), help="How slice and context meet."
)
@click.option("--network", type=click.Choice(["da-refinenet", "refinenet", "unet"]), help="The network.")
@click.option("--width", type=int, help="Decoder channels; 256 in the paper, twice that at 1/32.")
@click.option("--encoder-weights", metavar="FILE", help="imagenet, none, or a file of pretrained weights.")
@click.option("--device", help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--seed", type=int, help="The same seed gives the same model on a CPU.")
@click.option("--set", "extra", multiple=True, callback=setting, metavar="KEY=VALUE", help="Any other key of [train].")
@click.option(
    "--labels",
    type=click.Choice(["manual", "reviewed"]),
    default="manual",
    show_default=True,
    help="Your own annotations, or those and the predictions you reviewed.",
)
@click.option("--from", "init_from", type=click.Path(path_type=Path), metavar="MODEL", help="Start from this model.")
@click.option("--unlabelled", metavar="CLASS", help="Class of what no annotation covers, or 'ignore'.")
@click.option(
    "--validation",
    type=click.FloatRange(0, 0.9),
    default=0.2,
    show_default=True,
    help="Share of the tiles that validates; whole slides where there are several.",
)
@click.option("--val-image", "val_images", multiple=True, metavar="NAME", help="This image validates; may be repeated.")
@click.option("--test-image", "test_images", multiple=True, metavar="NAME", help="This image takes no part.")
@click.option("--on-the-fly", is_flag=True, help="Read slides while training; writes no tiles.")
@_tile_options
@image_option
@mpp_option
@settings_option
@json_option
def train(
    project: Path | None,
    out: Path | None,
    resume: Path | None,
    as_json: bool,
    **options: Any,  # noqa: ANN401 - see the options above
) -> None:
    """Train a network on the annotations of PROJECT and leave the model in a run folder.

    \b
    darefine train my-project -o runs/first
    darefine train --resume runs/first

    Settings come from darefine.toml beside the project; options go over them. Images whose metadata darefine.role is
    test give no tiles; val and train are kept to; the others are split by slide, or by case where metadata names one.
    """  # noqa: D301 - click wants the backspace
    if (resume is None) == (project is None or out is None):
        raise click.UsageError("Give PROJECT and -o RUN to start, or --resume RUN to go on")
    with progress_bar("Cutting tiles") as cutting, progress_bar("Training") as training:

        def cut(done: int, total: int) -> None:
            cutting(done, total, "")

        def step(progress: Progress) -> None:
            _report(training, progress)

        if resume is not None:
            result = resume_training(resume, progress=step, tile_progress=cut)
        else:
            assert project is not None
            assert out is not None
            result = train_on_project(_request(project, out, options), progress=step, tile_progress=cut)
    _show_result(result, as_json=as_json)


def _request(project: Path, out: Path, options: dict[str, Any]) -> TrainRequest:
    encoder, context = options["encoder"], options["context_encoder"]
    model = {
        "slice_encoder": encoder,
        "context_encoder": context or encoder,
        "fusion": options["fusion"],
        "network": options["network"],
        "width": options["width"],
    }
    recipe = {key: options[key] for key in ("preset", "epochs", "batch_size", "device", "seed", "encoder_weights")}
    return TrainRequest(
        tiles=TileRequest(
            project=project,
            settings=options["settings"],
            images=options["images"],
            mpp=options["mpp"],
            labels=options["labels"],
            unlabelled=options["unlabelled"],
            tiles={key: options[key] for key in _TILE_KEYS},
        ),
        out=out,
        model=model,
        train={**{key: value for key, value in recipe.items() if value is not None}, **options["extra"]},
        on_the_fly=options["on_the_fly"],
        validation=options["validation"],
        val_images=options["val_images"],
        test_images=options["test_images"],
        init_from=options["init_from"],
    )


def _report(bar: Report, progress: Progress) -> None:
    done = (progress.epoch - 1) * progress.steps + progress.step
    scores = "" if progress.miou is None else f" mIoU {progress.miou:.3f}"
    iou = " ".join(f"{name} {number(value, 2)}" for name, value in progress.iou.items())
    bar(
        done,
        progress.epochs * progress.steps,
        f"epoch {progress.epoch}/{progress.epochs} loss {progress.loss:.3f}{scores} {iou} "
        f"{progress.images_per_second:.1f} tiles/s, {_clock(progress.seconds_left)} left",
    )


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def _show_result(result: TrainResult, *, as_json: bool) -> None:
    if as_json:
        echo_json({"model": result.best, "run": result.folder, "epochs": result.epochs, "metrics": result.metrics})
        return
    iou = result.metrics.get("iou") or {}
    if iou:
        rows = [(name, number(value)) for name, value in iou.items()]
        table(["class", "IoU"], [*rows, ("mean", number(result.metrics.get("miou")))], title="Best validation")
    else:
        note("There was no validation; the model is that of the last epoch.")
    note(f"Model: {result.best}\nCurves and everything else: {result.folder}")


@click.command(short_help="Show what a model file holds.")
@click.argument("model", type=click.Path(path_type=Path))
@json_option
def show(model: Path, as_json: bool) -> None:
    """Show what the model file MODEL holds: network, tiles, classes, and where it comes from."""
    header = read_header(model)
    if as_json:
        echo_json({**header.to_json(), "model_id": header.model_id})
    else:
        click.echo(describe(header))
