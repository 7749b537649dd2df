"""How a program runs on this machine: device, threads, precision, layout, algorithm, compiler, allocator."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from resnet_func import calibration, machine
from resnet_func.app.names import counted
from resnet_func.calibration import TYPICAL, Speeds
from resnet_func.models.winograd import pays

ALLOCATOR_VARIABLE = "RESNET_FUNC_ALLOCATOR"

Precision = Literal["auto", "fp32", "bf16"]
MemoryFormat = Literal["auto", "channels_last", "contiguous"]
Compile = Literal["auto", "on", "off"]
Winograd = Literal["auto", "on", "off"]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What `configure` chose; pure data, made once and passed along.

    Args:
        device: Where parameters and batches live.
        threads: Threads inside one operation, on the CPU.
        precision: Of the forward pass (`train.autocast`); parameters are float32 either way.
        memory_format: For images and convolution weights.
        winograd: Whether convolutions go by minimal filtering where that is cheaper (`winograd.wrap`).
        compile: Whether to put `torch.compile` around the whole step.
        allocator: As `tune_allocator` says it.
        speeds: Of the machine, which choices are made by (`calibration`).
    """

    device: torch.device
    threads: int
    precision: Literal["fp32", "bf16"]
    memory_format: torch.memory_format
    winograd: bool
    compile: bool
    allocator: str
    speeds: Speeds = TYPICAL


def configure(
    *,
    device: str = "auto",
    threads: int | None = None,
    precision: Precision = "auto",
    memory_format: MemoryFormat = "auto",
    winograd: Winograd = "auto",
    compile: Compile = "auto",
    speeds: Speeds | None = None,
) -> Runtime:
    """Choose what is fastest here, apply it, and return it; print `describe` of it.

    Applied, and global: the number of threads, the allocator, and on CUDA that TF32 is off. If one choice is
    refused, none is applied.

    Args:
        device: "auto" (CUDA if there is one, else the CPU), "cpu", "cuda", "cuda:1" or "mps". MPS is taken
            only by name: it has no float64.
        threads: None keeps torch's number (so OMP_NUM_THREADS), up to the cores this process may use.
        precision: "auto" is "bf16" where the hardware multiplies it, else "fp32". "bf16" elsewhere is
            emulated: allowed, and `describe` says that it is slow.
        memory_format: "auto" is "channels_last": measured faster, compiled or not.
        winograd: "auto" is on for the CPU in fp32 where its speeds say that it pays for some convolution
            (`winograd.pays`): so on AVX2, and not on AVX-512. cuDNN chooses such kernels by itself.
        compile: "auto" is on where `compile_obstacle` finds nothing in the way.
        speeds: Of the machine, such as a run was begun by; None asks `calibration.measured`.

    Raises:
        ValueError: an unknown choice, a device that is not here, threads < 1, or "on" where nothing compiles.
    """
    _check_choice("precision", precision, Precision)
    _check_choice("memory_format", memory_format, MemoryFormat)
    _check_choice("winograd", winograd, Winograd)
    _check_choice("compile", compile, Compile)
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1; got {threads}. Leave it out to use what is there")
    where = _find_device(device)
    obstacle = compile_obstacle(where)
    if compile == "on" and obstacle:
        raise ValueError(f'compile="on" cannot work: {obstacle}. Install that, or try compile="auto"')
    if precision == "auto":
        precision = "bf16" if machine.has_bf16(where) else "fp32"

    threads = threads or min(torch.get_num_threads(), machine.available_cores())
    torch.set_num_threads(threads)
    if where.type == "cuda":
        _forbid_tf32()
    allocator = tune_allocator()
    if speeds is None:
        speeds = calibration.measured(where, torch.bfloat16 if precision == "bf16" else torch.float32)
    return Runtime(
        device=where,
        threads=threads,
        precision=precision,
        memory_format=torch.contiguous_format if memory_format == "contiguous" else torch.channels_last,
        winograd=winograd == "on"
        or (winograd == "auto" and (where.type, precision) == ("cpu", "fp32") and pays(speeds)),
        compile=compile != "off" and obstacle is None,
        allocator=allocator,
        speeds=speeds,
    )


