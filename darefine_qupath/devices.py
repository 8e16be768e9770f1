"""Choose the device and precision that a network runs in, copy to it, and say what to do when its memory runs out."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from darefine_qupath.errors import DeviceError

__all__ = [
    "DTYPES",
    "Precision",
    "autocast",
    "choose_device",
    "choose_precision",
    "full_float32",
    "is_out_of_memory",
    "keep_freed_memory",
    "memory_advice",
    "to_device",
]

Precision = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "alloc_failed")
# Of malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def choose_device(name: str, *, local_rank: int | None = None) -> torch.device:
    """Device of a name.

    Parameters
    ----------
    name : str
        ``"auto"`` (CUDA, else MPS, else the CPU) or what torch calls it.
    local_rank : int, optional
        Of several processes on this machine, the number of this one: it takes the CUDA device of that number.

    Returns
    -------
    torch.device

    Raises
    ------
    DeviceError
        If torch cannot use it.
    """
    chosen = name
    if name == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if chosen == "cuda" and local_rank is not None:
        chosen = f"cuda:{local_rank}"
    try:
        device = torch.device(chosen)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(f"Device {chosen!r} cannot be used ({reason}); try --device cpu") from None
    return device


def choose_precision(precision: Precision, device: torch.device, *, training: bool = False) -> str:
    """Fastest precision that a device computes natively, where the user leaves it open.

    Parameters
    ----------
    precision : {"auto", "fp32", "bf16", "fp16"}
        The user's choice.
    device : torch.device
        Where the network runs.
    training : bool
        Whether it is trained there, which on a CPU is done in float32.

    Returns
    -------
    str
        A key of `DTYPES`.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and not training and _cpu_has_bf16() else "fp32"


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself; emulation is slower than float32."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    checks = [check for check in (getattr(torch.cpu, name, None) for name in names) if check is not None]
    if checks:
        return any(check() for check in checks)
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


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


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Context in which convolutions compute in `dtype`; float32 is float32, not TF32."""
    return full_float32() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device; to a GPU from pinned memory, since any other copy waits for the step under way there.

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch's allocator of the CPU and CUDA's libraries only say so in words."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(known in text for known in _OUT_OF_MEMORY)


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Turn an out-of-memory error into a `DeviceError` that says what to change.

    Parameters
    ----------
    advice : str
        Goes on after ``"Out of memory"``.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceError(f"Out of memory {advice}") from error


@cache
def keep_freed_memory() -> None:
    """Ask the C library to keep large blocks that are freed: the system would clear their pages anew for every layer.

    Does nothing where the library is not glibc.
    """
    try:
        mallopt, is_glibc = ctypes.CDLL(None).mallopt, hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
    except (AttributeError, OSError, TypeError):
        return
    if is_glibc:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
