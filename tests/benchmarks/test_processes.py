"""Processes against threads, and the simulation; no time is asserted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.commands import processes
from benchmarks.commands.processes import Options, simulate
from benchmarks.forms.rank_step import Timed


@pytest.mark.nightly
def test_a_toy_run_measures_processes_and_threads(tmp_path: Path) -> None:
    assert main(["processes", "--quick", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("processes-*.json")
    result = json.loads(path.read_text())
    assert set(result["figures"]) == {"1 process, threads 2", "processes 2, 1 thread"}
    two = result["figures"]["processes 2, 1 thread"]
    assert two["bytes_sent"] == two["bytes"] > 0  # by a ring: 2 (2 - 1) / 2 of them
    assert two["all_reduce_share"] > 0
    assert two["over_threads"] > 0
    assert "over_threads" not in result["figures"]["1 process, threads 2"]
    assert [row["gpus"] for row in result["simulated"]] == [8, 64, 512]
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert any("Simulated" in line for line in processes.section([("here", result)]))


def test_processes_are_compared_with_threads_round_by_round() -> None:
    threads, halves = (
        [Timed(step, 0.0, 0) for step in steps] for steps in ((1.0, 2.0, 9.0), (2.0, 4.0, 3.0))
    )
    assert processes._over(threads, halves) == 0.5
    figures = processes._figures(4, [Timed(2.0, 0.5, 1000)])
    assert figures == {"all_reduce_seconds": 0.5, "all_reduce_share": 0.25, "bytes": 1000, "bytes_sent": 1500}


def test_one_gpu_says_nothing_and_a_node_alone_is_one_ring() -> None:
    options = replace(Options(), per_node=8, node_link=100.0, latency=0.0)
    assert simulate(options, 1, 1.0, 10**9).efficiency == 1
    assert simulate(options, 8, 1.0, 10**9).communication == pytest.approx(2 * 7 / 8 / 100)


def test_between_nodes_each_gpu_sends_its_share() -> None:
    options = replace(Options(), per_node=8, node_link=1e12, net_link=10.0, latency=0.0)
    found = simulate(options, 64, 1.0, 8 * 10**9)
    assert found.communication == pytest.approx(2 * 7 / 8 * 1 / 10)


def test_a_private_step_is_longer_and_its_share_of_communication_smaller() -> None:
    found = simulate(replace(Options(), private_ratio=2.0), 512, 0.1, 10**8)
    assert 0 < found.efficiency < found.private_efficiency < 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--processes 0", "--processes must be numbers of 1 or more; got (0,)"),
        ("--batch 1 --processes 2", "--batch 1 leaves some of 2 processes without an image"),
        ("--net-link 0", "--net-link must be above 0; got 0"),
    ],
)
def test_options_that_cannot_be_are_refused(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["processes", *words.split()]) == 2
    assert message in capsys.readouterr().err
