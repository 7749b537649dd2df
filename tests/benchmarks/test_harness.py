"""The frame of the benchmarks, with exact numbers: order, stopping, ratios, checks, names, figures."""

from __future__ import annotations

import json
import mmap
import os
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.__main__ import COMMANDS, main, parse
from benchmarks.commands import everything, throughput
from benchmarks.forms import networks, step, variants
from benchmarks.harness import measure, memory, pictures, report, statistics
from benchmarks.harness.measure import Disagreement, Skipped, Variant
from benchmarks.harness.statistics import Rule
from parity import environment
from resnet_func.models import winograd

# --------------------------------------------------------------------------- statistics


def test_turns_reverse_every_round() -> None:
    order: list[str] = []

    def turn(name: str) -> float:
        order.append(name)
        return float(len(order))

    seconds = statistics.interleave(["A", "B"], 4, turn)
    assert "".join(order) == "ABBAABBA"
    assert seconds == {"A": [1.0, 4.0, 5.0, 8.0], "B": [2.0, 3.0, 6.0, 7.0]}


def test_it_stops_after_an_even_round_only() -> None:
    asked: list[int] = []

    def enough(seconds: statistics.Seconds) -> bool:
        asked.append(len(seconds["A"]))
        return len(seconds["A"]) >= 3

    seconds = statistics.interleave(["A"], 9, lambda name: 1.0, enough)
    assert asked == [2, 4]
    assert len(seconds["A"]) == 4


def ticking(*times: float) -> Callable[[], float]:
    clock = iter(times)
    return lambda: next(clock)


def test_a_rule_stops_when_every_ratio_is_steady() -> None:
    enough = statistics.until_steady(Rule(least=4, spread=0.10, seconds=99), "A", ticking(0, 1, 2))
    noisy_but_together = [1.0, 2.0, 1.0, 3.0]
    assert not enough({"A": [1.0] * 2, "B": [1.0] * 2}), "too few rounds"
    assert enough({"A": noisy_but_together, "B": noisy_but_together}), "the ratio is what must be steady"
    # ratios 1, 1, 1.2, 1.2: the quartiles are 1 and 1.2, the median 1.1
    assert not enough({"A": [1.0] * 4, "B": [1.0, 1.0, 1.2, 1.2]})


def test_a_rule_stops_when_its_time_is_over() -> None:
    unsteady = {"A": [1.0] * 4, "B": [1.0, 1.0, 2.0, 2.0]}
    enough = statistics.until_steady(Rule(least=4, seconds=10), "A", ticking(100, 109.9, 110))
    assert [enough(unsteady), enough(unsteady)] == [False, True]


def test_the_spread_is_the_interquartile_range_of_the_ratios() -> None:
    assert statistics.spread([1.0, 4.0, 3.0, 8.0, 5.0], [1.0, 2.0, 1.0, 2.0, 1.0]) == pytest.approx(2 / 3)


def test_the_ratio_is_the_median_round_by_round() -> None:
    # 2, 2, 2: a machine that slows down changes no ratio
    assert statistics.ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == (2.0, 2.0, 2.0)
    median, low, high = statistics.ratio([1.0, 2.0, 9.0], [1.0, 1.0, 1.0])
    assert (median, low, high) == (2.0, 1.0, 9.0)  # each end is the median in 7 of 27 resamples


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    draws = np.random.default_rng(1).normal(1.0, 0.1, (200, 20))
    ratios = [statistics.ratio(list(row), [1.0] * 20, resamples=400) for row in draws]
    assert 0.88 < np.mean([low <= 1.0 <= high for _, low, high in ratios]) <= 1.0


