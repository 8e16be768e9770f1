"""Every fusion can learn two tiles by heart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from darefine_qupath.models import ModelConfig
from tests.training_toy import toy_config, toy_data, toy_train


def overfit(out: Path, fusion: str, num_steps: int) -> float:
    """Train on two tiles and validate on the same two."""
    torch.set_num_threads(1)
    model = ModelConfig(
        slice_encoder="resnet18", context_encoder="resnet18", fusion=fusion, width=16, num_classes=3, dropout=0.0
    )
    still = {"flips": "none", "scale": [1, 1], "stain_jitter": 0, "color_jitter": 0, "context_dropout": 0}
    rates = {"encoder_lr": 1e-3, "decoder_lr": 3e-3, "balance": 0}
    config = toy_config(preset="modern", epochs=1, batch_size=2, samples_per_epoch=2 * num_steps, **still, **rates)
    tiles = toy_data(2, 64)
    return float(toy_train(out, config, model=model, train_data=tiles, val_data=tiles).metrics["miou"])


def test_attention_overfits_two_tiles(tmp_path: Path) -> None:
    assert overfit(tmp_path, "attention", 60) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["add", "concat", "aligned"])
def test_every_other_fusion_overfits_two_tiles(tmp_path: Path, fusion: str) -> None:
    assert overfit(tmp_path, fusion, 120) > 0.99
