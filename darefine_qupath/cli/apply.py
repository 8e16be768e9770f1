"""Commands that apply a model and look at the outcome: predict, evaluate, runs, undo, review, overlay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click

from darefine_qupath.cli.options import (
    COUNT,
    FiniteRange,
    annotators_option,
    engine_option,
    image_option,
    mpp_option,
    project_argument,
    settings_option,
    whole_number,
)
from darefine_qupath.cli.output import (
    Failures,
    Report,
    echo_json,
    json_option,
    note,
    number,
    percent,
    progress_bar,
    say,
    table,
)
from darefine_qupath.metrics import ConfusionMatrix
from darefine_qupath.pipeline.evaluate import Evaluation, evaluate_project
from darefine_qupath.pipeline.next_places import find_places
from darefine_qupath.pipeline.overlay import draw_overlays
from darefine_qupath.pipeline.predict import PolygonOptions, Prediction, PredictRequest, predict_project, write_summary
from darefine_qupath.pipeline.scoring import Unpredicted
from darefine_qupath.polygons import FEWEST_VERTICES
from darefine_qupath.prediction import PredictOptions, Progress
from darefine_qupath.project import open_project
from darefine_qupath.review import (
    Place,
    ReviewReport,
    RunResult,
    WriteOptions,
    clear_places,
    compare,
    mark_places,
    run_states,
    write_page,
)
from darefine_qupath.review import (
    undo as undo_run,
)

__all__ = ["evaluate", "overlay", "predict", "review", "runs", "undo"]

Engine = Literal["auto", "embedded", "paquo"]

_OPEN_IN_QUPATH = (
    "If an image is open in QuPath, do not save it there: use File > Reload data. QuPath's Save would overwrite what "
    "was written."
)


def _vertices(_context: click.Context, _option: click.Parameter, value: str) -> int | None:
    """Read a number of vertices from which a region is split, or the word never."""
    if value == "never":
        return None
    number_of = whole_number(value)
    if number_of is None or number_of < FEWEST_VERTICES:
        raise click.BadParameter(f"{value!r} is neither a number from {FEWEST_VERTICES} nor 'never'")
    return number_of


model_option = click.option(
    "--model", type=click.Path(path_type=Path), required=True, help="Model file that darefine train left."
)
_NETWORK_OPTIONS = (
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps."),
    click.option(
        "--precision",
        type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
        default="auto",
        show_default=True,
        help="auto takes the fastest the device computes natively.",
    ),
    click.option("--batch-size", type=COUNT, help="Slices at once; chosen by itself."),
    click.option("--overlap", type=FiniteRange(0, 0.9), help="Part of a slice its neighbour sees too."),
    click.option("--tta", is_flag=True, help="Average over the eight symmetries; about eight times slower."),
    click.option("--compile", is_flag=True, help="Use torch.compile; worth its start-up time on many slides."),
    click.option("--workers", type=COUNT, help="Threads that read ahead."),
    click.option("--all-glass", is_flag=True, help="Predict glass too, not only tissue."),
    click.option("--within", metavar="CLASS", help="Only inside annotations of this class, for instance 'Region*'."),
    click.option("--strict", is_flag=True, help="Make warnings about a slide errors."),
    click.option("--restart", is_flag=True, help="Forget finished and unfinished maps."),
    click.option("--scheduler", metavar="ADDRESS|local", help="Run slides as tasks of a Dask scheduler."),
)


def _network_options(command: Any) -> Any:  # noqa: ANN401 - click's decorators
    for option in reversed(_NETWORK_OPTIONS):
        command = option(command)
    return command


def _predict_options(given: dict[str, Any]) -> PredictOptions:
    return PredictOptions(
        device=given["device"],
        precision=given["precision"],
        batch_size=given["batch_size"],
        overlap=given["overlap"],
        tta=given["tta"],
        compile=given["compile"],
        workers=given["workers"],
        tissue=not given["all_glass"],
        strict=given["strict"],
        resume=not given["restart"],
    )


@click.command(short_help="Predict the slides of a project and write polygons back.")
@project_argument
@model_option
@image_option
@click.option("--classes", metavar="A,B", help="Only polygons of these classes.")
@click.option("--background", is_flag=True, help="Also polygons of the class of unlabelled pixels (Normal, say).")
@click.option("--min-confidence", type=FiniteRange(0, 1), default=0.0, help="Leave out where the network is less sure.")
@click.option("--simplify-um", type=FiniteRange(0), help="Detail left out of borders.")
@click.option("--min-area-um2", type=FiniteRange(0), default=1000.0, show_default=True, help="Smaller regions go.")
@click.option("--min-hole-um2", type=FiniteRange(0), help="Smaller holes are filled.")
@click.option(
    "--split",
    "max_vertices",
    callback=_vertices,
    default="20000",
    show_default=True,
    metavar="VERTICES|never",
    help="Cut regions of more vertices along straight lines; QuPath is slow with heavy ones.",
)
@click.option(
    "--as",
    "kind",
    type=click.Choice(["annotations", "detections"]),
    default="annotations",
    show_default=True,
    help="Detections are lighter in QuPath, and not editable there.",
)
@click.option("--parent", is_flag=True, help="Put the polygons below one annotation of the whole image.")
@click.option("--class-suffix", default="", metavar="TEXT", help="Added to the class, for instance ' (predicted)'.")
@click.option("--over", multiple=True, metavar="CLASS", help="Predictions may lie over your annotations of this class.")
@click.option("--maps-only", is_flag=True, help="Leave the project as it is; only score maps.")
@click.option("--dry-run", is_flag=True, help="Say what would change in the project, and change nothing.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write class areas per slide.")
@_network_options
@mpp_option
@settings_option
@engine_option
@json_option
def predict(
    project: Path,
    model: Path,
    images: tuple[str, ...],
    csv_path: Path | None,
    as_json: bool,
    engine: Engine,
    **given: Any,  # noqa: ANN401 - see the options above
) -> None:
    """Predict the slides of PROJECT with a model and write class polygons back into the project.

    Only predictions that nobody touched are replaced. What you drew, locked, moved, reshaped or reclassified stays, and
    new predictions give way to it; what you deleted does not come back. Close the image in QuPath first: its Save
    would overwrite what is written here. `darefine undo PROJECT` takes it back.
    """
    write = WriteOptions(
        kind="annotation" if given["kind"] == "annotations" else "detection",
        container=given["parent"],
        class_suffix=given["class_suffix"],
        over=given["over"],
        min_area_um2=given["min_area_um2"],
    )
    request = PredictRequest(
        project=project,
        model=model,
        settings=given["settings"],
        engine=engine,
        images=images,
        mpp=given["mpp"],
        within=given["within"],
        options=_predict_options(given),
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
        scheduler=given["scheduler"],
        dry_run=given["dry_run"],
    )
    with progress_bar("Predicting") as bar:
        prediction = predict_project(request, progress=_slide_reporter(bar))
    if csv_path is not None:
        write_summary(prediction, csv_path)
    if as_json:
        echo_json(prediction.to_json())
    else:
        _show_prediction(prediction, dry_run=request.dry_run)
    if any(outcome.error for outcome in prediction.outcomes):
        raise click.exceptions.Exit(2)


def _slide_reporter(bar: Report) -> Any:  # noqa: ANN401 - a callback
    def report(progress: Progress) -> None:
        left = progress.seconds_left
        rest = "" if left is None else f", {left / 60:.0f} min left"
        name = progress.slide
        if progress.num_slides > 1:
            name += f" (slide {min(progress.slides_done + 1, progress.num_slides)} of {progress.num_slides})"
            if progress.all_seconds_left is not None:
                rest += f", {progress.all_seconds_left / 60:.0f} min for all"
        bar(progress.done, progress.total, f"{name} {progress.rate:.1f} tiles/s{rest}")

    return report


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
        note(f"Written by the {prediction.engine} engine into {prediction.project}", _OPEN_IN_QUPATH)


def _written(result: RunResult | None) -> str:
    if result is None:
        return "-"
    counts = {
        "added": result.added,
        "removed": result.removed,
        "kept": result.kept,
        "hidden by yours": result.hidden,
        "taken over": result.adopted,
        "rejected": result.rejected,
    }
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing"


@click.command(short_help="Compare predictions with annotations.")
@project_argument
@model_option
@image_option
@click.option(
    "--truth",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of <entry id>.geojson; your annotations in the project by default.",
)
@click.option(
    "--context",
    type=click.Choice(["blank", "shuffled"]),
    multiple=True,
    help="Also score with empty or foreign contexts: does the model use them?",
)
@annotators_option
@click.option(
    "--unpredicted",
    type=click.Choice(["count", "ignore"]),
    default="count",
    show_default=True,
    help="Labelled tissue without a prediction counts as errors, or not.",
)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write the scores per slide.")
@_network_options
@mpp_option
@settings_option
@json_option
def evaluate(
    project: Path,
    model: Path,
    images: tuple[str, ...],
    truth: Path | None,
    context: tuple[Any, ...],
    annotators: tuple[str, ...],
    unpredicted: Unpredicted,
    csv_path: Path | None,
    as_json: bool,
    **given: Any,  # noqa: ANN401 - see the options above
) -> None:
    """Compare what a model predicts for PROJECT with annotations; the project stays as it is.

    Without --image these are the images that have a truth and that the model did not learn from.
    """
    request = PredictRequest(
        project=project,
        model=model,
        settings=given["settings"],
        images=images,
        mpp=given["mpp"],
        within=given["within"],
        options=_predict_options(given),
        scheduler=given["scheduler"],
    )
    with progress_bar("Evaluating") as bar:
        found = evaluate_project(
            request,
            truth=truth,
            annotators=annotators,
            context=context,
            unpredicted=unpredicted,
            progress=_slide_reporter(bar),
        )
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
        note(f"The model was trained on {', '.join(found.seen)}: these scores flatter")
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


@click.command(short_help="List what has been written into a project.")
@project_argument
@image_option
@json_option
def runs(project: Path, images: tuple[str, ...], as_json: bool) -> None:
    """List the runs of PROJECT: what was predicted when, by which model, and whether it stands.

    A run is done, undone, or overwritten: gone with data that was restored, or saved in QuPath, from a state before it.
    """
    failures = Failures()
    with open_project(project, engine="embedded") as opened:
        wanted = {opened.image(name).id for name in images}
        found = [
            (run, state)
            for run, state in run_states(opened, on_error=failures.add)
            if not wanted or run.image in wanted
        ]
    if as_json:
        keys = ("id", "batch", "image", "image_name", "model", "date")
        listed = [
            {**{k: getattr(run, k) for k in keys}, "state": state, "objects": len(run.objects)} for run, state in found
        ]
        echo_json({"runs": listed, **failures.to_json()})
    else:
        rows = [(run.id, run.image_name, run.date, run.model, str(len(run.objects)), state) for run, state in found]
        table(["run", "image", "date", "model", "objects", "state"], rows)
    failures.end()


@click.command(short_help="Take a run back.")
@project_argument
@click.argument("run", required=False)
@click.option("--dry-run", is_flag=True, help="Say what would change, and change nothing.")
@engine_option
@json_option
def undo(project: Path, run: str | None, dry_run: bool, engine: Engine, as_json: bool) -> None:
    """Take a RUN of PROJECT back, by default the last call of predict.

    What it wrote and nobody touched goes; what it replaced comes back.
    """
    failures = Failures()
    with open_project(project, engine=engine) as opened:
        results = undo_run(opened, run, dry_run=dry_run, on_error=failures.add)
    if as_json:
        echo_json({"undone": [result.to_json() for result in results], **failures.to_json()})
    else:
        rows = [(r.image_name, r.run, f"-{r.removed}", f"+{r.added}", str(r.adopted)) for r in results]
        table(["image", "run", "removed", "brought back", "yours, kept"], rows)
        if not dry_run:
            note(_OPEN_IN_QUPATH)
    failures.end()


@click.command(short_help="Show what the pathologist did with the predictions.")
@project_argument
@image_option
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write one line per object.")
@click.option("--page", type=click.Path(path_type=Path), help="Write a page (HTML).")
@click.option("--next", "count", type=COUNT, metavar="N", help="The N places where a look helps most.")
@click.option("--mark", is_flag=True, help="With --next: put them into QuPath as annotations Review 01, 02 ...")
@click.option("--clear", is_flag=True, help="Remove those annotations again.")
@engine_option
@json_option
def review(
    project: Path,
    images: tuple[str, ...],
    csv_path: Path | None,
    page: Path | None,
    count: int | None,
    mark: bool,
    clear: bool,
    engine: Engine,
    as_json: bool,
) -> None:
    """Compare what was written into PROJECT with what is there now: accepted, reshaped, reclassified, deleted, drawn.

    With --next, list instead the places where a look helps most.
    """
    if mark and count is None:
        raise click.UsageError("--mark goes with --next N")
    failures = Failures()
    with open_project(project, engine=engine if mark or clear else "embedded") as opened:
        chosen = [opened.image(name) for name in images] or None
        if clear:
            _show_cleared(clear_places(opened, chosen, on_error=failures.add), failures, as_json=as_json)
        elif count is not None:
            places = find_places(opened, chosen, count=count, on_error=failures.add)
            if mark:
                marked = mark_places(opened, places, on_error=failures.add)
                note(f"{marked} review annotations are in the project")
            _show_places(places, failures, as_json=as_json)
        else:
            report = compare(opened, chosen, on_error=failures.add)
            if page is not None:
                write_page(report, page, classes=opened.classes)
            if csv_path is not None:
                report.write_csv(csv_path)
            _show_review(report, failures, as_json=as_json)
    failures.end()


def _show_cleared(count: int, failures: Failures, *, as_json: bool) -> None:
    if as_json:
        echo_json({"removed": count, **failures.to_json()})
    else:
        note(f"{count} review annotations removed")


def _show_places(places: Sequence[Place], failures: Failures, *, as_json: bool) -> None:
    if as_json:
        echo_json({"places": [place.to_json() for place in places], **failures.to_json()})
        return
    if not places:
        note("There is no prediction to look at; run darefine predict")
        return
    rows = [
        (
            str(rank),
            p.image_name,
            f"{p.box.x}, {p.box.y}",
            p.path_class,
            *(number(value, 2) for value in (p.score, p.uncertainty, p.size, p.border, p.unlike)),
        )
        for rank, p in enumerate(places, 1)
    ]
    table(["place", "image", "x, y", "class", "score", "unsure", "large", "border", "unlike"], rows)


def _show_review(report: ReviewReport, failures: Failures, *, as_json: bool) -> None:
    if as_json:
        echo_json({**report.to_json(), **failures.to_json()})
        return
    if not report.images:
        if not failures:
            note("Nothing has been predicted in this project yet; run darefine predict")
        return
    outcomes = list(report.counts)
    by_class = [(name, *(str(counts[o]) for o in outcomes)) for name, counts in report.by_class.items()]
    table(["class", *outcomes], [*by_class, ("all", *(str(report.counts[o]) for o in outcomes))])
    by_image = [(image.image_name, *(str(image.counts[o]) for o in outcomes)) for image in report.images]
    table(["image", *outcomes], by_image)
    for line in report.notes():
        note(f"Warning: {line}")
    agreement = {name: value for name, value in report.iou.items() if value is not None}
    if agreement:
        table(["class", "IoU of what was reviewed"], [(name, number(value)) for name, value in agreement.items()])


@click.command(short_help="Draw predictions over the slides' thumbnails.")
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
