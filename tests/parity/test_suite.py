"""The command `python -m parity`: what it prints and writes, and what it exits with."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from unittest import SkipTest

import pytest

from parity import suite
from parity.__main__ import main
from parity.cell import Cell


def fails() -> str:
    raise AssertionError("worst gradient conv1.weight: 3 ULP")


def breaks() -> str:
    raise KeyError("layer9")


def skips() -> str:
    raise SkipTest("no CUDA device here")


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = {
        "good/a": lambda: "0 ULP",
        "good/b": lambda: "0 ULP",
        "bad/c": fails,
        "bad/d": skips,
        "e": breaks,
    }
    cells = [Cell("made-up", name, check) for name, check in checks.items()]
    monkeypatch.setattr(suite, "SECTIONS", {"made-up": SimpleNamespace(cells=lambda quick: cells)})


@pytest.mark.usefixtures("made_up")
def test_failures_are_told_with_their_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "made-up/bad"]) == 1
    out = capsys.readouterr().out
    assert "FAILED made-up/bad/c: worst gradient conv1.weight: 3 ULP\n" in out
    assert "python -m parity --only made-up/bad/c\n" in out
    assert "skipped 1: no CUDA device here\n" in out
    assert "2 cells: 0 passed, 1 failed, 1 skipped" in out


@pytest.mark.usefixtures("made_up")
def test_an_error_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "made-up/e"]) == 1
    assert "FAILED made-up/e: KeyError: 'layer9'\n" in capsys.readouterr().out


@pytest.mark.usefixtures("made_up")
def test_the_files_tell_every_cell(tmp_path: Path) -> None:
    data, page = tmp_path / "parity.json", tmp_path / "parity.md"
    assert main(["--json", str(data), "--markdown", str(page)]) == 1
    report = json.loads(data.read_text())
    outcomes = {cell["name"]: cell["outcome"] for cell in report["cells"]}
    assert outcomes == dict(zip(["good/a", "good/b", "bad/c", "bad/d", "e"], outcomes.values(), strict=True))
    assert list(outcomes.values()) == ["passed", "passed", "failed", "skipped", "failed"]
    assert {"torch", "cpu", "commit"} <= report["machine"].keys()
    text = page.read_text()
    assert "## made-up\n" in text
    assert "| good | 2 | 0 | 0 | 0 ULP |\n" in text
    assert "| bad | 0 | 1 | 1 |  |\n" in text


@pytest.mark.usefixtures("made_up")
def test_good_cells_exit_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "made-up/good"]) == 0
    assert "2 cells: 2 passed, 0 failed, 0 skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nope"], "no cell starts with 'nope'; sections are bitwise"),
        (["--quick", "--only", "bitwise/resnet34/bf16"], "no quick cell starts with"),
        (["--only", "properties/no-", "--jobs", "0"], "--jobs must be 1 or more"),
        (
            ["--only", "properties/eul", "--json", "/no/such/x.json"],
            "no folder /no/such to write x.json into",
        ),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_processes_share_the_cells_and_the_report_explains_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "parity.md"
    words = ["--quick", "--jobs", "2", "--only", "properties/no-", "--markdown", str(page)]
    assert main(words) == 0
    out, text = capsys.readouterr().out, page.read_text()
    names = ["no-bit-is-overlooked", "no-nan-is-overlooked"]
    assert all(name in out for name in names)
    assert "2 cells: 2 passed" in out
    assert "A NaN in any entry of any leaf is refused" in text
    assert text.index("| no-nan-is-overlooked | 1 |") < text.index("| no-bit-is-overlooked | 1 |")


def test_paths_are_unique() -> None:
    for quick in (True, False):
        paths = [cell.path for cell in suite.cells(quick=quick)]
        assert len(paths) == len(set(paths)) > 100
