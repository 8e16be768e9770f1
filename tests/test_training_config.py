from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darefine_qupath.errors import ConfigError
from darefine_qupath.models import ModelConfig, build_model, encoder_parameters
from darefine_qupath.tiles.sampling import tile_weights
from darefine_qupath.training import PRESETS, TrainConfig
from darefine_qupath.training.schedule import build_optimizer, learning_rate_factor, set_learning_rates
from tests.test_tiles_sampling import index_of


def test_default_is_the_papers_recipe() -> None:
    paper = TrainConfig()
    assert paper == PRESETS["paper"] == TrainConfig.from_mapping({})
    assert (paper.optimizer, paper.momentum, paper.weight_decay, paper.loss) == ("sgd", 0.9, 1e-5, "ce")
    assert (paper.batch_size, paper.epochs, paper.freeze_batch_norm) == (12, 75, "auto")


@pytest.mark.parametrize(("epoch", "encoder", "decoder"), [(0, 5e-4, 5e-3), (25, 2.5e-4, 2.5e-3), (50, 1e-4, 1e-3)])
def test_paper_rates_fall_every_25_epochs(epoch: int, encoder: float, decoder: float) -> None:
    config = TrainConfig()
    for step in (epoch * 10, epoch * 10 + 249):
        factor = learning_rate_factor(config, step, 750)
        assert factor * config.encoder_lr == pytest.approx(encoder)
        assert factor * config.decoder_lr == pytest.approx(decoder)


@given(steps=st.integers(1, 500), warmup=st.floats(0, 0.9))
@settings(deadline=None, derandomize=True)
def test_one_cycle_rises_then_falls(steps: int, warmup: float) -> None:
    config = TrainConfig(schedule="cosine", warmup=warmup)
    factors = [learning_rate_factor(config, step, steps) for step in range(steps)]
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert 0 < min(factors) <= max(factors) <= 1
    assert factors[-1] < 0.01 or steps * (1 - warmup) < 2


def test_constant_schedule_stays() -> None:
    assert {learning_rate_factor(TrainConfig(schedule="constant"), step, 9) for step in range(9)} == {1.0}


def test_unknown_key_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Unknown training setting 'lerning_rate'"):
        TrainConfig.from_mapping({"lerning_rate": 1})
    with pytest.raises(ConfigError, match="did you mean 'batch_size'"):
        TrainConfig.from_mapping({"batchsize": 4})
    with pytest.raises(ConfigError, match="No training preset 'moden'; did you mean 'modern'"):
        TrainConfig.from_mapping({"preset": "moden"})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("epochs", 2.5, "epochs = 2.5 must be a whole number"),
        ("epochs", True, "epochs = True must be a whole number"),
        ("epochs", 0, "at least 1"),
        ("optimizer", "adam", "one of"),
        ("encoder_lr", "fast", "must be a number"),
        ("compile", 1, "true or false"),
        ("device", 3, "must be text"),
        ("lr_factors", [1, "x"], "a list of numbers"),
        ("lr_factors", [], "needs numbers"),
        ("scale", [2, 1], "two rising numbers"),
        ("scale", [1], "two rising numbers"),
        ("decoder_lr", 0, "more than 0"),
        ("decoder_lr", float("nan"), "more than 0"),
        ("momentum", 1.0, "below 1"),
        ("balance", 1.5, "at most 1"),
        ("grad_accum_steps", 13, "empty parts"),
    ],
)
def test_bad_values_are_refused_by_name(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        TrainConfig.from_mapping({key: value})
    assert key in str(caught.value)


@pytest.mark.parametrize("name", ["paper", "modern"])
def test_settings_survive_json(name: str) -> None:
    config = TrainConfig.from_preset(name, epochs=3, scale=[0.5, 2])
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_dashes_stand_for_underscores() -> None:
    assert TrainConfig.from_mapping({"batch-size": 3}).batch_size == 3


def test_preset_values_can_be_overridden_one_by_one() -> None:
    changed = TrainConfig.from_mapping({"preset": "modern", "optimizer": "sgd"})
    assert changed.optimizer == "sgd"
    assert changed.schedule == PRESETS["modern"].schedule


def test_encoders_learn_at_their_own_rate() -> None:
    model = build_model(ModelConfig(slice_encoder="resnet18", context_encoder="resnet18", width=8), seed=0)
    optimizer = build_optimizer(model, TrainConfig())
    set_learning_rates(optimizer, 0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    encoder = {id(p) for p in encoder_parameters(model)}
    assert len(rates) == len(list(model.parameters()))
    assert all(rate == pytest.approx(2.5e-4 if key in encoder else 2.5e-3) for key, rate in rates.items())


def test_adamw_decays_kernels_alone() -> None:
    model = build_model(ModelConfig(network="unet", width=16), seed=0)
    optimizer = build_optimizer(model, PRESETS["modern"])
    decayed = {p.ndim > 1: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert isinstance(optimizer, torch.optim.AdamW)
    assert decayed == {True: 1e-2, False: 0.0}


def test_tiles_of_the_commonest_class_alone_are_drawn_by_default() -> None:
    # 8 of 10 tiles hold nothing but class 0, of which the tumour tiles show enough for a full balance.
    tiles = index_of([[100, 0, 0]] * 8 + [[40, 60, 0], [40, 0, 60]])
    shares = [tile_weights(tiles, balance=value)[:8].sum() / 10 for value in (TrainConfig().balance, 1.0)]
    assert shares[0] > 0.25
    assert shares[1] < 0.01
