"""Run a network on its device, batch by batch: from slices and contexts to scores on the score map's grid."""

# B batch, N contexts, K classes, H W input pixels, h w map pixels
# ruff: noqa: N806

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from darefine_qupath.devices import DTYPES, autocast, is_out_of_memory, keep_freed_memory, to_device
from darefine_qupath.errors import PredictionError
from darefine_qupath.models import ContextFeatures, Normalization
from darefine_qupath.models.inference import fold_batch_norms
from darefine_qupath.models.symmetries import SYMMETRIES, restore_image, transform_boxes, transform_image
from darefine_qupath.prediction.pooling import pool_logits, pooled_window

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BatchScores", "EncodedContext", "Engine", "EngineSettings", "choose_batch_size"]

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

_CPU_PIXELS = 2 * 512**2
_GPU_PIXELS = 32 * 512**2
_LARGEST_BATCH = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """How an engine computes; with the same settings and inputs it gives the same bits.

    Attributes
    ----------
    device : str
        What torch calls it.
    precision : str
        ``"fp32"``, ``"bf16"`` or ``"fp16"``.
    batch_size : int
        Slices at once.
    tta : bool
        Average over the symmetries of the square.
    compile : bool
        Use ``torch.compile``.
    output_stride : int
        Input pixels per map pixel.
    """

    device: str
    precision: str
    batch_size: int
    tta: bool = False
    compile: bool = False
    output_stride: int = 4


@dataclass(frozen=True, slots=True)
class EncodedContext:
    """A context as a network knows it.

    Attributes
    ----------
    features : tuple of ContextFeatures
        Under each symmetry that is used.
    pixels : ndarray of uint8, shape (H, W, 3), or None
        What they are of, to encode it again; None where the network looks at no context.
    """

    features: tuple[ContextFeatures, ...]
    pixels: NDArray[np.uint8] | None = None


