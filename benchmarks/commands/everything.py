"""Every benchmark, one after the other, each in a fresh process: hours at full size.

uv run --extra bench python -m benchmarks all
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from dataclasses import dataclass

from benchmarks.harness import measure
from benchmarks.harness.options import RESULTS, Output

FULL = (
    "throughput --model resnet20 --batch 128",
    "throughput --model resnet20 --batch 128 --task inference",
    "throughput --model resnet18 --batch 32",
    "throughput --model resnet18 --batch 16 --size 224",
    "throughput --model resnet50 --batch 8 --size 224",
    "throughput --model resnet50 --batch 8 --size 224 --task inference",
    "throughput --model wrn_16_4 --batch 64",
    "per-sample --model resnet20 --batch 64 --peers",
    "per-sample --model resnet18 --batch 32 --peers",
    "per-sample --model resnet18 --batch 128 --without loop vmap",
    "per-sample --model resnet50 --batch 8 --size 160 --without loop",
    "private --model resnet20 --batch 64 --peers",
    "private --model resnet18 --batch 32 --peers",
    "allocator --model resnet20 --batch 128",
    "allocator --model resnet18 --batch 32",
    "winograd --model resnet18 --batch 32",
    "winograd --model resnet50 --batch 8",
    "per-sample --model resnet18 --batch 32 --layers",
    "per-sample --model resnet20 --batch 64 --layers",
    "per-sample --model resnet18 --batch 32 --phases",
    "roofline --model resnet18 --batch 32",
    "ensembles --model resnet20 --members 4 16 --without matrix",  # those alone take half an hour
    "scaling --model resnet20",
    "processes --model resnet20 --batch 128",
    "processes --model resnet18 --batch 32",
    "scores --model resnet20 --batch 128 --peers",
    "curvature --model resnet20 --batch 64",
    "curvature --model resnet18 --batch 32",
)
QUICK = (
    "throughput --quick",
    "throughput --quick --task inference --no-memory",
    "per-sample --quick",
    "private --quick",
    "allocator --quick",
    "winograd --quick",
    "roofline --quick",
    "ensembles --quick",
    "scaling --quick",
    "scores --quick",
    "lds --quick",
    "pruning --quick",
    "curvature --quick",
)


@dataclass(frozen=True)
class Options(Output):
    """Run every benchmark."""

    threads: int | None = None
    """Inside one operation, on the CPU; as many as torch takes if left out."""


def run(options: Options) -> None:
    """Run all of them, even if one fails.

    Raises:
        Disagreement: one or more failed; the message names them.
    """
    failed = []
    for words in commands(options):
        measure.progress.print(f"[bold]python -m benchmarks {shlex.join(words)}")
        start = time.monotonic()
        status = subprocess.run([sys.executable, "-m", "benchmarks", *words]).returncode
        measure.progress.print(f"{words[0]}: exit status {status} after {time.monotonic() - start:,.0f} s")
        if status:
            failed.append(shlex.join(words))
    if failed:
        raise measure.Disagreement(f"{len(failed)} failed: {'; '.join(failed)}")


def commands(options: Options) -> list[list[str]]:
    """The words of every command line."""
    common = [] if options.write else ["--no-write"]
    common += ["--threads", str(options.threads)] if options.threads else []
    common += ["--results", str(options.results)] if options.results != RESULTS else []
    return [[*line.split(), *common] for line in (QUICK if options.quick else FULL)]
