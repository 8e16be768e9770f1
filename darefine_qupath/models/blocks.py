"""Build the decoder blocks of the RefineNet family ([1]_, Fig. 2): residual units, chained pooling, resizing.

References
----------
.. [1] G. Lin, A. Milan, C. Shen, I. Reid: RefineNet: Multi-path refinement networks for high-resolution semantic
   segmentation. CVPR 2017.
"""

# B batch, C channels, H W pixels at the scale of the tensor

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

__all__ = ["ChainedResidualPooling", "ResidualConvUnit", "conv", "max_pool_5x5", "residual_conv_units", "resize"]

_POOLED_ROWS = 32
"""Rows that are pooled at once on a processor: of a paper-sized feature, about 2 MB."""


def conv(inputs: int, outputs: int, kernel: int = 1, *, bias: bool = False) -> nn.Conv2d:
    """Build a convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)


class ResidualConvUnit(nn.Module):
    """RCU: ReLU, 3x3 convolution with bias, ReLU, 3x3 convolution, and the identity; no batch normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv(channels, channels, 3, bias=True)
        self.conv2 = conv(channels, channels, 3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return a feature of the same shape."""
        y_BCHW = self.conv1(F.relu(x_BCHW))
        y_BCHW = self.conv2(F.relu(y_BCHW, inplace=True))
        y_BCHW += x_BCHW
        return y_BCHW  # type: ignore[no-any-return]


def residual_conv_units(channels: int, count: int) -> nn.Sequential:
    """Build `count` RCUs, one after the other."""
    return nn.Sequential(*(ResidualConvUnit(channels) for _ in range(count)))


class ChainedResidualPooling(nn.Module):
    """CRP: stages of 5x5 max-pooling and convolution, each added to the running sum."""

    def __init__(self, channels: int, kernel: int = 1, stages: int = 4) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv(channels, channels, kernel) for _ in range(stages))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return a feature of the same shape that has seen a larger region."""
        sum_BCHW = top_BCHW = x_BCHW
        for stage in self.convs:
            top_BCHW = stage(max_pool_5x5(top_BCHW))
            sum_BCHW = sum_BCHW + top_BCHW
        return sum_BCHW


def max_pool_5x5(x_BCHW: Tensor) -> Tensor:
    """5x5 max-pooling with stride 1.

    torch's own kernel takes a third of a paper-sized forward on a CPU. Where no gradient is needed, maxima of shifted
    views give the same bits several times faster, some rows at a time so that they stay in the processor's cache.
    """
    height, width = x_BCHW.shape[-2:]
    has_own_kernel = x_BCHW.device.type != "cpu" or torch.compiler.is_compiling()
    if x_BCHW.requires_grad or has_own_kernel or min(height, width) < 5:
        return F.max_pool2d(x_BCHW, 5, stride=1, padding=2)
    pooled_BCHW = torch.empty_like(x_BCHW)
    parts = -(-height // _POOLED_ROWS)
    edges = [height * part // parts for part in range(parts + 1)]
    for image_1CHW, target_1CHW in zip(torch.split(x_BCHW, 1), torch.split(pooled_BCHW, 1), strict=True):
        for top, bottom in itertools.pairwise(edges):
            first = max(0, top - 2)
            seen_1ChW = image_1CHW[:, :, first : bottom + 2]
            columns_1ChW = _max_of_five(seen_1ChW, 2, torch.empty_like(seen_1ChW))[:, :, top - first : bottom - first]
            _max_of_five(columns_1ChW, 3, target_1CHW[:, :, top:bottom])
    return pooled_BCHW


def _max_of_five(x_BCHW: Tensor, dim: int, result_BCHW: Tensor) -> Tensor:
    """Write the maximum over every five neighbours along rows (2) or columns (3), of which there are at least five."""
    x, result = x_BCHW.movedim(dim, 0), result_BCHW.movedim(dim, 0)
    of_two = torch.maximum(x[:-1], x[1:])
    of_four = torch.maximum(of_two[:-2], of_two[2:])
    torch.maximum(of_four[:-1], x[4:], out=result[2:-2])
    result[1], result[-2] = of_four[0], of_four[-1]
    torch.maximum(of_two[0], x[2], out=result[0])
    torch.maximum(of_two[-1], x[-3], out=result[-1])
    return result_BCHW


def resize(x_BCHW: Tensor, size: Sequence[int]) -> Tensor:
    """Resize to (height, width), bilinear with aligned corners; a feature of that size is passed on."""
    if tuple(x_BCHW.shape[-2:]) == tuple(size):
        return x_BCHW
    return F.interpolate(x_BCHW, size=tuple(size), mode="bilinear", align_corners=True)
