"""Secret seeds: from the system's entropy, for the owner alone, and gone in the end."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from resnet_func.app.private import seeds
from resnet_func.app.storage.run_folder import SECRET_SEEDS, RunError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def test_they_come_from_the_systems_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = seeds.draw()
    assert len(set(drawn)) == 3
    assert all(0 <= value < 2**128 for value in drawn)
    monkeypatch.setattr(seeds.secrets, "randbits", lambda bits: bits)
    assert seeds.draw() == (128, 128, 128)


def test_an_insecure_number_gives_three_seeds() -> None:
    assert len(set(seeds.draw(insecure=0)) | set(seeds.draw(insecure=1))) == 6


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_they_are_kept_for_the_owner_alone_whatever_the_umask(folder: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        seeds.keep(folder, seeds.draw(insecure=0))
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "checkpoints" / SECRET_SEEDS).stat().st_mode) == 0o600
    assert seeds.read(folder) == seeds.draw(insecure=0)


def test_they_are_never_overwritten(folder: Path) -> None:
    seeds.keep(folder, seeds.draw(insecure=0))
    with pytest.raises(RunError, match="cannot write"):
        seeds.keep(folder, seeds.draw(insecure=1))
    assert seeds.read(folder) == seeds.draw(insecure=0)


@pytest.mark.parametrize("content", [None, "", "{}", '{"noise": "x"}', "[1]"])
def test_without_them_a_run_does_not_go_on(folder: Path, content: str | None) -> None:
    if content is not None:
        (folder / "checkpoints" / SECRET_SEEDS).write_text(content)
    with pytest.raises(RunError, match="gone or damaged"):
        seeds.read(folder)


def test_they_are_forgotten_once_and_twice(folder: Path) -> None:
    seeds.keep(folder, seeds.draw())
    for _ in range(2):
        seeds.forget(folder)
        assert not list((folder / "checkpoints").iterdir())
