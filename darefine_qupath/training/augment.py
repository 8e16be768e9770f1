"""Change tiles at random: drawn on the CPU per sample, applied to a whole batch where the network runs.

What happens to a sample follows from the seed, the epoch and its place in the epoch's order alone: not from the number
of workers, processes or restarts. A geometric change is one of the tissue, so slice, context and mask take it together,
and the box of the slice within the context moves with them. A colour change is one of the slide, so slice and context
take the same.

Shapes: B tiles, H and W pixels of the slice, h and w pixels of the context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from darefine_qupath.classes import IGNORE
from darefine_qupath.devices import to_device
from darefine_qupath.models.symmetries import transform_boxes, transform_image
from darefine_qupath.training.config import TrainConfig

__all__ = ["AugmentationParams", "TileBatch", "apply_augmentation", "draw_augmentation"]

WHITE = 255

# Optical densities of haematoxylin, eosin and a residual, rows of length 1 (Ruifrok and Johnston 2001).
_STAINS = ((0.650, 0.704, 0.286), (0.072, 0.990, 0.105), (0.268, 0.570, 0.776))


@dataclass(frozen=True, kw_only=True)
class TileBatch:
    """Tiles as the network sees them, before normalisation.

    Attributes
    ----------
    slices, contexts : Tensor of uint8, shape (B, 3, H, W) and (B, 3, h, w)
        RGB.
    masks : Tensor of uint8, shape (B, H, W)
        Labels, `IGNORE` where none.
    boxes : Tensor of float32, shape (B, 4)
        Where the slice lies in its context: left, top, right, bottom as fractions of the context's side.
    """

    slices: Tensor
    contexts: Tensor
    masks: Tensor
    boxes: Tensor

    def to(self, device: torch.device) -> TileBatch:
        """Return the batch on another device; the copy does not wait where the memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> TileBatch:
        """Return the batch in page-locked memory; torch's loader calls this by its name."""
        return self._map(Tensor.pin_memory)

    def part(self, rows: slice) -> TileBatch:
        """Return some of the tiles."""
        return self._map(lambda tensor: tensor[rows])

    def _map(self, change: Callable[[Tensor], Tensor]) -> TileBatch:
        return TileBatch(**{name: change(tensor) for name, tensor in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class AugmentationParams:
    """What was drawn for one sample.

    Attributes
    ----------
    symmetry : int
        See `darefine_qupath.models.symmetries`.
    scale : float
        Magnification of slice and context.
    place : tuple of float
        Where the crop lies, x and y for the slice, then for the context; 0 to 1 within the room it has.
    stains, colors : tuple of float
        Relative changes: haematoxylin, eosin, residual; brightness, contrast, saturation.
    blank_context : bool
        Whether the context is shown white.
    """

    symmetry: int = 0
    scale: float = 1.0
    place: tuple[float, ...] = (0.5, 0.5, 0.5, 0.5)
    stains: tuple[float, ...] = (0.0, 0.0, 0.0)
    colors: tuple[float, ...] = (0.0, 0.0, 0.0)
    blank_context: bool = False


def draw_augmentation(config: TrainConfig, *, epoch: int, position: int) -> AugmentationParams:
    """Draw the changes of one sample.

    Parameters
    ----------
    config : TrainConfig
        What may happen, and the seed.
    epoch : int
        Counted from 0.
    position : int
        Place of the sample in the order of the epoch, over all processes.

    Returns
    -------
    AugmentationParams
        The same for the same three; each kind of change keeps its values when another is switched on or off.
    """
    rng = np.random.default_rng([config.seed, epoch, position])
    symmetry = int(rng.integers(8)) & {"none": 0, "flip": 3, "dihedral": 7}[config.flips]
    low, high = np.log(config.scale)
    scale = float(np.exp(low + (high - low) * rng.random()))
    return AugmentationParams(
        symmetry=symmetry,
        scale=scale,
        place=tuple(rng.random(4).tolist()),
        stains=tuple((config.stain_jitter * rng.uniform(-1, 1, 3)).tolist()),
        colors=tuple((config.color_jitter * rng.uniform(-1, 1, 3)).tolist()),
        blank_context=bool(rng.random() < config.context_dropout),
    )


def apply_augmentation(batch: TileBatch, draws: Sequence[AugmentationParams]) -> TileBatch:
    """Change each tile of a batch as drawn for it.

    Parameters
    ----------
    batch : TileBatch
        On any device.
    draws : sequence of AugmentationParams
        One per tile.

    Returns
    -------
    TileBatch
        Of the same shapes, on the same device.
    """
    if any(draw.symmetry for draw in draws):
        batch = _transform(batch, [draw.symmetry for draw in draws])
    if any(draw.scale != 1 for draw in draws):
        batch = _crop(batch, draws)
    if any(any(draw.stains) or any(draw.colors) for draw in draws):
        slice_B3HW, context_B3HW = _recolor(batch.slices, draws), _recolor(batch.contexts, draws)
        batch = replace(batch, slices=slice_B3HW, contexts=context_B3HW)
    blank = [row for row, draw in enumerate(draws) if draw.blank_context]
    if blank:
        context_B3HW = batch.contexts.clone()
        for row in blank:
            context_B3HW[row].fill_(WHITE)
        batch = replace(batch, contexts=context_B3HW)
    return batch


def _transform(batch: TileBatch, symmetries: Sequence[int]) -> TileBatch:
    def each(change: Callable[[Tensor, int], Tensor], items_B: Tensor) -> Tensor:
        return torch.stack([change(item, symmetry) for item, symmetry in zip(items_B, symmetries, strict=True)])

    return TileBatch(
        slices=each(transform_image, batch.slices),
        contexts=each(transform_image, batch.contexts),
        masks=each(transform_image, batch.masks),
        boxes=each(transform_boxes, batch.boxes),
    )


def _crop(batch: TileBatch, draws: Sequence[AugmentationParams]) -> TileBatch:
    """Show slice and context magnified, each cut at a random place such that the slice stays inside the context."""
    device = batch.boxes.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    box_B4 = batch.boxes.to(dtype)
    side_B1 = to_device(torch.tensor([[1 / draw.scale] for draw in draws], dtype=dtype), device)
    place_B4 = to_device(torch.tensor([draw.place for draw in draws], dtype=dtype), device)
    slice_at_B2 = place_B4[:, :2] * (1 - side_B1)
    size_B2 = box_B4[:, 2:] - box_B4[:, :2]
    near_B2 = box_B4[:, :2] + slice_at_B2 * size_B2
    far_B2 = near_B2 + side_B1 * size_B2
    lowest_B2 = torch.maximum(far_B2 - side_B1, (1 - side_B1).clamp(max=0))
    highest_B2 = torch.minimum(near_B2, (1 - side_B1).clamp(min=0))
    context_at_B2 = lowest_B2 + place_B4[:, 2:] * (highest_B2 - lowest_B2)
    return TileBatch(
        slices=_window(batch.slices, slice_at_B2, side_B1, outside=WHITE),
        contexts=_window(batch.contexts, context_at_B2, side_B1, outside=WHITE),
        masks=_window(batch.masks[:, None], slice_at_B2, side_B1, outside=IGNORE, mode="nearest")[:, 0],
        boxes=torch.cat([near_B2 - context_at_B2, far_B2 - context_at_B2], dim=1).div(side_B1).float(),
    )


def _window(image_BCHW: Tensor, at_B2: Tensor, side_B1: Tensor, *, outside: int, mode: str = "bilinear") -> Tensor:
    """Resample windows, given as fractions of the image, to the image's size."""
    theta_B23 = torch.zeros(len(image_BCHW), 2, 3, device=image_BCHW.device)
    theta_B23[:, 0, 0] = theta_B23[:, 1, 1] = side_B1[:, 0].float()
    theta_B23[:, :, 2] = (2 * at_B2 + side_B1 - 1).float()
    grid_BHW2 = F.affine_grid(theta_B23, list(image_BCHW.shape), align_corners=False)
    # Outside reads as zero, so zero is made to mean `outside`.
    sampled_BCHW = F.grid_sample(image_BCHW.float() - outside, grid_BHW2, mode=mode, align_corners=False)
    return (sampled_BCHW + outside).round().clamp(0, 255).to(torch.uint8)


def _recolor(image_B3HW: Tensor, draws: Sequence[AugmentationParams]) -> Tensor:
    device = image_B3HW.device
    colors_B3 = to_device(torch.tensor([draw.colors for draw in draws]), device)
    brightness_B111, contrast_B111, saturation_B111 = (1 + colors_B3).T[:, :, None, None, None]
    image_B3HW = _restain(image_B3HW.float(), torch.tensor([draw.stains for draw in draws]))
    gray_B1HW = image_B3HW.mean(dim=1, keepdim=True)
    image_B3HW = gray_B1HW + (image_B3HW - gray_B1HW) * saturation_B111
    image_B3HW = (image_B3HW - 128) * contrast_B111 + 128
    image_B3HW = image_B3HW * brightness_B111
    return image_B3HW.round().clamp(0, 255).to(torch.uint8)


def _restain(image_B3HW: Tensor, change_B3: Tensor) -> Tensor:
    """Multiply the amount of each stain by ``1 + change``: one 3 x 3 matrix on optical densities; glass stays glass."""
    stains_33 = F.normalize(torch.tensor(_STAINS, dtype=torch.float64), dim=1)
    amounts_B33 = torch.diag_embed(1 + change_B3.double())
    matrix_B33 = to_device((torch.linalg.inv(stains_33) @ amounts_B33 @ stains_33).float(), image_B3HW.device)
    density_B3P = -torch.log((image_B3HW.flatten(2) + 1) / 256)
    restained_B3P = torch.exp(-torch.bmm(matrix_B33.transpose(1, 2), density_B3P))
    return (256 * restained_B3P - 1).reshape(image_B3HW.shape)
