"""RESULTS.md is what the committed result files say, and its commands are those that made them."""

from __future__ import annotations

import doctest
import json
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks.__main__ import main, parse
from benchmarks.commands import results_page
from benchmarks.harness import markdown
from benchmarks.harness.markdown import NOT_WRITTEN, command_of, machine_of
from benchmarks.harness.options import RESULTS
from resnet_func.calibration import TYPICAL

FILES = results_page.read(RESULTS)


def test_the_page_is_current() -> None:
    page = results_page.PAGE.read_text(encoding="utf-8")
    assert page == results_page.document(RESULTS), "run `python -m benchmarks report`"


def test_every_result_file_is_on_the_page() -> None:
    assert {result.path for result in FILES} == set(RESULTS.glob("*.json"))
    page = results_page.PAGE.read_text(encoding="utf-8")
    assert all(f"results/{path.relative_to(RESULTS)}" in page for path in RESULTS.rglob("*.png"))


@pytest.mark.parametrize("result", FILES, ids=[result.path.stem for result in FILES])
def test_the_command_of_a_file_has_its_options(result: results_page.Result) -> None:
    recorded = result.content["options"]
    kind = results_page.KINDS[result.kind]
    command = command_of(kind.command or result.kind, recorded, kind.options)
    _, options = parse(shlex.split(command.partition("-m benchmarks ")[2]))
    understood = json.loads(json.dumps({k: v for k, v in vars(options).items() if k not in NOT_WRITTEN}))
    assert {name: understood[name] for name in recorded if name not in NOT_WRITTEN} == {
        name: value for name, value in recorded.items() if name not in NOT_WRITTEN
    }


def copied(name: str, folder: Path, **where: Any) -> dict[str, Any]:
    """A committed file of the first machine, as if measured on another."""
    (path,) = RESULTS.glob(f"{name}-*-epyc-zen3-2c.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    content["environment"] |= where
    stem = path.stem.removesuffix("-epyc-zen3-2c")
    target = folder / f"{stem}-{machine_of(content['environment'])}.json"
    target.write_text(json.dumps(content), encoding="utf-8")
    return content


def test_machines_stand_side_by_side(tmp_path: Path) -> None:
    first = copied("per-sample-resnet18-n128", tmp_path)
    second = copied("per-sample-resnet18-n128", tmp_path, cpu="Intel Xeon", microarchitecture=None, cores=4)
    assert machine_of(second["environment"]) == "xeon-avx2-4c"
    page = results_page.document(tmp_path)
    (head,) = [line for line in page.splitlines() if line.startswith("| what |")]
    for content in (first, second):
        assert f"{machine_of(content['environment'])}: images/s" in head
    assert page.count("### ") == 1
    row = next(line for line in page.splitlines() if line.startswith("| grads |"))
    assert row.count("1.26 (0.97-1.63)") == 2


def test_a_variant_that_one_machine_lacks_is_an_empty_cell(tmp_path: Path) -> None:
    copied("per-sample-resnet18-n128", tmp_path)
    other = copied("per-sample-resnet18-n128", tmp_path, cores=4)
    del other["figures"]["grads"]
    (path,) = tmp_path.glob("*-4c.json")
    path.write_text(json.dumps(other), encoding="utf-8")
    row = next(line for line in results_page.document(tmp_path).splitlines() if "| grads |" in line)
    assert row.endswith("|  |  |")


@pytest.mark.parametrize("text", ["{", "{}", '{"environment": 3}'])
def test_what_is_no_result_file_is_named(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scaling-x.json").write_text(text, encoding="utf-8")
    page = tmp_path / "page.md"
    assert main(["report", "--results", str(tmp_path), "--page", str(page)]) == 2
    error = capsys.readouterr().err
    assert "scaling-x.json is no result file" in error
    assert error.count("\n") == 1
    assert not page.exists()


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert main(["report", "--page", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == results_page.document(RESULTS)


@pytest.mark.parametrize("module", [markdown, results_page])
def test_examples_in_docstrings(module: ModuleType) -> None:
    attempted = doctest.testmod(module, raise_on_error=True).attempted
    assert attempted


NOISE = {"median": 1.0, "low": 0.9, "high": 1.1}
ROW = {"layer": "conv", "times": 1, "T": 4, "D": 9, "chosen": "ghost", "typical": "keep"}
WAYS = {"ghost": 2.0, "materialize": 1.0, "keep": 1.0}
KERNEL = {"image": [2, 3, 8, 8], "filters": [4, 3, 3, 3], "stride": 1, "times": 2, "chosen": "tile 4"}


@pytest.mark.parametrize(
    ("kind", "content", "line"),
    [
        ("here", {"figures": {"norms": NOISE}}, "| norms | 1.00 (0.90-1.10) |"),
        ("phases", {"shares": {"forward": NOISE}}, "| forward | 1.00 (0.90-1.10) |"),
        (
            "layers",
            {
                "layers": {"norms": [ROW | WAYS], "clipped_sum": [ROW | WAYS]},
                "speeds": TYPICAL.as_numbers(),
            },
            "| 2.000 | ",
        ),
        (
            "winograd",
            {"layers": [KERNEL | {"typical": "definition", "definition": 3.0, "tile 2": 2.5, "tile 4": 2.0}]},
            "| 3x3, 3 to 4, 8 px, stride 1 | 2 | 3.00 | 2.50 | 2.00 |  | tile 4 | 1.00 |",
        ),
    ],
)
def test_kinds_without_a_file_of_their_own_have_a_table(
    kind: str, content: dict[str, Any], line: str, tmp_path: Path
) -> None:
    like = copied("per-sample-resnet18-n128", tmp_path)
    like["options"] = {"batch": 8, "model": "resnet18"}
    (path,) = tmp_path.glob("*.json")
    path.unlink()
    (tmp_path / f"{kind}-resnet18-epyc-zen3-2c.json").write_text(json.dumps(like | content), encoding="utf-8")
    page = results_page.document(tmp_path)
    assert f"## {results_page.KINDS[kind].title}" in page
    assert line in page
