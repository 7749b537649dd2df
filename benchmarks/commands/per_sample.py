"""What gradients one sample at a time cost, as a ratio to the ordinary step of the same network.

    uv run --extra bench python -m benchmarks per-sample --model resnet20 --batch 64 --peers

"plain" is forward and backward of the mean loss by plain autograd, eager, NCHW: kernel for kernel what the
`nn.Module` does. All variants run in one process under one allocator and take turns in an order that reverses
every round. Before anything is timed, every result is checked against the loop over samples. Peak memory is
measured apart, each variant in a fresh process. With `--layers` it times the ways of every layer's
contraction instead, which is what plans choose among; with `--phases` the parts of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

import resnet_func as rf
from benchmarks.commands import contractions, phases
from benchmarks.forms import loop_check, networks
from benchmarks.forms.loop_check import MAX_NORM
from benchmarks.forms.networks import Case
from benchmarks.forms.peers import PEERS, make_jax_plain, make_peer
from benchmarks.harness import conditions, measure, memory, pictures, report
from benchmarks.harness.options import Compared, check_without, toy
from benchmarks.harness.peaks import DTYPES
from benchmarks.harness.report import Row
from resnet_func import calibration, tree
from resnet_func.calibration import Speeds
from resnet_func.losses import cross_entropy

BASELINE, AGAIN, JAX_PLAIN = "plain", "plain again", "plain, JAX"
FROM_MODULE = ", from_module"  # the network taken from a plain module, not from its config
IN_HALVES = ", in halves"  # one half of the batch after the other: less memory
OURS = (
    *("norms", "clipped_sum", f"clipped_sum{IN_HALVES}", "grads", "clipped_sum, vmap", "clipped_sum, loop"),
    *(f"norms{FROM_MODULE}", f"clipped_sum{FROM_MODULE}"),
)
OTHERS = (*PEERS, JAX_PLAIN)
VARIANTS = (BASELINE, AGAIN, *OURS, *OTHERS)
NARROW_ERROR = 2.0  # times the error of ordinary gradients under the same autocast
COLOURS = {
    "ours": pictures.BLUE,
    "the references": pictures.SKY,
    "Opacus": pictures.ORANGE,
    "JAX": pictures.GREEN,
}


@dataclass(frozen=True)
class Options(Compared):
    """Measure per-sample gradients against the ordinary step."""

    batch: int = 64
    """Images a step."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16 puts autocast around every variant, the plain step too."""
    compile: bool = False
    """Compile every variant, the plain step too."""
    allocator: Literal["tuned", "stock"] = "tuned"
    """Of all variants alike; stock is the C library's own."""
    peers: bool = False
    """Measure other libraries' clipped sums too; needs the extra `bench`."""
    layers: bool = False
    """Time every way of every convolution's contraction, beside the plan's choice among them."""
    phases: bool = False
    """Time the parts of norms and clipped sums: forward, backward, interception, contractions, the rest."""
    speeds: Literal["measured", "typical"] = "measured"
    """What plans choose by: this machine's speeds, or the constants that the library has by default."""


def run(options: Options) -> None:
    """Measure, print the table, write the result file and the picture.

    Raises:
        ValueError: options that cannot be.
        Disagreement: a variant computes something else.
    """
    options = toy(options)
    names = select(options)
    machine = set_up(options)
    case = make_case(options, machine.device)
    where = conditions.capture(machine)
    if options.layers:
        contractions.run(options, case, where, speeds_of(options, machine.device))
        return
    if options.phases:
        whole = {name: make_step(name, options, case) for name in phases.WHOLE}
        phases.run(options, case, where, whole, speeds_of(options, machine.device))
        return
    steps, skipped = make_steps(names, options, case)
    errors = check_steps(steps, skipped, options, case)
    seconds = measure.time_steps(
        steps,
        BASELINE,
        options.stopping_rule(options.seconds),
        threads=machine.threads,
        turn_seconds=options.turn_seconds,
    )
    # JAX compiles where the others allocate: what its process takes at most says nothing of the step
    looked_at = [name for name in steps if "JAX" not in name] if options.memory else []
    peaks = {name: memory.peak_bytes(alone, options, name, device=machine.device.type) for name in looked_at}
    rows = report.rows(seconds, BASELINE, images=options.batch, peak_bytes=peaks)
    publish(options, where, rows, {"seconds": seconds, "errors": errors, "skipped": skipped})


