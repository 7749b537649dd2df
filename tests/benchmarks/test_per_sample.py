"""The benchmark of per-sample gradients at toy size: what it writes, and that what is wrong is not timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.commands import contractions, per_sample, phases
from benchmarks.forms import loop_check
from benchmarks.harness import measure, memory
from resnet_func import calibration, tree
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


def test_bf16_is_held_against_ordinary_gradients_in_bf16() -> None:
    options = per_sample.Options(model="resnet8", batch=3, size=8, dtype="bf16")
    case = per_sample.make_case(options, "cpu")  # type: ignore[arg-type]
    names = ("plain", "norms", "clipped_sum", "grads")
    steps = {name: per_sample.make_step(name, options, case) for name in names}
    loop_check.check(steps, case, allowed=per_sample.NARROW_ERROR, narrow=True)
    gradients, norms = steps["grads"]()
    wrong = tree.map(lambda leaf: 2 * leaf, gradients), norms
    with pytest.raises(measure.Disagreement, match="grads is wrong"):
        loop_check.check({"grads": lambda: wrong}, case, allowed=per_sample.NARROW_ERROR, narrow=True)


def test_the_parts_of_a_step(tmp_path: Path) -> None:
    assert main(["per-sample", "--quick", "--phases", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("phases-resnet8-*.json")
    shares = json.loads(path.read_text())["shares"]
    parts = [name for name in shares if name.startswith("norms:")]
    assert [name for name in shares if ":" not in name][:4] == [
        "forward",
        "backward without weight gradients",
        "interception",
        "factors of small leaves",
    ]
    assert f"norms: {phases.REST}" in parts
    assert sum(int(name.split()[-3]) for name in parts if name.endswith("of them")) == 7 + 1 + 15


def test_parts_that_exceed_the_whole_are_refused() -> None:
    names = [phases.FORWARD, phases.BACKWARD, phases.INTERCEPTED, phases.CAPTURED]
    seconds = {phases.PLAIN: [1.0, 1.0], phases.AGAIN: [1.0, 1.01]}
    seconds |= {name: [0.3 + 0.2 * i] * 2 for i, name in enumerate(names)}
    seconds |= {"norms": [1.3, 1.3], "clipped_sum": [1.4, 1.4], "norms: conv, ghost, 3 of them": [0.3, 0.3]}
    shares = phases.split(seconds)
    assert shares[f"norms: {phases.REST}"].median == pytest.approx(0.1)
    phases.check_rest(shares, seconds)
    seconds["norms: conv, ghost, 3 of them"] = [0.5, 0.5]
    with pytest.raises(measure.Disagreement, match="parts of norms come to more than the whole, by 0.10"):
        phases.check_rest(phases.split(seconds), seconds)


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
        (["--phases", "--dtype", "bf16"], "eager step in fp32"),
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
    allowed = loop_check.allowed_error(case)
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
    assert set(result["errors"]) == {per_sample.BASELINE, per_sample.AGAIN, *per_sample.OURS[:6]}
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
