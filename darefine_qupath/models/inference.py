"""Prepare a network for prediction: fold its batch norms into the convolutions before them."""

from __future__ import annotations

import itertools

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["fold_batch_norms"]


def fold_batch_norms(network: nn.Module) -> None:
    """Fold each batch norm into the convolution before it, in place.

    Every network registers a batch norm right behind the convolution whose output it normalizes.

    Parameters
    ----------
    network : nn.Module
        In evaluation mode; its logits stay the same but for rounding.
    """
    for module in network.modules():
        for (name, first), (norm, second) in itertools.pairwise(list(module.named_children())):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(first, second))
                setattr(module, norm, nn.Identity())
