from __future__ import annotations

import errno
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import shapely

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import Color, PathClass
from darefine_qupath.errors import (
    AnnotationError,
    ClassMapError,
    ConfigError,
    EngineError,
    ProjectChangedError,
    ProjectError,
    ProjectFormatError,
    ProjectLockedError,
    ProjectUnsupportedError,
    ProjectWriteError,
    SlideFormatError,
)
from darefine_qupath.geometry import Size
from darefine_qupath.pipeline.splitting import save_roles
from darefine_qupath.project import (
    Changes,
    create_project,
    embedded,
    imagefile,
    jvm,
    list_backups,
    open_project,
    project_reader,
    restore,
    staging,
)
from darefine_qupath.project.embedded import EmbeddedProject
from darefine_qupath.project.qpdata.document import Document
from darefine_qupath.project.qpdata.edit import EditedFile, edit_document
from darefine_qupath.project.qpdata.read import read_image_data
from darefine_qupath.project.qpdata.summary import summarize
from darefine_qupath.tiles.roles import Role
from tests.qpdata_edits import edited_data

ROOT = Path(__file__).parents[1]
NEW = Annotation(geometry=shapely.box(10, 10, 60, 40), path_class="Invasive")


@pytest.fixture
def project(place: Callable[[str], Path]) -> EmbeddedProject:
    return EmbeddedProject(place("qupath-0.6.0/annotated"))


