"""From a project to the tiles that train: who is held back, what is drawn, which model it starts from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import torch
from click.testing import CliRunner

from darefine_qupath.annotations import Annotation
from darefine_qupath.checkpoint.model_file import Checkpoint, read_header, save_checkpoint
from darefine_qupath.cli.tiles import tiles as tiles_command
from darefine_qupath.cli.train import show_result
from darefine_qupath.cli.train import train as train_command
from darefine_qupath.errors import (
    ConfigError,
    DarefineError,
    ModelError,
    TileError,
    TrainingError,
    TrainingStoppedError,
)
from darefine_qupath.geometry import Size
from darefine_qupath.models import Normalization, build_model
from darefine_qupath.pipeline import run_record, train, train_setup
from darefine_qupath.pipeline.hard_examples import hard_weights
from darefine_qupath.pipeline.provenance import MODEL_FILE, LabelCollector, find_former_model, summarize_objects
from darefine_qupath.pipeline.selection import collect_training_images
from darefine_qupath.pipeline.settings import Settings, read_settings
from darefine_qupath.pipeline.splitting import SamplingSpec, SplitSpec, divide, hold_back, save_roles
from darefine_qupath.pipeline.tiles import TileRequest
from darefine_qupath.pipeline.train import Folds, resume_training, train_on_project
from darefine_qupath.pipeline.train_request import TrainRequest
from darefine_qupath.project import open_project
from darefine_qupath.tiles.index import TileImage, TileIndex
from darefine_qupath.tiles.scan import TileFilter, index_tiles
from darefine_qupath.tiles.slide_reader import SlideTileReader
from darefine_qupath.tiles.sources import TileSource, open_source
from darefine_qupath.tiles.spec import TileSpec
from darefine_qupath.tiles.storage import Storage
from darefine_qupath.training import RunSettings, TrainResult
from darefine_qupath.training.loader import BatchPlan, load_batches
from darefine_qupath.training.tile_dataset import TileDataset
from tests.fake_project import CLASSES, SLIDE, FakeProject, grid, ours, square, write
from tests.listeners import KeepingListener
from tests.test_pipeline_check import ProjectOfFiles, entry
from tests.tile_slides import ramps, write_pyramid
from tests.training_toy import CLASSES as TOY_CLASSES
from tests.training_toy import toy_data, toy_model

TINY = Path(__file__).parents[1] / "projects" / "tiny"
SPEC = TileSpec(input_px=10, slice_px=10, context_px=10, stride_px=10)


def index_of(**images: Mapping[str, str]) -> TileIndex:
    """Ten tiles of each image, which has this metadata."""
    found = tuple(
        TileImage(id=key, name=f"{key}.svs", size=Size(100, 10), case=metadata.get("case"), metadata=metadata)
        for key, metadata in images.items()
    )
    rows = [(number, 10 * tile, 0, 10 * tile, 0, 50, 30, 20, 0) for number in range(len(found)) for tile in range(10)]
    return TileIndex.of_rows(SPEC, CLASSES, found, rows)


def source(key: str, path: str = "", **metadata: str) -> TileSource:
    return TileSource(id=key, name=f"{key}.svs", path=Path(path or key), metadata=metadata)


# Who trains


FOUR = index_of(a={"case": "1"}, b={"case": "1"}, c={}, d={"darefine.role": "train"})


def test_images_that_are_named_validate_with_their_case() -> None:
    split = divide(FOUR, SplitSpec(validation_images=("a.svs",)), seed=0)
    assert split.images == {"a": "validation", "b": "validation", "c": "train", "d": "train"}


def test_a_name_goes_over_a_role() -> None:
    split = divide(FOUR, SplitSpec(validation_images=("d",)), seed=0)
    assert split.images == {"a": "train", "b": "train", "c": "train", "d": "validation"}


def test_roles_in_the_project_are_kept_to() -> None:
    tiles = index_of(a={"darefine.role": "validation"}, b={"darefine.role": "train"}, c={}, d={})
    assert divide(tiles, SplitSpec(), seed=0).images == {"a": "validation", "b": "train", "c": "train", "d": "train"}


def test_without_validation_everything_trains() -> None:
    assert set(divide(FOUR, SplitSpec(validation=0), seed=0).images.values()) == {"train"}


def test_nothing_left_to_train_on_is_an_error() -> None:
    with pytest.raises(TileError, match="Every annotated case has a role and none of them trains"):
        divide(index_of(a={}), SplitSpec(validation_images=("a",)), seed=0)


def test_every_case_validates_in_one_fold() -> None:
    spec = SplitSpec(folds=3)
    splits = [divide(FOUR, replace(spec, fold=fold), seed=1) for fold in (1, 2, 3)]
    for image in "abcd":
        assert sorted(split.images[image] for split in splits) == ["train", "train", "validation"]
    assert all(split.images["a"] == split.images["b"] for split in splits)


def test_folds_keep_what_is_held_back() -> None:
    tiles = index_of(a={}, b={}, c={}, d={}, e={})
    splits = [divide(tiles, SplitSpec(folds=2, fold=fold, test=0.2), seed=0) for fold in (1, 2)]
    held_back = [{image for image, role in split.images.items() if role == "test"} for split in splits]
    assert len(held_back[0]) == 1
    assert held_back[0] == held_back[1]


@pytest.mark.parametrize("named", [("a.svs",), ("a",), ("1",)], ids=["name", "id", "case"])
def test_a_test_image_is_held_back_with_its_case(named: tuple[str, ...]) -> None:
    sources = [source("a", case="1"), source("b", case="1"), source("c"), source("d", **{"darefine.role": " test "})]
    kept, held_back = hold_back(sources, named)
    assert [item.id for item in kept] == ["c"]
    assert held_back == ("a", "b", "d")


def test_holding_everything_back_is_an_error() -> None:
    with pytest.raises(TileError, match="Every annotated image is a test image"):
        hold_back([source("a")], ("a",))


def test_entries_of_one_file_are_one_case(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tif", ramps(300, 200))
    size = {"width": 300, "height": 200}
    project = ProjectOfFiles(tmp_path, [entry(path, n, **size) for n in (1, 2)])
    project.stored = dict.fromkeys("12", (Annotation(geometry=shapely.box(0, 0, 50, 50), path_class="Tumor"),))
    found = collect_training_images(project, Settings(), LabelCollector("manual")).sources
    assert found[0].known_case == found[1].known_case == str(path)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (SplitSpec, {"validation": -0.1}, "validation = -0.1 must be a share"),
        (SplitSpec, {"test": float("nan")}, "test = nan must be a share"),
        (SplitSpec, {"validation": 0.5, "test": 0.5}, "leave nothing to train on"),
        (SplitSpec, {"folds": 1}, "folds = 1 must be 2 or more"),
        (SplitSpec, {"folds": 3, "fold": 4}, "fold = 4 must be one of the folds, 1 to 3"),
        (SplitSpec, {"fold": 1}, "fold = 1 needs the number of folds too"),
        (SplitSpec, {"folds": 2, "validation_images": ("a",)}, "give folds or validation_images"),
        (SamplingSpec, {"max_per_image": -1}, "max_per_image = -1 must be a number of tiles"),
        (SamplingSpec, {"max_per_image_class": -1}, "max_per_image_class = -1 must be a number of tiles"),
        (SamplingSpec, {"hard_boost": -1.0}, "hard_boost = -1.0 must lie between"),
    ],
)
def test_nonsense_is_refused(kind: Callable[..., object], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**values)


# Settings


def test_tables_of_splits_samples_and_storage(tmp_path: Path) -> None:
    text = """
    [tiles]
    slice_px = 100
    context_px = 500
    stride_px = 50
    min_labelled = 0.2
    pixels = "webp"
    [split]
    validation = 0.3
    test_images = ["a.svs"]
    [sampling]
    max_per_image = 40
    hard_examples = "runs/first"
    """
    (tmp_path / "darefine.toml").write_text(text)
    settings = read_settings(tmp_path)
    assert settings.split_spec() == SplitSpec(validation=0.3, test_images=("a.svs",))
    assert settings.split_spec(validation=0.1, test_images=(), folds=None).validation == 0.1
    assert settings.split_spec(test_images=("b",)).test_images == ("b",)
    assert settings.sampling_spec(max_per_image_class=3) == SamplingSpec(
        max_per_image=40, max_per_image_class=3, hard_examples="runs/first"
    )
    assert settings.tile_filter() == TileFilter(min_labelled=0.2)
    assert settings.storage(quality=80) == Storage(pixels="webp", quality=80)
    assert settings.tile_spec(TileSpec.paper()).slice_px == 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[split]\nvalidaton = 0.2", r"unknown \[split\] key 'validaton'; did you mean 'validation'"),
        ("[split]\nfold = 1", r"unknown \[split\] key 'fold'"),
        ("[split]\nvalidation = 'a fifth'", r"\[split\] validation = 'a fifth' must be a number"),
        ("[split]\nfolds = 2.5", r"\[split\] folds = 2.5 must be a whole number"),
        ("[split]\ntest_images = 'a'", r"\[split\] test_images = 'a' must be a list of names"),
        ("[split]\ntest_images = [1]", r"\[split\] test_images = \[1\] must be a list of names"),
        ("[sampling]\nmax_per_image = true", r"\[sampling\] max_per_image = True must be a whole number"),
        ("[sampling]\nhard_examples = 3", r"\[sampling\] hard_examples = 3 must be a text"),
        ("[tiles]\nmin_labelled = 'some'", r"\[tiles\] min_labelled = 'some' must be a number"),
        ("[tiles]\npixels = 'png'", "stored as 'jpeg' or 'webp'"),
    ],
)
def test_wrong_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "darefine.toml").write_text(text)
    settings = read_settings(tmp_path)
    with pytest.raises(DarefineError, match=message):
        _ = (settings.split_spec(), settings.sampling_spec(), settings.tile_filter(), settings.storage())


def test_limits_leave_the_same_tiles_for_the_same_seed() -> None:
    spec = SamplingSpec(max_per_image=4)
    kept = spec.cap(FOUR, seed=2)
    assert np.bincount(kept.image).tolist() == [4, 4, 4, 4]
    assert kept.ids() == spec.cap(FOUR, seed=2).ids()
    assert kept.ids() != spec.cap(FOUR, seed=3).ids()
    assert len(SamplingSpec().cap(FOUR, seed=0)) == len(FOUR)


# Hard tiles


@pytest.fixture
def always_normal(tmp_path: Path) -> Path:
    """A model that calls everything the first class."""
    config = toy_model()
    network = build_model(config, seed=0)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    head = sorted(name for name in state if name.startswith("classifier"))
    for name in head:
        state[name].zero_()
    bias = next(name for name in head if name.endswith("bias"))
    state[bias][0] = 9.0
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, Checkpoint(state=state, model=config, tiles=toy_data(1).tiles.spec, classes=TOY_CLASSES))
    return path


def test_weights_rise_with_the_share_that_a_model_gets_wrong(always_normal: Path) -> None:
    data = toy_data(11)
    weights = hard_weights(always_normal, data, boost=3.0)
    labelled = data.tiles.counts[:, :-1]
    wrong = 1 - labelled[:, 0] / labelled.sum(axis=1)
    assert list(weights) == data.tiles.ids()
    assert list(weights.values()) == pytest.approx((1 + 3 * wrong).tolist())
    assert max(weights.values()) > 3.5


def test_a_model_of_other_tiles_or_classes_weighs_nothing(always_normal: Path) -> None:
    data = toy_data(2)
    with pytest.raises(TrainingError, match="was trained on other tiles"):
        hard_weights(always_normal, toy_data(2, size=64), boost=1)
    renamed = replace(data.tiles, classes=replace(TOY_CLASSES, names=("Normal", "Benign", "Other")))
    with pytest.raises(TrainingError, match=r"was trained on other classes \(\['Normal', 'Benign', 'Invasive'\]"):
        hard_weights(always_normal, TileDataset(renamed, data.reader), boost=1)


# What it learns from


def test_reviewed_labels_are_noted_object_by_object(tmp_path: Path) -> None:
    project = FakeProject(tmp_path)
    drawn = project.draw(square(0, 5000), "Benign")
    write(project, grid(3))
    accepted, rejected, untouched = ours(project)
    project.edit(accepted.id, locked=True)
    project.delete(rejected.id)
    learnt = LabelCollector("reviewed")
    found = learnt(project, SLIDE)
    assert untouched.id not in {record.id for record in found}
    assert learnt.objects["7"] == {
        "drawn": (str(drawn.id),),
        "reviewed": (str(accepted.id),),
        "rejected": (str(rejected.id),),
    }
    assert {key: summarize_objects(learnt.objects)[key] for key in ("drawn", "reviewed", "rejected")} == {
        "drawn": 1,
        "reviewed": 1,
        "rejected": 1,
    }
    manual = LabelCollector("manual")
    assert [record.id for record in manual(project, SLIDE)] == [drawn.id]
    assert summarize_objects(manual.objects)["sha256"] != summarize_objects(learnt.objects)["sha256"]
    assert learnt.of({"8"}) == {}


def test_the_model_that_was_reviewed_is_found(
    tmp_path: Path, always_normal: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = read_header(always_normal).model_id
    project = FakeProject(tmp_path)
    assert find_former_model(project) is None
    write(project, grid(2), model="older")
    assert find_former_model(project) is None
    assert "The model older, whose predictions were reviewed, cannot be found; give it with --from" in caplog.text
    write(project, grid(2, shift=50.0), model=model, parameters={MODEL_FILE: str(always_normal)})
    assert find_former_model(project) == always_normal
    always_normal.unlink()
    assert find_former_model(project) is None
    assert f"cannot be found at {always_normal}" in caplog.text


# The whole way, with a training that only notes what it was given


class Trained:
    """Stands for `train`: keeps its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[TileDataset, TileDataset | None, dict[str, Any]]] = []
        self.stop_at = 0

    def __call__(self, data: TileDataset, validation: TileDataset | None, **more: Any) -> TrainResult:  # noqa: ANN401
        self.calls.append((data, validation, more))
        out = more["out"]
        settings = RunSettings(
            model=more["model"],
            train=more["config"],
            tiles=more["tile_spec"],
            classes=more["class_map"],
            normalization=Normalization(),
            provenance=more["provenance"],
        )
        (out / "config.json").write_text(json.dumps(settings.to_json()))
        if len(self.calls) == self.stop_at:
            (out / "state.safetensors").touch()
            raise TrainingStoppedError("SIGINT ended training")
        return TrainResult(folder=out, best=out / "a", last=out / "b", metrics={}, epochs=1, is_early=False)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    stub = Trained()
    monkeypatch.setattr(train, "train", stub)
    return stub


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "project"))


