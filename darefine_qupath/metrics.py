"""Measure how well a label map matches the truth: a confusion matrix and what follows from it.

Accuracy, IoU and the BACH score are those of the paper ([1]_, Section III-C). Every metric here is a function of the
confusion matrix, so that tiles, slides and processes add up.

References
----------
.. [1] Z. Li, R. Tao, Q. Wu, B. Li: DA-RefineNet: Dual-inputs attention RefineNet for whole slide image segmentation.
   ICPR 2020, arXiv 1907.06358.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darefine_qupath.classes import IGNORE

__all__ = ["ConfusionMatrix"]


@dataclass(frozen=True, eq=False)
class ConfusionMatrix:
    """Pixels by true and predicted class.

    Attributes
    ----------
    counts : ndarray of int64, shape (K, K)
        Row: truth; column: prediction. Pixels whose truth is `IGNORE` are in no cell.
    missed : ndarray of int64, shape (K,)
        Pixels by true class that have no prediction and count as errors; none by default.

    Raises
    ------
    ValueError
        If `counts` is not square, `missed` is of another length, or one holds a negative number.
    """

    counts: NDArray[np.int64]
    missed: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        counts = np.array(self.counts, dtype=np.int64)
        if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size:
            raise ValueError(f"A confusion matrix is square, got shape {counts.shape}")
        missed = np.array(self.missed if len(self.missed) else np.zeros(len(counts)), dtype=np.int64)
        if missed.shape != counts.shape[:1]:
            raise ValueError(f"Missed pixels of {len(counts)} classes cannot have the shape {missed.shape}")
        if min(counts.min(), missed.min()) < 0:
            raise ValueError("A confusion matrix cannot hold negative counts")
        for name, values in (("counts", counts), ("missed", missed)):
            values.flags.writeable = False
            object.__setattr__(self, name, values)

    @classmethod
    def empty(cls, num_classes: int) -> ConfusionMatrix:
        """Matrix of no pixels."""
        return cls(np.zeros((num_classes, num_classes), dtype=np.int64))

    @classmethod
    def of(cls, truth: NDArray[Any], prediction: NDArray[Any], num_classes: int) -> ConfusionMatrix:
        """Count the pixels of two label images.

        Parameters
        ----------
        truth, prediction : ndarray of integers, same shape
            Labels. Pixels whose truth is `IGNORE` are not counted.
        num_classes : int
            K; labels are 0 to K - 1.

        Returns
        -------
        ConfusionMatrix

        Raises
        ------
        ValueError
            If the shapes differ, or a counted label is not below K (a prediction may not be `IGNORE` there).
        """
        truth, prediction = np.asarray(truth), np.asarray(prediction)
        if truth.shape != prediction.shape:
            raise ValueError(f"Truth has shape {truth.shape} and prediction {prediction.shape}")
        counted = truth != IGNORE
        rows, columns = truth[counted].astype(np.int64), prediction[counted].astype(np.int64)
        for name, labels in (("truth", rows), ("prediction", columns)):
            if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
                raise ValueError(
                    f"The {name} holds labels from {labels.min()} to {labels.max()}, known are 0 to {num_classes - 1}"
                )
        cells = np.bincount(rows * num_classes + columns, minlength=num_classes**2)
        return cls(cells.reshape(num_classes, num_classes))

    @classmethod
    def merged(cls, matrices: Iterable[ConfusionMatrix]) -> ConfusionMatrix:
        """Sum of several matrices; needs at least one."""
        first, *others = matrices
        return sum(others, start=first)

    def __add__(self, other: ConfusionMatrix) -> ConfusionMatrix:
        if not isinstance(other, ConfusionMatrix):
            return NotImplemented
        if other.num_classes != self.num_classes:
            raise ValueError(f"Cannot add confusion matrices of {self.num_classes} and {other.num_classes} classes")
        return ConfusionMatrix(self.counts + other.counts, self.missed + other.missed)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ConfusionMatrix)
            and np.array_equal(self.counts, other.counts)
            and np.array_equal(self.missed, other.missed)
        )

    def __hash__(self) -> int:
        return hash((self.counts.tobytes(), self.missed.tobytes()))

    def updated(self, truth: NDArray[Any], prediction: NDArray[Any]) -> ConfusionMatrix:
        """Return this matrix with the pixels of two more label images; see `of`."""
        return self + ConfusionMatrix.of(truth, prediction, self.num_classes)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.counts)

    @property
    def num_pixels(self) -> int:
        """Pixels that were counted."""
        return int(self._true.sum())

    @property
    def iou(self) -> NDArray[np.float64]:
        """Intersection over union per class, shape (K,) (Eq. 9); NaN for a class in neither truth nor prediction."""
        return _ratio(self._hits, self._true + self._predicted - self._hits)

    @property
    def mean_iou(self) -> float:
        """Mean of `iou` (Eq. 9) over the classes that truth or prediction have; NaN if there are none.

        A class that is absent from both has no IoU: counting it as 0 would punish a slide for what is not on it,
        counting it as 1 would reward it. A class that is only predicted counts as 0.
        """
        return _mean(self.iou)

    @property
    def dice(self) -> NDArray[np.float64]:
        """Dice coefficient (F1) per class, shape (K,); NaN for a class in neither truth nor prediction."""
        return _ratio(2 * self._hits, self._true + self._predicted)

    @property
    def mean_dice(self) -> float:
        """Mean of `dice` over the classes that truth or prediction have."""
        return _mean(self.dice)

    @property
    def precision(self) -> NDArray[np.float64]:
        """Share of the pixels predicted as a class that are of it, shape (K,); NaN for a class never predicted."""
        return _ratio(self._hits, self._predicted)

    @property
    def recall(self) -> NDArray[np.float64]:
        """Share of the pixels of a class that are predicted as it, shape (K,); NaN for a class not in the truth."""
        return _ratio(self._hits, self._true)

    @property
    def accuracy(self) -> float:
        """Share of the pixels that are labelled correctly; NaN if there are none."""
        return float(_ratio(self._hits.sum(), self._true.sum()))

    @property
    def bach_score(self) -> float:
        """Score that weighs an error by its distance on the scale from normal to invasive ([1]_, Eq. 10-11).

        ``1 - sum |pred - gt| / sum max(|gt - 0|, |gt - (K - 1)|) * [1 - (1 - pred_bin) (1 - gt_bin)]`` over the
        pixels, where ``bin`` is 0 for the normal class (label 0) and 1 for any other. Pixels that are normal in both
        truth and prediction are thus not counted in the denominator. A pixel without a prediction is the worst error
        that its class allows. K is 4 in the paper. NaN if truth and prediction are normal everywhere, or there is one
        class only.
        """
        labels = np.arange(self.num_classes)
        truth, prediction = labels[:, None], labels[None, :]
        largest = np.maximum(truth, self.num_classes - 1 - truth)
        is_counted = 1 - (prediction == 0) * (truth == 0)
        lost = int((self.missed * largest[:, 0]).sum())
        wrong = int((self.counts * np.abs(prediction - truth)).sum()) + lost
        worst = int((self.counts * largest * is_counted).sum()) + lost
        return 1 - wrong / worst if worst else float("nan")

    @property
    def _hits(self) -> NDArray[np.int64]:
        return np.diagonal(self.counts)

    @property
    def _true(self) -> NDArray[np.int64]:
        return np.asarray(self.counts.sum(1) + self.missed)

    @property
    def _predicted(self) -> NDArray[np.int64]:
        return np.asarray(self.counts.sum(0))

    def to_json(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Return every metric as plain JSON values; what is not defined is None.

        Parameters
        ----------
        names : sequence of str, optional
            Class names in label order; per-class metrics are then under these names, else under the labels.
        """
        keys = list(names) if names is not None else [str(label) for label in range(self.num_classes)]
        if len(keys) != self.num_classes:
            raise ValueError(f"{len(keys)} names for {self.num_classes} classes")
        per_class = {"iou": self.iou, "dice": self.dice, "precision": self.precision, "recall": self.recall}
        return {
            "pixels": self.num_pixels,
            "miou": _plain(self.mean_iou),
            "accuracy": _plain(self.accuracy),
            "mean_dice": _plain(self.mean_dice),
            "bach_score": _plain(self.bach_score),
            **{
                metric: {key: _plain(value) for key, value in zip(keys, values, strict=True)}
                for metric, values in per_class.items()
            },
            "confusion": self.counts.tolist(),
            "missed": self.missed.tolist(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ConfusionMatrix:
        """Rebuild the matrix that `to_json` wrote."""
        return cls(np.array(data["confusion"], dtype=np.int64), np.array(data.get("missed", []), dtype=np.int64))


def _ratio(part: NDArray[np.int64] | np.int64, whole: NDArray[np.int64] | np.int64) -> NDArray[np.float64]:
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.asarray(np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0))


def _mean(values: NDArray[np.float64]) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
