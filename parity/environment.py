"""Where a measurement was taken, as JSON and as a short name for files: nothing that names the host."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from resnet_func.machine import available_cores, cpu_flags, cpu_name, cpuinfo, vector_extensions

FLAGS = (
    "avx2",
    "fma",
    "fma3",
    "avx512f",
    "avx512vnni",
    "avx512bf16",
    "avx512fp16",
    "amxbf16",
    "asimd",
    "sve",
)
# Of AMD's families by CPUID: the models that start each microarchitecture, newest first.
ZEN = {
    23: ((0x30, "zen2"), (0x00, "zen")),
    25: ((0xA0, "zen4"), (0x80, "zen3"), (0x60, "zen4"), (0x20, "zen3"), (0x10, "zen4"), (0x00, "zen3")),
    26: ((0x00, "zen5"),),
}
NOISE = re.compile(r"\(r\)|\(tm\)|@\s*[\d.]+\s*ghz|\b(amd|intel|cpu|processor|nvidia|\d+-core|with)\b")


def capture(device: str = "cpu") -> dict[str, Any]:
    """Hardware, settings and versions as they are now: call it after threads are set, before measuring."""
    return {
        "cpu": cpu_name(),
        "microarchitecture": microarchitecture(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "vector_extensions": vector_extensions(),
        "cpu_flags": sorted(cpu_flags() & set(FLAGS)),
        "cpu_mhz": _megahertz(),
        "memory_gib": _memory_gib(),
        "device": device,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpu_max_sm_mhz": _gpu_megahertz(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "jax": _version("jax"),
        "python": platform.python_version(),
        "system": platform.system(),
        "load_before": os.getloadavg()[0],
        "commit": _commit(),
    }


def machine(device: str = "cpu") -> str:
    """A short name of the machine for file names, such as "epyc-zen3-2c" or "h100-pcie"."""
    if device.startswith("cuda"):
        return slug(torch.cuda.get_device_name(device))
    kind = microarchitecture() or vector_extensions()
    return slug(f"{cpu_name()} {kind} {available_cores()}c")


def slug(name: str) -> str:
    """A hardware name without trademarks, clocks and makers: "Intel(R) Xeon(R) CPU" is "xeon"."""
    words = NOISE.sub(" ", name.lower())
    return "-".join(re.findall(r"[a-z0-9]+", words))


def microarchitecture() -> str | None:
    """AMD's generation, such as "zen3", whose name the CPU's own often leaves out; None for others."""
    if "AuthenticAMD" not in cpuinfo("vendor_id"):
        return None
    family, model = cpuinfo("cpu family"), cpuinfo("model")
    if not family.isdigit() or not model.isdigit():
        return None
    return next((name for start, name in ZEN.get(int(family), ()) if int(model) >= start), None)


def _megahertz() -> float | None:
    """The clock's limit where the kernel tells, else what it is now (in virtual machines, nominal)."""
    limit = Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    if limit.is_file():
        return int(limit.read_text()) / 1000
    now = cpuinfo("cpu MHz")
    return float(now) if now else None


def _gpu_megahertz() -> float | None:
    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit, and whether code differs from it."""
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--", "*.py")
    return f"{commit} with changes" if commit and changed else commit


def _git(*words: str) -> str | None:
    root = Path(__file__).parent.parent
    try:
        result = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() or None
