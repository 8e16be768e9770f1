"""One optimiser step: what learns, in how many parts, and how its gradients are clipped."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from darefine_qupath.checkpoint.model_file import Checkpoint, load_checkpoint, read_header
from darefine_qupath.classes import IGNORE
from darefine_qupath.errors import TrainingError
from darefine_qupath.models import ModelConfig, Normalization, SegmentationNetwork, build_model, encoder_parameters
from darefine_qupath.prediction.engine import Engine, EngineSettings
from darefine_qupath.training import TrainConfig, trainer
from darefine_qupath.training.augment import AugmentationParams, TileBatch
from darefine_qupath.training.distributed import ProcessGroup
from darefine_qupath.training.evaluation import evaluate
from darefine_qupath.training.initialize import FrozenLayers
from darefine_qupath.training.train_step import Stepper
from tests.training_toy import CLASSES, toy_config, toy_data, toy_model, toy_spec, toy_train

LIGHT = ModelConfig(network="refinenet", slice_encoder="resnet18", width=8, num_classes=3, dropout=0.0)
DUAL = ModelConfig(slice_encoder="resnet18", context_encoder="resnet18", width=8, num_classes=3, dropout=0.0)
properties = settings(deadline=None, derandomize=True, max_examples=6)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def batch_of(num_tiles: int, seed: int, size: int = 32) -> TileBatch:
    """Noise with labels, of which a different share is ignored in every tile."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2, num_tiles, 3, size, size), generator=generator, dtype=torch.uint8)
    masks = torch.randint(0, 3, (num_tiles, size, size), generator=generator, dtype=torch.uint8)
    shares = torch.rand(num_tiles, 1, 1, generator=generator)
    masks[torch.rand(masks.shape, generator=generator) < shares] = IGNORE
    return TileBatch(slices=images[0], contexts=images[1], masks=masks, boxes=torch.tensor([[0, 0, 1, 1]] * num_tiles))


def stepper_of(
    config: TrainConfig,
    model: ModelConfig = LIGHT,
    trained: tuple[str, ...] | None = None,
    normalization: Normalization = Normalization(),  # noqa: B008 - frozen
) -> Stepper:
    """Stepper of a network whose encoders count as trained elsewhere unless said otherwise."""
    network = build_model(model, seed=0)
    frozen = FrozenLayers(network, config, tuple(network.encoders) if trained is None else trained)
    return Stepper(network, config, group=ProcessGroup(), normalization=normalization, frozen=frozen)


def change(config: TrainConfig, batch: TileBatch, model: ModelConfig = LIGHT) -> torch.Tensor:
    """What a step adds to the weights."""
    stepper = stepper_of(config, model)
    before = flat(stepper.network)
    stepper.train_on(batch, [AugmentationParams()] * len(batch.masks), 1.0)
    return flat(stepper.network) - before


def flat(network: SegmentationNetwork) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


@given(st.integers(3, 6), st.integers(2, 6), st.integers(0, 99), st.sampled_from(["ce", "ce-dice"]))
@properties
def test_parts_of_a_batch_change_weights_as_the_batch_does(num_tiles: int, parts: int, seed: int, loss: str) -> None:
    batch, config = batch_of(num_tiles, seed), toy_config(batch_size=6, loss=loss, weight_decay=0, grad_clip_norm=0)
    whole = change(config, batch)
    cut = change(replace(config, grad_accum_steps=min(parts, num_tiles)), batch)
    torch.testing.assert_close(cut, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))