@dataclass(frozen=True, slots=True)
class BatchScores:
    """Scores of a batch on the map's grid.

    Attributes
    ----------
    scores : tuple of Tensor, each of float32 and shape (part of B, K, height, width)
        Softmax of the logits' mean over each map pixel; on the device, where they may still be computed.
    finite : tuple of Tensor, each of bool and shape (part of B)
        Per slice, whether all that the network said of it is a finite number; on the device too.
    phases : tuple of (int, int)
        Per slice, input pixels (down, right) from the first map pixel's edge to the slice's.
    input_px : int
        Side of the slices.
    stride : int
        Input pixels per map pixel.
    """

    scores: tuple[Tensor, ...]
    finite: tuple[Tensor, ...]
    phases: tuple[tuple[int, int], ...]
    input_px: int
    stride: int

    def first_not_finite(self) -> int | None:
        """Wait for the device; give the first slice of which not all scores are finite, None where all are."""
        wrong = [index for index, finite in enumerate(torch.cat([part.cpu() for part in self.finite])) if not finite]
        return wrong[0] if wrong else None

    def fetch(self) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Wait for the device.

        Yields
        ------
        scores : ndarray of float32, shape (K, h, w)
            Of one slice, without the padding of the batch.
        weight : ndarray of float32, shape (h, w)
            The blending window, averaged over each map pixel.
        """
        rows_of_scores = (row for part in self.scores for row in part.cpu().numpy())
        for scores, (down, right) in zip(rows_of_scores, self.phases, strict=True):
            rows = pooled_window(self.input_px, down, self.stride)
            columns = pooled_window(self.input_px, right, self.stride)
            yield scores[:, : len(rows), : len(columns)], rows[:, None] * columns[None]


class Engine:
    """A network that turns slices and encoded contexts into scores on the map's grid.

    Parameters
    ----------
    model : nn.Module
        With ``encode_context`` and ``decode`` as `darefine_qupath.models.SegmentationNetwork` has them. It is changed
        in place for prediction (batch normalization folded into convolutions, weights in the precision), so it cannot
        be trained afterwards.
    normalization : Normalization
        Of the pixels.
    settings : EngineSettings
        How to compute.
    build : callable, optional
        Builds the network anew: for `score_exactly`, which needs its weights as they were.

    Attributes
    ----------
    batch_size : int
        Slices at once, as long as memory takes them.
    uses_context : bool
        Whether the network looks at its context at all.
    """

    def __init__(
        self,
        model: nn.Module,
        normalization: Normalization,
        settings: EngineSettings,
        *,
        build: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.settings = settings
        self._build = build
        self._exact: Engine | None = None
        self.batch_size = settings.batch_size
        self.uses_context = bool(getattr(getattr(model, "config", None), "uses_context", True))
        self.device = torch.device(settings.device)
        self._normalization = normalization
        self._dtype = DTYPES[settings.precision]
        network: Any = model.eval().to(self.device)
        fold_batch_norms(network)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                # Once, where autocast would do it for every batch.
                module.to(self._dtype)
        network = network.to(memory_format=torch.channels_last)
        if self.device.type == "cpu":
            keep_freed_memory()
        self._encode: Callable[..., Any] = network.encode_context
        self._decode: Callable[..., Any] = network.decode
        if settings.compile:
            self._encode, self._decode = torch.compile(self._encode), torch.compile(self._decode)
        self._symmetries = SYMMETRIES if settings.tta else (0,)

    @property
    def no_context(self) -> EncodedContext:
        """What stands for the context of a network that looks at none."""
        return EncodedContext((ContextFeatures(),) * len(self._symmetries))

    def encode(self, contexts: Sequence[NDArray[np.uint8]]) -> list[EncodedContext]:
        """Encode contexts.

        Parameters
        ----------
        contexts : sequence of ndarray of uint8, shape (H, W, 3)
            RGB.

        Returns
        -------
        list of EncodedContext
            In their order.
        """
        parts = self._within_memory(self._encode_batch, contexts)
        return [features for part in parts for features in part]

    def _encode_batch(self, contexts: Sequence[NDArray[np.uint8]]) -> list[EncodedContext]:
        with torch.inference_mode(), autocast(self.device, self._dtype):
            image_N3HW = self._upload(contexts, self._normalization.of_context)
            turned = [self._encode(transform_image(image_N3HW, symmetry)) for symmetry in self._symmetries]
        return [
            EncodedContext(tuple(_row(features, index) for features in turned), pixels)
            for index, pixels in enumerate(contexts)
        ]

    def score(
        self,
        slices: Sequence[NDArray[np.uint8]],
        contexts: Sequence[EncodedContext],
        index: Sequence[int],
        boxes: NDArray[np.float32],
        phases: Sequence[tuple[int, int]],
    ) -> BatchScores:
        """Score slices.

        Parameters
        ----------
        slices : sequence of ndarray of uint8, shape (S, S, 3)
            RGB.
        contexts : sequence of EncodedContext
            Some of what `encode` gave.
        index : sequence of int
            Per slice, which of `contexts` is its own.
        boxes : ndarray of float32, shape (B, 4)
            Per slice, its place in its context; see `darefine_qupath.models.box_within`.
        phases : sequence of (int, int)
            Per slice, input pixels (down, right) by which it starts inside its first map pixel.

        Returns
        -------
        BatchScores
            On the map's grid.
        """
        jobs = list(zip(slices, index, boxes, phases, strict=True))
        stride, size = self.settings.output_stride, slices[0].shape[0]
        parts = self._within_memory(lambda part: self._score_batch(part, contexts), jobs)
        scores, finite = zip(*parts, strict=True)
        return BatchScores(scores, finite, tuple(phases), size, stride)

    def score_exactly(
        self,
        slices: Sequence[NDArray[np.uint8]],
        contexts: Sequence[EncodedContext],
        index: Sequence[int],
        boxes: NDArray[np.float32],
        phases: Sequence[tuple[int, int]],
    ) -> BatchScores:
        """Score slices in float32, whatever the precision of the others: for what 16 bits cannot hold.

        Parameters and what is given back are those of `score`.
        """
        if self._exact is None:
            assert self._build is not None
            settings = replace(self.settings, precision="fp32", compile=False)
            self._exact = Engine(self._build(), self._normalization, settings)
        pixels = [context.pixels for context in contexts if context.pixels is not None]
        contexts = self._exact.encode(pixels) if pixels else contexts
        return self._exact.score(slices, contexts, index, boxes, phases)

    def _score_batch(
        self,
        jobs: Sequence[tuple[NDArray[np.uint8], int, NDArray[np.float32], tuple[int, int]]],
        contexts: Sequence[EncodedContext],
    ) -> tuple[Tensor, Tensor]:
        slices, index, boxes, phases = zip(*jobs, strict=True)
        index_B = to_device(torch.tensor(index), self.device)
        box_B4 = to_device(torch.from_numpy(np.stack(boxes)), self.device)
        with torch.inference_mode():
            slice_B3HW = self._upload(slices, self._normalization)
            scores: list[Tensor] = []
            finite_B = torch.ones(len(jobs), dtype=torch.bool, device=self.device)
            for number, symmetry in enumerate(self._symmetries):
                shared = _stack([context.features[number] for context in contexts])
                with autocast(self.device, self._dtype):
                    logits_BKHW = self._decode(
                        transform_image(slice_B3HW, symmetry), shared, index_B, transform_boxes(box_B4, symmetry)
                    )
                # Averaged before the softmax: the logits are interpolated from about that resolution anyway.
                pooled_BKhw = pool_logits(
                    restore_image(logits_BKHW.float(), symmetry), phases, self.settings.output_stride
                )
                # Before the softmax, which hides an infinity. Nobody waits for the answer yet.
                finite_B &= pooled_BKhw.isfinite().flatten(1).all(1)
                scores.append(pooled_BKhw.softmax(1))
            return (torch.stack(scores).mean(0) if len(scores) > 1 else scores[0]), finite_B

    def _upload(self, images: Sequence[NDArray[np.uint8]], normalization: Normalization) -> Tensor:
        image_B3HW = normalization.apply(to_device(torch.from_numpy(np.stack(images)), self.device))
        return image_B3HW.contiguous(memory_format=torch.channels_last)

    def _within_memory(self, run: Callable[[Sequence[Any]], Result], items: Sequence[Any]) -> list[Result]:
        """Run on as many items at once as the device's memory takes; on fewer from then on when it does not."""
        results: list[Result] = []
        done = 0
        while done < len(items):
            part = items[done : done + self.batch_size]
            try:
                results.append(run(part))
                done += len(part)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise PredictionError(
                        f"One slice does not fit in the memory of {self.device}; use --device cpu or a narrower model"
                    ) from error
            self.batch_size = max(1, len(part) // 2)
            _log.warning("%s is out of memory: going on with %d slices at once", self.device, self.batch_size)
            # Only now: the error's traceback held what the batch had taken.
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return results


def _row(features: ContextFeatures, index: int) -> ContextFeatures:
    return ContextFeatures(
        tuple(feature[index : index + 1] for feature in features.maps),
        tuple(feature[index : index + 1] for feature in features.pooled),
    )


def _stack(rows: Sequence[ContextFeatures]) -> ContextFeatures:
    if len(rows) == 1:
        return rows[0]
    maps = zip(*(row.maps for row in rows), strict=True)
    pooled = zip(*(row.pooled for row in rows), strict=True)
    return ContextFeatures(tuple(map(torch.cat, maps)), tuple(map(torch.cat, pooled)))


def choose_batch_size(device: torch.device, input_px: int) -> int:
    """Slices at once on a device, to begin with; one that is out of memory halves it.

    Parameters
    ----------
    device : torch.device
        Where the network runs.
    input_px : int
        Side of a slice.

    Returns
    -------
    int
        A power of two. On a processor more than this is no faster (measured: 128 px from 16 on, 500 px at any).
    """
    pixels = _CPU_PIXELS if device.type == "cpu" else _GPU_PIXELS
    return int(2 ** int(np.log2(min(max(pixels / input_px**2, 2), _LARGEST_BATCH))))
