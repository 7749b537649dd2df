"""Speeds: measured once, kept whole, replaced where they are foreign; and nothing chooses by them unasked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import resnet_func as rf
from resnet_func import calibration
from resnet_func.calibration import TYPICAL, Speeds
from resnet_func.models import winograd
from resnet_func.per_sample import engine

CPU = torch.device("cpu")


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[Speeds]:
    """What is measured, two at a time; and the variable as users have it."""
    monkeypatch.delenv(calibration.VARIABLE)
    given = [replace(TYPICAL, call=100.0 * (1 + i // 2), source="measured") for i in range(8)]
    monkeypatch.setattr(calibration, "measure", lambda *_, **__: given.pop(0))
    return given


def test_a_machine_is_measured_once(measurements: list[Speeds], tmp_path: Path) -> None:
    first = calibration.measured(folder=tmp_path)
    assert first.call == 100
    assert calibration.measured(folder=tmp_path) == first
    assert calibration.measured(dtype=torch.bfloat16, folder=tmp_path).call == 200
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: "{",
        lambda content: "[]",
        lambda content: json.dumps(content | {"key": {**content["key"], "torch": "1.0"}}),
        lambda content: json.dumps(content | {"speeds": {**content["speeds"], "byte": -1}}),
        lambda content: json.dumps(content | {"speeds": {**content["speeds"], "byte": "fast"}}),
        lambda content: json.dumps(content | {"speeds": {"byte": 1.0}}),
    ],
    ids=["cut short", "no object", "foreign", "negative", "no number", "missing"],
)
def test_a_spoilt_file_is_measured_anew(measurements: list[Speeds], tmp_path: Path, spoil: Any) -> None:
    calibration.measured(folder=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(spoil(json.loads(path.read_text())))
    assert calibration.measured(folder=tmp_path).call == 200
    assert calibration.measured(folder=tmp_path).call == 200


def test_a_busy_machine_is_not_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(calibration.VARIABLE)
    found = [TYPICAL, replace(TYPICAL, byte=2 * TYPICAL.byte, call=TYPICAL.call / 2)]
    monkeypatch.setattr(calibration, "measure", lambda *_, **__: found.pop(0))
    speeds = calibration.measured(folder=tmp_path)
    assert (speeds.byte, speeds.call) == (TYPICAL.byte, TYPICAL.call / 2)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_done_without(measurements: list[Speeds], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert calibration.measured(folder=tmp_path / "file" / "inside").call == 100


def test_switched_off_and_where_nothing_can_be_measured(
    measurements: list[Speeds], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert calibration.measured("meta", folder=tmp_path) == TYPICAL
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert calibration.measured(folder=tmp_path) == TYPICAL
    monkeypatch.setenv(calibration.VARIABLE, "typical")
    assert calibration.measured(folder=tmp_path) == TYPICAL
    monkeypatch.setenv(calibration.VARIABLE, "fast")
    with pytest.raises(ValueError, match='must be "typical" or "measured"'):
        calibration.measured(folder=tmp_path)
    assert len(measurements) == 8
    assert list(tmp_path.iterdir()) == []


def test_files_are_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration.cache_folder() == tmp_path / "resnet_func"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert calibration.cache_folder() == Path.home() / ".cache" / "resnet_func"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_measurement_is_of_times(dtype: torch.dtype) -> None:
    state = torch.random.get_rng_state()
    speeds = calibration.measure(CPU, dtype, seconds=0.0)
    assert speeds.source == "measured"
    assert calibration.from_numbers(json.loads(json.dumps(speeds.as_numbers())), "measured") == speeds
    assert torch.equal(torch.random.get_rng_state(), state)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.tuples(*[st.floats(1.0, 10.0)] * 4))
def test_two_rates_explain_two_calls(flop: float, byte: float, sizes: tuple[float, ...]) -> None:
    """Where each call is mostly of its kind; noise of the calls leaves both above 0 and below all."""
    a, b = (sizes[0] * 100 / flop, sizes[1] / byte), (sizes[2] / flop, sizes[3] * 100 / byte)
    times = [f * flop + m * byte for f, m in (a, b)]
    got = calibration._two_rates((times[0], *a), (times[1], *b))
    assert got == pytest.approx((flop, byte), rel=1e-9)
    noisy = calibration._two_rates((times[0], *a), (1e3 * times[1], *b))
    assert 0 < noisy[0] <= times[0] / a[0]
    assert 0 < noisy[1] <= 1e3 * times[1] / b[1]


def test_speeds_that_are_no_times_are_refused() -> None:
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="byte must be a time"):
            replace(TYPICAL, byte=wrong)


# --- what chooses by them ---


def test_plans_follow_the_speeds() -> None:
    model, shape = rf.resnet20(norm="group"), (64, 3, 32, 32)
    layer = "layer3.2.conv2.weight"
    assert rf.per_sample.plan(model, shape, "norms").ways[layer] == "ghost"
    slow = replace(TYPICAL, matmul_flop=1.0)
    assert rf.per_sample.plan(model, shape, "norms", speeds=slow).ways[layer] == "materialize"
    plan = rf.per_sample.plan(model, shape, "clipped_sum", speeds=slow)
    assert plan.speeds == slow
    assert all(entry.cost == min(entry.costs.values()) for entry in plan.entries if entry.way == "keep")


def test_a_transform_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = rf.resnet20(norm="group", depths=(1, 1, 1))
    params, state = model.init(torch.Generator().manual_seed(0))
    x, y = torch.ones(2, 3, 8, 8), torch.tensor([0, 1])
    asked = []
    choose = engine.plan_factors
    monkeypatch.setattr(
        engine, "plan_factors", lambda *a, speeds, **k: asked.append(speeds) or choose(*a, speeds=speeds, **k)
    )
    other = replace(TYPICAL, call=1.0)
    for speeds in (None, other):
        rf.per_sample.norms(model, rf.losses.cross_entropy, speeds=speeds)(params, state, x, y)
    assert asked == [TYPICAL, other]


def test_minimal_filtering_only_where_products_are_as_fast_as_convolutions() -> None:
    shape = (32, 256, 256, 8, 8)
    avx512 = replace(TYPICAL, conv_flop=TYPICAL.matmul_flop / 2.4)
    assert winograd.cheapest_tile(*shape) == 4
    assert winograd.cheapest_tile(*shape, avx512) is None
    assert winograd.product_pays(64, 64, 8, 8)
    assert not winograd.product_pays(64, 64, 8, 8, avx512)
    model = rf.resnet18(stem="cifar", num_classes=10)
    params, state = model.init(torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    slow = replace(avx512, conv_flop=1e-6)
    wrapped = rf.winograd.wrap(model, slow).apply(params, state, x, train=True)[0]
    assert torch.equal(wrapped, model.apply(params, state, x, train=True)[0])
