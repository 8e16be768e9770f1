#!/usr/bin/env python3
"""Measure opening, reading and writing QuPath projects: processor time beyond interpreter start, and peak memory.

    scripts/bench/project.py [--runs 5] [--scales 1 4 16] [--big PROJECT]

``annotated``  open and read a small project with every kind of object, imports and all
``read``       the same with 20,000 detections and 500 polygons of 200 vertices (``big``), and 4 and 16 times that
``append``     write 1,000 polygons of 100 vertices more into it: read, edited, verified, replaced
``codec``      the object stream alone, decoded and encoded back

Every number is the median of runs in processes of their own, with the modules compiled as those of an installed package
are. Where QuPath is found (PAQUO_QUPATH_DIR) the paquo engine
does the same beside ours. With other work on the machine compare processor time only, and ratios.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from uuid import UUID

DATA = Path(__file__).resolve().parents[2] / "tests" / "data" / "qupath" / "qupath-0.6.0"
MIB = 1 << 20


def memory(name: str) -> int:
    """``VmHWM`` (peak) or ``VmRSS`` of this process, in bytes; what getrusage says begins with the parent's peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{name}:\s*(\d+)", status, re.MULTILINE)[1])  # type: ignore[index]


def task_start(_: Path, __: str) -> None:
    """Do nothing."""


def task_read(folder: Path, engine: str) -> None:
    """Open a project and read all objects of all images."""
    from darefine_qupath.project import open_project  # noqa: PLC0415 - the import is part of what is measured

    with open_project(folder, engine=engine) as project:
        print(json.dumps({"objects": sum(len(project.objects(image)) for image in project.images)}))


