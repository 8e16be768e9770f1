"""Commands that learn, and on what they leave: tiles, train, show, onnx."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from darefine_qupath.checkpoint import describe, export_onnx, load_checkpoint, read_header
from darefine_qupath.cli.options import (
    WHOLE,
    FiniteRange,
    annotators_option,
    image_option,
    mpp_option,
    project_argument,
    setting,
    settings_option,
)
from darefine_qupath.cli.output import Report, echo_json, json_option, note, number, percent, progress_bar, say, table
from darefine_qupath.models import ENCODERS, FUSIONS, NETWORKS
from darefine_qupath.pipeline.splitting import note_roles
from darefine_qupath.pipeline.tiles import TileRequest, Tiles, divide_tiles, make_tiles
from darefine_qupath.pipeline.train import Folds, resume_training, train_on_project
from darefine_qupath.pipeline.train_request import TrainRequest
from darefine_qupath.tiles.preview import check_sheet, contact_sheet
from darefine_qupath.tiles.split import Role
from darefine_qupath.training import Progress, TrainResult

__all__ = ["onnx", "show", "tiles", "train"]

_TILE_OPTIONS = (
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
    click.option("--unlabelled", metavar="CLASS", help="Class of what no annotation covers, or 'ignore'."),
    click.option("--min-labelled", type=FiniteRange(0, 1), help="Least share of a slice with a label; 0.01."),
    click.option("--pixels", type=click.Choice(["jpeg", "webp"]), help="Store tiles as JPEG, or lossless as WebP."),
    click.option("--quality", type=click.IntRange(1, 100), help="Of the JPEG; 95."),
)
_SPLIT_OPTIONS = (
    click.option(
        "--validation",
        type=FiniteRange(0, 0.9),
        help="Share of the tiles that validates, 0.2; whole cases where there are several.",
    ),
    click.option("--test", type=FiniteRange(0, 0.9), help="Share of the tiles that is held back, 0."),
    click.option(
        "--validation-image",
        "--val-image",
        "validation_images",
        multiple=True,
        metavar="NAME",
        help="This image or case validates, all others train; may be repeated.",
    ),
    click.option(
        "--test-image", "test_images", multiple=True, metavar="NAME", help="This image or case gives no tiles."
    ),
    click.option("--note-roles", is_flag=True, help="Write into the project which images train, validate and test."),
)
_RECIPE_KEYS = ("preset", "epochs", "batch_size", "device", "seed", "encoder_weights")
_SPLIT_KEYS = ("validation", "test", "validation_images", "test_images")
_TILE_KEYS = ("input_px", "slice_um", "context_um", "stride_um", "slice_px", "context_px", "stride_px", "placement")
_NO_MATTER = 0.02
"""Difference of mIoU that different seeds make as well."""


def _tile_options(command: Any) -> Any:  # noqa: ANN401 - click's decorators
    for option in reversed((*_TILE_OPTIONS, *_SPLIT_OPTIONS)):
        command = option(command)
    return command


def _chosen(options: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: options[key] for key in keys}


@click.command(short_help="Cut the training tiles of a project.")
@project_argument
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder for the dataset; left out, tiles are only counted."
)
@click.option(
    "--preview", type=click.Path(path_type=Path), help="Draw a contact sheet of slices, contexts and masks (PNG)."
)
@_tile_options
@annotators_option
@image_option
@mpp_option
@settings_option
@json_option
def tiles(
    project: Path,
    out: Path | None,
    preview: Path | None,
    images: tuple[str, ...],
    mpp: float | None,
    settings: Path | None,
    as_json: bool,
    **options: Any,  # noqa: ANN401 - tile and split options
) -> None:
    """Cut the training tiles of PROJECT, count what is in them, and show some.

    Without --out nothing is written: the tiles are counted, and drawn where --preview asks for it. `darefine train`
    cuts its tiles by itself; this command is for looking at them first, and for settling which images are held back.
    """
    if preview is not None:
        check_sheet(preview)
    request = TileRequest(
        project=project,
        settings=settings,
        images=images,
        mpp=mpp,
        annotators=options["annotators"],
        unlabelled=options["unlabelled"],
        tiles=_chosen(options, _TILE_KEYS),
        screening={"min_labelled": options["min_labelled"]},
        storage=_chosen(options, ("pixels", "quality")),
    )
    with progress_bar("Cutting tiles") as report:
        made = make_tiles(
            request,
            out,
            test_images=options["test_images"],
            progress=lambda done, total: report(done, total, ""),
        )
    index = made.index
    if preview is not None:
        contact_sheet(index, made.reader, preview)
        note(f"Contact sheet: {preview}")
    roles = _roles(request, made, _chosen(options, _SPLIT_KEYS), note_them=options["note_roles"])
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
        names = {source.id: source.name for source in made.corpus.sources} if made.corpus is not None else {}
        table(["image", "role"], [(names.get(key, key), role) for key, role in sorted(roles.items())])
    if out is not None:
        note(f"Dataset: {out}")


def _roles(request: TileRequest, made: Tiles, changes: dict[str, Any], *, note_them: bool) -> dict[str, Role]:
    """Role of every image where a split was asked for, written into the project if that was too."""
    if not note_them and not any(value not in (None, ()) for value in changes.values()):
        return {}
    split = divide_tiles(request, made, changes)
    if split.is_spatial:
        raise click.UsageError("There is one annotated case: it can be split only in parts, by darefine train")
    roles: dict[str, Role] = {**split.images, **dict.fromkeys(made.held_back, "test")}
    if note_them:
        note(f"{note_roles(request.project, roles)} images have another role in the project than before")
    return roles


@click.command(short_help="Train a network on a project.")
@click.argument("project", type=click.Path(path_type=Path), required=False)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Run folder; the model is its model.safetensors.")
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Go on with a run that was stopped.")
@click.option("--preset", type=click.Choice(["paper", "modern"]), help="Recipe that the other settings start from.")
@click.option("--epochs", type=WHOLE, help="Passes over the tiles.")
@click.option("--batch-size", type=WHOLE, help="Tiles per step.")
@click.option("--encoder", type=click.Choice(ENCODERS), help="Encoder of the slice and, unless given, of the context.")
@click.option("--context-encoder", type=click.Choice(ENCODERS), help="Encoder of the context.")
@click.option("--fusion", type=click.Choice(FUSIONS), help="How slice and context meet.")
@click.option("--network", type=click.Choice(NETWORKS), help="The network.")
@click.option(
    "--input", type=click.Choice(["dual", "single", "multisize"]), help="With a context, without, or the slice twice."
)
@click.option("--width", type=WHOLE, help="Decoder channels; 256 in the paper, twice that at 1/32.")
@click.option("--encoder-weights", metavar="FILE", help="imagenet, none, or a file of pretrained weights.")
@click.option("--device", help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--seed", type=WHOLE, help="The same seed gives the same model on a CPU.")
@click.option("--set", "extra", multiple=True, callback=setting, metavar="KEY=VALUE", help="Any other key of [train].")
@click.option(
    "--labels",
    type=click.Choice(["manual", "reviewed"]),
    default="manual",
    show_default=True,
    help="Your own annotations, or those and the predictions you reviewed.",
)
@click.option(
    "--from",
    "init_from",
    type=click.Path(path_type=Path),
    metavar="MODEL",
    help="Start from this model; with --labels reviewed from the one that predicted, unless this is none.",
)
@click.option("--folds", type=WHOLE, help="Cross-validation: so many models, each case validating once.")
@click.option("--fold", type=WHOLE, help="Train only this one of the folds, from 1.")
@click.option("--max-per-image", type=WHOLE, help="Most training tiles of an image.")
@click.option("--max-per-class", "max_per_image_class", type=WHOLE, help="Most training tiles of an image and class.")
@click.option("--hard", metavar="RUN", help="Show what the model of this run gets wrong more often.")
@click.option(
    "--dataset", type=click.Path(path_type=Path), metavar="DIR", help="Keep the tiles there, for several runs."
)
@click.option("--on-the-fly", is_flag=True, help="Read slides while training; writes no tiles.")
@_tile_options
@annotators_option
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
    test give no tiles; validation and train are kept to; the others are split by slide, or by case where metadata
    names one.
    """  # noqa: D301 - click wants the backspace
    if (resume is None) == (project is None or out is None):
        raise click.UsageError("Give PROJECT and -o RUN to start, or --resume RUN to go on")
    with progress_bar("Cutting tiles") as cutting, progress_bar("Training") as training:

        def cut(done: int, total: int) -> None:
            cutting(done, total, "")

        def step(progress: Progress) -> None:
            _report(training, progress)

        if resume is not None:
            result = resume_training(resume, changes=_changes(options), progress=step, tile_progress=cut, announce=note)
        else:
            assert project is not None
            assert out is not None
            request = _request(project, out, options)
            result = train_on_project(request, progress=step, tile_progress=cut, announce=note)
    if result.is_main:
        show_result(result, as_json=as_json)


