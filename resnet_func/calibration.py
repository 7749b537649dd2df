"""The few speeds of a machine that decide which of several equal ways is taken, measured and kept in a file.

What is computed depends on them only in rounding. So that a result can be had again in the same bits, no
function of the library looks at the machine by itself: whoever chooses by speeds takes them as an argument,
`TYPICAL` by default, which is constant. `measured` is for programs: it measures once, and reads a file from
then on. A program that is to be resumed keeps what it chose by with its results.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_func import files, machine

VARIABLE = "RESNET_FUNC_SPEEDS"
VERSION = 2  # of what is measured: a file of another is measured anew


@dataclass(frozen=True)
class Speeds:
    """What things take, in nanoseconds.

    Args:
        conv_flop: A floating-point operation of a 3x3 convolution with both of its gradients.
        grouped_flop: One of a weight gradient by sample, as a grouped convolution.
        gradient_byte: A byte of such a gradient, written.
        matmul_flop: One of a batched matrix product, in float32 or wider.
        pixel_byte: A byte of pixel products, shifted and added up.
        byte: A byte of a large tensor, read or written.
        call: A call of a torch function.
        source: Where they come from, in a word or two.
    """

    conv_flop: float
    grouped_flop: float
    gradient_byte: float
    matmul_flop: float
    pixel_byte: float
    byte: float
    call: float
    source: str = "given"

    def __post_init__(self) -> None:
        for name, value in self.as_numbers().items():
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a time in nanoseconds, above 0; got {value}")

    def as_numbers(self) -> dict[str, float]:
        """The speeds by name."""
        return {name: value for name, value in asdict(self).items() if name != "source"}

    def describe(self) -> str:
        """One line.

        >>> TYPICAL.describe().partition(";")[0]
        'speeds (typical): conv 80, grouped 59, matmul 80 GFLOP/s'
        """
        conv, grouped, matmul = (1 / t for t in (self.conv_flop, self.grouped_flop, self.matmul_flop))
        gradient, pixel, memory = (1 / t for t in (self.gradient_byte, self.pixel_byte, self.byte))
        return (
            f"speeds ({self.source}): conv {conv:.0f}, grouped {grouped:.0f}, matmul {matmul:.0f} GFLOP/s; "
            f"gradients {gradient:.0f}, pixels {pixel:.0f}, memory {memory:.0f} GB/s; "
            f"call {self.call / 1e3:.0f} us"
        )


# One core of a Zen 3: what the plans were fitted on.
TYPICAL = Speeds(
    conv_flop=0.0125,
    grouped_flop=0.017,
    gradient_byte=0.4,
    matmul_flop=0.0125,
    pixel_byte=0.25,
    byte=0.05,
    call=3000.0,
    source="typical",
)


def measured(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    folder: Path | None = None,
) -> Speeds:
    """This machine's speeds with the threads that torch now has: from a file, else measured and written.

    Takes half a second the first time. A file that is damaged, or of another machine or version, is
    replaced; one that cannot be written is done without. What was measured while others kept the machine
    busy, so that two halves of the time disagree, is used and not kept. `RESNET_FUNC_SPEEDS=typical` switches
    it off, and compiled code and devices without values get `TYPICAL`, too.

    Args:
        device: The CPU or a CUDA device.
        dtype: Of activations.
        folder: Where the files are; by default `resnet_func` in the user's cache folder.

    Raises:
        ValueError: the environment variable is neither "typical" nor "measured".
    """
    wish = os.environ.get(VARIABLE, "measured")
    if wish not in ("typical", "measured"):
        raise ValueError(f'{VARIABLE} must be "typical" or "measured"; got {wish!r}. Unset it for "measured"')
    device = torch.device(device)
    if wish == "typical" or device.type not in ("cpu", "cuda") or torch.compiler.is_compiling():
        return TYPICAL
    key = identify(device, dtype)
    name = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = (folder or cache_folder()) / f"speeds-{name}.json"
    found = _read(path, key)
    if found is not None:
        return found
    first, second = (measure(device, dtype, seconds=0.2) for _ in range(2))
    if agree(first, second):
        _write(path, key, faster(first, second))
    return faster(first, second)


def agree(a: Speeds, b: Speeds) -> bool:
    """Whether two measurements tell the same story, each speed within a factor of 1.5."""
    pairs = zip(a.as_numbers().values(), b.as_numbers().values(), strict=True)
    return all(max(pair) <= 1.5 * min(pair) for pair in pairs)


def faster(a: Speeds, b: Speeds) -> Speeds:
    """The better of two measurements, speed by speed: what disturbs can only slow down."""
    other = b.as_numbers()
    return Speeds(**{name: min(t, other[name]) for name, t in a.as_numbers().items()}, source=a.source)


def identify(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What the speeds of a process depend on; equal where they may be shared."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine.cpu_name()
    return {
        "version": VERSION,
        "device": f"{device.type}: {name}",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "instructions": [machine.vector_extensions(), os.environ.get("ONEDNN_MAX_CPU_ISA", "")],
    }


def cache_folder() -> Path:
    """`resnet_func` in the user's cache folder (the XDG base directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "resnet_func"


