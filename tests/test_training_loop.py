from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache, partial
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import distributed
from torch._dynamo.exc import TorchDynamoException

from darefine_qupath.annotations import Annotation
from darefine_qupath.checkpoint.model_file import load_checkpoint, read_header
from darefine_qupath.classes import ClassMap
from darefine_qupath.devices import memory_advice
from darefine_qupath.errors import (
    CheckpointError,
    DeviceError,
    ModelError,
    TileError,
    TrainingError,
    TrainingStoppedError,
)
from darefine_qupath.metrics import ConfusionMatrix
from darefine_qupath.models import ModelConfig, build_model
from darefine_qupath.tiles.build import build_dataset
from darefine_qupath.tiles.dataset import DatasetReader
from darefine_qupath.tiles.index import TileRecord
from darefine_qupath.tiles.sampling import expected_shares
from darefine_qupath.tiles.slide_reader import TilePixels
from darefine_qupath.tiles.sources import TileSource
from darefine_qupath.tiles.spec import TileSpec
from darefine_qupath.training import RunFolder, TrainConfig, TrainingProgress, outputs, read_run, start, trainer
from darefine_qupath.training import loader as batches_module
from darefine_qupath.training import state as state_module
from darefine_qupath.training.interrupt import stop_on_signals
from darefine_qupath.training.loader import load_batches, num_workers, plan_epoch, plan_run
from darefine_qupath.training.tile_dataset import TileDataset
from darefine_qupath.training.train_step import compile_advice
from tests.test_tiles_sampling import COUNTS, TILES, index_of
from tests.training_toy import CLASSES, ToyReader, toy_config, toy_data, toy_model, toy_spec, toy_train


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Killed(BaseException):
    """A stand-in for whatever ends a process without warning."""


def kill_at(count: int) -> Callable[[TrainingProgress], None]:
    calls = itertools.count(1)

    def report(_: TrainingProgress) -> None:
        if next(calls) == count:
            raise Killed

    return report


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "last.safetensors")


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


# A run and what it leaves


def test_run_folder_explains_itself(tmp_path: Path) -> None:
    seen: list[TrainingProgress] = []
    result = toy_train(tmp_path / "run", provenance={"project": "p"}, progress=seen.append)
    folder = RunFolder(tmp_path / "run")
    names = {path.name for path in folder.path.iterdir()} - {"tensorboard"}
    assert names == {
        "README.txt", "config.json", "metrics.jsonl", "curves.png", "confusion.png",
        "model.safetensors", "last.safetensors", "state.safetensors",
    }  # fmt: skip
    assert all(name in folder.readme.read_text() for name in names - {"README.txt"})
    assert [record["epoch"] for record in folder.records()] == [1, 2]
    assert (result.best, result.last, result.epochs, result.is_early) == (folder.best, folder.last, 2, False)
    assert [(p.stage, p.epoch, p.step) for p in seen] == [
        ("step", 1, 1), ("step", 1, 2), ("step", 1, 3), ("epoch", 1, 3),
        ("step", 2, 1), ("step", 2, 2), ("step", 2, 3), ("epoch", 2, 3),
    ]  # fmt: skip
    assert seen[-1].seconds_left == 0
    assert set(seen[-1].iou) == set(CLASSES.names)
    for path in (folder.curves, folder.confusion):
        with Image.open(path) as picture:
            assert min(picture.size) > 300


def test_model_file_carries_where_it_comes_from(tmp_path: Path) -> None:
    result = toy_train(tmp_path, provenance={"project": "p"})
    header = read_header(result.best)
    assert (header.classes, header.tiles, header.model) == (CLASSES, toy_spec(), toy_model())
    assert header.provenance["project"] == "p"
    assert header.provenance["recipe"]["batch_size"] == 4
    assert header.provenance["metrics"]["miou"] == result.metrics["miou"]
    assert {"tiles", "epoch", "environment"} <= set(header.provenance)


def test_settings_can_be_read_back(tmp_path: Path) -> None:
    config = toy_config(preset="modern", epochs=1)
    toy_train(tmp_path, config)
    settings = read_run(tmp_path)
    assert (settings.train, settings.model, settings.classes) == (config, toy_model(), CLASSES)


