"""The run folder: found, made, written in one piece, read with care."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from resnet_func.app import run_folder
from resnet_func.app.run_folder import RunError


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_first_free_name() -> None:
    assert [run_folder.new(None, "a") for _ in range(3)] == [
        Path("runs/a"),
        Path("runs/a-2"),
        Path("runs/a-3"),
    ]


def test_an_empty_folder_may_be_used_and_a_full_one_not(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    assert run_folder.new(folder, "a") == run_folder.new(folder, "a") == folder
    (folder / "kept").write_text("mine")
    with pytest.raises(
        RunError, match=re.escape(f"{folder} exists already. Go on with it by --resume {folder}")
    ):
        run_folder.new(folder, "a")
    assert (folder / "kept").read_text() == "mine"


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot make the run folder .*Choose another --run-dir"):
        run_folder.new(tmp_path / "file" / "run", "a")


def test_config_and_metrics_come_back(tmp_path: Path) -> None:
    run_folder.write_config(tmp_path, {"a": [1, None]})
    records = [{"epoch": 1, "train_loss": 0.1}, {"epoch": 2, "train_loss": float("inf")}]
    run_folder.write_metrics(tmp_path, records)
    assert run_folder.read_config(tmp_path) == {"a": [1, None]}
    assert run_folder.read_metrics(tmp_path) == records
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "metrics.jsonl"}


def test_no_metrics_yet(tmp_path: Path) -> None:
    assert run_folder.read_metrics(tmp_path) == []


@pytest.mark.parametrize("text", ["{", "[]", ""], ids=["cut", "list", "empty"])
def test_a_damaged_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunError, match="config.json is damaged.*Restore it from a copy"):
        run_folder.read_config(tmp_path)


def test_a_damaged_line_of_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo')
    with pytest.raises(RunError, match="metrics.jsonl is damaged"):
        run_folder.read_metrics(tmp_path)


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run folder: it has no config.json"):
        run_folder.read_config(tmp_path)


def test_the_latest_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no run below runs/"):
        run_folder.latest()
    for age, name in ((100, "a"), (300, "b"), (200, "c")):
        run_folder.write_config(run_folder.new(None, name), {})
        os.utime(tmp_path / "runs" / name / "config.json", (age, age))
    assert run_folder.latest() == Path("runs/b")


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder.write_config(tmp_path, {"old": 1})

    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        RunError, match="cannot write .*No space left on device. The old file, if any, is kept"
    ):
        run_folder.write_config(tmp_path, {"new": 2})
    monkeypatch.undo()
    assert run_folder.read_config(tmp_path) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
