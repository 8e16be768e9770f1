"""``darefine experiment``: repeat the paper's tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from darefine_qupath.cli.options import COUNT, Command, image_option, options, setting, settings_option
from darefine_qupath.cli.progress import show_progress
from darefine_qupath.experiments.cells import ExperimentRequest, run_experiment
from darefine_qupath.experiments.networks import NETWORKS
from darefine_qupath.experiments.tables import read_cells, write_tables
from darefine_qupath.models import ENCODERS

_QUICK = {
    "steps": 20,
    "width": 16,
    "input_px": 64,
    "num_slides": 1,
    "num_held_out": 1,
    "side_px": 2048,
    "encoders": ("resnet18",),
    "seeds": (0,),
}


@click.command(cls=Command, short_help="Repeat the paper's tables: its networks with equal budgets.")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--quick", is_flag=True, help="Minutes instead of hours: shows that it works, no more.")
@click.option("--tables", is_flag=True, help="Train nothing: write the tables of the cells that are there.")
@options(
    "Rows of the tables",
    click.option(
        "--network",
        "networks",
        multiple=True,
        type=click.Choice(list(NETWORKS)),
        help="Only this row; may be repeated.",
    ),
    click.option(
        "--encoder",
        "encoders",
        multiple=True,
        type=click.Choice(ENCODERS),
        help="Encoder of the slice; may be repeated, a row each.",
    ),
    click.option("--seed", "seeds", multiple=True, type=int, help="May be repeated; 0, 1 and 2 by default."),
)
@options(
    "Equal for all rows",
    click.option("--context-encoder", type=click.Choice(list(ENCODERS)), help="As the slice encoder by default."),
    click.option("--steps", type=COUNT, help="Optimizer steps of every cell; 200."),
    click.option("--batch-size", type=COUNT, help="Tiles per step; 8."),
    click.option("--width", type=COUNT, help="Decoder channels; 64, 256 in the paper."),
    click.option("--input-px", type=COUNT, help="Side of slice and context as the network sees them; 96."),
    click.option("--preset", type=click.Choice(["paper", "modern"]), help="Recipe that --set changes; modern."),
    click.option(
        "--set", "train", multiple=True, callback=setting, metavar="KEY=VALUE", help="Any other key of [train]."
    ),
)
@options(
    "Generated slides",
    click.option("--slides", "num_slides", type=COUNT, help="Slides to learn from; 4."),
    click.option("--held-out-slides", "num_held_out", type=COUNT, help="Slides to measure on; 2."),
    click.option("--side-px", type=COUNT, help="Side of a slide in pixels; 4096."),
)
@options(
    "A project instead",
    click.option("--project", type=click.Path(path_type=Path), help="Use the tiles of this project."),
    settings_option,
    image_option,
    click.option(
        "--held-out",
        multiple=True,
        metavar="NAME",
        help="Measure on this image; may be repeated. Without any: on a quarter of every image, split by area.",
    ),
)
def experiment(out: Path, *, quick: bool, tables: bool, **given: Any) -> None:  # noqa: ANN401
    """Repeat the paper's Tables I and II: every network with equal encoders, steps and seeds.

    Slides are generated, or tiles come from a project. Every finished cell is a file in OUT/cells; a stopped command
    goes on where it was, and several processes share the cells of one OUT. The tables are OUT/tables.md.
    """
    chosen = {name: value for name, value in given.items() if value not in (None, (), {})}
    request = ExperimentRequest(out=out, **{**(_QUICK if quick else {}), **chosen})
    if tables:
        settings = request.shared()
    else:
        with show_progress("Training") as listener:
            settings = run_experiment(request, listener=listener)
    click.echo(write_tables(out, settings, read_cells(out)))
