"""One machine as several: which there are, how each is run, and what is said of those that fail."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from parity import machines
from parity.__main__ import main
from parity.cell import Result
from parity.machines import Machine, Outcome

ZEN4 = {"sse41", "avx2", "avx512f", "avx512bf16"}


def test_the_machines_that_a_cpu_can_be() -> None:
    names = [machine.name for machine in machines.possible(ZEN4)]
    assert names == [
        *("as-found/1", "as-found/2", "as-found/4"),
        *("default+SSE41/1", "default+SSE41/4"),
        *("avx2+AVX2/1", "avx2+AVX2/4"),
        *("avx512+AVX512_CORE/1", "avx512+AVX512_CORE/4"),
        *("avx512+AVX512_CORE_BF16/1", "avx512+AVX512_CORE_BF16/4"),
    ]
    assert [machine.aten for machine in machines.possible({"sse41", "avx2"}, "avx")] == ["avx2", "avx2"]


class Processes:
    """Stands for `subprocess.run`: keeps what was asked, and writes the report that it is told to."""

    def __init__(self, report: dict[str, Any] | None, *, stderr: str = "") -> None:
        self.report, self.stderr = report, stderr
        self.commands: list[list[str]] = []
        self.environments: list[dict[str, str]] = []

    def run(self, command: list[str], env: dict[str, str], **_: Any) -> Any:
        self.commands.append(command)
        self.environments.append(env)
        if self.report is not None:
            Path(command[command.index("--json") + 1]).write_text(json.dumps(self.report))
        return SimpleNamespace(returncode=1, stderr=self.stderr)


CELLS = [
    Result("bitwise", "resnet18/fp32-train-nchw", "failed", "worst conv1: 3 ULP", 2.0),
    Result("bitwise", "resnet20/fp32-train-nchw", "passed", "0 ULP", 1.0),
]
MACHINE = {"threads": 4, "vector_extensions": "AVX2"}


def report(cells: list[Result]) -> dict[str, Any]:
    return {"machine": MACHINE, "cells": [vars(cell) for cell in cells]}


def test_a_process_has_the_machines_variables_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    started = Processes(report(CELLS))
    monkeypatch.setattr(subprocess, "run", started.run)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx512")
    machines.prove(Machine("avx2", "AVX2", 4), quick=True, only="bitwise")
    machines.prove(Machine("", "", 4), quick=False, only="")
    (limited, found), (quick, full) = started.environments, started.commands
    assert (limited["ATEN_CPU_CAPABILITY"], limited["ONEDNN_MAX_CPU_ISA"]) == ("avx2", "AVX2")
    assert not {"ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"} & set(found)
    assert quick[2:8] == ["parity", "--quick", "--only", "bitwise", "--threads", "4"]
    assert "--quick" not in full


def test_failures_are_told_with_their_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", Processes(report(CELLS)).run)
    monkeypatch.setattr("parity.__main__.cpu_flags", lambda: ZEN4)
    assert main(["machines", "--machine", "avx2+AVX2/4", "--only", "bitwise/resnet"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "FAILED avx2+AVX2/4: 2 cells: 1 passed, 1 failed, 0 skipped; 3 s; torch's kernels: AVX2",
        "  FAILED bitwise/resnet18/fp32-train-nchw: worst conv1: 3 ULP",
        "    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python -m parity"
        " --only bitwise/resnet18/fp32-train-nchw --threads 4",
    ]


def test_a_machine_that_passes_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", Processes(report(CELLS[1:])).run)
    assert main(["machines", "--machine", "as-found/4", "--only", "bitwise"]) == 0
    assert capsys.readouterr().out.startswith("passed as-found/4: 1 cell: 1 passed, 0 failed, 0 skipped")


def test_a_process_without_a_report_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", Processes(None, stderr="Killed\nno memory\n").run)
    outcome = machines.prove(Machine("", "", 4), quick=True, only="")
    assert outcome.failed
    assert machines.lines(outcome) == ["FAILED as-found/4: no result, exit status 1: no memory"]


def test_other_threads_than_asked_for_are_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", Processes(report(CELLS)).run)
    with pytest.raises(AssertionError, match="asked for 1 threads, got 4"):
        machines.prove(Machine("", "", 1), quick=True, only="")


def test_nothing_checked_is_a_failure() -> None:
    assert Outcome(Machine("", "", 1), [], "", 0.0).failed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["machines", "--only", "nope"], "no quick cell starts with 'nope'"),
        (["machines", "--machine", "sparc"], "no machine starts with 'sparc'; this CPU can be as-found/1"),
        (["--threads", "-1"], "--threads must be 1 or more"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.nightly
@pytest.mark.parametrize("part", ["bitwise/resnet20", "fp64-shadow/resnet20"])
def test_every_machine_that_this_one_can_be(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["machines", "--only", part]) == 0, capsys.readouterr().out
    assert "passed as-found/1" in capsys.readouterr().out
