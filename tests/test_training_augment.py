from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darefine_qupath.classes import IGNORE
from darefine_qupath.training import PRESETS, TrainConfig
from darefine_qupath.training.augment import AugmentationParams, TileBatch, apply_augmentation, draw_augmentation

SIZE = 64
DRAWS = st.builds(
    AugmentationParams,
    symmetry=st.integers(0, 7),
    scale=st.floats(0.7, 1.5),
    place=st.tuples(*[st.floats(0, 1)] * 4),
)


def ramp(left: float, top: float, right: float, bottom: float) -> torch.Tensor:
    """Image whose red and green are where a pixel's centre lies in the context, 255 at its far side."""
    across = left + (right - left) * (torch.arange(SIZE) + 0.5) / SIZE
    down = top + (bottom - top) * (torch.arange(SIZE) + 0.5) / SIZE
    red, green = across.expand(SIZE, SIZE), down[:, None].expand(SIZE, SIZE)
    return torch.stack([red, green, torch.full((SIZE, SIZE), 0.5)]).mul(255).round().to(torch.uint8)


def placed_batch(*boxes: tuple[float, float, float, float]) -> TileBatch:
    masks = torch.stack([(ramp(*box)[0] > 128).to(torch.uint8) for box in boxes])
    return TileBatch(
        slices=torch.stack([ramp(*box) for box in boxes]),
        contexts=torch.stack([ramp(0, 0, 1, 1) for _ in boxes]),
        masks=masks,
        boxes=torch.tensor(boxes),
    )