def request(project: Path, out: Path, **more: Any) -> TrainRequest:  # noqa: ANN401
    return TrainRequest(tiles=TileRequest(project=project, workers=1), out=out, on_the_fly=True, **more)


def test_a_run_notes_what_it_learns_from(tiny: Path, tmp_path: Path, trained: Trained) -> None:
    out = tmp_path / "run"
    wanted = request(
        tiny, out, split={"validation_images": ("train-2.tif",)}, sampling={"max_per_image": 30}, save_roles=True
    )
    assert isinstance(train_on_project(wanted), TrainResult)
    data, validation, more = trained.calls[0]
    assert {image.name for image in (data.tiles[n].image for n in range(len(data)))} == {"train-1.tif"}
    assert len(data) == 30
    assert validation is not None
    assert len(validation) > 30
    labels = json.loads((out / "labels.json").read_text())
    with open_project(tiny, engine="embedded") as project:
        images = {image.name: image for image in project.images}
        drawn = [str(record.id) for record in project.annotations(images["train-1.tif"])]
        assert {name: image.metadata.get("darefine.role") for name, image in images.items()} == {
            "train-1.tif": "train",
            "train-2.tif": "validation",
            "test-3.tif": "test",
        }
    assert labels == {
        "labels": "manual",
        "objects": {images["train-1.tif"].id: {"drawn": drawn, "reviewed": [], "rejected": []}},
    }
    assert more["provenance"]["objects"]["drawn"] == len(drawn)
    assert more["hard"] is None
    resume_training(out)
    assert trained.calls[1][0].tiles.ids() == data.tiles.ids()
    assert trained.calls[1][2]["resume"]


