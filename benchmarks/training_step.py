"""The step of `resnet-func train` against the loop everybody writes first.

    uv run python -m benchmarks.training_step

The stock loop is a torchvision-style module, eager, NCHW, float32, `torch.optim.SGD`, under the C library's
own allocator. An allocator belongs to a process, so every variant has a process of its own; they take
turns, a few steps each, in an order that reverses every round (ABBA), and only one computes at a time. All
start from the same parameters on the same batch; the first losses must agree before anything is timed.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torchvision
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import resnet_func as rf
from benchmarks import environment
from benchmarks.statistics import interleave, ratio
from parity.reference import CifarResNet
from resnet_func import optim, runtime
from resnet_func.losses import cross_entropy
from resnet_func.train import arrange, autocast, init_train_state, make_train_step

RESULTS = Path(__file__).parent / "results"
BASELINE = "stock"
VARIANTS = {
    BASELINE: "module, eager, NCHW, fp32, stock allocator",
    "stock again": "the same once more: the noise floor",
    "tuned allocator": "module, eager, NCHW, fp32, tuned allocator",
    "ours": "the step of `resnet-func train`, eager",
    "ours compiled": "the step of `resnet-func train --compile on`",
}
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4


@dataclass(frozen=True)
class Options:
    """Measure a training step of `resnet-func train` against the stock loop."""

    model: str = "resnet20"
    """resnet20 or resnet18, both with the CIFAR stem and 10 classes."""
    batch: int = 128
    """Images a step."""
    size: int = 32
    """Side of the images in pixels."""
    rounds: int = 12
    """Turns of every variant."""
    steps: int = 3
    """Steps in a turn."""
    write: bool = True
    """Whether to write results/training-step-MODEL.json."""


def main() -> None:
    """Measure, print the table, write the result file."""
    options = tyro.cli(Options)
    machine = environment.capture()
    seconds = measure(options)
    rows = {name: ratio(times, seconds[BASELINE])._asdict() for name, times in seconds.items()}
    result = {"options": vars(options), "environment": machine, "seconds_per_step": seconds, "ratios": rows}
    Console().print(as_table(options, seconds))
    if options.write:
        path = RESULTS / f"training-step-{options.model}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def measure(options: Options) -> dict[str, list[float]]:
    """Seconds a step of every variant in every round."""
    context = multiprocessing.get_context("spawn")
    workers, first = {}, None
    for name in VARIANTS:
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(name, options, theirs), daemon=True).start()
        workers[name] = ours
        loss = ours.recv()  # one after the other: nobody starts while another warms up
        first = loss if first is None else first
        if abs(loss - first) > 0.02 * abs(first):
            sys.exit(f"{name} computes another loss, {loss}, than {BASELINE}, {first}: nothing is comparable")

    def turn(name: str) -> float:
        workers[name].send(options.steps)
        return workers[name].recv()

    return interleave(list(VARIANTS), options.rounds, turn)


def serve(name: str, options: Options, pipe: Connection) -> None:
    """A variant's process: send the first loss, then the seconds a step for every number of steps asked."""
    step = make_stock_step(name, options) if name in (BASELINE, "stock again", "tuned allocator") else None
    step = step or make_our_step(options, compile=name == "ours compiled")
    pipe.send(step())
    for _ in range(3):
        step()
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    while True:
        pipe.send(timer.timeit(pipe.recv()).mean)


def make_batch(options: Options) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(options.batch, 3, options.size, options.size, generator=generator)
    return x, torch.randint(10, (options.batch,), generator=generator)


def make_model(options: Options) -> tuple[rf.Model, Any, Any]:
    model = rf.zoo.by_name(options.model, stem="cifar", num_classes=10)
    return model, *model.init(torch.Generator().manual_seed(0))


def make_module(options: Options) -> nn.Module:
    """A plain module with the functional network's parameters."""
    if options.model == "resnet20":
        module: nn.Module = CifarResNet(3, "A")
    else:
        resnet = getattr(torchvision.models, options.model)(num_classes=10)
        resnet.conv1, resnet.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        module = resnet
    module.load_state_dict(rf.to_state_dict(*make_model(options)))
    return module.train()


def make_stock_step(name: str, options: Options) -> Callable[[], float]:
    if name == "tuned allocator":
        runtime.tune_allocator()
    module, (x, y) = make_module(options), make_batch(options)
    optimizer = torch.optim.SGD(
        module.parameters(), LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    criterion = nn.CrossEntropyLoss()

    def step() -> float:
        optimizer.zero_grad()
        loss = criterion(module(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def make_our_step(options: Options, *, compile: bool) -> Callable[[], float]:
    machine = runtime.configure(compile="on" if compile else "off", device="cpu")
    (model, params, state), (x, y) = make_model(options), make_batch(options)
    if machine.precision == "bf16":
        model = autocast(model, "cpu", torch.bfloat16)
    optimizer = optim.sgd(LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
    train_step = make_train_step(model, cross_entropy, optimizer)
    train_step = torch.compile(train_step, fullgraph=True, dynamic=False) if compile else train_step
    train_state = init_train_state(arrange(params, machine.memory_format), state, optimizer)
    x = x.contiguous(memory_format=machine.memory_format)

    def step() -> float:
        nonlocal train_state
        train_state, metrics = train_step(train_state, x, y)
        return float(metrics["loss"])

    return step


def as_table(options: Options, seconds: dict[str, list[float]]) -> Table:
    """Ratios to the stock loop; the images a second are of the median step."""
    title = f"{options.model}, batch {options.batch}, {options.size} px, {options.rounds} rounds"
    table = Table("variant", "what", title=title)
    for column in ("time / stock", "95 % interval", "images/s"):
        table.add_column(column, justify="right")
    for name, what in VARIANTS.items():
        r = ratio(seconds[name], seconds[BASELINE])
        median = sorted(seconds[name])[len(seconds[name]) // 2]
        interval = f"{r.low:.3f}-{r.high:.3f}"
        table.add_row(name, what, f"{r.median:.3f}", interval, f"{options.batch / median:,.0f}")
    return table


if __name__ == "__main__":
    main()
