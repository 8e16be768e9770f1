"""DA-RefineNet, its ablations, and the networks it was compared with.

>>> from darefine_qupath.models import ModelConfig, build_model, num_parameters
>>> network = build_model(ModelConfig(slice_encoder="resnet18", context_encoder="resnet18", width=64))
>>> num_parameters(network)
26383940
"""

from __future__ import annotations

import torch
from torch import nn

from darefine_qupath.models.config import ENCODERS, Fusion, InputMode, ModelConfig, NetworkName, Normalization
from darefine_qupath.models.darefinenet import DARefineNet
from darefine_qupath.models.encoders import LoadedWeights, load_encoder_weights, load_imagenet_weights
from darefine_qupath.models.network import ContextFeatures, SegmentationNetwork, box_within
from darefine_qupath.models.refinenet import RefineNet
from darefine_qupath.models.unet import UNet

__all__ = [
    "ENCODERS",
    "ContextFeatures",
    "Fusion",
    "InputMode",
    "LoadedWeights",
    "ModelConfig",
    "NetworkName",
    "Normalization",
    "SegmentationNetwork",
    "box_within",
    "build_model",
    "decoder_parameters",
    "encoder_parameters",
    "load_encoder_weights",
    "load_imagenet_weights",
    "num_parameters",
]

_NETWORKS: dict[str, type[SegmentationNetwork]] = {"da-refinenet": DARefineNet, "refinenet": RefineNet, "unet": UNet}


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
        return _NETWORKS[config.network](config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _NETWORKS[config.network](config)


def encoder_parameters(model: SegmentationNetwork) -> list[nn.Parameter]:
    """Parameters of the encoders, in a fixed order; empty for U-Net."""
    return [parameter for encoder in model.encoders.values() for parameter in encoder.parameters()]


def decoder_parameters(model: SegmentationNetwork) -> list[nn.Parameter]:
    """Parameters outside the encoders, in a fixed order."""
    inside = {id(parameter) for parameter in encoder_parameters(model)}
    return [parameter for parameter in model.parameters() if id(parameter) not in inside]


def num_parameters(model: nn.Module) -> int:
    """Count the trainable values."""
    return sum(parameter.numel() for parameter in model.parameters())
