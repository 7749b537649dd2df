"""Files that are written whole or not at all: the only atomic writer."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# What says that a folder cannot be synced here: some network file systems, and Windows, which cannot even
# open one (EACCES).
CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: whatever happens, `path` holds what it held before or all of `data`.

    Once this returns, a power cut does not undo it, as far as the file system can promise. Several writers of
    one path do not disturb each other: the last one's bytes stay.

    Args:
        path: The file; its folder exists.
        data: All that the file will hold.

    Raises:
        OSError: the disk is full or refuses; what was there before still is, and nothing else is left.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_whole(Path(folder) / "note.txt", b"hello")
    """
    put_in_place(stage(path, data), path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file by a library that wants a path: a temporary one, which takes the place of `path`.

    As `write_whole` otherwise. An exception inside leaves `path` as it was and removes the temporary file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, replacing(Path(folder) / "note.txt") as temporary:
    ...     _ = temporary.write_text("hello")
    """
    temporary = _temporary(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask grants; some libraries make files for the user alone
        yield temporary
        temporary.chmod(mode)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        put_in_place(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def stage(path: Path, data: bytes) -> Path:
    """Bring `data` to the disk beside `path`, under a temporary name that ends in ".tmp", which is returned.

    With `put_in_place` the two halves of `write_whole`, for who writes several files before any counts.
    """
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return temporary


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a staged file to `path`, durably; where that fails the staged file is removed."""
    try:
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, durably; one that is there is left as it is."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in absent:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename is not, until its folder is synced."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