def train_light(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_installed: bool = True, **recipe: object
) -> list[str]:  # fmt: skip
    """Train as on a machine without a GPU, with no word about the network; give what was announced."""
    settings = tmp_path / "light.toml"
    settings.write_text((TINY / "darefine.toml").read_text().split("[model]")[0])
    monkeypatch.setattr(train_setup.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train_setup, "find_spec", lambda _: object() if is_installed else None)
    tiles = TileRequest(project=tiny, settings=settings, workers=1)
    listener = KeepingListener()
    wanted = TrainRequest(tiles=tiles, out=tmp_path / "run", on_the_fly=True, train=recipe)
    train_on_project(wanted, listener=listener)
    return listener.notices


def test_without_a_gpu_the_light_network_is_the_default(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Trained
) -> None:
    said = train_light(tiny, tmp_path, monkeypatch)
    model = trained.calls[0][2]["model"]
    assert (model.slice_encoder, model.context_encoder, model.width) == ("efficientnet-lite0", "efficientnet-lite0", 64)
    assert said[0].startswith("DA-RefineNet (attention), efficientnet-lite0 + efficientnet-lite0, width 64: 121 tiles")
    assert said[1].startswith("Without a GPU the default is a light network (efficientnet-lite0, width 64)")
    assert said[2] == "Gradients are clipped to norm 1: with efficientnet-lite0 the paper's recipe needs that"
    assert trained.calls[0][2]["config"].grad_clip_norm == 1


