"""Evaluation of a project: what counts, what was trained on, and what stays as it is."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from shapely.geometry import box

from darefine_qupath.annotations import Annotation
from darefine_qupath.checkpoint.model_file import Checkpoint, read_header, save_checkpoint
from darefine_qupath.classes import ClassMap
from darefine_qupath.cli import main
from darefine_qupath.errors import PredictionError, ProjectError
from darefine_qupath.geometry import Box, Size
from darefine_qupath.metrics import ConfusionMatrix
from darefine_qupath.models import ModelConfig, build_model
from darefine_qupath.pipeline import evaluate
from darefine_qupath.pipeline.evaluate import EvaluateRequest, evaluate_project
from darefine_qupath.pipeline.identity import IDENTITY, identity_of, project_id, trained_on
from darefine_qupath.pipeline.predict import PolygonOptions, PredictRequest, predict_project
from darefine_qupath.pipeline.scoring import SlideScore, score_slide
from darefine_qupath.prediction import PredictOptions, ScoreMap, read_score_map
from darefine_qupath.prediction.area import PredictionArea
from darefine_qupath.prediction.blend import MapRows
from darefine_qupath.prediction.scoremap_writer import write_score_map
from darefine_qupath.project import ImageEntry, open_project
from darefine_qupath.review import WriteOptions
from darefine_qupath.slides import TissueMask, file_digest
from darefine_qupath.tiles.spec import TileSpec
from tests.listeners import KeepingListener

TINY = Path(__file__).parents[1] / "projects" / "tiny"
OPTIONS = PredictOptions(device="cpu", precision="fp32", workers=1)
CLASSES = ClassMap(names=("Normal", "Benign", "In situ", "Invasive"), unlabelled="Normal")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


Model = Callable[..., Path]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Writes a model file with random weights."""
    config = ModelConfig(slice_encoder="resnet18", context_encoder="resnet18", width=8, num_classes=4)

    def write(*, seed: int = 0, **provenance: object) -> Path:
        path = tmp_path_factory.mktemp("model") / "model.safetensors"
        tiles = TileSpec(input_px=64, slice_um=256, context_um=1280, stride_um=256)
        state = build_model(config, seed=seed).state_dict()
        save_checkpoint(
            path, Checkpoint(state=state, model=config, tiles=tiles, classes=CLASSES, provenance=provenance)
        )
        return path

    return write


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "project"))


def request_of(project: Path, model: Path, **more: object) -> PredictRequest:
    return PredictRequest(project=project, model=model, engine="embedded", options=OPTIONS, **more)  # type: ignore[arg-type]


def evaluation_of(project: Path, model: Path, **more: object) -> EvaluateRequest:
    return EvaluateRequest(project=project, model=model, truth=project / "truth", options=OPTIONS, **more)  # type: ignore[arg-type]


# What counts


SIZE = Size(100, 80)
IMAGE = ImageEntry(id="1", name="a.svs", uri=None, path=None, exists=False)


def a_map(folder: Path, predicted: np.ndarray, classes: ClassMap) -> ScoreMap:
    found = ScoreMap(
        folder=folder, size=SIZE, box=Box(0, 0, 200, 160), downsample=2.0, mpp=0.5, classes=classes, model_id="m",
        fingerprint="f", class_pixels=(0,) * classes.num_classes, num_slices=1,
    )  # fmt: skip
    layers = MapRows.blank(80, 100)
    layers.label[:] = predicted
    write_score_map(found, [layers])
    return found


