"""The conditions all variants of a run share: device, threads, allocator, and how they are compiled."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from parity import environment
from resnet_func.app import runtime
from resnet_func.app.names import counted

RECOMPILE_LIMIT = 64  # every variant is one more graph of the same few functions
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def set_up(device: str, threads: int | None) -> runtime.Runtime:
    """Device, threads and the tuned allocator, of this process.

    Raises:
        ValueError: a device that is not here, or threads < 1.
    """
    return runtime.configure(
        device=device, threads=threads, precision="fp32", memory_format="contiguous", compile="off"
    )


def set_up_alone(device: str, threads: int | None) -> runtime.Runtime:
    """The same in a process that looks at memory: under the C library's own allocator."""
    os.environ[runtime.ALLOCATOR_VARIABLE] = "stock"
    return set_up(device, threads)


def capture(machine: runtime.Runtime) -> dict[str, Any]:
    """What a result file says of the machine and of this process."""
    return environment.capture(str(machine.device)) | {"allocator": machine.allocator}


def compiled(function: Callable[..., Any], backend: str, mode: str | None = None) -> Any:
    """The function as one graph of static shapes."""
    # not at the top of the file: it takes seconds to import, and processes that compile nothing need it not
    import torch._dynamo.config

    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend, mode=mode)


@contextmanager
def empty_compiler_cache(backend: str, *, compiles: bool) -> Iterator[None]:
    """Fresh caches for the compiler in this process and its children, so that each variant pays its own.

    Where anything `compiles`, a trivial graph is compiled first: what only the first graph of a process pays
    belongs to none of the variants.
    """
    before = os.environ.get(CACHE_VARIABLE)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[CACHE_VARIABLE] = folder
        try:
            if compiles:
                trivial: Callable[..., Any] = torch.compile(lambda x: x.sin() + 1, backend=backend)
                trivial(torch.ones(64))
            yield
        finally:
            del os.environ[CACHE_VARIABLE]
            if before is not None:
                os.environ[CACHE_VARIABLE] = before


def describe(where: dict[str, Any]) -> str:
    """One line about the machine, for pictures."""
    if str(where["device"]).startswith("cuda"):
        return f"{where['gpu']}, torch {where['torch']}"
    kind = " ".join(filter(None, (where["microarchitecture"], where["vector_extensions"])))
    allocator = f", {where['allocator']} allocator" if "allocator" in where else ""
    threads = counted(where["threads"], "thread")
    return f"{where['cpu']} ({kind}), {threads}{allocator}, torch {where['torch']}"