def test_without_the_light_package_a_resnet_starts_and_says_what_to_install(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Trained
) -> None:
    said = train_light(tiny, tmp_path, monkeypatch, is_installed=False)
    assert trained.calls[0][2]["model"].slice_encoder == "resnet18"
    assert said[2].endswith("comes with: pip install 'darefine-qupath[light]'")


@pytest.mark.parametrize(
    "recipe", [{"grad-clip-norm": 5.0}, {"grad_clip_norm": 5.0}, {"preset": "modern", "grad_clip_norm": 5.0}]
)
def test_a_norm_that_was_given_stays(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Trained, recipe: dict[str, Any]
) -> None:
    said = train_light(tiny, tmp_path, monkeypatch, **recipe)
    assert trained.calls[0][2]["config"].grad_clip_norm == 5
    assert not any("clipped" in sentence for sentence in said)


def test_encoder_weights_are_looked_at_before_any_tile_is_cut(tiny: Path, tmp_path: Path, trained: Trained) -> None:
    with pytest.raises(ModelError, match=r"There is no file .*none\.pth"):
        train_on_project(request(tiny, tmp_path / "run", train={"encoder_weights": str(tmp_path / "none.pth")}))
    assert not (tmp_path / "run").exists()
    assert trained.calls == []


def test_folds_share_their_tiles_and_train_one_after_the_other(tiny: Path, tmp_path: Path, trained: Trained) -> None:
    wanted = replace(request(tiny, tmp_path / "run", split={"folds": 2}), on_the_fly=False)
    result = train_on_project(wanted)
    assert isinstance(result, Folds)
    assert [item.folder.name for item in result.results] == ["fold-1", "fold-2"]
    first, second = trained.calls
    assert first[1] is not None
    assert second[1] is not None
    assert set(first[0].tiles.ids()) == set(second[1].tiles.ids())
    assert set(first[1].tiles.ids()) == set(second[0].tiles.ids())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "fold-1", "fold-2", "labels.json", "request.json", "settings.toml", "tiles",
    ]  # fmt: skip
    with pytest.raises(TrainingError, match="holds a training run already"):
        train_on_project(wanted)
    assert isinstance(resume_training(tmp_path / "run"), Folds)
    assert [call[2]["resume"] for call in trained.calls] == [False, False, True, True]
    with pytest.raises(ConfigError, match="so images have no roles to save"):
        train_on_project(replace(wanted, out=tmp_path / "other", save_roles=True))


