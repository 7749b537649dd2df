"""The table of README's figures: from result files, this machine first, the committed ones beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.commands import here
from benchmarks.harness.options import RESULTS
from benchmarks.harness.statistics import Seconds

ZEN3 = "epyc-zen3-2c"


def copy_committed(words: str, folder: Path) -> bool:
    """As if a run had measured what is committed."""
    folder.mkdir()
    shutil.copy(RESULTS / f"{folder.name}-{ZEN3}.json", folder)
    return True


def test_a_table_of_all_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(here, "measure_one", lambda options, words, folder: copy_committed(words, folder))
    monkeypatch.setattr(here, "machine_of", lambda where: "elsewhere")
    assert main(["here", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("here-*.json")
    figures = json.loads(path.read_text())["figures"]
    assert len(figures) == 13
    assert figures["ResNet-18, 32 images, GroupNorm: `norms` / ordinary step"]["median"] == pytest.approx(
        0.82, abs=0.005
    )
    out = capsys.readouterr().out
    assert "ResNet-20, 64 images, GroupNorm: the noise" in out
    assert "elsewhere" in out


def test_a_run_that_fails_is_named_and_the_others_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure_one(options: Any, words: str, folder: Path) -> bool:
        return "allocator" not in words and copy_committed(words, folder)

    monkeypatch.setattr(here, "measure_one", measure_one)
    assert main(["here", "--no-write"]) == 1
    captured = capsys.readouterr()
    assert "1 runs failed: allocator" in captured.err
    assert "`norms` / ordinary step" in captured.out


def test_committed_machines_stand_beside_and_this_one_does_not_twice() -> None:
    found = here.committed(RESULTS, "elsewhere")
    assert set(found[ZEN3]) == set(here.COMMANDS)
    assert ZEN3 not in here.committed(RESULTS, ZEN3)
    assert {figure.stem for figure in here.figures()} == set(here.COMMANDS)


def test_the_fastest_of_each_kind_are_compared() -> None:
    seconds: Seconds = {"ours a": [2.0, 2.0], "ours b": [1.0, 1.0], "theirs": [4.0, 2.0], "x": [9.0, 9.0]}
    figures = {name: {"ratio": {"median": times[1]}} for name, times in seconds.items()}
    content = {"figures": figures, "seconds": seconds}
    pick = here.quotient(lambda name: "ours" in name, lambda name: "theirs" in name)
    assert (pick(content) or {})["median"] == pytest.approx(0.375)
    assert here.quotient(lambda name: False, lambda name: True)(content) is None
    assert here.row("no such")(content) is None
