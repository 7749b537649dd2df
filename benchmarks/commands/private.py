"""What a private step costs, as a ratio to the ordinary step of the same network.

    uv run --extra bench python -m benchmarks private --model resnet20 --batch 64 --peers

"plain" is a training step of `train.make_train_step` with SGD, eager, NCHW. A private step draws its noise,
clips every sample's gradient, adds up, adds the noise, and takes the step of SGD. With K views of each image
it is held against K plain steps: "plain, views" is one on K times the images. Opacus computes its clipped
sum, adds noise from torch's generator leaf by leaf as its `DPOptimizer` does, and SGD takes the step. Before
anything is timed, what every variant does without noise is checked against a loop over samples. Peak memory
is measured apart, each variant in a fresh process. `--accountants` compares epsilons instead of times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

import resnet_func as rf
from benchmarks.forms import accountants, networks
from benchmarks.forms.networks import Case
from benchmarks.forms.peers import make_peer
from benchmarks.harness import conditions, measure, memory, pictures, report
from benchmarks.harness.options import Compared, check_without, toy
from benchmarks.harness.report import Row
from benchmarks.harness.statistics import Seconds
from resnet_func import optim, privacy, tree
from resnet_func.losses import cross_entropy
from resnet_func.types import Params

BASELINE, AGAIN, PLAIN_VIEWS = "plain", "plain again", "plain, views"
IN_HALVES = "private, in halves"  # one half of the batch after the other: less memory
OURS = ("private", IN_HALVES, "private, adaptive", "private, views")
PEERS = ("Opacus, hooks", "Opacus, ghost")
VARIANTS = (BASELINE, AGAIN, PLAIN_VIEWS, *OURS, *PEERS)
MAX_NORM, SIGMA, LR = 1.0, 1.0, 0.1
ALLOWED = 5e-3  # of the step's length, in float32: the same sums in another order
COLOURS = {"ours": pictures.BLUE, "plain": pictures.SKY, "Opacus": pictures.ORANGE}


@dataclass(frozen=True)
class Options(Compared):
    """Measure the private training step against the ordinary one."""

    batch: int = 64
    """Images a step."""
    views: int = 4
    """Augmented views of an image, in the variants that have views."""
    peers: bool = False
    """Measure Opacus, too; needs the extra `bench`."""
    accountants: bool = False
    """Measure nothing: print what Opacus's accountants say of a dozen settings, beside ours."""


def run(options: Options) -> None:
    """Measure, print the table, write the result file and the picture.

    Raises:
        ValueError: options that cannot be.
        Disagreement: a variant computes something else.
    """
    if options.accountants:
        report.show(accountants.as_table())
        return
    options = toy(options)
    names = select(options)
    machine = conditions.set_up(options.device, options.threads)
    case, where = make_case(options, machine.device), conditions.capture(machine)
    check(names, options, case)
    steps = {name: make_step(name, options, case, SIGMA) for name in names}
    rule = options.stopping_rule(options.seconds)
    how: dict[str, Any] = {"threads": machine.threads, "turn_seconds": options.turn_seconds}
    seconds = measure.time_steps(steps, BASELINE, rule, **how)
    looked_at = names if options.memory else []
    peaks = {name: memory.peak_bytes(alone, options, name, device=machine.device.type) for name in looked_at}
    publish(options, where, report.rows(seconds, BASELINE, images=options.batch, peak_bytes=peaks), seconds)


def select(options: Options) -> list[str]:
    """The variants of these options.

    Raises:
        ValueError: a word of `without` is in no name, or there is no view.
    """
    check_without(options.without, list(VARIANTS[2:]))
    if options.views < 1:
        raise ValueError(f"--views must be 1 or more; got {options.views}")
    names = [name for name in VARIANTS if options.peers or name not in PEERS]
    return names[:2] + [name for name in names[2:] if not any(word in name for word in options.without)]


def make_case(options: Options, device: torch.device) -> Case:
    """The network with GroupNorm."""
    return networks.make_case(options.model, options.batch, options.size, device, norm="group")


# --------------------------------------------------------------------------- the variants

Step = Callable[[], Params]


