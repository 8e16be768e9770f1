"""Write a network as an ONNX file, for programs that do not have torch."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from darefine_qupath.errors import ModelError
from darefine_qupath.models.network import SegmentationNetwork

__all__ = ["export_network"]

_OPSET = 18


class _SliceOnly(nn.Module):
    """A network that has no context, without the argument for it."""

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, slice_B3HW: Tensor) -> Tensor:
        return self.network(slice_B3HW, slice_B3HW)  # type: ignore[no-any-return]


def export_network(
    network: SegmentationNetwork, path: Path, *, slice_px: int, context_px: int, metadata: Mapping[str, str]
) -> None:
    """Write a network as ONNX.

    Parameters
    ----------
    network : SegmentationNetwork
        In evaluation mode, on the CPU.
    path : Path
        File to write.
    slice_px, context_px : int
        Sides of slice and context in the file; the batch size stays free.
    metadata : mapping of str to str
        Goes into the file.

    Raises
    ------
    ModelError
        If the packages of the extra ``onnx`` are not installed.
    """
    try:
        onnx = importlib.import_module("onnx")
        importlib.import_module("onnxscript")
    except ImportError as error:
        raise ModelError(f"ONNX export needs {error.name}; run: pip install 'darefine-qupath[onnx]'") from None
    # Two of each: an exporter that sees a batch of one takes the one for a constant.
    inputs = {"slice": torch.zeros(2, 3, slice_px, slice_px)}
    if network.config.uses_context:
        inputs["context"] = torch.zeros(2, 3, context_px, context_px)
    if network.config.uses_box:
        inputs["box"] = torch.tensor([[0.4, 0.4, 0.6, 0.6]]).expand(2, 4).clone()
    batch = torch.export.Dim("batch", min=1, max=4096)
    with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "onnx_ir"):
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            network if network.config.uses_context else _SliceOnly(network),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=["logits"],
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise ModelError(f"torch {torch.__version__} could not export {network.config.title}")
    proto = program.model_proto
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    onnx.save(proto, str(path))


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Keep loggers from reporting progress for a while."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
