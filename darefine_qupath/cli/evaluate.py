"""``darefine evaluate``: compare what a model predicts with annotations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from darefine_qupath.cli.options import (
    Command,
    annotators_option,
    image_option,
    mpp_option,
    options,
    project_argument,
    settings_option,
)
from darefine_qupath.cli.output import echo_json, json_option, note, number, percent, table
from darefine_qupath.cli.predict import model_option, network_options, slide_fields, tissue_option, within_option
from darefine_qupath.cli.progress import show_progress
from darefine_qupath.metrics import ConfusionMatrix
from darefine_qupath.pipeline.evaluate import EvaluateRequest, Evaluation, evaluate_project
from darefine_qupath.pipeline.scoring import Unpredicted

__all__ = ["evaluate"]


@click.command(cls=Command, short_help="Compare predictions with annotations.")
@project_argument
@options("What to predict", model_option, image_option, within_option, tissue_option, mpp_option)
@options(
    "What to compare with",
    click.option(
        "--truth",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Folder of <entry id>.geojson; your annotations in the project by default.",
    ),
    annotators_option,
    click.option(
        "--context",
        type=click.Choice(["blank", "shuffled"]),
        multiple=True,
        help="Score also with blank contexts, or those of other tiles: does the model use its context?",
    ),
    click.option(
        "--unpredicted",
        type=click.Choice(["count", "ignore"]),
        default="count",
        show_default=True,
        help="Count labelled tissue without a prediction as wrong, or leave it out.",
    ),
)
@network_options()
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write the scores per slide.")
@settings_option
@json_option
def evaluate(
    unpredicted: Unpredicted,
    csv_path: Path | None,
    as_json: bool,
    **given: Any,  # noqa: ANN401 - see the options above
) -> None:
    """Compare what a model predicts for PROJECT with annotations; the project stays as it is.

    Without --image these are the images that have annotations to compare with and that the model was not trained on.
    """
    comparison = {key: given[key] for key in ("truth", "annotators", "context")}
    request = EvaluateRequest(**slide_fields(given), **comparison, unpredicted=unpredicted)
    with show_progress("Evaluating") as listener:
        found = evaluate_project(request, listener=listener)
    if csv_path is not None:
        found.write_csv(csv_path)
    if as_json:
        echo_json(found.to_json())
    else:
        _show_evaluation(found, unpredicted)
    if found.failed:
        raise click.exceptions.Exit(2)


def _show_evaluation(found: Evaluation, unpredicted: Unpredicted) -> None:
    names, titles = found.classes.names, found.titles
    matrices = [(titles[slide.id], slide.matrix) for slide in found.slides]
    if len(matrices) > 1:
        matrices.append(("all", found.total))
    _score_table("slide", matrices, names)
    does = "counts as wrong (--unpredicted ignore leaves it out)" if unpredicted == "count" else "does not count"
    for slide in found.slides:
        rest = f" (taken for glass, or unreadable) and {does}" if slide.num_unpredicted else ""
        note(f"{titles[slide.id]}: {percent(slide.unpredicted_share)} of the labelled area was not predicted{rest}")
    for image in found.failed:
        note(f"Error: {titles[image.id]}: {image.why}")
    if found.seen:
        note(f"The model was trained on {', '.join(found.seen)}: the scores above are better than on new slides")
    if found.context:
        _score_table("context (by tile)", list(found.context.items()), names)
        normal = found.context["normal"].mean_iou
        for mode, matrix in found.context.items():
            if mode != "normal":
                note(f"A {mode} context changes mIoU by {matrix.mean_iou - normal:+.3f}")


def _score_table(what: str, matrices: Sequence[tuple[str, ConfusionMatrix]], names: Sequence[str]) -> None:
    rows = [
        (
            title,
            *(number(float(value)) for value in matrix.iou),
            number(matrix.mean_iou),
            number(matrix.accuracy),
            number(matrix.mean_dice),
            number(matrix.bach_score),
        )
        for title, matrix in matrices
    ]
    table([what, *(f"IoU {name}" for name in names), "mIoU", "accuracy", "Dice", "BACH score"], rows)
