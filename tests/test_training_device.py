"""What a step does on a device that is not the CPU, shown where there is none.

A tensor on torch's "meta" device has a shape and no content: an operation that mixes devices fails there as on a GPU,
and so does one that looks at a value, for which a GPU would have to be waited for.
"""

from __future__ import annotations

import pytest
import torch

from darefine_qupath.models import ModelConfig, Normalization, build_model
from darefine_qupath.training import TrainConfig
from darefine_qupath.training.augment import TileBatch, draw_augmentation
from darefine_qupath.training.distributed import ProcessGroup
from darefine_qupath.training.initialize import FrozenLayers
from darefine_qupath.training.train_step import StepOutcome, Stepper

META = torch.device("meta")
RECIPES = {
    "modern": TrainConfig.from_preset("modern", context_dropout=0.5, ema_decay=0.9, grad_accum_steps=2),
    "paper": TrainConfig(class_weights="inverse", freeze_batch_norm="yes"),
}


def batch_of(num_tiles: int) -> TileBatch:
    images = torch.zeros(num_tiles, 3, 64, 64, dtype=torch.uint8)
    masks = torch.zeros(num_tiles, 64, 64, dtype=torch.uint8)
    return TileBatch(
        slices=images, contexts=images, masks=masks, boxes=torch.tensor([[0.4, 0.4, 0.6, 0.6]] * num_tiles)
    )


def step_on_meta(model: ModelConfig, config: TrainConfig) -> StepOutcome:
    network = build_model(model, seed=0)
    stepper = Stepper(
        network,
        config,
        group=ProcessGroup(device=META),
        normalization=Normalization(),
        frozen=FrozenLayers(network, config, ()),
        class_weights=torch.ones(4) if config.class_weights == "inverse" else None,
    )
    draws = [draw_augmentation(config, epoch=0, position=position) for position in range(4)]
    return stepper.train_on(batch_of(4), draws, 1.0)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("fusion", ["attention", "aligned"])
def test_a_step_stays_on_its_device_and_waits_for_nothing(recipe: str, fusion: str) -> None:
    model = ModelConfig(slice_encoder="resnet18", context_encoder="resnet18", width=8, num_classes=4, fusion=fusion)
    outcome = step_on_meta(model, RECIPES[recipe])
    assert {outcome.loss.device, outcome.own_loss.device, outcome.num_stops.device} == {META}
    with pytest.raises(RuntimeError, match="meta tensors"):
        float(outcome.loss)


@pytest.mark.parametrize(
    "changes",
    [
        {"fusion": "attention"}, {"fusion": "add"}, {"fusion": "concat"}, {"fusion": "aligned"}, {"input": "single"},
        {"input": "multisize"}, {"network": "refinenet"}, {"network": "unet"},
        {"slice_encoder": "efficientnet-lite0", "context_encoder": "efficientnet-lite0"},
    ],
    ids=lambda changes: "-".join(changes.values()),
)  # fmt: skip
def test_every_weight_has_a_gradient(changes: dict[str, str]) -> None:
    """Several processes would wait for one that has none."""
    small = {"slice_encoder": "resnet18", "context_encoder": "resnet18", "width": 8, "num_classes": 4}
    network = build_model(ModelConfig(**{**small, **changes}), seed=0).to(META)
    image = torch.zeros(2, 3, 64, 64, device=META)
    network(image, image, torch.zeros(2, 4, device=META)).sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []
