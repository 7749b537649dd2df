"""`python -m benchmarks`: measure, print the table, write the result file, draw the picture."""

from __future__ import annotations

import sys
from functools import reduce
from importlib import import_module
from operator import or_
from typing import Annotated, Any

import tyro

from benchmarks.harness import report
from benchmarks.harness.measure import Disagreement

COMMANDS = {
    "throughput": "benchmarks.commands.throughput",
    "per-sample": "benchmarks.commands.per_sample",
    "private": "benchmarks.commands.private",
    "allocator": "benchmarks.commands.allocator",
    "roofline": "benchmarks.commands.roofline",
    "winograd": "benchmarks.commands.winograd",
    "ensembles": "benchmarks.commands.ensembles",
    "scaling": "benchmarks.commands.scaling",
    "processes": "benchmarks.commands.processes",
    "scores": "benchmarks.commands.scores",
    "lds": "benchmarks.commands.lds",
    "pruning": "benchmarks.commands.pruning",
    "curvature": "benchmarks.commands.curvature",
    "here": "benchmarks.commands.here",
    "all": "benchmarks.commands.everything",
    "report": "benchmarks.commands.results_page",
}


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 measured, 1 when something cannot be compared, 2 for options that cannot be."""
    module, options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        module.run(options)
    except ValueError as error:
        return report.usage(error)
    except Disagreement as error:
        report.usage(error)
        return 1
    except KeyboardInterrupt:
        report.usage("interrupted")
        return 130
    return 0


def parse(arguments: list[str]) -> tuple[Any, Any]:
    """The module of the command that is asked for, and its options."""
    if arguments and arguments[0] in COMMANDS:  # it alone: the others' imports take seconds
        name, *words = arguments
        module = import_module(COMMANDS[name])
        return module, tyro.cli(module.Options, args=words, prog=f"python -m benchmarks {name}")
    modules = {name: import_module(path) for name, path in COMMANDS.items()}
    choices = [Annotated[module.Options, tyro.conf.subcommand(name)] for name, module in modules.items()]
    either: Any = reduce(or_, choices)
    options = tyro.cli(either, args=arguments, prog="python -m benchmarks", description=__doc__)
    return modules[arguments[0]], options


if __name__ == "__main__":
    sys.exit(main())
