"""The commands of the review: one damaged image, run or map is said and does not stop the others."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from darefine_qupath.classes import ClassMap
from darefine_qupath.geometry import Box, Size
from darefine_qupath.pipeline.identity import project_id
from darefine_qupath.pipeline.next_places import find_places
from darefine_qupath.pipeline.slide_tasks import map_folder
from darefine_qupath.polygons import ClassPolygon
from darefine_qupath.prediction.blend import MapRows
from darefine_qupath.prediction.scoremap import ScoreMap
from darefine_qupath.prediction.scoremap_writer import write_score_map
from darefine_qupath.project import Project, open_project
from darefine_qupath.review import mark_places, sort_objects, undo, write_back
from tests.conftest import Run
from tests.fake_project import square

TINY = Path(__file__).parents[1] / "projects" / "tiny"
CLASSES = ClassMap(names=("Normal", "Benign", "In situ", "Invasive"))
SIDE = 1664


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Copy of the small project; a run and a score map for each of its three images."""
    copied = Path(shutil.copytree(TINY, tmp_path / "project"))
    with open_project(copied, engine="embedded") as project:
        predict(project, "m1", 0)
    return copied


def predict(project: Project, model: str, shift: int) -> None:
    batch = None
    label = np.zeros((104, 104), np.uint8)
    label[:, 52:] = 3
    for image in project.images:
        polygons = [ClassPolygon(label=3, geometry=square(20 + shift, 20, 100), margin=0.5, confidence=0.6)]
        result = write_back(project, image, polygons, model=model, classes=CLASSES, batch=batch)
        batch = batch or result.run
        score_map = ScoreMap(
            folder=map_folder(project, image), size=Size(104, 104), box=Box(0, 0, SIDE, SIDE), downsample=16.0,
            mpp=0.5, classes=CLASSES, model_id=model, fingerprint="f", class_pixels=(5408, 0, 0, 5408), num_slices=1,
        )  # fmt: skip
        score_map.folder.mkdir(parents=True, exist_ok=True)
        write_score_map(score_map, [MapRows(label, label + 100, label + 100, np.full_like(label, 1))])


def data_file(folder: Path, image: str) -> Path:
    return folder / "data" / image / "data.qpdata"


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("command", "key", "left"),
    [
        pytest.param(["review"], "images", 2, id="review"),
        pytest.param(["next", "-n", "9", "--mark"], "places", None, id="next"),
        pytest.param(["undo"], "undone", 2, id="undo"),
        pytest.param(["undo", "--dry-run"], "undone", 2, id="undo, dry"),
    ],
)
def test_a_damaged_image_does_not_stop_the_others(
    run: Run, folder: Path, command: list[str], key: str, left: int | None
) -> None:
    damage(data_file(folder, "2"))
    name, *options = command
    code, out, err = run(name, folder, *options, "--json")
    found = json.loads(out)
    assert code == 2
    assert "Error: train-2.tif: " in err
    assert "data.qpdata" in found["errors"]["train-2.tif"]
    if left is None:
        assert {place["image"] for place in found[key]} == {"1", "3"}
    else:
        assert [item.get("name", item.get("image_name")) for item in found[key]] == ["train-1.tif", "test-3.tif"]


@pytest.mark.parametrize("given", ["399", "many", "-1"])
def test_a_split_that_makes_no_sense_is_refused(run: Run, folder: Path, given: str) -> None:
    code, _, err = run("predict", folder, "--model", "none.safetensors", "--split", given)
    assert code == 2
    assert f"'{given}' is neither a number from 400 nor 'never'" in err


def test_clearing_passes_a_damaged_image(run: Run, folder: Path) -> None:
    assert run("next", folder, "-n", "9", "--mark")[0] == 0
    damage(data_file(folder, "2"))
    code, out, _ = run("next", folder, "--clear", "--json")
    assert code == 2
    assert json.loads(out)["removed"] > 0
    with open_project(folder, engine="embedded") as project:
        assert not [r for r in project.objects(project.image("3")) if (r.name or "").startswith("Review")]


def test_a_whole_project_ends_with_code_0(run: Run, folder: Path) -> None:
    for words in (["review"], ["next", "-n", "3"], ["runs"], ["overlay"], ["undo"]):
        code, out, err = run(words[0], folder, *words[1:], "--json")
        assert (code, "errors" in json.loads(out)) == (0, False), err


def test_a_damaged_run_is_left_out_of_the_list(run: Run, folder: Path) -> None:
    path = sorted((folder / "darefine" / "runs").iterdir())[0]
    damage(path)
    code, out, _ = run("runs", folder, "--json")
    assert code == 2
    assert [item["image"] for item in json.loads(out)["runs"]] == ["2", "3"]
    assert list(json.loads(out)["errors"]) == [path.name]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_undo_passes_a_damaged_run_of_its_call(run: Run, folder: Path, number: int) -> None:
    with open_project(folder, engine="embedded") as project:
        predict(project, "m2", 10)
    path = sorted((folder / "darefine" / "runs").iterdir())[3 + number]
    damage(path)
    code, out, _ = run("undo", folder, "--json")
    assert code == 2
    assert [(item["image"], item["removed"], item["added"]) for item in json.loads(out)["undone"]] == [
        (image, 1, 1) for image in "123" if image != "123"[number]
    ]
    assert list(json.loads(out)["errors"]) == [path.name]