def make_step(name: str, options: Options, case: Case, sigma: float) -> Step:
    """A variant's step, from the same parameters every time; it returns the parameters afterwards."""
    if name in PEERS:
        return peer_step(name, case, sigma)
    x, y = case.x, case.y
    if name == PLAIN_VIEWS:
        x, y = x.repeat(options.views, 1, 1, 1), y.repeat(options.views)
    if name in (BASELINE, AGAIN, PLAIN_VIEWS):
        optimizer = optim.sgd(LR)
        begin = rf.train.init_train_state(case.params, case.state, optimizer)
        plain = rf.train.make_train_step(case.model, cross_entropy, optimizer)
        return lambda: plain(begin, x, y)[0].params
    views = "views" in name
    return private_step(case, x[:, None].repeat(1, options.views, 1, 1, 1) if views else x, sigma, name)


def private_step(case: Case, x: Tensor, sigma: float, name: str) -> Step:
    """Ours: noise is drawn anew in every step."""
    adaptive = "adaptive" in name
    bound = privacy.AdaptiveNorm(start=MAX_NORM) if adaptive else MAX_NORM
    optimizer = optim.sgd(LR)
    begin = privacy.init_private_state(case.params, case.state, optimizer, max_norm=bound)
    rule: dict[str, Any] = {"noise_multiplier": sigma, "expected_batch_size": len(case.y)}
    if name == IN_HALVES:
        rule["microbatch"] = -(-len(case.y) // 2)
    step = privacy.make_private_step(case.model, cross_entropy, optimizer, max_norm=bound, **rule)
    mask, steps = torch.ones(len(case.y), dtype=torch.bool, device=case.y.device), count()

    def private() -> Params:
        noise = privacy.gaussian_noise(begin.params, seed=0, step=next(steps), adaptive=adaptive)
        return step(begin, x, case.y, mask, noise)[0].params

    return private


def peer_step(name: str, case: Case, sigma: float) -> Step:
    """Opacus's clipped sum with its noise, and the same step of SGD."""
    summed = make_peer(name, case, MAX_NORM)
    optimizer, generator = optim.sgd(LR), torch.Generator(case.x.device).manual_seed(0)
    opt_state = optimizer.init(case.params)

    def noisy(leaf: Tensor) -> Tensor:
        like = {"device": leaf.device, "dtype": leaf.dtype}
        noise = torch.normal(0.0, sigma * MAX_NORM, leaf.shape, generator=generator, **like)
        return (leaf + noise) / len(case.y)

    return lambda: optimizer.step(tree.map(noisy, summed()[0]), opt_state, case.params)[0]


def check(names: list[str], options: Options, case: Case) -> None:
    """Compare what every variant does without noise with a loop over samples.

    Raises:
        Disagreement: a step leads elsewhere.
    """
    looped = rf.per_sample.clipped_sum(case.model, cross_entropy, max_norm=MAX_NORM, method="loop")
    total, _ = looped(case.params, case.state, case.x, case.y)
    wanted = tree.map(lambda p, g: p - LR * g / len(case.y), case.params, total)
    length = float(tree.norm(tree.map(torch.sub, wanted, case.params)))
    for name in (*OURS, *PEERS):
        if name in names:
            got = make_step(name, options, case, 0.0)()
            error = float(tree.norm(tree.map(torch.sub, got, wanted))) / length
            if not error <= ALLOWED:
                raise measure.Disagreement(f"{name}: the step is off by {error:.2g} of its length")


def alone(options: Options, name: str) -> Step:
    """The variant's step in a process of its own."""
    machine = conditions.set_up_alone(options.device, options.threads)
    return make_step(name, options, make_case(options, machine.device), SIGMA)


# --------------------------------------------------------------------------- results


def publish(options: Options, where: dict[str, Any], rows: list[Row], seconds: Seconds) -> None:
    """Table, result file and picture."""
    title = (
        f"{options.model} with GroupNorm, batch {options.batch}, {options.size} px, views: {options.views}, "
        f"fp32, eager{options.toy_note}"
    )
    report.publish(
        options,
        where,
        f"private-{options.model}-n{options.batch}-{options.size}px-k{options.views}",
        {"figures": report.as_json(rows), "seconds": seconds},
        tables=[report.as_table(title, rows, BASELINE)],
        draw=lambda path: report.draw_bars(path, title, where, rows, STYLE),
    )


def group(name: str) -> str:
    """What colour a variant's bar has."""
    return "Opacus" if name in PEERS else "ours" if name in OURS else "plain"


STYLE = report.Bars(
    AGAIN,
    "time / plain training step (bars: 95 % intervals)",
    COLOURS,
    group,
    note=lambda row: f"{row.ratio.median:.2f}",
    hidden=(BASELINE,),
)
