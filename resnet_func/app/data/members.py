"""Files inside of tar archives, by addresses that stand wherever an image file's path does.

    train/000003.tar::cat/0017.jpg@1536+7344

are the 7,344 bytes of train/000003.tar from byte 1,536 on, which were packed as cat/0017.jpg. So any image is
read by itself, without its archive's other ones. What is no such address is the path of a file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Self, TypeAlias

ADDRESS = re.compile(r"(.*?\.tar)::(.*)@(\d+)\+(\d+)", re.DOTALL)


class Member(NamedTuple):
    """A file in an archive: its name there, where its bytes begin, and how many they are.

    >>> str(Member("a.tar", "cat.jpg", 512, 99))
    'a.tar::cat.jpg@512+99'
    """

    archive: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}::{self.name}@{self.offset}+{self.size}"


Reader: TypeAlias = Callable[[Member], bytes]


def parse(file: str) -> Member | None:
    """What an address says; None of a path.

    >>> parse("a.tar::cat.jpg@512+99")
    Member(archive='a.tar', name='cat.jpg', offset=512, size=99)
    >>> parse("cat.jpg") is None
    True
    """
    found = ADDRESS.fullmatch(file)
    return Member(found[1], found[2], int(found[3]), int(found[4])) if found else None


class Archives:
    """Reads members; keeps each archive open that it has read from, until it is left."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._open: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, member: Member) -> bytes:
        """The bytes of a member.

        Raises:
            OSError: its archive cannot be read.
            ValueError: its archive ends before it does.
        """
        if member.archive not in self._open:
            self._open[member.archive] = os.open(member.archive, os.O_RDONLY)
            self._stack.callback(os.close, self._open[member.archive])
        content = os.pread(self._open[member.archive], member.size, member.offset)
        if len(content) < member.size:
            raise ValueError(f"the archive ends after {len(content)} of its {member.size} bytes")
        return content


def read(file: str) -> bytes:
    """All of a file, or of a member.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    member = parse(file)
    if member is None:
        return Path(file).read_bytes()
    with Archives() as archives:
        return archives.read(member)


class Facts(NamedTuple):
    """What is known of a file unread: its own name, how many bytes, and when it, or its archive, changed."""

    name: str
    size: int
    changed: int


def facts(file: str) -> Facts:
    """Of a file or a member.

    Raises:
        OSError: it, or its archive, is not there.
    """
    member = parse(file)
    status = os.stat(file if member is None else member.archive)
    name, size = (file, status.st_size) if member is None else (member.name, member.size)
    return Facts(Path(name).name, size, status.st_mtime_ns)