def look_up(image: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """Color at a place given as a fraction, between pixels."""
    grid = torch.tensor([[[[2 * x - 1, 2 * y - 1]]]])
    return torch.nn.functional.grid_sample(image[None].float(), grid, align_corners=False, padding_mode="border")[
        0, :, 0, 0
    ]


@given(draw=DRAWS, left=st.floats(0, 0.7), top=st.floats(0, 0.7), side=st.floats(0.1, 0.3))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_the_box_keeps_showing_where_the_slice_lies(
    draw: AugmentationParams, left: float, top: float, side: float
) -> None:
    turned = apply_augmentation(placed_batch((left, top, left + side, top + side)), [draw])
    box = turned.boxes[0].tolist()
    for x, y in ((0.5, 0.5), (0.35, 0.6)):
        inside = look_up(turned.slices[0], x, y)
        around = look_up(turned.contexts[0], box[0] + x * (box[2] - box[0]), box[1] + y * (box[3] - box[1]))
        # Blue is 128 all over: elsewhere the white beyond the edge of slice or context mixes in.
        if max(abs(float(inside[2]) - 128), abs(float(around[2]) - 128)) <= 1:
            assert torch.allclose(inside, around, atol=4)


@given(draw=DRAWS)
@settings(deadline=None, derandomize=True, max_examples=40)
def test_the_mask_goes_with_the_slice(draw: AugmentationParams) -> None:
    turned = apply_augmentation(placed_batch((0.25, 0.25, 0.75, 0.75)), [draw])
    (red, _, blue), mask = turned.slices[0].int(), turned.masks[0]
    # Blue is 128 all over: elsewhere the white beyond the edge mixes in.
    seen = (mask != IGNORE) & (red - 128).abs().gt(4) & (blue - 128).abs().le(1)
    # Swapping rows and columns does not swap colours: red still tells the label.
    assert torch.equal(mask[seen].bool(), red[seen] > 128)
    assert seen.any()


@given(draw=DRAWS, left=st.floats(0, 0.7), top=st.floats(0, 0.7), side=st.floats(0.1, 0.3))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_the_slice_stays_inside_its_context(draw: AugmentationParams, left: float, top: float, side: float) -> None:
    magnified = replace(draw, scale=max(1.0, draw.scale))
    box = apply_augmentation(placed_batch((left, top, left + side, top + side)), [magnified]).boxes[0]
    assert float(box.min()) >= -1e-5
    assert float(box.max()) <= 1 + 1e-5


@pytest.mark.parametrize("symmetry", range(8))
def test_symmetries_are_exact_and_distinct(symmetry: int) -> None:
    batch = placed_batch((0.1, 0.2, 0.4, 0.5))
    turned = apply_augmentation(batch, [AugmentationParams(symmetry=symmetry)])
    assert sorted(turned.slices.flatten().tolist()) == sorted(batch.slices.flatten().tolist())
    others = [
        apply_augmentation(batch, [AugmentationParams(symmetry=other)]).slices
        for other in range(8)
        if other != symmetry
    ]
    assert not any(torch.equal(turned.slices, other) for other in others)


def test_zooming_out_shows_glass_and_ignores_it() -> None:
    turned = apply_augmentation(placed_batch((0.4, 0.4, 0.6, 0.6)), [AugmentationParams(scale=0.5)])
    border = torch.ones(SIZE, SIZE, dtype=torch.bool)
    border[15:-15, 15:-15] = False
    assert (turned.slices[0, :, border] == 255).all()
    assert (turned.masks[0, border] == IGNORE).all()
    assert (turned.masks[0, 20:44, 20:44] != IGNORE).all()


def test_multisize_context_shows_the_same_crop() -> None:
    """Where the context is the slice itself, both stay the same picture."""
    batch = placed_batch((0.0, 0.0, 1.0, 1.0))
    turned = apply_augmentation(batch, [AugmentationParams(scale=1.3, place=(0.2, 0.9, 0.7, 0.1))])
    assert torch.equal(turned.slices, turned.contexts)
    assert turned.boxes[0].tolist() == pytest.approx([0, 0, 1, 1], abs=1e-6)


def test_glass_keeps_its_colour_whatever_the_stain() -> None:
    batch = placed_batch((0, 0, 1, 1))
    white = replace(batch, slices=torch.full_like(batch.slices, 255))
    turned = apply_augmentation(white, [AugmentationParams(stains=(0.3, -0.3, 0.2))])
    assert (turned.slices == 255).all()


def test_more_haematoxylin_darkens_nuclei_not_eosin() -> None:
    nucleus, stroma = torch.tensor([90, 60, 140]), torch.tensor([235, 140, 190])
    image = torch.stack([nucleus, stroma], dim=1)[None, :, :, None].to(torch.uint8)
    batch = TileBatch(slices=image, contexts=image, masks=torch.zeros(1, 2, 1), boxes=torch.tensor([[0.0, 0, 1, 1]]))
    turned = apply_augmentation(batch, [AugmentationParams(stains=(0.2, 0.0, 0.0))])
    change = turned.slices[0].float().mean(dim=0) - image[0].float().mean(dim=0)
    assert change[0] < -10
    assert abs(change[1]) < 5
    assert torch.equal(turned.slices, turned.contexts)


@given(
    st.tuples(*[st.integers(40, 200)] * 3),
    st.tuples(*[st.floats(-0.2, 0.2)] * 3),
    st.sampled_from([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]),
)
@settings(deadline=None, derandomize=True, max_examples=40)
def test_brightness_contrast_and_saturation_are_applied(
    color: tuple[int, int, int], drawn: tuple[float, float, float], which: tuple[int, int, int]
) -> None:
    brightness, contrast, saturation = (amount * factor for amount, factor in zip(drawn, which, strict=True))
    image = torch.tensor(color, dtype=torch.uint8)[None, :, None, None].expand(1, 3, 2, 2)
    batch = TileBatch(slices=image, contexts=image, masks=torch.zeros(1, 2, 2), boxes=torch.tensor([[0.0, 0, 1, 1]]))
    turned = apply_augmentation(batch, [AugmentationParams(colors=(brightness, contrast, saturation))])
    gray = sum(color) / 3
    expected = [
        (((gray + (value - gray) * (1 + saturation)) - 128) * (1 + contrast) + 128) * (1 + brightness)
        for value in color
    ]
    assert turned.slices[0, :, 0, 0].tolist() == pytest.approx(np.clip(expected, 0, 255).tolist(), abs=0.6)
    assert torch.equal(turned.slices, turned.contexts)


def test_no_change_is_no_change() -> None:
    batch = placed_batch((0, 0, 0.5, 0.5))
    still = TrainConfig(flips="none", scale=(1, 1))
    same = apply_augmentation(batch, [draw_augmentation(still, epoch=0, position=0)])
    assert same is batch


def test_stain_space_leads_back_to_the_same_colours() -> None:
    batch = placed_batch((0, 0, 1, 1))
    turned = apply_augmentation(batch, [AugmentationParams(stains=(1e-9, 0, 0))])
    assert (turned.slices.int() - batch.slices.int()).abs().max() <= 1


def test_dropped_context_is_white_and_the_slice_stays() -> None:
    batch = placed_batch((0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1))
    turned = apply_augmentation(batch, [AugmentationParams(), AugmentationParams(blank_context=True)])
    assert torch.equal(turned.slices, batch.slices)
    assert torch.equal(turned.contexts[0], batch.contexts[0])
    assert (turned.contexts[1] == 255).all()


def test_draws_follow_from_seed_epoch_and_position() -> None:
    config = PRESETS["modern"]
    first = draw_augmentation(config, epoch=3, position=5)
    assert first == draw_augmentation(config, epoch=3, position=5)
    others = [
        draw_augmentation(config, epoch=4, position=5),
        draw_augmentation(config, epoch=3, position=6),
        draw_augmentation(replace(config, seed=1), epoch=3, position=5),
    ]
    assert first not in others


def test_switching_one_change_off_leaves_the_others() -> None:
    config = PRESETS["modern"]
    plain = draw_augmentation(replace(config, stain_jitter=0.0), epoch=0, position=1)
    drawn = draw_augmentation(config, epoch=0, position=1)
    assert plain == replace(drawn, stains=(0.0, 0.0, 0.0))


def test_draws_stay_within_the_recipe() -> None:
    config = TrainConfig(flips="flip", scale=(0.8, 1.25), stain_jitter=0.1, color_jitter=0.2, context_dropout=0.25)
    draws = [draw_augmentation(config, epoch=0, position=position) for position in range(400)]
    assert {draw.symmetry for draw in draws} == {0, 1, 2, 3}
    assert 0.8 <= min(draw.scale for draw in draws) < 0.85
    assert 1.2 < max(draw.scale for draw in draws) <= 1.25
    assert max(abs(value) for draw in draws for value in draw.stains) <= 0.1
    assert max(abs(value) for draw in draws for value in draw.colors) <= 0.2
    assert 60 <= sum(draw.blank_context for draw in draws) <= 140
