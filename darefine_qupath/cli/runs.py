"""``darefine runs``, ``undo`` and ``restore``: what was written into a project, and how to take it back."""

from __future__ import annotations

from pathlib import Path

import click

from darefine_qupath.cli.options import Command, Engine, engine_option, image_option, project_argument, whole_number
from darefine_qupath.cli.output import OPEN_IN_QUPATH, Failures, echo_json, json_option, note, say, table
from darefine_qupath.project import list_backups, open_project
from darefine_qupath.project import restore as restore_backup
from darefine_qupath.review import run_states
from darefine_qupath.review import undo as undo_run

__all__ = ["restore", "runs", "undo"]


@click.command(cls=Command, short_help="List what has been written into a project.")
@project_argument
@image_option
@json_option
def runs(project: Path, images: tuple[str, ...], as_json: bool) -> None:
    """List the runs of PROJECT: what was predicted when, by which model, and whether it stands.

    A run is done, undone, overwritten (its objects are gone because older data was restored, saved in QuPath or copied
    here), or unrecorded: the image has its objects, but its record is missing.
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


@click.command(cls=Command, short_help="Take a run back.")
@project_argument
@click.argument("run", required=False)
@click.option("--dry-run", is_flag=True, help="Say what would change, and change nothing.")
@engine_option
@json_option
def undo(project: Path, run: str | None, dry_run: bool, engine: Engine, as_json: bool) -> None:
    """Take a RUN of PROJECT back, by default the last call of predict.

    Objects that it wrote and nobody touched are removed; what it replaced comes back.
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
            note(OPEN_IN_QUPATH)
    failures.end()


@click.command(cls=Command, short_help="Bring back an earlier state of an image's annotations.")
@project_argument
@click.argument("image")
@click.option("--list", "list_only", is_flag=True, help="Only list the backups.")
@click.option("--which", default="1", show_default=True, help="1 = the newest, or the beginning of a backup's name.")
@json_option
def restore(project: Path, image: str, list_only: bool, which: str, as_json: bool) -> None:
    """Bring back an earlier state of the objects of IMAGE (name or entry id) in PROJECT.

    Every write keeps the former file; the last five are kept. The present state becomes a backup too.
    """
    if list_only:
        names = [backup.path.name for backup in list_backups(project, image)]
        if as_json:
            echo_json({"backups": names})
        else:
            say(*(names or ["There are no backups."]))
        return
    applied = restore_backup(project, image, _which(which))
    if as_json:
        echo_json({"objects": applied.num_objects, "backup": applied.backup, "warnings": list(applied.warnings)})
        return
    say(f"{image} has {applied.num_objects} objects now; what was there is in {applied.backup}")
    for warning in applied.warnings:
        note(f"Warning: {warning}")


def _which(text: str) -> int | str:
    """Rank of a backup, or the beginning of its name, which is a date and so has more digits."""
    rank = whole_number(text) if len(text) < 4 else None
    return text if rank is None else rank