def listing(folder: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def data_file(project: EmbeddedProject, entry_id: str = "1") -> Path:
    return project.folder / "data" / entry_id / "data.qpdata"


def add(project: EmbeddedProject, annotation: Annotation = NEW) -> Annotation:
    project.apply(project.images[0], Changes(add=[annotation]))
    return annotation


# -- what a write touches


@pytest.mark.parametrize("version", ["0.4.4", "0.5.1", "0.6.0", "0.7.0"])
def test_adding_and_removing_gives_back_every_byte(version: str, place: Callable[[str], Path]) -> None:
    project = EmbeddedProject(place(f"qupath-{version}/annotated"))
    before = listing(project.folder)
    add(project)
    between = listing(project.folder)
    project.apply(project.images[0], Changes(remove=[NEW.id]))
    after = listing(project.folder)
    changed = {name for name in before if between[name] != before[name]}
    assert changed == {"data/1/data.qpdata", "data/1/summary.json"}
    assert {name for name in before if after[name] != before[name]} == {"data/1/summary.json"}
    assert all(name.startswith("darefine") for name in after.keys() - before.keys())


def test_the_summary_follows(project: EmbeddedProject) -> None:
    path = data_file(project).with_name("summary.json")
    former = json.loads(path.read_text())
    add(project)
    summary = json.loads(path.read_text())
    assert summary["hierarchy"]["nObjects"] == former["hierarchy"]["nObjects"] + 1
    assert summary["hierarchy"]["annotationClassificationCounts"]["Invasive"] == 4
    assert summary["timestamp"] > former["timestamp"] or summary["timestamp"] > 1_600_000_000_000
    assert {key: summary[key] for key in ("imageType", "server")} == {
        key: former[key] for key in ("imageType", "server")
    }


def test_nothing_to_do_writes_nothing(project: EmbeddedProject) -> None:
    before = listing(project.folder)
    applied = project.apply(project.images[0], Changes())
    assert (applied.added, applied.num_objects, applied.backup) == (0, 35, None)
    assert listing(project.folder) == before


def test_a_wrong_edit_writes_nothing(project: EmbeddedProject) -> None:
    before = listing(project.folder)
    with pytest.raises(AnnotationError):
        project.apply(project.images[0], Changes(remove=[NEW.id]))
    assert listing(project.folder) == before


# -- backups


def test_the_former_file_is_kept(project: EmbeddedProject) -> None:
    former = data_file(project).read_bytes()
    applied = project.apply(project.images[0], Changes(add=[NEW]))
    assert applied.backup is not None
    assert applied.backup.read_bytes() == former
    assert applied.backup.parent == project.folder / "darefine" / "backups" / "1"


def test_five_backups_are_kept(project: EmbeddedProject) -> None:
    states = []
    for number in range(7):
        states.append(data_file(project).read_bytes())
        add(project, replace(NEW, id=NEW.id.__class__(int=number + 1)))
    backups = list_backups(project.folder, "1")
    assert [backup.path.read_bytes() for backup in backups] == states[:1:-1]


@pytest.mark.parametrize("which", ["number", "name"])
def test_a_backup_is_brought_back_and_can_be_undone(project: EmbeddedProject, which: str) -> None:
    former = data_file(project).read_bytes()
    add(project)
    changed = data_file(project).read_bytes()
    (backup,) = list_backups(project.path, "1")
    applied = restore(project.path, "1", 1 if which == "number" else backup.path.name[:15])
    assert data_file(project).read_bytes() == former
    assert (applied.added, applied.removed, applied.num_objects) == (0, 1, 35)
    assert len(project.objects(project.images[0])) == 35
    restore(project.path, project.images[0].name)
    assert data_file(project).read_bytes() == changed
    assert json.loads(data_file(project).with_name("summary.json").read_text())["hierarchy"]["nObjects"] == 37


def test_a_damaged_file_can_be_replaced_by_a_backup(project: EmbeddedProject) -> None:
    former = data_file(project).read_bytes()
    add(project)
    data_file(project).write_bytes(b"\xac\xed\x00\x05damaged")
    restore(project.path, "1")
    assert data_file(project).read_bytes() == former
    assert list_backups(project.path, "1")[0].path.read_bytes() == b"\xac\xed\x00\x05damaged"


KILLED = """
import os, shapely, sys
from pathlib import Path
from darefine_qupath.annotations import Annotation
from darefine_qupath.project import Changes, open_project
replace = os.replace
os.replace = lambda source, target: os._exit(9) if target.name == "data.qpdata" else replace(source, target)
project = open_project(sys.argv[1], engine="embedded")
project.apply(project.images[0], Changes(add=[Annotation(geometry=shapely.box(0, 0, 9, 9))]))
"""


def test_a_write_that_was_killed_leaves_no_backup_of_the_present_state(project: EmbeddedProject) -> None:
    first = data_file(project).read_bytes()
    add(project)
    present = data_file(project).read_bytes()
    done = subprocess.run([sys.executable, "-c", KILLED, str(project.path)], check=False)
    assert (done.returncode, data_file(project).read_bytes()) == (9, present)
    assert [backup.path.read_bytes() for backup in list_backups(project.path, "1")] == [first]
    assert list(project.folder.rglob("*.darefine-tmp"))
    project.set_classes([*project.classes, PathClass("New", Color(1, 2, 3))])  # any write
    assert not list(project.folder.rglob("*.darefine-tmp"))
    add(project, replace(NEW, id=NEW.id.__class__(int=7)))
    states = [backup.path.read_bytes() for backup in list_backups(project.path, "1")]
    assert states == [present, first]
    restore(project.path, "1", 2)
    assert data_file(project).read_bytes() == first


def test_a_backup_that_is_not_there(project: EmbeddedProject) -> None:
    with pytest.raises(ProjectError, match=r"No backups of .* match 1; there are: none"):
        restore(project.path, "1")
    add(project)
    for wrong in (2, 0, -1, "1999"):
        with pytest.raises(ProjectError, match=f"No backups .* match {wrong!r}; there are: .*Z-data.qpdata"):
            restore(project.path, "1", wrong)


def test_a_damaged_backup_is_refused(project: EmbeddedProject) -> None:
    add(project)
    (backup,) = list_backups(project.path, "1")
    backup.path.write_bytes(b"nonsense")
    before = listing(project.folder)
    with pytest.raises(ProjectFormatError, match=r"Z-data.qpdata: "):
        restore(project.path, "1")
    assert listing(project.folder) == before


# -- files stay whose they are

OWNED = ("project.qpproj", "classifiers/classes.json", "data/1/data.qpdata", "data/1/summary.json")


def write_everything(project: EmbeddedProject) -> None:
    add(project, replace(NEW, path_class="Never seen"))
    project.add_metadata({project.images[0].id: {"a": "b"}})
    restore(project.path, "1")


@pytest.mark.skipif(not hasattr(os, "chown"), reason="modes and owners of POSIX")
def test_files_and_backups_keep_owner_and_mode(project: EmbeddedProject) -> None:
    owner = (1234, 4321) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    for name in OWNED:
        os.chown(project.folder / name, *owner)
        (project.folder / name).chmod(0o640)
    write_everything(project)
    made = [*(project.folder / "darefine" / "backups").rglob("*.qpdata"), project.folder / "project.qpproj.backup"]
    for path in (*(project.folder / name for name in OWNED), *made):
        found = path.stat()
        assert (found.st_uid, found.st_gid, oct(found.st_mode)[-3:]) == (*owner, "640"), path
    assert len(made) == 3


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_files_that_are_links_stay_links(project: EmbeddedProject, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    for number, name in enumerate(OWNED):
        (project.folder / name).rename(disk / str(number))
        (project.folder / name).symlink_to(disk / str(number))
    before = listing(disk)
    write_everything(EmbeddedProject(project.path))
    assert all((project.folder / name).is_symlink() for name in OWNED)
    after = listing(disk)
    assert after.keys() == before.keys()
    assert after["2"] == before["2"]
    assert after["0"] != before["0"]
    assert after["1"] != before["1"]


@pytest.mark.skipif(os.name == "nt", reason="links and pipes of POSIX")
@pytest.mark.parametrize("kind", ["pipe", "dangling link", "device", "folder", "too large"])
@pytest.mark.parametrize("name", [*OWNED[:3]])
def test_what_is_no_file_is_named_and_not_written_over(project: EmbeddedProject, kind: str, name: str) -> None:
    path = project.folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "too large":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "not there")
    match = rf"{path.name}.*(regular file|not there|larger than|directory)|There is no QuPath project at .*{path.name}"
    with pytest.raises(ProjectError, match=match):
        add(EmbeddedProject(project.path), replace(NEW, path_class="Never seen"))
    assert os.path.lexists(path)
    assert not path.is_file() or path.stat().st_size == 1 << 40


# -- nothing is lost


def nth_fails(function: Callable[..., Any], nth: int) -> Callable[..., Any]:
    calls = iter(range(1_000_000))

    def call(*args: Any, **named: Any) -> Any:  # noqa: ANN401
        if next(calls) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*args, **named)

    return call


