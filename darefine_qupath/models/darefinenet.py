"""DA-RefineNet [1]_: two encoders, one for a fine slice and one for its coarse context, in one RefineNet decoder.

Decoded from coarse to fine. At each scale the slice's feature, the previous output and the context's feature are
refined, joined (Fig. 4) and pooled; the scales follow one another at 1/32, 1/16, 1/8 and 1/4 of the input.

References
----------
.. [1] Z. Li, R. Tao, Q. Wu, B. Li: DA-RefineNet: Dual-inputs attention RefineNet for whole slide image segmentation.
   ICPR 2020, arXiv 1907.06358.
"""

# B batch, C channels, H W pixels at the scale of the tensor, h w the same of a context, K classes, N contexts

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from darefine_qupath.models.blocks import ChainedResidualPooling, conv, residual_conv_units, resize
from darefine_qupath.models.config import ModelConfig, Normalization
from darefine_qupath.models.encoders import build_encoder
from darefine_qupath.models.network import ContextFeatures, SegmentationNetwork

__all__ = ["DARefineNet"]


def slice_path(inputs: int, width: int) -> nn.Sequential:
    """Refine a slice's feature at 1/16, 1/8 or 1/4: 1x1 reduction, two RCUs, 1x1 convolution."""
    return nn.Sequential(conv(inputs, width), residual_conv_units(width, 2), conv(width, width))


def rectified_path(inputs: int, width: int) -> nn.Sequential:
    """Refine a context's feature, or a slice's at 1/32: 1x1 reduction, two RCUs, ReLU."""
    return nn.Sequential(conv(inputs, width), residual_conv_units(width, 2), nn.ReLU())


def pool(x_BCHW: Tensor) -> Tensor:
    """Global average pooling (GAP), shape (B, C, 1, 1)."""
    return x_BCHW.mean((2, 3), keepdim=True)


class ConcatJoin(nn.Module):
    """Concatenation, 1x1 convolution and ReLU (Fig. 4, concatenation; at 1/32 also in attention)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv = conv(inputs, width)

    def forward(self, *features_BCHW: Tensor) -> Tensor:
        """Join features of one size."""
        return F.relu(self.conv(torch.cat(features_BCHW, 1)))


class AddJoin(nn.Module):
    """Sum (Fig. 4, add)."""

    def forward(self, first_BCHW: Tensor, *others_BCHW: Tensor) -> Tensor:
        """Join features of one size."""
        for other_BCHW in others_BCHW:
            first_BCHW = first_BCHW + other_BCHW
        return first_BCHW


class AttentionJoin(nn.Module):
    """Channel attention ([1]_, Eq. 6-8, Fig. 3 bottom): what was seen so far decides which slice channels count."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.squeeze = conv(inputs, width)
        self.excite = conv(width, width)

    def forward(self, slice_BCHW: Tensor, previous_BCHW: Tensor, *pooled_context_BC11: Tensor) -> Tensor:
        """Weight the slice's channels and add the previous output."""
        fusion_BC11 = torch.cat([pool(slice_BCHW), pool(previous_BCHW), *pooled_context_BC11], 1)  # Eq. 6
        weights_BC11 = torch.sigmoid(self.excite(F.relu(self.squeeze(fusion_BC11))))  # Eq. 7
        return weights_BC11 * slice_BCHW + previous_BCHW  # Eq. 8


class AlignedJoin(nn.Module):
    """Channel attention, plus the context's own view of the place where the slice lies (not in the paper)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.attention = AttentionJoin(inputs, width)
        self.conv = conv(width, width)

    def forward(
        self, slice_BCHW: Tensor, previous_BCHW: Tensor, pooled_context_BC11: Tensor, aligned_BCHW: Tensor
    ) -> Tensor:
        """Join the slice, the previous output, the pooled context and the context at the slice's place."""
        attended_BCHW: Tensor = self.attention(slice_BCHW, previous_BCHW, pooled_context_BC11)
        return attended_BCHW + self.conv(aligned_BCHW)  # type: ignore[no-any-return]


