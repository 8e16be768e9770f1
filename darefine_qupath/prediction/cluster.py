"""Predict slides on a Dask cluster, started on this machine or running already.

A slide is one task on one device. Workers read slides and write score maps under paths that must mean the same
everywhere (a shared file system); only the caller writes to the project. A worker that dies takes nothing with it: its
slide goes on elsewhere from the last row in its journal.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib import import_module, metadata
from typing import Any

import torch

from darefine_qupath import __version__
from darefine_qupath.errors import PredictionError
from darefine_qupath.prediction.options import PredictionProgress
from darefine_qupath.prediction.tasks import Report, Runner, SlideResult, SlideTask, run_task

__all__ = ["predict_on_dask"]

_log = logging.getLogger(__name__)

_TOPIC = "darefine-progress"
_REPORT_SECONDS = 1.0
_CONNECT_SECONDS = 10
_WORKER_SECONDS = 60
_DISTRIBUTION = "darefine-qupath"
_ONE_SLIDE = threading.Lock()


def predict_on_dask(
    tasks: Sequence[SlideTask], scheduler: str, local_workers: int | None, progress: Report | None, run: Runner
) -> Iterator[SlideResult]:
    """Predict slides on a scheduler's workers; see `darefine_qupath.prediction.many_slides.predict_many`."""
    distributed = _distributed()
    with ExitStack() as stack:
        if scheduler == "local":
            workers = local_workers or max(1, torch.cuda.device_count())
            # Asked before the cluster is there, which puts its own settings into the environment of this process.
            threads = _threads_of(workers)
            cluster = stack.enter_context(_local_cluster(distributed, workers))
            client = stack.enter_context(distributed.Client(cluster))
        else:
            client, threads = stack.enter_context(_connect(distributed, scheduler)), None
            _check_versions(client)
        if progress is not None:
            client.subscribe_topic(_TOPIC, lambda event: progress(PredictionProgress(**event[1][_TOPIC])))
        resources = {"GPU": 1} if _has_gpu_resource(client) else {}
        by_key = {f"darefine-{task.key}-{os.getpid()}-{time.time_ns()}": _absolute(task) for task in tasks}
        futures = [
            client.submit(_work, task, run, __version__, threads, key=key, pure=False, resources=resources)
            for key, task in by_key.items()
        ]
        for future in distributed.as_completed(futures):
            yield _outcome(by_key[future.key], future)
            future.release()


def _outcome(task: SlideTask, future: Any) -> SlideResult:  # noqa: ANN401 - distributed has no types
    if future.status == "finished":
        result: SlideResult = future.result()
        return result
    error = future.exception()
    if type(error).__name__ == "KilledWorker":
        deaths = f"{error.allowed_failures + 1} workers died while they predicted it (out of memory?)"
        return SlideResult(task=task, error=f"{task.slide}: {deaths}; finished rows are kept for the next call")
    # Dask wraps what goes wrong before a task begins.
    if isinstance(error.__cause__ or error, ImportError):
        lacks = f"a worker's environment lacks something: {error.__cause__ or error}"
        return SlideResult(task=task, error=f"{task.slide}: {lacks}")
    return SlideResult(task=task, error=f"{task.slide}: {type(error).__name__}: {' '.join(str(error).split())}")


def _absolute(task: SlideTask) -> SlideTask:
    """Give a task paths that mean the same in whatever folder a worker was started."""
    return replace(task, slide=task.slide.absolute(), model=task.model.absolute(), out=task.out.absolute())


def _distributed() -> Any:  # noqa: ANN401
    try:
        return import_module("distributed")
    except ImportError:
        raise PredictionError(
            "A scheduler needs Dask distributed: pip install 'darefine-qupath[cluster]', here and where the workers run"
        ) from None


def _local_cluster(distributed: Any, workers: int) -> Any:  # noqa: ANN401
    return distributed.LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        processes=True,
        # A scheduler runs whatever it is sent, by whoever reaches it.
        host="127.0.0.1",
        dashboard_address=None,
        resources={"GPU": 1} if torch.cuda.device_count() else None,
        # The network's memory is not Dask's to judge: at its limit a worker would be killed in the middle of a slide.
        memory_limit=0,
    )


