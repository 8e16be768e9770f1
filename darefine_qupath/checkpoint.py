"""The model file: one ``.safetensors`` that says what it is.

Beside the weights, the header holds everything that prediction needs (network, tiles, classes, normalisation) and where
the model comes from. Nothing in it is ever executed; a file of another kind, of another version or with damage is
refused by name.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from darefine_qupath import __version__
from darefine_qupath.classes import ClassMap
from darefine_qupath.errors import CheckpointError
from darefine_qupath.filesystem import atomic_write
from darefine_qupath.limits import NOTES, naming, parse_json, spoken
from darefine_qupath.models import ModelConfig, Normalization, SegmentationNetwork, build_model
from darefine_qupath.models.onnx import export_network
from darefine_qupath.tiles.spec import TileSpec

__all__ = [
    "FORMAT",
    "VERSION",
    "Checkpoint",
    "CheckpointHeader",
    "describe",
    "environment",
    "export_onnx",
    "load_checkpoint",
    "model_id",
    "read_header",
    "rename_former_tensors",
    "save_checkpoint",
]

FORMAT = "darefine-model"
"""Kind of file, as its header names it."""

VERSION = 2
"""Version of the header; version 1, which named some tensors otherwise and had no id, is read too."""

# Tensors of version 1, by the first part of their names.
_FORMER_NAMES = {"joins": "fusions", "narrows": "projections", "refines": "refinements"}
_KEY = "darefine"
_ID_LENGTH = 12
_MAX_LISTED = 6

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CheckpointHeader:
    """What a model file says about itself.

    Attributes
    ----------
    model : ModelConfig
        The network.
    tiles : TileSpec
        The tiles it was trained on, and has to be given.
    classes : ClassMap
        What its logits mean.
    normalisation : Normalisation
        How pixels become its input.
    provenance : mapping of str to Any
        Where it comes from, as JSON values: ``data`` (digest), ``split``, ``metrics``, ``recipe``, ``environment``, ...
    weights_sha256 : str
        Digest of the weights.
    num_parameters : int
        Values in the weights, buffers of batch normalisation included.
    model_id : str
        Twelve hexadecimal digits that stand for everything that decides what the model predicts. They are written into
        the file, so that a model keeps its id when the names of settings change.
    """

    model: ModelConfig
    tiles: TileSpec
    classes: ClassMap
    normalization: Normalization
    provenance: Mapping[str, Any]
    weights_sha256: str
    num_parameters: int
    model_id: str

    def to_json(self) -> dict[str, Any]:
        """Return the plain JSON values that stand in the file."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model.to_json(),
            "tiles": self.tiles.to_json(),
            "classes": self.classes.to_json(),
            "normalization": self.normalization.to_json(),
            "provenance": dict(self.provenance),
            "weights_sha256": self.weights_sha256,
            "num_parameters": self.num_parameters,
            "model_id": self.model_id,
        }


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A trained model, whole.

    Attributes
    ----------
    state : mapping of str to Tensor
        The network's state_dict.
    model, tiles, classes, normalisation, provenance
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
        return replace(header, model_id=_identify(header.to_json()))

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
        metadata = {_KEY: json.dumps(checkpoint.header.to_json(), allow_nan=False)}
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
        header, version = _parse(path, file.metadata())
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
        return _parse(path, file.metadata())[0]


def model_id(source: Checkpoint | CheckpointHeader | Path | str) -> str:
    """Short name of a model: the same for the same predictions, whatever its file is called."""
    return read_header(source).model_id if isinstance(source, Path | str) else source.model_id


def describe(source: Checkpoint | CheckpointHeader | Path | str) -> str:
    """Text about a model, for people, several lines long."""
    if isinstance(source, Path | str):
        source = read_header(source)
    header = source.header if isinstance(source, Checkpoint) else source
    lines = [
        ("model", header.model_id),
        ("network", header.model.title),
        ("weights", f"{header.num_parameters / 1e6:.2f} million values, sha256 {header.weights_sha256[:16]}"),
        ("classes", ", ".join(f"{label} {name}" for label, name in enumerate(header.classes.names))),
        ("tiles", _tiles_text(header.tiles)),
        ("input", _normalisation_text(header.normalization)),
        *((key, _value_text(value)) for key, value in header.provenance.items()),
    ]
    width = max(len(key) for key, _ in lines)
    return "\n".join(f"{key:<{width}}  {text}" for key, text in lines)


def environment() -> dict[str, str | None]:
    """Versions of what trains, and the commit of darefine's source where it is a git checkout."""
    return {
        "darefine": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "git": _git_commit(),
    }


