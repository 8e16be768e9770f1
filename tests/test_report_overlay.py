"""Pictures: labels over a slide, differences, the row of panels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from darefine_qupath.classes import IGNORE, ClassMap, Color
from darefine_qupath.errors import GeometryError
from darefine_qupath.report.overlay import Panel, draw_panels, mark_differences, paint_labels

WHITE = np.full((40, 60, 3), 255, np.uint8)
RED, BLUE = Color(255, 0, 0), Color(0, 0, 255)
CLASSES = ClassMap(names=("A", "B"), colors=(RED, BLUE))


def _halves() -> np.ndarray:
    labels = np.zeros((40, 60), np.uint8)
    labels[:, 30:] = 1
    labels[:10] = IGNORE
    return labels


def test_a_label_tints_and_its_border_is_drawn_in_full() -> None:
    painted = paint_labels(WHITE, _halves(), CLASSES.colors)
    assert painted[25, 10].tolist() == [255, 127, 127]
    assert painted[25, 50].tolist() == [127, 127, 255]
    assert painted[25, 29].tolist() == [255, 0, 0]
    assert painted[25, 30].tolist() == [0, 0, 255]


def test_where_nothing_is_known_the_slide_shows() -> None:
    painted = paint_labels(WHITE, _halves(), CLASSES.colors)
    assert (painted[:9] == 255).all()


def test_a_hidden_label_hardly_tints() -> None:
    painted = paint_labels(WHITE, _halves(), CLASSES.colors, hidden=0)
    assert painted[25, 10].tolist() == [255, 224, 224]


def test_labels_of_another_size_are_refused() -> None:
    with pytest.raises(GeometryError, match=r"\(10, 10\) do not lie on a picture of \(40, 60\)"):
        paint_labels(WHITE, np.zeros((10, 10), np.uint8), CLASSES.colors)


def test_difference_counts_only_what_both_know() -> None:
    truth = np.array([[0, 1, IGNORE, 1]], np.uint8)
    found = np.array([[0, 0, 1, IGNORE]], np.uint8)
    assert mark_differences(truth, found).tolist() == [[0, 1, IGNORE, IGNORE]]


def test_a_row_of_panels_has_one_per_picture_and_one_for_the_difference(tmp_path: Path) -> None:
    labels = _halves()
    panels = [Panel(title="slide"), Panel(title="Truth", labels=labels), Panel(title="Prediction", labels=labels)]
    two, four = tmp_path / "two.png", tmp_path / "sub" / "four.png"
    draw_panels(two, WHITE, panels[:2], CLASSES)
    draw_panels(four, WHITE, panels, CLASSES, title="Slide", compare=(labels, 1 - np.minimum(labels, 1)))
    with Image.open(two) as narrow, Image.open(four) as wide:
        assert (narrow.width - 16) / 2 == (wide.width - 16) / 4 == 76
        drawn = np.asarray(wide.convert("RGB"))
    assert (drawn == np.array([255, 0, 0])).all(axis=2).any()


@pytest.mark.parametrize("side", [20, 400])
def test_the_legend_fits_below_pictures_of_any_size(tmp_path: Path, side: int) -> None:
    names = ("Normal tissue", "Benign", "In situ", "Invasive carcinoma")
    classes = ClassMap(names=names, colors=(RED, RED, RED, BLUE))
    draw_panels(tmp_path / "row.png", np.full((side, side, 3), 255, np.uint8), [Panel(title="Slide")], classes)
    pixels = np.asarray(Image.open(tmp_path / "row.png"))
    blue = (pixels == (0, 0, 255)).all(axis=2)
    assert blue.any()
    assert (pixels[:, -5:] == 255).all()
    # The last name, right of its box.
    assert (pixels[:, np.flatnonzero(blue.any(axis=0)).max() + 30 :] != 255).any()


def test_text_grows_with_the_pictures(tmp_path: Path) -> None:
    heights = []
    for width in (100, 1800):
        draw_panels(tmp_path / "row.png", np.full((50, width, 3), 255, np.uint8), [Panel(title="Slide")], CLASSES)
        with Image.open(tmp_path / "row.png") as picture:
            heights.append(picture.height)
    assert heights[0] < heights[1] - 60