WRITES: dict[str, Callable[[EmbeddedProject], object]] = {
    "objects": lambda project: project.apply(
        project.images[0],
        Changes(add=[replace(NEW, path_class="Never seen")], remove=[project.objects(project.images[0])[0].id]),
    ),
    "first objects": lambda project: project.apply(project.images[0], Changes(add=[NEW])),
    "image": lambda project: project.add_image(project.folder.parents[1] / "images" / "slide.tif"),
    "metadata": lambda project: project.add_metadata({project.images[0].id: {"a": "b"}}),
    "classes": lambda project: project.set_classes([PathClass("One")]),
}


@pytest.mark.parametrize("call", ["write", "replace", "fsync"])
@pytest.mark.parametrize("name", WRITES)
def test_a_full_disk_leaves_the_project_as_it_was(
    name: str, call: str, place: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place("qupath-0.6.0/empty" if name == "first objects" else "qupath-0.6.0/annotated")
    with staging.write_lock(folder):
        before = listing(folder)
    monkeypatch.setattr(staging, "_note_owner", lambda *_: None)
    failures = 0
    for nth in range(60):
        project = EmbeddedProject(folder)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, nth_fails(getattr(os, call), nth))
            try:
                WRITES[name](project)
                break
            except ProjectWriteError as error:
                failures += 1
                said = str(error)
        assert "make room on the disk. The project is as it was" in said
        assert listing(folder) == before
    assert failures >= 1
    assert listing(folder) != before