def task_append(folder: Path, engine: str) -> None:
    """Write 1,000 polygons into the first image."""
    import shapely  # noqa: PLC0415

    from darefine_qupath.annotations import Annotation  # noqa: PLC0415
    from darefine_qupath.project import Changes, open_project  # noqa: PLC0415

    angles = [2 * math.pi * step / 100 for step in range(100)]
    new = [
        Annotation(
            geometry=shapely.Polygon([(x + 30 * math.cos(a), y + 30 * math.sin(a)) for a in angles]),
            path_class="Tumor",
            name="ours",
            measurements={"DA-RefineNet: confidence": 0.5},
            metadata={"darefine.run": "bench"},
        )
        for x, y in ((50 + 60 * (number % 32), 50 + 60 * (number // 32)) for number in range(1000))
    ]
    started = time.process_time()
    with open_project(folder, engine=engine) as project:
        project.apply(project.images[0], Changes(add=new))
    print(json.dumps({"apply_s": time.process_time() - started}))


def task_codec(folder: Path, _: str) -> None:
    """Decode and encode the object stream of the first image."""
    from darefine_qupath.javaserial.decode import decode  # noqa: PLC0415
    from darefine_qupath.javaserial.encode import encode  # noqa: PLC0415

    data = (folder / "data" / "1" / "data.qpdata").read_bytes()
    started = time.process_time()
    stream = decode(data)
    decoded = time.process_time()
    again = encode(stream)
    print(json.dumps({"decode_s": decoded - started, "encode_s": time.process_time() - decoded, "same": again == data}))


TASKS = {"start": task_start, "read": task_read, "append": task_append, "codec": task_codec}


def child(task: str, folder: Path, engine: str) -> None:
    """Do one task, and print what it took as the last line."""
    if task != "start":
        import darefine_qupath.project  # noqa: F401, PLC0415 - memory counts from here on
    loaded = memory("VmRSS")
    TASKS[task](folder, engine)
    print(json.dumps({"cpu_s": time.process_time(), "grown": max(0, memory("VmHWM") - loaded)}))


def measure(task: str, folder: Path, engine: str, runs: int) -> dict[str, float]:
    """Medians of several runs of a task, each on a fresh copy of the project."""
    found: dict[str, list[float]] = {}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment.setdefault("PYTHONPYCACHEPREFIX", str(Path(tempfile.gettempdir()) / "darefine-bench-bytecode"))
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as name:
            # Images lie where a moved project finds them: QuPath saves no image whose file is missing.
            copy = Path(name) / "projects" / "project"
            shutil.copytree(DATA.parent / "images", Path(name) / "images")
            shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("expected*"))
            command = [sys.executable, __file__, "--task", task, "--folder", str(copy), "--engine", engine]
            ran = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            lines = ran.stdout.splitlines()
            for line in lines:
                if line.startswith("{"):
                    for key, value in json.loads(line).items():
                        found.setdefault(key, []).append(float(value))
    return {key: statistics.median(values) for key, values in found.items()}


def scaled(target: Path, factor: int) -> None:
    """Make a project of `factor` times 20,000 detections and 500 polygons."""
    import numpy as np  # noqa: PLC0415
    import shapely  # noqa: PLC0415

    from darefine_qupath.annotations import Annotation  # noqa: PLC0415
    from darefine_qupath.project import Changes  # noqa: PLC0415

    shutil.copytree(DATA / "empty", target, ignore=shutil.ignore_patterns("expected*"))
    rng = np.random.default_rng(0)
    from darefine_qupath.project.qpdata.document import Document  # noqa: PLC0415
    from darefine_qupath.project.qpdata.edit import edit_document  # noqa: PLC0415

    angles = np.arange(200) * (2 * math.pi / 200)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    small = np.array([(0, 0), (6, 0), (8, 4), (6, 8), (0, 6)])
    records = []
    for number in range(20_500 * factor):
        is_region = number < 500 * factor
        place = rng.uniform(0, 2000, 2).round(2)
        ring = place + circle * rng.uniform(28, 33, (200, 1)) if is_region else place + small
        measured = {} if is_region else {"Area": float(rng.uniform(40, 60)), "Mean": float(rng.uniform())}
        records.append(
            Annotation(
                id=UUID(int=(1 << 120) + number),
                geometry=shapely.Polygon(ring.round(2)),
                kind="annotation" if is_region else "detection",
                path_class=("Tumor", "Normal", None)[number % 3],
                measurements=measured,
            )
        )
    path = target / "data" / "2" / "data.qpdata"
    former = Document(path.read_bytes(), path=path)
    path.write_bytes(edit_document(former, Changes(add=records), {}).content)
    shutil.copytree(target / "data" / "2", target / "data" / "1", dirs_exist_ok=True)
    document = json.loads((target / "project.qpproj").read_text())
    document["images"] = [dict(document["images"][1], entryID=1)]
    (target / "project.qpproj").write_text(json.dumps(document))


def engines() -> list[str]:
    """Engines that work here."""
    return ["embedded", "paquo"] if os.environ.get("PAQUO_QUPATH_DIR") else ["embedded"]


def row(name: str, engine: str, found: dict[str, float], start: float, size: int) -> dict[str, object]:
    """One line of the report."""
    line: dict[str, object] = {"what": name, "engine": engine, "cpu_s": round(found["cpu_s"] - start, 3)}
    line |= {key: round(value, 3) for key, value in found.items() if key not in ("cpu_s", "grown")}
    line |= {"file_mib": round(size / MIB, 2), "memory_mib": round(found["grown"] / MIB, 1)}
    if size > MIB:
        line["memory_per_file"] = round(found["grown"] / size, 1)
    return line


def main() -> None:
    """Run everything and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--scales", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--big", type=Path, help="a real project instead of the generated one at scale 1")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--engine", default="embedded", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        child(options.task, options.folder, options.engine)
        return
    start = measure("start", DATA / "empty", "embedded", options.runs)["cpu_s"]
    print(json.dumps({"what": "interpreter start", "cpu_s": round(start, 3)}))
    with tempfile.TemporaryDirectory() as name:
        projects = [("annotated", DATA / "annotated", ["read"])]
        for factor in options.scales:
            folder = Path(name) / f"x{factor}"
            if factor == 1 and options.big:
                folder = options.big
            else:
                scaled(folder, factor)
            projects.append((f"big x{factor}", folder, ["codec", "read", "append"]))
        for label, folder, tasks in projects:
            size = max(path.stat().st_size for path in folder.rglob("data.qpdata"))
            for task in tasks:
                for engine in engines() if task != "codec" else ["embedded"]:
                    runs = options.runs if size < 20 * MIB else min(3, options.runs)
                    found = measure(task, folder, engine, runs)
                    print(json.dumps(row(f"{task} {label}", engine, found, start, size)), flush=True)


if __name__ == "__main__":
    main()
