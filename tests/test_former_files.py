"""Model files, run folders and datasets that were written before a key was renamed are still read.

``data/former`` holds what darefine 0.1 wrote on the tiny project: a training run and a small dataset.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import shapely
import torch

from darefine_qupath.annotations import Annotation
from darefine_qupath.checkpoint.model_file import load_checkpoint, rename_former_tensors
from darefine_qupath.classes import ClassMap
from darefine_qupath.models import ModelConfig, build_model
from darefine_qupath.pipeline.settings import read_settings
from darefine_qupath.pipeline.train_request import TrainRequest
from darefine_qupath.tiles.build import build_dataset
from darefine_qupath.tiles.dataset import DatasetReader, load_index
from darefine_qupath.tiles.sources import TileSource
from darefine_qupath.tiles.spec import TileSpec
from darefine_qupath.training import TrainConfig, read_run
from darefine_qupath.training.distributed import ProcessGroup
from darefine_qupath.training.initialize import FrozenLayers
from darefine_qupath.training.state import load_state
from darefine_qupath.training.train_step import Stepper
from tests.tile_slides import ArraySlide

FORMER = Path(__file__).parent / "data" / "former"
TILES = TileSpec(input_px=64, slice_um=128, context_um=640, stride_um=64)


def test_a_model_is_read_and_keeps_its_id() -> None:
    model = load_checkpoint(FORMER / "run" / "model.safetensors")
    assert model.tiles == TILES
    assert model.classes.names == ("Normal", "Benign", "In situ", "Invasive")
    assert model.header.model_id == "e68725aba8f0"
    model.build()


def test_what_a_training_run_was_asked_for_is_read() -> None:
    request = TrainRequest.from_json(json.loads((FORMER / "run" / "request.json").read_text()))
    assert request.tiles.tiles["input_px"] == 64
    assert TrainRequest.from_json(request.to_json()) == request
    former = {**request.to_json(), "train": {"clip_norm": 1.0, "schedule": "one-cycle"}}
    assert TrainRequest.from_json(former).train == {"grad_clip_norm": 1.0, "schedule": "cosine"}


def test_the_copy_of_the_project_s_settings_is_read() -> None:
    settings = read_settings(FORMER, FORMER / "run" / "settings.toml")
    assert settings.tile_spec(TileSpec.paper()) == TILES


def test_the_settings_of_a_training_run_are_read() -> None:
    train = read_run(FORMER / "run").train
    assert (train.optimizer, train.schedule, train.lr_factors) == ("adamw", "cosine", (1.0, 0.5, 0.2))
    assert (train.grad_accum_steps, train.grad_clip_norm, train.early_stop_patience) == (1, 1.0, 0)
    assert (train.flips, train.color_jitter, train.loss) == ("dihedral", 0.1, "ce-dice")
    paper = TrainConfig.from_json({"schedule": "stages", "loss": "nll"})
    assert paper == TrainConfig()


def test_a_dual_network_has_its_tensors_by_other_names() -> None:
    names = json.loads((FORMER / "dual-tensors.json").read_text())
    config = ModelConfig(slice_encoder="resnet18", context_encoder="resnet18", width=8)
    with torch.device("meta"):
        state = build_model(config).state_dict()
    former = {name: torch.zeros(0) for name in names}
    assert "joins.0.conv.weight" in former
    assert list(rename_former_tensors(former)) == list(state)


def test_a_training_state_is_read() -> None:
    folder = FORMER / "run"
    settings = read_run(folder)
    network = build_model(settings.model, seed=0)
    group = ProcessGroup()
    frozen = FrozenLayers(network, settings.train, ())
    stepper = Stepper(network, settings.train, group=group, normalization=settings.normalization, frozen=frozen)
    counters = load_state(folder / "state.safetensors", stepper)
    assert (counters.epoch, stepper.step) == (4, 160)
    last = load_checkpoint(folder / "model.safetensors").state
    assert set(stepper.network.state_dict()) == set(last)
    assert len(stepper.optimizer.state_dict()["state"]) == len(list(network.parameters()))


def test_a_dataset_is_read() -> None:
    index = load_index(FORMER / "tiles")
    assert index.spec == TileSpec(input_px=64, slice_um=128, context_um=640, stride_um=128)
    assert len(index) == 22
    pixels = DatasetReader(FORMER / "tiles").read(index[3])
    assert (pixels.slice.shape, pixels.context.shape) == ((64, 64, 3), (64, 64, 3))
    assert tuple(np.bincount(pixels.mask.ravel(), minlength=256)[[0, 1, 2, 3, 255]]) == (
        *index[3].counts,
        index[3].ignored,
    )


def test_a_dataset_of_the_same_input_is_found_again(tmp_path: Path) -> None:
    slide = tmp_path / "slide.tif"
    slide.write_bytes(b"a slide")
    drawn = Annotation(geometry=shapely.box(0, 0, 64, 64), path_class="Tumor")
    source = TileSource(id="1", name="a", path=slide, annotations=(drawn,))
    spec = TileSpec(input_px=32, slice_px=64, context_px=192, stride_px=64)
    white = ArraySlide(np.full((200, 200, 3), 255, np.uint8))
    build_dataset([source], spec, ClassMap(names=("Normal", "Tumor")), tmp_path / "out", opener=lambda _: white)
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert manifest["request"] == "56ad4390070789eb60ed0858959358bbf7152ce8df804a8e949867282ff1b8a7"
