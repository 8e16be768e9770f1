#!/usr/bin/env python3
"""Kill darefine with SIGKILL at random moments, and look at the project each time.

    scripts/check/kills.py [--kills 200] [--seed 0] [PROJECT]
    scripts/check/kills.py --commands [NAME ...] [--kills 60] [--seed 0]

The first kills single writes. PROJECT is copied first (by default one of the test projects). After every kill the
project must open with the state before the write or the state after it, hold no file that QuPath would take for its
own, and take the next write.

The second kills whole commands (predict, import, undo, restore, tiles, train; all of them by default) on copies of
projects/tiny. After every kill each image must have its objects of before the command or of after it, whatever the
pathologist drew among them; the same command again (train: --resume, where there is something to resume) must lead to
where it leads without a kill; and no temporary file may be left then.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import shapely

from darefine_qupath import cli
from darefine_qupath.annotations import Annotation
from darefine_qupath.cli import group
from darefine_qupath.project import Changes, Project, list_backups, open_project

DATA = Path(__file__).resolve().parents[2] / "tests" / "data" / "qupath"
OWN = [
    Annotation(
        id=UUID(int=10_000 + number),
        geometry=shapely.box(40 * number, 0, 40 * number + 30, 300).difference(shapely.box(40 * number, 9, 9999, 19)),
        path_class=f"Crash {number % 3}",
        measurements={"DA-RefineNet: confidence": 0.5},
    )
    for number in range(40)
]


State = tuple[object, ...]


def state(folder: Path) -> State:
    """Everything that the project says, read from scratch."""
    with open_project(folder, engine="embedded") as project:
        images = tuple((image.id, image.name, tuple(image.metadata.items())) for image in project.images)
        objects = tuple(
            tuple((record.id, record.path_class, record.geometry and record.geometry.wkb) for record in found)
            for found in map(project.objects, project.images)
        )
        return images, objects


def write_objects(project: Project) -> None:
    """Add our objects, or take them out where they are."""
    image = project.images[0]
    ours = {record.id for record in OWN}
    there = any(record.id in ours for record in project.objects(image))
    project.apply(image, Changes(remove=sorted(ours)) if there else Changes(add=OWN))


def write_metadata(project: Project) -> None:
    """Change the metadata of an image."""
    image = project.images[0]
    count = int(image.metadata.get("crash", "0"))
    project.add_metadata({image.id: {"crash": str(count + 1)}})


def write_image(project: Project) -> None:
    """Add an image."""
    project.add_image(project.folder.parent.parent / "images" / "plain.png", name="crash")


WRITES = {"objects": write_objects, "metadata": write_metadata, "image": write_image}


def run_write(folder: Path, name: str, ready: int) -> None:
    """Do one write in this process; tell `ready` when it begins."""
    with open_project(folder, engine="embedded") as project:
        for image in project.images:
            project.objects(image)
        os.write(ready, b"x")
        WRITES[name](project)


def start(folder: Path, name: str) -> int:
    """Start a process that writes; returns when its write begins."""
    told, ready = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run_write(folder, name, ready)
            code = 0
        finally:
            os._exit(code)
    os.close(ready)
    os.read(told, 1)
    os.close(told)
    return child


def finish(child: int) -> int:
    """Exit status of a process; negative when a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_to_end(folder: Path, name: str) -> float:
    """Do a write without a kill; returns how many seconds it takes."""
    child = start(folder, name)
    began = time.monotonic()
    if finish(child) != 0:
        sys.exit(f"A write of {name} failed without being killed")
    return time.monotonic() - began


def strangers(folder: Path) -> list[str]:
    """Files that neither QuPath writes nor has a name that QuPath passes over."""
    ours = {"project.qpproj", "project.qpproj.backup", "classes.json", "metadata.json", "data.qpdata", "summary.json"}
    ours |= {"server.json", "thumbnail.jpg", "expected.json"}
    files = (path for path in folder.rglob("*") if path.is_file() and (folder / "darefine") not in path.parents)
    return [str(path) for path in files if path.name not in ours and not path.name.endswith(".darefine-tmp")]


def after_write(folder: Path, name: str) -> State:
    """State that a write leads to, found on a copy."""
    twin = folder.with_name(f"{folder.name}-twin")
    shutil.copytree(folder, twin)
    run_to_end(twin, name)
    found = state(twin)
    shutil.rmtree(twin)
    return found


def kill_once(folder: Path, name: str, delay: float) -> str:
    """Kill one write after `delay` seconds; returns ``"old"`` or ``"new"``, or ends with what is wrong."""
    old, new = state(folder), after_write(folder, name)
    child = start(folder, name)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    status = finish(child)
    if status not in (0, -signal.SIGKILL):
        sys.exit(f"The write of {name} failed with status {status}")
    found = state(folder)
    if found not in (old, new):
        sys.exit(f"After a kill in {name} at {delay * 1000:.2f} ms the project is neither old nor new: {found}")
    if strangers(folder):
        sys.exit(f"After a kill in {name} at {delay * 1000:.2f} ms there are {strangers(folder)}")
    return "old" if found == old else "new"