def from_numbers(numbers: Mapping[str, Any], source: str) -> Speeds:
    """The speeds of a file.

    Raises:
        ValueError: they are not all there, or are no times.
    """
    names = [field.name for field in fields(Speeds) if field.name != "source"]
    if not isinstance(numbers, Mapping) or set(numbers) != set(names):
        raise ValueError(f"expected the speeds {', '.join(names)}; got {numbers}")
    try:
        return Speeds(**{name: float(numbers[name]) for name in names}, source=source)
    except TypeError as error:
        raise ValueError(f"speeds are numbers; got {dict(numbers)}") from error


def _read(path: Path, key: Mapping[str, Any]) -> Speeds | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return from_numbers(content["speeds"], "measured") if content["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):  # absent, damaged, or another program's
        return None


def _write(path: Path, key: Mapping[str, Any], speeds: Speeds) -> None:
    content = {"key": key, "speeds": speeds.as_numbers()}
    try:
        files.make_folder(path.parent)
        files.write_whole(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError:  # it costs half a second again
        return


# --------------------------------------------------------------------------- measuring


def measure(device: torch.device, dtype: torch.dtype = torch.float32, *, seconds: float = 0.4) -> Speeds:
    """Measure, in about so many seconds, by the best of several calls: others may be using the machine."""
    scale = 1 if device.type == "cpu" else 16  # so much more at once keeps a GPU busy
    makers = (_dense, _grouped_flops, _grouped_bytes, _product, _pixels, _stream, _call)
    share = seconds / len(makers)
    with torch.enable_grad():
        dense, flops, large, product, pixels, stream, call = (
            _rate(make, device, dtype, scale, share) for make in makers
        )
    grouped_flop, gradient_byte = _two_rates(flops, large)
    return Speeds(
        conv_flop=dense[0] / dense[1],
        grouped_flop=grouped_flop,
        gradient_byte=gradient_byte,
        matmul_flop=product[0] / product[1],
        pixel_byte=pixels[0] / pixels[2],
        byte=stream[0] / stream[2],
        call=call[0],
        source="measured",
    )


Amounts = tuple[float, float, float]  # nanoseconds, FLOP, bytes
Probe = tuple[Callable[[], Any], float, float]  # a call, its FLOP and bytes


def _rate(
    make: Callable[..., Probe], device: torch.device, dtype: torch.dtype, scale: int, seconds: float
) -> Amounts:
    run, flops, moved = make(device, dtype, scale)
    run()
    best, end, calls = float("inf"), time.perf_counter() + seconds, 0
    while calls < 3 or time.perf_counter() < end:
        _wait(device)
        start = time.perf_counter_ns()
        run()
        _wait(device)
        best, calls = min(best, time.perf_counter_ns() - start), calls + 1
    return max(best, 1), flops, moved


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _two_rates(a: Amounts, b: Amounts) -> tuple[float, float]:
    """What a FLOP and a byte take, from two calls that differ in how many they have of each.

    Noise can make one of the two come out near nothing: each takes at least a tenth of its own call.
    """
    (ta, fa, ba), (tb, fb, bb) = a, b
    determinant = fa * bb - fb * ba
    flop, byte = (ta * bb - tb * ba) / determinant, (fa * tb - fb * ta) / determinant
    return min(max(flop, 0.1 * ta / fa), ta / fa), min(max(byte, 0.1 * tb / bb), tb / bb)


def _dense(device: torch.device, dtype: torch.dtype, scale: int) -> Probe:
    n, c, side = 8 * scale, 64, 16
    x = torch.ones(n, c, side, side, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(c, c, 3, 3, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    cotangent = torch.ones_like(x)

    def run() -> Any:
        return torch.autograd.grad(F.conv2d(x, weight, padding=1), (x, weight), cotangent)

    return run, 6 * n * side**2 * c * c * 9, 0


def _by_sample(device: torch.device, dtype: torch.dtype, n: int, c: int, side: int) -> Probe:
    """The weight gradients of `n` samples of a 3x3 convolution: `n` groups of one."""
    x = torch.ones(1, n * c, side, side, device=device, dtype=dtype)
    weight = torch.ones(n * c, c, 3, 3, device=device, dtype=dtype, requires_grad=True)
    y = F.conv2d(x, weight, padding=1, groups=n)
    cotangent = torch.ones_like(y)

    def run() -> Any:
        return torch.autograd.grad(y, weight, cotangent, retain_graph=True)

    return run, 2 * n * side**2 * c * c * 9, n * c * c * 9 * dtype.itemsize


def _grouped_flops(device: torch.device, dtype: torch.dtype, scale: int) -> Probe:
    return _by_sample(device, dtype, 16 * scale, 32, 16)


def _grouped_bytes(device: torch.device, dtype: torch.dtype, scale: int) -> Probe:
    return _by_sample(device, dtype, 16 * scale, 96, 4)


def _product(device: torch.device, dtype: torch.dtype, scale: int) -> Probe:
    n, c, pixels = 16 * scale, 128, 64
    a = torch.ones(n, c, pixels, device=device, dtype=torch.promote_types(dtype, torch.float32))
    return lambda: torch.bmm(a.transpose(1, 2), a), 2 * n * c * pixels**2, 0


def _pixels(device: torch.device, dtype: torch.dtype, scale: int) -> Probe:
    """Patch products of a 3x3 kernel, as a ghost norm has them: seven passes, by the plans' count."""
    n, side = 16 * scale, 8
    wide = torch.promote_types(dtype, torch.float32)
    pixels = torch.ones(n, side, side, side, side, device=device, dtype=wide)

    def run() -> Tensor:
        padded = F.pad(pixels, [1, 1, 1, 1] * 2)
        rows = sum(padded[:, i : i + side, :, i : i + side] for i in range(3))
        return sum(rows[:, :, j : j + side, :, j : j + side] for j in range(3)) * pixels  # type: ignore[index]

    return run, 0, 7 * n * side**4 * wide.itemsize


def _stream(device: torch.device, dtype: torch.dtype, scale: int) -> Probe:
    # more than fits into the caches of the cores together: each has its own part of both tensors
    threads = min(max(torch.get_num_threads(), 2), 8)
    a = torch.ones(2**23 * (threads if device.type == "cpu" else scale), device=device, dtype=torch.float32)
    b = torch.ones_like(a)
    return lambda: torch.add(a, b, out=b), 0, 3 * 4 * a.numel()


def _call(device: torch.device, dtype: torch.dtype, scale: int) -> Probe:
    one = torch.ones(1, device=device)
    return lambda: one + one, 0, 0
