"""One bad image never ends a command over a project: a line names it, and the others go on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from darefine_qupath.annotations import Annotation
from darefine_qupath.checkpoint.model_file import Checkpoint, save_checkpoint
from darefine_qupath.classes import ClassMap
from darefine_qupath.errors import DarefineError
from darefine_qupath.models import ModelConfig, build_model
from darefine_qupath.pipeline import check, selection
from darefine_qupath.pipeline.annotation_export import export_geojson
from darefine_qupath.pipeline.check import check_project
from darefine_qupath.pipeline.evaluate import EvaluateRequest, evaluate_project
from darefine_qupath.pipeline.info import summarize
from darefine_qupath.pipeline.predict import PredictRequest, predict_project
from darefine_qupath.pipeline.selection import collect_training_images
from darefine_qupath.pipeline.settings import read_settings
from darefine_qupath.prediction import PredictOptions
from darefine_qupath.project import Project, open_project
from darefine_qupath.tiles.spec import TileSpec
from tests.conftest import DATA, Run

TINY = Path(__file__).parents[1] / "projects" / "tiny"
BAD = "train-2.tif"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "project"))


def damaged_data(folder: Path) -> None:
    shutil.copy(DATA / "hostile" / "qpdata-B-4991.qpdata", folder / "data" / "2" / "data.qpdata")


def pipe(folder: Path) -> None:
    path = folder / "data" / "2" / "data.qpdata"
    path.unlink()
    os.mkfifo(path)


def dangling_link(folder: Path) -> None:
    path = folder / "data" / "2" / "data.qpdata"
    path.unlink()
    path.symlink_to(folder / "disk that is not mounted")


def no_image(folder: Path) -> None:
    (folder / "slides" / BAD).write_bytes(b"II*\0" + bytes(range(256)))


def missing_image(folder: Path) -> None:
    (folder / "slides" / BAD).unlink()


DATA_FAULTS: list[Callable[[Path], None]] = [damaged_data]
if os.name != "nt":
    DATA_FAULTS += [pipe, dangling_link]
FAULTS = [*DATA_FAULTS, no_image, missing_image]


def names_of(faults: list[Callable[[Path], None]]) -> list[str]:
    return [fault.__name__ for fault in faults]


@pytest.mark.parametrize("fault", FAULTS, ids=names_of(FAULTS))
def test_info_and_check_name_it(folder: Path, fault: Callable[[Path], None]) -> None:
    fault(folder)
    with open_project(folder, engine="embedded") as project:
        images = {image.entry.name: image for image in summarize(project).images}
        findings = check_project(project, read_settings(folder))
    assert [name for name, image in images.items() if image.problem] == ([] if fault is no_image else [BAD])
    assert images["train-1.tif"].num_objects == 4
    assert [finding.image for finding in findings if finding.level == "error"] == [BAD]


@pytest.mark.parametrize("fault", FAULTS, ids=names_of(FAULTS))
def test_tiles_and_training_leave_it_out_by_name(folder: Path, fault: Callable[[Path], None]) -> None:
    fault(folder)
    with open_project(folder, engine="embedded") as project:
        training_set = collect_training_images(
            project, read_settings(folder), lambda opened, image: opened.annotations(image)
        )
    assert [source.name for source in training_set.sources] == ["train-1.tif"]
    assert [image.name for image in training_set.skipped] == [BAD]


@pytest.mark.parametrize("fault", DATA_FAULTS, ids=names_of(DATA_FAULTS))
@pytest.mark.parametrize("what", ["--geojson", "--labels"])
def test_the_others_are_exported(folder: Path, run: Run, fault: Callable[[Path], None], what: str) -> None:
    fault(folder)
    code, out, err = run("export", folder, what, folder / "out")
    assert code == 2
    assert f"Error: {BAD}: " in err
    assert "1." in out
    assert "2." not in out
    code, out, _ = run("export", folder, what, folder / "out", "--json")
    assert (code, list(json.loads(out)["errors"])) == (2, [BAD])


def test_without_a_listener_an_export_raises(folder: Path) -> None:
    damaged_data(folder)
    with open_project(folder, engine="embedded") as project, pytest.raises(DarefineError, match="where a whole number"):
        export_geojson(project, folder / "out")


def test_an_error_that_nobody_has_thought_of_is_that_images(
    folder: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    whole = Project.annotations

    def fails(project: Project, image: selection.ImageEntry) -> tuple[Annotation, ...]:
        if image.name == BAD:
            raise ZeroDivisionError("float division by zero")
        return whole(project, image)

    monkeypatch.setattr(Project, "annotations", fails)
    monkeypatch.setattr(check, "_find_copies", lambda _: [])
    for words in (("check",), ("export", "--geojson", str(folder / "out"))):
        code, out, err = run(words[0], folder, *words[1:])
        assert code in (1, 2)
        assert f"{BAD}: float division by zero" in out + err


@pytest.fixture
def request_of(folder: Path, tmp_path: Path) -> Callable[..., PredictRequest]:
    torch.set_num_threads(1)
    options = PredictOptions(device="cpu", precision="fp32", workers=1)
    config = ModelConfig(slice_encoder="resnet18", context_encoder="resnet18", width=8, num_classes=4)
    model = tmp_path / "model.safetensors"
    checkpoint = Checkpoint(
        state=build_model(config, seed=0).state_dict(),
        model=config,
        tiles=TileSpec(input_px=64, slice_um=256, context_um=1280, stride_um=256),
        classes=ClassMap(names=("Normal", "Benign", "In situ", "Invasive"), unlabelled="Normal"),
    )
    save_checkpoint(model, checkpoint)
    return lambda **more: PredictRequest(project=folder, model=model, engine="embedded", options=options, **more)


@pytest.mark.parametrize("fault", [*DATA_FAULTS[:1], no_image], ids=names_of([*DATA_FAULTS[:1], no_image]))
def test_the_others_are_predicted(
    folder: Path, request_of: Callable[..., PredictRequest], fault: Callable[[Path], None]
) -> None:
    fault(folder)
    outcomes = {outcome.image.name: outcome for outcome in predict_project(request_of()).outcomes}
    assert {name: outcome.error is None for name, outcome in outcomes.items()} == {
        "train-1.tif": True,
        BAD: False,
        "test-3.tif": True,
    }


@pytest.mark.parametrize("fault", [*DATA_FAULTS[:1], no_image], ids=names_of([*DATA_FAULTS[:1], no_image]))
def test_the_others_are_evaluated(
    folder: Path, request_of: Callable[..., PredictRequest], fault: Callable[[Path], None]
) -> None:
    fault(folder)
    found = evaluate_project(
        EvaluateRequest(
            project=folder, model=request_of().model, options=request_of().options, images=("train-1.tif", BAD)
        )
    )
    assert [slide.image for slide in found.slides] == ["train-1.tif"]
    assert [image.name for image in found.failed] == [BAD]
    assert found.to_json()["failed"][0]["name"] == BAD
