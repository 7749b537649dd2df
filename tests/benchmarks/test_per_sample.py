"""The benchmark of per-sample gradients at toy size: what it writes, and that what is wrong is not timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.commands import contractions, per_sample
from benchmarks.forms import loop_check
from benchmarks.harness import measure, memory
from resnet_func import calibration
from resnet_func.app import runtime


def test_a_toy_run_writes_figures_and_picture(tmp_path: Path) -> None:
    arguments = ["per-sample", "--quick", "--no-memory", "--results", str(tmp_path)]
    assert main(arguments) == 0
    (path,) = tmp_path.glob("per-sample-resnet8-n4-8px-*.json")
    result = json.loads(path.read_text())
    assert set(result["figures"]) == {per_sample.BASELINE, per_sample.AGAIN, *per_sample.OURS}
    assert all(figures["ratio"]["median"] > 0 for figures in result["figures"].values())
    assert result["environment"]["allocator"].startswith(("tuned", "stock"))
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_both_ways_of_each_layer(tmp_path: Path) -> None:
    assert main(["per-sample", "--quick", "--layers", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("layers-resnet8-*.json")
    result = json.loads(path.read_text())
    assert calibration.from_numbers(result["speeds"], "typical") == calibration.TYPICAL
    for quantity, rows in result["layers"].items():
        assert [row["layer"] for row in rows][:2] == ["conv1.weight", "layer1.0.conv1.weight"]
        assert sum(row["times"] for row in rows) == 7
        assert all(row["chosen"] == row["typical"] in contractions.WAYS[quantity] for row in rows)
    assert list(tmp_path.iterdir()) == [path]


def test_regret_is_chosen_over_best() -> None:
    rows: list[dict[str, Any]] = [
        {"times": 2, "chosen": "ghost", "typical": "keep", "ghost": 3.0, "materialize": None, "keep": 1.0},
        {"times": 1, "chosen": "keep", "typical": "keep", "ghost": 9.0, "materialize": 4.0, "keep": 4.0},
    ]
    assert contractions.regret(rows, "clipped_sum", "chosen") == pytest.approx(10 / 6)
    assert contractions.regret(rows, "clipped_sum", "typical") == pytest.approx(1)


@pytest.mark.parametrize(
    "look",
    [
        pytest.param(memory.peak_bytes_here, id="in-process"),
        pytest.param(memory.peak_bytes, id="fresh-process", marks=pytest.mark.nightly),
    ],
)
def test_peak_memory_of_a_variant_is_looked_at(
    look: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(runtime.ALLOCATOR_VARIABLE, "stock")  # put back afterwards: looking sets it
    monkeypatch.setattr(memory, "peak_bytes", look)
    words = ["--without", "norms", "grads", "clipped_sum", "--no-write"]
    assert main(["per-sample", "--quick", *words]) == 0
    assert "peak MB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--without", "nothing"], "no variant has nothing in its name"),
        (["--peers", "--dtype", "bf16"], "eager and in fp32"),
        (["--model", "resnet9"], "no network is called 'resnet9'"),
        (["--batch", "0"], "batch and size must be 1 or more"),
    ],
)
def test_wrong_options_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["per-sample", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["plain", "norms", "grads", "clipped_sum"])
def test_what_is_wrong_is_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_check, "SLICE", 2)
    options = per_sample.Options(model="resnet8", batch=3, size=8)
    case = per_sample.make_case(options, "cpu")  # type: ignore[arg-type]
    step = per_sample.make_step(name, options, case)
    loop_check.check({name: step}, case, allowed=5e-3)
    other = case._replace(y=(case.y + 1) % 10)
    with pytest.raises(measure.Disagreement, match=f"{name} is wrong"):
        loop_check.check({name: step}, other, allowed=5e-3)