def _threads_of(workers: int) -> int | None:
    """Threads for each worker of this machine, which Dask would give one; None where the user has said."""
    return None if "OMP_NUM_THREADS" in os.environ else max(1, (os.cpu_count() or 1) // workers)


def _connect(distributed: Any, address: str) -> Any:  # noqa: ANN401
    # In a thread of its own: where this is called from a notebook, the main thread runs a loop already.
    with ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(asyncio.run, _greet(distributed, address)).result()
            client = distributed.Client(address, timeout=_CONNECT_SECONDS)
        except (asyncio.TimeoutError, MemoryError):  # Words of another protocol are read as the length of a message.
            raise PredictionError(
                f"What listens at {address} does not answer as a Dask scheduler does; start one with: dask scheduler"
            ) from None
        except (OSError, ValueError, ImportError) as error:
            raise PredictionError(f"No Dask scheduler at {address} ({error}); start one with: dask scheduler") from None
    try:
        client.wait_for_workers(1, timeout=_WORKER_SECONDS)
    except asyncio.TimeoutError:
        client.close()
        raise PredictionError(
            f"The scheduler at {address} has no workers; start some with: dask worker {address} --resources GPU=1"
        ) from None
    return client


async def _greet(distributed: Any, address: str) -> None:  # noqa: ANN401
    """Connect and leave: Dask's own client waits without end for what accepts a connection and stays silent."""
    connecting = distributed.comm.connect(address, timeout=_CONNECT_SECONDS)
    (await asyncio.wait_for(connecting, 2 * _CONNECT_SECONDS)).abort()


def _check_versions(client: Any) -> None:  # noqa: ANN401
    """Refuse workers with another darefine, or none: those would die of the first task, and nobody would do it.

    The function that they run is Python's own, so that it can be had without darefine.
    """
    try:
        here = metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:  # A checkout that is not installed; `_work` compares as well.
        return
    for address, found in client.run(metadata.version, _DISTRIBUTION, on_error="return").items():
        if found != here:
            what = "no darefine that it could import" if isinstance(found, Exception) else f"darefine {found}"
            raise PredictionError(f"The worker at {address} has {what}, here it is {here}; install the same on both")


def _has_gpu_resource(client: Any) -> bool:  # noqa: ANN401
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return any("GPU" in (worker.get("resources") or {}) for worker in workers)


def _work(task: SlideTask, run: Runner, version: str, threads: int | None) -> SlideResult:
    """Run a task on a worker; one at a time, however many threads the worker has."""
    worker = _distributed().get_worker()
    if version != __version__:
        where = f"the worker at {worker.address} has darefine {__version__}, here it is {version}"
        return SlideResult(task=task, error=f"{task.slide}: {where}; install the same on both")
    with _ONE_SLIDE:
        if threads is not None:
            torch.set_num_threads(threads)
        return run_task(_on_device(task, worker.name), run, _teller(worker))


def _on_device(task: SlideTask, worker: object) -> SlideTask:
    """Give the workers of a local cluster, which are numbered, a GPU each."""
    gpus = torch.cuda.device_count()
    if gpus < 2 or not isinstance(worker, int) or task.options.device not in ("auto", "cuda"):
        return task
    # Pinned memory is the current device's: without this, every worker would hold a context on the first one.
    torch.cuda.set_device(worker % gpus)
    return replace(task, options=replace(task.options, device=f"cuda:{worker % gpus}"))


def _teller(worker: Any) -> Report:  # noqa: ANN401
    """Pass progress on to the caller, about once a second and at the end."""
    last = 0.0

    def tell(progress: PredictionProgress) -> None:
        nonlocal last
        now = time.monotonic()
        if progress.done == progress.total or now - last >= _REPORT_SECONDS:
            last = now
            worker.log_event(_TOPIC, {_TOPIC: asdict(progress)})

    return tell