LIMITED = """
import resource, signal, sys
from darefine_qupath.project import Changes, open_project
import shapely
from darefine_qupath.annotations import Annotation
project = open_project(sys.argv[1], engine="embedded")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    project.apply(project.images[0], Changes(add=[Annotation(geometry=shapely.box(1, 2, 3, 4))]))
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of a file")
def test_a_limit_of_the_system_leaves_the_project_as_it_was(project: EmbeddedProject) -> None:
    before = listing(project.folder)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(project.folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("ProjectWriteError Cannot write to")
    assert listing(project.folder) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
def test_a_killed_write_leaves_the_old_state_or_the_new() -> None:
    script = ROOT / "scripts" / "check" / "kills.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "20", "--seed", "3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "20 kills: the project opened every time" in done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
def test_a_killed_command_goes_on() -> None:
    arguments = [str(ROOT / "scripts" / "check" / "kills.py"), "--commands", "import", "tiles", "--kills", "6"]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kills: the project opened each time" in done.stdout


Meddler = Callable[[Document, Changes, EditedFile], bytes]


def _loses_an_object(before: Document, changes: Changes, _: EditedFile) -> bytes:
    again = Document(before.data)
    return edit_document(again, replace(changes, remove=[again.objects[4].id]), {}).content


def _changes_another(before: Document, _: Changes, edited: EditedFile) -> bytes:
    record = read_image_data(before.data).objects[3]
    after = read_image_data(edited.content)
    return edited_data(after, Changes(replace=[replace(record, name="somebody else")]))


def _moves_another(before: Document, _: Changes, edited: EditedFile) -> bytes:
    after = read_image_data(edited.content)
    child = next(record for record in after.objects if record.parent is not None and record.kind == "annotation")
    above = after.objects[0] if child.parent != after.objects[0].id else after.objects[1]
    without = read_image_data(edited_data(after, Changes(remove=[child.id])))
    assert before.path is not None
    return edited_data(without, Changes(add=[replace(child, parent=above.id)]))


def _changes_what_was_added(_: Document, __: Changes, edited: EditedFile) -> bytes:
    after = read_image_data(edited.content)
    return edited_data(after, Changes(replace=[replace(edited.touched[0], locked=True)]))


def _changes_the_type(_: Document, __: Changes, edited: EditedFile) -> bytes:
    return edited.content.replace(b"BRIGHTFIELD_H_E", b"BRIGHTFIELD_X_Y")


def _stops_early(_: Document, __: Changes, edited: EditedFile) -> bytes:
    return edited.content[:-3]


@pytest.mark.parametrize(
    ("meddler", "message"),
    [
        (_loses_an_object, "36 objects were written and 35 read back; nothing was changed"),
        (_changes_another, "object .* came back changed; nothing was changed"),
        (_moves_another, "objects came back in another order; nothing was changed"),
        (_changes_what_was_added, "object .* came back with another locked; nothing was changed"),
        (_changes_the_type, "what stands beside the objects came back changed; nothing was changed"),
        (_stops_early, "cannot be read back, nothing was changed"),
    ],
)
def test_what_comes_back_wrong_is_not_written(
    meddler: Meddler, message: str, project: EmbeddedProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing(project.folder)

    def meddled(document: Document, changes: Changes, colors: dict[str, Color]) -> EditedFile:
        edited = edit_document(document, changes, colors)
        return edited._replace(content=meddler(document, changes, edited))

    monkeypatch.setattr(embedded, "edit_document", meddled)
    with pytest.raises(ProjectWriteError, match=message):
        add(project)
    assert listing(project.folder) == before


def test_a_change_during_the_write_is_noticed(project: EmbeddedProject, monkeypatch: pytest.MonkeyPatch) -> None:
    path = data_file(project)

    def meanwhile(*args: Any, **named: Any) -> Any:  # noqa: ANN401
        path.write_bytes(path.read_bytes()[::-1])
        return summarize(*args, **named)

    monkeypatch.setattr(embedded, "summarize", meanwhile)
    changed = path.read_bytes()[::-1]
    with pytest.raises(ProjectChangedError, match="changed since it was read"):
        add(project)
    assert path.read_bytes() == changed


def test_after_reading_again_a_changed_image_can_be_written(project: EmbeddedProject) -> None:
    project.objects(project.images[0])
    add(EmbeddedProject(project.path))
    with pytest.raises(ProjectChangedError):
        add(project, replace(NEW, id=NEW.id.__class__(int=5)))
    project.objects(project.images[0])
    add(project, replace(NEW, id=NEW.id.__class__(int=5)))
    assert len(project.objects(project.images[0])) == 37


def test_two_writers_are_kept_apart(project: EmbeddedProject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "LOCK_PATIENCE_S", 0.0)
    before = listing(project.folder)
    with staging.write_lock(project.folder):
        for write in WRITES.values():
            with pytest.raises(ProjectLockedError, match="Another darefine process"):
                write(project)
    assert listing(project.folder) == before


# -- damaged and unusual projects


def test_damaged_data_is_named_and_not_written_to(project: EmbeddedProject) -> None:
    data_file(project).write_bytes(data_file(project).read_bytes()[:5000])
    before = listing(project.folder)
    project = EmbeddedProject(project.path)
    assert [image.image_type for image in project.images] == ["BRIGHTFIELD_H_E", "BRIGHTFIELD_OTHER"]
    for call in (lambda: project.objects(project.images[0]), lambda: add(project)):
        with pytest.raises(ProjectFormatError, match=r"data/1/data.qpdata: .*at byte \d+"):
            call()
    assert listing(project.folder) == before


def test_the_image_type_is_found_without_a_summary(project: EmbeddedProject) -> None:
    data_file(project, "2").with_name("summary.json").unlink()
    data_file(project, "1").with_name("summary.json").write_text("{damaged")
    again = EmbeddedProject(project.path)
    assert [image.image_type for image in again.images] == ["UNSET", "BRIGHTFIELD_OTHER"]


def test_a_save_that_qupath_did_not_finish_is_not_taken_for_an_empty_image(project: EmbeddedProject) -> None:
    data_file(project).rename(data_file(project).with_name("data.qpdata.bkp"))
    with pytest.raises(ProjectFormatError, match=r"rename data.qpdata.bkp to data.qpdata"):
        project.objects(project.images[0])
    with pytest.raises(ProjectFormatError, match=r"rename data.qpdata.bkp to data.qpdata"):
        add(project)


def test_warnings_reach_the_caller(project: EmbeddedProject) -> None:
    data_file(project).with_name("data.qpdata.bkp").write_bytes(b"")
    EmbeddedProject(project.path).add_metadata({project.images[1].id: {"a": "b"}})
    warnings = " ".join(project.apply(project.images[0], Changes(add=[NEW])).warnings)
    assert "QuPath is saving this image" in warnings
    assert "project.qpproj was saved by another program" in warnings


def edited(project: EmbeddedProject, change: Callable[[dict[str, Any]], object]) -> EmbeddedProject:
    document = json.loads(project.path.read_text(encoding="utf-8"))
    change(document)
    project.path.write_text(json.dumps(document), encoding="utf-8")
    return EmbeddedProject(project.path)


def test_a_wrapped_server_is_named_and_its_objects_are_open(project: EmbeddedProject) -> None:
    def wrap(document: dict[str, Any]) -> None:
        entry = document["images"][0]
        entry["serverBuilder"] = {
            "builderType": "rotated",
            "rotation": "ROTATE_90",
            "builder": entry["serverBuilder"],
            "metadata": {"width": 1536, "height": 2048},
        }

    project = edited(project, wrap)
    image = project.images[0]
    assert image.unsupported is not None
    assert "rotated (ROTATE_90)" in image.unsupported
    assert (image.width, image.height, image.exists) == (1536, 2048, True)
    assert project.apply(image, Changes(add=[NEW])).num_objects == 36


@pytest.mark.parametrize("uri", ["https://omero.org/image-1", None])
def test_an_image_that_is_no_file(project: EmbeddedProject, uri: str | None) -> None:
    project = edited(project, lambda document: document["images"][0]["serverBuilder"].update(uri=uri))
    image = project.images[0]
    assert (image.uri, image.path, image.exists) == (uri, None, False)


def test_what_neither_project_nor_file_says_is_none(project: EmbeddedProject, tmp_path: Path) -> None:
    def forget(document: dict[str, Any]) -> None:
        for entry, name in zip(document["images"], ("gone.tif", "text.tif"), strict=True):
            del entry["serverBuilder"]["metadata"]
            entry["serverBuilder"]["uri"] = (tmp_path / name).as_uri()

    (tmp_path / "text.tif").write_text("this is no image")
    images = edited(project, forget).images
    assert [(image.exists, image.width, image.mpp) for image in images] == [(False, None, None), (True, None, None)]


def test_a_project_file_of_another_name_is_found(project: EmbeddedProject) -> None:
    other = project.path.rename(project.folder / "study.qpproj")
    assert EmbeddedProject(project.folder).path == other


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A copy that is cut short, has bytes changed, or has one value of its JSON exchanged for another."""
    kind = rng.randrange(3)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        changed = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    values = list(re.finditer(rb'(?<=:) ?("[^"]*"|-?[0-9.]+|true|false|\{|\[)', data))
    found = rng.choice(values)
    odd = (
        b"null",
        b"-1",
        b"1e999",
        b"NaN",
        b'"\\u0000"',
        b'"\\ud800"',
        b"[[]]",
        b'{"a": {}}',
        b'"../../.."',
        b"9" * 400,
    )
    return data[: found.start(1)] + rng.choice(odd) + data[found.end(1) :]


