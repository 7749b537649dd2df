"""What the allocator does to a training step, in the loop everybody writes first and in `resnet-func train`.

    uv run python -m benchmarks allocator --model resnet20 --batch 128

The stock loop is a plain module, eager, NCHW, float32, `torch.optim.SGD`. Ours is the step of
`resnet-func train` as it chooses by itself: channels_last, and bf16 where the hardware multiplies it. Each
runs under the C library's own allocator and under the tuned one (`runtime.tune_allocator`). An allocator
belongs to a process, so every variant has a process of its own; they take turns in an order that reverses
every round, and only one computes at a time. All start from the same parameters on the same batch; the first
losses must agree before anything is timed.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.benchmark import Timer

from benchmarks.forms import networks
from benchmarks.forms.networks import Case
from benchmarks.forms.step import LR, MOMENTUM, WEIGHT_DECAY, allowed_distances, make_optimizer
from benchmarks.harness import conditions, measure, memory, pictures, report
from benchmarks.harness.options import Threaded, check_without, toy
from benchmarks.harness.report import Row
from benchmarks.harness.statistics import interleave, until_steady
from parity import environment
from resnet_func.app import runtime
from resnet_func.app.parts import compute_by
from resnet_func.losses import cross_entropy
from resnet_func.train import init_train_state, make_train_step, to_memory_format

BASELINE = "stock loop, stock allocator"
AGAIN = "stock loop again, stock allocator"
VARIANTS = (
    BASELINE,
    AGAIN,
    "stock loop, tuned allocator",
    "ours eager, stock allocator",
    "ours eager, tuned allocator",
    "ours compiled, stock allocator",
    "ours compiled, tuned allocator",
)
COLOURS = {"stock allocator": pictures.ORANGE, "tuned allocator": pictures.BLUE}
WARM_UP = 2  # steps before each turn that `Timer.timeit` does not time


@dataclass(frozen=True)
class Options(Threaded):
    """Measure the stock loop and the step of `resnet-func train`, each under both allocators."""

    without: tuple[str, ...] = ()
    """Leave out the variants whose names contain one of these words, such as compiled."""
    seconds: float = 300.0
    """Time after which timing stops, if the interquartile ranges are not under 10 % before."""


class Turn(NamedTuple):
    """What a worker measured: seconds and page faults a step, and the most memory it ever held."""

    seconds: float
    faults: float
    peak_bytes: int


def run(options: Options) -> None:
    """Measure, print the table, write the result file and the picture.

    Raises:
        ValueError: options that cannot be.
        Disagreement: a variant computes another loss.
    """
    options = toy(options)
    names = select(options)
    case = networks.make_case(options.model, options.batch, options.size)
    machine = runtime.configure(device="cpu", threads=options.threads, compile="off")
    where = environment.capture() | {"tuned_allocator": machine.allocator, "precision": machine.precision}
    rule, turn_seconds = options.stopping_rule(options.seconds), 2 * options.turn_seconds
    allowed = allowed_distances(case, train=True)(machine.precision)["loss"]
    with workers(options, names, allowed) as (pipes, first_call):
        turns: dict[str, list[Turn]] = {name: [] for name in names}

        def turn(name: str) -> float:
            pipes[name].send(turn_seconds)
            turns[name].append(pipes[name].recv())
            return turns[name][-1].seconds

        seconds = interleave(names, rule.most, turn, until_steady(rule, BASELINE))
    rows = report.rows(
        seconds,
        BASELINE,
        images=options.batch,
        flops=options.batch * networks.flops_per_image(case, train=True),
        compile_seconds=measure.compile_seconds(first_call, seconds),
        peak_bytes={name: of[-1].peak_bytes for name, of in turns.items()},
    )
    publish(options, where, rows, turns)


def select(options: Options) -> list[str]:
    """The variants of these options.

    Raises:
        ValueError: a word of `without` is in no name, or another device than the CPU.
    """
    if options.device not in ("auto", "cpu"):
        raise ValueError(f"--device must be cpu, whose allocators are compared; got {options.device}")
    check_without(options.without, list(VARIANTS[2:]))
    return [*VARIANTS[:2], *(n for n in VARIANTS[2:] if not any(word in n for word in options.without))]


# --------------------------------------------------------------------------- the processes


@contextmanager
def workers(
    options: Options, names: list[str], allowed: float
) -> Iterator[tuple[dict[str, Connection], dict[str, float]]]:
    """A pipe to each variant's process, warmed up, and the seconds of its first step.

    `allowed` is the relative distance between losses that rounding excuses: ours may be in bf16.
    """
    pipes, stops, first_call, reference = {}, [], {}, None
    try:
        for name in names:
            pipes[name], stop = start_worker(name, options)
            stops.append(stop)
            loss, first_call[name] = pipes[name].recv()  # one by one: nobody starts while another warms up
            reference = loss if reference is None else reference
            if not abs(loss - reference) <= allowed * abs(reference):
                raise measure.Disagreement(
                    f"{name} computes another loss, {loss:.4g}, than {BASELINE}, {reference:.4g}; "
                    "nothing is timed"
                )
            measure.progress.print(f"{name}: first call {first_call[name]:.1f} s")
        yield pipes, first_call
    finally:
        for stop in stops:
            stop()


def start_worker(name: str, options: Options) -> tuple[Connection, Callable[[], None]]:
    """A fresh process that serves a variant: the pipe to it, and what ends it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(name, options, theirs), daemon=True)
    process.start()
    theirs.close()

    def stop() -> None:
        process.terminate()
        process.join()

    return ours, stop