def test_folds_that_could_not_begin_leave_their_tiles_and_a_free_folder(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Trained
) -> None:
    def refusing(*_: object, out: Path, **__: object) -> TrainResult:
        (out / "config.json").write_text("{}")
        raise TrainingError("epochs = 0 is no training")

    run = tmp_path / "run"
    wanted = replace(request(tiny, run, split={"folds": 2}), on_the_fly=False)
    monkeypatch.setattr(train, "train", refusing)
    with pytest.raises(TrainingError, match="is no training"):
        train_on_project(wanted)
    cut = (run / "tiles" / "dataset.json").stat().st_mtime_ns
    monkeypatch.setattr(train, "train", trained)
    assert isinstance(train_on_project(wanted), Folds)
    assert (run / "tiles" / "dataset.json").stat().st_mtime_ns == cut


def test_folds_go_on_with_their_tiles_whatever_happens_to_the_project(
    tiny: Path, tmp_path: Path, trained: Trained
) -> None:
    wanted = replace(request(tiny, tmp_path / "run", split={"folds": 2}), on_the_fly=False)
    trained.stop_at = 1
    with pytest.raises(TrainingStoppedError):
        train_on_project(wanted)
    shutil.rmtree(tiny)
    resume_training(tmp_path / "run")
    first, second = trained.calls[-2:]
    assert [call[2]["resume"] for call in (first, second)] == [True, False]
    assert first[1] is not None
    assert set(second[0].tiles.ids()) == set(first[1].tiles.ids())
    labels = [json.loads((tmp_path / "run" / f"fold-{fold}" / "labels.json").read_text()) for fold in (1, 2)]
    assert all(item["objects"] for item in labels)
    assert not labels[0]["objects"].keys() & labels[1]["objects"].keys()


