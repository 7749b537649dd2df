"""Peak memory of a step, looked at in a fresh process."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

STEPS = 3


def peak_bytes(prepare: Callable[..., Callable[[], Any]], *arguments: Any, device: str = "cpu") -> int | None:
    """Bytes that three steps take at most, beyond what is there between steps, in a fresh process.

    On the CPU this is resident memory under the C library's own allocator: a tuned one takes memory in
    pieces larger than what is measured. On a GPU it is what torch's allocator handed out there.

    Args:
        prepare: A function of a module's top level; called in the new process with `arguments`, it sets up
            (threads, parameters, batch) and returns the step. The step is called once before anything is
            measured, so that code, kernels and compilation do not count.
        device: "cpu" or "cuda": where the step computes.

    Returns:
        The bytes; None where the step failed, or the system has no /proc.
    """
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, prepare, arguments, device))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:  # it died; what it had to say is on stderr
        return None
    finally:
        process.join()


def _serve(
    pipe: Connection, prepare: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...], device: str
) -> None:
    pipe.send(peak_bytes_here(prepare, *arguments, device=device))


def peak_bytes_here(prepare: Callable[..., Callable[[], Any]], *arguments: Any, device: str = "cpu") -> int:
    """The same in this process, whose allocator and history count too."""
    step = prepare(*arguments)
    step()
    gc.collect()
    return _peak_on_cpu(step) if device == "cpu" else _peak_on_gpu(step)


def _peak_on_gpu(step: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(step: Callable[[], Any]) -> int:
    # what compilation left free in the heap would serve the steps, and they would seem to need nothing
    if os.name == "posix" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts here
    for _ in range(STEPS):
        step()
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> int:
    """A figure of Linux's /proc/self/status; ru_maxrss would be the parent's too."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