@pytest.mark.parametrize("name", ["project.qpproj", "classifiers/classes.json", "data/1/summary.json"])
def test_a_damaged_json_file_is_an_error_that_names_it_or_read(project: EmbeddedProject, name: str) -> None:
    path = project.folder / name
    data, rng = path.read_bytes(), random.Random(5)
    refused = 0
    for _ in range(150):
        path.write_bytes(mutated(data, rng))
        try:
            again = EmbeddedProject(project.path)
            assert again.classes is not None
            assert len(again.images) <= 2
        except ProjectFormatError as error:
            refused += 1
            assert path.name in str(error)  # noqa: PT017 - the error is one of two right outcomes
    assert refused > 50 or name.endswith("summary.json")


# -- many images


class Reads:
    """Counts what is read and staged."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[Path] = []
        self.staged: list[Path] = []
        read, stage, opened = staging.read_with_version, staging.StagedFiles.stage, project_reader.open_file

        def reads(path: Path, *limits: Any) -> Any:  # noqa: ANN401
            self.read.append(path)
            return read(path, *limits)

        def opens(path: Path) -> Any:  # noqa: ANN401
            self.read.append(path)
            return opened(path)

        def stages(batch: staging.StagedFiles, target: Path, data: bytes, **more: Any) -> Path:  # noqa: ANN401
            self.staged.append(target)
            return stage(batch, target, data, **more)

        monkeypatch.setattr(staging, "read_with_version", reads)
        monkeypatch.setattr(project_reader, "open_file", opens)
        monkeypatch.setattr(staging.StagedFiles, "stage", stages)


def many(project: EmbeddedProject, number: int, *, has_summary: bool = True) -> Path:
    """Give the project this many images, with data."""
    document = json.loads(project.path.read_text(encoding="utf-8"))
    first = document["images"][0]
    document["images"] = [{**first, "entryID": i, "metadata": {"kept": f"v{i}"}} for i in range(1, number + 1)]
    project.path.write_text(json.dumps(document), encoding="utf-8")
    data = project.folder / "data"
    if not has_summary:
        (data / "1" / "summary.json").unlink()
    for i in range(2, number + 1):
        shutil.rmtree(data / str(i), ignore_errors=True)
        shutil.copytree(data / "1", data / str(i))
    return project.path


@pytest.mark.parametrize("has_summary", [True, False])
def test_images_are_listed_with_one_read_each(
    project: EmbeddedProject, monkeypatch: pytest.MonkeyPatch, has_summary: bool
) -> None:
    path = many(project, 40, has_summary=has_summary)
    monkeypatch.setattr(project_reader, "read_image_data", None)  # no data is read as a whole
    reads = Reads(monkeypatch)
    images = EmbeddedProject(path).images
    assert {image.image_type for image in images} == {"BRIGHTFIELD_H_E"}
    assert len(reads.read) == 41


def test_roles_of_many_images_are_one_write_and_keep_other_metadata(
    project: EmbeddedProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = many(project, 40)
    reads = Reads(monkeypatch)
    roles: dict[str, Role] = {str(i): "test" if i % 2 else "train" for i in range(1, 41)}
    assert save_roles(path, roles) == 40
    assert [target.name for target in reads.staged] == ["project.qpproj.backup", "project.qpproj"]
    assert len(reads.read) <= 40 + 4
    assert [dict(image.metadata) for image in EmbeddedProject(path).images] == [
        {"kept": f"v{i}", "darefine.role": roles[str(i)]} for i in range(1, 41)
    ]
    reads.staged.clear()
    assert save_roles(path, {"1": "test", "99": "train"}) == 0
    assert not reads.staged


@pytest.mark.parametrize("last", [10**18, 10**250, "many", None, -3])
def test_a_last_id_that_qupath_cannot_hold_is_not_counted_on(project: EmbeddedProject, last: object) -> None:
    document = json.loads(project.path.read_text(encoding="utf-8"))
    project.path.write_text(json.dumps(document | {"lastID": last}), encoding="utf-8")
    opened = EmbeddedProject(project.path)
    entry = opened.add_image(project.folder.parents[1] / "images" / "slide.tif")
    assert int(entry.id) == max(int(image.id) for image in opened.images) < 100


def test_metadata_that_others_wrote_meanwhile_stay(project: EmbeddedProject) -> None:
    EmbeddedProject(project.path).add_metadata({project.images[1].id: {"theirs": "b"}})
    project.add_metadata({project.images[1].id: {"split": "test"}})
    assert project.images[1].metadata == {"theirs": "b", "split": "test"}
    before = listing(project.folder)
    with pytest.raises(ProjectChangedError, match="Entry 77 was taken out"):
        project.add_metadata({project.images[0].id: {"split": "test"}, "77": {"split": "test"}})
    assert listing(project.folder) == before


def test_a_write_looks_up_no_other_image(project: EmbeddedProject, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = EmbeddedProject(many(project, 40))
    opened.add_metadata({opened.images[3].id: {}})  # the project was moved: now it knows where it is
    assert len(opened.images) == 40
    reads = Reads(monkeypatch)
    opened.apply(opened.images[3], Changes(add=[NEW]))
    opened.add_metadata({opened.images[3].id: {"a": "b"}})
    assert len(opened.images) == 40
    others = {path.parent.name for path in reads.read if path.parent.parent.name == "data"} - {"4"}
    assert not others


def test_an_image_is_found_without_a_walk_over_all(project: EmbeddedProject) -> None:
    opened = EmbeddedProject(many(project, 40))
    images = opened.images

    class Walked(tuple[Any, ...]):
        __slots__ = ()

        def __iter__(self) -> Any:  # noqa: ANN401
            walks.append(1)
            return super().__iter__()

    walks: list[int] = []
    opened._images = Walked(images)
    assert [opened.image(image.id) for image in images] == list(images)
    for image in images:
        opened.backups(image)
    assert len(walks) <= 2


def test_an_object_that_cannot_be_read_keeps_its_bytes(project: EmbeddedProject) -> None:
    path = project.folder / "data" / "1" / "data.qpdata"
    strange = path.read_bytes().replace(b"roi.EllipseROI$", b"roi.SpiralsROI$")
    path.write_bytes(strange)
    image = project.images[0]
    with pytest.raises(ProjectFormatError, match=r"SpiralsROI\$.* is not a ROI that can be read \(at byte \d+\)"):
        project.objects(image)
    new = Annotation(geometry=shapely.box(1, 2, 30, 40), path_class="Tumor")
    assert project.apply(image, Changes(add=[new])).num_objects == 36
    assert path.read_bytes() != strange
    assert project.apply(image, Changes(remove=[new.id])).num_objects == 35
    assert path.read_bytes() == strange


# -- the project file


def raw(project: EmbeddedProject) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(project.path.read_text(encoding="utf-8"))
    return found


def test_the_former_project_file_is_kept_and_unknown_keys_stay(project: EmbeddedProject) -> None:
    def extend(document: dict[str, Any]) -> None:
        document["future"] = {"a": 1.5}
        document["images"][1]["later"] = [1]

    project = edited(project, extend)
    former = project.path.read_bytes()
    project.add_metadata({project.images[0].id: {"a": "b"}})
    assert (project.folder / "project.qpproj.backup").read_bytes() == former
    document = raw(project)
    assert document["future"] == {"a": 1.5}
    assert document["images"][1]["later"] == [1]
    assert document["images"][0]["tags"] == ["tag one", "étiquette"]


def test_a_moved_project_comes_home_when_every_image_was_found(project: EmbeddedProject, tmp_path: Path) -> None:
    project.add_metadata({project.images[0].id: {}})
    document = raw(project)
    assert document["uri"] == f"file:{project.path}"
    assert [entry["serverBuilder"]["uri"] for entry in document["images"]] == [
        f"file:{tmp_path}/images/slide.tif",
        f"file:{tmp_path}/images/plain.png",
    ]


def test_a_moved_project_keeps_its_old_place_while_an_image_is_missing(place: Callable[[str], Path]) -> None:
    project = EmbeddedProject(place("qupath-0.6.0/multi"))
    before = raw(project)
    project.add_metadata({project.images[0].id: {"a": "b"}})
    before["images"][0]["metadata"] |= {"a": "b"}
    assert raw(project) == before


@pytest.mark.parametrize("version", ["0.4.4", "0.5.1", "0.6.0", "0.7.0"])
def test_a_new_entry_looks_like_that_versions_own(version: str, place: Callable[[str], Path], tmp_path: Path) -> None:
    project = EmbeddedProject(place(f"qupath-{version}/multi"))
    slide = project.add_image(tmp_path / "images" / "slide.tif")
    document = raw(project)
    own, new = document["images"][0], document["images"][-1]
    assert list(new) == list(own)
    assert document["lastID"] == new["entryID"] == 4
    assert new["serverBuilder"] == own["serverBuilder"] | {"uri": f"file:{tmp_path}/images/slide.tif"}
    assert len(new["randomizedName"]) == 36
    folder, other = data_file(project, "4").parent, data_file(project, "1").parent
    assert {path.name for path in folder.iterdir()} == {path.name for path in other.iterdir()}
    assert (folder / "server.json").read_text().startswith((other / "server.json").read_text()[:60])
    assert (slide.image_type, slide.width) == ("BRIGHTFIELD_H_E", 2048)
    summaries = [json.loads((place_ / "summary.json").read_text()) for place_ in (folder, other)]
    assert summaries[0]["server"] == summaries[1]["server"]


def test_an_image_of_unset_type_has_no_data_yet(project: EmbeddedProject, tmp_path: Path) -> None:
    image = project.add_image(tmp_path / "images" / "plain.png", image_type="UNSET")
    assert image.image_type == "UNSET"
    assert not data_file(project, image.id).exists()
    assert project.objects(image) == ()


def test_a_folder_that_lies_in_the_way_of_a_new_image(project: EmbeddedProject, tmp_path: Path) -> None:
    data_file(project, "3").parent.mkdir()
    (data_file(project, "3").parent / "data.qpdata.0123456789ab.darefine-tmp").write_bytes(b"left over")
    data_file(project, "4").parent.mkdir()
    data_file(project, "4").write_bytes(b"somebody's")
    assert project.add_image(tmp_path / "images" / "plain.png").id == "3"
    assert project.add_image(tmp_path / "images" / "plain.png").id == "5"
    assert data_file(project, "4").read_bytes() == b"somebody's"


def test_two_open_projects_add_images_side_by_side(project: EmbeddedProject, tmp_path: Path) -> None:
    other = EmbeddedProject(project.path)
    other.add_image(tmp_path / "images" / "plain.png", name="from the other")
    project.add_image(tmp_path / "images" / "plain.png", name="from this one")
    assert [image.name for image in project.images][2:] == ["from the other", "from this one"]


def test_an_image_that_was_taken_out_meanwhile(project: EmbeddedProject) -> None:
    image = project.images[1]
    document = raw(project)
    document["images"] = [entry for entry in document["images"] if str(entry["entryID"]) != image.id]
    project.path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ProjectChangedError, match="was taken out of"):
        project.add_metadata({image.id: {}})


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"image_type": "PAS"}, "Image type 'PAS' is not one of"),
        ({"mpp": 0.0}, "mpp must be a positive number"),
        ({"mpp": float("nan")}, "mpp must be a positive number"),
        ({"metadata": {"a": 1}}, "Image metadata is text, got 'a': 1"),
    ],
)
def test_an_image_that_makes_no_sense_is_not_added(
    project: EmbeddedProject, tmp_path: Path, arguments: dict[str, Any], match: str
) -> None:
    before = listing(project.folder)
    with pytest.raises(ConfigError, match=match):
        project.add_image(tmp_path / "images" / "plain.png", **arguments)
    assert listing(project.folder) == before


def test_a_file_that_is_no_image_is_not_added(project: EmbeddedProject, tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_text("no image")
    with pytest.raises(SlideFormatError, match=r"no reader opens this file.*convert it to a pyramidal TIFF"):
        project.add_image(tmp_path / "a.svs")


def test_classes_that_changed_meanwhile_are_not_overwritten(project: EmbeddedProject) -> None:
    assert project.classes
    EmbeddedProject(project.path).set_classes([PathClass("Other")])
    with pytest.raises(ProjectChangedError, match=r"classes\.json changed"):
        project.set_classes([PathClass("Mine")])
    assert [c.name for c in project.classes] == ["Other"]
    with pytest.raises(ClassMapError, match="must be there and differ"):
        project.set_classes([PathClass("A"), PathClass("A")])


# -- image files


BOUNDS = {f"openslide.bounds-{name}": value for name, value in zip(("x", "y", "width", "height"), "1248", strict=True)}


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., imagefile.ImageFile]:
    """Describes a slide of 10 x 20 pixels in two levels of which OpenSlide tells some properties."""
    (tmp_path / "a.mrxs").touch()

    def described(properties: Mapping[str, str], *args: str) -> imagefile.ImageFile:
        slide = SimpleNamespace(
            properties=properties,
            level_dimensions=((10, 20), (5, 10)),
            level_downsamples=(1.0, 2.0),
            close=lambda: None,
        )
        monkeypatch.setattr("openslide.OpenSlide", lambda _: slide)
        return imagefile.probe(tmp_path / "a.mrxs", args)

    return described


Probe = Callable[..., imagefile.ImageFile]


def test_a_slide_is_cropped_to_its_bounds_as_qupath_crops_it(probe: Probe) -> None:
    assert probe(BOUNDS).levels == (Size(4, 8), Size(2, 4))
    assert probe(BOUNDS | {"openslide.bounds-width": "5"}).levels == (Size(5, 8), Size(2, 4))
    whole = probe(BOUNDS, "--no-crop")
    assert (whole.levels, whole.args) == ((Size(10, 20), Size(5, 10)), ("--no-crop",))


@pytest.mark.parametrize("value", ["nan", "0", "-1", "inf", "1e300"])
def test_a_slide_without_a_possible_pixel_size(probe: Probe, value: str) -> None:
    assert probe({"openslide.mpp-x": value, "openslide.mpp-y": "0.5"}).pixel_size is None


def test_noise_in_a_pixel_size_is_rounded_away(probe: Probe) -> None:
    properties = {"openslide.mpp-x": "0.46700000000000003", "openslide.mpp-y": "0.5", "openslide.objective-power": "20"}
    found = probe(properties)
    assert (found.pixel_size, found.magnification) == ((0.467, 0.5), 20.0)


# -- engines


def test_auto_is_embedded_where_there_is_no_qupath(
    project: EmbeddedProject, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jvm, "find_qupath", lambda: None)
    caplog.set_level(logging.INFO)
    assert open_project(project.folder).engine == "embedded"
    assert "Engine: embedded" in caplog.text
    with pytest.raises(EngineError, match="paquo finds no QuPath; run `paquo get_qupath"):
        open_project(project.folder, engine="paquo")


def test_auto_takes_paquo_where_it_finds_qupath(
    project: EmbeddedProject, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jvm, "find_qupath", lambda: Path("/opt/QuPath"))
    caplog.set_level(logging.INFO)
    with open_project(project.folder) as opened:
        assert opened.images
    assert f"Engine: paquo, with QuPath at {Path('/opt/QuPath')}" in caplog.text


def test_paquo_that_is_not_installed_is_said(project: EmbeddedProject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paquo", None)
    assert open_project(project.folder).engine == "embedded"
    with pytest.raises(EngineError, match="paquo cannot be loaded"):
        create_project(project.folder / "new", engine="paquo")
    with pytest.raises(EngineError, match="There is no engine 'java'"):
        open_project(project.folder, engine="java")


def test_a_project_loads_without_what_it_does_not_need() -> None:
    code = "import sys, darefine_qupath.project; print({'torch', 'rasterio', 'openslide', 'paquo'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_what_slides_open_is_added_with_a_pixel_size_or_a_word(
    project: EmbeddedProject, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from PIL import Image  # noqa: PLC0415

    Image.new("P", (20, 10)).save(tmp_path / "palette.png")
    assert project.add_image(tmp_path / "palette.png", mpp=0.5).width == 20
    assert "the project cannot hold the pixel size of 0.5 um of a file of this kind" in caplog.text


def test_a_pixel_size_cannot_be_given_for_what_is_not_rgb(project: EmbeddedProject, tmp_path: Path) -> None:
    from PIL import Image  # noqa: PLC0415

    Image.new("L", (20, 10)).save(tmp_path / "grey.png")
    with pytest.raises(ProjectUnsupportedError, match="not an 8-bit RGB image"):
        project.add_image(tmp_path / "grey.png", mpp=0.5)
    image = project.add_image(tmp_path / "grey.png")
    assert (image.width, image.height, image.mpp) == (20, 10, None)
    assert "metadata" not in raw(project)["images"][-1]["serverBuilder"]
