"""What gradients one sample at a time cost, as a ratio to the ordinary step of the same network.

    uv run python -m benchmarks.per_sample --model resnet20 --batch 64

"plain" is forward and backward of the mean loss by plain autograd, eager, NCHW, float32: kernel for kernel
what the `nn.Module` does. All variants run in one process under one allocator, in an order that reverses
every round. Before anything is timed, every result is checked against the loop over samples. Peak memory is
measured apart, each variant in a fresh process. With `--layers` it times the two ways of every layer's norm
instead, which is what plans choose between.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.benchmark import Timer

import resnet_func as rf
from benchmarks import environment
from benchmarks.peers import PEERS, make_peer
from benchmarks.statistics import interleave, ratio
from resnet_func import runtime, tree
from resnet_func.layers import Conv, LayerSpec
from resnet_func.losses import cross_entropy
from resnet_func.per_sample import contract, plan
from resnet_func.resnet import layer_specs

RESULTS = Path(__file__).parent / "results"
MAX_NORM = 1.0
BASELINE = "plain"
VARIANTS = (
    BASELINE,
    "plain again",
    "norms",
    "clipped_sum",
    "grads",
    "clipped_sum, vmap",
    "clipped_sum, loop",
    *PEERS,
)


@dataclass(frozen=True)
class Options:
    """Measure per-sample gradients against the ordinary step."""

    model: str = "resnet20"
    """A network of the zoo, built with GroupNorm."""
    batch: int = 64
    """Images a step."""
    size: int = 32
    """Side of the images in pixels."""
    rounds: int = 12
    """Turns of every variant."""
    compile: bool = False
    """Compile every variant, the plain step too."""
    tuned: bool = True
    """Tune the allocator, for all variants alike."""
    without: tuple[str, ...] = ()
    """Variants to leave out, such as the loop."""
    peers: bool = False
    """Measure other libraries' clipped sums too, eager; needs the extra `bench`."""
    layers: bool = False
    """Time every convolution's ghost norm and materialised norm, and the plan's choice between them."""
    write: bool = True
    """Whether to write a file below results/."""


class Problem(NamedTuple):
    """One network with its parameters, and one batch."""

    model: rf.Model
    params: Any
    state: Any
    x: Tensor
    y: Tensor


def main() -> None:
    """Measure, print the table, write the result file."""
    options = tyro.cli(Options)
    unknown = set(options.without) - set(VARIANTS[1:])
    if unknown:
        sys.exit(f"no variant is called {', '.join(unknown)}; there are {', '.join(VARIANTS[1:])}")
    machine = environment.capture() | {"allocator": set_up(options)}
    problem = make_problem(options)
    name = f"{options.model}-n{options.batch}-{options.size}px{'-compiled' * options.compile}"
    if options.layers:
        rows = measure_layers(options, problem)
        Console().print(layers_table(options, rows))
        result = {"options": vars(options), "environment": machine, "layers": rows}
        name = f"layers-{name}"
    else:
        seconds = measure(options, problem)
        memory = {variant: peak_memory(options, variant) for variant in seconds}
        Console().print(as_table(options, seconds, memory))
        ratios = {variant: ratio(times, seconds[BASELINE])._asdict() for variant, times in seconds.items()}
        result = {
            "options": vars(options),
            "environment": machine,
            "seconds": seconds,
            "ratios": ratios,
            "peak_bytes": memory,
        }
    if options.write:
        (RESULTS / f"per-sample-{name}{'' if options.tuned else '-stock'}.json").write_text(
            json.dumps(result, indent=1) + "\n", encoding="utf-8"
        )


def set_up(options: Options) -> str:
    """Threads and allocator of this process."""
    torch.set_num_threads(runtime.available_cores())
    return runtime.tune_allocator() if options.tuned else "stock"


def make_problem(options: Options) -> Problem:
    changes = {"stem": "cifar", "num_classes": 10} if options.size <= 64 else {}
    model = rf.zoo.by_name(options.model, norm="group", **changes)
    generator = torch.Generator().manual_seed(0)
    params, state = model.init(generator)
    x = torch.randn(options.batch, 3, options.size, options.size, generator=generator)
    return Problem(model, params, state, x, torch.randint(10, (options.batch,), generator=generator))


# --------------------------------------------------------------------------- the variants


