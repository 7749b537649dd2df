"""Addresses of files in archives: read as the files are, told from paths."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_func.app.data import members
from resnet_func.app.data.members import Member


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: ".tar::" not in name),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.integers(0, 2**60),
    st.integers(0, 2**60),
)
def test_an_address_is_read_back(archive: str, name: str, offset: int, size: int) -> None:
    member = Member(f"{archive}.tar", name, offset, size)
    assert members.parse(str(member)) == member


@pytest.mark.parametrize("path", ["a.tar", "a.tar::b.png", "a/b.png", "a::b@1+2", "a.tar::b.png@1+2.png", ""])
def test_a_path_is_no_address(path: str) -> None:
    assert members.parse(path) is None


@pytest.fixture
def packed(tmp_path: Path) -> list[Member]:
    contents = {"x/a.bin": b"first", "b.bin": bytes(2000), "c.bin": b""}
    for name, content in contents.items():
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_bytes(content)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for name in contents:
            tar.add(tmp_path / "files" / name, name)
    with tarfile.open(tmp_path / "all.tar") as tar:
        return [Member(str(tmp_path / "all.tar"), m.name, m.offset_data, m.size) for m in tar]


def test_a_member_is_read_as_its_file_is(packed: list[Member], tmp_path: Path) -> None:
    with members.Archives() as archives:
        for member in reversed(packed):
            wanted = (tmp_path / "files" / member.name).read_bytes()
            assert archives.read(member) == members.read(str(member)) == wanted
            assert members.read(str(tmp_path / "files" / member.name)) == wanted


def test_facts_are_the_members_own_name_and_size_and_the_archives_time(packed: list[Member]) -> None:
    archive = Path(packed[0].archive)
    changed = archive.stat().st_mtime_ns
    assert members.facts(str(packed[0])) == ("a.bin", 5, changed)
    assert members.facts(str(archive)) == ("all.tar", archive.stat().st_size, changed)


def test_what_is_not_there_any_more_is_said(packed: list[Member]) -> None:
    cut = packed[1]._replace(size=1 << 20)
    with pytest.raises(ValueError, match="the archive ends after .* of its 1048576 bytes"):
        members.read(str(cut))
    Path(cut.archive).unlink()
    for ask in (members.read, members.facts):
        with pytest.raises(FileNotFoundError):
            ask(str(cut))