def export_onnx(checkpoint: Checkpoint, path: Path | str) -> None:
    """Write the network as ONNX, with the tile sizes of the model and any batch size.

    Inputs are ``slice`` and, where the network has a context, ``context`` (float32, (B, 3, size, size), normalised as
    ``normalization`` in the metadata says, which has a ``context`` of its own where that differs) and for ``aligned``
    fusion ``box`` (B, 4); the output is ``logits``. The header of the model file is in the metadata.

    Parameters
    ----------
    checkpoint : Checkpoint
        The model.
    path : Path or str
        The file to write.

    Raises
    ------
    ModelError
        If the packages of the extra ``onnx`` are not installed.
    CheckpointError
        If the file cannot be written.
    """
    path = Path(path)
    tiles = checkpoint.tiles
    with atomic_write(path, CheckpointError) as temporary:
        export_network(
            checkpoint.build(),
            temporary,
            slice_px=tiles.input_px,
            context_px=tiles.context_input_px or tiles.input_px,
            metadata={_KEY: json.dumps(checkpoint.header.to_json())},
        )


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


def _parse(path: Path, metadata: Mapping[str, str] | None) -> tuple[CheckpointHeader, int]:
    expected = f"expected {FORMAT} version {VERSION}"
    text = (metadata or {}).get(_KEY)
    if text is None:
        raise CheckpointError(
            f"{path} holds weights of another program; {expected}. Weights for an encoder go with --encoder-weights"
        )
    damaged = f"{path} has a damaged header"
    with naming(damaged, CheckpointError):
        data = parse_json(text, NOTES)
        kind, version = data["format"], data["version"]
    if kind != FORMAT or version not in (1, VERSION):
        hint = "; a newer darefine wrote it, upgrade" if isinstance(version, int) and version > VERSION else ""
        raise CheckpointError(f"{path} is {kind} version {version}; {expected}{hint}")
    with naming(damaged, CheckpointError):
        header = CheckpointHeader(
            model=ModelConfig.from_json(data["model"]),
            tiles=TileSpec.from_json(data["tiles"]),
            classes=ClassMap.from_json(data["classes"]),
            normalization=Normalization.from_json(
                data["normalization" if "normalization" in data else "normalisation"]
            ),
            provenance=_provenance(data["provenance"]),
            weights_sha256=_of_kind(str, "weights_sha256", data["weights_sha256"]),
            num_parameters=_of_kind(int, "num_parameters", data["num_parameters"]),
            model_id=_identify(data) if version == 1 else _of_kind(str, "model_id", data["model_id"]),
        )
    return header, version


def _identify(data: Mapping[str, Any]) -> str:
    """Digest of what decides the predictions, of a header's JSON."""
    decisive = {
        "weights": data["weights_sha256"],
        "model": data["model"],
        "tiles": data["tiles"],
        "classes": data["classes"]["names"],
        **{key: data[key] for key in ("normalization", "normalisation") if key in data},
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:_ID_LENGTH]


def _provenance(data: object) -> Mapping[str, Any]:
    """Return where a model comes from, as far as anything is decided by it, of the types it was written with."""
    found = _of_kind(dict, "provenance", data)
    kinds: dict[str, type] = {"project": str, "images": dict, "split": dict, "stain": dict}
    for key, kind in kinds.items():
        if found.get(key) is not None:
            _of_kind(kind, f"provenance.{key}", found[key])
    if (found.get("split") or {}).get("images") is not None:
        _of_kind(dict, "provenance.split.images", found["split"]["images"])
    return found


def _of_kind(kind: type[T], name: str, value: object) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {type(value).__name__} and no {kind.__name__}")
    return value


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


def _git_commit() -> str | None:
    """Commit of the source tree, with ``+`` after it where files were changed; None outside a checkout."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _tiles_text(tiles: TileSpec) -> str:
    unit = "um" if tiles.is_physical else "px"
    sides = [getattr(tiles, f"{name}_{unit}") for name in ("slice", "context", "stride")]
    shown = "slice {:g}, context {:g}, stride {:g}".format(*sides)
    fed = f"{tiles.input_px} and {tiles.context_input_px or tiles.input_px} px"
    return f"{shown} {unit if unit == 'um' else 'level-0 px'}, fed as {fed}, {tiles.placement}"


def _normalisation_text(normalization: Normalization) -> str:
    shown = f"mean {_numbers(normalization.mean)}, std {_numbers(normalization.std)}"
    context = normalization.context
    return shown if context is None else f"slice {shown}; context {_normalisation_text(context)}"


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def _value_text(value: object) -> str:
    if isinstance(value, Mapping) and isinstance(value.get("files"), Mapping):
        value = {**value, "files": len(value["files"])}
    return value if isinstance(value, str) else json.dumps(value)
