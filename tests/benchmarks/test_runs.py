"""Every benchmark at toy size: it runs, and leaves figures, environment and picture. No time is asserted."""

from __future__ import annotations

import json
import multiprocessing
import shlex
import threading
from collections.abc import Callable
from importlib import util
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.__main__ import main
from benchmarks.commands import allocator, throughput
from benchmarks.forms import ensemble_forms, networks, variants
from benchmarks.forms.ensemble_forms import Work
from benchmarks.forms.step import AGAIN, FORMATS, JAX, Setting, Spec, allowed_distances
from benchmarks.harness import conditions, measure
from benchmarks.harness.options import QUICK_BACKEND, toy
from resnet_func.app import runtime
from resnet_func.machine import has_bf16


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


def not_compiled(function: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    """In place of `torch.compile`, whose tracing takes a quarter of a minute."""
    assert how["backend"] == QUICK_BACKEND
    return function


@pytest.mark.parametrize(
    "compiler",
    [
        pytest.param(not_compiled, id="not-traced"),
        pytest.param(torch.compile, id="traced", marks=pytest.mark.nightly),
    ],
)
def test_throughput_of_training(compiler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", compiler)
    # one graph is traced; bf16 rows are there by themselves only where the hardware has it
    left_out = "JAX gradient 'module compiled' 'compiled, Winograd'"
    words = f"throughput --threads 1 --dtype fp32 --layout NCHW --no-memory --without {left_out}"
    result = toy_run(words, tmp_path)
    forms = (
        "module eager",
        "module eager again",
        "function eager",
        "function eager, Winograd",
        "function, step compiled",
    )
    check_figures(result["figures"], {f"{form}, NCHW, fp32" for form in forms})
    assert [best["other"] for best in result["best"]] == ["module eager, NCHW, fp32"]
    compiled = [name for name, of in result["figures"].items() if of["compile_seconds"]]
    assert compiled == ["function, step compiled, NCHW, fp32"]


@pytest.mark.nightly
def test_throughput_of_jax(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    words = "throughput --threads 1 --dtype fp32 --layout NCHW --no-memory --without compiled function"
    result = toy_run(words, tmp_path)
    assert result["figures"]["JAX jit, NCHW, fp32"]["compile_seconds"] > 0


def test_jax_takes_the_step_of_the_function() -> None:
    pytest.importorskip("jax")
    case = networks.make_case(networks.TOY, 4, 8)
    setting = Setting(train=True, ema=True, backend="none")
    outcomes = []
    for form in ("function eager", JAX):
        variant = variants.make_variant(Spec(form), case, setting)
        for _ in range(2):
            variant.step()
        outcomes.append(variant.outcome())
    ours, theirs = outcomes
    measure.check("JAX", theirs, ours, allowed_distances(case, train=True)("fp32"))


@pytest.mark.parametrize(("has_bf16", "dtypes"), [(False, {"fp32"}), (True, {"fp32", "bf16"})])
def test_bf16_is_measured_where_the_hardware_has_it(
    has_bf16: bool, dtypes: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "has_bf16", lambda device: has_bf16)
    options = throughput.Options(threads=1, device="cpu")
    specs = throughput.select(options, conditions.set_up("cpu", 1))
    assert {spec.dtype for spec in specs} == dtypes


def test_throughput_of_inference(tmp_path: Path) -> None:
    words = "throughput --threads 1 --task inference --dtype fp32 bf16 --no-memory --without compiled JAX"
    result = toy_run(words, tmp_path)
    forms = ("module eager", "function eager")
    specs = {Spec(form, layout, dtype) for form in forms for layout in FORMATS for dtype in ("fp32", "bf16")}
    specs |= {Spec("function eager, Winograd", layout) for layout in FORMATS}
    check_figures(result["figures"], {spec.name for spec in {*specs, AGAIN}})


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


@pytest.mark.parametrize("product", ["hessian", "ggn"])
def test_curvature(product: str, tmp_path: Path) -> None:
    words = f"curvature --threads 1 --product {product} --no-memory --without compiled JAX"
    names = {"ours, eager", "ours again, eager", "curvlinops, eager", "the gradient, eager"}
    if util.find_spec("curvlinops") is None:
        names.remove("curvlinops, eager")
    check_figures(toy_run(words, tmp_path)["figures"], names)


@pytest.mark.nightly
@pytest.mark.parametrize("product", ["hessian", "ggn"])
def test_curvature_of_jax(product: str, tmp_path: Path) -> None:
    pytest.importorskip("jax")
    words = f"curvature --threads 1 --product {product} --no-memory --without compiled curvlinops gradient"
    assert toy_run(words, tmp_path)["figures"]["JAX, jit"]["compile_seconds"] > 0


@pytest.mark.parametrize(
    "form", [form for form in ensemble_forms.FORMS if "compiled" not in form and "side" not in form]
)
def test_an_ensemble_computes_on_the_device_of_its_cases(form: str) -> None:
    with FakeTensorMode():  # refuses to mix devices, as a GPU would
        cases = tuple(networks.make_case(networks.TOY, 2, 8, "meta", seed=seed) for seed in (0, 2))
        variant = ensemble_forms.make_variant(Work(form, "channels_last", cases, threads=1, backend="none"))
        variant.step()
        assert {leaf.device.type for leaf in variant.outcome().values()} == {"meta"}


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


def start_thread(name: str, options: allocator.Options) -> tuple[Connection, Callable[[], None]]:
    """In place of the allocator's processes, which take seconds to start."""
    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=allocator.serve, args=(name, options, theirs), daemon=True)
    thread.start()

    def stop() -> None:
        ours.close()
        thread.join()

    return ours, stop


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(start_thread, id="in-process"),
        pytest.param(allocator.start_worker, id="processes", marks=pytest.mark.nightly),
    ],
)
def test_allocator(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "start_worker", start)
    result = toy_run("allocator --threads 1 --without ours tuned", tmp_path)
    check_figures(result["figures"], set(allocator.VARIANTS[:2]))
    assert set(result["page_faults"]) == set(allocator.VARIANTS[:2])


