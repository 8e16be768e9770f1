"""Join the processes of one run: who this process is, and sums over all of them.

Started by ``torchrun`` (or anything that sets ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and
``MASTER_PORT``), every process trains on its part of each batch; torch.distributed connects them, with NCCL between
CUDA devices and gloo between CPUs. Without these variables there is one process and every function here is trivial.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from darefine_qupath.devices import choose_device
from darefine_qupath.errors import DarefineError, TrainingError, TrainingStoppedError
from darefine_qupath.models import SegmentationNetwork

__all__ = ["ProcessGroup", "join_process_group"]

# The others wait while the first process cuts the tiles of a whole project.
_COLLECTIVE_TIMEOUT = timedelta(hours=12)


@dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """A process among those of the run.

    Attributes
    ----------
    rank : int
        0 to `size` - 1; process 0 validates what it is given, writes files and reports.
    size : int
        Number of processes.
    device : torch.device
        Where this process computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes; a collective call."""
        if self.size > 1:
            tensor = tensor.clone()
            distributed.all_reduce(tensor)
        return tensor

    def value_of_main(self, value: float) -> float:
        """Return what the first process has, whatever this one has; a collective call.

        What decides which collective call comes next must be the same in all processes. Clocks, signals and files on
        several machines are not: the first process decides.
        """
        tensor = torch.tensor(float(value) if self.is_main else 0.0, device=self.device)
        return float(self.sum(tensor))

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """Fail in all processes where one fails inside this block; a collective call.

        Raises
        ------
        TrainingError
            If it was another process that failed. One that fails raises its own error.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised below, when the others know
            failure = error
        num_failed = float(self.sum(torch.tensor(float(failure is not None), device=self.device)))
        if failure is not None:
            raise failure
        if num_failed:
            raise TrainingError("Another process could not go on; its own message says why")

    @contextmanager
    def report_lost_peers(self, folder: Path) -> Iterator[None]:
        """Turn the network's errors when other processes are gone into one line.

        Parameters
        ----------
        folder : Path
            The run that they share.

        Raises
        ------
        TrainingError
            In the place of torch's error.
        """
        try:
            yield
        except TrainingStoppedError:
            raise  # all processes stop together, and part as they should
        except BaseException as error:
            self._skip_shutdown()
            if isinstance(error, DarefineError) or not (self.size > 1 and _is_lost(error)):
                raise
            raise TrainingError(
                f"Process {self.rank} of {self.size} has lost another one, whose own message says why; if there is "
                f"none, it was killed, often for want of memory. Then go on with --resume {folder}"
            ) from error

    def _skip_shutdown(self) -> None:
        """Leave without shutting the group down, which would wait for processes that may be waiting for this one."""
        if self.size > 1 and self.device.type == "cuda":
            atexit.unregister(distributed.destroy_process_group)

    def share_norms(self, network: SegmentationNetwork) -> None:
        """Make batch norm see the batches of all processes, in place; only between CUDA devices does torch do so."""
        if self.size > 1 and self.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]

    def share_buffers(self, network: nn.Module) -> None:
        """Give every process the buffers of the first, in place: on CPUs each has batch-norm statistics of its own."""
        if self.size > 1:
            for buffer in network.buffers():
                distributed.broadcast(buffer, 0)

    def wrap(self, network: nn.Module) -> nn.Module:
        """Return the network such that gradients are averaged over the processes."""
        if self.size == 1:
            return network
        return DistributedDataParallel(network, device_ids=[self.device] if self.device.type == "cuda" else None)


def join_process_group(device: str) -> ProcessGroup:
    """Join the processes that ``torchrun`` started; they stay joined until this process ends.

    Parameters
    ----------
    device : str
        See `darefine_qupath.devices.choose_device`.

    Returns
    -------
    ProcessGroup
        Of one process where the environment names no others.

    Raises
    ------
    TrainingError
        If the environment is incomplete.
    DeviceError
        If the device cannot be used.
    """
    try:
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise TrainingError(f"RANK, WORLD_SIZE or LOCAL_RANK is not a number ({error}); start with torchrun") from None
    if device.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise TrainingError(f"Several processes cannot share {device}; with --device cuda each takes its own")
    group = ProcessGroup(rank=rank, size=size, device=choose_device(device, local_rank=local_rank))
    if group.device.type == "cuda":
        torch.cuda.set_device(group.device)
    if size > 1 and not distributed.is_initialized():
        _join(group)
    return group


def _is_lost(error: BaseException) -> bool:
    """Whether an error is about another process that is gone."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, distributed.DistError) or any(sign in str(error).lower() for sign in ("gloo", "nccl"))
    )


def _join(group: ProcessGroup) -> None:
    backend = "nccl" if group.device.type == "cuda" else "gloo"
    try:
        distributed.init_process_group(backend, rank=group.rank, world_size=group.size, timeout=_COLLECTIVE_TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise TrainingError(
            f"Process {group.rank} of {group.size} could not join the others ({error}); start with torchrun, or unset "
            f"WORLD_SIZE to train alone"
        ) from error
    # Joining a second time would meet the leftovers of the first: the group is left at the very end alone.
    atexit.register(distributed.destroy_process_group)
