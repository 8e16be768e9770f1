"""What training and prediction both need to know of the device that a network runs on."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_out_of_memory", "sent"]

_OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch's allocator of the CPU and CUDA's libraries only say so in words.

    Parameters
    ----------
    error : BaseException
        What a network raised.

    Returns
    -------
    bool
    """
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(known in text for known in _OUT_OF_MEMORY)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device; to a GPU from pinned memory, as any other copy waits for the step that is under way there.

    Parameters
    ----------
    tensor : Tensor
        On the CPU, or on `device` already.
    device : torch.device
        Where to.

    Returns
    -------
    Tensor
        On the device, perhaps still on its way; whatever the device does with it waits.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