def test_no_rounds_or_other_rounds_have_no_ratio() -> None:
    with pytest.raises(ValueError, match="as many rounds as of the baseline, 2; got 1"):
        statistics.ratio([1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="got 0"):
        statistics.spread([], [])


# --------------------------------------------------------------------------- checks and timing


def constant(value: float, dtype: str = "fp32") -> Callable[[], Variant]:
    return lambda: Variant(lambda: None, lambda: {"loss": torch.tensor([value])}, dtype)


def allowed(dtype: str) -> dict[str, float]:
    return {"loss": {"fp32": 1e-3, "bf16": 0.1}[dtype]}


def unavailable() -> Variant:
    raise Skipped("there is no compiler")


def test_variants_are_ready_in_their_order_and_the_skipped_say_why() -> None:
    makers = {"other": constant(1.0005), "base": constant(1.0), "lost": unavailable}
    ready = measure.prepare(makers, "base", allowed)
    assert list(ready.steps) == ["other", "base"]
    assert set(ready.first_call) == {"other", "base"}
    assert ready.skipped == {"lost": "there is no compiler"}


@pytest.mark.parametrize("value", [1.01, float("nan"), -1.0])
def test_what_computes_something_else_is_not_timed(value: float) -> None:
    with pytest.raises(Disagreement, match="other computes another loss: .* nothing is timed"):
        measure.prepare({"base": constant(1.0), "other": constant(value)}, "base", allowed)


def test_each_variant_is_timed_in_every_round() -> None:
    calls = {"A": 0, "B": 0}

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            calls[name] += 1

        return run

    steps = {name: step(name) for name in calls}
    seconds = measure.time_steps(steps, "A", Rule(least=2, most=4, spread=0), threads=1, turn_seconds=0)
    assert {name: len(times) for name, times in seconds.items()} == {"A": 4, "B": 4}
    # one at first, then in each of 4 rounds one to warm up and one that counts
    assert calls == {"A": 9, "B": 9}


def test_compilation_is_what_the_first_call_took_longer() -> None:
    seconds = {"eager": [1.0], "step compiled": [0.5, 0.25], "JAX jit": [1.0]}
    first = {"eager": 3.0, "step compiled": 9.0, "JAX jit": 2.0}
    assert measure.compile_seconds(first, seconds) == {"step compiled": 8.75, "JAX jit": 1.0}


TAKEN = 2**26


def prepare_allocation() -> Callable[[], None]:
    """A step that takes memory from the kernel, past any allocator, and gives it back."""

    def step() -> None:
        with mmap.mmap(-1, TAKEN) as pages:
            for start in range(0, TAKEN, mmap.PAGESIZE):
                pages[start] = 1

    return step


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize(
    "look",
    [
        pytest.param(memory.peak_bytes_here, id="in-process"),
        pytest.param(memory.peak_bytes, id="fresh-process", marks=pytest.mark.nightly),
    ],
)
def test_peak_memory_is_what_a_step_takes(look: Callable[..., int | None]) -> None:
    peak = look(prepare_allocation)
    assert peak is not None
    # Linux adds up each CPU's count in batches of so many pages; some, since Python takes memory too
    batch = max(32, 2 * (os.cpu_count() or 1)) * mmap.PAGESIZE
    assert peak == pytest.approx(TAKEN, abs=8 * batch)


# --------------------------------------------------------------------------- the machine


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("AMD EPYC zen3 2c", "epyc-zen3-2c"),
        ("AMD EPYC 7B13 64-Core Processor zen3 4c", "epyc-7b13-zen3-4c"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz AVX512 8c", "xeon-avx512-8c"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
    ],
)
def test_a_short_name_has_no_trademarks(name: str, short: str) -> None:
    assert environment.slug(name) == short


@pytest.mark.parametrize(
    ("family", "model", "generation"),
    [
        ("23", "49", "zen2"),
        ("25", "1", "zen3"),
        ("25", "17", "zen4"),
        ("25", "33", "zen3"),
        ("26", "2", "zen5"),
    ],
)
def test_amd_generations(family: str, model: str, generation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"vendor_id": "AuthenticAMD", "cpu family": family, "model": model}
    monkeypatch.setattr(environment, "cpuinfo", lambda field: fields[field])
    assert environment.microarchitecture() == generation


def test_the_environment_names_no_host() -> None:
    text = json.dumps(environment.capture()) + environment.machine()
    assert platform.node() not in text
    assert {"cpu", "cpu_flags", "threads", "torch", "commit", "load_before"} <= set(environment.capture())


# --------------------------------------------------------------------------- figures


def test_figures_of_a_variant() -> None:
    seconds = {"base": [1.0, 1.0, 1.0], "half": [0.5, 0.5, 0.5]}
    base, half = report.rows(seconds, "base", images=10, flops=2e12, compile_seconds={"half": 7.0})
    assert base == report.Row("base", statistics.Ratio(1, 1, 1), 1.0, 10.0, 2.0, None, None)
    assert half == report.Row("half", statistics.Ratio(0.5, 0.5, 0.5), 0.5, 20.0, 4.0, 7.0, None)


def test_flops_are_the_models() -> None:
    case = networks.make_case("resnet20", 1, 32)
    macs = 40_551_040  # He et al.'s network: 0.041 G
    assert networks.flops_per_image(case, train=False) == 2 * macs
    assert networks.flops_per_image(case, train=True) == 6 * macs


def test_a_result_file_does_not_say_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    report.write(path, {"options": {"model": "resnet20", "results": tmp_path, "write": True}})
    assert json.loads(path.read_text()) == {"options": {"model": "resnet20"}}


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet18", "wrn_16_4"])
def test_the_module_is_the_function(name: str) -> None:
    case = networks.make_case(name, 2, 16)
    logits, _ = case.model.apply(case.params, case.state, case.x, train=True)
    assert torch.equal(networks.make_module(case).train()(case.x), logits)


def test_rows_of_a_run() -> None:
    every = variants.specs(
        train=True,
        layouts=("NCHW", "channels_last"),
        dtypes=("fp32", "bf16"),
        device="cuda",
        without=("module compiled",),
    )
    assert every[:2] == [variants.BASELINE, variants.AGAIN]
    names = [spec.name for spec in every]
    assert len(names) == len(set(names)) == 1 + 2 * 2 * 5 + 2  # again; five forms; JAX in fp32 alone
    on_cpu = variants.specs(train=True, layouts=("NCHW",), dtypes=("fp32",), device="cpu", without=())
    assert not [spec for spec in on_cpu if "CUDA" in spec.form]


