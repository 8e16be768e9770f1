from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from darefine_qupath.classes import IGNORE
from darefine_qupath.training import TrainConfig
from darefine_qupath.training.losses import SegmentationLoss, inverse_frequency

NLL = TrainConfig()
CE_DICE = TrainConfig(loss="ce-dice")


def make(seed: int, tiles: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tiles, 3, 6, 5, generator=generator)
    masks = torch.randint(0, 3, (tiles, 6, 5), generator=generator, dtype=torch.uint8)
    masks[torch.rand(masks.shape, generator=generator) < 0.3] = IGNORE
    return logits, masks


def whole(loss: SegmentationLoss, logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    return loss(logits, masks, loss.count_labels(masks))


def test_nll_is_torchs_cross_entropy() -> None:
    logits, masks = make(0)
    expected = F.cross_entropy(logits, masks.long(), ignore_index=IGNORE)
    assert whole(SegmentationLoss(NLL), logits, masks).item() == pytest.approx(expected.item(), rel=1e-6)


def test_weighted_nll_is_torchs_weighted_mean() -> None:
    (logits, masks), weights = make(1), torch.tensor([0.5, 1.0, 3.0])
    expected = F.cross_entropy(logits, masks.long(), ignore_index=IGNORE, weight=weights)
    assert whole(SegmentationLoss(NLL, weights), logits, masks).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("config", [NLL, CE_DICE], ids=["ce", "ce-dice"])
@given(seed=st.integers(0, 1000), cut=st.integers(1, 3))
@settings(deadline=None, derandomize=True, max_examples=25)
def test_parts_add_up_to_the_batch(config: TrainConfig, seed: int, cut: int) -> None:
    (logits, masks), loss = make(seed), SegmentationLoss(config, torch.tensor([0.5, 1.0, 2.0]))
    parts = [(logits[:cut], masks[:cut]), (logits[cut:], masks[cut:])]
    shared = sum(loss.count_labels(mask) for _, mask in parts)
    summed = sum(loss(part, mask, shared) for part, mask in parts)
    assert float(summed) == pytest.approx(float(whole(loss, logits, masks)), rel=1e-5)


def test_mean_over_the_batch_is_not_the_mean_of_the_parts() -> None:
    (logits, masks), loss = make(3, tiles=2), SegmentationLoss(NLL)
    logits[0] *= 3
    masks[0, 1:] = IGNORE
    means = [whole(loss, logits[row : row + 1], masks[row : row + 1]).item() for row in range(2)]
    assert abs(sum(means) / 2 - whole(loss, logits, masks).item()) > 0.01


@pytest.mark.parametrize("config", [NLL, CE_DICE], ids=["ce", "ce-dice"])
def test_batch_without_labels_has_no_loss_and_no_gradient(config: TrainConfig) -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    value = whole(SegmentationLoss(config), logits, torch.full((2, 4, 4), IGNORE, dtype=torch.uint8))
    value.backward()
    assert value.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_ignored_pixels_change_nothing() -> None:
    (logits, masks), loss = make(5), SegmentationLoss(CE_DICE)
    changed = logits + 9 * torch.randn_like(logits) * (masks == IGNORE)[:, None]
    assert whole(loss, changed, masks).item() == pytest.approx(whole(loss, logits, masks).item(), rel=1e-5)


def test_perfect_scores_have_no_loss_and_wrong_ones_a_full_dice_loss() -> None:
    masks = torch.tensor([[[0, 0, 1, 1]]], dtype=torch.uint8)
    right = 50 * F.one_hot(masks.long(), 2).permute(0, 3, 1, 2).float()
    loss = SegmentationLoss(CE_DICE)
    assert whole(loss, right, masks).item() == pytest.approx(0, abs=1e-6)
    # 2 * 0 overlap + 1 over 2 + 2 + 1 for both classes, and 50 for the cross-entropy.
    assert whole(loss, -right, masks).item() == pytest.approx(50 + 1 - 1 / 5, rel=1e-5)


def test_dice_weight_scales_the_dice_term() -> None:
    logits, masks = make(8)
    values = [
        whole(SegmentationLoss(TrainConfig(loss="ce-dice", dice_weight=weight)), logits, masks).item()
        for weight in (0.0, 1.0, 3.0)
    ]
    assert values[2] - values[0] == pytest.approx(3 * (values[1] - values[0]), rel=1e-4)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        ([10, 10, 10], [1, 1, 1]),
        ([30, 10], [0.5, 1.5]),
        ([30, 10, 0], [0.5, 1.5, 1]),
        ([10**9, 1, 10**9], [3e-9, 3, 3e-9]),
        ([10**9] * 20 + [1], [*[2.1e-8] * 20, 10]),
        ([0, 0], [1, 1]),
    ],
    ids=["equal", "three-to-one", "absent", "rare", "cut", "nothing"],
)
def test_inverse_frequency(pixels: list[int], expected: list[float]) -> None:
    assert inverse_frequency(pixels).tolist() == pytest.approx(expected, rel=1e-3)