# -- whole commands

TINY = Path(__file__).resolve().parents[2] / "projects" / "tiny"
TRAINING = ["--epochs=2", "--set=samples_per_epoch=16", "--width=8", "--encoder-weights=none", "--device=cpu"]


@dataclass(frozen=True)
class Place:
    """Where a command works: a folder with the project, and what there is beside it."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def project(self) -> Path:
        """The project."""
        return self.folder / "project"

    def arguments(self, name: str) -> list[str]:
        """Return the command line of a command, ready to be killed or run again."""
        project, shared = str(self.project), self.folder.parent
        return {
            "predict": ["predict", project, "--model", str(shared / "model/model.safetensors"), *PREDICTION],
            "import": ["import", project, str(shared / "drawn.geojson"), "--image", "1"],
            "undo": ["undo", project],
            "restore": ["restore", project, "1", "--which", oldest_backup(self.project)],
            "tiles": ["tiles", project, "--out", str(self.folder / "tiles"), "--save-roles", STRIDE],
            "train": ["train", project, "--out", str(self.folder / "run"), "--save-roles", STRIDE, *TRAINING],
            "resume": ["train", "--resume", str(self.folder / "run")],
        }[name]

    def copy_to(self, folder: Path) -> Place:
        """Copy all of it to a folder that is removed first."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder, folder)
        return Place(folder)


PREDICTION = ["--background", "--overlap=0", "--device=cpu"]
STRIDE = "--stride-um=128"
COMMANDS = ("predict", "import", "undo", "restore", "tiles", "train")
ON_PREDICTIONS = ("undo", "restore")


def oldest_backup(project: Path) -> str:
    """Name of the backup that holds what was there before any prediction."""
    found = list_backups(project, "1")
    return found[-1].path.name if found else "none"


def begin(arguments: Sequence[str], log: Path) -> int:
    """Start a process that runs a command line, with the program loaded."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = 1
        try:
            cli.main(list(arguments))
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(code)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpgid(child, child)  # in both: whoever comes first
    return child


def run_command(place: Place, name: str) -> int:
    """Run a command to its end; returns its exit code."""
    return finish(begin(place.arguments(name), place.folder / "log.txt"))


def contents(project: Path) -> dict[str, object]:
    """Objects, classes and metadata by what they are of; of ours everything but the identity, which is a run's own."""
    with open_project(project, engine="embedded") as opened:
        found: dict[str, object] = {"classes": tuple(sorted(item.name for item in opened.classes))}
        for image in opened.images:
            found[f"metadata of {image.id}"] = tuple(sorted(image.metadata.items()))
            found[f"objects of {image.id}"] = tuple(sorted(map(_content, opened.objects(image))))
        return found


def _content(record: Annotation) -> tuple[str, str, str]:
    is_ours = any(key.startswith("darefine") for key in record.metadata)
    shape = "" if record.geometry is None else record.geometry.normalize().wkt
    return "" if is_ours else str(record.id), str(record.path_class), shape


def temporary_files(place: Place) -> set[str]:
    """Files that look as if they were to go."""
    names = (path.relative_to(place.folder) for path in place.folder.rglob("*") if path.is_file())
    return {str(name) for name in names if re.search(r"^\.(?!lock$)|tmp|partial", name.name)}