# --------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("line", [*everything.FULL, *everything.QUICK])
def test_every_command_of_all_is_understood(line: str) -> None:
    name = line.split()[0]
    assert name in COMMANDS
    threads = [] if name == "processes" else ["--threads", "1"]  # it decides them itself
    module, options = parse([*line.split(), *threads, "--no-write"])
    assert isinstance(options, module.Options)
    assert not options.write


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("throughput --model resnet9", "no network is called 'resnet9'"),
        ("throughput --task sleeping", "--task must be of training, inference; got sleeping"),
        ("throughput --dtype fp8", "--dtype must be of auto, fp32, bf16; got fp8"),
        ("throughput --layout", "--layout must be of NCHW, channels_last; got nothing"),
        ("throughput --without nothing-like-it", "is in no variant's name"),
        ("throughput --batch 0", "batch and size must be 1 or more"),
        ("throughput --device tpu", "device must be"),
        ("throughput --threads 0", "threads must be at least 1"),
        ("allocator --model resnet9", "no network is called 'resnet9'"),
        ("allocator --without nothing-like-it", "no variant has nothing-like-it"),
        ("ensembles --members 0", "--members must be numbers of 1 or more"),
        ("ensembles --without nothing-like-it", "no form has nothing-like-it"),
        ("scaling --forms sleeping", "--forms must be of"),
        ("scaling --batches 0", "--batches must be numbers of 1 or more"),
    ],
)
def test_wrong_options_are_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("words", ["", "sleeping", "throughput --rounds 3"])
def test_usage(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("speed", "text"), [(0.0421, "0.042"), (4.24, "4.2"), (9.96, "10"), (10.4, "10"), (1234.5, "1,234")]
)
def test_a_slow_rate_keeps_its_digits(speed: float, text: str) -> None:
    assert report.rate(speed) == text


def test_a_precision_excuses_its_own_rounding() -> None:
    makers = {"base": constant(1.0), "narrow": constant(1.05, "bf16")}
    assert list(measure.prepare(makers, "base", allowed).steps) == ["base", "narrow"]


@pytest.mark.parametrize("train", [True, False])
def test_what_rounding_excuses_is_measured_on_the_network(train: bool) -> None:
    case = networks.make_case(networks.TOY, 4, 8)
    excused = step.allowed_distances(case, train=train)
    narrow, single = excused("bf16"), excused("fp32")
    assert set(single) == ({"loss", "update"} if train else {"logits"})
    for name, distance in single.items():
        assert torch.finfo(torch.float32).eps < distance < narrow[name] < 1


@pytest.mark.parametrize("task", ["training", "inference"])
def test_the_winograd_forms_take_convolutions(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(winograd, "cheapest_tile", lambda *shape: asked.append(shape))
    case = networks.make_case(networks.TOY, 2, 8, torch.device("cpu"))
    setting = variants.Setting(task == "training", ema=False, backend="none")
    variants.make_variant(variants.Spec("function eager"), case, setting).step()
    assert not asked
    variants.make_variant(variants.Spec("function eager, Winograd"), case, setting).step()
    assert asked


def test_the_fastest_function_is_held_against_the_fastest_of_the_others() -> None:
    seconds = {
        "module eager, NCHW, fp32": [4.0, 4.0],
        "module eager again, NCHW, fp32": [1.0, 1.0],  # only noise
        "module compiled, channels_last, fp32": [2.0, 2.0],
        "function eager, NCHW, fp32": [3.0, 3.0],
        "function, step compiled, NCHW, fp32": [1.5, 1.0],
        "JAX jit, NCHW, fp32": [5.0, 5.0],
        "module eager, NCHW, bf16": [0.1, 0.1],
    }
    module, jax = throughput.against_the_function(seconds)
    assert module["function"] == "function, step compiled, NCHW, fp32"
    assert (module["other"], module["ratio"].median) == ("module compiled, channels_last, fp32", 0.625)
    assert (jax["other"], jax["ratio"].median) == ("JAX jit, NCHW, fp32", 0.25)


def test_growth_in_proportion_starts_from_what_was_measured_there():
    """A series that begins later says nothing of where the others begin."""
    from matplotlib.figure import Figure

    series = (("a", [1, 2], [3.0, 5.0]), ("b", [2], [7.0]))
    lines = [pictures.Line(name, x, y, y, y) for name, x, y in series]
    axes = Figure().subplots()
    pictures._draw_panel(axes, pictures.Panel("", "", lines, ideal=True), {"a": "red", "b": "blue"})
    (ideal,) = [line for line in axes.get_lines() if line.get_label() == "in proportion"]
    assert np.asarray(ideal.get_ydata()).tolist() == [3.0, 6.0]
