"""What the CPU is: its name, its instructions, its cores. The one reader of /proc/cpuinfo."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch


def cpu_name() -> str:
    """The CPU's model name, such as "AMD EPYC 7B13"; its architecture where no name is to be had.

    >>> bool(cpu_name())
    True
    """
    return cpuinfo("model name") or str(_torch_cpu().get("cpu_name", "")) or platform.machine()


def cpu_flags() -> frozenset[str]:
    """The CPU's instruction sets, without underscores: "avx2", "avx512f", "avx512bf16", "amxbf16", ...

    From torch where it tells (a young function), else from /proc/cpuinfo; empty where neither does.

    >>> all("_" not in flag for flag in cpu_flags())
    True
    """
    flags = {name for name, value in _torch_cpu().items() if value is True}
    flags = flags or set((cpuinfo("flags") or cpuinfo("Features")).split())
    return frozenset(flag.replace("_", "") for flag in flags)


def vector_extensions() -> str:
    """What torch's own kernels use, such as "AVX2": less than the CPU has where ATEN_CPU_CAPABILITY says so.

    >>> vector_extensions() == torch.backends.cpu.get_cpu_capability()
    True
    """
    return torch.backends.cpu.get_cpu_capability()


def available_cores() -> int:
    """The cores this process may use: its affinity where the system has one, else all.

    >>> available_cores() >= 1
    True
    """
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_bf16(device: torch.device | str) -> bool:
    """Whether `device` multiplies bf16 in hardware: CUDA from Ampere on; on CPU, AVX512-BF16 or AMX.

    >>> has_bf16("meta")
    False
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(cpu_flags() & {"avx512bf16", "amxbf16"})


def cpuinfo(field: str) -> str:
    """The first value of a field of /proc/cpuinfo; "" if there is none, or no such file.

    >>> cpuinfo("no such field")
    ''
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() == field), "")


def _torch_cpu() -> dict[str, object]:
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    return dict(get_capabilities()) if get_capabilities else {}
