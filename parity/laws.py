"""`python -m parity laws NETWORK`: every law that holds for any network, on a few random images."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from parity.steps import perturbed
from resnet_func.app.names import printable
from resnet_func.app.storage import checkpoint
from resnet_func.models.interop.load import load_network
from resnet_func.testing import LAWS, LawResult, assert_trees_equal, check_laws, randn
from resnet_func.testing.laws import check_law
from resnet_func.testing.shadow import Case, bounded_loss
from resnet_func.types import TrainState


@dataclass(frozen=True)
class LawsOptions:
    """Checks every law that holds for any network. Exit status: 0 all hold, 1 one is broken, 2 bad usage."""

    network: Annotated[str, tyro.conf.Positional]
    """A name of the zoo, torchvision:NAME, timm:NAME, FILE.py:CALLABLE or pkg.mod:CALLABLE."""

    image_size: int = 64
    """Height of the images; they are as wide, so that networks of one size fit."""

    samples: int = 3
    """Images in the batch; two or more, or the laws of samples are skipped."""

    only: str = ""
    """Laws to check, separated by commas: "purity,vmap"."""

    compiled: bool = False
    """Also check that `torch.compile` changes nothing: up to a minute."""


def checkpoint_round_trip(case: Case) -> str:
    """A checkpoint gives back parameters, state and strides, bit for bit."""
    saved = TrainState(case.params, case.state, opt_state=())
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), "last", saved, meta={})
        again, _, warning = checkpoint.load(Path(folder), "last", saved)
    assert warning is None, warning
    assert_trees_equal(again, saved)
    return "bitwise"


NAMES = (*LAWS, "checkpoint")


def chosen_laws(only: str, *, compiled: bool) -> list[str]:
    """The names that were asked for.

    Raises:
        ValueError: there is no such law.
    """
    if not only:
        return [name for name in NAMES if name != "compiled" or compiled]
    names = [name.strip() for name in only.split(",")]
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"no law is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    return names


def check_network(options: LawsOptions) -> list[LawResult]:
    """The results for the network that was named, whose affine parameters and statistics are random.

    Raises:
        ValueError: no such network or law, or sizes below 1.
    """
    if options.image_size < 1 or options.samples < 1:
        raise ValueError(f"sizes must be 1 or more; got {options.image_size} and {options.samples}")
    names = chosen_laws(options.only, compiled=options.compiled)
    model, params, state = load_network(options.network)
    params, state = perturbed(params, state, seed=3)
    x = randn(options.samples, 3, options.image_size, options.image_size, seed=1)
    general = [name for name in names if name in LAWS]
    results = check_laws(model, params, state, [x], laws=general, raise_on_failure=False)
    if "checkpoint" in names:
        case = Case(model, params, state, x, torch.zeros(len(x)), bounded_loss)
        results.append(check_law("checkpoint", checkpoint_round_trip, [case]))
    return results


def as_table(network: str, results: Sequence[LawResult]) -> Table:
    table = Table("law", "outcome", title=f"laws of {network}")
    table.add_column("what it says", overflow="fold")
    for result in results:
        table.add_row(result.law, result.outcome, escape(result.said))
    return table


def main(arguments: list[str], console: Console, complaints: Console) -> int:
    """`python -m parity laws`: exit status 0 when all laws hold, 1 when one is broken, 2 for bad usage."""
    torch.set_num_threads(1)  # many small tensors: threads would wait for each other
    options = tyro.cli(LawsOptions, args=arguments, prog="python -m parity laws")
    try:
        results = check_network(options)
    except (ValueError, TypeError, ImportError, OSError) as error:
        complaints.print(f"Error: {printable(str(error))}", markup=False)
        return 2
    console.print(as_table(options.network, results))
    counts = {o: sum(result.outcome == o for result in results) for o in ("passed", "failed", "skipped")}
    console.print(f"{len(results)} laws: {', '.join(f'{count} {o}' for o, count in counts.items())}")
    return int(counts["failed"] > 0)