def make_variant(name: str, options: Options, problem: Problem) -> Callable[[], Any]:
    """The step of a variant; what it returns is `(summed gradient or None, norms or None)`."""
    model, params, state, x, y = problem
    per_sample = rf.per_sample
    if name in PEERS:
        assert model.config is not None
        return make_peer(name, model.config, params, x, y, MAX_NORM)
    if name in (BASELINE, "plain again"):
        run: Callable[..., Any] = plain_step(problem)
    elif name == "norms":
        norms = per_sample.norms(model, cross_entropy)
        run = lambda p, x, y: (None, norms(p, state, x, y))  # noqa: E731
    elif name == "grads":
        grads = per_sample.grads(model, cross_entropy)
        run = lambda p, x, y: (grads(p, state, x, y), None)  # noqa: E731
    else:
        method = name.partition(", ")[2] or "auto"
        clipped = per_sample.clipped_sum(model, cross_entropy, max_norm=MAX_NORM, method=method)  # type: ignore[arg-type]
        run = lambda p, x, y: clipped(p, state, x, y)  # noqa: E731
    run = torch.compile(run, fullgraph=True, dynamic=False) if options.compile and "loop" not in name else run
    return lambda: run(params, x, y)


def plain_step(problem: Problem) -> Callable[..., Any]:
    """Forward and backward of the mean loss by plain autograd, as a training loop does it."""
    model, state = problem.model, problem.state

    def run(params: Any, x: Tensor, y: Tensor) -> Any:
        leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
        loss = cross_entropy(model.apply(leaves, state, x, train=True)[0], y).mean()
        grads = torch.autograd.grad(loss, tree.leaves(leaves))
        return grads, None

    return run


def check(variants: dict[str, Callable[[], Any]], problem: Problem) -> None:
    """All variants against the loop over samples: nothing is timed that is not right."""
    each = rf.per_sample.grads(problem.model, cross_entropy, method="loop")(
        problem.params, problem.state, problem.x, problem.y
    )
    norms = (
        torch.stack([leaf.double().flatten(1).square().sum(1) for leaf in tree.leaves(each)]).sum(0).sqrt()
    )
    factors = (MAX_NORM / norms).clamp(max=1)
    for name, step in variants.items():
        got, got_norms = step()
        # what a sum is held against is the sum of its terms' norms: the sum itself may have cancelled
        if name.startswith("plain"):
            got, want = list(got), [leaf.double().mean(0) for leaf in tree.leaves(each)]
            scale = norms.mean()
        elif name.startswith("clipped_sum") or name in PEERS:
            want = [torch.einsum("n,n...->...", factors, leaf.double()) for leaf in tree.leaves(each)]
            scale = (factors * norms).sum()
        else:
            want = [leaf.double() for leaf in tree.leaves(each)] if got is not None else []
            scale = norms.norm()
        leaves = tree.leaves(got) if got is not None else []
        errors = {"gradients": distance(leaves, want) / scale}
        if got_norms is not None:
            errors["norms"] = distance([got_norms], [norms]) / norms.norm()
        for what, error in errors.items():
            # a ReLU whose input rounds across zero moves one sample's gradient by 1e-3 of its norm
            if not error < 5e-3:
                sys.exit(f"{name} is wrong: relative error of its {what} {error:.2g}; nothing is timed")


def distance(got: Sequence[Tensor], want: Sequence[Tensor]) -> Tensor:
    """Euclidean distance of two lists of leaves, in float64."""
    pairs = zip(got, want, strict=True)
    return torch.stack([torch.zeros(()), *((a.double() - b).square().sum() for a, b in pairs)]).sum().sqrt()


def measure(options: Options, problem: Problem) -> dict[str, list[float]]:
    """Seconds of every variant in every round."""
    names = [
        name for name in VARIANTS if name not in options.without and (options.peers or name not in PEERS)
    ]
    variants = {name: make_variant(name, options, problem) for name in names}
    check(variants, problem)
    timers = {
        name: Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
        for name, step in variants.items()
    }
    return interleave(names, options.rounds, lambda name: timers[name].timeit(1).mean)


# --------------------------------------------------------------------------- memory


