"""``darefine train``: train a network on a project, or go on with a run."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from darefine_qupath.cli.options import WHOLE, Command, options, setting, settings_option
from darefine_qupath.cli.output import echo_json, json_option, note, number, table
from darefine_qupath.cli.progress import show_progress
from darefine_qupath.cli.tiles import SPLIT_KEYS, chosen, label_options, split_options, tile_options, tile_request
from darefine_qupath.models import ENCODERS, FUSIONS, NETWORKS
from darefine_qupath.pipeline.train import Folds, resume_training, train_on_project
from darefine_qupath.pipeline.train_request import TrainRequest
from darefine_qupath.training import TrainResult

__all__ = ["show_result", "train"]

_RECIPE_KEYS = ("preset", "epochs", "batch_size", "device", "seed", "encoder_weights")
_NO_MATTER = 0.02
"""Difference of mIoU that different seeds make as well."""


@click.command(cls=Command, short_help="Train a network on a project.")
@click.argument("project", type=click.Path(path_type=Path), required=False)
@options(
    "Run",
    click.option(
        "-o", "--out", type=click.Path(path_type=Path), help="Run folder; model.safetensors in it is the model."
    ),
    click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Go on with a run that was stopped."),
    click.option(
        "--from",
        "init_from",
        type=click.Path(path_type=Path),
        metavar="MODEL",
        help="Start from this model; with --labels reviewed from the one that predicted, unless this is none.",
    ),
    click.option(
        "--dataset", type=click.Path(path_type=Path), metavar="DIR", help="Keep the tiles there, for several runs."
    ),
    click.option("--on-the-fly", is_flag=True, help="Read slides while training; writes no tiles."),
    settings_option,
)
@label_options(
    click.option(
        "--labels",
        type=click.Choice(["manual", "reviewed"]),
        default="manual",
        show_default=True,
        help="Your own annotations, or those and the predictions you reviewed.",
    )
)
@options(
    "Network",
    click.option("--network", type=click.Choice(NETWORKS), help="The network."),
    click.option(
        "--encoder", type=click.Choice(ENCODERS), help="Encoder of the slice and, by default, of the context."
    ),
    click.option("--context-encoder", type=click.Choice(ENCODERS), help="Encoder of the context."),
    click.option("--encoder-weights", metavar="FILE", help="imagenet, none, or a file of pretrained weights."),
    click.option(
        "--fusion",
        type=click.Choice(FUSIONS),
        help="How slice and context are fused.",
    ),
    click.option(
        "--input",
        type=click.Choice(["dual", "single", "multisize"]),
        help="Slice and context, the slice alone, or the slice at two sizes.",
    ),
    click.option("--width", type=WHOLE, help="Decoder channels; 256 in the paper, twice that at 1/32."),
)
@options(
    "Recipe",
    click.option("--preset", type=click.Choice(["paper", "modern"]), help="Recipe that the other settings start from."),
    click.option("--epochs", type=WHOLE, help="Passes over the tiles."),
    click.option("--batch-size", type=WHOLE, help="Tiles per step."),
    click.option("--device", help="auto, cpu, cuda, cuda:1, mps."),
    click.option("--seed", type=WHOLE, help="The same seed gives the same model on a CPU."),
    click.option(
        "--set", "extra", multiple=True, callback=setting, metavar="KEY=VALUE", help="Any other key of [train]."
    ),
)
@split_options(
    click.option("--folds", type=WHOLE, help="Cross-validation: as many models, each case validating once."),
    click.option("--fold", type=WHOLE, help="Train only this one of the folds, from 1."),
)
@options(
    "Sampling",
    click.option("--max-per-image", type=WHOLE, help="At most so many training tiles of an image."),
    click.option("--max-per-class", "max_per_image_class", type=WHOLE, help="At most so many of an image and class."),
    click.option("--hard-examples", metavar="RUN", help="Show tiles more often that the model of this run gets wrong."),
)
@tile_options()
@json_option
def train(
    project: Path | None,
    out: Path | None,
    resume: Path | None,
    as_json: bool,
    **given: Any,  # noqa: ANN401 - see the options above
) -> None:
    """Train a network on the annotations of PROJECT and leave the model in a run folder.

    \b
    darefine train my-project -o runs/first
    darefine train --resume runs/first

    Settings come from darefine.toml beside the project; options override them. Images with the metadata darefine.role
    = test give no tiles, those with validation or train keep that role, and the others are split by slide, or by case
    where metadata names one.
    """  # noqa: D301 - click wants the backspace
    if (resume is None) == (project is None or out is None):
        raise click.UsageError("Give PROJECT and -o RUN to start, or --resume RUN to go on")
    with show_progress("Training") as listener:
        if resume is not None:
            result = resume_training(resume, changes=_changes(given), listener=listener)
        else:
            assert project is not None
            assert out is not None
            result = train_on_project(_request(project, out, given), listener=listener)
    if result.is_main:
        show_result(result, as_json=as_json)


def _changes(given: dict[str, Any]) -> dict[str, Any]:
    """Training settings given beside --resume; whatever else was given would be ignored, and is an error."""
    context = click.get_current_context()
    on_line = [key for key in given if context.get_parameter_source(key) is ParameterSource.COMMANDLINE]
    others = [key for key in on_line if key == "preset" or key not in (*_RECIPE_KEYS, "extra")]
    if others:
        names = {param.name: param.opts[0] for param in context.command.params}
        raise click.UsageError(
            f"A run goes on with its own tiles, network and recipe: leave {', '.join(names[key] for key in others)} out"
        )
    return _recipe(given)


def _recipe(given: dict[str, Any]) -> dict[str, Any]:
    """Training settings that were given."""
    return {**{key: given[key] for key in _RECIPE_KEYS if given[key] is not None}, **given["extra"]}


def _request(project: Path, out: Path, given: dict[str, Any]) -> TrainRequest:
    starts_anew = str(given["init_from"]) == "none"
    return TrainRequest(
        tiles=tile_request(project, given, labels=given["labels"]),
        out=out,
        model={
            "slice_encoder": given["encoder"],
            "context_encoder": given["context_encoder"] or given["encoder"],
            **chosen(given, ("fusion", "network", "input", "width")),
        },
        train=_recipe(given),
        on_the_fly=given["on_the_fly"],
        split=chosen(given, (*SPLIT_KEYS, "folds", "fold")),
        sampling=chosen(given, ("max_per_image", "max_per_image_class", "hard_examples")),
        dataset=given["dataset"],
        save_roles=given["save_roles"],
        init_from=None if starts_anew else given["init_from"],
        fine_tune=not starts_anew,
    )


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
