from __future__ import annotations

from pathlib import Path

import pytest

from darefine_qupath.errors import ReviewError
from darefine_qupath.review import install_scripts, script_names
from darefine_qupath.review.ours import RUN
from darefine_qupath.review.places import _PREFIX as PLACE_NAME
from darefine_qupath.review.writeback import _PREFIX as MEASUREMENT


def text(name: str) -> str:
    return (Path(__file__).parents[1] / "scripts" / "qupath" / name).read_text(encoding="utf-8")


def test_every_step_of_the_review_has_a_script() -> None:
    assert script_names() == (
        "accept_selected.groovy",
        "hide_below_confidence.groovy",
        "next_place.groovy",
        "predict_this_image.groovy",
        "predict_this_project.groovy",
        "reject_selected.groovy",
        "show_score_map.groovy",
    )


def test_scripts_speak_of_the_names_that_are_written() -> None:
    assert f'"{MEASUREMENT}confidence"' in text("hide_below_confidence.groovy")
    assert f'containsKey("{RUN}")' in text("accept_selected.groovy")
    assert f'containsKey("{RUN}")' in text("reject_selected.groovy")
    assert f"/{PLACE_NAME} \\d+/" in text("next_place.groovy")
    assert "setLocked(true)" in text("accept_selected.groovy")


def test_scripts_are_copied(tmp_path: Path) -> None:
    paths = install_scripts(tmp_path / "new" / "scripts")
    assert [path.name for path in paths] == list(script_names())
    assert all(path.read_text(encoding="utf-8") == text(path.name) for path in paths)
    assert install_scripts(tmp_path / "new" / "scripts") == paths


def test_a_changed_script_is_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "next_place.groovy").write_text("mine")
    with pytest.raises(ReviewError, match=r"other versions of next_place\.groovy; use --force"):
        install_scripts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["next_place.groovy"]
    install_scripts(tmp_path, overwrite=True)
    assert (tmp_path / "next_place.groovy").read_text(encoding="utf-8") == text("next_place.groovy")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReviewError, match="Cannot put the scripts into"):
        install_scripts(tmp_path / "file" / "scripts")