def test_best_epoch_is_the_one_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([(8, 2), (9, 1), (5, 5)])

    def scripted(*_: object, **__: object) -> ConfusionMatrix:
        right, wrong = next(scores)
        return ConfusionMatrix([[right, wrong, 0], [0, 9, 0], [0, 0, 9]])

    monkeypatch.setattr(trainer, "evaluate", scripted)
    result = toy_train(tmp_path, toy_config(epochs=3))
    assert result.metrics["epoch"] == 2
    assert read_header(result.best).provenance["epoch"] == 2
    assert read_header(result.last).provenance["epoch"] == 3


@pytest.mark.parametrize("network", ["da-refinenet", "unet"])
def test_last_epoch_is_also_measured_with_blank_contexts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str
) -> None:
    asked = []

    def scripted(*_: object, context: str, **__: object) -> ConfusionMatrix:
        asked.append(context)
        wrong = 9 if context == "blank" else len(asked)
        return ConfusionMatrix([[9, wrong, 0], [0, 9, 0], [0, 0, 9]])

    monkeypatch.setattr(trainer, "evaluate", scripted)
    model = toy_model(network=network, slice_encoder="resnet18", context_encoder="resnet18")
    result = toy_train(tmp_path, toy_config(epochs=2, encoder_weights="none"), model=model, train_data=toy_data(2))
    if network == "unet":
        assert (asked, result.context_miou) == (["normal", "normal"], None)
        return
    assert asked == ["normal", "normal", "blank"]
    assert result.context_miou == (pytest.approx((9 / 11 + 9 / 11 + 1) / 3), pytest.approx((1 / 2 + 1 / 2 + 1) / 3))
    assert result.metrics["epoch"] == 1, "the best epoch need not be the one that was measured so"
    again = toy_train(
        tmp_path, toy_config(epochs=2, encoder_weights="none"), model=model, train_data=toy_data(2), resume=True
    )
    assert again.context_miou == result.context_miou


def test_early_stop_after_validations_without_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    still = ConfusionMatrix([[3, 1, 0], [0, 4, 0], [0, 0, 4]])
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: still)
    result = toy_train(tmp_path, toy_config(epochs=9, early_stop_patience=2))
    assert (result.epochs, result.is_early) == (3, True)
    again = toy_train(tmp_path, toy_config(epochs=9, early_stop_patience=2), resume=True)
    assert (again.epochs, again.is_early) == (3, True)


@pytest.mark.parametrize("nothing", [None, toy_data(0)], ids=["none", "empty"])
def test_without_validation_the_last_epoch_is_the_best(tmp_path: Path, nothing: object) -> None:
    result = toy_train(tmp_path, val_data=nothing)
    assert_same(load_file(result.best), load_file(result.last))
    assert "miou" not in result.metrics
    assert result.metrics["loss"] > 0


def test_validation_can_be_rare_but_the_last_epoch_has_one(tmp_path: Path) -> None:
    toy_train(tmp_path, toy_config(epochs=5, validate_every=2, batch_size=10))
    assert [record["epoch"] for record in RunFolder(tmp_path).records() if "miou" in record] == [2, 4, 5]


def test_training_leaves_torchs_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    toy_train(tmp_path, toy_config(epochs=1))
    assert torch.equal(torch.rand(1), expected)


def test_it_learns(tmp_path: Path) -> None:
    config = toy_config(preset="modern", epochs=25, decoder_lr=1e-2, batch_size=5, context_dropout=0, scale=[1, 1])
    result = toy_train(tmp_path, config)
    assert result.metrics["miou"] > 0.9


# The same weights, however they were reached


def test_same_seed_same_weights_other_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        toy_train(tmp_path / name, toy_config(seed=seed, epochs=1))
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    with pytest.raises(AssertionError):
        assert_same(weights(tmp_path / "a"), weights(tmp_path / "c"))


