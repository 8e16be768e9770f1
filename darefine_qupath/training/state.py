"""Save and restore a run in the middle of it: all that the next step depends on, in one file without code.

The file is a safetensors file (weights, averages, optimiser moments) with the counters as JSON in its header, replaced
atomically, so that whatever kills a run leaves the last whole state.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from darefine_qupath.checkpoint.model_file import rename_former_tensors
from darefine_qupath.errors import TrainingError
from darefine_qupath.filesystem import atomic_write
from darefine_qupath.limits import NOTES, naming, parse_json, spoken
from darefine_qupath.training.train_step import Stepper

__all__ = ["Counters", "load_state", "read_trained", "save_state"]

FORMAT = "darefine-training-state"
VERSION = 3
"""Version of the file; version 2, which named some tensors otherwise, is read too."""


@dataclass(frozen=True, kw_only=True)
class Counters:
    """How far a run is.

    Attributes
    ----------
    epoch : int
        Epoch under way, counted from 0.
    step : int
        Steps of it that are done.
    loss_sum : float
        Sum of their losses.
    best_miou : float or None
        Best so far.
    best_epoch : int or None
        When it was, counted from 1.
    num_stale : int
        Validations since then.
    is_finished : bool
        Whether the run came to its end.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    best_miou: float | None = None
    best_epoch: int | None = None
    num_stale: int = 0
    is_finished: bool = False

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Counters:
        """Read the counters of a state.

        Raises
        ------
        TypeError
            If one is no number.
        """
        known = cls(**data)
        wrong = [key for key, value in data.items() if not isinstance(value, (int, float)) and value is not None]
        if wrong:
            raise TypeError(f"{', '.join(wrong)} should be numbers")
        return known


def save_state(path: Path, stepper: Stepper, counters: Counters) -> None:
    """Write the state of a run; a write that is interrupted leaves the former file as it was.

    Parameters
    ----------
    path : Path
        The file.
    stepper : Stepper
        Between two steps.
    counters : Counters
        How far the run is.

    Raises
    ------
    TrainingError
        If the file cannot be written.
    """
    tensors = {f"network/{name}": tensor for name, tensor in stepper.network.state_dict().items()}
    if stepper.average is not None:
        tensors |= {f"average/{name}": tensor for name, tensor in stepper.average.state_dict().items()}
    for index, values in stepper.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": value for key, value in values.items() if isinstance(value, Tensor)}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "step": stepper.step,
        "counters": asdict(counters),
        "trained": list(stepper.frozen.trained),
        "scaler": stepper.scaler.state_dict(),
    }
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_write(path, TrainingError) as temporary:
        try:
            save_file(plain, temporary, metadata={"darefine": json.dumps(header)})
        except SafetensorError as error:
            raise TrainingError(f"The training state {path} cannot be written ({error}); is the disk full?") from error


def read_trained(path: Path) -> tuple[str, ...]:
    """Read which encoders came trained into the run of a state; their weight files need not be there any more.

    Parameters
    ----------
    path : Path
        What `save_state` wrote.

    Returns
    -------
    tuple of str

    Raises
    ------
    TrainingError
        If the file is damaged or of another version.
    """
    with _open_state(path) as (header, _):
        return tuple(header["trained"])


def load_state(path: Path, stepper: Stepper) -> Counters:
    """Restore a run from its saved state.

    Parameters
    ----------
    path : Path
        What `save_state` wrote.
    stepper : Stepper
        Of the same network and recipe; changed in place.

    Returns
    -------
    Counters
        How far the run is.

    Raises
    ------
    TrainingError
        If the file is damaged, of another version, or belongs to another network or recipe.
    """
    with _open_state(path) as (header, file):
        counters, step = Counters.from_json(header["counters"]), int(header["step"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    renamed = rename_former_tensors if header["version"] == 2 else dict
    try:
        stepper.network.load_state_dict(renamed(_with_prefix("network/", tensors)))
        if stepper.average is not None:
            stepper.average.load_state_dict(renamed(_with_prefix("average/", tensors)))
        _restore_optimizer(stepper, _with_prefix("optimizer/", tensors) or _with_prefix("optimiser/", tensors))
        if header["scaler"]:  # empty where the run had no need of one; fp16 may have been chosen since
            stepper.scaler.load_state_dict(header["scaler"])
    except Exception as error:
        # torch, and its optimisers, stumble over a foreign state in any way there is.
        raise TrainingError(
            f"{path} does not belong to this network and recipe ({spoken(error)}); train afresh"
        ) from error
    stepper.step = step
    return counters


def _restore_optimizer(stepper: Stepper, tensors: Mapping[str, Tensor]) -> None:
    parameters = [parameter for group in stepper.optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split("/")
        parameter = parameters[int(index)]
        # Moments lie in memory as the weights do: another layout may add up in another order.
        kept = torch.empty_like(parameter).copy_(tensor) if tensor.shape == parameter.shape else tensor
        state.setdefault(int(index), {})[key] = kept.detach()
    groups = stepper.optimizer.state_dict()["param_groups"]
    stepper.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@contextmanager
def _open_state(path: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield the header of a state and the open file."""
    if not path.is_file():
        raise TrainingError(f"There is no training state {path} to go on from; train without --resume")
    with naming(f"The training state {path} is damaged; train afresh", TrainingError), safe_open(path, "pt") as file:
        header = parse_json((file.metadata() or {}).get("darefine", "{}"), NOTES)
        kind, version = header.get("format", "a file of another program"), header.get("version")
        is_known = kind == FORMAT and version in (2, VERSION)
        if is_known:
            yield header, file
    if not is_known:
        raise TrainingError(f"{path} is {kind} version {version}; expected {FORMAT} version {VERSION}; train afresh")
