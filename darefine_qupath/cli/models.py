"""``darefine show`` and ``onnx``: what a model file holds, and the model for programs without torch."""

from __future__ import annotations

from pathlib import Path

import click

from darefine_qupath.checkpoint.describe import describe
from darefine_qupath.checkpoint.export_onnx import export_onnx
from darefine_qupath.checkpoint.model_file import load_checkpoint, read_header
from darefine_qupath.cli.options import Command
from darefine_qupath.cli.output import echo_json, json_option, say

__all__ = ["onnx", "show"]


@click.command(cls=Command, short_help="Show what a model file holds.")
@click.argument("model", type=click.Path(path_type=Path))
@json_option
def show(model: Path, as_json: bool) -> None:
    """Show what the model file MODEL holds: network, tiles, classes, and where it comes from."""
    header = read_header(model)
    if as_json:
        echo_json({**header.to_json(), "model_id": header.model_id})
    else:
        say(*describe(header).splitlines())


@click.command(cls=Command, short_help="Write a model as ONNX, for programs without torch.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The .onnx to write.")
@json_option
def onnx(model: Path, out: Path, as_json: bool) -> None:
    """Write the model file MODEL as ONNX, for programs that do not have torch.

    Inputs are slice and, where the network has a context, context: normalised RGB of the model's tile size, any batch.
    The output is logits. The file's metadata holds what `darefine show` prints.
    """
    checkpoint = load_checkpoint(model)
    export_onnx(checkpoint, out)
    if as_json:
        echo_json({"onnx": out, "model_id": checkpoint.model_id})
    else:
        say(f"{out}: {checkpoint.header.model.title}")
