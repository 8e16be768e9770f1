"""Define DA-RefineNet [1]_: an encoder for a fine slice, one for its coarse context, and one RefineNet decoder.

Decoded from coarse to fine. At each scale the slice's feature, the previous output and the context's feature are
refined, fused (Fig. 4) and pooled; the scales follow one another at 1/32, 1/16, 1/8 and 1/4 of the input.

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
from darefine_qupath.models.fusion import crop_context, global_average_pool
from darefine_qupath.models.network import ContextFeatures, SegmentationNetwork
from darefine_qupath.models.registry import FUSIONS, FusionEntry, register_network

__all__ = ["DARefineNet"]


def slice_path(inputs: int, width: int) -> nn.Sequential:
    """Refine a slice's feature at 1/16, 1/8 or 1/4: 1x1 reduction, two RCUs, 1x1 convolution."""
    return nn.Sequential(conv(inputs, width), residual_conv_units(width, 2), conv(width, width))


def context_path(inputs: int, width: int) -> nn.Sequential:
    """Refine a context's feature, or a slice's at 1/32: 1x1 reduction, two RCUs, ReLU."""
    return nn.Sequential(conv(inputs, width), residual_conv_units(width, 2), nn.ReLU())


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
                (context_path, slice_path, slice_path, slice_path), slice_channels, widths, strict=True
            )
        )
        self.has_context = config.input != "single"
        if self.has_context:
            self.context_encoder = build_encoder(config.context_encoder)
            context_channels = self.context_encoder.channels[::-1]
            self.context_paths = nn.ModuleList(
                context_path(channels, width) for channels, width in zip(context_channels, widths, strict=True)
            )
        self.fusion = self._choose_fusion(config)
        self.fusions = nn.ModuleList(self._build_fusion(step, width) for step, width in enumerate(widths))
        self.refinements = nn.ModuleList(
            nn.Sequential(ChainedResidualPooling(width), residual_conv_units(width, 3)) for width in widths
        )
        self.projections = nn.ModuleList(conv(width, config.width) for width in widths[:-1])
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = conv(config.width, config.num_classes, 3, bias=True)

    def expect(self, normalization: Normalization) -> None:
        """Note the normalization of the pixels; see the base class."""
        self.normalization = normalization

    def _choose_fusion(self, config: ModelConfig) -> FusionEntry:
        fusion = FUSIONS[config.fusion]
        return fusion if self.has_context or fusion.without_context is None else fusion.without_context

    def _build_fusion(self, step: int, width: int) -> nn.Module:
        stage = self.fusion.stage(step)
        num_inputs = (1 if step == 0 else 2) + (len(stage.context) if self.has_context else 0)
        return nn.Identity() if num_inputs == 1 else stage.build(num_inputs * width, width)

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
        encoded_NCHW = self._drop_deepest(self.context_encoder(context_N3HW))  # Eq. 4, h_F
        maps_NCHW, pooled_NC11 = [], []
        for step, (path, feature_NCHW) in enumerate(zip(self.context_paths, encoded_NCHW, strict=True)):
            refined_NCHW = path(feature_NCHW)
            stage = self.fusion.stage(step)
            if stage.needs_map:
                maps_NCHW.append(refined_NCHW)
            if "pooled" in stage.context:
                pooled_NC11.append(global_average_pool(refined_NCHW))
        return ContextFeatures(maps=tuple(maps_NCHW), pooled=tuple(pooled_NC11))

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
        encoded_BCHW = self._drop_deepest(self.slice_encoder(slice_B3HW))  # Eq. 4, h_S
        slices_BCHW = [path(feature) for path, feature in zip(self.slice_paths, encoded_BCHW, strict=True)]
        output_BCHW = slices_BCHW[0]
        for step, slice_BCHW in enumerate(slices_BCHW):  # Eq. 5
            size = slice_BCHW.shape[-2:]
            previous_BCHW = () if step == 0 else (resize(output_BCHW, size),)
            context_BCHW = self._views(step, context, size, box_B4) if self.has_context else ()
            fused_BCHW = self.fusions[step](slice_BCHW, *previous_BCHW, *context_BCHW)
            output_BCHW = self.refinements[step](fused_BCHW)
            if step < len(self.projections):
                output_BCHW = self.projections[step](output_BCHW)
        logits_BKHW = self.classifier(self.dropout(output_BCHW))
        return resize(logits_BKHW, slice_B3HW.shape[-2:])

    def _views(
        self, step: int, context: ContextFeatures, size: torch.Size, box_B4: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return what the fusion of a scale takes from the context, brought to the slice's size."""
        stages = [self.fusion.stage(at) for at in range(step + 1)]
        index_of_map = sum(stage.needs_map for stage in stages[:-1])
        index_of_pooled = sum("pooled" in stage.context for stage in stages[:-1])
        found = []
        for view in stages[-1].context:
            if view == "map":
                found.append(resize(context.maps[index_of_map], size))
            elif view == "crop":
                found.append(crop_context(context.maps[index_of_map], box_B4, size))
            else:
                found.append(context.pooled[index_of_pooled])
        return tuple(found)


register_network("da-refinenet", DARefineNet, title="DA-RefineNet", encoders=("slice", "context"), fuses_context=True)
