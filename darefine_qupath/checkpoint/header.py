"""Read and write the header of a model file: network, tiles, classes, normalization and provenance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from typing_extensions import TypedDict

from darefine_qupath.classes import ClassMap
from darefine_qupath.errors import CheckpointError
from darefine_qupath.limits import NOTES, naming, parse_json
from darefine_qupath.models import ModelConfig, Normalization
from darefine_qupath.tiles.spec import TileSpec

__all__ = ["FORMAT", "HEADER_KEY", "VERSION", "CheckpointHeader", "compute_model_id", "parse_header"]


FORMAT = "darefine-model"
"""Kind of file, as its header names it."""

VERSION = 2
"""Version of the header; version 1, which named some tensors otherwise and had no id, is read too."""

HEADER_KEY = "darefine"
"""Under which the metadata of a safetensors or ONNX file holds the header."""

_ID_LENGTH = 12


class _Split(TypedDict, total=False):
    images: dict[str, Any] | None


class _Provenance(TypedDict, total=False):
    """What is decided by where a model comes from; the rest may be anything."""

    project: str | None
    images: dict[str, Any] | None
    split: _Split | None
    stain: dict[str, Any] | None


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
    normalization : Normalization
        How pixels become its input.
    provenance : mapping of str to Any
        Where it comes from, as JSON values: ``data`` (digest), ``split``, ``metrics``, ``recipe``, ``environment``, ...
    weights_sha256 : str
        Digest of the weights.
    num_parameters : int
        Values in the weights, buffers of batch normalization included.
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


def parse_header(path: Path, metadata: Mapping[str, str] | None) -> tuple[CheckpointHeader, int]:
    """Header and its version from the metadata of a file; the errors name `path`."""
    expected = f"expected {FORMAT} version {VERSION}"
    text = (metadata or {}).get(HEADER_KEY)
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
        msgspec.convert(data["provenance"], _Provenance)
        normalization = data["normalization" if "normalization" in data else "normalisation"]
        header = msgspec.convert(
            {
                **data,
                "model": ModelConfig.from_json(data["model"]),
                "tiles": TileSpec.from_json(data["tiles"]),
                "classes": ClassMap.from_json(data["classes"]),
                "normalization": Normalization.from_json(normalization),
                "model_id": compute_model_id(data) if version == 1 else data["model_id"],
            },
            CheckpointHeader,
        )
    return header, version


def compute_model_id(data: Mapping[str, Any]) -> str:
    """Digest of what decides the predictions, of a header's JSON."""
    decisive = {
        "weights": data["weights_sha256"],
        "model": data["model"],
        "tiles": data["tiles"],
        "classes": data["classes"]["names"],
        **{key: data[key] for key in ("normalization", "normalisation") if key in data},
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:_ID_LENGTH]
