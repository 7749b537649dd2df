"""Scores of every sample, and TRAK's features, against an ordinary forward and backward pass.

    uv run --extra bench python -m benchmarks scores --model resnet20 --batch 128 --peers

The pass is that of the mean loss, by plain autograd, over the same batch; everything runs in one process,
interleaved, and must find the same losses before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.forms import attribution_peers, networks
from benchmarks.forms.networks import Case
from benchmarks.harness import conditions, measure, memory, pictures, report
from benchmarks.harness.measure import Variant
from benchmarks.harness.options import Compared, check_without, toy
from benchmarks.harness.report import Row
from resnet_func import tree
from resnet_func.attribution import Sketch, make_features, score_dataset
from resnet_func.losses import cross_entropy

BASELINE, AGAIN = "forward and backward", "forward and backward again"
SCORES, DIAGONAL = "scores in one pass", "scores, also by the diagonal Fisher"
FACTORIZED, DENSE = "TRAK features, factorized", "TRAK features, dense"
PEERS = {
    attribution_peers.TRAKER: attribution_peers.make_traker,
    attribution_peers.DATTRI: attribution_peers.make_dattri,
}
VARIANTS = (BASELINE, AGAIN, SCORES, DIAGONAL, FACTORIZED, DENSE, *PEERS)
TOLERANCE = 1e-3  # of the mean loss, by other kernels in float32


@dataclass(frozen=True)
class Options(Compared):
    """Measure scores and TRAK's features of a batch."""

    dim: int = 4096
    """Numbers in a sketch."""
    peers: bool = False
    """Measure traker's and dattri's features too; needs the extra `bench`, and gigabytes of memory."""


def run(options: Options) -> None:
    """Measure, print the table, write the result file and the picture.

    Raises:
        ValueError: options that cannot be.
        Disagreement: a variant finds another loss.
    """
    options = toy(options, dim=16)
    names = select(options)
    machine = conditions.set_up(options.device, options.threads)
    case = make_case(options, machine.device)
    where = conditions.capture(machine)
    makers = {name: partial(make_variant, name, options, case) for name in names}
    ready = measure.prepare(makers, BASELINE, lambda dtype: {"loss": TOLERANCE})
    rule = options.stopping_rule(options.seconds)
    how: dict[str, Any] = {"threads": machine.threads, "turn_seconds": options.turn_seconds}
    seconds = measure.time_steps(ready.steps, BASELINE, rule, **how)
    looked_at = [name for name in seconds if options.memory and name not in PEERS]
    peaks = {name: memory.peak_bytes(alone, options, name, device=machine.device.type) for name in looked_at}
    rows = report.rows(seconds, BASELINE, images=options.batch, peak_bytes=peaks)
    publish(options, where, rows, {"seconds": seconds, "skipped": ready.skipped})


def select(options: Options) -> list[str]:
    """The variants of these options.

    Raises:
        ValueError: a word of `without` is in no name, or a sketch of no numbers.
    """
    if options.dim < 1:
        raise ValueError(f"--dim must be 1 or more; got {options.dim}")
    check_without(options.without, list(VARIANTS[2:]))
    names = [name for name in VARIANTS if options.peers or name not in PEERS]
    return names[:2] + [name for name in names[2:] if not any(word in name for word in options.without)]


def make_case(options: Options, device: torch.device) -> Case:
    return networks.make_case(options.model, options.batch, options.size, device, norm="group")


def make_variant(name: str, options: Options, case: Case) -> Variant:
    """A variant and the mean loss that it finds."""
    loss = make_step(name, options, case)
    found: dict[str, Tensor] = {}

    def step() -> None:
        found["loss"] = loss()

    return Variant(step, lambda: found)


def make_step(name: str, options: Options, case: Case) -> Callable[[], Tensor]:
    """The step of a variant, which returns the mean loss."""
    checkpoint, batches = (case.params, case.state), [(case.x, case.y)]
    if name in (BASELINE, AGAIN):
        return partial(plain, case)
    if name in PEERS:
        slack = PEERS[name](case, options.dim)
        return lambda: mean_loss(slack())
    if name in (SCORES, DIAGONAL):
        more = ("self_influence_diagonal",) if name == DIAGONAL else ()
        names = ("loss", "margin", "el2n", "grand", "self_influence", *more)
        score = score_dataset(case.model, cross_entropy, names)
        return lambda: score([checkpoint], batches).values["loss"].mean()
    projection: Any = name.rpartition(" ")[2]
    features = make_features(case.model, Sketch(options.dim, 0, projection))
    return lambda: mean_loss(features(*checkpoint, batches).slack)


def mean_loss(slack: Tensor) -> Tensor:
    """From `1 - p` of every sample."""
    return -(1 - slack.double()).log().mean()


def plain(case: Case) -> Tensor:
    """Forward and backward of the mean loss by plain autograd, as a training loop does it."""
    leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), case.params)
    loss = cross_entropy(case.model.apply(leaves, case.state, case.x, train=False)[0], case.y).mean()
    torch.autograd.grad(loss, tree.leaves(leaves))
    return loss


def alone(options: Options, name: str) -> Callable[[], Any]:
    """The variant's step in a process of its own."""
    machine = conditions.set_up_alone(options.device, options.threads)
    return make_step(name, options, make_case(options, machine.device))


def publish(options: Options, where: dict[str, Any], rows: list[Row], raw: dict[str, Any]) -> None:
    """Table, result file and picture."""
    title = (
        f"{options.model} with GroupNorm, batch {options.batch}, {options.size} px, sketches of "
        f"{options.dim:,}{options.toy_note}"
    )
    report.publish(
        options,
        where,
        f"scores-{options.model}-n{options.batch}-{options.size}px",
        {"figures": report.as_json(rows), **raw},
        tables=[report.as_table(title, rows, "a pass")],
        notes=report.left_out(raw["skipped"]),
        draw=lambda path: report.draw_bars(path, title, where, rows, STYLE),
    )


STYLE = report.Bars(
    AGAIN,
    "time / an ordinary forward and backward pass (shorter is faster; 95 % intervals)",
    {"ours": pictures.BLUE, "others": pictures.ORANGE, "a pass": pictures.GREY},
    group=lambda name: "others" if name in PEERS else "a pass" if name == BASELINE else "ours",
)