def test_the_step_of_train_computes_the_loss_of_the_stock_loop() -> None:
    case = networks.make_case("resnet8", 4, 8)
    stock, ours = allocator.make_stock_step(case), allocator.make_our_step(case, 1, None)
    excused = allowed_distances(case, train=True)("bf16" if has_bf16(case.x.device) else "fp32")
    for what in ("loss", "update", "update"):
        assert ours() == pytest.approx(stock(), rel=excused[what])


def test_a_variant_alone_is_the_one_that_is_timed() -> None:
    options = toy(throughput.Options(threads=1, device="cpu", quick=True))
    throughput.prepare_alone(options, Spec("function eager", "channels_last"))()


def test_a_wrong_variant_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = variants.TRAIN[AGAIN.form]

    def twice_as_fast(*arguments: Any) -> variants.Variant:
        with monkeypatch.context() as patch:
            patch.setattr(variants, "LR", 2 * variants.LR)
            return right(*arguments)

    monkeypatch.setitem(variants.TRAIN, AGAIN.form, twice_as_fast)
    words = "throughput --quick --threads 1 --no-write --no-memory --without compiled JAX function channels"
    assert main(words.split()) == 1
    assert "computes another update: relative distance 1" in capsys.readouterr().err.splitlines()[-1]


def test_a_worker_with_another_loss_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = iter([1.0, 1.1])

    def make_stock_step(case: networks.Case) -> Callable[[], float]:
        loss = next(losses)
        return lambda: loss

    monkeypatch.setattr(allocator, "make_stock_step", make_stock_step)
    monkeypatch.setattr(allocator, "start_worker", start_thread)
    assert main(["allocator", "--quick", "--threads", "1", "--no-write", "--without", "ours", "tuned"]) == 1
    assert "computes another loss, 1.1, than" in capsys.readouterr().err


def test_private_steps(tmp_path: Path) -> None:
    result = toy_run("private --threads 1 --views 2 --no-memory", tmp_path)
    names = {
        "plain",
        "plain again",
        "plain, views",
        "private",
        "private, in halves",
        "private, adaptive",
        "private, views",
    }
    check_figures(result["figures"], names)