@pytest.mark.parametrize(
    ("changes", "model", "warned"),
    [
        ({"grad_accum_steps": 2}, LIGHT, "1/2 of the batch at a time (grad_accum_steps = 2)"),
        ({"grad_accum_steps": 2}, toy_model(), "with a network without batch norm of its own"),
        ({"grad_accum_steps": 2, "freeze_batch_norm": "yes"}, LIGHT, None),
        ({}, LIGHT, None),
    ],
)
def test_parts_are_told_where_batch_norm_sees_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, object], model: ModelConfig, warned: str | None
) -> None:
    toy_train(tmp_path, toy_config(epochs=1, samples_per_epoch=8, **changes), model=model, val_data=None)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [text for text in said if "Batch norm learns from" in text] == said
    assert len(said) == (warned is not None)
    assert warned is None or warned in said[0]


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw", "ema_decay": 0.9}, {"freeze_batch_norm": "no"}])
@pytest.mark.parametrize("encoder", ["resnet18", "efficientnet-lite0"])
def test_encoders_without_a_learning_rate_stay_to_the_bit(encoder: str, changes: dict[str, object]) -> None:
    config = toy_config(encoder_lr=0, weight_decay=0.1, **changes)
    stepper = stepper_of(config, replace(DUAL, slice_encoder=encoder, context_encoder=encoder))
    before = {role: dict(copied(module)) for role, module in stepper.network.encoders.items()}
    decoder = flat(stepper.network)
    for seed in range(3):
        stepper.train_on(batch_of(4, seed), [AugmentationParams()] * 4, 1.0)
    for role, module in stepper.network.encoders.items():
        assert all(torch.equal(before[role][name], value) for name, value in module.state_dict().items())
        assert not any(layer.training for layer in module.modules())
    for network in filter(None, (stepper.average,)):
        assert torch.equal(
            *(torch.cat([p.flatten() for p in encoder_parameters(n)]) for n in (network, stepper.network))
        )
    assert not torch.equal(decoder, flat(stepper.network))
    assert not {id(p) for p in encoder_parameters(stepper.network)} & {
        id(parameter) for group in stepper.optimizer.param_groups for parameter in group["params"]
    }


def copied(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, value.clone()) for name, value in module.state_dict().items()]


def test_frozen_encoders_take_nothing_of_the_clipped_norm() -> None:
    """The decoder moves by the whole clip norm: the encoders' gradients are not in it."""
    config = toy_config(encoder_lr=0, decoder_lr=1, momentum=0, weight_decay=0, grad_clip_norm=1e-3)
    assert float(change(config, batch_of(4, 0), DUAL).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_freezing_what_is_random_or_not_there_is_told(caplog: pytest.LogCaptureFixture) -> None:
    stepper_of(toy_config(encoder_lr=0), DUAL, trained=("context",))
    stepper_of(toy_config(encoder_lr=0), toy_model())
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "encoder_lr = 0 keeps the slice encoder at random weights",
        "encoder_lr = 0 freezes nothing: U-Net, width 16 has no encoder that stands alone",
    ]


