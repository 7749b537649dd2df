"""The benchmark of minimal filtering at toy size: its choices are those of `winograd.wrap`."""

from __future__ import annotations

import doctest
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.commands import winograd as benchmark
from benchmarks.forms import networks
from resnet_func import calibration
from resnet_func.app import runtime
from resnet_func.models import winograd


@pytest.fixture(autouse=True)
def _untouched_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runtime.ALLOCATOR_VARIABLE, "stock")


def test_every_kind_of_convolution_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["winograd", "--quick", "--threads", "1", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("winograd-resnet8-n4-8px-*.json")
    rows = json.loads(path.read_text())["layers"]
    assert [row["times"] for row in rows] == [1, 2, 1, 1]  # those of stride 2 have no other way
    assert all(row[way] > 0 for row in rows for way in benchmark.WAYS[:3])
    assert "where minimal filtering is chosen: by the machine's speeds" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [1.0, 0.2, 5.0])
def test_choices_are_those_of_wrap(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    typical = calibration.TYPICAL
    speeds = replace(typical, matmul_flop=typical.matmul_flop * factor)
    case = networks.make_case("resnet50", 2, 16)
    done: list[tuple[tuple[int, ...], tuple[int, ...], str]] = []

    def record(what: Any) -> None:
        def recorded(x: torch.Tensor, weight: torch.Tensor, how: Any) -> torch.Tensor:
            name = f"tile {how}" if isinstance(how, int) else "product"
            done.append((tuple(x.shape), tuple(weight.shape), name))
            return what(x, weight, how)

        monkeypatch.setattr(winograd, what.__name__, recorded)

    with benchmark._Shapes() as shapes, torch.no_grad():
        case.model.apply(case.params, case.state, case.x, train=False)
    record(winograd.as_product)
    record(winograd.conv2d)
    with torch.no_grad():
        winograd.wrap(case.model, speeds).apply(case.params, case.state, case.x, train=True)
    chosen = []
    for (image, filters, stride), times in shapes.found.items():
        way = benchmark.choose({"image": image, "filters": filters, "stride": stride}, speeds)
        chosen += [(image, filters, way)] * times if way != benchmark.DEFINITION else []
    assert sorted(chosen) == sorted(done)
    assert bool(done) == (factor < 5)


def test_the_ways_agree() -> None:
    for filters, stride in (((4, 3, 3, 3), 1), ((4, 3, 1, 1), 2)):
        steps = benchmark.make_steps((2, 3, 5, 6), filters, stride)
        (expected, *others) = [step() for step in steps.values()]
        for found in others:
            for one, other in zip(expected, found, strict=True):
                torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


def test_an_unknown_network_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["winograd", "--model", "nonsense"]) == 2
    assert "no network is called" in capsys.readouterr().err


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(benchmark, raise_on_error=True).attempted
