"""FLOPs and bytes by hand and by what a real step calls; no time is ever asserted."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.profiler import profile

import resnet_func as rf
from benchmarks.commands import roofline
from benchmarks.commands.roofline import Options
from benchmarks.forms import networks
from benchmarks.harness import operations, peaks
from benchmarks.harness.measure import Disagreement
from benchmarks.harness.operations import Operation
from benchmarks.harness.peaks import Peaks
from resnet_func.models import summary

CPU = torch.device("cpu")
TOY = Options(model="resnet20", batch=2, size=8, threads=1, device="cpu", quick=True)


@pytest.fixture
def tiny_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "GEMMS", {"cpu": ((16, 16, 16), (64, 8, 8))})
    monkeypatch.setattr(peaks, "CONVS", {"cpu": ((1, 4, 8),)})
    monkeypatch.setattr(peaks, "LARGE", 2**16)
    monkeypatch.setattr(peaks, "SMALL", 2**12)


# --------------------------------------------------------------------------- peaks


@pytest.mark.usefixtures("tiny_peaks")
def test_every_peak_is_measured() -> None:
    best = peaks.measure(CPU, quick=True)
    rates = [*best.gemm.values(), *best.conv.values(), best.memory, best.cache]
    assert set(best.gemm) == set(best.conv) == {"fp32", "bf16"}
    assert all(rate > 0 for rate in rates)


def test_a_candidate_that_would_take_far_too_long_is_not_even_made() -> None:
    def never() -> Any:
        raise AssertionError("this was to be passed over")

    assert peaks._best([(1, lambda: lambda: None), (10**15, never)], 0.001) > 0


def test_the_roof_is_the_lower_of_slope_and_peak() -> None:
    best = Peaks(gemm={"fp32": 80.0}, conv={"fp32": 100.0}, memory=10.0, cache=40.0)
    assert best.roof("fp32", 2.0) == 20.0
    assert best.roof("fp32", 10.0) == best.roof("fp32", 1e9) == 100.0


# --------------------------------------------------------------------------- FLOPs and bytes


def steps_of(module: nn.Module, *shape: int, casts: bool = False) -> list[tuple[str, Operation]]:
    """The operations of a module after a parameter that makes its input need a gradient."""
    model, params, state = rf.from_module(nn.Sequential(nn.PReLU(), module))
    model = rf.train.autocast(model, "cpu", torch.bfloat16) if casts else model
    return operations.operations(model, params, state, torch.zeros(shape), casts=casts)


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.forward = function


def option_a(x: Tensor) -> Tensor:
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))


@pytest.mark.parametrize(
    ("module", "shape", "function", "phase", "flops", "numbers"),
    [
        # 100 outputs of 18 products each; 50 inputs, 100 outputs, 72 weights and 4 biases
        (nn.Conv2d(2, 4, 3, padding=1), (1, 2, 5, 5), "conv2d", "forward", 3600, 226),
        (nn.Conv2d(2, 4, 3, padding=1), (1, 2, 5, 5), "conv2d", "input gradient", 3600, 226),
        (nn.Conv2d(2, 4, 3, padding=1), (1, 2, 5, 5), "conv2d", "weight gradient", 3600, 226),
        # every filter sees one of two channels: 36 weights
        (nn.Conv2d(2, 4, 3, padding=1, groups=2, bias=False), (1, 2, 5, 5), "conv2d", "forward", 1800, 186),
        # 16 outputs from 8 of the 32 inputs, 8 weights; the gradient of all 32 is written
        (nn.Conv2d(2, 4, 1, 2, bias=False), (1, 2, 4, 4), "conv2d", "forward", 64, 32),
        (nn.Conv2d(2, 4, 1, 2, bias=False), (1, 2, 4, 4), "conv2d", "weight gradient", 64, 32),
        (nn.Conv2d(2, 4, 1, 2, bias=False), (1, 2, 4, 4), "conv2d", "input gradient", 64, 56),
        (nn.Linear(5, 2), (3, 5), "linear", "forward", 60, 15 + 6 + 12),
        (nn.Linear(5, 2), (3, 4, 5), "linear", "weight gradient", 240, 60 + 24 + 12),
        (nn.ReLU(), (2, 3, 4, 4), "relu", "forward", 96, 192),
        (nn.ReLU(), (2, 3, 4, 4), "relu", "backward", 96, 288),
        (Function(lambda x: x.mean((2, 3))), (2, 3, 4, 4), "mean", "forward", 96, 102),
        (nn.BatchNorm2d(3), (2, 3, 4, 4), "batch_norm", "forward", 576, 192 + 6),
        (nn.GroupNorm(3, 3), (2, 3, 4, 4), "group_norm", "backward", 768, 288 + 9),
        # 8 of 32 entries; their gradient is written into all 32
        (Function(option_a), (1, 2, 4, 4), "pad", "forward", 8, 8 + 16),
        (Function(option_a), (1, 2, 4, 4), "pad", "backward", 8, 8 + 16),
        (Function(option_a), (1, 2, 4, 4), "getitem", "backward", 32, 8 + 32),
        # 2 heads, 3 queries and keys of 4 numbers: 9 products of 4 for each, and as many with the values
        (Function(lambda x: F.scaled_dot_product_attention(x, x, x)), (1, 2, 3, 4),
         "scaled_dot_product_attention", "forward", 4 * 2 * 9 * 4, 4 * 24),
    ],
)  # fmt: skip
def test_flops_and_bytes_by_hand(
    module: nn.Module, shape: Any, function: str, phase: str, flops: int, numbers: int
) -> None:
    steps = steps_of(module, *shape)
    (op,) = {op for _, op in steps if (op.function, op.phase) == (function, phase)}
    assert operations.flops_of(op) == flops
    assert operations.bytes_of(op) == 4 * numbers


def test_bytes_where_numbers_differ_in_width() -> None:
    conv = nn.Conv2d(3, 3, 1, bias=False)
    steps = steps_of(nn.Sequential(conv, nn.GroupNorm(3, 3), nn.MaxPool2d(3, 2, 1)), 2, 3, 4, 4, casts=True)
    found = {(path, op.function, op.phase): operations.bytes_of(op) for path, op in steps}
    # bf16 activations; the parameters of normalisation stay in fp32
    assert found["1.0", "conv2d", "forward"] == 2 * (96 + 96 + 9)
    assert found["1.0", "conv2d", "weight gradient"] == 2 * (96 + 96 + 9)
    assert found["1.0 cast", "to", "forward"] == found["1.0 cast", "to", "backward"] == 9 * (4 + 2)
    norm = next(op for path, op in steps if path == "1.1" and op.phase == "forward")
    assert [each.dtype for each in norm.weights] == [torch.float32] * 2
    pooled = next(op for _, op in steps if op.function == "max_pool2d")
    width = pooled.inputs[0].dtype.itemsize
    assert operations.bytes_of(pooled) == width * (96 + 24) + 8 * 24


def test_a_gradient_of_a_tensor_used_twice_is_added_up_and_nobody_needs_the_images() -> None:
    steps = steps_of(Function(lambda x: x + x.relu()), 1, 3, 2, 2)
    assert [(path, op.function, op.phase) for path, op in steps] == [
        ("0", "prelu", "forward"),
        ("0", "prelu", "backward"),
        ("0 branches", "add", "forward"),
        ("0 relu", "relu", "forward"),
        ("0 relu", "relu", "backward"),
        ("0 add", "add", "forward"),  # its own gradient is the cotangent as it is
    ]
    module = nn.Conv2d(3, 4, 1)
    model, params, state = rf.from_module(module)
    phases = [op.phase for _, op in operations.operations(model, params, state, torch.zeros(1, 3, 2, 2))]
    assert phases == ["forward", "weight gradient"]


def test_an_operation_runs_in_the_layout_and_the_dtype_of_the_step() -> None:
    model = rf.train.autocast(rf.resnet20(depths=(1, 1, 1)), "cpu", torch.bfloat16)
    params, state = model.init(torch.Generator().manual_seed(0))
    x = torch.zeros(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    ops = dict(operations.operations(model, params, state, x, casts=True))
    given = ops["layer1.0.conv2"].inputs[0]
    assert (given.dtype, given.stride) == (torch.bfloat16, (16 * 64, 1, 16 * 8, 16))
    assert [each.dtype for each in ops["layer1.0.conv2"].weights] == [torch.bfloat16]
    with torch.autocast("cpu", torch.bfloat16):
        (gradient,) = operations.make_call(ops["layer1.0.conv2"], CPU)()
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "stem", "size", "published"),
    [
        ("resnet18", "cifar", 32, 0.555e9),
        ("resnet20", "cifar", 32, 0.041e9),
        ("resnet50", "imagenet", 224, 4.09e9),
        ("resnet18", "imagenet", 224, 1.81e9),
        ("wrn_28_10", "cifar", 32, 5.24e9),
        ("wrn_16_4", "cifar", 32, None),
    ],
)
def test_flops_are_the_networks(name: str, stem: str, size: int, published: float | None) -> None:
    classes = 10 if stem == "cifar" else 1000
    model = rf.zoo.by_name(name, stem=stem, num_classes=classes)
    rows = summary.summarize(model, size)
    macs = summary.totals(rows).macs
    params, state = model.init(torch.Generator(), device="meta")
    images = torch.zeros(3, 3, size, size, device="meta")
    ops = [op for _, op in operations.operations(model, params, state, images)]
    flops = {kind: sum(operations.flops_of(op) for op in ops if op.kind == kind) for kind in operations.KINDS}
    assert flops["forward"] == flops["weight gradient"] == 3 * 2 * macs
    # nobody needs the gradient of the images
    assert flops["input gradient"] == 3 * 2 * (macs - next(row.macs for row in rows if row.path == "conv1"))
    assert published is None or macs == pytest.approx(published, rel=0.015)


# --------------------------------------------------------------------------- the operations of a step

CALLS = {
    "aten::convolution": "conv",
    "aten::native_batch_norm": "norm",
    "aten::native_group_norm": "norm",
    "aten::relu": "relu",
    "aten::relu_": "relu",
    "aten::add": "add",
    "aten::add_": "add",  # two gradients of one input, added up in place
    "aten::max_pool2d_with_indices": "max pool",
    "aten::mean": "average pool",
    "aten::convolution_backward": "conv backward",
    "aten::native_batch_norm_backward": "norm backward",
    "aten::native_group_norm_backward": "norm backward",
    "aten::threshold_backward": "relu backward",
    "aten::max_pool2d_with_indices_backward": "max pool backward",
}


def kernels(step: Any) -> Counter[Any]:
    """The kernels of `CALLS` that run, with the shape of their image."""
    with profile(record_shapes=True) as profiled:
        step()
    seen: Counter[Any] = Counter()
    for event in profiled.function_events or ():
        name = CALLS.get(event.name)
        images = [shape for shape in event.input_shapes if len(shape) == 4]
        if name and images:  # a backward kernel takes the cotangent first
            seen[name, tuple(images[1 if name.endswith("backward") else 0])] += 1
    return seen


def expected_kernels(case: networks.Case) -> Counter[Any]:
    """The operations by the names of `CALLS`; both gradients of a convolution are one call."""
    names = {"conv2d": "conv", "batch_norm": "norm", "relu": "relu", "add": "add", "max_pool2d": "max pool"}
    names |= {"mean": "average pool", "adaptive_avg_pool2d": "average pool"}
    found: Counter[Any] = Counter()
    for _, op in operations.operations(case.model, case.params, case.state, case.x):
        name = names.get(op.function)
        backward = {"forward": "", "input gradient": None}.get(op.phase, " backward")
        if name and backward is not None and f"{name}{backward}" in CALLS.values():
            found[f"{name}{backward}", op.inputs[0].shape] += 1
    return found


@pytest.mark.parametrize(
    ("name", "stem", "norm"),
    [
        ("resnet20", "cifar", "batch"),
        ("resnet20", "cifar", "none"),
        ("resnet18", "cifar", "batch"),
        ("resnet18", "imagenet", "batch"),
        ("resnet50", "imagenet", "batch"),
        ("wrn_16_4", "cifar", "batch"),
        ("torchvision:resnet18", "cifar", "batch"),
    ],
)
def test_the_operations_are_what_a_step_calls(name: str, stem: Any, norm: Any) -> None:
    size = 8 if stem == "cifar" and ":" not in name else 32
    options = dataclasses.replace(TOY, model=name, stem=stem, norm=norm, size=size)
    case, _ = roofline.prepare(options)
    assert kernels(roofline.make_step(case)) == expected_kernels(case)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["resnet20", "resnet18", "resnet50"])
def test_every_operation_can_be_called_alone(name: str, dtype: str) -> None:
    stem = "imagenet" if name == "resnet50" else "cifar"
    options = dataclasses.replace(
        TOY, model=name, stem=stem, dtype=dtype, size=32 if stem == "imagenet" else 4
    )
    case, _ = roofline.prepare(options)
    network = (case.model, case.params, case.state, case.x)
    ops = dict.fromkeys(op for _, op in operations.operations(*network, casts=dtype == "bf16"))
    for op in [op for op in ops if max(op.inputs[0].shape) <= 128]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            result = operations.make_call(op, CPU)()
        if op.phase == "input gradient":
            assert tuple(result[0].shape) == op.inputs[0].shape
        assert all(tensor.isfinite().all() for tensor in (result if isinstance(result, tuple) else (result,)))


# --------------------------------------------------------------------------- the whole


@pytest.mark.usefixtures("tiny_peaks")
def test_a_run_writes_its_file_and_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roofline.run(dataclasses.replace(TOY, results=tmp_path / "results"))
    (written,) = (tmp_path / "results").glob("roofline-resnet20-n2-8px-quick-*.json")
    assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    result = json.loads(written.read_text("utf-8"))
    assert set(result) == {"options", "date", "environment", "peaks", "step", "operations", "stages"}
    assert str(tmp_path) not in written.read_text("utf-8")
    step, rows = result["step"], result["operations"]
    assert list(result["stages"]) == ["stem", "layer1", "layer2", "layer3", "head"]
    parts = sum(row["count"] * row["seconds"] for row in rows)
    by_stage = sum(sum(times.values()) for times in result["stages"].values())
    assert step["parts_seconds"] == pytest.approx(parts) == pytest.approx(by_stage)
    assert step["rest_seconds"] == pytest.approx(step["seconds"] - parts)
    assert [row["share"] for row in rows] == sorted((row["share"] for row in rows), reverse=True)
    output = capsys.readouterr().out
    assert "the rest" in output
    assert "images/s" in output


def test_nothing_is_written_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = Peaks({"bf16": 1e11}, {"bf16": 2e11}, 1e10, 4e10)
    monkeypatch.setattr(peaks, "measure", lambda device, quick: best)
    roofline.run(
        dataclasses.replace(
            TOY, model="wrn_16_4", batch=1, size=4, norm="group", dtype="bf16", write=False, results=tmp_path
        )
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet19"}, "no network is called 'resnet19'"),
        ({"batch": 0}, "batch must be 1 or more; got 0"),
        ({"size": -1}, "size must be 1 or more; got -1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"batch": 1, "size": 4}, "more than 1 value per channel"),
        ({"model": "torchvision:resnet18", "stem": "imagenet"}, "stem and norm are of the zoo's networks"),
        ({"norm": "layer"}, "norm must be one of"),
    ],
)
def test_wrong_options_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roofline.run(dataclasses.replace(TOY, **changes))


def test_parts_that_exceed_the_step_fail_with_a_line() -> None:
    step = {"seconds": 1.0, "parts_seconds": 1.015, "rest_seconds": -0.015, "noise_seconds": 0.0}
    roofline.check_parts(step)
    roofline.check_parts({**step, "parts_seconds": 1.3, "rest_seconds": -0.3, "noise_seconds": 0.4})
    with pytest.raises(Disagreement, match="come to 176% of the step, whose own times differ by 2%"):
        roofline.check_parts({**step, "parts_seconds": 1.76, "rest_seconds": -0.76})
