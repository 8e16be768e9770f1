"""Files of ours that came back changed: whatever stands in them, they are read, or refused in one line."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from darefine_qupath.checkpoint.describe import describe
from darefine_qupath.checkpoint.model_file import Checkpoint, read_header, save_checkpoint
from darefine_qupath.classes import ClassMap
from darefine_qupath.errors import CheckpointError, DarefineError
from darefine_qupath.geometry import Box, Size
from darefine_qupath.models import ModelConfig, build_model
from darefine_qupath.pipeline.tiles import TileRequest
from darefine_qupath.pipeline.train import resume_training
from darefine_qupath.pipeline.train_request import TrainRequest
from darefine_qupath.prediction import ScoreMap, read_score_map
from darefine_qupath.prediction.blend import MapRows
from darefine_qupath.prediction.scoremap_writer import write_score_map
from darefine_qupath.prediction.slide_warnings import SlideWarning
from darefine_qupath.tiles.dataset import FORMAT, VERSION, DatasetReader, load_index
from darefine_qupath.tiles.spec import TileSpec
from darefine_qupath.training import TrainConfig
from darefine_qupath.training.runfolder import RunSettings, read_run
from darefine_qupath.training.state import load_state, read_trained
from tests.conftest import Run
from tests.fuzzing import json_mutants

if TYPE_CHECKING:
    from darefine_qupath.training.train_step import Stepper

PROJECT = Path(__file__).parents[1] / "projects" / "tiny"

TINY = ModelConfig(network="unet", width=4, num_classes=2)


def refused_or_read(read: Callable[[], object], name: str) -> bool:
    said = None
    try:
        read()
    except DarefineError as error:
        said = str(error)
    if said is not None:
        assert name in said
        assert len(said.splitlines()) == 1
    return said is None


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoint = Checkpoint(
        state=build_model(TINY, seed=1).state_dict(),
        model=TINY,
        tiles=TileSpec(input_px=64, slice_um=100, context_um=400, stride_um=50),
        classes=ClassMap(names=("a", "b"), sources={"old a": "a"}),
        provenance={
            "project": "p/project.qpproj",
            "split": {"images": {"1": "train"}, "spatial": False},
            "images": {"1": "x.svs"},
            "mpp": [0.5],
            "stain": {"mean": [0.1, 0.2, 0.3], "std": [0.1, 0.1, 0.1], "num_pixels": 5},
        },
    )
    save_checkpoint(tmp_path / "model.safetensors", checkpoint)
    return tmp_path / "model.safetensors"


def test_a_model_file_with_anything_in_its_header(model: Path, tmp_path: Path) -> None:
    header = read_header(model).to_json()
    file = tmp_path / "other.safetensors"
    read = 0
    for text in json_mutants(header, random.Random(1)):
        save_file({"x": torch.zeros(1)}, file, metadata={"darefine": text.encode("utf-8", "replace").decode()})
        read += refused_or_read(lambda: describe(file), "other.safetensors")
    assert read > 10


def test_a_model_file_nested_without_end(run: Run, shared: Path) -> None:
    model = shared / "faults" / "hostile" / "model-deepmeta.safetensors"
    for words in (("show", model), ("predict", PROJECT, "--model", model), ("onnx", model, "-o", "x.onnx")):
        code, out, err = run(*words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "model-deepmeta.safetensors has a damaged header: it is nested more than" in err


@pytest.mark.parametrize("key", ["width", "num_classes", "dropout"])
@pytest.mark.parametrize("value", ["10000000", "1e7", "9" * 5000, "NaN", "1e308", "-1", '"²"'])
def test_a_network_of_a_size_without_sense(model: Path, key: str, value: str) -> None:
    text = json.dumps(read_header(model).to_json())
    found = f'"{key}": {json.dumps(getattr(TINY, key))}'
    assert found in text
    save_file({"x": torch.zeros(1)}, model, metadata={"darefine": text.replace(found, f'"{key}": {value}')})
    with pytest.raises(CheckpointError, match=r"model\.safetensors has a damaged header: ") as caught:
        read_header(model)
    assert len(str(caught.value)) < 1000


def test_a_run_whose_files_hold_anything(tmp_path: Path, model: Path) -> None:
    header = read_header(model)
    settings = RunSettings(
        model=TINY,
        train=TrainConfig(epochs=1),
        tiles=header.tiles,
        classes=header.classes,
        normalization=header.normalization,
    )
    (tmp_path / "run").mkdir()
    config, request = tmp_path / "run" / "config.json", tmp_path / "run" / "request.json"
    for text in json_mutants(settings.to_json(), random.Random(1)):
        config.write_text(text, encoding="utf-8")
        refused_or_read(lambda: read_run(config.parent), "config.json")
    config.unlink()
    wanted = TrainRequest(tiles=TileRequest(project=tmp_path / "none"), out=tmp_path)
    for text in json_mutants(wanted.to_json(), random.Random(1)):
        request.write_text(text, encoding="utf-8")
        refused_or_read(lambda: resume_training(request.parent), "")


def test_a_training_state_with_anything_in_its_header(tmp_path: Path) -> None:
    header = {
        "format": "darefine-training-state",
        "version": 2,
        "step": 3,
        "counters": {"epoch": 1, "step": 0, "best_miou": None, "is_finished": False},
        "trained": ["slice"],
        "scaler": {},
    }
    file = tmp_path / "state.safetensors"
    for text in json_mutants(header, random.Random(1)):
        save_file({"x": torch.zeros(1)}, file, metadata={"darefine": text.encode("utf-8", "replace").decode()})
        refused_or_read(lambda: read_trained(file), "state.safetensors")
        refused_or_read(lambda: load_state(file, cast("Stepper", None)), "state.safetensors")


def test_a_score_map_that_says_anything(tmp_path: Path) -> None:
    classes = ClassMap(names=("a", "b"))
    found = ScoreMap(
        folder=tmp_path, size=Size(8, 8), box=Box(0, 0, 64, 64), downsample=8.0, mpp=0.25, classes=classes,
        model_id="m", fingerprint="f", class_pixels=(1, 1), num_slices=1,
        warnings=(SlideWarning(kind="mpp", message="coarse", value=2.0),),
    )  # fmt: skip
    blank = np.zeros((8, 8), np.uint8)
    write_score_map(found, [MapRows(blank, blank, blank, blank)])
    file = tmp_path / "scoremap.json"
    for text in json_mutants(json.loads(file.read_text()), random.Random(1)):
        file.write_text(text, encoding="utf-8")
        if refused_or_read(lambda: read_score_map(tmp_path), str(tmp_path)):
            read_score_map(tmp_path).areas_mm2()
            read_score_map(tmp_path).shares()


def test_a_dataset_whose_index_holds_anything(tmp_path: Path) -> None:
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "spec": TileSpec(input_px=64, slice_px=100, context_px=400, stride_px=50).to_json(),
        "classes": ClassMap(names=("a", "b")).to_json(),
        "storage": {"pixels": "jpeg", "quality": 90},
        "images": [{"id": "1", "name": "x", "size": [9, 9], "mpp": 0.5, "case": None, "metadata": {"a": "b"}}],
        "num_tiles": 1,
        "digest": "d",
    }
    tile = {"image": "1", "slice": [0, 0, 100, 100], "context": [0, 0, 400, 400], "counts": [1, 2], "ignored": 3}
    index, tiles = tmp_path / "dataset.json", tmp_path / "tiles.jsonl"
    tiles.write_text(json.dumps(tile) + "\n")
    for text in json_mutants(manifest, random.Random(1)):
        index.write_text(text, encoding="utf-8")
        refused_or_read(lambda: load_index(tmp_path)[0], str(tmp_path))
        refused_or_read(lambda: DatasetReader(tmp_path), str(tmp_path))
    index.write_text(json.dumps(manifest))
    for text in json_mutants(tile, random.Random(1)):
        tiles.write_text(text + "\n", encoding="utf-8")
        refused_or_read(lambda: load_index(tmp_path)[0], str(tmp_path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here")
@pytest.mark.parametrize("name", ["settings.toml", "model.safetensors"])
def test_a_pipe_in_the_place_of_a_file_does_not_hang(run: Run, tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    option = "--settings" if name.endswith("toml") else "--model"
    words = ("check", PROJECT) if option == "--settings" else ("predict", PROJECT)
    code, _, err = run(*words, option, tmp_path / name)
    assert code == 2
    assert name in err


@pytest.mark.parametrize(
    "text",
    ["a = " + "[" * 900, "[train]\nlr = nan", "[classes]\nnames = ['\x1b']", "x = 1" + "0" * 5000, "a." * 900 + "b = 1",
     "[classes.colors]\na = '#fff'", "[classes.colors]\na = '#ab cde'", "[images]\nmpp = 1e300",
     "[tiles]\ninput_px = 10000000", "[tiles]\nslice_um = 1e300\ncontext_um = 1e300\nstride_um = 1e300",
     "[model]\nwidth = 10000000", "[train]\nepochs = '²'"],
)  # fmt: skip
def test_settings_of_any_kind_are_refused_in_a_line(run: Run, tmp_path: Path, text: str) -> None:
    (tmp_path / "x.toml").write_text(text, encoding="utf-8")
    for words in (("train", PROJECT, "-o", tmp_path / "run", "--encoder-weights", "none"),):
        code, out, err = run(*words, "--settings", tmp_path / "x.toml")
        assert (code, out) == (2, "")
        assert err.splitlines()[-1].startswith("Error: ")
        assert len(err.splitlines()[-1]) < 1000


@pytest.mark.parametrize("kind", ["missing", "pipe", "noise", "folder", "loop"])
def test_a_slide_that_cannot_be_read_is_left_out_with_a_count(
    run: Run, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    project = Path(shutil.copytree(PROJECT, tmp_path / "project"))
    slide = project / "slides" / "train-1.tif"
    slide.unlink()
    if kind == "pipe":
        os.mkfifo(slide)
    elif kind == "noise":
        slide.write_bytes(random.Random(1).randbytes(5000))
    elif kind == "folder":
        slide.mkdir()
    elif kind == "loop":
        slide.symlink_to(slide.name)
    code, out, _ = run("tiles", project)
    assert code == 0
    assert "tiles of 1 images" in out
    assert "train-1.tif is left out: " in caplog.text
    assert "1 of 2 annotated images are left out" in caplog.text


def test_an_overlay_names_a_predicted_slide_that_is_gone(run: Run, tmp_path: Path) -> None:
    project = Path(shutil.copytree(PROJECT, tmp_path / "project"))
    for name in ("1", "2"):
        folder = project / "darefine" / "maps" / name
        folder.mkdir(parents=True)
        (folder / "scoremap.json").write_text("{}")
    (project / "slides" / "train-1.tif").unlink()
    code, _, err = run("overlay", project)
    assert code == 2
    assert "Error: train-1.tif: its file" in err
    assert "Error: train-2.tif: " in err
