"""Define U-Net [1]_, a single-input baseline, with padded convolutions and batch normalization.

References
----------
.. [1] O. Ronneberger, P. Fischer, T. Brox: U-Net: Convolutional networks for biomedical image segmentation.
   MICCAI 2015.
"""

# B batch, C channels, H W pixels at the scale of the tensor, K classes

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from darefine_qupath.models.blocks import resize
from darefine_qupath.models.config import ModelConfig
from darefine_qupath.models.network import ContextFeatures, SegmentationNetwork
from darefine_qupath.models.registry import register_network

__all__ = ["UNet"]

_DEPTH = 5


class UNet(SegmentationNetwork):
    """U-Net ([1]_, Fig. 1): 64 to 1024 channels at width 256, in proportion at others.

    Parameters
    ----------
    config : ModelConfig
        ``width``, ``dropout`` (before the classifier) and ``num_classes`` count.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        channels = [config.width // 4 * 2**depth for depth in range(_DEPTH)]
        self.downs = nn.ModuleList(
            double_conv(inputs, outputs) for inputs, outputs in zip([3, *channels[:-1]], channels, strict=True)
        )
        coarse_to_fine = channels[::-1]
        pairs = list(itertools.pairwise(coarse_to_fine))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(coarse, fine, 2, 2) for coarse, fine in pairs)
        self.fusions = nn.ModuleList(double_conv(2 * fine, fine) for _, fine in pairs)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Conv2d(channels[0], config.num_classes, 1)

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """None: the descending half has weights of no other network."""
        return {}

    def decode(
        self,
        slice_B3HW: Tensor,
        context: ContextFeatures,  # noqa: ARG002 (single input)
        index_B: Tensor | None = None,  # noqa: ARG002
        box_B4: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Label slices; the context is ignored."""
        x_BCHW = self.downs[0](slice_B3HW)
        skips_BCHW = []
        for down in self.downs[1:]:
            skips_BCHW.append(x_BCHW)
            x_BCHW = down(F.max_pool2d(x_BCHW, 2, ceil_mode=True))
        for up, fusion, skip_BCHW in zip(self.ups, self.fusions, reversed(skips_BCHW), strict=True):
            # A size that 2 does not divide comes back one pixel too large.
            up_BCHW = up(x_BCHW)[..., : skip_BCHW.shape[-2], : skip_BCHW.shape[-1]]
            x_BCHW = fusion(torch.cat([skip_BCHW, up_BCHW], 1))
        return resize(self.classifier(self.dropout(x_BCHW)), slice_B3HW.shape[-2:])


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with batch normalisation and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


register_network("unet", UNet, title="U-Net", encoders=())
