from __future__ import annotations

import errno
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from darefine_qupath import filesystem
from darefine_qupath.errors import (
    ProjectChangedError,
    ProjectFormatError,
    ProjectLockedError,
    ProjectNotFoundError,
    ProjectWriteError,
)
from darefine_qupath.project import backups, running_qupath, staging
from darefine_qupath.project.staging import StagedFiles


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- reading


def test_a_stamp_tells_one_content_from_another(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    data, stamp = staging.read_with_version(path)
    assert data == b"one"
    staging.check_unchanged(path, stamp)
    path.write_bytes(b"two")
    os.utime(path, ns=(stamp.mtime_ns, stamp.mtime_ns))
    with pytest.raises(ProjectChangedError, match="changed since it was read"):
        staging.check_unchanged(path, stamp)


def test_a_touched_file_has_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    stamp = staging.read_with_version(path)[1]
    os.utime(path, (1, 1))
    staging.check_unchanged(path, stamp)


def test_a_file_that_came_or_went_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    staging.check_unchanged(path, None)
    path.write_bytes(b"one")
    stamp = staging.read_with_version(path)[1]
    with pytest.raises(ProjectChangedError):
        staging.check_unchanged(path, None)
    path.unlink()
    with pytest.raises(ProjectChangedError):
        staging.check_unchanged(path, stamp)


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ProjectNotFoundError, match="is not there"):
        staging.read_with_version(tmp_path / "a")
    with pytest.raises(ProjectFormatError, match="cannot be read"):
        staging.read_with_version(tmp_path)


# -- lock

