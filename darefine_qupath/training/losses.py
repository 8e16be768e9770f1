"""Compute losses that add up over the parts of a batch.

A batch may be cut into parts, over time (accumulation) and over processes. The mean over its labelled pixels is not the
mean of the parts' means, so a loss is a sum over the part divided by what the *whole* batch holds: `count_labels`
counts a part, the loop adds the counts of all parts, and `forward` divides by them. The parts' losses then add up to
the loss of the batch, exactly.

Shapes: B tiles, K classes, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from darefine_qupath.classes import IGNORE
from darefine_qupath.training.config import TrainConfig

__all__ = ["SegmentationLoss", "inverse_frequency"]

_HEAVIEST = 10.0


class SegmentationLoss(nn.Module):
    """Cross-entropy per labelled pixel, with a soft Dice term per tile where the recipe asks for it.

    Parameters
    ----------
    config : TrainConfig
        `loss` and `dice_weight` count.
    class_weights_K : Tensor, optional
        Weight of each class in the cross-entropy; all 1 without it.
    """

    class_weights: Tensor | None

    def __init__(self, config: TrainConfig, class_weights_K: Tensor | None = None) -> None:
        super().__init__()
        self.dice_weight = config.dice_weight if config.loss == "ce-dice" else 0.0
        self.register_buffer("class_weights", class_weights_K, persistent=False)

    def count_labels(self, mask_BHW: Tensor) -> Tensor:
        """Count the labelled pixels and tiles of a part of a batch.

        Parameters
        ----------
        mask_BHW : Tensor
            Labels; `IGNORE` does not count.

        Returns
        -------
        Tensor of float64 (float32 where the device has no other), shape (2,)
            Labelled pixels, each with the weight of its class, and tiles with at least one labelled pixel. Add over
            the parts of a batch.
        """
        dtype = torch.float32 if mask_BHW.device.type == "mps" else torch.float64
        valid_BHW = mask_BHW != IGNORE
        weight_BHW = valid_BHW.to(dtype)
        if self.class_weights is not None:
            # No boolean indexing: a GPU would have to be waited for.
            weight_BHW = weight_BHW * self.class_weights[mask_BHW.long() * valid_BHW]
        return torch.stack([weight_BHW.sum(), valid_BHW.flatten(1).any(dim=1).sum().to(dtype)])

    def forward(self, logits_BKHW: Tensor, mask_BHW: Tensor, counts_2: Tensor) -> Tensor:
        """Compute the loss of a part of a batch.

        Parameters
        ----------
        logits_BKHW : Tensor
            Before softmax, of any floating type.
        mask_BHW : Tensor
            Labels of any integer type.
        counts_2 : Tensor
            What `count_labels` gives for the whole batch.

        Returns
        -------
        Tensor of float32, scalar
            0 where the batch has no labelled pixel.
        """
        logits_BKHW, labels_BHW = logits_BKHW.float(), mask_BHW.long()
        pixels, tiles = counts_2.float().clamp(min=1e-6)
        summed = F.cross_entropy(
            logits_BKHW, labels_BHW, weight=self.class_weights, ignore_index=IGNORE, reduction="sum"
        )  # Eq. 12 of the paper, on logits
        loss: Tensor = summed / pixels
        if self.dice_weight:
            loss = loss + self.dice_weight * _dice_loss(logits_BKHW, labels_BHW) / tiles
        return loss


def _dice_loss(logits_BKHW: Tensor, labels_BHW: Tensor) -> Tensor:
    """Sum over tiles 1 - soft Dice, averaged over the classes that a tile's mask holds."""
    valid_B1HW = (labels_BHW != IGNORE)[:, None]
    scores_BKHW = logits_BKHW.softmax(dim=1) * valid_B1HW
    classes_K = torch.arange(logits_BKHW.shape[1], device=labels_BHW.device)
    target_BKHW = labels_BHW[:, None] == classes_K[:, None, None]
    target_BK = target_BKHW.sum(dim=(2, 3)).float()
    overlap_BK = (scores_BKHW * target_BKHW).sum(dim=(2, 3))
    dice_BK = (2 * overlap_BK + 1) / (scores_BKHW.sum(dim=(2, 3)) + target_BK + 1)
    present_BK = (target_BK > 0).float()
    present_B = present_BK.sum(dim=1)
    loss_B: Tensor = ((1 - dice_BK) * present_BK).sum(dim=1) / present_B.clamp(min=1)
    return loss_B.sum()


def inverse_frequency(pixels: Sequence[float]) -> Tensor:
    """Weight each class by one over its share of the labelled pixels.

    Parameters
    ----------
    pixels : sequence of float
        Labelled pixels per class, or their shares, among those that training shows: what `balance` makes common already
        must not weigh once more.

    Returns
    -------
    Tensor of float32, shape (K,)
        Mean 1 over the classes that occur before weights above 10 are cut to 10; 1 for a class that does not occur.
    """
    counts_K = torch.tensor(list(pixels), dtype=torch.float64)
    occurs_K = counts_K > 0
    inverse_K = torch.where(occurs_K, counts_K.sum() / counts_K, torch.zeros_like(counts_K))
    mean = inverse_K.sum() / occurs_K.sum().clamp(min=1)
    weights_K = torch.where(occurs_K, inverse_K / mean.clamp(min=1e-12), torch.ones_like(counts_K))
    return weights_K.clamp(max=_HEAVIEST).float()
