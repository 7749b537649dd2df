"""Files are written whole or not at all, durably where the system can, by several writers at once."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from resnet_func import files


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write_by_path(path: Path, data: bytes) -> None:
    with files.replacing(path) as temporary:
        temporary.write_bytes(data)


both = pytest.mark.parametrize("write", [files.write_whole, write_by_path], ids=["bytes", "path"])


@both
def test_a_file_is_made_and_replaced(tmp_path: Path, write) -> None:
    for data in (b"first", b"", b"a longer second"):
        write(tmp_path / "a.txt", data)
        assert (tmp_path / "a.txt").read_bytes() == data
        assert names(tmp_path) == {"a.txt"}


@both
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_refusal_keeps_the_old_file_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write, step: str
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files.write_whole(tmp_path / "a.txt", b"old")
    monkeypatch.setattr(os, step, refuse)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "a.txt", b"new")
    assert names(tmp_path) == {"a.txt"}
    assert (tmp_path / "a.txt").read_bytes() == b"old"


def test_an_error_while_writing_by_path_keeps_the_old_file(tmp_path: Path) -> None:
    files.write_whole(tmp_path / "a.txt", b"old")

    def write_half() -> None:
        with files.replacing(tmp_path / "a.txt") as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert names(tmp_path) == {"a.txt"}
    assert (tmp_path / "a.txt").read_bytes() == b"old"


@both
def test_the_mode_is_what_the_umask_grants(tmp_path: Path, write) -> None:
    (tmp_path / "plain.txt").write_bytes(b"")
    write(tmp_path / "a.txt", b"x")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


def test_a_library_that_writes_for_the_user_alone(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_bytes(b"")
    with files.replacing(tmp_path / "a.txt") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


@both
def test_writers_at_once_leave_one_whole_file(tmp_path: Path, write) -> None:
    start = threading.Barrier(8)

    def run(letter: bytes) -> None:
        start.wait()
        for _ in range(20):
            write(tmp_path / "a.txt", letter * 10_000)

    threads = [threading.Thread(target=run, args=(bytes([65 + i]),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    data = (tmp_path / "a.txt").read_bytes()
    assert (len(data), len(set(data))) == (10_000, 1)
    assert names(tmp_path) == {"a.txt"}


def test_the_file_and_its_folder_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), fsync(fd)))
    for write in (files.write_whole, write_by_path):
        write(tmp_path / "a.txt", b"x")
        assert synced == [(tmp_path / "a.txt").stat().st_ino, tmp_path.stat().st_ino]
        synced.clear()


@both
@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM])
def test_a_system_on_which_no_folder_can_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write, code: int
) -> None:
    """Windows: os.open of a folder is EACCES, and there is nothing to sync it by."""
    real_open = os.open

    def refuse_folders(path, flags, *args, **kwargs):
        if Path(path).is_dir():
            raise OSError(code, os.strerror(code))
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse_folders)
    write(tmp_path / "a.txt", b"x")
    assert (tmp_path / "a.txt").read_bytes() == b"x"
    files.make_folder(tmp_path / "deep" / "er")
    assert (tmp_path / "deep" / "er").is_dir()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_to_sync_a_folder_is_not_excused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real_fsync = os.fsync

    def fail_on_folders(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino == tmp_path.stat().st_ino:
            raise OSError(code, os.strerror(code))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_on_folders)
    with pytest.raises(OSError, match=os.strerror(code)):
        files.write_whole(tmp_path / "a.txt", b"x")
