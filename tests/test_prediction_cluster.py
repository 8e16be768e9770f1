"""Many slides: one after the other, or on Dask workers of which one dies."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from darefine_qupath.checkpoint import Checkpoint, save_checkpoint
from darefine_qupath.classes import ClassMap
from darefine_qupath.errors import PredictionError
from darefine_qupath.models import ModelConfig, build_model
from darefine_qupath.prediction import PredictOptions, Progress, SlideTask, predict_many
from darefine_qupath.tiles import TileSpec
from tests.prediction_stubs import array_slide, blobs, run_slowly

OPTIONS = PredictOptions(tissue=False, device="cpu", precision="fp32", batch_size=4, workers=1)
LAYERS = ("class", "confidence", "margin", "runner_up")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tasks(folder: Path, number: int) -> list[SlideTask]:
    path = array_slide(folder, blobs((50, 50))).path
    model = folder / "model.safetensors"
    return [
        SlideTask(key=str(index), slide=path, model=model, out=folder / f"map {index}", options=OPTIONS)
        for index in range(number)
    ]


def test_slides_one_after_the_other_with_a_real_model(tmp_path: Path) -> None:
    config = ModelConfig(slice_encoder="resnet18", context_encoder="resnet18", width=8, num_classes=3)
    model = Checkpoint(
        state=build_model(config, seed=0).state_dict(),
        model=config,
        tiles=TileSpec(size_px=32, slice_px=64, context_px=128, stride_px=64),
        classes=ClassMap(names=("A", "B", "C")),
    )
    save_checkpoint(tmp_path / "model.safetensors", model)
    good, bad = tmp_path / "slide.png", tmp_path / "missing.png"
    Image.fromarray(array_slide(tmp_path, blobs((200, 150))).pixels).save(good)
    path = tmp_path / "model.safetensors"
    jobs = [
        SlideTask(key=name, slide=slide, model=path, out=tmp_path / name, options=OPTIONS)
        for name, slide in (("bad", bad), ("good", good))
    ]
    seen: list[Progress] = []
    failed, done = predict_many(jobs, progress=seen.append)
    assert failed.score_map is None
    assert "there is no such image" in (failed.error or "")
    assert done.error is None
    assert done.score_map is not None
    assert done.score_map.model_id == model.model_id
    assert seen[-1].done == seen[-1].total


@pytest.mark.parametrize("what", ["key", "folder"])
def test_tasks_need_keys_and_folders_of_their_own(tmp_path: Path, what: str) -> None:
    first, second = tasks(tmp_path, 2)
    twin = SlideTask(
        key=first.key if what == "key" else second.key,
        slide=first.slide,
        model=first.model,
        out=first.out if what == "folder" else second.out,
    )
    with pytest.raises(PredictionError, match=f"same {what}"):
        predict_many([first, twin])


def test_missing_dask_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(PredictionError, match=r"pip install 'darefine-qupath\[cluster\]'"):
        list(predict_many(tasks(tmp_path, 1), scheduler="local"))


@pytest.mark.filterwarnings("ignore")
def test_no_scheduler_at_an_address(tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="Dask distributed is not installed")
    with pytest.raises(PredictionError, match="No Dask scheduler at nowhere"):
        list(predict_many(tasks(tmp_path, 1), scheduler="nowhere"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(sys.platform == "win32", reason="kills a process")
def test_a_worker_dies_and_its_slide_goes_on_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="Dask distributed is not installed")
    jobs = tasks(tmp_path, 3)
    victims: list[int] = []

    def kill_one() -> None:
        journal = jobs[0].out / "partial" / "band-00000.npz"
        for _ in range(600):
            workers = list(jobs[0].out.glob("worker-*"))
            if journal.exists() and workers:
                victims.append(int(workers[0].name.removeprefix("worker-")))
                os.kill(victims[0], signal.SIGKILL)
                return
            time.sleep(0.05)

    killer = threading.Thread(target=kill_one)
    killer.start()
    seen: list[Progress] = []
    results = list(predict_many(jobs, scheduler="local", local_workers=2, progress=seen.append, run=run_slowly))
    killer.join()
    assert len(victims) == 1
    assert len(list(jobs[0].out.glob("worker-*"))) == 2
    assert sorted(result.task.key for result in results) == ["0", "1", "2"]
    assert [result.error for result in results] == [None] * 3
    assert seen
    again = run_slowly(
        SlideTask(key="0", slide=jobs[0].slide, model=jobs[0].model, out=tmp_path / "x", options=OPTIONS)
    )
    killed = next(result.score_map for result in results if result.task.key == "0")
    assert killed is not None
    for layer in LAYERS:
        assert again.path(layer).read_bytes() == killed.path(layer).read_bytes()