def select(options: Options) -> list[str]:
    """The variants of these options.

    Raises:
        ValueError: a word of `without` is in no name, or peers where they cannot be compared.
    """
    check_without(options.without, list(VARIANTS[2:]))
    if options.peers and (options.compile or options.dtype != "fp32"):
        raise ValueError("other libraries are measured as they come, eager and in fp32; leave out --peers")
    if options.phases and (options.layers or options.compile or options.dtype != "fp32"):
        raise ValueError("phases are those of an eager step in fp32; leave the other options out")
    names = [name for name in VARIANTS if options.peers or name not in OTHERS]
    if ":" in options.model:  # is taken from a module as it is
        names = [name for name in names if not name.endswith(FROM_MODULE)]
    return names[:2] + [name for name in names[2:] if not any(word in name for word in options.without)]


def set_up(options: Options) -> Any:
    """Device, threads and allocator of this process."""
    tuned = options.allocator == "tuned"
    return (conditions.set_up if tuned else conditions.set_up_alone)(options.device, options.threads)


def speeds_of(options: Options, device: torch.device) -> Speeds:
    """What plans choose by."""
    if options.speeds == "typical":
        return calibration.TYPICAL
    return calibration.measured(device, DTYPES[options.dtype])


def make_case(options: Options, device: torch.device) -> Case:
    """The network: one of the zoo with GroupNorm, another as it is."""
    return networks.make_case(options.model, options.batch, options.size, device, norm="group")


