#!/usr/bin/env python3
"""Damage the files of real projects in thousands of ways; each must be read, or refused with its name and place.

    scripts/check/fuzz.py [--cases 20000] [--seed 0] [--memory 512] [--seconds 5]
                          [--only qpdata|qpproj|server|exchange|own]

Workers may grow by ``--memory`` MiB over what Python and its libraries take; a case that takes longer than
``--seconds`` of processor time, crashes the worker, or raises anything but a project error is a failure, and is
printed with its number: ``--first N --cases 1`` does it again.

Nobody reads ``server.json``, QuPath as little as darefine: the same server stands in ``project.qpproj``, and that copy
counts. So a damaged one is tried twice: beside a sound project, which must read as ever, and then in its place there.

Annotation files of other programs ("exchange") are those of ``tests/exchange_samples.py``, packed ones damaged inside
too; those that darefine itself writes ("own": model files, settings, score maps, runs, datasets) are of
``tests/own_samples.py``. Bytes are flipped, moved and cut; JSON and XML also lose, double and nest their parts, and
get values of every odd kind.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import shapely

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from darefine_qupath.annotations import Annotation  # noqa: E402
from darefine_qupath.errors import AnnotationError, ProjectError, ProjectFormatError  # noqa: E402
from darefine_qupath.javaserial.decode import decode  # noqa: E402
from darefine_qupath.javaserial.encode import encode  # noqa: E402
from darefine_qupath.project import Changes, open_project  # noqa: E402
from darefine_qupath.project.qpdata.document import Document  # noqa: E402
from darefine_qupath.project.qpdata.edit import edit_document  # noqa: E402
from darefine_qupath.project.qpdata.read import ImageData, read_image_data  # noqa: E402
from darefine_qupath.project.qpdata.stored import expected_objects  # noqa: E402
from tests.exchange_samples import SAMPLES, packed_mutant, try_exchange  # noqa: E402
from tests.fuzzing import mutated  # noqa: E402
from tests.own_samples import NAMES, own_mutant, prepare, try_own  # noqa: E402

DATA = ROOT / "tests" / "data" / "qupath"
KINDS = {"qpdata": "data.qpdata", "qpproj": "project.qpproj", "server": "server.json", "exchange": "", "own": ""}
SHARES = {"qpdata": 0.35, "qpproj": 0.15, "server": 0.05, "exchange": 0.25, "own": 0.2}
SAMPLED = {"exchange": tuple(SAMPLES), "own": NAMES}
MIB = 1 << 20


class CaseError(Exception):
    """A case that is neither a correct read nor a proper error."""


@dataclass(frozen=True)
class Case:
    """One damaged file, the same for the same seed and number."""

    kind: str
    source: Path
    data: bytes
    rng: random.Random


def sources(only: str | None) -> dict[str, list[Path]]:
    """Files to damage, by kind."""
    kinds = [only] if only else list(KINDS)
    return {
        kind: [Path(name) for name in SAMPLED[kind]] if kind in SAMPLED else sorted(DATA.rglob(KINDS[kind]))
        for kind in kinds
    }


def case(number: int, seed: int, files: dict[str, list[Path]]) -> Case:
    """Make a case."""
    rng = random.Random(f"{seed}/{number}")
    kind = rng.choices(list(files), [SHARES[name] for name in files])[0]
    source = rng.choice(files[kind])
    if kind == "exchange":
        return Case(kind, source, packed_mutant(source.name, rng, mutated), rng)
    if kind == "own":
        return Case(kind, source, own_mutant(source.name, rng, mutated), rng)
    return Case(kind, source, mutated(source.read_bytes(), rng), rng)


def check_error(error: ProjectError, path: Path) -> str:
    """Look at an error: it names the file, and the place where it is damaged."""
    if str(path) not in str(error):
        raise CaseError(f"an error that does not name the file: {error}")
    if isinstance(error, ProjectFormatError):
        if error.offset is None:
            raise CaseError(f"an error without an offset: {error}")
        return "refused"
    return type(error).__name__


def try_qpdata(item: Case) -> str:
    """Read a damaged ``data.qpdata``; write to it when it can be read."""
    path = item.source
    try:
        image = read_image_data(item.data, path=path)
    except ProjectFormatError as error:
        return check_error(error, path)
    if encode(decode(item.data)) != item.data:
        raise CaseError("was read, and encodes to other bytes")
    if item.rng.random() < 0.2:
        return try_edit(image)
    return "read"


def try_edit(image: ImageData) -> str:
    """Add an object to a file that could be read, and look for it."""
    changes = Changes(add=[Annotation(geometry=shapely.box(1, 2, 3, 4), path_class="Fuzz")])
    try:
        edited = edit_document(Document(image.data, path=image.path), changes, {})
        again = read_image_data(edited.content, path=image.path)
    except (ProjectError, AnnotationError):
        return "read, edit refused"
    expected = sorted(map(repr, expected_objects(image, changes)))
    if sorted(map(repr, again.objects)) != expected:
        raise CaseError("an edit changed more than it should")
    return "read and edited"


def try_project(item: Case, folder: Path) -> str:
    """Open a project one of whose files is damaged, and read all of it."""
    project_folder, path = copied(item, folder)
    path.write_bytes(item.data)
    return open_and_read(project_folder, path)[0]


def try_server(item: Case, folder: Path) -> str:
    """Damage a server's description where nobody reads it, and then where it is read."""
    project_folder, path = copied(item, folder)
    sound = open_and_read(project_folder, path)
    path.write_bytes(item.data)
    if open_and_read(project_folder, path) != sound:
        raise CaseError("a damaged server.json changes what is read")
    project = project_folder / "project.qpproj"
    text = project.read_text(encoding="utf-8")
    place = text.index('"serverBuilder": ') + len('"serverBuilder": ')
    _, end = json.JSONDecoder().raw_decode(text, place)
    project.write_bytes(text[:place].encode() + item.data + text[end:].encode())
    return open_and_read(project_folder, project)[0]


