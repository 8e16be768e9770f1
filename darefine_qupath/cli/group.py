"""List the commands, load each when it is called, and turn errors into one line and an exit code."""

from __future__ import annotations

import difflib
import importlib
import io
import logging
import os
import sys
from typing import Any, NoReturn

import click

from darefine_qupath import __version__
from darefine_qupath.cli.lines import LogFormatter, note
from darefine_qupath.errors import DarefineError, TrainingStoppedError

__all__ = ["main"]

# Command -> (module below darefine_qupath.cli, what it does). The text stands here so that `darefine --help` need not
# import torch; a test compares it with the commands' own help.
COMMANDS: dict[str, tuple[str, str]] = {
    "create": ("project", "Make a QuPath project of slides and their annotation files."),
    "info": ("project", "Show the images, classes and annotations of a project."),
    "check": ("project", "Look for what would spoil training: misplaced or bad shapes, missing files."),
    "import": ("annotations", "Add annotation files of other programs to a project."),
    "export": ("annotations", "Write the annotations as GeoJSON or label images."),
    "tiles": ("tiles", "Cut the training tiles of a project."),
    "train": ("train", "Train a network on a project."),
    "show": ("models", "Show what a model file holds."),
    "onnx": ("models", "Write a model as ONNX, for programs without torch."),
    "predict": ("predict", "Predict the slides of a project and write polygons back."),
    "evaluate": ("evaluate", "Compare predictions with annotations."),
    "overlay": ("overlay", "Draw predictions over the slides' thumbnails."),
    "review": ("review", "Show what the pathologist did with the predictions."),
    "next": ("review", "List the places where a look helps most."),
    "runs": ("runs", "List what has been written into a project."),
    "undo": ("runs", "Take a run back."),
    "restore": ("runs", "Bring back an earlier state of an image's annotations."),
    "experiment": ("experiment", "Repeat the paper's tables: its networks with equal budgets."),
    "demo": ("tools", "Make a QuPath project of generated slides."),
    "doctor": ("tools", "Say what works on this machine and what to do about the rest."),
    "qupath-scripts": ("tools", "Copy the scripts for QuPath's script editor to a folder."),
}


class LazyGroup(click.Group):
    """Imports a command's module when the command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the commands in the order of the work, not of the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import the command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"darefine_qupath.cli.{COMMANDS[cmd_name][0]}")
        # A name that Python has taken ends in an underscore.
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(module, name, None) or getattr(module, f"{name}_")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[Any, Any, list[str]]:
        """Suggest the nearest command for an unknown one."""
        if args and args[0] not in COMMANDS:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(COMMANDS)}."
            ctx.fail(f"No such command {args[0]!r}. {hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="darefine")
@click.option("-v", "--verbose", count=True, help="Say more; twice for everything.")
def darefine(verbose: int) -> None:
    """Train DA-RefineNet on a QuPath project, predict its slides, put polygons back for review.

    \b
    darefine train PROJECT -o RUN
    darefine predict PROJECT --model RUN/model.safetensors
    darefine review PROJECT
    """  # noqa: D301 - click wants the backspace
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    if not verbose:
        # Libraries that speak of their own affairs at WARNING; ours do not.
        for name in ("rasterio", "tifffile", "PIL", "distributed", "paquo"):
            logging.getLogger(name).setLevel(logging.ERROR)


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line; errors become one line on standard error and exit code 2."""
    code = 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A letter of a slide's name that the terminal's encoding lacks must not end the command.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        # Without its standalone mode click gives the exit code back instead of ending the process.
        code = darefine.main(args=args, prog_name="darefine", standalone_mode=False) or 0
    except click.ClickException as error:
        text = io.StringIO()
        error.show(text)
        note(*text.getvalue().rstrip("\n").split("\n"))
        sys.exit(2)
    except click.exceptions.Abort:
        _fail("Stopped.", 130)
    except KeyboardInterrupt:
        _fail("Stopped.", 130)
    except TrainingStoppedError as error:
        _fail(str(error), 130)
    except DarefineError as error:
        _fail(str(error), 2, error)
    except OSError as error:
        _fail(_spoken(error), 2, error)
    except MemoryError as error:
        _fail("Out of memory; use a smaller --batch-size or fewer --workers", 2, error)
    sys.exit(code)


def _spoken(error: OSError) -> str:
    if error.filename is None:
        return error.strerror or str(error)
    return f"{error.filename}: {error.strerror or error}"


def _fail(message: str, code: int, error: BaseException | None = None) -> NoReturn:
    if error is not None and os.environ.get("DAREFINE_TRACEBACK"):
        raise error
    # A path may hold a newline; the line must stay one line.
    note(f"Error: {' '.join(message.split())}" if code == 2 else message)
    sys.exit(code)