def scored(tmp_path: Path, predicted: np.ndarray, *, classes: ClassMap = CLASSES, **more: object) -> SlideScore:
    """Score a map of a slide whose left half is drawn as Benign, and whose upper half is tissue."""
    drawn = Annotation(geometry=box(0, 0, 100, 160), path_class="Benign")
    mask = np.zeros((8, 10), bool)
    mask[:4] = True
    region = PredictionArea(tissue=TissueMask(mask, Size(200, 160)), within=more.pop("within", None))  # type: ignore[arg-type]
    found = a_map(tmp_path / "map", predicted, classes)
    return score_slide(IMAGE, found, [drawn], Size(200, 160), region=region, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("unpredicted", ["count", "ignore"])
@pytest.mark.parametrize("unlabelled", ["ignore", "Normal"])
def test_labelled_tissue_without_a_prediction_is_an_error(tmp_path: Path, unpredicted: str, unlabelled: str) -> None:
    (tmp_path / "map").mkdir()
    predicted = np.zeros((80, 100), np.uint8)
    predicted[:, :50] = 1
    predicted[:20] = 255
    found = scored(tmp_path, predicted, classes=replace(CLASSES, unlabelled=unlabelled), unpredicted=unpredicted)
    # A quarter of the slide, all of it tissue, drawn or not.
    whole = 80 * (50 if unlabelled == "ignore" else 100)
    assert (found.num_unpredicted, found.num_labelled) == (whole // 4, whole)
    assert found.unpredicted_share == 0.25
    assert found.matrix.accuracy == (1.0 if unpredicted == "ignore" else 0.75)
    assert found.matrix.iou[1] == found.matrix.recall[1] == found.matrix.accuracy
    assert found.matrix.precision[1] == 1.0


def test_glass_that_nobody_drew_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "map").mkdir()
    predicted = np.zeros((80, 100), np.uint8)
    predicted[:, :50] = 1
    predicted[40:] = 255
    found = scored(tmp_path, predicted)
    # Of the lower half, glass, what is drawn was asked for by whoever drew it.
    assert (found.num_unpredicted, found.num_labelled) == (40 * 50, 80 * 50 + 40 * 50)
    assert found.matrix.missed.tolist() == [0, 2000, 0, 0]


def test_what_was_not_asked_for_is_not_missed(tmp_path: Path) -> None:
    (tmp_path / "map").mkdir()
    predicted = np.full((80, 100), 255, np.uint8)
    predicted[:10, :10] = 1
    found = scored(tmp_path, predicted, within=box(0, 0, 20, 20))
    assert (found.num_unpredicted, found.num_labelled) == (0, 100)
    assert found.matrix.accuracy == 1.0


def test_missed_pixels_count_as_the_worst_error() -> None:
    right = ConfusionMatrix(np.diag([10, 10, 10, 10]))
    missed = ConfusionMatrix(right.counts, np.array([0, 0, 0, 10]))
    wrong = ConfusionMatrix(right.counts + 10 * np.eye(4, dtype=int)[3][:, None] * np.eye(4, dtype=int)[0])
    assert missed.bach_score == wrong.bach_score < right.bach_score == 1.0
    assert missed.accuracy == wrong.accuracy == 0.8
    assert missed.num_pixels == 50
    assert missed != right
    assert ConfusionMatrix.from_json(missed.to_json()) == missed
    assert (missed + right).missed.tolist() == [0, 0, 0, 10]
    with pytest.raises(ValueError, match=r"Missed pixels of 4 classes cannot have the shape \(2,\)"):
        ConfusionMatrix(right.counts, np.array([1, 2]))


def test_the_command_says_the_share_per_slide(
    project: Path, model_of: Model, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    truth = project / "truth"
    command = ["evaluate", str(project), "--model", str(model_of()), "--truth", str(truth), "--device", "cpu"]

    def run(*more: str) -> None:
        with pytest.raises(SystemExit) as ended:
            main([*command, *more])
        assert not ended.value.code

    run("--csv", str(tmp_path / "scores.csv"))
    assert "test-3.tif: 0.0 % of the labelled area was not predicted" in capfd.readouterr().err
    (row,) = csv.DictReader((tmp_path / "scores.csv").read_text().splitlines())
    assert (row["image"], row["id"], row["unpredicted share"]) == ("test-3.tif", "3", "0.0")
    # Someone's annotation where the scanner saw nothing.
    found = read_score_map(project / "darefine" / "maps" / "3")
    layers = MapRows(*(found.read(layer) for layer in ("class", "confidence", "margin", "runner_up")))
    layers.label[: found.size.height // 2] = 255
    write_score_map(found, [layers])
    run()
    said = capfd.readouterr().err
    assert "% of the labelled area was not predicted (taken for glass, or unreadable) and counts as wrong" in said
    scores = []
    for choice in ("count", "ignore"):
        run("--unpredicted", choice, "--json")
        scores.append(json.loads(capfd.readouterr().out))
    assert scores[0]["slides"][0]["unpredicted_share"] == scores[1]["slides"][0]["unpredicted_share"] > 0.4
    assert scores[0]["total"]["accuracy"] < 0.7 * scores[1]["total"]["accuracy"]


# What a model was trained on


def trained(project: Path, **changes: object) -> dict[str, object]:
    """Provenance of a model that was trained on images 1 and 2 of a project."""
    with open_project(project, engine="embedded") as opened:
        return {
            "project": str(opened.path),
            IDENTITY: identity_of(opened, {"1", "2"}),
            "split": {"images": {"1": "train", "2": "train", "3": "validation"}, "spatial": False},
            "images": {image.id: image.name for image in opened.images},
            **changes,
        }


def seen_in(project: Path, model: Path) -> set[str]:
    with open_project(project, engine="embedded") as opened:
        return set(trained_on(read_header(model), opened, opened.images))


def test_a_project_that_moved_or_was_copied_knows_its_images(project: Path, model_of: Model, tmp_path: Path) -> None:
    model = model_of(**trained(project))
    shutil.copytree(project, tmp_path / "a copy")
    project.rename(tmp_path / "moved")
    assert seen_in(tmp_path / "moved", model) == {"1", "2"}
    assert seen_in(tmp_path / "a copy", model) == {"1", "2"}


def test_another_project_of_the_same_names_is_another(project: Path, model_of: Model, tmp_path: Path) -> None:
    model = model_of(**trained(project))
    other = Path(shutil.copytree(TINY, tmp_path / "elsewhere" / "project"))
    for number, slide in enumerate(sorted((other / "slides").glob("*.tif"))):
        slide.write_bytes(slide.read_bytes() + bytes([number]))
    assert seen_in(other, model) == set()


def test_a_slide_is_known_in_another_project_under_another_name(project: Path, model_of: Model, tmp_path: Path) -> None:
    model = model_of(**trained(project))
    other = Path(shutil.copytree(TINY, tmp_path / "other"))
    for slide in ("train-1.tif", "test-3.tif"):
        (other / "slides" / slide).write_bytes(b"another slide")
    assert seen_in(other, model) == {"2"}


def test_a_slide_that_was_saved_anew_is_known_by_its_entry(project: Path, model_of: Model) -> None:
    model = model_of(**trained(project))
    with (project / "slides" / "train-1.tif").open("ab") as file:
        file.write(b"more")
    assert seen_in(project, model) == {"1", "2"}


def test_models_without_an_identity_are_told_by_path_or_names_in_words(
    project: Path, model_of: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    provenance = trained(project)
    del provenance[IDENTITY]
    model = model_of(**provenance)
    assert seen_in(project, model) == {"1", "2"}
    assert "is decided by its path" in caplog.text
    other = Path(shutil.copytree(project, tmp_path / "elsewhere" / "project"))
    assert seen_in(other, model) == {"1", "2"}
    assert "is decided by the ids and names of the images" in caplog.text
    listed = (other / "project.qpproj").read_text(encoding="utf-8")
    (other / "project.qpproj").write_text(listed.replace('"imageName": "train-', '"imageName": "x-'), encoding="utf-8")
    assert seen_in(other, model) == set()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"id": 7}', '{"id": "x"}'])
def test_a_damaged_project_id_is_named(project: Path, text: str) -> None:
    (project / "darefine").mkdir()
    (project / "darefine" / "project.json").write_text(text)
    with (
        open_project(project, engine="embedded") as opened,
        pytest.raises(ProjectError, match=r"darefine/project\.json is damaged: it should hold the project's id"),
    ):
        project_id(opened)


def test_a_project_keeps_its_id(project: Path) -> None:
    with open_project(project, engine="embedded") as opened:
        first = project_id(opened)
        assert first is not None
        assert project_id(opened) == first


@pytest.mark.parametrize("length", [0, 10, 70_000, 3_000_000])
def test_a_digest_is_that_of_the_bytes(tmp_path: Path, length: int) -> None:
    content = np.random.default_rng(0).bytes(length)
    for name, data in (("a", content), ("b", content), ("c", content + b"x"), ("d", b"y" + content[1:])):
        (tmp_path / name).write_bytes(data)
    assert file_digest(tmp_path / "a") == file_digest(tmp_path / "b")
    assert len({file_digest(tmp_path / name) for name in "acd"}) == 3


# What stays as it is


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_dry_run_writes_nothing_into_the_project(project: Path, model_of: Model) -> None:
    before = contents(project)
    (found,) = predict_project(request_of(project, model_of(), images=("test-3.tif",), dry_run=True)).outcomes
    assert found.num_polygons
    assert (found.error, found.to_json()["map"]) == (None, None)
    assert contents(project) == before


def test_a_dry_run_and_an_evaluation_leave_the_maps_of_another_model_alone(project: Path, model_of: Model) -> None:
    def maps() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in (project / "darefine" / "maps").rglob("*") if path.is_file()}

    model = model_of()
    predict_project(request_of(project, model, images=("test-3.tif",)))
    before = maps()
    other = request_of(project, model_of(seed=1), images=("test-3.tif",))
    everything = contents(project)
    (dry,) = predict_project(replace(other, dry_run=True)).outcomes
    assert contents(project) == everything
    assert dry.score_map is not None
    assert dry.error is None
    evaluated = evaluate_project(evaluation_of(project, other.model, images=("test-3.tif",)))
    assert evaluated.model == dry.score_map.model_id
    again = replace(request_of(project, model, dry_run=True), options=replace(OPTIONS, overlap=0.5))
    predict_project(replace(again, images=("test-3.tif",)))
    assert maps() == before
    # A map that is the same is used.
    (same,) = predict_project(replace(request_of(project, model, images=("test-3.tif",)), dry_run=True)).outcomes
    assert same.score_map == read_score_map(project / "darefine" / "maps" / "3")


def test_no_written_polygon_is_smaller_than_asked(project: Path, model_of: Model) -> None:
    model = model_of()
    polygons, write = PolygonOptions(min_area_um2=1000), WriteOptions(min_area_um2=1000)
    request = request_of(project, model, images=("test-3.tif",), polygons=polygons, write=write)
    predict_project(request)
    found = read_score_map(project / "darefine" / "maps" / "3")
    layers = MapRows(*(found.read(layer) for layer in ("class", "confidence", "margin", "runner_up")))
    noise = np.random.default_rng(0).random((found.size.height // 2, found.size.width // 2)) < 0.2
    layers.label[:] = np.kron(noise, np.ones((2, 2), int))[: found.size.height, : found.size.width]
    write_score_map(found, [layers])
    (outcome,) = predict_project(request).outcomes
    with open_project(project, engine="embedded") as opened:
        areas = [record.area * 0.25 for record in opened.annotations(outcome.image)]
    assert outcome.num_polygons == len(areas) > 2
    assert min(areas) >= 1000 - 1e-6


def test_context_scores_are_computed_on_the_device_that_was_asked_for(
    project: Path, model_of: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def score(*_: object, device: str, **__: object) -> dict[str, ConfusionMatrix]:
        asked.append(device)
        return {}

    monkeypatch.setattr(evaluate, "score_context", score)
    monkeypatch.setattr(evaluate, "choose_device", lambda name: {"cpu": torch.device("meta")}[name])
    evaluate_project(evaluation_of(project, model_of(), context=("blank",)))
    assert asked == ["meta"]


# Slides of one file name


@pytest.fixture
def twins(project: Path) -> Path:
    """A project whose first two images have one file name, in two folders."""
    (project / "slides" / "b").mkdir()
    (project / "slides" / "train-2.tif").rename(project / "slides" / "b" / "train-1.tif")
    listed = (project / "project.qpproj").read_text(encoding="utf-8")
    listed = listed.replace("slides/train-2.tif", "slides/b/train-1.tif").replace("train-2.tif", "train-1.tif")
    (project / "project.qpproj").write_text(listed, encoding="utf-8")
    return project


def test_slides_of_one_file_name_are_two_slides(
    twins: Path, model_of: Model, capfd: pytest.CaptureFixture[str]
) -> None:
    listener = KeepingListener()
    found = predict_project(request_of(twins, model_of(), write=None), listener=listener)
    assert {progress.key for progress in listener.slides} == {"1", "2", "3"}
    assert listener.slides[-1].all_seconds_left == 0.0
    assert found.titles == {"1": "train-1.tif (entry 1)", "2": "train-1.tif (entry 2)", "3": "test-3.tif"}
    marks = {read_score_map(twins / "darefine" / "maps" / number).fingerprint for number in "123"}
    assert len(marks) == 3
    (twins / "slides" / "train-1.tif").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        main(["predict", str(twins), "--model", str(model_of()), "--maps-only", "--device", "cpu"])
    out, err = capfd.readouterr()
    assert "Error: train-1.tif (entry 1): " in err
    assert "train-1.tif (entry 2)" in out


def test_a_truth_that_may_be_of_two_images_is_refused(twins: Path, model_of: Model) -> None:
    shutil.copy(twins / "truth" / "3.geojson", twins / "truth" / "train-1.geojson")
    found = evaluate_project(evaluation_of(twins, model_of()))
    assert [slide.id for slide in found.slides] == ["3"]
    assert [image.id for image in found.failed] == ["1", "2"]
    assert all("train-1.geojson could belong to any of the images 1, 2" in image.why for image in found.failed)
    with pytest.raises(PredictionError, match=r"train-1\.tif: .*could belong to any of the images 1, 2"):
        evaluate_project(evaluation_of(twins, model_of(), images=("1",)))