def copied(item: Case, folder: Path) -> tuple[Path, Path]:
    """Copy the project of a case; gives its folder, and the place of the damaged file in it."""
    project_folder = folder / item.source.relative_to(DATA).parts[1]
    shutil.rmtree(project_folder, ignore_errors=True)
    original = next(parent for parent in item.source.parents if (parent / "project.qpproj").is_file())
    shutil.copytree(original, project_folder, ignore=shutil.ignore_patterns("expected*", "thumbnail.jpg"))
    return project_folder, project_folder / item.source.relative_to(original)


def open_and_read(project_folder: Path, damaged_file: Path) -> tuple[str, object]:
    """Read all of a project: what came of it, and what was read."""
    found: list[object] = []
    try:
        with open_project(project_folder, engine="embedded") as project:
            found += [(image, project.objects(image)) for image in project.images]
            found.append(project.classes)
    except ProjectError as error:
        return check_error(error, damaged_file), None
    refused = sum(image.unsupported is not None for image in project.images)
    return f"read, {refused} images refused by name" if refused else "read", found


def try_file(item: Case, folder: Path) -> str:
    """Read a damaged annotation file of another program."""
    return f"{item.source}: {try_exchange(item.source.name, item.data, folder)}"


def try_ours(item: Case, folder: Path) -> str:
    """Read a damaged file of darefine's own."""
    return f"{item.source}: {try_own(item.source.name, item.data, folder)}"


TRIES = {"qpproj": try_project, "server": try_server, "exchange": try_file, "own": try_ours}


def work(results: Connection, first: int, last: int, options: argparse.Namespace) -> None:
    """Do the cases, and tell about each."""
    files = sources(options.only)
    for kind, found in files.items():
        for path in found if kind not in SAMPLED else ():
            path.read_bytes()
    name = tempfile.mkdtemp()
    prepare(Path(name))
    base = peak()
    # Address space, and not resident memory alone: what is asked for counts, not only what is touched.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + options.memory * MIB,) * 2)
    signal.signal(signal.SIGPROF, too_long)
    try:
        for number in range(first, last):
            results.send(("begin", number))
            started = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, options.seconds)
            try:
                item = case(number, options.seed, files)
                outcome = try_qpdata(item) if item.kind == "qpdata" else TRIES[item.kind](item, Path(name))
                results.send(("done", item.kind, outcome, time.process_time() - started))
            except BaseException:  # noqa: BLE001 - whatever it is, it should not have been
                results.send(("failed", number, traceback.format_exc()))
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
    finally:
        shutil.rmtree(name, ignore_errors=True)
    results.send(("end", peak() - base))


def peak() -> int:
    """Peak resident memory, in bytes; what getrusage says begins with the parent's peak."""
    found = re.search(r"^VmHWM:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def too_long(*_: object) -> None:
    """Stop a case."""
    raise CaseError("takes too long")


@dataclass
class Tally:
    """What came of the cases."""

    outcomes: Counter[str]
    failures: list[str]
    slowest: float = 0.0
    slowest_number: int = -1
    memory: int = 0


def follow(results: Connection, process: BaseProcess, tally: Tally, limit: float) -> int:
    """Take in what a worker tells until it ends or dies; return the last case it began."""
    number = -1
    while True:
        if not results.poll(10 * limit + 60):
            process.kill()
            tally.failures.append(f"case {number}: hangs")
            return number
        try:
            message = results.recv()
        except EOFError:
            tally.failures.append(f"case {number}: the process died with code {process.exitcode}")
            return number
        if message[0] == "begin":
            number = message[1]
        elif message[0] == "done":
            tally.outcomes[f"{message[1]}: {message[2]}"] += 1
            if message[3] > tally.slowest:
                tally.slowest, tally.slowest_number = message[3], number
        elif message[0] == "failed":
            tally.failures.append(f"case {message[1]}: {message[2]}")
        else:
            tally.memory = max(tally.memory, message[1])
            return -1


def run(options: argparse.Namespace) -> Tally:
    """Run all cases; a worker that dies is followed by another."""
    tally = Tally(Counter(), [])
    first, last = options.first, options.first + options.cases
    while first < last and len(tally.failures) < 20:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(target=work, args=(theirs, first, last, options))
        process.start()
        theirs.close()
        died_at = follow(ours, process, tally, options.seconds)
        process.join()
        first = last if died_at < 0 else died_at + 1
    return tally


def main() -> int:
    """Run, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=int, default=512, help="MiB")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--only", choices=KINDS)
    options = parser.parse_args()
    tally = run(options)
    report = {
        "cases": sum(tally.outcomes.values()) + len(tally.failures),
        "failures": len(tally.failures),
        "outcomes": dict(sorted(tally.outcomes.items())),
        "slowest_s": round(tally.slowest, 3),
        "slowest_case": tally.slowest_number,
        "grown_mib": round(tally.memory / MIB, 1),
        "cpu_s": round(os.times().children_user, 1),
    }
    print(json.dumps(report, indent=2))
    for failure in tally.failures:
        print(failure, file=sys.stderr)
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
