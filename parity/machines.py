"""`python -m parity machines`: the proof again as other machines, each in a process of its own.

Which kernels compute, and so how they round, hangs on the CPU's instructions and on the number of threads.
Two variables make torch and oneDNN pass over instructions that the CPU has: ATEN_CPU_CAPABILITY for torch's
own kernels, ONEDNN_MAX_CPU_ISA for oneDNN's. Both are read once, when a process starts. MKL, whose products
torch takes too, heeds neither.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from parity import suite
from parity.cell import Result

ATEN, ONEDNN = "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"
# What torch's kernels and oneDNN's may use, and the CPU's flag that this needs.
INSTRUCTIONS = (
    ("default", "SSE41", "sse41"),
    ("avx2", "AVX2", "avx2"),
    ("avx512", "AVX512_CORE", "avx512f"),
    ("avx512", "AVX512_CORE_BF16", "avx512bf16"),
)
THREADS = {True: (1, 2, 4), False: (1, 4)}  # as found, and with instructions left out


class Machine(NamedTuple):
    """Settings that make one machine of another: what may be used ("" for all there is), and threads."""

    aten: str
    onednn: str
    threads: int

    @property
    def name(self) -> str:
        """For instance "avx2+AVX2/4", or "as-found/1"."""
        return f"{f'{self.aten}+{self.onednn}' if self.aten else 'as-found'}/{self.threads}"

    @property
    def variables(self) -> dict[str, str]:
        return {ATEN: self.aten, ONEDNN: self.onednn} if self.aten else {}


@dataclass(frozen=True)
class Outcome:
    """What the proof said on a machine; `said` is its last line, or why there is no result."""

    machine: Machine
    results: list[Result]
    said: str
    seconds: float

    @property
    def failed(self) -> bool:
        return not self.results or any(result.failed for result in self.results)


def possible(flags: Collection[str], only: str = "") -> list[Machine]:
    """The machines that a CPU with these instructions can be, whose name starts with `only`.

    Raises:
        ValueError: there is none.

    >>> [machine.name for machine in possible({"neon"})]
    ['as-found/1', 'as-found/2', 'as-found/4']
    """
    settings = [("", ""), *((aten, onednn) for aten, onednn, flag in INSTRUCTIONS if flag in flags)]
    machines = [Machine(aten, onednn, threads) for aten, onednn in settings for threads in THREADS[not aten]]
    chosen = [machine for machine in machines if machine.name.startswith(only)]
    if not chosen:
        names = ", ".join(machine.name for machine in machines)
        raise ValueError(f"no machine starts with {only!r}; this CPU can be {names}")
    return chosen


def prove(machine: Machine, *, quick: bool, only: str) -> Outcome:
    """Run `python -m parity` as this machine."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "parity.json"
        words = ["--only", only, "--threads", str(machine.threads), "--json", str(report)]
        command = [sys.executable, "-m", "parity", *(["--quick"] if quick else []), *words]
        done = subprocess.run(command, env=_environment(machine), capture_output=True, text=True)
        if not report.is_file():
            last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
            return Outcome(machine, [], f"no result, exit status {done.returncode}: {last}", 0.0)
        report_content = json.loads(report.read_text())
    results = [Result(**cell) for cell in report_content["cells"]]
    here = report_content["machine"]
    assert here["threads"] == machine.threads, f"asked for {machine.threads} threads, got {here['threads']}"
    said = f"{suite.summary(results)}; torch's kernels: {here['vector_extensions']}"
    return Outcome(machine, results, said, sum(result.seconds for result in results))


def _environment(machine: Machine) -> dict[str, str]:
    """This process's, without settings of its own for instructions, and with the machine's."""
    root = str(Path(__file__).parent.parent)
    inherited = {name: value for name, value in os.environ.items() if name not in (ATEN, ONEDNN)}
    path = os.pathsep.join(filter(None, (root, inherited.get("PYTHONPATH", ""))))
    return inherited | machine.variables | {"PYTHONPATH": path}


def lines(outcome: Outcome) -> list[str]:
    """A line for the machine, and two for each failure, with the command that repeats it."""
    machine = outcome.machine
    lines = [f"{'FAILED' if outcome.failed else 'passed'} {machine.name}: {outcome.said}"]
    setting = "".join(f"{name}={value} " for name, value in machine.variables.items())
    for result in outcome.results:
        if result.failed:
            lines.append(f"  FAILED {result.path}: {result.said}")
            lines.append(f"    {setting}{result.command} --threads {machine.threads}")
    return lines
