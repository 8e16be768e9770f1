"""What training and prediction both need to know of the device that a network runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["full_float32", "is_out_of_memory", "sent"]

_OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "alloc_failed")


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 as float32: left alone, GPUs convolve it as TF32, with 10 bits of mantissa for its 23."""
    former = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = former[0]
        torch.set_float32_matmul_precision(former[1])


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
