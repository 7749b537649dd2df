"""What other accountants make of the same events: our PLD beside Opacus's RDP and PRV.

All three account for Gaussian noise on Poisson samples. RDP (Mironov 2017, https://arxiv.org/abs/1702.07476;
Opacus's conversion is that of Balle et al. 2020, https://arxiv.org/abs/1905.09982) adds up Renyi divergences,
and loses in turning their sum into epsilon: it is an upper bound, the looser the fewer the steps. PRV (Gopi
et al. 2021, https://arxiv.org/abs/2106.02848) composes the distribution of privacy losses numerically, as PLD
does: what it says is its estimate plus the error it allows itself, 0.01 of epsilon here and a thousandth of
delta. PLD rounds every loss up on a grid of 1e-4, which makes it an upper bound, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from resnet_func import privacy

EPSILON_ERROR, DELTA_ERROR = 0.01, 1e-3  # of PRV; Opacus's own for delta is this share of it


class Event(NamedTuple):
    """So many steps of noise on so large a share of the samples."""

    noise_multiplier: float
    sampling_rate: float
    steps: int
    delta: float


class Epsilons(NamedTuple):
    """What each accountant says of an event."""

    pld: float
    rdp: float
    prv: float


# From a single release to long training; MNIST's, CIFAR-10's and ImageNet's usual rates.
EVENTS = (
    Event(4.0, 1.0, 1, 1e-5),
    Event(8.0, 1.0, 100, 1e-5),
    Event(1.0, 0.01, 1, 1e-5),
    Event(1.0, 0.01, 100, 1e-5),
    Event(1.0, 0.01, 1_000, 1e-5),
    Event(1.1, 256 / 60_000, 14_000, 1e-5),
    Event(2.0, 0.05, 400, 1e-5),
    Event(3.0, 4_096 / 50_000, 875, 1e-5),
    Event(6.0, 16_384 / 50_000, 250, 1e-5),
    Event(0.8, 512 / 50_000, 1_000, 1e-6),
    Event(1.5, 0.1, 100, 1e-7),
    Event(2.5, 16_384 / 1_281_167, 4_000, 8e-7),
)


def epsilons(event: Event) -> Epsilons:
    """The epsilon of an event by the three accountants.

    Raises:
        ValueError: Opacus or dp-accounting is not installed.
    """
    sigma, rate, steps, delta = event
    try:
        accountants = import_module("opacus.accountants")
        ours = privacy.epsilon(sigma, delta, sampling_rate=rate, steps=steps)
    except ImportError as error:
        raise ValueError(f"{error}; install it by: uv sync --extra bench --extra privacy") from error
    rdp, prv = accountants.RDPAccountant(), accountants.PRVAccountant()
    rdp.history = prv.history = [(sigma, rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best order is the largest it tries
        theirs = rdp.get_epsilon(delta)
        composed = prv.get_epsilon(delta, eps_error=EPSILON_ERROR, delta_error=DELTA_ERROR * delta)
    return Epsilons(ours, float(theirs), float(composed))


def as_table(events: Sequence[Event] = EVENTS) -> Table:
    """A row for each event; the last columns are what the others say more, in epsilon and per cent."""
    table = Table(box=SIMPLE_HEAD, title="epsilon of the same events", title_justify="left", pad_edge=False)
    heads = (
        "noise",
        "rate",
        "steps",
        "delta",
        "PLD (ours)",
        "PRV (Opacus)",
        "RDP (Opacus)",
        "PRV - PLD",
        "RDP / PLD",
    )
    for head in heads:
        table.add_column(head, justify="right")
    for event in events:
        found = epsilons(event)
        table.add_row(
            f"{event.noise_multiplier:g}",
            f"{event.sampling_rate:.4g}",
            f"{event.steps:,}",
            f"{event.delta:g}",
            *(f"{value:.4f}" for value in (found.pld, found.prv, found.rdp)),
            f"{found.prv - found.pld:+.4f}",
            f"{found.rdp / found.pld:.3f}",
        )
    return table
