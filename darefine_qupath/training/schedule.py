"""Schedule learning rates and build the optimizer with its parameter groups."""

from __future__ import annotations

import math
from typing import Any

import torch

from darefine_qupath.models import SegmentationNetwork, encoder_parameters
from darefine_qupath.training.config import TrainConfig

__all__ = ["build_optimizer", "learning_rate_factor", "set_learning_rates"]


def learning_rate_factor(config: TrainConfig, step: int, num_steps: int) -> float:
    """Return the factor on both learning rates at a step.

    Parameters
    ----------
    config : TrainConfig
        `schedule`, `lr_factors` and `warmup` count.
    step : int
        Steps already taken, 0 to ``num_steps - 1``.
    num_steps : int
        Of the whole run.

    Returns
    -------
    float
        In ``step``, the factor of the stage that the step lies in; in ``cosine``, 0 to 1.
    """
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "step":
        stage = step * len(config.lr_factors) // num_steps
        return config.lr_factors[min(stage, len(config.lr_factors) - 1)]
    peak = config.warmup * num_steps
    if step + 1 < peak:
        return (step + 1) / peak
    done = (step + 1 - peak) / max(1.0, num_steps - peak)
    return 0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to its highest rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def build_optimizer(model: SegmentationNetwork, config: TrainConfig) -> torch.optim.Optimizer:
    """Build an optimizer with the encoders' parameters apart from the others'.

    Parameters
    ----------
    model : SegmentationNetwork
        Its encoders learn at `encoder_lr`, the rest at `decoder_lr`. Parameters that need no gradient are left out.
    config : TrainConfig
        Rates, decay and kind.

    Returns
    -------
    Optimizer
        SGD decays everything, as the paper's did; AdamW decays only kernels (two dimensions and more).
    """
    encoders = {id(parameter) for parameter in encoder_parameters(model)}
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = config.optimizer == "sgd" or parameter.ndim > 1
            groups.setdefault((id(parameter) in encoders, decays), []).append(parameter)
    listed: list[dict[str, Any]] = [
        {
            "params": parameters,
            "peak_lr": config.encoder_lr if encoder else config.decoder_lr,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (encoder, decays), parameters in sorted(groups.items())
    ]
    # One kernel for all parameters; on a CPU the loop over them costs as much as a small network's convolutions.
    is_fused = next(model.parameters()).device.type in ("cpu", "cuda")
    if config.optimizer == "sgd":
        return torch.optim.SGD(listed, lr=config.decoder_lr, momentum=config.momentum, fused=is_fused)
    return torch.optim.AdamW(listed, lr=config.decoder_lr, betas=(config.momentum, 0.999), fused=is_fused)
