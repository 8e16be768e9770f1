"""Building blocks of the RefineNet family ([1]_, Fig. 2): what a decoder does to a feature besides joining it.

References
----------
.. [1] G. Lin, A. Milan, C. Shen, I. Reid: RefineNet: Multi-path refinement networks for high-resolution semantic
   segmentation. CVPR 2017.
"""

# B batch, C channels, H W pixels at the scale of the tensor

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

__all__ = ["ChainedResidualPooling", "ResidualConvUnit", "conv", "max_pool_5x5", "residual_conv_units", "resize"]


def conv(inputs: int, outputs: int, kernel: int = 1, *, bias: bool = False) -> nn.Conv2d:
    """Convolution that keeps the size."""
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
        return self.conv2(F.relu(y_BCHW)) + x_BCHW  # type: ignore[no-any-return]


def residual_conv_units(channels: int, count: int) -> nn.Sequential:
    """`count` RCUs, one after the other."""
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
    copies give the same bits about ten times faster.
    """
    if x_BCHW.requires_grad or x_BCHW.device.type != "cpu" or torch.compiler.is_compiling():
        return F.max_pool2d(x_BCHW, 5, stride=1, padding=2)
    return _max_of_five(_max_of_five(x_BCHW, 2), 3)


def _max_of_five(x_BCHW: Tensor, dim: int) -> Tensor:
    """Maximum over every five neighbours along rows (2) or columns (3)."""
    size = x_BCHW.shape[dim]
    padded = F.pad(x_BCHW, (2, 2, 0, 0) if dim == 3 else (0, 0, 2, 2), value=float("-inf"))
    of_two = torch.maximum(padded.narrow(dim, 0, size + 3), padded.narrow(dim, 1, size + 3))
    of_four = torch.maximum(of_two.narrow(dim, 0, size + 1), of_two.narrow(dim, 2, size + 1))
    return torch.maximum(of_four.narrow(dim, 0, size), padded.narrow(dim, 4, size))


def resize(x_BCHW: Tensor, size: Sequence[int]) -> Tensor:
    """Resize to (height, width), bilinear with aligned corners; a feature of that size is passed on."""
    if tuple(x_BCHW.shape[-2:]) == tuple(size):
        return x_BCHW
    return F.interpolate(x_BCHW, size=tuple(size), mode="bilinear", align_corners=True)
