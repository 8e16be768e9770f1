"""Save and load a model file: one ``.safetensors`` whose header says what it is.

Beside the weights, the header holds everything that prediction needs (network, tiles, classes, normalization) and where
the model comes from. Nothing in it is ever executed; a file of another kind, of another version or with damage is
refused by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from darefine_qupath.checkpoint.header import (
    FORMAT,
    HEADER_KEY,
    VERSION,
    CheckpointHeader,
    compute_model_id,
    parse_header,
)
from darefine_qupath.classes import ClassMap
from darefine_qupath.errors import CheckpointError
from darefine_qupath.filesystem import atomic_write
from darefine_qupath.limits import naming, spoken
from darefine_qupath.models import ModelConfig, Normalization, SegmentationNetwork, build_model
from darefine_qupath.tiles.spec import TileSpec

__all__ = ["Checkpoint", "load_checkpoint", "read_header", "rename_former_tensors", "save_checkpoint"]

# Tensors of version 1, by the first part of their names.
_FORMER_NAMES = {"joins": "fusions", "narrows": "projections", "refines": "refinements"}
_MAX_LISTED = 6


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A trained model, whole.

    Attributes
    ----------
    state : mapping of str to Tensor
        The network's state_dict.
    model, tiles, classes, normalization, provenance
        See `CheckpointHeader`.
    """

    state: Mapping[str, Tensor]
    model: ModelConfig
    tiles: TileSpec
    classes: ClassMap
    normalization: Normalization = field(default_factory=Normalization)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.model.num_classes != self.classes.num_classes:
            raise CheckpointError(
                f"A network of {self.model.num_classes} classes cannot stand for the {self.classes.num_classes} "
                f"classes {list(self.classes.names)}"
            )
        problems = _misfits(self.model, self.state)
        if problems:
            raise CheckpointError(f"The weights do not fit {self.model.title}: {problems}")

    @cached_property
    def header(self) -> CheckpointHeader:
        """What the file says, or will say, about itself."""
        header = CheckpointHeader(
            model=self.model,
            tiles=self.tiles,
            classes=self.classes,
            normalization=self.normalization,
            provenance=self.provenance,
            weights_sha256=_digest(self.state),
            num_parameters=sum(tensor.numel() for tensor in self.state.values()),
            model_id="",
        )
        return replace(header, model_id=compute_model_id(header.to_json()))

    @property
    def model_id(self) -> str:
        """Short name of the model; see `CheckpointHeader.model_id`."""
        return self.header.model_id

    def build(self) -> SegmentationNetwork:
        """Build the network with its weights, in evaluation mode, on the CPU."""
        with torch.device("meta"):
            network = build_model(self.model)
        network = network.to_empty(device="cpu")
        network.load_state_dict(dict(self.state))
        network.expect(self.normalization)
        return network.eval()


def save_checkpoint(path: Path | str, checkpoint: Checkpoint) -> None:
    """Write a model file; a write that is interrupted leaves the former file as it was.

    Parameters
    ----------
    path : Path or str
        Ends in ``.safetensors``; its folder exists.
    checkpoint : Checkpoint
        The model.

    Raises
    ------
    CheckpointError
        If the name ends otherwise, the provenance is not JSON, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"A model file is a .safetensors, not {path.name!r}")
    try:
        metadata = {HEADER_KEY: json.dumps(checkpoint.header.to_json(), allow_nan=False)}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"The provenance of {path} is not plain JSON: {error}") from None
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.state.items()}
    with atomic_write(path, CheckpointError) as temporary:
        try:
            save_file(state, temporary, metadata=metadata)
        except SafetensorError as error:
            raise CheckpointError(f"{path} cannot be written: {error}; is the disk full?") from error


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read a model file and verify its weights against their digest.

    Parameters
    ----------
    path : Path or str
        The file.

    Returns
    -------
    Checkpoint
        On the CPU.

    Raises
    ------
    CheckpointError
        If the file is missing, of another kind or version, or damaged, or has weights that are not finite.
    """
    path = Path(path)
    with _opened(path) as file:
        header, version = parse_header(path, file.metadata())
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if _digest(state) != header.weights_sha256:
        raise CheckpointError(f"{path} is damaged: its weights are not those that were saved; restore it from a copy")
    wrong = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{path} has weights that are not finite (NaN or infinite) in {wrong[0]}{more}: its training went wrong; "
            f"take an earlier model file, or train again with a lower learning rate"
        )
    if version == 1:
        state = rename_former_tensors(state)
        header = replace(header, weights_sha256=_digest(state))
    try:
        checkpoint = Checkpoint(
            state=state,
            model=header.model,
            tiles=header.tiles,
            classes=header.classes,
            normalization=header.normalization,
            provenance=header.provenance,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    vars(checkpoint)["header"] = header  # with the id that the file has
    return checkpoint


def rename_former_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name tensors of a file of version 1 as the networks name them now."""
    parts = {name: name.partition(".") for name in state}
    return {f"{_FORMER_NAMES.get(first, first)}{dot}{rest}": state[name] for name, (first, dot, rest) in parts.items()}


def read_header(path: Path | str) -> CheckpointHeader:
    """Read what a model file says about itself, without its weights.

    Parameters
    ----------
    path : Path or str
        The file.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated, or of another kind or version.
    """
    path = Path(path)
    with _opened(path) as file:
        return parse_header(path, file.metadata())[0]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    expected = f"expected a {FORMAT} version {VERSION} (.safetensors)"
    if not path.is_file():
        raise CheckpointError(f"There is no model file {path}; {expected}")
    try:
        with safe_open(path, framework="pt") as file, naming(path, CheckpointError):
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is {_kind(path)} ({spoken(error)}); {expected}") from error


def _kind(path: Path) -> str:
    """Guess what a file is that safetensors cannot open."""
    with path.open("rb") as handle:
        start = handle.read(64)
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x80\x05")):
        return "a zip or pickle file, which is never opened as a model"
    if not start:
        return "empty"
    return "a damaged or truncated .safetensors" if start[8:9] == b"{" else "no .safetensors at all"


def _misfits(config: ModelConfig, state: Mapping[str, Tensor]) -> str:
    """List the tensors that a network of this configuration lacks, does not know, or has in another shape."""
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in build_model(config).state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = [f"{name} is missing" for name in wanted if name not in given]
    wrong += [f"{name} is unknown" for name in given if name not in wanted]
    wrong += [
        f"{name} is {given[name]} instead of {shape}"
        for name, shape in wanted.items()
        if name in given and given[name] != shape
    ]
    more = f" and {len(wrong) - _MAX_LISTED} more" if len(wrong) > _MAX_LISTED else ""
    return ", ".join(wrong[:_MAX_LISTED]) + more


def _digest(state: Mapping[str, Tensor]) -> str:
    """Digest of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