RECIPES = {
    "paper": {"preset": "paper"},
    "modern": {"preset": "modern", "ema_decay": 0.9},
    "parts": {"preset": "modern", "grad_accum_steps": 2, "channels_last": False, "class_weights": "inverse"},
    "samples": {"samples_per_epoch": 9, "balance": 0.5},
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs that nobody interrupted, one per recipe."""

    @cache
    def run(name: str) -> Path:
        out = tmp_path_factory.mktemp("unbroken") / "run"
        toy_train(out, recipe_config(name), model=toy_model(dropout=0.5))
        return out

    return run


def recipe_config(name: str) -> TrainConfig:
    return toy_config(**RECIPES[name], checkpoint_steps=1)


@pytest.mark.parametrize(
    ("recipe", "killed_at"),
    [("modern", 1), ("modern", 3), ("modern", 4), ("modern", 6), ("paper", 2), ("parts", 6), ("samples", 3)],
)
def test_killed_and_resumed_is_the_same_to_the_bit(
    tmp_path: Path, unbroken: Callable[[str], Path], recipe: str, killed_at: int
) -> None:
    whole, config, model = unbroken(recipe), recipe_config(recipe), toy_model(dropout=0.5)
    with pytest.raises(Killed):
        toy_train(tmp_path, config, model=model, progress=kill_at(killed_at))
    left = [tmp_path / name for name in (".state-0123abcd.safetensors", ".model-89abcdef.safetensors", ".tmpQ3xY7z")]
    for file in left:
        file.write_bytes(b"half")
    toy_train(tmp_path, config, model=model, resume=True)
    assert not any(file.exists() for file in left)
    for name in ("last.safetensors", "model.safetensors", "state.safetensors"):
        assert_same(load_file(whole / name), load_file(tmp_path / name))
    first, second = RunFolder(whole).records(), RunFolder(tmp_path).records()
    varying = {"images_per_second", "seconds"}
    assert [{k: v for k, v in r.items() if k not in varying} for r in first] == [
        {k: v for k, v in r.items() if k not in varying} for r in second
    ]


def test_resume_without_steps_saved_goes_back_to_the_epoch(tmp_path: Path) -> None:
    config = toy_config(epochs=2, checkpoint_minutes=0)
    toy_train(tmp_path / "whole", config)
    with pytest.raises(Killed):
        toy_train(tmp_path / "parts", config, progress=kill_at(6))
    steps: list[TrainingProgress] = []
    toy_train(tmp_path / "parts", config, resume=True, progress=steps.append)
    assert (steps[0].epoch, steps[0].step) == (2, 1)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@pytest.mark.parametrize(
    ("minutes", "saved_at"),
    [(0, [3, 6]), (5, [6]), (0.9, [1, 2, 3, 4, 5, 6]), (1.9, [2, 4, 6])],
)
def test_states_are_saved_by_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float, saved_at: list[int]
) -> None:
    """Here every step takes a minute."""
    saves: list[int] = []
    steps = [0]
    monkeypatch.setattr(trainer, "save_state", lambda *given: saves.append(given[1].step))
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: 60.0 * steps[0]))
    step = trainer.Stepper.train_on

    def counted(*args: object, **kwargs: object) -> object:
        steps[0] += 1
        return step(*args, **kwargs)

    monkeypatch.setattr(trainer.Stepper, "train_on", counted)
    toy_train(tmp_path, toy_config(checkpoint_minutes=minutes))
    assert saves == saved_at


def test_kill_between_metrics_and_state_repeats_the_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: Callable[[str], Path]
) -> None:
    def dies(*_: object) -> None:
        raise Killed

    config, model = toy_config(checkpoint_minutes=0), toy_model(dropout=0.5)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_state", dies)
        with pytest.raises(Killed):
            toy_train(tmp_path, config, model=model)
    assert [record["epoch"] for record in RunFolder(tmp_path).records()] == [1]
    toy_train(tmp_path, config, model=model, resume=True)
    assert [record["epoch"] for record in RunFolder(tmp_path).records()] == [1, 2]
    assert_same(weights(unbroken("paper")), weights(tmp_path))


def test_killed_write_leaves_the_former_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies_half_way(_: object, path: Path, **__: object) -> None:
        Path(path).write_bytes(b"half")
        raise Killed

    toy_train(tmp_path / "whole", toy_config())
    with pytest.raises(Killed):
        toy_train(tmp_path / "parts", toy_config(checkpoint_steps=1), progress=kill_at(3))
    before = (tmp_path / "parts" / "state.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(state_module, "save_file", dies_half_way)
        with pytest.raises(Killed):
            toy_train(tmp_path / "parts", toy_config(checkpoint_steps=1), resume=True)
    assert (tmp_path / "parts" / "state.safetensors").read_bytes() == before
    toy_train(tmp_path / "parts", toy_config(), resume=True)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_resuming_a_finished_run_gives_its_result(tmp_path: Path) -> None:
    first = toy_train(tmp_path)
    stamp = first.best.stat().st_mtime_ns
    again = toy_train(tmp_path, resume=True)
    assert again == first
    assert first.best.stat().st_mtime_ns == stamp


def test_workers_read_the_same_batches(tmp_path: Path) -> None:
    toy_train(tmp_path / "none", toy_config(epochs=1))
    toy_train(tmp_path / "two", toy_config(epochs=1, workers=2))
    assert_same(weights(tmp_path / "none"), weights(tmp_path / "two"))


def test_parts_of_a_batch_give_the_gradient_of_the_batch(tmp_path: Path) -> None:
    model = ModelConfig(network="refinenet", slice_encoder="resnet18", width=8, num_classes=3, dropout=0.0)
    for parts in (1, 3):
        config = toy_config(epochs=1, grad_accum_steps=parts, freeze_batch_norm="yes", loss="ce-dice")
        toy_train(tmp_path / str(parts), config, model=model, val_data=None)
    losses = [RunFolder(tmp_path / str(parts)).records()[0]["loss"] for parts in (1, 3)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# Stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("at", [("step", 1, 2), ("step", 1, 3), ("epoch", 1, 3)], ids=lambda at: f"{at[0]}{at[2]}")
def test_signal_ends_the_step_and_says_how_to_go_on(
    tmp_path: Path, unbroken: Callable[[str], Path], number: signal.Signals, at: tuple[str, int, int]
) -> None:
    def send(progress: TrainingProgress) -> None:
        if (progress.stage, progress.epoch, progress.step) == at:
            os.kill(os.getpid(), number)

    config, model, before = recipe_config("paper"), toy_model(dropout=0.5), signal.getsignal(number)
    with pytest.raises(TrainingStoppedError, match=rf"{number.name} ended .* darefine train --resume .*run"):
        toy_train(tmp_path / "run", config, model=model, progress=send)
    assert signal.getsignal(number) is before
    toy_train(tmp_path / "run", config, model=model, resume=True)
    assert_same(weights(unbroken("paper")), weights(tmp_path / "run"))


@pytest.mark.parametrize("workers", [0, 1])
def test_signal_breaks_a_validation_off(
    tmp_path: Path, unbroken: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    config, model = replace(recipe_config("paper"), workers=workers), toy_model(dropout=0.5)
    counted, count = [], trainer.evaluate

    def interrupted(*args: object, before_batch: Callable[[], None], **kwargs: object) -> ConfusionMatrix:
        def noted() -> None:
            counted.append(1)
            os.kill(os.getpid(), signal.SIGINT)
            before_batch()

        return count(*args, before_batch=noted, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", interrupted)
        with pytest.raises(TrainingStoppedError, match="SIGINT ended training at epoch 1, step 3 of 3"):
            toy_train(tmp_path / "run", config, model=model)
    assert counted == [1]
    toy_train(tmp_path / "run", config, model=model, resume=True)
    assert_same(weights(unbroken("paper")), weights(tmp_path / "run"))


def test_signal_while_contexts_are_blank_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = trainer.evaluate

    def interrupted(*args: object, context: str, **kwargs: object) -> ConfusionMatrix:
        if context == "blank":
            os.kill(os.getpid(), signal.SIGINT)
        return count(*args, context=context, **kwargs)

    monkeypatch.setattr(trainer, "evaluate", interrupted)
    model = ModelConfig(slice_encoder="resnet18", context_encoder="resnet18", width=8, num_classes=3)
    result = toy_train(tmp_path, toy_config(epochs=1), model=model, train_data=toy_data(5))
    assert (result.epochs, result.context_miou is not None) == (1, True)
    assert result.best.exists()


def test_what_an_interrupt_does_is_said_at_once(caplog: pytest.LogCaptureFixture) -> None:
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
    assert "Ctrl-C again stops at once" in caplog.text


def test_an_interrupt_that_is_passed_on_twice_counts_once() -> None:
    with stop_on_signals(echo_s=60, is_silent=True) as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_name == "SIGINT"
        stop.since -= 61
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    def insist(_: TrainingProgress) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        toy_train(tmp_path, progress=insist)


# Refusals


def test_no_tiles(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="There are no training tiles"):
        toy_train(tmp_path / "run", train_data=toy_data(0))
    assert not (tmp_path / "run").exists()


def test_class_without_a_pixel_is_refused_before_the_first_step(tmp_path: Path) -> None:
    only_two_classes = toy_data(1)
    with pytest.raises(TrainingError, match=r"No training tile has a pixel of \['Invasive'\]"):
        toy_train(tmp_path / "run", train_data=only_two_classes)
    result = toy_train(tmp_path / "run", toy_config(allow_missing_classes=True), train_data=only_two_classes)
    assert result.epochs == 2


def test_tiles_without_labels_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = toy_data(10)
    data.tiles.counts[4, -1] = data.tiles.counts[4].sum()
    data.tiles.counts[4, :-1] = 0
    with caplog.at_level(logging.WARNING):
        toy_train(tmp_path, toy_config(epochs=1), train_data=data)
    assert "1 of 10 training tiles have no label" in caplog.text


def test_loss_that_is_no_number_names_the_tiles(tmp_path: Path) -> None:
    config = toy_config(decoder_lr=1e30, batch_size=2, balance=0)
    with pytest.raises(
        TrainingError,
        match=r"The loss is (nan|inf) at epoch 1, step \d.*a/\d+_80, a/\d+_80\. .* or set grad_clip_norm = 1$",
    ):
        toy_train(tmp_path, config)
    assert not (tmp_path / "state.safetensors").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
    ids=["cuda", "cpu", "cudnn"],
)
def test_out_of_memory_says_which_settings_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(trainer.Stepper, "train_on", exhausted)
    with pytest.raises(DeviceError, match=r"Out of memory with 4 tiles of 32 px.*lower --batch-size.*input_px"):
        toy_train(tmp_path)


def test_a_compiler_that_is_not_there_is_one_line() -> None:
    message = r"^torch.compile does not work here \(InvalidCxxCompiler: none\); train with compile = false$"
    with pytest.raises(TrainingError, match=message), compile_advice():
        raise TorchDynamoException("InvalidCxxCompiler: none\n\nSet TORCHDYNAMO_VERBOSE=1 for more")


@pytest.mark.parametrize("advice", [compile_advice, partial(memory_advice, "")], ids=["compile", "memory"])
def test_other_runtime_errors_stay_what_they_are(advice: Callable[[], AbstractContextManager[None]]) -> None:
    with pytest.raises(RuntimeError, match="something else"), advice():
        raise RuntimeError("something else")


def test_folder_with_a_run_is_refused(tmp_path: Path) -> None:
    toy_train(tmp_path)
    with pytest.raises(TrainingError, match="holds a training run already; go on with it"):
        toy_train(tmp_path)


def test_resume_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds no training run"):
        toy_train(tmp_path, resume=True)


def test_a_resumed_run_needs_nothing_of_what_it_started_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = ModelConfig(network="refinenet", slice_encoder="resnet18", width=8, num_classes=3, dropout=0.0)
    config = toy_config(epochs=2, batch_size=5, checkpoint_minutes=0)
    start = toy_train(tmp_path / "start", toy_config(epochs=1, batch_size=5), model=model).best
    toy_train(tmp_path / "whole", config, model=model, init_from=start)
    with pytest.raises(Killed):
        toy_train(tmp_path / "parts", config, model=model, init_from=start, progress=kill_at(4))
    shutil.copytree(tmp_path / "parts", tmp_path / "early")
    start.unlink()
    toy_train(tmp_path / "parts", config, model=model, init_from=start, resume=True)
    # Its encoders' batch norm stays frozen: that they came trained stands in the state.
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    (tmp_path / "early" / "state.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        toy_train(tmp_path / "early", config, model=model, init_from=start, resume=True)
    assert "it starts again" in caplog.text


def test_a_run_may_go_on_in_another_precision(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        toy_train(tmp_path, toy_config(checkpoint_steps=1), progress=kill_at(3))
    assert toy_train(tmp_path, toy_config(precision="fp16", epochs=2), resume=True).epochs == 2


def test_names_and_metadata_of_images_do_not_make_other_tiles(tmp_path: Path) -> None:
    toy_train(tmp_path)
    data = toy_data(10)
    noted = tuple(replace(image, name="b.svs", metadata={"darefine.role": "train"}) for image in data.tiles.images)
    same = TileDataset(replace(data.tiles, images=noted), data.reader)
    assert toy_train(tmp_path, train_data=same, resume=True).epochs == 2


def test_resume_with_other_settings_names_them(tmp_path: Path) -> None:
    toy_train(tmp_path)
    with pytest.raises(TrainingError, match=r"train.epochs 2 -> 3.*train.seed 0 -> 1"):
        toy_train(tmp_path, toy_config(epochs=3, seed=1), resume=True)
    with pytest.raises(TrainingError, match=r"data.train"):
        toy_train(tmp_path, train_data=toy_data(11), resume=True)
    assert toy_train(tmp_path, toy_config(workers=1, checkpoint_minutes=1), resume=True).epochs == 2


def test_damaged_state_is_refused(tmp_path: Path) -> None:
    toy_train(tmp_path)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(TrainingError, match=r"state.safetensors is damaged"):
        toy_train(tmp_path, resume=True)
    state.write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(TrainingError, match=r"expected darefine-training-state"):
        toy_train(tmp_path, resume=True)


def test_damaged_settings_are_refused(tmp_path: Path) -> None:
    toy_train(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for changed, message in (({**settings, "version": 99}, "version 99; expected"), ({}, "damaged")):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(TrainingError, match=message):
            read_run(tmp_path)


def test_network_and_classes_must_agree(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="The network has 4 classes, the class map 3"):
        toy_train(tmp_path, model=toy_model(num_classes=4))


def test_unreadable_tile_stops_training(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="tile a/120_80 cannot be read"):
        toy_train(tmp_path, train_data=toy_data(10, bad="a/120_80"))


class Unreadable(ToyReader):
    """Tiles that cannot be read, for a reason or because the process dies."""

    def read(self, record: TileRecord) -> TilePixels:
        if self.bad == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise TileError(f"{record.id} is damaged; build the dataset again")


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        ("file", TileError, r"^a/\d+_80 is damaged; build the dataset again$"),
        ("kill", TrainingError, r"^A process that reads tiles was killed .*lower workers; 0 reads without"),
    ],
)
def test_what_workers_die_of_is_one_line(bad: str, kind: type[Exception], message: str) -> None:
    data = TileDataset(toy_data(4).tiles, Unreadable(toy_spec(), bad))
    planned = plan_epoch(data.tiles, toy_config(), None, 0)
    with pytest.raises(kind, match=message):
        list(load_batches(data, planned, workers=2))
    # Python would wait for them at its end.
    assert active_children() == []


def test_device_that_is_not_here(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"Device 'gpu' cannot be used .*; try --device cpu"):
        toy_train(tmp_path, toy_config(device="gpu"))
    with pytest.raises(DeviceError, match="Device 'cuda:77' cannot be used"):
        toy_train(tmp_path, toy_config(device="cuda:77"))


# Where the weights start


def test_start_from_an_earlier_model(tmp_path: Path) -> None:
    earlier = toy_train(tmp_path / "first").last
    result = toy_train(tmp_path / "second", toy_config(epochs=1, decoder_lr=1e-9), init_from=earlier)
    first, second = load_file(earlier), load_file(result.last)
    learned = [name for name in first if name.endswith("weight")]
    assert learned
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in learned)
    assert read_header(result.best).provenance["started_from"] == str(earlier)


def test_start_with_other_classes_keeps_those_that_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    earlier = toy_train(tmp_path / "first").last
    classes = ClassMap(names=("Invasive", "Stroma", "Normal"))
    with caplog.at_level(logging.WARNING):
        result = toy_train(
            tmp_path / "second", toy_config(epochs=1, decoder_lr=1e-9), classes=classes, init_from=earlier
        )
    before, after = load_file(earlier)["classifier.weight"], load_file(result.last)["classifier.weight"]
    assert torch.allclose(after[0], before[2], atol=1e-5)
    assert torch.allclose(after[2], before[0], atol=1e-5)
    assert not torch.allclose(after[1], before[1], atol=1e-3)
    assert "does not know the classes ['Stroma']" in caplog.text


def test_start_from_another_network_is_refused(tmp_path: Path) -> None:
    earlier = toy_train(tmp_path / "first", toy_config(epochs=1)).last
    with pytest.raises(TrainingError, match="cannot start U-Net, width 32"):
        toy_train(tmp_path / "second", model=toy_model(width=32), init_from=earlier)
    (tmp_path / "no.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="empty"):
        toy_train(tmp_path / "third", init_from=tmp_path / "no.safetensors")


def test_encoder_weights_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    model = ModelConfig(network="refinenet", slice_encoder="resnet18", width=8, num_classes=3)
    with pytest.raises(ModelError, match="No ImageNet weights come with"):
        toy_train(tmp_path / "a", toy_config(encoder_weights="imagenet"), model=model)
    with pytest.raises(ModelError, match="There is no file"):
        toy_train(tmp_path / "b", toy_config(encoder_weights=str(tmp_path / "none.pth")), model=model)


def norms(path: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in load_checkpoint(path).state.items() if "bn" in name and "encoder" in name}


@pytest.mark.parametrize(("frozen", "moved"), [("auto", True), ("no", True), ("yes", False)])
def test_batch_norm_of_random_encoders_trains_unless_frozen(tmp_path: Path, frozen: str, moved: bool) -> None:
    model = ModelConfig(network="refinenet", slice_encoder="resnet18", width=8, num_classes=3)
    toy_train(tmp_path / "run", toy_config(epochs=1, freeze_batch_norm=frozen), model=model, val_data=None)
    found = norms(tmp_path / "run" / "last.safetensors")
    changed = [name for name, value in found.items() if "running_mean" in name and value.any()]
    assert bool(changed) == moved
    assert len(found) > 20


def test_batch_norm_of_an_earlier_model_is_frozen(tmp_path: Path) -> None:
    model = ModelConfig(network="refinenet", slice_encoder="resnet18", width=8, num_classes=3)
    first = toy_train(tmp_path / "a", toy_config(epochs=1), model=model, val_data=None).last
    second = toy_train(tmp_path / "b", toy_config(epochs=1), model=model, val_data=None, init_from=first).last
    assert_same(norms(first), norms(second))


# Order


def test_batches_are_the_same_however_many_processes_share_them() -> None:
    tiles, config = toy_data(10).tiles, TrainConfig(batch_size=6)
    alone = plan_epoch(tiles, config, None, 1)
    pairs = [plan_epoch(tiles, config, None, 1, rank=rank, size=2) for rank in range(2)]
    assert len(alone) == 2
    for step, placed in enumerate(alone):
        shared = sorted(itertools.chain(*(zip(p[step].positions, p[step].tiles, strict=True) for p in pairs)))
        assert shared == list(zip(placed.positions, placed.tiles, strict=True))


def test_every_tile_comes_and_the_last_batch_is_filled_up() -> None:
    planned = plan_epoch(toy_data(10).tiles, TrainConfig(batch_size=4), None, 0)
    tiles = list(itertools.chain(*(placed.tiles for placed in planned)))
    assert [len(placed.tiles) for placed in planned] == [4, 4, 4]
    assert sorted(tiles[:10]) == list(range(10))
    assert tiles[10:] == tiles[:2]


@pytest.mark.parametrize("among_several", [True, False])
def test_workers_of_several_processes_do_not_fork_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, among_several: bool
) -> None:
    """NCCL does not outlive a fork; tiles of a dataset on disk are read as those of slides are."""
    if among_several:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        request.addfinalizer(distributed.destroy_process_group)
    contexts = []
    loader = batches_module.DataLoader

    def noted(*given: object, multiprocessing_context: object, **named: object) -> object:
        contexts.append(multiprocessing_context)
        return loader(*given, multiprocessing_context=multiprocessing_context, **named)

    monkeypatch.setattr(batches_module, "DataLoader", noted)
    image = Image.fromarray(np.full((64, 64, 3), 200, np.uint8))
    image.save(tmp_path / "a.tif")
    drawn = Annotation(geometry=shapely.box(0, 0, 64, 64), path_class="Normal")
    sources = [TileSource(id="a", name="a", path=tmp_path / "a.tif", annotations=(drawn,))]
    spec = TileSpec(input_px=32, slice_px=32, context_px=64, stride_px=32)
    data = TileDataset(build_dataset(sources, spec, CLASSES, tmp_path / "tiles"), DatasetReader(tmp_path / "tiles"))
    planned = plan_epoch(data.tiles, TrainConfig(batch_size=4), None, 0)
    assert sum(len(loaded.ids) for loaded in load_batches(data, planned, workers=1)) == len(data) == 4
    methods = [context and context.get_start_method() for context in contexts]
    assert methods == (["forkserver"] if among_several else [None])


def test_plan_goes_on_where_it_was() -> None:
    tiles, config = toy_data(10).tiles, TrainConfig(batch_size=4, epochs=3)
    whole = list(plan_run(tiles, config, None, (0, 0)))
    assert len(whole) == 9
    assert list(plan_run(tiles, config, None, (1, 2))) == whole[5:]
    assert list(plan_run(tiles, config, None, (3, 0))) == []


def test_workers_are_what_was_asked_for() -> None:
    assert num_workers(TrainConfig(workers=3)) == 3
    assert 1 <= num_workers(TrainConfig()) <= 16
    assert num_workers(replace(TrainConfig(), workers=0)) == 0


# Class weights


@given(COUNTS, st.floats(0, 1))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_class_weights_undo_what_the_drawn_tiles_show(counts: np.ndarray, balance: float) -> None:
    tiles, config = index_of(counts), TrainConfig(balance=balance, class_weights="inverse")
    drawn = start.sampling_weights(tiles, config, None)
    shares = expected_shares(tiles, np.ones(len(tiles)) if drawn is None else drawn)
    weights = start.class_weights(tiles, config, drawn).numpy()
    there, capped = shares > 0, weights >= 10
    assert (weights[there & ~capped] * shares[there & ~capped]) == pytest.approx(
        (weights[there & ~capped] * shares[there & ~capped]).mean(), rel=1e-4
    )
    assert (weights[~there] == 1).all()


def test_class_weights_of_a_run_are_one_where_the_sampler_has_balanced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SeenError(Exception):
        pass

    def seen(*_: object, class_weights: torch.Tensor, **__: object) -> None:
        raise SeenError(class_weights.tolist())

    monkeypatch.setattr(trainer, "Stepper", seen)
    data = toy_data(0)
    data.tiles = TILES
    for balance, expected in ((1, [1, 1, 1]), (0, [0.071, 0.732, 2.197])):
        config = toy_config(class_weights="inverse", balance=balance)
        with pytest.raises(SeenError) as found:
            toy_train(tmp_path / str(balance), config, train_data=data, val_data=None)
        assert found.value.args[0] == pytest.approx(expected, abs=0.02)


# Precision and extras


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns_and_resumes(tmp_path: Path, precision: str) -> None:
    config = toy_config(precision=precision, checkpoint_steps=1, class_weights="inverse")
    toy_train(tmp_path / "whole", config)
    with pytest.raises(Killed):
        toy_train(tmp_path / "parts", config, progress=kill_at(2))
    toy_train(tmp_path / "parts", config, resume=True)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert {tensor.dtype for tensor in weights(tmp_path / "whole").values()} == {torch.float32, torch.int64}


def test_tensorboard_gets_the_numbers_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, int]] = []
    writer = SimpleNamespace(add_scalar=lambda name, _, epoch: written.append((name, epoch)), close=lambda: None)
    monkeypatch.setattr(outputs.importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(outputs, "import_module", lambda _: SimpleNamespace(SummaryWriter=lambda _: writer))
    outputs.write_tensorboard(tmp_path, {"epoch": 3, "loss": 0.5, "miou": None, "iou": {"Normal": 0.1, "B": None}})
    assert written == [("loss", 3), ("iou/Normal", 3)]


def test_what_is_kept_is_the_average_of_the_weights(tmp_path: Path) -> None:
    toy_train(tmp_path, toy_config(epochs=1, samples_per_epoch=4, ema_decay=0.99), val_data=None)
    state, kept = load_file(tmp_path / "state.safetensors"), weights(tmp_path)
    for name, first in build_model(toy_model(), seed=0).named_parameters():
        trained = state[f"network/{name}"]
        # One step: a tenth is all that is left of the first weights.
        torch.testing.assert_close(kept[name], first.detach() * 0.1 + trained * 0.9)
    assert torch.equal(kept["downs.0.1.running_mean"], state["network/downs.0.1.running_mean"])