def test_a_run_goes_on_without_its_project(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Trained, always_normal: Path
) -> None:
    out = tmp_path / "run"
    (tiny / "darefine.toml").write_text('[classes]\nunlabelled = "Normal"\n[sampling]\nmax_per_image = 9\n')
    monkeypatch.chdir(tmp_path)
    coarse = {"slice_um": 256, "context_um": 640, "stride_um": 256}
    tiles = TileRequest(project=Path("project"), workers=1, tiles=coarse)
    recipe = {"epochs": 7, "device": "cpu"}
    train_on_project(TrainRequest(tiles=tiles, out=out, init_from=always_normal, train=recipe))
    # Neither project nor model is there any longer, and this machine has other defaults.
    shutil.rmtree(tiny)
    always_normal.unlink()
    monkeypatch.chdir("/")
    monkeypatch.setattr(train_setup.torch.cuda, "is_available", lambda: True)
    resume_training(out, changes={"workers": 3})
    (first, _, was), (again, _, now) = trained.calls
    assert again.tiles.ids() == first.tiles.ids()
    assert now["config"] == replace(was["config"], workers=3)
    assert all(now[key] == was[key] for key in ("model", "tile_spec", "class_map", "provenance"))


def test_tiles_that_are_others_by_now_are_refused(tiny: Path, tmp_path: Path, trained: Trained) -> None:
    train_on_project(replace(request(tiny, tmp_path / "run"), on_the_fly=False))
    file = tmp_path / "run" / "tiles" / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "digest": "other"}))
    with pytest.raises(TrainingError, match=r"are not those that .* began with; start a new run"):
        resume_training(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "tiles")
    with pytest.raises(TileError, match="holds no finished dataset"):
        resume_training(tmp_path / "run")
    assert len(trained.calls) == 1


def test_what_a_resumed_run_would_pass_over_is_refused(tmp_path: Path) -> None:
    for given in (["--encoder", "resnet18"], ["--preset", "modern"], ["--min-labelled", "0.5"]):
        result = CliRunner().invoke(train_command, ["--resume", str(tmp_path), *given])
        assert result.exit_code == 2
        assert f"its own tiles, network and recipe: leave {given[0]} out" in result.output


def test_hard_tiles_come_from_a_former_model(
    tiny: Path, tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        run_record, "hard_weights", lambda path, data, **_: asked.append(path) or dict.fromkeys(data.tiles.ids(), 2.0)
    )
    (tmp_path / "former").mkdir()
    out = tmp_path / "run"
    train_on_project(request(tiny, out, sampling={"hard_examples": str(tmp_path / "former")}))
    data, _, more = trained.calls[0]
    assert asked == [tmp_path / "former" / "model.safetensors"]
    assert more["hard"] == dict.fromkeys(data.tiles.ids(), 2.0)
    resume_training(out)
    assert len(asked) == 1
    assert trained.calls[1][2]["hard"] == more["hard"]


def test_reviewed_labels_go_on_from_the_model_that_was_reviewed(
    tiny: Path, tmp_path: Path, trained: Trained, always_normal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "find_former_model", lambda _: always_normal)
    (tiny / "darefine.toml").write_text('[classes]\nunlabelled = "Normal"\n')
    base = request(tiny, tmp_path / "a")
    reviewed = replace(base, tiles=replace(base.tiles, labels="reviewed"))
    train_on_project(reviewed)
    assert trained.calls[0][2]["init_from"] == always_normal
    # Network and tiles are those of the former model where nothing else is asked for.
    assert trained.calls[0][2]["model"].width == toy_model().width
    assert trained.calls[0][2]["tile_spec"] == toy_data(1).tiles.spec
    train_on_project(replace(reviewed, out=tmp_path / "b", fine_tune=False))
    assert trained.calls[1][2]["init_from"] is None
    train_on_project(replace(base, out=tmp_path / "c"))
    assert trained.calls[2][2]["init_from"] is None
    monkeypatch.setattr(train, "find_former_model", lambda _: None)
    resume_training(tmp_path / "a")
    assert trained.calls[3][2]["init_from"] == always_normal