def shown_to(network: SegmentationNetwork, *, during: Callable[[], object]) -> dict[str, torch.Tensor]:
    """What each encoder sees."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        encoder.register_forward_pre_hook(lambda _, given, role=role: seen.update({role: given[0].detach()}))
        for role, encoder in network.encoders.items()
    ]
    during()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("mode", ["dual", "multisize"])
def test_each_encoder_sees_what_it_was_trained_on(mode: str) -> None:
    """Grey 127 is zero for EfficientNet-lite0; training, validation and prediction show the same."""
    model = replace(DUAL, context_encoder="efficientnet-lite0", input=mode)
    data, normalization = toy_data(1), Normalization.of(model)
    item = data[0]
    batch = TileBatch(
        slices=item.slice[None], contexts=item.context[None], masks=item.mask[None], boxes=torch.tensor([[0, 0, 1, 1]])
    )
    pixels = torch.nn.functional.avg_pool2d(batch.slices.float(), 2) if mode == "multisize" else batch.contexts.float()
    stepper = stepper_of(toy_config(), model, normalization=normalization)
    stepper.network.eval()  # a single value per channel is nothing to take statistics of
    trained = shown_to(stepper.network, during=lambda: stepper.loss_of(batch, torch.ones(2)))
    network = build_model(model, seed=0)
    validated = shown_to(network, during=lambda: evaluate(network, data, normalization=normalization))
    checkpoint = Checkpoint(
        state=network.state_dict(), model=model, tiles=toy_spec(), classes=CLASSES, normalization=normalization
    )
    built = checkpoint.build()
    engine = Engine(built, normalization, EngineSettings(device="cpu", precision="fp32", batch_size=1))
    images = [image[0].permute(1, 2, 0).numpy() for image in (batch.slices, batch.contexts)]
    predicted = shown_to(
        built,
        during=lambda: engine.score(
            images[:1], engine.encode(images[1:]), [0], np.array([[0, 0, 1, 1]], "f4"), [(0, 0)]
        ),
    )
    for seen in (trained, validated, predicted):
        torch.testing.assert_close(seen["context"], (pixels - 127) / 128, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen["slice"], Normalization().apply(batch.slices), rtol=1e-4, atol=1e-4)


def test_a_run_goes_on_with_the_normalisation_of_the_model_it_starts_from(tmp_path: Path) -> None:
    model, other = replace(DUAL, context_encoder="efficientnet-lite0"), Normalization(mean=(0.5,) * 3)
    config = toy_config(epochs=1, samples_per_epoch=4)
    first = toy_train(tmp_path / "a", config, model=model, val_data=None, normalization=other).last
    second = toy_train(tmp_path / "b", config, model=model, val_data=None, init_from=first).last
    assert read_header(first).normalization == read_header(second).normalization == other
    assert toy_train(tmp_path / "b", config, model=model, val_data=None, init_from=first, resume=True).epochs == 1
    assert load_checkpoint(first).build().normalization == other


class Spoilt(Stepper):
    """Gradients of the decoder are no numbers from step 2 on, whatever the loss is."""

    def _update(self) -> None:
        if self.step >= 2:
            self._parameters[-1].grad.fill_(float("nan"))
        super()._update()


@pytest.mark.parametrize(
    ("precision", "steps", "message"),
    [
        ("fp32", 3, r"weights are not finite .* after epoch 1, step 3"),
        ("fp16", 32, r"overflow fp16 at every step .* after epoch 1, step 30"),
    ],
)
def test_weights_that_are_no_numbers_are_never_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, steps: int, message: str
) -> None:
    """The loss of the last step is still a number, and without validation nobody would look."""
    monkeypatch.setattr(trainer, "Stepper", Spoilt)
    config = toy_config(
        epochs=1, samples_per_epoch=4 * steps, precision=precision, checkpoint_steps=2, grad_clip_norm=0
    )
    with pytest.raises(TrainingError, match=message):
        toy_train(tmp_path, config, val_data=None)
    assert not (tmp_path / "last.safetensors").exists()
    saved = load_file(tmp_path / "state.safetensors")
    assert all(value.isfinite().all() for value in saved.values())


def test_float32_is_never_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU these settings decide; cuDNN's is on by default. They are looked at while the network runs."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("medium")
    network, seen = build_model(LIGHT, seed=0), []

    def look(*_: object) -> None:
        seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))

    network.slice_encoder.register_forward_hook(look)
    next(network.slice_encoder.parameters()).register_hook(look)
    config = toy_config(precision="fp32")
    frozen = FrozenLayers(network, config, ())
    Stepper(network, config, group=ProcessGroup(), normalization=Normalization(), frozen=frozen).train_on(
        batch_of(4, 0), [AugmentationParams()] * 4, 1.0
    )
    evaluate(network, toy_data(1))
    engine = Engine(network, Normalization(), EngineSettings(device="cpu", precision="fp32", batch_size=1))
    image = np.zeros((32, 32, 3), np.uint8)
    engine.score([image], engine.encode([image]), [0], np.array([[0, 0, 1, 1]], "f4"), [(0, 0)])
    after = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    assert (seen, after) == ([(False, "highest")] * 4, (True, "medium"))


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_gradients_are_clipped_without_the_loss_scale(scale: float) -> None:
    """In half precision the loss is scaled up; what is clipped are the gradients of the loss itself."""
    config = toy_config(precision="fp16", encoder_lr=1, decoder_lr=1, momentum=0, weight_decay=0, grad_clip_norm=1e-2)
    stepper = stepper_of(config)
    stepper.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    before = flat(stepper.network)
    stepper.train_on(batch_of(4, 0), [AugmentationParams()] * 4, 1.0)
    assert float((flat(stepper.network) - before).norm()) == pytest.approx(1e-2, rel=1e-2)
