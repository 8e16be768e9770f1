"""Define RefineNet [1]_, the single-input baseline: one encoder, 3x3 convolutions throughout.

References
----------
.. [1] G. Lin, A. Milan, C. Shen, I. Reid: RefineNet: Multi-path refinement networks for high-resolution semantic
   segmentation. CVPR 2017.
"""

# B batch, C channels, H W pixels at the scale of the tensor, K classes

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from darefine_qupath.models.blocks import ChainedResidualPooling, conv, residual_conv_units, resize
from darefine_qupath.models.config import ModelConfig
from darefine_qupath.models.encoders import build_encoder
from darefine_qupath.models.network import ContextFeatures, SegmentationNetwork
from darefine_qupath.models.registry import register_network

__all__ = ["RefineNet"]


class RefineNet(SegmentationNetwork):
    """Four-cascaded RefineNet ([1]_, Fig. 2), 2 * width channels at 1/32 and width elsewhere.

    Parameters
    ----------
    config : ModelConfig
        ``slice_encoder``, ``width``, ``dropout`` and ``num_classes`` count.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        widths = (2 * config.width, config.width, config.width, config.width)
        self.slice_encoder = build_encoder(config.slice_encoder)
        channels = self.slice_encoder.channels[::-1]
        self.reductions = nn.ModuleList(conv(c, width, 3) for c, width in zip(channels, widths, strict=True))
        self.adapts = nn.ModuleList(residual_conv_units(width, 2) for width in widths)
        # Multi-resolution fusion: one convolution per path, then the sum. There is one path at 1/32.
        self.fuse_slices = nn.ModuleList(conv(width, width, 3) for width in widths[1:])
        self.fuse_outputs = nn.ModuleList(conv(width, config.width, 3) for width in widths[:-1])
        self.pools = nn.ModuleList(ChainedResidualPooling(width, kernel=3) for width in widths)
        self.outputs = nn.ModuleList(residual_conv_units(width, 3) for width in widths)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = conv(config.width, config.num_classes, 3, bias=True)

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The one encoder."""
        return {"slice": self.slice_encoder}

    def decode(
        self,
        slice_B3HW: Tensor,
        context: ContextFeatures,  # noqa: ARG002 (single input)
        index_B: Tensor | None = None,  # noqa: ARG002
        box_B4: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Label slices; the context is ignored."""
        quarter_BCHW, eighth_BCHW, sixteenth_BCHW, deepest_BCHW = self.slice_encoder(slice_B3HW)
        encoded_BCHW = (self.dropout(deepest_BCHW), self.dropout(sixteenth_BCHW), eighth_BCHW, quarter_BCHW)
        output_BCHW = deepest_BCHW
        for step, feature_BCHW in enumerate(encoded_BCHW):
            refined_BCHW = self.adapts[step](self.reductions[step](feature_BCHW))
            if step > 0:
                previous_BCHW = resize(self.fuse_outputs[step - 1](output_BCHW), refined_BCHW.shape[-2:])
                refined_BCHW = self.fuse_slices[step - 1](refined_BCHW) + previous_BCHW
            output_BCHW = self.outputs[step](self.pools[step](F.relu(refined_BCHW)))
        logits_BKHW = self.classifier(self.dropout(output_BCHW))
        return resize(logits_BKHW, slice_B3HW.shape[-2:])


register_network("refinenet", RefineNet, title="RefineNet")