def make_places(scratch: Path, names: Sequence[str]) -> dict[str, Place]:
    """Make what the commands start from: a project, a file to import, perhaps a model and predictions."""
    plain = Place(scratch / "plain")
    shutil.copytree(TINY, plain.project)
    boxes = [shapely.box(30 * number, 20, 30 * number + 25, 300) for number in range(20)]
    features = [
        {
            "type": "Feature",
            "id": str(UUID(int=500 + number)),
            "geometry": shapely.geometry.mapping(box),
            "properties": {"objectType": "annotation", "classification": {"name": f"Crash {number % 3}"}},
        }
        for number, box in enumerate(boxes)
    ]
    (scratch / "drawn.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    predicted = Place(scratch / "predicted")
    if {"predict", *ON_PREDICTIONS} & set(names):
        plain.copy_to(predicted.folder)
        run_or_end(predicted, "train")
        shutil.move(predicted.folder / "run", scratch / "model")
        plain.copy_to(predicted.folder)
        run_or_end(predicted, "predict")
    return {name: predicted if name in ON_PREDICTIONS else plain for name in COMMANDS}


def run_or_end(place: Place, name: str) -> None:
    """Run a command that nobody kills."""
    if run_command(place, name) != 0:
        sys.exit(f"{name} failed without being killed: {(place.folder / 'log.txt').read_text()}")


@dataclass(frozen=True)
class Reference:
    """What a command does when nobody kills it."""

    before: dict[str, object]
    after: dict[str, object]
    seconds: float
    temporary: set[str]


def reference(start: Place, name: str) -> Reference:
    """Run a command on a copy."""
    place = start.copy_to(start.folder.with_name("reference"))
    began = time.monotonic()
    run_or_end(place, name)
    seconds = time.monotonic() - began
    return Reference(contents(start.project), contents(place.project), seconds, temporary_files(place))


class FaultError(Exception):
    """Something that must not come of a kill."""


def kill_command(start: Place, name: str, known: Reference, delay: float) -> str:
    """Kill a command after some seconds and look; returns what was found, ``"old"``, ``"new"`` or ``"between"``."""
    place = start.copy_to(start.folder.with_name("killed"))
    child = begin(place.arguments(name), place.folder / "log.txt")
    time.sleep(delay)
    os.killpg(child, signal.SIGKILL)
    status = finish(child)
    if status not in (0, -signal.SIGKILL):
        raise FaultError(f"exit code {status}: {(place.folder / 'log.txt').read_text()}")
    found = contents(place.project)
    wrong = [part for part, value in found.items() if value not in (known.before.get(part), known.after.get(part))]
    if wrong:
        raise FaultError(f"the {', '.join(wrong)} are neither of before nor of after")
    go_on(place, name)
    ended = contents(place.project)
    wrong = [part for part in known.after if ended.get(part) != known.after[part]]
    if wrong:
        raise FaultError(f"the next run left other {', '.join(wrong)} than one without a kill")
    if name == "undo":
        # One that found nothing to undo any more wrote nothing: the next write cleans up.
        run_or_end(place, "import")
    left = temporary_files(place) - known.temporary
    if left:
        raise FaultError(f"the next run left {sorted(left)}")
    same = [when for when in ("before", "after") if found == getattr(known, when)]
    return {"before": "old", "after": "new"}[same[0]] if same else "between"


def go_on(place: Place, name: str) -> None:
    """Give the command again, as a user would after a power cut."""
    if name == "train" and (place.folder / "run").is_dir() and run_command(place, "resume") == 0:
        return
    code = run_command(place, name)
    # There is nothing to undo any more where the kill came after the last write.
    if code != 0 and not (name == "undo" and code == 2):
        raise FaultError(f"{name} does not go on: {(place.folder / 'log.txt').read_text()}")


def kill_commands(names: Sequence[str], kills: int, seed: int) -> None:
    """Kill commands in turn and print what came of them."""
    for module in {module for module, _ in group.COMMANDS.values()}:
        # Before the forks: what is killed is the work, not the loading.
        importlib.import_module(f"darefine_qupath.cli.{module}")
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        places = make_places(Path(scratch), names)
        known = {name: reference(places[name], name) for name in names}
        seen: Counter[tuple[str, str]] = Counter()
        faults: list[str] = []
        for number in range(kills):
            name = names[number % len(names)]
            delay = rng.uniform(0, 1.05 * known[name].seconds)
            try:
                seen[name, kill_command(places[name], name, known[name], delay)] += 1
            except FaultError as fault:
                faults.append(f"After a kill in {name} at {delay:.2f} s {fault}")
                print(faults[-1], flush=True)
        for name in names:
            counts = ", ".join(f"{seen[name, what]} {what}" for what in ("old", "between", "new"))
            print(f"{name:8} {known[name].seconds:5.1f} s without a kill; after a kill: {counts}")
    if faults:
        sys.exit(f"{len(faults)} of {kills} kills went wrong")
    print(f"{kills} kills: the project opened each time, nothing drawn was lost, the next run ended as without a kill")


def main() -> None:
    """Run the kills and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", nargs="?", type=Path, default=DATA / "qupath-0.6.0" / "annotated")
    parser.add_argument("--kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="*", choices=COMMANDS, help="kill whole commands")
    options = parser.parse_args()
    if options.commands is not None:
        kill_commands(options.commands or COMMANDS, options.kills or 60, options.seed)
    else:
        kill_writes(options.project.resolve(), options.kills or 200, options.seed)


def kill_writes(source: Path, kills: int, seed: int) -> None:
    """Kill single writes and print what came of them."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / source.parent.name / source.name
        shutil.copytree(source, folder)
        shutil.copytree(DATA / "images", Path(scratch) / "images")
        seconds = {name: max(run_to_end(folder, name) for _ in range(4)) for name in WRITES}
        seen: Counter[tuple[str, str]] = Counter()
        for number in range(kills):
            # Two kills in three go to the objects: they are what is worth most.
            name = ("objects", "objects", "metadata", "objects", "objects", "image")[number % 6]
            seen[name, kill_once(folder, name, rng.uniform(0, 1.05 * seconds[name]))] += 1
        for name, longest in seconds.items():
            old, new = seen[name, "old"], seen[name, "new"]
            print(f"{name:9} {longest * 1000:6.1f} ms per write: {old:3} kills left the old state, {new:3} the new one")
        for name in WRITES:
            run_to_end(folder, name)
        left = [str(path) for path in folder.rglob("*.darefine-tmp")]
        if left:
            sys.exit(f"The last writes left {left}")
        print(f"{kills} kills: the project opened every time, old or new, and later writes cleaned up")


if __name__ == "__main__":
    main()
