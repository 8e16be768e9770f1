"""The command line given what it cannot use: one line, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from darefine_qupath.errors import TrainingError, TrainingStoppedError
from darefine_qupath.pipeline.train import resume_training
from tests.conftest import Run

TINY = Path(__file__).parents[1] / "projects" / "tiny"


def _refused(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert code == 2
    assert out == ""
    line = err.strip().splitlines()[-1]
    assert line.startswith("Error: ")
    return line


@pytest.mark.parametrize("value", ["nan", "inf", "0", "-1"])
def test_a_pixel_size_that_is_no_size(run: Run, value: str) -> None:
    assert "--mpp" in _refused(run("check", TINY, f"--mpp={value}"))


@pytest.mark.parametrize("option", ["--min-area-um2", "--simplify-um", "--min-hole-um2"])
def test_an_infinite_size_of_polygons(run: Run, option: str) -> None:
    assert option in _refused(run("predict", TINY, "--model", "none.safetensors", option, "inf"))


def test_a_failed_start_does_not_take_the_run_folder(run: Run, tmp_path: Path) -> None:
    project = Path(shutil.copytree(TINY, tmp_path / "project"))
    words = ("train", project, "-o", tmp_path / "run", "--stride-um", "128", "--device", "cpu")
    for _ in range(2):
        line = _refused(run(*words, "--encoder-weights", tmp_path / "none.pth"))
        assert "none.pth" in line
        assert "holds a training run already" not in line


def test_a_damaged_request_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text("{")
    with pytest.raises(TrainingError, match=r"request\.json is damaged"):
        resume_training(tmp_path)


def test_no_project_is_made_of_slides_that_do_not_open(run: Run, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.tif"
    wrong.write_bytes(b"no image")
    good = TINY / "slides" / "train-1.tif"
    for words in ((good, wrong), (good, tmp_path / "none.svs"), (good, "--annotations", tmp_path / "nowhere")):
        _refused(run("create", tmp_path / "made", *words, "--engine", "embedded"))
        assert not (tmp_path / "made").exists()


def test_a_file_with_nothing_usable_is_an_error(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "train-1.geojson"
    file.write_text('{"type": "FeatureCollection", "features": [1, 2]}')
    line = _refused(run("import", TINY, file, "--dry-run", "--engine", "embedded"))
    assert "no annotation that can be used" in line
    assert "and 1 more" in line


def test_a_folder_of_truths_must_be_there(run: Run, tmp_path: Path) -> None:
    assert "nowhere" in _refused(run("overlay", TINY, "--truth", tmp_path / "nowhere", "-o", tmp_path / "out"))


def test_review_before_a_prediction(run: Run) -> None:
    code, out, err = run("next", TINY, "-n", "3")
    assert (code, out) == (0, "")
    assert "run darefine predict" in err
    assert json.loads(run("next", TINY, "-n", "3", "--json")[1]) == {"places": []}


def test_clearing_prints_json_too(run: Run, tmp_path: Path) -> None:
    project = Path(shutil.copytree(TINY, tmp_path / "project"))
    assert json.loads(run("next", project, "--clear", "--json", "--engine", "embedded")[1]) == {"removed": 0}


def test_a_test_image_must_be_there(run: Run, tmp_path: Path) -> None:
    assert "No image 'other'" in _refused(run("train", TINY, "-o", tmp_path / "run", "--test-image", "other"))


def test_a_stopped_training_is_no_error(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise TrainingStoppedError("SIGINT ended training; go on with: darefine train --resume run")

    monkeypatch.setattr("darefine_qupath.cli.train.resume_training", stopped)
    code, out, err = run("train", "--resume", tmp_path)
    assert (code, out) == (130, "")
    assert err.splitlines() == ["SIGINT ended training; go on with: darefine train --resume run"]
