"""Define the interface of networks and encoders: one call, with the context apart from the slices that share it."""

# B batch, C channels, H W pixels at the scale of the tensor, K classes, N contexts

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from darefine_qupath.errors import ModelError
from darefine_qupath.geometry import Box
from darefine_qupath.models.config import ModelConfig, Normalization

__all__ = ["ContextFeatures", "Encoder", "SegmentationNetwork", "box_within"]


class ContextFeatures(NamedTuple):
    """What a decoder needs of N contexts; empty for a network that has none.

    Attributes
    ----------
    maps : tuple of Tensor, each of shape (N, C, H, W)
        Features that are fused pixel by pixel, coarsest first.
    pooled : tuple of Tensor, each of shape (N, C, 1, 1)
        Features that are fused as their average, coarsest first.
    """

    maps: tuple[Tensor, ...] = ()
    pooled: tuple[Tensor, ...] = ()

    def of_slices(self, count: int, index_B: Tensor | None = None) -> ContextFeatures:
        """Return features with one row per slice.

        Parameters
        ----------
        count : int
            Slices.
        index_B : Tensor of int64, shape (B,), optional
            Which context each slice has. Without it there is one context for all slices, or one for each.

        Raises
        ------
        ModelError
            If there are neither one nor `count` contexts and no index.
        """
        return ContextFeatures(
            tuple(_rows_of_slices(feature, count, index_B) for feature in self.maps),
            tuple(_rows_of_slices(feature, count, index_B) for feature in self.pooled),
        )


def _rows_of_slices(feature_NCHW: Tensor, count: int, index_B: Tensor | None) -> Tensor:
    if index_B is not None:
        return feature_NCHW[index_B]
    contexts = feature_NCHW.shape[0]
    if contexts == count:
        return feature_NCHW
    if contexts == 1:
        return feature_NCHW.expand(count, -1, -1, -1)
    raise ModelError(f"{contexts} contexts for {count} slices; say with index_B which slice has which context")


class Encoder(nn.Module):
    """A network that turns an image into features at 1/4, 1/8, 1/16 and 1/32, sizes rounded up.

    Attributes
    ----------
    channels : tuple of int
        Channels of the four features, finest first.
    """

    channels: tuple[int, ...]


class SegmentationNetwork(nn.Module, ABC):
    """A network that labels the pixels of a slice.

    Attributes
    ----------
    config : ModelConfig
        What it is made of.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def expect(self, normalization: Normalization) -> None:
        """Note the normalization of the pixels; a network that makes its context of the slice must convert them."""

    @property
    @abstractmethod
    def encoders(self) -> dict[str, nn.Module]:
        """The encoders by role, ``"slice"`` and ``"context"``; U-Net has none that stands alone."""

    @abstractmethod
    def decode(
        self,
        slice_B3HW: Tensor,
        context: ContextFeatures,
        index_B: Tensor | None = None,
        box_B4: Tensor | None = None,
    ) -> Tensor:
        """Label slices whose contexts are encoded already.

        Parameters
        ----------
        slice_B3HW : Tensor, shape (B, 3, H, W)
            Normalised pixels; any size.
        context : ContextFeatures
            Of `encode_context`: for one context that all slices share, for one per slice, or for any number with
            `index_B`.
        index_B : Tensor of int64, shape (B,), optional
            Which context each slice has.
        box_B4 : Tensor, shape (B, 4), optional
            Where each slice lies in its context, see `box_within`. Only ``aligned`` fusion looks at it; without it
            the slice is taken to fill its context.

        Returns
        -------
        Tensor, shape (B, K, H, W)
            Logits.
        """

    def encode_context(self, context_N3HW: Tensor) -> ContextFeatures:  # noqa: ARG002 (networks with a context do)
        """Do everything for a context that does not depend on a slice.

        Parameters
        ----------
        context_N3HW : Tensor, shape (N, 3, H, W)
            Normalised pixels; any size.

        Returns
        -------
        ContextFeatures
            To be used by any number of slices; empty for a network without a context.
        """
        return ContextFeatures()

    def forward(self, slice_B3HW: Tensor, context_B3HW: Tensor, box_B4: Tensor | None = None) -> Tensor:
        """Label slices, each with its context.

        Parameters
        ----------
        slice_B3HW, context_B3HW : Tensor, shape (B, 3, H, W)
            Normalised pixels. A network without a context ignores the second.
        box_B4 : Tensor, shape (B, 4), optional
            Where each slice lies in its context; see `decode`.

        Returns
        -------
        Tensor, shape (B, K, H, W)
            Logits.
        """
        return self.decode(slice_B3HW, self.encode_context(context_B3HW), None, box_B4)


def box_within(slice_box: Box, context_box: Box) -> tuple[float, float, float, float]:
    """Return the place of a slice in its context: left, top, right, bottom, as fractions of the context's size.

    Parameters
    ----------
    slice_box, context_box : Box
        In level-0 pixels.

    Returns
    -------
    tuple of float
        A row of ``box_B4``; (0, 0, 1, 1) when both boxes are the same.
    """
    return (
        (slice_box.x - context_box.x) / context_box.width,
        (slice_box.y - context_box.y) / context_box.height,
        (slice_box.right - context_box.x) / context_box.width,
        (slice_box.bottom - context_box.y) / context_box.height,
    )
