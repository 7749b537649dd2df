"""Every benchmark at toy size: it runs, and leaves figures, environment and picture. No time is asserted."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.commands import allocator, throughput
from benchmarks.forms import networks, variants
from benchmarks.forms.variants import Spec
from resnet_func.app import runtime


@pytest.fixture(autouse=True)
def _untouched_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runtime.ALLOCATOR_VARIABLE, "stock")


def toy_run(words: str, folder: Path) -> dict[str, Any]:
    """The result file of a run that succeeds and draws its picture."""
    assert main([*shlex.split(words), "--quick", "--results", str(folder)]) == 0
    (path,) = folder.glob("*.json")
    assert path.name.startswith(words.split()[0])
    assert path.with_suffix(".png").stat().st_size > 10_000
    result = json.loads(path.read_text())
    assert result["environment"]["torch"]
    assert result["environment"]["threads"] == 1
    return result


def check_figures(figures: dict[str, Any], names: set[str]) -> None:
    assert set(figures) == names
    for of in figures.values():
        assert 0 < of["ratio"]["low"] <= of["ratio"]["median"] <= of["ratio"]["high"]
        assert of["images_per_second"] > 0


def test_throughput_of_training(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    # one graph is traced, JAX compiles one network of three blocks
    left_out = "gradient 'module compiled' 'compiled, Winograd'"
    words = "throughput --threads 1 --layout NCHW --dtype fp32 --no-memory --without"
    result = toy_run(f"{words} {left_out}", tmp_path)
    forms = (
        "module eager",
        "module eager again",
        "function eager",
        "function eager, Winograd",
        "function, step compiled",
        "JAX jit",
    )
    check_figures(result["figures"], {f"{form}, NCHW, fp32" for form in forms})
    assert [best["other"] for best in result["best"]] == ["module eager, NCHW, fp32", "JAX jit, NCHW, fp32"]
    compiled = [name for name, of in result["figures"].items() if of["compile_seconds"]]
    assert compiled == ["function, step compiled, NCHW, fp32", "JAX jit, NCHW, fp32"]


def test_throughput_of_inference(tmp_path: Path) -> None:
    words = "throughput --threads 1 --task inference --dtype fp32 bf16 --no-memory --without compiled JAX"
    result = toy_run(words, tmp_path)
    forms = ("module eager", "function eager")
    specs = {
        Spec(form, layout, dtype)
        for form in forms
        for layout in variants.FORMATS
        for dtype in ("fp32", "bf16")
    }
    specs |= {Spec("function eager, Winograd", layout) for layout in variants.FORMATS}
    check_figures(result["figures"], {spec.name for spec in {*specs, variants.AGAIN}})


def test_ensembles(tmp_path: Path) -> None:
    result = toy_run("ensembles --threads 1 --layout NCHW --no-memory --without compiled", tmp_path)
    names = (
        "one after another",
        "one after another again",
        "side by side",
        "vmap",
        "vmap in pairs",
        "vmap of matrix products",
    )
    check_figures(result["figures"], {f"{name}, eager, NCHW" for name in names})


def test_scaling(tmp_path: Path) -> None:
    figures = toy_run("scaling", tmp_path)["figures"]
    assert {axis: set(points) for axis, points in figures.items()} == {
        "by_batch": {"2", "4"},
        "by_threads": {"1"},
    }
    names = {
        "module eager, NCHW, fp32",
        "module eager, channels_last, fp32",
        "function eager, channels_last, fp32",
    }
    for points in figures.values():
        for of in points.values():
            check_figures(of, names)


def test_allocator(tmp_path: Path) -> None:
    # two processes: each takes seconds to start
    result = toy_run("allocator --threads 1 --without ours tuned", tmp_path)
    check_figures(result["figures"], set(allocator.VARIANTS[:2]))
    assert set(result["page_faults"]) == set(allocator.VARIANTS[:2])


def test_the_step_of_train_computes_the_loss_of_the_stock_loop() -> None:
    case = networks.make_case("resnet8", 4, 8)
    stock, ours = allocator.make_stock_step(case), allocator.make_our_step(case, 1, None)
    for _ in range(3):
        assert ours() == pytest.approx(stock(), rel=allocator.LOSS_TOLERANCE)


def test_a_variant_alone_is_the_one_that_is_timed() -> None:
    options = throughput.toy(throughput.Options(threads=1, device="cpu", quick=True))
    throughput.prepare_alone(options, Spec("function eager", "channels_last"))()


def test_a_wrong_variant_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = variants.TRAIN[variants.AGAIN.form]

    def twice_as_fast(*arguments: Any) -> variants.Variant:
        with monkeypatch.context() as patch:
            patch.setattr(variants, "LR", 2 * variants.LR)
            return right(*arguments)

    monkeypatch.setitem(variants.TRAIN, variants.AGAIN.form, twice_as_fast)
    words = "throughput --quick --threads 1 --no-write --no-memory --without compiled JAX function channels"
    assert main(words.split()) == 1
    assert "computes another update: relative distance 1" in capsys.readouterr().err.splitlines()[-1]
