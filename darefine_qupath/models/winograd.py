"""3x3 convolutions with half the multiplications, for prediction on processors (Winograd's F(4, 3) along rows, [1]_).

Four neighbouring outputs of a row need six products per kernel row instead of twelve. In return the input is
transformed before and the output after, and rounding errors grow: measured on random features, twofold in float32 (to
1.3e-6 of the features' spread) and threefold in bfloat16 (to 1e-2).

References
----------
.. [1] A. Lavin, S. Gray: Fast algorithms for convolutional neural networks. CVPR 2016, arXiv 1509.09308, Section 4.3.
"""

# B batch, C channels, H W pixels, T tiles of four outputs along a row

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

__all__ = ["WinogradConv2d", "use_winograd"]

_TILE = 4
_FEWEST_CHANNELS = 128
_NARROWEST = 48
"""Below either, what is saved is less than what the transforms cost (measured on two cores with AVX-512)."""

# Of a row of the kernel ([1]_, Section 4.3, G); the input's and the output's transform are written out below.
_KERNEL_TRANSFORM = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


class WinogradConv2d(nn.Module):
    """A 3x3 convolution that keeps the size, computed by Winograd's algorithm where that is faster.

    Parameters
    ----------
    direct : nn.Conv2d
        The convolution: 3x3 with stride 1, padding 1, no dilation and one group. It is kept for narrow features.
    """

    def __init__(self, direct: nn.Conv2d) -> None:
        super().__init__()
        if not _is_suitable(direct):
            raise ValueError(f"Only a 3x3 convolution with stride 1 and padding 1 is computed so, not {direct}")
        self.direct = direct
        weight = direct.weight.detach()
        transform = torch.tensor(_KERNEL_TRANSFORM, dtype=torch.float64, device=weight.device)
        kernels = torch.einsum("jx,kcyx->jkcy", transform, weight.double())[..., None].to(weight.dtype)
        for number, kernel in enumerate(kernels):
            # Channels last, without which torch would reorder it for longer than is saved.
            kernel = kernel.contiguous(memory_format=torch.channels_last)
            self.register_buffer(f"kernel{number}", kernel, persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the convolved features, channels last."""
        if x_BCHW.shape[-1] < _NARROWEST:
            result_BCHW: Tensor = self.direct(x_BCHW)
            return result_BCHW
        x_BHWC = x_BCHW.permute(0, 2, 3, 1)
        batch, height, width, channels = x_BHWC.shape
        kernel = self.direct.weight
        tiles = -(-width // _TILE)
        # What stays zero is the padding: left of the first column, and right of the last.
        phases_4HTC = kernel.new_zeros(_TILE, height, tiles + 1, channels)
        result_BHWC = kernel.new_empty(batch, height, width, kernel.shape[0])
        # One image after the other: what belongs to one of them stays in the cache.
        for image_HWC, target_HWC in zip(x_BHWC, result_BHWC, strict=True):
            for phase, phase_HTC in enumerate(phases_4HTC):
                first = 1 if phase == 0 else 0
                columns_HTC = image_HWC[:, (phase - 1) % _TILE :: _TILE]
                phase_HTC[:, first : first + columns_HTC.shape[1]] = columns_HTC
            self._transform_back(self._multiply(self._transform(phases_4HTC)), target_HWC)
        return result_BHWC.permute(0, 3, 1, 2)

    @staticmethod
    def _transform(phases_4HTC: Tensor) -> list[Tensor]:
        """Multiply by B: from the six columns that a tile sees, `d0` to `d5`, to six factors."""
        d0, d1, d2, d3 = phases_4HTC[:, :, :-1]
        d4, d5 = phases_4HTC[:2, :, 1:]
        even, odd = torch.sub(d4, d2, alpha=4), torch.sub(d3, d1, alpha=4)
        even2, odd2 = d4 - d2, (d3 - d1).mul_(2)
        return [
            torch.add(even2, d0 - d2, alpha=4),
            even + odd,
            even - odd,
            even2 + odd2,
            even2 - odd2,
            torch.add(d5 - d3, d1 - d3, alpha=4),
        ]

    def _multiply(self, factors_HTC: list[Tensor]) -> list[Tensor]:
        """Multiply by the kernels, and sum over channels and rows."""
        products_HTC = []
        for number, factor_HTC in enumerate(factors_HTC):
            # The second product is part of each output once, and so is the bias.
            bias = self.direct.bias if number == 1 else None
            factor_1CHT = factor_HTC.permute(2, 0, 1)[None]
            product_1CHT = F.conv2d(factor_1CHT, getattr(self, f"kernel{number}"), bias, padding=(1, 0))
            products_HTC.append(product_1CHT[0].permute(1, 2, 0))
        return products_HTC

    @staticmethod
    def _transform_back(products_HTC: list[Tensor], target_HWC: Tensor) -> None:
        """Multiply by A: from six products to the four outputs of each tile."""
        m0, m1, m2, m3, m4, m5 = products_HTC
        sum12, difference12, sum34, difference34 = m1 + m2, m1 - m2, m3 + m4, m3 - m4
        outputs = [target_HWC[:, phase::_TILE] for phase in range(_TILE)]

        def put(phase: int, first_HTC: Tensor, second_HTC: Tensor, factor: int) -> None:
            tiles = outputs[phase].shape[1]
            torch.add(first_HTC[:, :tiles], second_HTC[:, :tiles], alpha=factor, out=outputs[phase])

        put(1, difference12, difference34, 2)
        put(2, sum12, sum34, 4)
        put(0, sum12.add_(sum34), m0, 1)
        put(3, difference12.add_(difference34, alpha=8), m5, 1)


def use_winograd(network: nn.Module) -> None:
    """Replace the convolutions that gain by it, in place; for prediction only.

    Parameters
    ----------
    network : nn.Module
        On a processor, not yet cast to a lower precision: kernels are rounded once then. Its logits stay the same but
        for rounding.
    """
    modules = [module for module in network.modules() if not isinstance(module, WinogradConv2d)]
    for module in modules:
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d) and _is_suitable(child) and min(child.weight.shape[:2]) >= _FEWEST_CHANNELS:
                setattr(module, name, WinogradConv2d(child))


def _is_suitable(convolution: nn.Conv2d) -> bool:
    return (
        convolution.kernel_size == (3, 3)
        and convolution.stride == (1, 1)
        and convolution.padding == (1, 1)
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
        and convolution.padding_mode == "zeros"
    )
