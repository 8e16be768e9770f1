"""Build a registered encoder by its name, and load weights for it that were trained elsewhere."""

from __future__ import annotations

import pickle
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from darefine_qupath.errors import ModelError
from darefine_qupath.limits import spoken
from darefine_qupath.models.network import Encoder, SegmentationNetwork
from darefine_qupath.models.registry import ENCODERS

__all__ = ["LoadedWeights", "build_encoder", "load_encoder_weights", "load_imagenet_weights"]

_MAX_LISTED = 8


def build_encoder(name: str) -> Encoder:
    """Build a registered encoder with random weights."""
    return cast("Encoder", ENCODERS[name].build())


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedWeights:
    """What became of a file of encoder weights.

    Attributes
    ----------
    encoders : tuple of str
        Roles of the encoders that have the weights now: ``"slice"``, ``"context"``.
    num_tensors : int
        Tensors that were loaded into each.
    left_out : tuple of str
        Tensors of the file that are not the encoder's: its classification layer, other parts of a larger network.
    """

    encoders: tuple[str, ...]
    num_tensors: int
    left_out: tuple[str, ...]


def load_encoder_weights(
    model: SegmentationNetwork, file: Path | str, *, which: Literal["slice", "context", "both"] = "both"
) -> LoadedWeights:
    """Load weights that were trained elsewhere, on ImageNet or on pathology images.

    Parameters
    ----------
    model : SegmentationNetwork
        Changed in place; not at all if the weights do not fit.
    file : Path or str
        A state_dict with torchvision's or timm's names, ``.safetensors`` or ``.pth``. A ``.pth`` file is read without
        running any code in it. Names may have a common prefix (``module.``, ``encoder.``), and the state_dict may lie
        under ``state_dict`` or ``model``.
    which : {"slice", "context", "both"}
        Encoders to load. ``both`` means all that the network has.

    Returns
    -------
    LoadedWeights
        What was loaded and what was left out.

    Raises
    ------
    ModelError
        If the file cannot be read, the network has no such encoder, or names or shapes differ; lists them.
    """
    path = Path(file)
    encoders = _choose_encoders(model, which)
    state = _read_state(path)
    plans = {role: _match_tensors(path, role, encoder, state) for role, encoder in encoders.items()}
    for role, encoder in encoders.items():
        encoder.load_state_dict(plans[role][0], strict=True)
    first_state, left_out = next(iter(plans.values()))
    return LoadedWeights(encoders=tuple(encoders), num_tensors=len(first_state), left_out=left_out)


def load_imagenet_weights(model: SegmentationNetwork) -> tuple[str, ...]:
    """Load the ImageNet weights that come with installed packages.

    Only ``efficientnet-lite0`` has any (extra ``light``); a ResNet needs `load_encoder_weights`.

    Parameters
    ----------
    model : SegmentationNetwork
        Changed in place.

    Returns
    -------
    tuple of str
        Roles of the encoders that were loaded; empty if there are no weights for them.

    Raises
    ------
    ModelError
        If the package that ships the weights is not installed.
    """
    loaded = []
    for role, name in model.config.encoders.items():
        find_file = ENCODERS[name].imagenet_file
        if find_file is not None:
            load_encoder_weights(model, find_file(), which=cast("Literal['slice', 'context']", role))
            loaded.append(role)
    return tuple(loaded)


def _choose_encoders(model: SegmentationNetwork, which: str) -> dict[str, nn.Module]:
    if which not in ("slice", "context", "both"):
        raise ModelError(f"which = {which!r} is not one of ['slice', 'context', 'both']")
    encoders = model.encoders if which == "both" else {k: v for k, v in model.encoders.items() if k == which}
    if not encoders:
        name = "encoder" if which == "both" else f"{which} encoder"
        raise ModelError(f"{model.config.title} has no {name} to load weights into")
    return encoders


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"There is no file {path} to load encoder weights from")
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else _load_without_code(path)
    except (SafetensorError, pickle.UnpicklingError, OSError, ValueError, RuntimeError, MemoryError) as error:
        raise ModelError(
            f"{path} holds no weights that can be read safely ({spoken(error)}); save a plain state_dict, best as "
            f".safetensors"
        ) from error
    for key in ("state_dict", "model", "model_state_dict", "teacher", "student"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    state = {k: v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, Mapping) else {}
    if not state:
        raise ModelError(f"{path} holds no state_dict: no tensor by name was found in it")
    return state


def _load_without_code(path: Path) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's remarks on pickle protocols
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            # torch takes the bytes of any file for instructions, and stumbles over them in any way there is.
            raise pickle.UnpicklingError(str(error) or type(error).__name__) from error


def _match_tensors(
    path: Path, role: str, encoder: nn.Module, state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Pair the file's tensors with the encoder's, or list why that cannot be done."""
    wanted = encoder.state_dict()
    prefix = _common_prefix(path, wanted, state)
    given = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    head = {name for name in given if _is_head(name) and name not in wanted}
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}
    missing = [name for name in wanted if name not in given and name not in counters]
    unknown = [name for name in given if name not in wanted and name not in head]
    shapes = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    problems = [
        _list_names("missing", missing),
        _list_names("unknown", unknown),
        _list_names("of another shape", shapes),
    ]
    if any(problems):
        raise ModelError(f"{path} does not fit the {role} encoder: {'; '.join(filter(None, problems))}")
    left_out = tuple(name for name in state if not name.startswith(prefix) or name.removeprefix(prefix) in head)
    return {name: given.get(name, tensor) for name, tensor in wanted.items()}, left_out


def _common_prefix(path: Path, wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Return what stands before the encoder's names, such as ``module.encoder.``."""
    matches: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in wanted:
                matches["".join(f"{part}." for part in parts[:start])] += 1
    best = [prefix for prefix, count in matches.items() if count == max(matches.values())]
    if len(best) > 1:
        raise ModelError(f"{path} holds several encoders, under {sorted(best)}; save the one you want by itself")
    return best[0] if best else ""


def _is_head(name: str) -> bool:
    return name.split(".")[0] in ("fc", "head", "classifier", "last_linear", "_fc", "_conv_head", "_bn1")


def _list_names(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return f"{len(names)} {what} ({', '.join(names[:_MAX_LISTED])}{more})"