class DARefineNet(SegmentationNetwork):
    """DA-RefineNet and its ablations.

    Parameters
    ----------
    config : ModelConfig
        ``fusion`` and ``input`` choose the variant.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.normalization = Normalization()
        widths = (2 * config.width, config.width, config.width, config.width)
        self.slice_encoder = build_encoder(config.slice_encoder)
        slice_channels = self.slice_encoder.channels[::-1]
        self.slice_paths = nn.ModuleList(
            path(channels, width)
            for path, channels, width in zip(
                (rectified_path, slice_path, slice_path, slice_path), slice_channels, widths, strict=True
            )
        )
        self.has_context = config.input != "single"
        if self.has_context:
            self.context_encoder = build_encoder(config.context_encoder)
            context_channels = self.context_encoder.channels[::-1]
            self.context_paths = nn.ModuleList(
                rectified_path(channels, width) for channels, width in zip(context_channels, widths, strict=True)
            )
        self.joins = nn.ModuleList(self._join(step, width) for step, width in enumerate(widths))
        self.refines = nn.ModuleList(
            nn.Sequential(ChainedResidualPooling(width), residual_conv_units(width, 3)) for width in widths
        )
        self.narrows = nn.ModuleList(conv(width, config.width) for width in widths[:-1])
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = conv(config.width, config.num_classes, 3, bias=True)

    def expect(self, normalization: Normalization) -> None:
        """Take note of how pixels come; see the base class."""
        self.normalization = normalization

    def _join(self, step: int, width: int) -> nn.Module:
        fusion = self.config.fusion
        num_inputs = (1 if step == 0 else 2) + int(self.has_context)
        if num_inputs == 1:
            return nn.Identity()
        if fusion == "add":
            return AddJoin()
        if step == 0:
            return ConcatJoin((num_inputs + int(self._is_aligned)) * width, width)
        if fusion == "concat":
            return ConcatJoin(num_inputs * width, width)
        if self._is_aligned:
            return AlignedJoin(num_inputs * width, width)
        return AttentionJoin(num_inputs * width, width)

    @property
    def _is_aligned(self) -> bool:
        return self.config.fusion == "aligned" and self.has_context

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The encoders by role."""
        found: dict[str, nn.Module] = {"slice": self.slice_encoder}
        if self.has_context:
            found["context"] = self.context_encoder
        return found

    def encode_context(self, context_N3HW: Tensor) -> ContextFeatures:
        """Do everything for a context that does not depend on a slice; see the base class."""
        return self._encode(context_N3HW) if self.config.uses_context else ContextFeatures()

    def _encode(self, context_N3HW: Tensor) -> ContextFeatures:
        encoded_NCHW = self._drop_deepest(self.context_encoder(context_N3HW))  # Eq. 4
        features_NCHW = tuple(path(feature) for path, feature in zip(self.context_paths, encoded_NCHW, strict=True))
        if self.config.fusion in ("add", "concat"):
            return ContextFeatures(maps=features_NCHW)
        pooled_NC11 = tuple(pool(feature_NCHW) for feature_NCHW in features_NCHW[1:])
        return ContextFeatures(maps=features_NCHW if self._is_aligned else features_NCHW[:1], pooled=pooled_NC11)

    def _drop_deepest(self, encoded: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Apply dropout to the two deepest features, and put the coarsest first."""
        quarter_BCHW, eighth_BCHW, sixteenth_BCHW, deepest_BCHW = encoded
        return self.dropout(deepest_BCHW), self.dropout(sixteenth_BCHW), eighth_BCHW, quarter_BCHW

    def decode(
        self,
        slice_B3HW: Tensor,
        context: ContextFeatures,
        index_B: Tensor | None = None,
        box_B4: Tensor | None = None,
    ) -> Tensor:
        """Label slices whose contexts are encoded already; see the base class."""
        if self.config.input == "multisize":  # one "context" per slice, whatever was given
            half_B3HW = self.normalization.slice_to_context(F.avg_pool2d(slice_B3HW, 2, ceil_mode=True))
            context, index_B, box_B4 = self._encode(half_B3HW), None, None
        context = context.of_slices(slice_B3HW.shape[0], index_B)
        encoded_BCHW = self._drop_deepest(self.slice_encoder(slice_B3HW))  # Eq. 4
        slices_BCHW = [path(feature) for path, feature in zip(self.slice_paths, encoded_BCHW, strict=True)]
        output_BCHW = slices_BCHW[0]
        for step, slice_BCHW in enumerate(slices_BCHW):  # Eq. 5
            size = slice_BCHW.shape[-2:]
            previous_BCHW = () if step == 0 else (resize(output_BCHW, size),)
            joined_BCHW = self.joins[step](slice_BCHW, *previous_BCHW, *self._context_at(step, context, size, box_B4))
            output_BCHW = self.refines[step](joined_BCHW)
            if step < len(self.narrows):
                output_BCHW = self.narrows[step](output_BCHW)
        logits_BKHW = self.classifier(self.dropout(output_BCHW))
        return resize(logits_BKHW, slice_B3HW.shape[-2:])

    def _context_at(
        self, step: int, context: ContextFeatures, size: torch.Size, box_B4: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return what the join of a scale takes from the context, brought to the slice's size."""
        if not self.has_context:
            return ()
        if step > 0 and self.config.fusion == "attention":
            return (context.pooled[step - 1],)
        if not self._is_aligned:
            return (resize(context.maps[step], size),)
        whole_BCHW = resize(context.maps[0], size) if step == 0 else context.pooled[step - 1]
        return whole_BCHW, crop(context.maps[step], box_B4, size)


def crop(context_BChw: Tensor, box_B4: Tensor | None, size: torch.Size) -> Tensor:
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