def make_steps(
    names: list[str], options: Options, case: Case
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The steps by name, and why a peer is left out that cannot run this network."""
    steps, skipped = {}, {}
    for name in names:
        try:
            steps[name] = make_step(name, options, case)
            if name in OTHERS and case.model.config is None:
                steps[name]()
        except ModuleNotFoundError:
            raise
        except Exception as error:  # whatever another library says of a network that it does not take
            if name not in OTHERS or case.model.config is not None:
                raise
            steps.pop(name, None)
            skipped[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            measure.progress.print(f"{name}: left out, {skipped[name]}", markup=False)
    return steps, skipped


def check_steps(
    steps: dict[str, Callable[[], Any]], skipped: dict[str, str], options: Options, case: Case
) -> dict[str, float]:
    """The relative error of every variant; a peer that is wrong about somebody's own network is left out.

    Raises:
        Disagreement: another variant is wrong.
    """
    narrow = options.dtype == "bf16"
    allowed = NARROW_ERROR if narrow else loop_check.allowed_error(case)
    check = partial(loop_check.check, case=case, allowed=allowed, narrow=narrow)
    others = [name for name in steps if name in OTHERS and case.model.config is None]
    errors = check({name: steps[name] for name in steps if name not in others})
    for name in others:
        try:
            errors |= check({name: steps[name]})
        except measure.Disagreement as error:
            skipped[name] = str(error).partition(";")[0]
            del steps[name]
            measure.progress.print(f"left out: {skipped[name]}", markup=False)
    return errors


# --------------------------------------------------------------------------- the variants


def make_step(name: str, options: Options, case: Case) -> Callable[[], Any]:
    """The step of a variant; what it returns is `(gradients or None, norms or None)`."""
    params, x, y = case.params, case.x, case.y
    if name in PEERS:
        return make_peer(name, case, MAX_NORM)
    if name == JAX_PLAIN:
        if case.model.config is None:
            raise measure.Skipped("in JAX there are the zoo's networks only")
        step = make_jax_plain(case.model.config, params, x, y)
        return lambda: (step(), None)
    function = make_function(name, case, speeds_of(options, case.x.device))
    if options.dtype == "bf16":
        function = narrowed(function)
    if options.compile and "loop" not in name:
        function = torch.compile(function, fullgraph=True, dynamic=False)
    return lambda: function(params, x, y)


def make_function(name: str, case: Case, speeds: Speeds = calibration.TYPICAL) -> Callable[..., Any]:
    """A variant as a function of parameters, images and targets."""
    model, state, ps = case.model, case.state, rf.per_sample
    options: Any = {"train": False, "speeds": speeds}
    if name in (BASELINE, AGAIN):
        return plain(case)
    if name.endswith(FROM_MODULE):
        name = name.removesuffix(FROM_MODULE)
        model, _, state = rf.from_module(rf.to_module(model, case.params, state))
    if name == "norms":
        norms = ps.norms(model, cross_entropy, **options)
        return lambda params, x, y: (None, norms(params, state, x, y))
    if name == "grads":
        grads = ps.grads(model, cross_entropy, **options)
        return lambda params, x, y: (grads(params, state, x, y), None)
    if name.endswith(IN_HALVES):
        name, options["microbatch"] = name.removesuffix(IN_HALVES), -(-len(case.y) // 2)
    method: Any = name.partition(", ")[2] or "auto"
    clipped = ps.clipped_sum(model, cross_entropy, max_norm=MAX_NORM, method=method, **options)
    return lambda params, x, y: clipped(params, state, x, y)


def plain(case: Case) -> Callable[..., Any]:
    """Forward and backward of the mean loss by plain autograd, as a training loop does it."""

    def function(params: Any, x: Tensor, y: Tensor) -> Any:
        leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
        # not training mode, whose BatchNorm couples the samples; with GroupNorm it is the same
        loss = cross_entropy(case.model.apply(leaves, case.state, x, train=False)[0], y).mean()
        return torch.autograd.grad(loss, tree.leaves(leaves)), None

    return function


def narrowed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same under bf16 autocast."""

    def step(params: Any, x: Tensor, y: Tensor) -> Any:
        with torch.autocast(x.device.type, torch.bfloat16):
            return function(params, x, y)

    return step


def alone(options: Options, name: str) -> Callable[[], Any]:
    """The variant's step in a process of its own."""
    machine = conditions.set_up_alone(options.device, options.threads)
    return make_step(name, options, make_case(options, machine.device))


# --------------------------------------------------------------------------- results


def publish(options: Options, where: dict[str, Any], rows: list[Row], found: dict[str, Any]) -> None:
    """Table, result file and picture; `found` goes into the file, too."""
    kind = f"{options.dtype}, {'compiled' if options.compile else 'eager'}"
    network = options.model if ":" in options.model else f"{options.model} with GroupNorm"
    title = (
        f"{network}, batch {options.batch}, {options.size} px, {kind}, "
        f"{options.allocator} allocator{options.toy_note}"
    )
    words = [networks.slug(options.model), f"n{options.batch}", f"{options.size}px"]
    words += ["bf16"] * (options.dtype == "bf16") + ["compiled"] * options.compile
    words += ["stock"] * (options.allocator == "stock")
    report.publish(
        options,
        where,
        f"per-sample-{'-'.join(words)}",
        {"figures": report.as_json(rows), **found},
        tables=[report.as_table(title, rows, BASELINE)],
        notes=[
            *report.left_out(found["skipped"]),
            "errors against the loop: " + ", ".join(f"{name} {e:.0e}" for name, e in found["errors"].items()),
        ],
        draw=lambda path: report.draw_bars(path, title, where, rows, STYLE),
    )


def group(name: str) -> str:
    if name in OTHERS:
        return "JAX" if "JAX" in name else "Opacus"
    return "the references" if name.endswith((", vmap", ", loop")) else "ours"


STYLE = report.Bars(
    AGAIN,
    "time / plain step: forward and backward of the mean loss (bars: 95 % intervals)",
    COLOURS,
    group,
    note=lambda row: f"{row.ratio.median:.2f}",
    hidden=(BASELINE,),
)