def _changes(options: dict[str, Any]) -> dict[str, Any]:
    """Training settings given beside --resume; anything else that was given would be passed over in silence."""
    context = click.get_current_context()
    given = [key for key in options if context.get_parameter_source(key) is ParameterSource.COMMANDLINE]
    others = [key for key in given if key == "preset" or key not in (*_RECIPE_KEYS, "extra")]
    if others:
        names = {param.name: param.opts[0] for param in context.command.params}
        raise click.UsageError(
            f"A run goes on with its own tiles, network and recipe: leave {', '.join(names[key] for key in others)} out"
        )
    return _recipe(options)


def _recipe(options: dict[str, Any]) -> dict[str, Any]:
    """Training settings that were given."""
    return {**{key: options[key] for key in _RECIPE_KEYS if options[key] is not None}, **options["extra"]}


def _request(project: Path, out: Path, options: dict[str, Any]) -> TrainRequest:
    encoder, context = options["encoder"], options["context_encoder"]
    model = {
        "slice_encoder": encoder,
        "context_encoder": context or encoder,
        "fusion": options["fusion"],
        "network": options["network"],
        "input": options["input"],
        "width": options["width"],
    }
    is_anew = str(options["init_from"]) == "none"
    return TrainRequest(
        tiles=TileRequest(
            project=project,
            settings=options["settings"],
            images=options["images"],
            mpp=options["mpp"],
            labels=options["labels"],
            annotators=options["annotators"],
            unlabelled=options["unlabelled"],
            tiles=_chosen(options, _TILE_KEYS),
            screening={"min_labelled": options["min_labelled"]},
            storage=_chosen(options, ("pixels", "quality")),
        ),
        out=out,
        model=model,
        train=_recipe(options),
        on_the_fly=options["on_the_fly"],
        split=_chosen(options, (*_SPLIT_KEYS, "folds", "fold")),
        sampling=_chosen(options, ("max_per_image", "max_per_image_class", "hard")),
        dataset=options["dataset"],
        note_roles=options["note_roles"],
        init_from=None if is_anew else options["init_from"],
        fine_tune=not is_anew,
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


def show_result(result: TrainResult | Folds, *, as_json: bool) -> None:
    """Say what a run ended with."""
    if isinstance(result, Folds):
        _show_folds(result, as_json=as_json)
        return
    if as_json:
        echo_json(_result_json(result))
        return
    iou = result.metrics.get("iou") or {}
    if iou:
        rows = [(name, number(value)) for name, value in iou.items()]
        table(["class", "IoU"], [*rows, ("mean", number(result.metrics.get("miou")))], title="Best validation")
    else:
        note("There was no validation; the model is that of the last epoch.")
    if result.context_miou is not None:
        note(_worth_of_context(*result.context_miou))
    note(f"Model: {result.best}", f"Curves and everything else: {result.folder}")


def _worth_of_context(miou: float, blank: float) -> str:
    found = f"mIoU after the last epoch: {miou:.3f} with the tiles' contexts, {blank:.3f} with blank ones"
    if blank > miou + _NO_MATTER:
        return f"{found}. The context misleads this network; more slides, --fusion aligned or --input single may help."
    if blank > miou - _NO_MATTER:
        return f"{found}. This network hardly uses its context."
    return found


def _result_json(result: TrainResult) -> dict[str, Any]:
    found = {"model": result.best, "run": result.folder, "epochs": result.epochs, "metrics": result.metrics}
    if result.context_miou is not None:
        found["context"] = dict(zip(("miou", "miou_with_blank_contexts"), result.context_miou, strict=True))
    return found


def _show_folds(folds: Folds, *, as_json: bool) -> None:
    scores = [result.metrics.get("miou") for result in folds.results]
    known = [score for score in scores if score is not None]
    mean = statistics.fmean(known) if known else None
    if as_json:
        found = [_result_json(result) for result in folds.results]
        echo_json({"run": folds.folder, "folds": found, "miou": mean})
        return
    rows = [
        (str(fold), number(score), str(result.best))
        for fold, (score, result) in enumerate(zip(scores, folds.results, strict=True), 1)
    ]
    table(["fold", "mIoU", "model"], [*rows, ("mean", number(mean), "")], title="Best validation of each fold")


@click.command(short_help="Show what a model file holds.")
@click.argument("model", type=click.Path(path_type=Path))
@json_option
def show(model: Path, as_json: bool) -> None:
    """Show what the model file MODEL holds: network, tiles, classes, and where it comes from."""
    header = read_header(model)
    if as_json:
        echo_json({**header.to_json(), "model_id": header.model_id})
    else:
        say(*describe(header).splitlines())


@click.command(short_help="Write a model as ONNX, for programs without torch.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The .onnx to write.")
@json_option
def onnx(model: Path, out: Path, as_json: bool) -> None:
    """Write the model file MODEL as ONNX, for programs that do not have torch.

    Inputs are slice and, where the network has a context, context: normalised RGB of the model's tile size, any batch.
    The output is logits. What `darefine show` prints stands in the file's metadata.
    """
    checkpoint = load_checkpoint(model)
    export_onnx(checkpoint, out)
    if as_json:
        echo_json({"onnx": out, "model_id": checkpoint.model_id})
    else:
        say(f"{out}: {checkpoint.header.model.title}")
