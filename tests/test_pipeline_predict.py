"""Prediction of a project's images: one that fails does not stop the others, and wrong words are refused at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from darefine_qupath.checkpoint.model_file import Checkpoint, load_checkpoint, save_checkpoint
from darefine_qupath.classes import ClassMap
from darefine_qupath.cli import main
from darefine_qupath.errors import CheckpointError, ClassMapError, MissingMppError, PolygonError, PredictionError
from darefine_qupath.models import ModelConfig, build_model
from darefine_qupath.pipeline import predict
from darefine_qupath.pipeline.predict import PredictRequest, predict_project
from darefine_qupath.prediction import PredictOptions
from darefine_qupath.project import open_project
from darefine_qupath.review import WriteOptions
from darefine_qupath.tiles.spec import TileSpec
from tests.listeners import KeepingListener

TINY = Path(__file__).parents[1] / "projects" / "tiny"
OPTIONS = PredictOptions(device="cpu", precision="fp32", workers=1)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file with random weights."""
    config = ModelConfig(slice_encoder="resnet18", context_encoder="resnet18", width=8, num_classes=4)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    checkpoint = Checkpoint(
        state=build_model(config, seed=0).state_dict(),
        model=config,
        tiles=TileSpec(input_px=64, slice_um=256, context_um=1280, stride_um=256),
        classes=ClassMap(names=("Normal", "Benign", "In situ", "Invasive"), unlabelled="Normal"),
    )
    save_checkpoint(path, checkpoint)
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "project"))


Request = Callable[..., PredictRequest]


@pytest.fixture
def request_of(project: Path, model: Path) -> Request:
    return lambda **more: PredictRequest(project=project, model=model, engine="embedded", options=OPTIONS, **more)


