"""The command `python -m parity`: what it prints and writes, and what it exits with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import SkipTest

import pytest

from parity import suite
from parity.__main__ import main
from parity.cell import Cell, Result


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


NETWORKS = Path(suite.__file__).parent / "NETWORKS.md"


def without_figures(lines: list[str]) -> list[str]:
    """A block without what a run finds: counts, figures, seconds, and the machine."""
    kept = lines[: lines.index("### Machine")]
    kept = [re.sub(r"^(\| .*? \| \d+ \| \d+ \| \d+ \| ).*", r"\1", line) for line in kept if line]
    return [re.sub(r"; \d+ s$", "", line) for line in kept]


@pytest.mark.parametrize("section", ["elsewhere", "per-sample"])
def test_the_page_of_other_networks_has_the_rows_of_today(section: str) -> None:
    """Its tables are of the cells that there are, all passed, in today's format: else write them anew."""
    cells = suite.SECTIONS[section].cells(quick=False)
    passed = [Result(section, cell.name, "passed", "", 0.0) for cell in cells]
    _, found, _ = suite.split_page(section, NETWORKS)
    begin, _ = suite.marks(section, NETWORKS)
    assert without_figures(found) == without_figures(suite.block(section, passed, {})), begin


@pytest.mark.usefixtures("made_up")
def test_a_section_is_written_within_a_page_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "PAGE.md"
    begin, end = suite.marks("made-up", page)
    page.write_text(f"# By hand\n\n{begin}\nold\n{end}\n\nby hand, too\n")
    assert main(["--only", "made-up/good", "--within", str(page)]) == 0
    before, found, after = suite.split_page("made-up", page)
    assert before == ["# By hand", "", begin]
    assert after == [end, "", "by hand, too"]
    assert "2 cells: 2 passed, 0 failed, 0 skipped; 0 s" in found
    assert "| good | 2 | 0 | 0 | 0 ULP |" in found
    assert "old" not in found
    once = page.read_text()
    assert main(["--only", "made-up/good", "--within", str(page)]) == 0
    assert len(page.read_text().splitlines()) == len(once.splitlines())


@pytest.mark.usefixtures("made_up")
def test_a_page_without_marks_is_refused_before_anything_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "PAGE.md"
    page.write_text("# By hand\n")
    assert main(["--within", str(page)]) == 2
    assert "needs the lines <!-- made-up: begin" in capsys.readouterr().err
