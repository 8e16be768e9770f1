"""Build DA-RefineNet, its ablations and the networks it was compared with, by name.

>>> from darefine_qupath.models import ModelConfig, build_model, num_parameters
>>> network = build_model(ModelConfig(slice_encoder="resnet18", context_encoder="resnet18", width=64))
>>> num_parameters(network)
26383940
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from darefine_qupath.models import darefinenet, efficientnet_lite, refinenet, resnet, unet  # noqa: F401 (register)
from darefine_qupath.models.config import InputMode, ModelConfig, Normalization
from darefine_qupath.models.encoders import LoadedWeights, load_encoder_weights, load_imagenet_weights
from darefine_qupath.models.network import ContextFeatures, Encoder, SegmentationNetwork, box_within
from darefine_qupath.models.registry import (
    ENCODERS,
    FUSIONS,
    NETWORKS,
    FusionStage,
    load_plugins,
    register_encoder,
    register_fusion,
    register_network,
)

__all__ = [
    "ENCODERS",
    "FUSIONS",
    "NETWORKS",
    "ContextFeatures",
    "Encoder",
    "FusionStage",
    "InputMode",
    "LoadedWeights",
    "ModelConfig",
    "Normalization",
    "SegmentationNetwork",
    "box_within",
    "build_model",
    "encoder_parameters",
    "load_encoder_weights",
    "load_imagenet_weights",
    "num_parameters",
    "register_encoder",
    "register_fusion",
    "register_network",
]


def build_model(config: ModelConfig, *, seed: int | None = None) -> SegmentationNetwork:
    """Build a network with random weights, in training mode.

    Parameters
    ----------
    config : ModelConfig
        What it is made of.
    seed : int, optional
        Of the weights; torch's own generator is left as it was. Without it that generator is used.

    Returns
    -------
    SegmentationNetwork
        ``forward(slice_B3HW, context_B3HW, box_B4=None)`` gives logits (B, K, H, W).
    """
    if seed is None:
        return _build(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _build(config)


def _build(config: ModelConfig) -> SegmentationNetwork:
    return cast("SegmentationNetwork", NETWORKS[config.network].build(config))


def encoder_parameters(model: SegmentationNetwork) -> list[nn.Parameter]:
    """Return the parameters of the encoders, in a fixed order; empty for U-Net."""
    return [parameter for encoder in model.encoders.values() for parameter in encoder.parameters()]


def num_parameters(model: nn.Module) -> int:
    """Count the trainable values."""
    return sum(parameter.numel() for parameter in model.parameters())


# Last, as those packages import what this one offers.
load_plugins()