def peak_memory(options: Options, name: str) -> int:
    """Bytes that three steps of a variant take at most, beyond parameters and batch, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak_memory, args=(options, name, sender))
    process.start()
    sender.close()
    peak = receiver.recv()
    process.join()
    return peak


def _peak_memory(options: Options, name: str, pipe: Connection) -> None:
    # the C library's own allocator: a tuned one takes memory in pieces larger than what is measured
    torch.set_num_threads(runtime.available_cores())
    problem = make_problem(options)
    # a step of two samples first: code, threads and kernels are not what is measured
    make_variant(name, options, problem._replace(x=problem.x[:2], y=problem.y[:2]))()
    step = make_variant(name, options, problem)
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts here
    for _ in range(3):
        step()
    pipe.send(_status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    """A figure of Linux's /proc/self/status; ru_maxrss would be the parent's too."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


# --------------------------------------------------------------------------- layers


def measure_layers(options: Options, problem: Problem) -> list[dict[str, Any]]:
    """Milliseconds of both ways of every distinct convolution's norm, and what the plan chose."""
    assert problem.model.config is not None
    specs: dict[str, LayerSpec] = tree.flatten(layer_specs(problem.model.config))
    entries = {entry.path: entry for entry in plan(problem.model, problem.x.shape, "norms").entries}
    seen, rows = set(), []
    for path, spec in specs.items():
        entry = entries.get(f"{path}.weight")
        if not isinstance(spec, Conv) or entry is None or (spec, entry.positions) in seen:
            continue
        seen.add((spec, entry.positions))
        side = round(entry.positions**0.5)
        factors = _random_factors(spec, options.batch, side)
        row: dict[str, Any] = {"layer": path, "T": entry.positions, "D": entry.weights, "plan": entry.way}
        for way in ("ghost", "materialize"):
            cost = entry.costs.get(way, 0.0)
            if way == "ghost" and cost > 20 * entry.costs["materialize"]:
                row[way] = None  # hopeless, and more memory than there is
                continue
            timer = Timer(
                "f(x, w)",
                globals={"f": contract.squared_norms, "x": factors, "w": way},
                num_threads=torch.get_num_threads(),
            )
            row[way] = timer.blocked_autorange(min_run_time=0.3).median * 1e3
        rows.append(row)
    return rows


def _random_factors(spec: Conv, n: int, side: int) -> contract.ConvFactors:
    generator = torch.Generator().manual_seed(0)
    size = side * spec.stride
    weight = torch.randn(spec.weight_shape, generator=generator)
    inputs = torch.randn(n, spec.c_in, size, size, generator=generator)
    cotangents = torch.randn(n, spec.c_out, side, side, generator=generator)
    return contract.ConvFactors(spec, weight, inputs, cotangents, 1)


def layers_table(options: Options, rows: list[dict[str, Any]]) -> Table:
    table = Table("layer", title=f"norms of {options.model}, batch {options.batch}, milliseconds")
    for header in ("T", "D", "ghost", "materialize", "plan", "plan / best"):
        table.add_column(header, justify="right")
    for row in rows:
        best = min(row[way] for way in ("ghost", "materialize") if row[way] is not None)
        ghost = "-" if row["ghost"] is None else f"{row['ghost']:.2f}"
        regret = f"{row[row['plan']] / best:.2f}"
        table.add_row(
            row["layer"],
            f"{row['T']:,}",
            f"{row['D']:,}",
            ghost,
            f"{row['materialize']:.2f}",
            row["plan"],
            regret,
        )
    return table


def as_table(options: Options, seconds: dict[str, list[float]], memory: dict[str, int]) -> Table:
    """Ratios to the plain step, in time and in peak memory."""
    kind = "compiled" if options.compile else "eager"
    allocator = "tuned" if options.tuned else "stock"
    title = f"{options.model}-GN, N={options.batch}, {options.size} px, {kind}, {allocator} allocator"
    table = Table("variant", title=title)
    for column in ("time / plain", "95 % interval", "ms", "peak memory / plain"):
        table.add_column(column, justify="right")
    for name, times in seconds.items():
        r = ratio(times, seconds[BASELINE])
        median = sorted(times)[len(times) // 2] * 1e3
        share = memory[name] / memory[BASELINE]
        table.add_row(name, f"{r.median:.2f}", f"{r.low:.2f}-{r.high:.2f}", f"{median:,.0f}", f"{share:.2f}")
    return table


if __name__ == "__main__":
    main()
