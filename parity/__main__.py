"""`python -m parity`: check the cells, print the table, exit 1 when any fails.

`python -m parity museum`: show the bugs that the suite kills, exit 1 when any survives.
`python -m parity machines`: check the quick cells as several machines, exit 1 when any fails on any.
`python -m parity laws NETWORK`: check what holds for any network.
`python -m parity compare A B`: compare two networks.
`python -m parity audit`: train with canaries, exit 1 where they betray more than epsilon.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.progress import track

from parity import audit, environment, laws, machines, museum, runner, suite
from parity.compare import command as compare_command
from resnet_func.app.names import printable
from resnet_func.machine import cpu_flags

WIDE = 180  # where no terminal says how wide it is


@dataclass(frozen=True)
class Options:
    """Proofs that the functions are the networks.

    `museum` shows the bugs they kill, `machines` repeats them with other instructions and thread counts;
    `laws` and `compare` take any network.
    """

    quick: bool = False
    """The part that takes under five minutes on two cores."""

    only: str = ""
    """Cells whose path starts so: "bitwise", "bitwise/resnet18", "bitwise/resnet18/fp64-train-nchw"."""

    json: Path | None = None
    """Where to write every cell's outcome."""

    markdown: Path | None = None
    """Where to write the report."""

    within: Path | None = None
    """A page, such as parity/NETWORKS.md, on which to write each section anew between its marks."""

    jobs: int = 1
    """Processes to share the cells, each computing with one thread; 1 stays in this one."""

    threads: int = 0
    """Threads inside an operation; 0 leaves torch's number, or with more jobs one each."""


@dataclass(frozen=True)
class Machines:
    """The proof as several machines on this one: instructions left out, 1, 2 and 4 threads."""

    quick: bool = True
    """The part that takes under five minutes on two cores, for each machine."""

    only: str = ""
    """Cells whose path starts so."""

    machine: str = ""
    """Machines whose name starts so: "avx2", "default+SSE41/1", "as-found"."""


@dataclass(frozen=True)
class Tour:
    """The bug museum: what broke other implementations, and what kills it in this one."""

    only: str = ""
    """Exhibits whose name starts so."""


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when no cell failed, 1 when one did, 2 for options that cannot be."""
    arguments = sys.argv[1:] if arguments is None else arguments
    complaints = Console(stderr=True, soft_wrap=True, highlight=False)
    own = {"compare": compare_command.main, "laws": laws.main, "audit": audit.main}
    if arguments and arguments[0] in own:
        command = own[arguments[0]]
        console = Console(width=None if sys.stdout.isatty() else WIDE)
        return command(arguments[1:], console, complaints)
    if arguments[:1] == ["museum"]:
        return tour(tyro.cli(Tour, args=arguments[1:], prog="python -m parity museum"), complaints)
    if arguments[:1] == ["machines"]:
        options = tyro.cli(Machines, args=arguments[1:], prog="python -m parity machines")
        return repeat(options, complaints)
    return check(tyro.cli(Options, args=arguments, prog="python -m parity"), complaints)


def tour(options: Tour, complaints: Console) -> int:
    try:
        exhibits = museum.chosen(options.only)
    except ValueError as error:
        complaints.print(f"Error: {printable(str(error))}", markup=False)
        return 2
    torch.set_num_threads(1)  # many small tensors: threads would wait for each other
    proofs = [museum.prove(one) for one in track(exhibits, "proving", console=complaints, transient=True)]
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    console.print(museum.as_table(proofs))
    console.print(museum.summary(proofs), markup=False)
    return int(not all(proof.killed for proof in proofs))


def repeat(options: Machines, complaints: Console) -> int:
    """Exit status of `python -m parity machines`; each machine's lines are printed as it is done."""
    try:
        suite.cells(quick=options.quick, only=options.only)  # before processes start: there must be some
        chosen = machines.possible(cpu_flags(), options.machine)
    except ValueError as error:
        complaints.print(f"Error: {printable(str(error))}", markup=False)
        return 2
    failed = False
    for machine in track(chosen, "checking", console=complaints, transient=True):
        outcome = machines.prove(machine, quick=options.quick, only=options.only)
        failed |= outcome.failed
        print("\n".join(machines.lines(outcome)), flush=True)
    return int(failed)


def check(options: Options, complaints: Console) -> int:
    try:
        cells = suite.cells(quick=options.quick, only=options.only)
        for path in (options.json, options.markdown):
            if path and not path.parent.is_dir():
                raise ValueError(f"no folder {path.parent} to write {path.name} into")
        if options.within:
            for section in {cell.section for cell in cells}:
                suite.split_page(section, options.within)
        if options.jobs < 1:
            raise ValueError(f"--jobs must be 1 or more; got {options.jobs}")
        if options.threads < 0:
            raise ValueError(f"--threads must be 1 or more, or 0 for torch's number; got {options.threads}")
    except ValueError as error:
        complaints.print(f"Error: {printable(str(error))}", markup=False)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = environment.capture()
    bar = partial(track, description="checking", console=complaints, transient=True)
    results = runner.run_all(cells, bar, quick=options.quick, jobs=options.jobs, threads=options.threads)
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    console.print(suite.as_table(results))
    for line in [*suite.exceptions(results), suite.summary(results)]:
        console.print(line, markup=False, soft_wrap=True)
    if options.json:
        suite.write_json(options.json, results, machine)
    if options.markdown:
        suite.write_markdown(options.markdown, results, machine)
    if options.within:
        suite.write_within(options.within, results, machine)
    return int(any(result.failed for result in results))


if __name__ == "__main__":
    sys.exit(main())