def serve(name: str, options: Options, pipe: Connection) -> None:
    """Send loss and seconds of a variant's first step, then a `Turn` for every time asked, until hung up."""
    os.environ[runtime.ALLOCATOR_VARIABLE] = "tuned" if "tuned" in name else "stock"
    conditions.set_up("cpu", options.threads)  # the allocator first: nothing large is there yet
    case = networks.make_case(options.model, options.batch, options.size)
    compiles = "compiled" in name
    with conditions.empty_compiler_cache(options.backend, compiles=compiles):
        if name.startswith("stock"):
            step = make_stock_step(case)
        else:
            step = make_our_step(case, options.threads, options.backend if compiles else None)
        start = time.perf_counter()
        loss = step()
        pipe.send((loss, time.perf_counter() - start))
        timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
        one = timer.timeit(1).mean
        with suppress(EOFError):
            while True:
                pipe.send(take_turn(timer, max(1, round(pipe.recv() / one))))


def take_turn(timer: Timer, steps: int) -> Turn:
    """Seconds and page faults of that many steps."""
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seconds = timer.timeit(steps).mean
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return Turn(seconds, faults / (steps + WARM_UP), memory.status_bytes("VmHWM"))


def make_stock_step(case: Case) -> Callable[[], float]:
    """The loop everybody writes first."""
    module = networks.make_module(case).train()
    optimizer = torch.optim.SGD(
        module.parameters(), LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    criterion = nn.CrossEntropyLoss()

    def step() -> float:
        optimizer.zero_grad()
        loss = criterion(module(case.x), case.y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def make_our_step(case: Case, threads: int | None, backend: str | None) -> Callable[[], float]:
    """The step of `resnet-func train`, compiled if there is a back end to do it."""
    machine = runtime.configure(device="cpu", threads=threads, compile="on" if backend else "off")
    train_step = make_train_step(compute_by(machine, case.model), cross_entropy, make_optimizer())
    if backend:
        train_step = conditions.compiled(train_step, backend)
    train_state = init_train_state(
        to_memory_format(case.params, machine.memory_format), case.state, make_optimizer()
    )
    x = case.x.contiguous(memory_format=machine.memory_format)

    def step() -> float:
        nonlocal train_state
        train_state, metrics = train_step(train_state, x, case.y)
        return float(metrics["loss"])

    return step


# --------------------------------------------------------------------------- results


def publish(options: Options, where: dict[str, Any], rows: list[Row], turns: dict[str, list[Turn]]) -> None:
    """Table, result file and picture."""
    faults = {name: float(np.median([turn.faults for turn in of])) for name, of in turns.items()}
    texts = {name: f"{count:,.0f}" for name, count in faults.items()}
    title = (
        f"{options.model}, training step, batch {options.batch}, {options.size} px{options.toy_note}; "
        "peak memory of the whole process"
    )
    style = report.Bars(
        AGAIN,
        "time of a step / stock loop under the stock allocator (shorter is faster; 95 % intervals)",
        COLOURS,
        group=lambda name: name.rpartition(", ")[2],
        label=lambda name: name.rpartition(", ")[0],
        note=lambda row: f"{report.speed(row)}, {texts[row.name]} page faults",
    )
    report.publish(
        options,
        where,
        f"allocator-{networks.slug(options.model)}-n{options.batch}-{options.size}px",
        {
            "figures": report.as_json(rows),
            "page_faults": faults,
            "seconds": {name: [turn.seconds for turn in of] for name, of in turns.items()},
        },
        tables=[report.as_table(title, rows, "stock", {"page faults a step": texts})],
        draw=lambda path: report.draw_bars(path, title.partition(";")[0], where, rows, style),
    )