def test_the_network_is_that_of_the_model_that_is_started_from(
    tiny: Path, tmp_path: Path, trained: Trained, always_normal: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started = request(tiny, tmp_path / "a", init_from=always_normal)
    train_on_project(started)
    assert trained.calls[0][2]["model"] == toy_model(num_classes=4)
    # The settings of the project name resnet18, the model another network.
    assert "slice_encoder" in caplog.text
    assert "apply to new models only" in caplog.text
    other = replace(started, out=tmp_path / "b", model={"width": 48})
    with pytest.raises(TrainingError, match="it cannot start"):
        train_on_project(other)
    assert not (tmp_path / "b").exists()


def test_roles_are_written_once(tiny: Path) -> None:
    with open_project(tiny, engine="embedded") as project:
        ids = [image.id for image in project.images]
    roles = {ids[0]: "train", ids[1]: "validation"}
    assert save_roles(tiny, roles) == 2  # type: ignore[arg-type]
    assert save_roles(tiny, roles) == 0  # type: ignore[arg-type]
    with open_project(tiny, engine="embedded") as project:
        assert [image.metadata.get("darefine.role") for image in project.images][:2] == ["train", "validation"]


def test_options_of_tiles_and_train_are_the_same() -> None:
    shared = {
        "validation",
        "test",
        "validation_images",
        "test_images",
        "save_roles",
        "pixels",
        "unlabelled",
        "input_px",
    }
    for command in (tiles_command, train_command):
        assert shared <= {option.name for option in command.params}


# Handles and worker processes


def noting_opener(source: TileSource) -> Any:  # noqa: ANN401 - a slide
    """Open a slide and note the process that does."""
    log = Path(source.metadata["log"])
    slide = open_source(source)
    with log.open("a") as file:
        file.write(f"{os.getpid()} {slide.reader}\n")
    return slide


def test_workers_open_their_own_handles(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tif", ramps(600, 400), (2, 4))
    marked = Annotation(geometry=shapely.box(0, 0, 600, 400), path_class="Normal")
    log = tmp_path / "log"
    origin = TileSource(id="1", name="a", path=path, annotations=(marked,), metadata={"log": str(log)})
    spec = TileSpec(input_px=20, slice_px=100, context_px=200, stride_px=100)
    tiles = index_tiles([origin], spec, CLASSES)
    reader = SlideTileReader([origin], CLASSES, opener=noting_opener)
    here = [reader.read(tiles[position]) for position in range(4)]
    planned = [BatchPlan(epoch=0, step=n, tiles=(2 * n, 2 * n + 1), positions=(0, 1)) for n in range(2)]
    batches = [loaded.batch for loaded in load_batches(TileDataset(tiles, reader), planned, workers=2)]
    found = torch.cat([batch.slices for batch in batches]).permute(0, 2, 3, 1).numpy()
    assert (found == np.stack([pixels.slice for pixels in here])).all()
    opened = [line.split() for line in log.read_text().splitlines()]
    assert opened[0][0] == str(os.getpid())
    assert os.getpid() not in {int(pid) for pid, _ in opened[1:]}
    # The reader that this process has used is used there too: its threads were not forked.
    assert {name for _, name in opened} == {opened[0][1]}


@pytest.mark.parametrize(
    ("miou", "blank", "ending"),
    [
        (0.8, 0.4, "0.400 with blank ones"),
        (0.8, 0.79, "hardly uses its context."),
        (0.4, 0.41, "hardly uses its context."),
        (0.4, 0.6, "--fusion aligned or --input single may help."),
    ],
)
def test_training_ends_with_what_the_context_was_worth(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, miou: float, blank: float, ending: str
) -> None:
    result = TrainResult(
        folder=tmp_path,
        best=tmp_path / "model.safetensors",
        last=tmp_path / "last.safetensors",
        metrics={"iou": {"Normal": miou}},
        epochs=1,
        is_early=False,
        context_miou=(miou, blank),
    )
    show_result(result, as_json=False)
    [said] = [line for line in capsys.readouterr().err.splitlines() if "context" in line]
    assert said.startswith(f"mIoU after the last epoch: {miou:.3f} with the tiles' contexts, {blank:.3f} with blank")
    assert said.endswith(ending)
    show_result(result, as_json=True)
    assert json.loads(capsys.readouterr().out)["context"] == {"miou": miou, "miou_with_blank_contexts": blank}
