"""A file is there as a whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

import pytest

from darefine_qupath import filesystem
from darefine_qupath.errors import ExchangeError, SlideError
from darefine_qupath.filesystem import atomic_write, keep_attributes, sync_folder


def test_takes_the_place_of_the_former_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "mask.tif"
    path.write_bytes(b"former")
    with atomic_write(path, ExchangeError) as temporary:
        assert temporary.suffix == ".tif"
        assert temporary.parent == tmp_path
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"former"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_keeps_the_former_file_when_the_writer_fails(tmp_path: Path) -> None:
    path = tmp_path / "mask.tif"
    path.write_bytes(b"former")
    with pytest.raises(UnicodeEncodeError), atomic_write(path, ExchangeError) as temporary:
        temporary.write_text("half \ud800", encoding="utf-8")
    assert path.read_bytes() == b"former"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_says_why_the_system_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "mask.tif"
    path.write_bytes(b"former")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with (
        pytest.raises(ExchangeError, match=r"mask\.tif cannot be written \(No space left on device\)"),
        atomic_write(path, ExchangeError) as temporary,
    ):
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"former"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("patience_s", "refusals", "is_replaced"), [(60, 3, True), (0, 1, False)])
def test_a_file_that_windows_holds_for_a_moment_is_replaced_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience_s: float, refusals: int, is_replaced: bool
) -> None:
    path, left, real = tmp_path / "mask.tif", iter(range(refusals)), os.replace

    def held(source: Path, target: Path) -> None:
        if next(left, None) is not None:
            raise PermissionError(errno.EACCES, "Access is denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr(filesystem, "_PATIENCE_S", patience_s)
    refused = contextlib.nullcontext() if is_replaced else pytest.raises(ExchangeError, match="Access is denied")
    with refused, atomic_write(path, ExchangeError) as temporary:
        temporary.write_bytes(b"new")
    assert path.exists() == is_replaced
    assert len(list(tmp_path.iterdir())) == is_replaced


def test_a_network_share_that_cannot_sync_a_folder_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    path = tmp_path / "mask.tif"
    with atomic_write(path, ExchangeError) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"new"
    sync_folder(tmp_path)


def test_names_a_missing_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(ExchangeError, match=r"there is no folder .*nowhere"),
        atomic_write(tmp_path / "nowhere" / "mask.tif", ExchangeError),
    ):
        pass


def test_an_error_inside_keeps_its_own_words(tmp_path: Path) -> None:
    # Some of ours are OSErrors: a slide that cannot be read is no disk that cannot be written.
    with pytest.raises(SlideError, match="damaged at 3, 4"), atomic_write(tmp_path / "a.png", ExchangeError):
        raise SlideError("damaged at 3, 4")


def test_gives_the_file_the_rights_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with atomic_write(tmp_path / "new", ExchangeError) as temporary:
        temporary.chmod(0o600)
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


# -- whose it is

posix = pytest.mark.skipif(not hasattr(os, "chown"), reason="modes and owners of POSIX")
by_root = pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root gives files away")


def extended(path: Path) -> dict[str, bytes]:
    return {name: os.getxattr(path, name) for name in os.listxattr(path)}


@posix
@pytest.mark.parametrize("mode", [0o640, 0o600, 0o444, 0o664, 0o755])
def test_a_replaced_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"former")
    path.chmod(mode)
    with atomic_write(path, ExchangeError) as temporary:
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
        temporary.write_bytes(b"new")
    assert (stat.S_IMODE(path.stat().st_mode), path.read_bytes()) == (mode, b"new")


@posix
@by_root
def test_a_replaced_file_keeps_owner_and_group(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"former")
    os.chown(path, 1234, 4321)
    with atomic_write(path, ExchangeError) as temporary:
        temporary.write_bytes(b"new")
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 4321)


@posix
@pytest.mark.parametrize(("refused", "mode"), [("owner", 0o640), ("group", 0o600)])
def test_who_cannot_give_a_file_away_lets_nobody_read_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str, mode: int
) -> None:
    former, new = tmp_path / "former", tmp_path / "new"
    former.write_bytes(b"")
    new.write_bytes(b"")
    former.chmod(0o640)
    given = []

    def chown(_: Path, user: int, group: int) -> None:
        if user != -1 or refused == "group":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        given.append(group)

    monkeypatch.setattr(os, "chown", chown)
    real = Path.stat
    other = os.stat_result((0o100640, 0, 0, 1, 1234, 4321, 0, 0, 0, 0))
    monkeypatch.setattr(Path, "stat", lambda path, **more: other if path == former else real(path, **more))
    keep_attributes(former, new)
    assert stat.S_IMODE(real(new).st_mode) == mode
    assert given == ([4321] if refused == "owner" else [])


@pytest.mark.skipif(not hasattr(os, "setxattr"), reason="extended attributes of Linux")
def test_a_replaced_file_keeps_its_extended_attributes(tmp_path: Path) -> None:
    path = tmp_path / "mask.tif"
    path.write_bytes(b"former")
    try:
        os.setxattr(path, "user.comment", b"second reading")
    except OSError:
        pytest.skip("this file system has no extended attributes")
    with atomic_write(path, ExchangeError) as temporary:
        temporary.write_bytes(b"new")
    assert extended(path) == {"user.comment": b"second reading"}


@posix
@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_a_link(tmp_path: Path, is_there: bool) -> None:
    (tmp_path / "disk").mkdir()
    real, path = tmp_path / "disk" / "model-1", tmp_path / "model.safetensors"
    if is_there:
        real.write_bytes(b"former")
    path.symlink_to("disk/model-1")
    with atomic_write(path, ExchangeError) as temporary:
        assert (temporary.parent, temporary.suffix) == (real.parent, ".safetensors")
        temporary.write_bytes(b"new")
    assert (path.is_symlink(), real.read_bytes()) == (True, b"new")
    assert [file.name for file in real.parent.iterdir()] == ["model-1"]


def test_what_a_killed_writer_left_goes_after_a_day(tmp_path: Path) -> None:
    path, left = tmp_path / "m[1].tif", tmp_path / ".m[1]-0123abcd.tif"
    others = [tmp_path / ".m[1]-0123abcd.png", tmp_path / ".m[1]-fedcba98.tif", tmp_path / "m[1]-0123abcd.tif"]
    for file in (left, *others):
        file.write_bytes(b"half")
        if file is not others[1]:  # that one is being written
            os.utime(file, (1, 1))
    with atomic_write(path, ExchangeError) as temporary:
        temporary.write_bytes(b"new")
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])
