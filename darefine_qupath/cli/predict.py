"""``darefine predict``: predict the slides of a project, with the options that ``evaluate`` shares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from darefine_qupath.cli.options import (
    COUNT,
    Command,
    Engine,
    FiniteRange,
    engine_option,
    image_option,
    mpp_option,
    options,
    project_argument,
    settings_option,
    whole_number,
)
from darefine_qupath.cli.output import OPEN_IN_QUPATH, echo_json, json_option, note, percent, table
from darefine_qupath.cli.progress import show_progress
from darefine_qupath.pipeline.predict import PolygonOptions, Prediction, PredictRequest, predict_project
from darefine_qupath.polygons import FEWEST_VERTICES
from darefine_qupath.prediction import PredictOptions
from darefine_qupath.review import RunResult, WriteOptions

__all__ = [
    "model_option",
    "network_options",
    "predict",
    "slide_fields",
    "tissue_option",
    "within_option",
]


def _vertices(_context: click.Context, _option: click.Parameter, value: str) -> int | None:
    """Read a number of vertices from which a region is split, or the word never."""
    if value == "never":
        return None
    number_of = whole_number(value)
    if number_of is None or number_of < FEWEST_VERTICES:
        raise click.BadParameter(f"{value!r} is neither a number from {FEWEST_VERTICES} nor 'never'")
    return number_of


model_option = click.option(
    "--model", type=click.Path(path_type=Path), required=True, help="Model file that darefine train wrote."
)
within_option = click.option(
    "--within", metavar="CLASS", help="Only inside annotations of this class, for instance 'Region*'."
)
tissue_option = click.option(
    "--no-tissue-mask", is_flag=True, help="Predict the whole slide, glass too, not only its tissue."
)


def network_options() -> Callable[[Any], Any]:
    """Give a command the options of `PredictOptions`."""
    return options(
        "Network",
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps."),
        click.option(
            "--precision",
            type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
            default="auto",
            show_default=True,
            help="auto takes the fastest that the device computes natively.",
        ),
        click.option("--batch-size", type=COUNT, help="Slices at once; by default as many as fit."),
        click.option("--overlap", type=FiniteRange(0, 0.9), help="Part of a slice that its neighbour covers too."),
        click.option("--tta", is_flag=True, help="Average over the eight symmetries; about eight times slower."),
        click.option("--compile", is_flag=True, help="Use torch.compile; pays off on many slides."),
        click.option("--workers", type=COUNT, help="Threads that read ahead."),
        click.option("--strict", is_flag=True, help="Treat warnings about a slide as errors."),
        click.option("--restart", is_flag=True, help="Compute score maps anew, finished ones too."),
        click.option("--scheduler", metavar="ADDRESS|local", help="Run slides as tasks of a Dask scheduler."),
    )


def slide_fields(given: dict[str, Any]) -> dict[str, Any]:
    """Fields of `SlideRequest` by the options above, and by those that every command shares."""
    options_given = PredictOptions(
        device=given["device"],
        precision=given["precision"],
        batch_size=given["batch_size"],
        overlap=given["overlap"],
        tta=given["tta"],
        compile=given["compile"],
        workers=given["workers"],
        tissue=not given["no_tissue_mask"],
        strict=given["strict"],
        resume=not given["restart"],
    )
    keys = ("project", "model", "settings", "images", "mpp", "within", "scheduler")
    return {**{key: given[key] for key in keys}, "options": options_given}


@click.command(cls=Command, short_help="Predict the slides of a project and write polygons back.")
@project_argument
@options("What to predict", model_option, image_option, within_option, tissue_option, mpp_option)
@options(
    "Polygons",
    click.option("--classes", metavar="A,B", help="Only polygons of these classes."),
    click.option("--background", is_flag=True, help="Also polygons of the class of unlabelled pixels (Normal, say)."),
    click.option(
        "--min-confidence", type=FiniteRange(0, 1), default=0.0, help="Leave out where the network is less sure."
    ),
    click.option("--simplify-um", type=FiniteRange(0), help="Simplify borders by this much; 1.5 map pixels."),
    click.option(
        "--min-area-um2",
        type=FiniteRange(0),
        default=1000.0,
        show_default=True,
        help="Smaller regions join their surroundings.",
    ),
    click.option("--min-hole-um2", type=FiniteRange(0), help="Fill smaller holes; as --min-area-um2."),
    click.option(
        "--split",
        "max_vertices",
        callback=_vertices,
        default="20000",
        show_default=True,
        metavar="VERTICES|never",
        help="Cut regions of more vertices along straight lines; QuPath is slow with heavy ones.",
    ),
)
@options(
    "Objects in QuPath",
    click.option(
        "--as",
        "kind",
        type=click.Choice(["annotations", "detections"]),
        default="annotations",
        show_default=True,
        help="Detections are lighter in QuPath, but cannot be edited there.",
    ),
    click.option("--parent", is_flag=True, help="Put the polygons below one annotation of the whole image."),
    click.option("--class-suffix", default="", metavar="TEXT", help="Added to the class, for instance ' (predicted)'."),
    click.option(
        "--allow-overlap",
        multiple=True,
        metavar="CLASS",
        help="Predictions may overlap your annotations of this class; may be repeated.",
    ),
    click.option("--maps-only", is_flag=True, help="Only compute score maps; leave the project as it is."),
    click.option(
        "--dry-run",
        is_flag=True,
        help="Say what would change in the project, and write nothing into its folder: score maps are not kept.",
    ),
    engine_option,
)
@network_options()
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write class areas per slide.")
@settings_option
@json_option
def predict(
    csv_path: Path | None,
    as_json: bool,
    engine: Engine,
    **given: Any,  # noqa: ANN401 - see the options above
) -> None:
    """Predict the slides of PROJECT with a model and write class polygons back into the project.

    Only predictions that nobody touched are replaced. What you drew, locked, moved, reshaped or reclassified stays, and
    new predictions are clipped to leave it free; what you deleted does not come back. Close the image in QuPath first:
    its Save would overwrite what is written here. `darefine undo PROJECT` takes the predictions back.
    """
    write = WriteOptions(
        kind="annotation" if given["kind"] == "annotations" else "detection",
        container=given["parent"],
        class_suffix=given["class_suffix"],
        over=given["allow_overlap"],
        min_area_um2=given["min_area_um2"],
    )
    request = PredictRequest(
        **slide_fields(given),
        engine=engine,
        polygons=PolygonOptions(
            simplify_um=given["simplify_um"],
            min_area_um2=given["min_area_um2"],
            min_hole_um2=given["min_hole_um2"],
            max_vertices=given["max_vertices"],
            background=given["background"],
            classes=tuple(name.strip() for name in (given["classes"] or "").split(",") if name.strip()),
            min_confidence=given["min_confidence"],
        ),
        write=None if given["maps_only"] else write,
        dry_run=given["dry_run"],
    )
    with show_progress("Predicting") as listener:
        prediction = predict_project(request, listener=listener)
    if csv_path is not None:
        prediction.write_csv(csv_path)
    if as_json:
        echo_json(prediction.to_json())
    else:
        _show_prediction(prediction, dry_run=request.dry_run)
    if any(outcome.error for outcome in prediction.outcomes):
        raise click.exceptions.Exit(2)


def _show_prediction(prediction: Prediction, *, dry_run: bool) -> None:
    names, titles = prediction.classes.names, prediction.titles
    rows = []
    for outcome in prediction.outcomes:
        if outcome.score_map is None:
            continue
        areas, shares = outcome.score_map.areas_mm2(), outcome.score_map.shares()
        cells = [
            percent(shares[name]) if areas is None else f"{areas[name]:.2f} mm² ({percent(shares[name])})"
            for name in names
        ]
        rows.append((titles[outcome.image.id], *cells, str(outcome.num_polygons), _written(outcome.written)))
    changed = "would change" if dry_run else "in the project"
    if rows:
        table(["image", *names, "polygons", changed], rows)
    warned = [warning for o in prediction.outcomes if o.written is not None for warning in o.written.warnings]
    for warning in dict.fromkeys(warned):
        note(f"Warning: {warning}")
    for image in prediction.skipped:
        note(f"Skipped {titles[image.id]}: {image.why}")
    for outcome in prediction.outcomes:
        if outcome.error:
            note(f"Error: {titles[outcome.image.id]}: {outcome.error}")
    wrote = any(o.written is not None and not o.written.is_dry for o in prediction.outcomes)
    if wrote:
        note(f"Written by the {prediction.engine} engine into {prediction.project}", OPEN_IN_QUPATH)


def _written(result: RunResult | None) -> str:
    if result is None:
        return "-"
    counts = {
        "added": result.added,
        "removed": result.removed,
        "kept": result.kept,
        "covered by yours": result.hidden,
        "taken over": result.adopted,
        "rejected": result.rejected,
    }
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing"
