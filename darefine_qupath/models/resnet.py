"""Define and register the ResNet encoders [1]_, with the parameter names of torchvision and timm.

The classification layer is left out: an encoder gives features at 1/4, 1/8, 1/16 and 1/32. The stride of a bottleneck
lies in its 3x3 convolution, as in the weights that torchvision and timm distribute.

References
----------
.. [1] K. He, X. Zhang, S. Ren, J. Sun: Deep residual learning for image recognition. CVPR 2016.
"""

# B batch, C channels, H W pixels at the scale of the tensor

from __future__ import annotations

from functools import partial
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from darefine_qupath.models.network import Encoder
from darefine_qupath.models.registry import register_encoder

__all__ = ["RESNETS", "ResNet"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the identity."""

    expansion: ClassVar[int] = 1

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _shortcut(inputs, planes * self.expansion, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the block's output, smaller by its stride."""
        y_BCHW = self.relu(self.bn1(self.conv1(x_BCHW)))
        y_BCHW = self.bn2(self.conv2(y_BCHW))
        shortcut_BCHW = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        return self.relu(y_BCHW + shortcut_BCHW)  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution and the identity."""

    expansion: ClassVar[int] = 4

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = planes * self.expansion
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the block's output, smaller by its stride."""
        y_BCHW = self.relu(self.bn1(self.conv1(x_BCHW)))
        y_BCHW = self.relu(self.bn2(self.conv2(y_BCHW)))
        y_BCHW = self.bn3(self.conv3(y_BCHW))
        shortcut_BCHW = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        return self.relu(y_BCHW + shortcut_BCHW)  # type: ignore[no-any-return]


class _Layout(NamedTuple):
    block: type[BasicBlock] | type[Bottleneck]
    blocks: tuple[int, int, int, int]


RESNETS = {
    "resnet18": _Layout(BasicBlock, (2, 2, 2, 2)),
    "resnet34": _Layout(BasicBlock, (3, 4, 6, 3)),
    "resnet50": _Layout(Bottleneck, (3, 4, 6, 3)),
    "resnet101": _Layout(Bottleneck, (3, 4, 23, 3)),
    "resnet152": _Layout(Bottleneck, (3, 8, 36, 3)),
}
"""Block and number of blocks per stage (Table 1 of [1]_)."""


class ResNet(Encoder):
    """ResNet without its classification layer.

    Parameters
    ----------
    name : str
        A key of `RESNETS`.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        block, blocks = RESNETS[name]
        self.channels = tuple(planes * block.expansion for planes in (64, 128, 256, 512))
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _stage(block, 64, 64, blocks[0], 1)
        self.layer2 = _stage(block, self.channels[0], 128, blocks[1], 2)
        self.layer3 = _stage(block, self.channels[1], 256, blocks[2], 2)
        self.layer4 = _stage(block, self.channels[2], 512, blocks[3], 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as He et al. do for training from scratch."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image_B3HW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode an image ([1]_, Table 1).

        Parameters
        ----------
        image_B3HW : Tensor, shape (B, 3, H, W)
            Normalised pixels.

        Returns
        -------
        tuple of four Tensor
            Features at 1/4, 1/8, 1/16 and 1/32, sizes rounded up.
        """
        stem_BCHW = self.maxpool(self.relu(self.bn1(self.conv1(image_B3HW))))
        quarter_BCHW = self.layer1(stem_BCHW)
        eighth_BCHW = self.layer2(quarter_BCHW)
        sixteenth_BCHW = self.layer3(eighth_BCHW)
        deepest_BCHW = self.layer4(sixteenth_BCHW)
        return quarter_BCHW, eighth_BCHW, sixteenth_BCHW, deepest_BCHW


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _stage(
    block: type[BasicBlock] | type[Bottleneck], inputs: int, planes: int, count: int, stride: int
) -> nn.Sequential:
    later = (block(planes * block.expansion, planes, 1) for _ in range(count - 1))
    return nn.Sequential(block(inputs, planes, stride), *later)


for _name in RESNETS:
    register_encoder(_name, partial(ResNet, _name))