def test_undo_does_not_take_back_another_call_than_the_last(run: Run, folder: Path) -> None:
    with open_project(folder, engine="embedded") as project:
        write_back(project, project.image("3"), [], model="m2", classes=CLASSES)
    path = sorted((folder / "darefine" / "runs").iterdir())[3]
    path.write_text("{}")
    code, _, err = run("undo", folder)
    assert code == 2
    assert f"The last run cannot be undone: {path} has the format None" in err
    code, out, err = run("undo", folder, "000001-1", "--json")
    assert [item["image"] for item in json.loads(out)["undone"]] == ["1", "2"]
    assert code == 2
    assert f"Error: {path.name}: " in err


@pytest.mark.parametrize("kind", ["cut off", "of another state", "gone"])
def test_undo_names_a_damaged_backup_and_goes_by_the_record(
    run: Run, folder: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with open_project(folder, engine="embedded") as project:
        predict(project, "m2", 10)
        before = {image.id: sort_objects(project, image).run for image in project.images}
    first = before["2"]
    assert first is not None
    assert first.backup is not None
    backup = folder / first.backup
    if kind == "cut off":
        damage(backup)
    elif kind == "of another state":
        shutil.copy(data_file(folder, "3"), backup)
    else:
        backup.unlink()
    code, out, _ = run("undo", folder, "--json")
    assert [(item["removed"], item["added"]) for item in json.loads(out)["undone"]] == [(1, 1)] * 3
    assert (code, backup.name in caplog.text) == (0, kind != "gone")
    with open_project(folder, engine="embedded") as project:
        for image in project.images:
            found = sort_objects(project, image)
            assert (found.run and found.run.model, [item.status for item in found.predictions]) == ("m1", ["untouched"])


def test_an_image_that_was_restored_is_said_to_be_overwritten(
    run: Run, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run("restore", folder, "2")[0] == 0
    code, out, err = run("review", folder)
    assert code == 0
    assert "Warning: train-2.tif: overwritten, not rejected: run 000002-2-" in err
    code, out, _ = run("review", folder, "--json")
    images = {image["name"]: image for image in json.loads(out)["images"]}
    (lost,) = images["train-2.tif"]["overwritten"]
    assert (lost["run"][:9], lost["num_objects"]) == ("000002-2-", 1)
    assert images["train-2.tif"]["counts"]["rejected"] == 0
    assert [item["state"] for item in json.loads(run("runs", folder, "--json")[1])["runs"]] == [
        "done", "overwritten", "done",
    ]  # fmt: skip
    code, out, _ = run("undo", folder, "--json")
    assert [item["image"] for item in json.loads(out)["undone"]] == ["1", "3"]
    assert "train-2.tif: run 000002-2-" in caplog.text


def test_overlay_passes_a_damaged_map(run: Run, folder: Path) -> None:
    damage(folder / "darefine" / "maps" / "2" / "class.tif")
    code, out, err = run("overlay", folder, "--json")
    assert code == 2
    assert [Path(path).name for path in json.loads(out)["pictures"]] == ["1-train-1.png", "3-test-3.png"]
    assert "class.tif is damaged" in err


@pytest.mark.parametrize("stain", [None, "same", "other"])
def test_places_whose_stain_is_not_that_of_training_come_first(folder: Path, stain: str | None) -> None:
    measured = {"mean": [0.2, 0.4, 0.25], "std": [0.15, 0.2, 0.12], "num_pixels": 1000}
    if stain == "other":
        measured = {**measured, "mean": [0.9, 0.05, 0.9]}
    with open_project(folder, engine="embedded") as project:
        image = project.image("3")
        parameters = {} if stain is None else {"stain": measured}
        write_back(project, image, [], model="m3", classes=CLASSES, parameters=parameters)
        places = find_places(project, [image], count=3)
    unlike = [place.unlike for place in places]
    assert len(places) == 2
    assert (max(unlike) == 0) == (stain is None)
    assert (min(unlike) == 1) == (stain == "other")


def test_marks_do_not_stand_in_the_way_of_undo(folder: Path) -> None:
    with open_project(folder, engine="embedded") as project:
        image = project.image("3")
        mark_places(project, find_places(project, [image], count=3))
        undo(project)
        assert {(record.name or "")[:6] for record in project.objects(image)} == {"Review"}


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
def test_new_files_of_a_project_have_the_mode_of_its_own(tmp_path: Path) -> None:
    project_file = shutil.copytree(TINY, tmp_path / "private") / "project.qpproj"
    project_file.chmod(0o640)
    with open_project(project_file, engine="embedded") as project:
        project_id(project)
        write_back(project, project.images[0], [], model="m1", classes=CLASSES)
    folder = project_file.parent / "darefine"
    own = [path for path in folder.rglob("*") if path.is_file() and "backups" not in path.parts]
    assert {path.name for path in own} >= {".lock", "last-run", "project.json"}
    assert {oct(path.stat().st_mode)[-3:] for path in own} == {"640"}
