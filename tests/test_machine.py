"""What the CPU is, from each of the places that tell, and where none does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from resnet_func import machine


def test_cores_are_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 7}, raising=False)
    monkeypatch.setattr(os, "process_cpu_count", lambda: 3, raising=False)
    assert machine.available_cores() == 3


def test_cpu_flags_agree_between_torch_and_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/cpuinfo").exists() or not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("needs both sources")
    from_torch = machine.cpu_flags()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    from_proc = machine.cpu_flags()
    assert len(from_proc) > 3
    names = {"avx2", "avx512f", "avx512bf16", "avx512vnni", "amxtile", "amxbf16", "sse41", "bf16"}
    assert from_torch & names == from_proc & names


CPUINFO = {
    "x86": "model\t\t: 1\nmodel name\t: Some CPU: v2\nflags\t\t: avx2 avx512_bf16 amx_tile\n\n",
    "arm": "processor\t: 0\nFeatures\t: fp asimd bf16\n",
    "none": None,
}


@pytest.mark.parametrize(
    ("text", "name", "flags"),
    [
        (CPUINFO["x86"], "Some CPU: v2", {"avx2", "avx512bf16", "amxtile"}),
        (CPUINFO["arm"], "the-machine", {"fp", "asimd", "bf16"}),
        (CPUINFO["none"], "the-machine", set()),
    ],
    ids=CPUINFO.keys(),
)
def test_cpu_without_torchs_help(
    monkeypatch: pytest.MonkeyPatch, text: str | None, name: str, flags: set[str]
) -> None:
    def read_text(path: Path, encoding: str) -> str:
        assert path == Path("/proc/cpuinfo")
        if text is None:
            raise FileNotFoundError
        return text

    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr("platform.machine", lambda: "the-machine")
    assert machine.cpu_name() == name
    assert machine.cpu_flags() == flags


def test_cpu_name_from_torch_where_proc_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpuinfo", lambda field: "")
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"cpu_name": "Apple M9", "neon": True}, raising=False
    )
    assert machine.cpu_name() == "Apple M9"
    assert machine.cpu_flags() == {"neon"}


@pytest.mark.parametrize("emulated_only", [True, False])
def test_bf16_on_cuda_does_not_count_emulation(emulated_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_supported(including_emulation: bool = True) -> bool:
        return including_emulation or not emulated_only

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert machine.has_bf16("cuda:1") is not emulated_only


@pytest.mark.parametrize(
    ("flags", "expected"), [({"avx512f"}, False), ({"avx512bf16"}, True), ({"amxbf16"}, True), (set(), False)]
)
def test_bf16_on_the_cpu(flags: set[str], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(flags))
    assert machine.has_bf16(torch.device("cpu")) is expected
    assert not machine.has_bf16("mps")


def test_nobody_else_reads_what_the_cpu_is() -> None:
    root = Path(__file__).parent.parent
    sources = [
        path for part in ("resnet_func", "parity", "benchmarks") for path in (root / part).rglob("*.py")
    ]
    readers = [path.name for path in sources if "/proc/cpuinfo" in path.read_text(encoding="utf-8")]
    assert readers == ["machine.py"]
