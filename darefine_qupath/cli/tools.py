"""Commands around the work: demo, doctor, qupath-scripts."""

from __future__ import annotations

from pathlib import Path

import click

from darefine_qupath.cli.options import COUNT, WHOLE, Command
from darefine_qupath.cli.output import echo_json, json_option, note, say, table
from darefine_qupath.cli.progress import show_progress
from darefine_qupath.demo import make_project
from darefine_qupath.doctor import diagnose
from darefine_qupath.review import install_scripts

__all__ = ["demo", "doctor", "qupath_scripts"]


@click.command(cls=Command, short_help="Make a QuPath project of generated slides.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--train", "num_train", type=COUNT, default=4, show_default=True, help="Annotated slides.")
@click.option(
    "--test", "num_test", type=click.IntRange(0, 10_000), default=1, show_default=True, help="Slides to predict."
)
@click.option("--side", type=click.IntRange(1600, 40_000), default=6144, show_default=True, help="Side in pixels.")
@click.option("--seed", type=WHOLE, default=1, show_default=True, help="Of the first slide; the next ones count up.")
@json_option
def demo(folder: Path, num_train: int, num_test: int, side: int, seed: int, as_json: bool) -> None:
    """Make a QuPath project of generated slides in FOLDER: annotated ones to learn from, bare ones to predict.

    The truth of the bare ones lies in FOLDER/truth.
    """
    total = num_train + num_test
    done = 0
    with show_progress("Drawing slides") as listener:

        def drawn(name: str) -> None:
            nonlocal done
            done += 1
            listener.on_items("Drawing slides", done, total, name)

        made = make_project(
            folder, num_train=num_train, num_test=num_test, size=(side, side), seed=seed, progress=drawn
        )
    if as_json:
        echo_json({"project": made.path, "truth": made.truth, "train": list(made.train), "test": list(made.test)})
        return
    say(made.path)
    note(f"{num_train} annotated slides and {num_test} to predict; their truth is in {made.truth}")


@click.command(cls=Command, short_help="Say what works on this machine and what to do about the rest.")
@json_option
def doctor(as_json: bool) -> None:
    """Say what works on this machine and, for what does not, the one thing to do.

    Exit code 1 when something that is needed does not work.
    """
    findings = diagnose()
    if as_json:
        echo_json({"findings": [vars(finding) for finding in findings]})
    else:
        table(["what", "state", "found", "do"], [(f.name, f.state, f.found, f.advice) for f in findings])
    if any(finding.state == "fail" for finding in findings):
        raise click.exceptions.Exit(1)


@click.command("qupath-scripts", cls=Command, short_help="Copy the scripts for QuPath's script editor to a folder.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace scripts that were edited there.")
def qupath_scripts(folder: Path, force: bool) -> None:
    """Copy the scripts for QuPath's script editor to FOLDER.

    In QuPath: Automate > User scripts > Set script directory.
    """
    for script in install_scripts(folder, overwrite=force):
        say(script)
