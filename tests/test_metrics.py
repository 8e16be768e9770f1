"""Metrics against cases worked out by hand and against loops over pixels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from darefine_qupath.classes import IGNORE
from darefine_qupath.metrics import ConfusionMatrix

# Ten pixels of four classes:      T 0 0 0 1 1 2 2 3 3 255
#                                  P 0 0 1 1 2 2 2 3 0 3
TRUTH = np.array([[0, 0, 0, 1, 1], [2, 2, 3, 3, 255]], dtype=np.uint8)
PREDICTION = np.array([[0, 0, 1, 1, 2], [2, 2, 3, 0, 3]], dtype=np.uint8)

label_images = st.integers(1, 5).flatmap(
    lambda k: st.tuples(
        st.just(k),
        hnp.arrays(np.uint8, (6, 7), elements=st.sampled_from([*range(k), IGNORE])),
        hnp.arrays(np.uint8, (6, 7), elements=st.integers(0, k - 1)),
    )
)
pairs_of_images = settings(deadline=None, derandomize=True, max_examples=60)


def by_hand() -> ConfusionMatrix:
    return ConfusionMatrix.of(TRUTH, PREDICTION, 4)


def test_counts_by_hand() -> None:
    assert by_hand().counts.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 2, 0], [1, 0, 0, 1]]
    assert by_hand().num_pixels == 9


def test_metrics_by_hand() -> None:
    matrix = by_hand()
    assert matrix.iou.tolist() == pytest.approx([2 / 4, 1 / 3, 2 / 3, 1 / 2])
    assert matrix.mean_iou == pytest.approx((2 / 4 + 1 / 3 + 2 / 3 + 1 / 2) / 4)
    assert matrix.dice.tolist() == pytest.approx([4 / 6, 2 / 4, 4 / 5, 2 / 3])
    assert matrix.precision.tolist() == pytest.approx([2 / 3, 1 / 2, 2 / 3, 1])
    assert matrix.recall.tolist() == pytest.approx([2 / 3, 1 / 2, 1, 1 / 2])
    assert matrix.accuracy == pytest.approx(6 / 9)


def test_bach_score_by_hand() -> None:
    # Errors: 0 as 1 (1), 1 as 2 (1), 3 as 0 (3): 5. Denominator: the two true negatives count nothing; the normal
    # pixel called benign could be 3 wrong, the two benign 2 each, the two in situ 2 each, the two invasive 3 each: 17.
    assert by_hand().bach_score == pytest.approx(1 - 5 / 17)


@pytest.mark.parametrize(
    ("truth", "prediction", "score"),
    [
        ([3, 3], [0, 0], 0.0),  # as wrong as can be
        ([0, 3], [3, 0], 0.0),
        ([1, 2, 3], [1, 2, 3], 1.0),
        ([0, 0, 0, 1], [0, 0, 0, 1], 1.0),
        ([0, 0, 0, 1], [0, 0, 0, 3], 0.0),  # true negatives do not soften the one error
        ([2, 2], [1, 2], 1 - 1 / 4),
        ([0, 0], [1, 0], 1 - 1 / 3),
    ],
)
def test_bach_score_of_simple_cases(truth: list[int], prediction: list[int], score: float) -> None:
    matrix = ConfusionMatrix.of(np.array(truth), np.array(prediction), 4)
    assert matrix.bach_score == pytest.approx(score)


def test_bach_score_of_normal_tissue_called_normal_is_not_defined() -> None:
    assert math.isnan(ConfusionMatrix.of(np.zeros(5, int), np.zeros(5, int), 4).bach_score)
    assert math.isnan(ConfusionMatrix(np.array([[7]])).bach_score)


@pairs_of_images
@given(label_images)
def test_metrics_agree_with_loops_over_pixels(case: tuple[int, NDArray[Any], NDArray[Any]]) -> None:
    num_classes, truth, prediction = case
    matrix = ConfusionMatrix.of(truth, prediction, num_classes)
    pixels = [(int(t), int(p)) for t, p in zip(truth.flat, prediction.flat, strict=True) if t != IGNORE]
    for label in range(num_classes):
        both = sum(t == p == label for t, p in pixels)
        either = sum(label in (t, p) for t, p in pixels)
        true, predicted = sum(t == label for t, _ in pixels), sum(p == label for _, p in pixels)
        assert same(matrix.iou[label], both, either)
        assert same(matrix.dice[label], 2 * both, true + predicted)
        assert same(matrix.precision[label], both, predicted)
        assert same(matrix.recall[label], both, true)
    assert same(matrix.accuracy, sum(t == p for t, p in pixels), len(pixels))
    assert matrix.num_pixels == len(pixels)


@pairs_of_images
@given(label_images)
def test_bach_score_agrees_with_equations_10_and_11(case: tuple[int, NDArray[Any], NDArray[Any]]) -> None:
    num_classes, truth, prediction = case
    wrong, h = 0, 0
    for gt, pred in zip(truth.astype(int).flat, prediction.astype(int).flat, strict=True):
        if gt == IGNORE:
            continue
        gt_bin, pred_bin = int(gt > 0), int(pred > 0)
        wrong += abs(pred - gt)
        h += max(abs(gt - 0), abs(gt - (num_classes - 1))) * (1 - (1 - pred_bin) * (1 - gt_bin))
    assert same(1 - ConfusionMatrix.of(truth, prediction, num_classes).bach_score, wrong, h)


def same(value: float, part: float, whole: float) -> bool:
    return math.isnan(value) if whole == 0 else math.isclose(value, part / whole, abs_tol=1e-12)


@pairs_of_images
@given(label_images, st.integers(0, 6))
def test_parts_add_up_to_the_whole(case: tuple[int, NDArray[Any], NDArray[Any]], cut: int) -> None:
    num_classes, truth, prediction = case
    whole = ConfusionMatrix.of(truth, prediction, num_classes)
    upper = ConfusionMatrix.of(truth[:cut], prediction[:cut], num_classes)
    lower = ConfusionMatrix.of(truth[cut:], prediction[cut:], num_classes)
    assert upper + lower == whole == ConfusionMatrix.merged([lower, upper])
    assert upper.updated(truth[cut:], prediction[cut:]) == whole
    assert hash(upper + lower) == hash(whole)


def test_a_class_that_is_nowhere_is_not_in_the_mean() -> None:
    matrix = ConfusionMatrix.of(np.array([0, 0, 1]), np.array([0, 1, 1]), 3)
    assert matrix.iou.tolist() == pytest.approx([1 / 2, 1 / 2, float("nan")], nan_ok=True)
    assert matrix.mean_iou == pytest.approx(1 / 2)
    assert matrix.mean_dice == pytest.approx(2 / 3)


def test_a_class_that_is_only_predicted_counts_as_wrong() -> None:
    matrix = ConfusionMatrix.of(np.array([0, 0]), np.array([0, 2]), 3)
    assert matrix.iou.tolist() == pytest.approx([1 / 2, float("nan"), 0], nan_ok=True)
    assert matrix.mean_iou == pytest.approx(1 / 4)


def test_no_pixels_have_no_metrics() -> None:
    matrix = ConfusionMatrix.of(np.full((2, 2), IGNORE), np.zeros((2, 2), int), 3)
    assert matrix == ConfusionMatrix.empty(3)
    assert all(map(math.isnan, (matrix.mean_iou, matrix.mean_dice, matrix.accuracy, matrix.bach_score)))


def test_large_counts_do_not_overflow() -> None:
    matrix = ConfusionMatrix.merged([ConfusionMatrix(np.full((4, 4), 10**12))] * 3)
    assert matrix.accuracy == pytest.approx(1 / 4)
    assert matrix.num_pixels == 48 * 10**12


def test_labels_that_are_not_ignored_must_be_classes() -> None:
    with pytest.raises(ValueError, match="truth holds labels from 0 to 4, known are 0 to 3"):
        ConfusionMatrix.of(np.array([0, 4]), np.array([0, 0]), 4)
    with pytest.raises(ValueError, match="prediction holds labels from 0 to 255"):
        ConfusionMatrix.of(np.array([0, 1]), np.array([0, 255]), 4)
    with pytest.raises(ValueError, match="prediction holds labels from -1"):
        ConfusionMatrix.of(np.array([0, 1]), np.array([0, -1]), 4)


def test_a_prediction_may_be_ignored_where_the_truth_is() -> None:
    assert ConfusionMatrix.of(np.array([0, IGNORE]), np.array([0, IGNORE]), 2).num_pixels == 1


def test_shapes_and_numbers_of_classes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"Truth has shape \(2,\) and prediction \(3,\)"):
        ConfusionMatrix.of(np.zeros(2, int), np.zeros(3, int), 2)
    with pytest.raises(ValueError, match="Cannot add confusion matrices of 2 and 3 classes"):
        _ = ConfusionMatrix.empty(2) + ConfusionMatrix.empty(3)
    with pytest.raises(ValueError, match=r"is square, got shape \(2, 3\)"):
        ConfusionMatrix(np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="negative"):
        ConfusionMatrix(np.array([[-1]]))
    with pytest.raises(TypeError):
        _ = ConfusionMatrix.empty(2) + 1  # type: ignore[operator]


def test_a_matrix_does_not_change_under_its_user() -> None:
    counts = np.ones((2, 2), dtype=np.int64)
    matrix = ConfusionMatrix(counts)
    counts[0, 0] = 9
    assert matrix.counts[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        matrix.counts[0, 0] = 9


def test_json_names_the_classes_and_gives_the_matrix_back() -> None:
    data = by_hand().to_json(["Normal", "Benign", "In situ", "Invasive"])
    assert data["iou"]["In situ"] == pytest.approx(2 / 3)
    assert data["bach_score"] == pytest.approx(1 - 5 / 17)
    assert ConfusionMatrix.from_json(data) == by_hand()
    assert ConfusionMatrix.empty(2).to_json()["iou"] == {"0": None, "1": None}
    with pytest.raises(ValueError, match="1 names for 4 classes"):
        by_hand().to_json(["Normal"])