def describe(runtime: Runtime) -> str:
    """One line: what was chosen, and why where that is not plain.

    "runtime: cpu (AMD EPYC, AVX2), 2 threads, fp32 (no AVX512-BF16 or AMX), channels_last, Winograd,
    compiled, allocator tuned".
    """
    cores = machine.available_cores()
    threads = counted(runtime.threads, "thread")
    obstacle = compile_obstacle(runtime.device)
    parts = [
        f"{runtime.device} ({_device_name(runtime.device)})",
        threads
        if runtime.threads <= cores
        else f"{threads} (slow: more than the {counted(cores, 'core')} here)",
        f"{runtime.precision}{_precision_reason(runtime)}",
        "channels_last" if runtime.memory_format == torch.channels_last else "contiguous",
        *(["Winograd"] if runtime.winograd else []),
        "compiled" if runtime.compile else f"not compiled ({obstacle})" if obstacle else "not compiled",
        f"allocator {runtime.allocator}",
    ]
    return f"runtime: {', '.join(parts)}"


def tune_allocator() -> str:
    """Make glibc keep freed memory instead of returning it to the kernel; returns what now allocates.

    glibc gives every large tensor back, and the next one page-faults its way in again: on CPU that costs a
    third of a training step. The price: the process keeps the most memory that it ever held. Opt out by
    `RESNET_FUNC_ALLOCATOR=stock`, before it starts. Calling this again changes nothing.

    Returns:
        "tuned"; "tcmalloc", "jemalloc" or "mimalloc" where one is preloaded (left alone: they keep memory as
        they are); or "stock" with the reason in brackets: asked for, no glibc (musl, macOS), or refused.

    Raises:
        ValueError: the environment variable is neither "tuned" nor "stock".

    Source: mallopt(3), https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    wish = os.environ.get(ALLOCATOR_VARIABLE, "tuned")
    if wish not in ("tuned", "stock"):
        raise ValueError(
            f'{ALLOCATOR_VARIABLE} must be "tuned" or "stock"; got {wish!r}. Unset it for "tuned"'
        )
    for name in ("tcmalloc", "jemalloc", "mimalloc"):
        if name in os.environ.get("LD_PRELOAD", ""):
            return name
    if wish == "stock":
        return f"stock ({ALLOCATOR_VARIABLE}=stock)"
    if not _is_glibc():
        return "stock (no glibc)"
    mallopt = ctypes.CDLL(None).mallopt
    # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX, by their numbers in malloc.h: nothing large is
    # mapped on its own, the heap never shrinks, grows by 256 MiB, and is the only one: after a request that
    # cannot be met, glibc would move the thread to another arena, and those map all that is large.
    settings = ((-4, 0), (-1, 2**31 - 1), (-2, 256 * 2**20), (-8, 1))
    accepted = [mallopt(parameter, value) == 1 for parameter, value in settings]
    return "tuned" if all(accepted) else "stock (mallopt refused)"


def compile_obstacle(device: torch.device) -> str | None:
    """Why `torch.compile` cannot work on `device`, as far as a quick look tells; None if it can."""
    if device.type == "mps":
        return "not tried on mps"
    # Inductor's C++ and Triton's launchers both include it; minimal Python installations leave it out.
    if not _has_python_headers():
        return "no Python.h, the headers of Python"
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "no triton"
        compilers = os.environ.get("CC", "gcc clang")
    else:
        # Inductor tries no other: c++ or clang++ beside a missing g++ is no help, unless CXX names it.
        compilers = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not any(shutil.which(compiler) for compiler in compilers.split()):
        return f"no compiler ({compilers.replace(' ', ' or ')}) on PATH"
    return None


def _check_choice(name: str, got: str, choices: object) -> None:
    if got not in get_args(choices):
        expected = ", ".join(f'"{choice}"' for choice in get_args(choices))
        raise ValueError(f'{name} must be one of {expected}; got {got!r}. Try "auto"')


def _find_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(
            f'device must be "auto", "cpu", "cuda", "cuda:<n>" or "mps"; got {name!r}. Try "auto"'
        )
    present = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= present[device.type]:
        count = counted(present[device.type], f"{device.type} device")
        raise ValueError(f'device {name!r} is not here: torch sees {count}. Try "auto"')
    return device


def _forbid_tf32() -> None:
    # By the old names on purpose: once the new ones (`fp32_precision`) are set, reading the old ones raises,
    # and Inductor's convolutions read them (torch 2.15).
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (
        f"{machine.cpu_name()}, {machine.vector_extensions()}" if device.type == "cpu" else machine.cpu_name()
    )


def _precision_reason(runtime: Runtime) -> str:
    native = machine.has_bf16(runtime.device)
    if runtime.precision == "bf16":
        return "" if native else " (slow: no bf16 instructions here)"
    if runtime.device.type == "cuda":
        return " (TF32 off)"
    return " (bf16 not asked for)" if native else " (no AVX512-BF16 or AMX)"


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):  # Windows; macOS; musl
        return False


def _has_python_headers() -> bool:
    return (Path(sysconfig.get_path("include")) / "Python.h").is_file()