HOLD = """
import sys, time
from pathlib import Path
from darefine_qupath.project.staging import write_lock
with write_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_is_kept_out_until_the_holder_is_gone(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        match = rf"Another darefine process \(process {holder.pid} on .*\) is writing to {tmp_path}"
        with pytest.raises(ProjectLockedError, match=match), staging.write_lock(tmp_path, patience_s=0):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with staging.write_lock(tmp_path, patience_s=0):
        pass


def test_the_lock_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([False, False, True])
    monkeypatch.setattr(staging, "try_lock", lambda _: next(answers))
    with staging.write_lock(tmp_path, patience_s=10):
        assert next(answers, None) is None


def test_a_project_that_cannot_be_written_to_says_so(tmp_path: Path) -> None:
    (tmp_path / "darefine").write_text("a file where the folder should be")
    with pytest.raises(ProjectWriteError, match="Cannot write to"), staging.write_lock(tmp_path):
        pass


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_a_lock_that_is_something_else_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    lock, notes = tmp_path / "darefine" / ".lock", tmp_path / "notes.txt"
    lock.parent.mkdir()
    notes.write_text("weeks of work")
    if kind == "folder":
        lock.mkdir()
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to(notes if kind == "link" else tmp_path / "not there")
    with pytest.raises(ProjectWriteError, match=r"Cannot write to"), staging.write_lock(tmp_path):
        pass
    assert (notes.read_text(), (tmp_path / "not there").exists()) == ("weeks of work", False)


def test_a_lock_file_with_a_second_name_keeps_its_content(tmp_path: Path) -> None:
    lock, notes = tmp_path / "darefine" / ".lock", tmp_path / "notes.txt"
    lock.parent.mkdir()
    notes.write_text("weeks of work")
    os.link(notes, lock)
    with staging.write_lock(tmp_path):
        pass
    assert notes.read_text() == "weeks of work"


def test_after_a_kill_the_next_write_cleans_every_folder(tmp_path: Path) -> None:
    own = tmp_path / "darefine"
    folders = [tmp_path, own, own / "runs", own / "backups" / "7", tmp_path / "data" / "3", tmp_path / "classifiers"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "file.0123456789ab.darefine-tmp").write_bytes(b"half")
    (own / ".lock").write_text("1234 on this computer")
    with staging.write_lock(tmp_path):
        pass
    assert not list(tmp_path.rglob("*.darefine-tmp"))


class WindowsLocks:
    """Locks of bytes, as the msvcrt module gives them: nobody else reads or locks a locked byte."""

    LK_NBLCK, LK_UNLCK = 2, 0

    def __init__(self) -> None:
        self.held: dict[tuple[int, int], int] = {}

    def locking(self, descriptor: int, mode: int, count: int) -> None:
        assert count == 1
        place = (os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR))
        if self.held.get(place, descriptor) != descriptor:
            raise PermissionError(errno.EACCES, "Permission denied")
        if mode == self.LK_NBLCK:
            self.held[place] = descriptor
        else:
            del self.held[place]


def test_the_lock_of_windows_keeps_others_out_and_its_owner_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks = WindowsLocks()
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "msvcrt", locks)
    spec = importlib.util.spec_from_file_location("locks_on_windows", filesystem.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(staging, "try_lock", module.try_lock)
    monkeypatch.setattr(staging, "unlock", module.unlock)
    monkeypatch.setenv("COMPUTERNAME", "PATHOLOGY-7")
    match = rf"process {os.getpid()} on PATHOLOGY-7\) is writing"
    with staging.write_lock(tmp_path):
        note = (tmp_path / "darefine" / ".lock").stat().st_size
        assert all(place > note for _, place in locks.held)
        with pytest.raises(ProjectLockedError, match=match), staging.write_lock(tmp_path, patience_s=0):
            pass
    assert not locks.held
    with staging.write_lock(tmp_path, patience_s=0):
        pass


def test_a_file_system_without_locks_is_written_to_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with staging.write_lock(tmp_path):
        pass
    assert "has no locks" in caplog.text


# -- batches


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a").write_bytes(b"old a")
    (tmp_path / "b").write_bytes(b"old b")
    return tmp_path


def stage_all(batch: StagedFiles, folder: Path) -> None:
    batch.stage(folder / "a", b"new a", backup=folder / "backups" / "a-backup")
    batch.stage(folder / "b", b"new b")
    batch.stage(folder / "deep" / "er" / "c", b"new c")


def test_a_batch_replaces_every_file(folder: Path) -> None:
    with StagedFiles(folder) as batch:
        stage_all(batch, folder)
        assert (folder / "a").read_bytes() == b"old a"
        batch.commit()
    assert listing(folder) == {"a": b"new a", "b": b"new b", "backups/a-backup": b"old a", "deep/er/c": b"new c"}


def test_a_batch_that_is_not_committed_leaves_no_trace(folder: Path) -> None:
    before = listing(folder)
    with StagedFiles(folder) as batch:
        stage_all(batch, folder)
    assert listing(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]


def failing(function: Callable[..., object], nth: int, error: BaseException) -> Callable[..., object]:
    calls = iter(range(1_000_000))

    def call(*args: object, **named: object) -> object:
        if next(calls) == nth:
            raise error
        return function(*args, **named)

    return call


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", ["write", "replace", "fsync", "open"])
@pytest.mark.parametrize("nth", range(8))
@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["disk full", "interrupt"])
def test_an_error_at_any_moment_leaves_what_was_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, nth: int, error: BaseException
) -> None:
    before = listing(folder)
    monkeypatch.setattr(os, name, failing(getattr(os, name), nth, error))
    done, said = False, ""
    try:
        with StagedFiles(folder) as batch:
            stage_all(batch, folder)
            batch.commit()
            done = True
    except (ProjectWriteError, KeyboardInterrupt) as caught:
        said = str(caught)
    monkeypatch.undo()
    if done:
        assert (folder / "b").read_bytes() == b"new b"
    else:
        assert listing(folder) == before
        assert ("make room on the disk" in said) == (error is FULL)


def test_a_short_write_is_continued(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:2]))
    with StagedFiles(folder) as batch:
        batch.stage(folder / "a", b"a longer text")
        batch.commit()
    assert (folder / "a").read_bytes() == b"a longer text"


def test_what_cannot_be_put_back_is_kept_and_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, calls = os.replace, iter(range(100))

    def replace_once(source: Path, target: Path) -> None:
        if next(calls) > 0:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace_once)
    with StagedFiles(folder) as batch:
        batch.stage(folder / "a", b"new a")
        batch.stage(folder / "b", b"new b")
        with pytest.raises(ProjectWriteError, match="Input/output error"):
            batch.commit()
    assert "could not be put back" in caplog.text
    assert b"old a" in listing(folder).values()


@pytest.mark.skipif(not hasattr(os, "chown"), reason="modes of POSIX")
def test_files_and_backups_keep_mode_and_links(folder: Path) -> None:
    (folder / "disk").mkdir()
    real = folder / "disk" / "b-1"
    (folder / "b").rename(real)
    (folder / "b").symlink_to(real)
    for path in (folder / "a", real):
        path.chmod(0o640)
    with StagedFiles(folder) as batch:
        stage_all(batch, folder)
        batch.stage(folder / "d", b"new d", like=real)
        batch.commit()
    assert (folder / "b").is_symlink()
    modes = {path.name: oct(path.stat().st_mode)[-3:] for path in (folder / "a", real, folder / "backups" / "a-backup")}
    assert modes == {"a": "640", "b-1": "640", "a-backup": "640"}
    assert oct((folder / "d").stat().st_mode)[-3:] == "640"
    assert listing(folder / "disk") == {"b-1": b"new b"}


@pytest.mark.skipif(not hasattr(os, "chown"), reason="links of POSIX")
def test_leftovers_beside_the_file_of_a_link_are_removed(folder: Path) -> None:
    (folder / "disk").mkdir()
    (folder / "b").rename(folder / "disk" / "b-1")
    (folder / "b").symlink_to("disk/b-1")
    StagedFiles(folder).stage(folder / "b", b"new b")
    staging.remove_leftovers(folder)
    assert listing(folder / "disk") == {"b-1": b"old b"}


def test_leftovers_of_a_killed_write_are_removed(folder: Path) -> None:
    before = listing(folder)
    batch = StagedFiles(folder)
    batch.stage(folder / "a", b"new a")
    batch.stage(folder / "b", b"new b")
    assert listing(folder) != before
    staging.remove_leftovers(folder, folder / "not there")
    assert listing(folder) == before


# -- backups


def test_the_last_five_backups_are_kept(tmp_path: Path) -> None:
    paths = []
    for number in range(8):
        path = backups.backup_path(tmp_path, "3")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]))
        paths.append(path)
    (paths[0].parent / "notes.txt").write_text("not a backup")
    backups.prune_backups(tmp_path, "3")
    found = backups.backups_of(tmp_path, "3")
    assert [backup.path for backup in found] == paths[:2:-1]
    assert paths[0].parent == tmp_path / "darefine" / "backups" / "3"
    assert all(backup.path.name.endswith("Z-data.qpdata") and backup.size == 1 for backup in found)
    assert (paths[0].parent / "notes.txt").exists()


def test_a_backup_is_later_than_those_from_a_clock_that_ran_ahead(tmp_path: Path) -> None:
    ahead = tmp_path / "darefine" / "backups" / "1" / "29990101T000000.000000Z-data.qpdata"
    ahead.parent.mkdir(parents=True)
    ahead.write_bytes(b"")
    assert backups.backup_path(tmp_path, "1").name == "29990101T000000.000001Z-data.qpdata"


# -- QuPath at the same time


def test_a_save_under_way_is_told(tmp_path: Path) -> None:
    data = tmp_path / "data.qpdata"
    assert running_qupath.qupath_warnings(data, None) == ()
    (tmp_path / "data.qpdata.bkp").write_bytes(b"")
    assert "QuPath is saving this image" in running_qupath.qupath_warnings(data, None)[0]


def test_a_running_qupath_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "slide.tif"
    image.write_bytes(b"x")
    monkeypatch.setattr(running_qupath, "_qupath_processes", lambda: [os.getpid()])
    assert "if this image is open there" in running_qupath.qupath_warnings(tmp_path / "data.qpdata", image)[0]
    if sys.platform == "linux":
        with image.open("rb"):
            assert "has slide.tif open" in running_qupath.qupath_warnings(tmp_path / "data.qpdata", image)[0]
