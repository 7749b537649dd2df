"""The most this machine does: FLOP/s of matrix products and of convolutions, B/s of memory and of the cache.

Measured by the kernels that torch has, not read off a data sheet: they are what a network's own kernels can
be held against. Each peak is the best of several shapes, and each shape's time a median.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Rows, inner size, columns; from small to large, so that a slow machine can stop in between.
GEMMS = {
    "cpu": ((256, 256, 256), (512, 512, 512), (1024, 1024, 1024), (8192, 512, 512), (2048, 2048, 2048)),
    "cuda": ((2048, 2048, 2048), (4096, 4096, 4096), (65536, 1024, 1024), (8192, 8192, 8192)),
}
# Batch, channels, side: the 3x3 convolutions of ResNet-18's stages, for images of 32 and of 224 pixels.
CONVS = {
    "cpu": ((4, 64, 32), (32, 512, 4), (32, 256, 8), (32, 128, 16), (16, 64, 56)),
    "cuda": ((256, 64, 56), (256, 128, 28), (256, 256, 14), (256, 512, 7)),
}
LARGE, SMALL = 128 * 2**20, 2**20  # bytes of a buffer, three at a time: beyond the last cache, and inside it


class Peaks(NamedTuple):
    """The best rates measured, FLOP/s by dtype ("fp32", "bf16") and B/s."""

    gemm: dict[str, float]
    conv: dict[str, float]
    memory: float
    cache: float

    def compute(self, dtype: str) -> float:
        """FLOP/s of the faster of the two kinds: which one a layer can reach depends on its kernel."""
        return max(self.gemm[dtype], self.conv[dtype])

    def roof(self, dtype: str, intensity: float) -> float:
        """The FLOP/s that `intensity`, in FLOP per byte, allows (Williams, Waterman and Patterson 2009)."""
        return min(self.compute(dtype), intensity * self.memory)


def measure(device: torch.device, *, quick: bool = False) -> Peaks:
    """Measure all peaks of a device with the threads that torch now has.

    Args:
        device: The CPU or a CUDA device.
        quick: About 2 seconds on a CPU instead of 20, for a look.
    """
    min_seconds = 0.02 if quick else 0.5
    return Peaks(
        gemm={name: _best(_gemms(device, dtype), min_seconds) for name, dtype in DTYPES.items()},
        conv={name: _best(_convs(device, dtype), min_seconds) for name, dtype in DTYPES.items()},
        memory=_best(_streams(device, LARGE), min_seconds),
        cache=_best(_streams(device, SMALL), min_seconds),
    )


def median_seconds(run: Callable[[], Any], min_seconds: float) -> float:
    """The median time of a call, after warming up; waits for the GPU where there is one."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_seconds).median


# How much a call does, in FLOPs or bytes, and how to make it: its tensors live only while it is timed.
Candidate = tuple[int, Callable[[], Callable[[], Any]]]


def _best(candidates: Iterable[Candidate], min_seconds: float) -> float:
    """The best rate of the candidates; one that would take far longer than `min_seconds` is passed over."""
    best = 0.0
    for work, make in candidates:
        if work <= 8 * min_seconds * best or not best:
            best = max(best, work / median_seconds(make(), min_seconds))
    return best


def _gemms(device: torch.device, dtype: torch.dtype) -> Iterable[Candidate]:
    for m, k, n in GEMMS[device.type]:

        def make(m: int = m, k: int = k, n: int = n) -> Callable[[], Any]:
            a, b = _random(device, dtype, m, k), _random(device, dtype, k, n)
            return lambda: a @ b

        yield 2 * m * k * n, make


def _convs(device: torch.device, dtype: torch.dtype) -> Iterable[Candidate]:
    for n, c, side in CONVS[device.type]:
        for layout in LAYOUTS.values():

            def make(
                n: int = n, c: int = c, side: int = side, layout: torch.memory_format = layout
            ) -> Callable[[], Any]:
                x = _random(device, dtype, n, c, side, side).contiguous(memory_format=layout)
                weight = _random(device, dtype, c, c, 3, 3).contiguous(memory_format=layout)
                return lambda: F.conv2d(x, weight, padding=1)

            yield 2 * n * side**2 * c**2 * 9, make


def _streams(device: torch.device, size: int) -> Iterable[Candidate]:
    """Copy and triad (McCalpin's STREAM): what is read and written by name, each byte once."""

    def make_copy() -> Callable[[], Any]:
        a, b = torch.zeros(size // 4, device=device), torch.ones(size // 4, device=device)
        return lambda: a.copy_(b)

    def make_triad() -> Callable[[], Any]:
        a, b, c = (torch.ones(size // 4, device=device) for _ in range(3))
        return lambda: torch.add(b, c, alpha=3.0, out=a)

    yield 2 * size, make_copy
    yield 3 * size, make_triad


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device).to(dtype)
