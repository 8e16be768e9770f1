"""Fuse slice, context and previous output at one scale: addition, concatenation, attention (Eq. 7 of [1]_).

References
----------
.. [1] Z. Li, R. Tao, Q. Wu, B. Li: DA-RefineNet: Dual-inputs attention RefineNet for whole slide image segmentation.
   ICPR 2020, arXiv 1907.06358.
"""

# B batch, C channels, H W pixels at the scale of the tensor, h w the same of a context

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from darefine_qupath.models.blocks import conv
from darefine_qupath.models.registry import FusionStage, register_fusion

__all__ = ["AddFusion", "AlignedFusion", "AttentionFusion", "ConcatFusion", "crop_context", "global_average_pool"]


def global_average_pool(x_BCHW: Tensor) -> Tensor:
    """Average each channel (GAP), shape (B, C, 1, 1)."""
    return x_BCHW.mean((2, 3), keepdim=True)


class AddFusion(nn.Module):
    """Sum ([1]_, Fig. 4, add)."""

    def __init__(self, _inputs: int, _width: int) -> None:
        super().__init__()

    def forward(self, first_BCHW: Tensor, *others_BCHW: Tensor) -> Tensor:
        """Fuse features of one shape."""
        for other_BCHW in others_BCHW:
            first_BCHW = first_BCHW + other_BCHW
        return first_BCHW


class ConcatFusion(nn.Module):
    """Concatenation, 1x1 convolution and ReLU ([1]_, Fig. 4, concatenation)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv = conv(inputs, width)

    def forward(self, *features_BCHW: Tensor) -> Tensor:
        """Fuse features of one size."""
        return F.relu(self.conv(torch.cat(features_BCHW, 1)))


class AttentionFusion(nn.Module):
    """Channel attention ([1]_, Eq. 6-8, Fig. 3 bottom): all that was seen decides which slice channels count."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.squeeze = conv(inputs, width)
        self.excite = conv(width, width)

    def forward(self, slice_BCHW: Tensor, previous_BCHW: Tensor, *pooled_context_BC11: Tensor) -> Tensor:
        """Weight the slice's channels and add the previous output."""
        pooled_BC11 = (global_average_pool(slice_BCHW), global_average_pool(previous_BCHW), *pooled_context_BC11)
        fusion_BC11 = torch.cat(pooled_BC11, 1)  # Eq. 6
        weights_BC11 = torch.sigmoid(self.excite(F.relu(self.squeeze(fusion_BC11))))  # Eq. 7
        return weights_BC11 * slice_BCHW + previous_BCHW  # Eq. 8


class AlignedFusion(nn.Module):
    """Channel attention, plus the context's own view of the place where the slice lies (not in the paper)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.attention = AttentionFusion(inputs - width, width)
        self.conv = conv(width, width)

    def forward(
        self, slice_BCHW: Tensor, previous_BCHW: Tensor, pooled_context_BC11: Tensor, aligned_BCHW: Tensor
    ) -> Tensor:
        """Fuse the slice, the previous output, the pooled context and the context at the slice's place."""
        attended_BCHW: Tensor = self.attention(slice_BCHW, previous_BCHW, pooled_context_BC11)
        return attended_BCHW + self.conv(aligned_BCHW)  # type: ignore[no-any-return]


def crop_context(context_BChw: Tensor, box_B4: Tensor | None, size: torch.Size) -> Tensor:
    """Cut the place of each slice out of its context, bilinear.

    Parameters
    ----------
    context_BChw : Tensor, shape (B, C, h, w)
        Features of the contexts.
    box_B4 : Tensor, shape (B, 4), optional
        Left, top, right and bottom of each slice as fractions of the context's size; the whole context without it.
        Beyond the context its border is repeated.
    size : torch.Size
        Height and width of the result.

    Returns
    -------
    Tensor, shape (B, C, H, W)
        Features of the slice's place.
    """
    height, width = size
    batch, device = context_BChw.shape[0], context_BChw.device
    if box_B4 is None:
        box_B4 = torch.tensor([0.0, 0.0, 1.0, 1.0], device=device).expand(batch, 4)
    # Places in float32 whatever the features are: in bfloat16 they would be off by whole cells.
    left_B1, top_B1, right_B1, bottom_B1 = torch.split(box_B4.to(device, torch.float32), 1, dim=1)
    across_W = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
    down_H = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
    x_BW = left_B1 + (right_B1 - left_B1) * across_W
    y_BH = top_B1 + (bottom_B1 - top_B1) * down_H
    grid_BHW2 = torch.stack(
        [x_BW[:, None, :].expand(batch, height, width), y_BH[:, :, None].expand(batch, height, width)], -1
    )
    cropped_BCHW = F.grid_sample(context_BChw.float(), 2 * grid_BHW2 - 1, padding_mode="border", align_corners=False)
    return cropped_BCHW.to(context_BChw.dtype)


# At 1/32 there is no previous output for attention to add to: the paper's network concatenates there.
register_fusion(
    "attention", coarsest=FusionStage(ConcatFusion, ("map",)), finer=FusionStage(AttentionFusion, ("pooled",))
)
register_fusion("add", coarsest=FusionStage(AddFusion, ("map",)), finer=FusionStage(AddFusion, ("map",)))
register_fusion("concat", coarsest=FusionStage(ConcatFusion, ("map",)), finer=FusionStage(ConcatFusion, ("map",)))
register_fusion(
    "aligned",
    coarsest=FusionStage(ConcatFusion, ("map", "crop")),
    finer=FusionStage(AlignedFusion, ("pooled", "crop")),
    without_context="attention",
)
