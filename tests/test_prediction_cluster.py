"""Many slides: one after the other, or on Dask workers of which one dies."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from darefine_qupath.checkpoint.model_file import Checkpoint, save_checkpoint
from darefine_qupath.classes import ClassMap
from darefine_qupath.errors import PredictionError
from darefine_qupath.models import ModelConfig, build_model
from darefine_qupath.prediction import PredictionProgress, PredictOptions, SlideTask, predict_many
from darefine_qupath.prediction import cluster as clusters
from darefine_qupath.tiles.spec import TileSpec
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
        tiles=TileSpec(input_px=32, slice_px=64, context_px=128, stride_px=64),
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
    seen: list[PredictionProgress] = []
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("banner", [b"", b"SSH-2.0-OpenSSH_9.2\r\n"], ids=["silent", "another protocol"])
def test_something_else_at_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, banner: bytes) -> None:
    pytest.importorskip("distributed", reason="Dask distributed is not installed")
    monkeypatch.setattr(clusters, "_CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            answered, _ = server.accept()
            with answered:
                answered.sendall(banner)
                answered.recv(1 << 16)
                answered.recv(1 << 16)

        thread = threading.Thread(target=greet)
        thread.start()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(
            PredictionError, match=f"What listens at {address} does not answer as a Dask scheduler does"
        ):
            list(predict_many(tasks(tmp_path, 1), scheduler=address))
        thread.join()


def test_a_worker_of_another_version_predicts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = SimpleNamespace(address="tcp://other:1", name="w")
    monkeypatch.setattr(clusters, "_distributed", lambda: SimpleNamespace(get_worker=lambda: worker))
    (task,) = tasks(tmp_path, 1)
    found = clusters._work(task, run_slowly, "9.9", None)
    assert found.score_map is None
    assert f"the worker at tcp://other:1 has darefine {clusters.__version__}, here it is 9.9" in (found.error or "")
    assert not task.out.exists()


@pytest.mark.parametrize(
    ("found", "what"),
    [("9.9", "has darefine 9.9, here it is"), (ModuleNotFoundError("x"), "has no darefine that it could import")],
)
def test_workers_are_asked_for_their_version_before_they_get_a_task(
    monkeypatch: pytest.MonkeyPatch, found: object, what: str
) -> None:
    monkeypatch.setattr(clusters.metadata, "version", lambda _: clusters.__version__)

    def client(answer: object) -> SimpleNamespace:
        return SimpleNamespace(run=lambda *_, **__: {"tcp://a:1": clusters.__version__, "tcp://b:2": answer})

    clusters._check_versions(client(clusters.__version__))
    with pytest.raises(PredictionError, match=f"The worker at tcp://b:2 {what}"):
        clusters._check_versions(client(found))


def test_workers_of_a_local_cluster_have_a_device_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    (task,) = tasks(tmp_path, 1)
    auto = replace(task, options=replace(task.options, device="auto"))
    assert [clusters._on_device(auto, worker).options.device for worker in (0, 1, 2)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert current == [0, 1, 0]
    # A worker that somebody else started has the devices that it was given; and who names a device gets it.
    assert clusters._on_device(auto, "tcp://host:1") is auto
    assert clusters._on_device(task, 1) is task


def test_threads_are_shared_by_the_workers_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [clusters._threads_of(workers) for workers in (1, 3, 20)] == [8, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert clusters._threads_of(1) is None


def test_a_local_cluster_computes_in_as_many_threads_as_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[tuple[object, ...]] = []
    hosts: list[object] = []

    class Dask:
        """Stands for the cluster and its client; like Dask it leaves one thread in the environment."""

        def __init__(self, *_: object, **options: object) -> None:
            monkeypatch.setenv("OMP_NUM_THREADS", "1")
            hosts.append(options.get("host"))

        def __enter__(self) -> Dask:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def scheduler_info(self, **_: object) -> dict[str, object]:
            return {"workers": {}}

        def submit(self, *arguments: object, **_: object) -> None:
            submitted.append(arguments)

    dask = SimpleNamespace(LocalCluster=Dask, Client=Dask, as_completed=lambda _: [])
    monkeypatch.setattr(clusters, "_distributed", lambda: dask)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert not list(predict_many(tasks(tmp_path, 1), scheduler="local", local_workers=2))
    assert [arguments[-1] for arguments in submitted] == [4]
    assert hosts == ["127.0.0.1", None]  # the cluster's, and the client's, which listens nowhere


def test_a_local_cluster_listens_to_this_machine_alone() -> None:
    distributed = pytest.importorskip("distributed")
    with clusters._local_cluster(distributed, 1) as cluster:
        addresses = [cluster.scheduler_address, *(worker.address for worker in cluster.workers.values())]
    assert all(address.startswith("tcp://127.0.0.1:") for address in addresses)


def test_paths_mean_the_same_wherever_a_worker_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (task,) = tasks(tmp_path, 1)
    monkeypatch.chdir(tmp_path)
    relative = replace(task, model=Path("model.safetensors"), out=Path("map 0"), slide=Path(task.slide.name))
    assert clusters._absolute(relative) == task


def test_what_dask_says_of_a_slide_is_one_line(tmp_path: Path) -> None:
    scheduler = pytest.importorskip("distributed.scheduler", reason="Dask distributed is not installed")
    (task,) = tasks(tmp_path, 1)

    def error_of(error: BaseException) -> str:
        return clusters._outcome(task, SimpleNamespace(status="error", exception=lambda: error)).error or ""

    killed = scheduler.KilledWorker("k", SimpleNamespace(address="tcp://w"), 3)
    assert error_of(killed).endswith("4 workers died while they predicted it (out of memory?); finished rows are kept "
                                     "for the next call")  # fmt: skip
    assert error_of(ValueError("two\n  lines")) == f"{task.slide}: ValueError: two lines"
    wrapped = RuntimeError("Error during deserialization of the task graph.")
    wrapped.__cause__ = ModuleNotFoundError("No module named 'darefine_qupath'")
    assert "a worker's environment lacks something: No module named 'darefine_qupath'" in error_of(wrapped)


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
    seen: list[PredictionProgress] = []
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