def test_an_image_whose_polygons_fail_does_not_stop_the_others(
    request_of: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = predict._vectorize_map

    def fails_once(image, *rest):  # noqa: ANN001, ANN002, ANN202
        if image.name == "train-2.tif":
            raise PolygonError("a ring crosses itself")
        return whole(image, *rest)

    monkeypatch.setattr(predict, "_vectorize_map", fails_once)
    found = predict_project(request_of())
    errors = {outcome.image.name: outcome.error for outcome in found.outcomes}
    assert errors == {"train-1.tif": None, "train-2.tif": "a ring crosses itself", "test-3.tif": None}
    assert [outcome.written is None for outcome in found.outcomes] == [False, True, False]


def test_a_map_that_is_written_anew_while_it_is_read_gives_no_polygons(
    request_of: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = predict.vectorize

    def meanwhile(*arguments, **options):  # noqa: ANN002, ANN003, ANN202
        found = whole(*arguments, **options)
        path = next(path for path in (request_of().project / "darefine" / "maps").glob("*/scoremap.json"))
        path.write_text(path.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
        return found

    monkeypatch.setattr(predict, "vectorize", meanwhile)
    (found,) = predict_project(request_of(images=("test-3.tif",))).outcomes
    assert found.written is None
    assert "was rewritten by another process while it was being read; predict again" in (found.error or "")


def test_progress_tells_how_far_all_slides_are(request_of: Request) -> None:
    listener = KeepingListener()
    predict_project(request_of(write=None), listener=listener)
    seen = listener.slides
    assert {progress.num_slides for progress in seen} == {3}
    assert [seen[0].slides_done, seen[-1].slides_done] == [0, 2]
    left = [progress.all_seconds_left or 0.0 for progress in seen]
    assert left[0] > (seen[0].seconds_left or 0.0)
    assert left[-1] == 0.0
    # Slides that are finished already are not counted among those to come.
    listener = KeepingListener()
    (request_of().project / "darefine" / "maps" / "3" / "scoremap.json").unlink()
    predict_project(request_of(write=None), listener=listener)
    again = listener.slides
    assert {progress.slide for progress in again} == {"test-3.tif"}
    assert [again[-1].slides_done, again[-1].all_seconds_left] == [2, 0.0]


def test_the_command_reports_a_damaged_slide_and_ends_with_an_error(
    project: Path, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (project / "slides" / "train-2.tif").write_bytes(b"no image")
    with pytest.raises(SystemExit) as stopped:
        main(["predict", str(project), "--model", str(model), "--engine", "embedded", "--device", "cpu", "--json"])
    out, err = capfd.readouterr()
    assert stopped.value.code == 2
    assert "Traceback" not in err
    images = {image["name"]: image for image in json.loads(out)["images"]}
    assert "train-2.tif" in images["train-2.tif"]["error"]
    assert all(images[name]["error"] is None for name in ("train-1.tif", "test-3.tif"))
    assert images["test-3.tif"]["written"]["added"] > 0


def test_a_model_whose_weights_are_no_numbers_is_one_error(request_of: Request, model: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(model)
    state = {name: tensor.clone() for name, tensor in checkpoint.state.items()}
    next(tensor for tensor in state.values() if tensor.ndim == 4)[0, 0, 0, 0] = float("nan")
    save_checkpoint(tmp_path / "nan.safetensors", replace(checkpoint, state=state))
    with pytest.raises(CheckpointError, match=r"nan\.safetensors has weights that are not finite"):
        predict_project(replace(request_of(), model=tmp_path / "nan.safetensors"))


def test_damaged_annotations_of_one_image_do_not_stop_the_others(request_of: Request, project: Path) -> None:
    (project / "data" / "1" / "data.qpdata").write_bytes(b"damaged")
    found = predict_project(request_of(within="Invasive", write=None))
    failed, done = found.outcomes
    assert failed.image.name == "train-1.tif"
    assert "data.qpdata" in (failed.error or "")
    assert done.error is None
    assert [image.name for image in found.skipped] == ["test-3.tif"]


def test_predictions_cannot_lie_over_a_class_that_nobody_knows(request_of: Request, project: Path) -> None:
    with pytest.raises(ClassMapError, match=r"has no classes \['Invasif'\] \(--allow-overlap\); it has .*'Invasive'"):
        predict_project(request_of(write=WriteOptions(over=("Invasive", "Invasif"))))
    assert not (project / "darefine").exists()


def test_classes_of_annotations_may_be_lain_over(request_of: Request, project: Path) -> None:
    (project / "classifiers" / "classes.json").unlink()
    with open_project(project, engine="embedded") as opened:
        assert "In situ" not in [path_class.name for path_class in opened.classes]
    found = predict_project(request_of(images=("train-1.tif",), write=WriteOptions(over=("In situ",)), dry_run=True))
    assert found.outcomes[0].error is None


def test_polygons_of_a_class_that_the_model_does_not_know(request_of: Request) -> None:
    with pytest.raises(ClassMapError, match=r"does not know the classes \['Tumour'\]; it knows \['Normal'"):
        predict_project(request_of(polygons=predict.PolygonOptions(classes=("Tumour",))))


def test_only_the_classes_and_the_confidence_that_were_asked_for(request_of: Request, project: Path) -> None:
    def names(**more: object) -> list[set[str | None]]:
        polygons = predict.PolygonOptions(background=True, min_area_um2=0, **more)  # type: ignore[arg-type]
        found = predict_project(request_of(images=("test-3.tif",), polygons=polygons))
        with open_project(project, engine="embedded") as opened:
            ours = opened.annotations(found.outcomes[0].image)
        return [{record.path_class for record in ours}]

    (every,) = names()
    assert len(every) > 1
    (one,) = names(classes=(str(max(every, key=str)),))
    assert one == {max(every, key=str)}
    assert names(min_confidence=1.0) == [set()]


@pytest.mark.parametrize("mpp", [1e9, 1e-9, -1.0])
def test_a_pixel_size_that_no_slide_has(request_of: Request, mpp: float) -> None:
    found = predict_project(request_of(mpp=mpp, images=("test-3.tif",)))
    assert "it must be 0.001 to 1000" in (found.outcomes[0].error or "")
    with pytest.raises(MissingMppError, match=r"the pixel size of the slide is .*; it must be 0\.001 to 1000"):
        TileSpec(input_px=64, slice_um=256, context_um=1280, stride_um=256).at(mpp)


def test_the_command_gives_the_bounds_of_a_pixel_size(
    project: Path, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["predict", str(project), "--model", str(model), "--mpp", "1e9"])
    assert stopped.value.code == 2
    assert "'--mpp': 1000000000.0 is not in the range 0.001<=x<=1000" in capfd.readouterr().err


def test_no_image_left_to_predict_says_why(request_of: Request, project: Path) -> None:
    for number in ("1", "2", "3"):
        (project / "data" / number / "data.qpdata").write_bytes(b"damaged")
    with pytest.raises(PredictionError, match=r"No image of .* can be predicted: train-1\.tif: .*data\.qpdata"):
        predict_project(request_of(within="Invasive"))
