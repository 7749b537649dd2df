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
    allowed = loop_check.allowed(case, "fp32")
    loop_check.check({name: step}, case, allowed)
    other = case._replace(y=(case.y + 1) % 10)
    with pytest.raises(measure.Disagreement, match=f"{name} is wrong"):
        loop_check.check({name: step}, other, allowed)


NETWORK = """
from torch import nn


def net():
    norm = nn.BatchNorm2d(4)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(NETWORK)
    return f"{tmp_path / 'mine.py'}:net"


def test_a_network_of_ones_own_is_measured_as_it_is(own: str, tmp_path: Path) -> None:
    words = ["--model", own, "--size", "8", "--quick", "--no-memory", "--results", str(tmp_path)]
    assert main(["per-sample", *words]) == 0
    (path,) = tmp_path.glob("per-sample-mine-net-n4-8px-*.json")
    result = json.loads(path.read_text())
    assert set(result["errors"]) == {per_sample.BASELINE, per_sample.AGAIN, *per_sample.OURS}
    assert max(result["errors"].values()) < 1e-4


def test_peers_that_do_not_take_a_network_are_left_out_with_their_reason(
    own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, case: Any, max_norm: float) -> Any:
        raise NotImplementedError("BatchNorm")

    monkeypatch.setattr(per_sample, "make_peer", refuse)
    options = per_sample.Options(model=own, batch=2, size=8, peers=True)
    case = per_sample.make_case(options, "cpu")  # type: ignore[arg-type]
    steps, skipped = per_sample.make_steps(["norms", *per_sample.OTHERS], options, case)
    assert list(steps) == ["norms"]
    assert list(skipped) == list(per_sample.OTHERS)
    assert skipped["Opacus, hooks"] == "NotImplementedError: BatchNorm"
    assert "the zoo's networks only" in skipped[per_sample.JAX_PLAIN]


def test_peers_that_are_wrong_about_a_network_are_left_out_with_their_error(own: str) -> None:
    options = per_sample.Options(model=own, batch=2, size=8)
    case = per_sample.make_case(options, "cpu")  # type: ignore[arg-type]
    right = per_sample.make_step("clipped_sum", options, case)

    def twice() -> Any:
        total, norms = right()
        return total, 2 * norms

    steps, skipped = {"clipped_sum": right, "Opacus, ghost": right, "Opacus, hooks": twice}, {}
    assert set(per_sample.check_steps(steps, skipped, options, case)) == {"clipped_sum", "Opacus, ghost"}
    assert set(steps) == {"clipped_sum", "Opacus, ghost"}
    assert skipped["Opacus, hooks"].startswith("Opacus, hooks is wrong: relative error of its norms 1,")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("torchvision:resnet19", "torchvision has no model 'resnet19'"),
        ("no_such.py:net", "no Python file at no_such.py"),
        ("torch.nn:Identity", "must return logits"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    model: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["per-sample", "--model", model]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
