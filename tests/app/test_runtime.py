"""The runtime: chosen from what the machine has, refused in one clear line, and applied."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_func import calibration, machine
from resnet_func.app import runtime
from resnet_func.app.runtime import Runtime, configure, describe, tune_allocator

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `configure` sets globally is put back, and the environment is that of a plain machine."""
    for variable in (runtime.ALLOCATOR_VARIABLE, "LD_PRELOAD", "CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    before = (torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    yield
    torch.set_num_threads(before[0])
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before[1:]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs that only emulate bf16, as far as torch tells."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(runtime, "compile_obstacle", lambda device: None)


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def a_runtime(**changes: Any) -> Runtime:
    plain = Runtime(
        device=CPU,
        threads=1,
        precision="fp32",
        memory_format=torch.channels_last,
        winograd=True,
        compile=True,
        allocator="tuned",
    )
    return dataclasses.replace(plain, **changes)


# --- device, threads, precision, format ---


def test_auto_device(no_cuda: None) -> None:
    assert configure().device == CPU


def test_auto_device_with_cuda(cuda: None) -> None:
    assert configure().device == CUDA
    assert configure(device="cuda:1").device == torch.device("cuda:1")
    assert configure(device="cpu").device == CPU


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2"}, "fp32"),
        ({"avx2", "avx512f", "avx512vnni"}, "fp32"),
        ({"avx2", "avx512f", "avx512bf16"}, "bf16"),
        ({"avx2", "amxtile", "amxbf16"}, "bf16"),
        ({"neon", "bf16"}, "fp32"),
        (set(), "fp32"),
    ],
    ids=["zen3", "cascade-lake", "zen4", "sapphire-rapids", "arm", "unknown"],
)
def test_auto_precision_follows_the_cpu(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], expected: str
) -> None:
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(flags))
    assert configure(device="cpu").precision == expected
    assert configure(device="cpu", precision="fp32").precision == "fp32"
    assert configure(device="cpu", precision="bf16").precision == "bf16"


def test_auto_precision_on_cuda_does_not_count_emulation(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert configure().precision == "fp32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert configure().precision == "bf16"


def test_threads_are_applied_and_default_to_torchs_within_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_cores", lambda: 2)
    for already, asked, expected in [(1, 3, 3), (3, None, 2), (1, None, 1), (3, 1, 1)]:
        torch.set_num_threads(already)
        assert configure(device="cpu", threads=asked).threads == expected
        assert torch.get_num_threads() == expected


def test_winograd_is_for_the_cpu_in_fp32(cuda: None, zen3: None) -> None:
    assert configure(device="cpu").winograd
    assert not configure(device="cpu", precision="bf16").winograd
    assert not configure(device="cpu", winograd="off").winograd
    assert not configure(device="cuda").winograd
    assert configure(device="cuda", winograd="on").winograd


def test_winograd_is_for_machines_whose_products_keep_up(zen3: None) -> None:
    avx512 = dataclasses.replace(calibration.TYPICAL, conv_flop=calibration.TYPICAL.matmul_flop / 2.4)
    slow = configure(device="cpu", speeds=avx512)
    assert (slow.winograd, slow.speeds) == (False, avx512)
    assert configure(device="cpu", speeds=avx512, winograd="on").winograd


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_speeds_are_asked_for_with_the_threads_that_were_set(
    monkeypatch: pytest.MonkeyPatch, precision: Any, dtype: torch.dtype
) -> None:
    asked = []

    def measured(device: torch.device, dtype: torch.dtype) -> calibration.Speeds:
        asked.append((device, dtype, torch.get_num_threads()))
        return calibration.TYPICAL

    monkeypatch.setattr(calibration, "measured", measured)
    configure(device="cpu", threads=3, precision=precision)
    assert asked == [(CPU, dtype, 3)]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("auto", torch.channels_last),
        ("channels_last", torch.channels_last),
        ("contiguous", torch.contiguous_format),
    ],
)
def test_memory_format(asked: Any, expected: torch.memory_format) -> None:
    assert configure(device="cpu", memory_format=asked).memory_format == expected


def test_runtime_is_frozen_data() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        a_runtime().threads = 3  # pyright: ignore[reportAttributeAccessIssue]


REFUSED = {
    "no-cuda": ({"device": "cuda"}, r"device 'cuda' is not here: torch sees 0 cuda device.*Try \"auto\""),
    "no-cuda-1": ({"device": "cuda:1"}, "device 'cuda:1' is not here"),
    "cpu-1": ({"device": "cpu:1"}, "device 'cpu:1' is not here: torch sees 1 cpu device"),
    "no-mps": ({"device": "mps"}, "device 'mps' is not here: torch sees 0"),
    "no-such-device": ({"device": "gpu"}, r'device must be "auto", "cpu".*got \'gpu\'. Try "auto"'),
    "other-device": ({"device": "meta"}, r"device must be .*got 'meta'"),
    "threads": ({"threads": 0}, r"threads must be at least 1; got 0\. Leave it out"),
    "threads-negative": ({"threads": -2}, "got -2"),
    "precision": ({"precision": "fp16"}, r'precision must be one of "auto", "fp32", "bf16"; got \'fp16\''),
    "format": ({"memory_format": "nhwc"}, r"memory_format must be one of .*got 'nhwc'\. Try \"auto\""),
    "compile": ({"compile": True}, r'compile must be one of "auto", "on", "off"; got True'),
    "compiler": ({"compile": "on"}, r'compile="on" cannot work: no compiler.*try compile="auto"'),
}


@pytest.mark.parametrize(("options", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_in_one_line_and_nothing_is_applied(
    monkeypatch: pytest.MonkeyPatch, no_cuda: None, options: dict[str, Any], match: str
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(runtime, "tune_allocator", lambda: pytest.fail("applied all the same"))
    torch.set_num_threads(1)
    with pytest.raises(ValueError, match=match) as error:
        configure(**{"threads": 3, **options})
    assert "\n" not in str(error.value)
    assert torch.get_num_threads() == 1


def test_tf32_is_off_on_cuda_and_inductor_can_still_ask(cuda: None) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    configure(device="cpu")
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (True, True)
    configure(device="cuda")
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (False, False)
    assert torch.get_float32_matmul_precision() == "highest"


# --- compile ---


def has(*names: str) -> Callable[[str], str | None]:
    return lambda name: f"/bin/{name}" if name in names else None


@pytest.mark.parametrize(
    ("device", "platform", "environment", "installed", "works"),
    [
        (CPU, "linux", {}, ["g++"], True),
        (CPU, "linux", {}, ["c++", "clang++"], False),
        (CPU, "linux", {"CXX": "clang++"}, ["clang++"], True),
        (CPU, "linux", {"CXX": "clang++"}, ["g++"], False),
        (CPU, "linux", {"CXX": ""}, ["g++"], False),
        (CPU, "darwin", {}, ["clang++"], True),
        (CUDA, "linux", {}, ["clang"], True),
        (CUDA, "linux", {}, ["gcc"], True),
        (CUDA, "linux", {}, [], False),
        (CUDA, "linux", {"CC": "icx"}, ["gcc"], False),
    ],
)
def test_compile_needs_the_compiler_that_torch_will_call(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    platform: str,
    environment: dict[str, str],
    installed: list[str],
    works: bool,
) -> None:
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(runtime, "_has_python_headers", lambda: True)
    monkeypatch.setattr(shutil, "which", has(*installed))
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    obstacle = runtime.compile_obstacle(device)
    assert (obstacle is None) == works
    assert works or "no compiler" in str(obstacle)


def test_compile_needs_pythons_headers_and_triton_on_cuda(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "which", has("g++", "gcc"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h" in str(runtime.compile_obstacle(CPU))
    (tmp_path / "Python.h").touch()
    assert runtime.compile_obstacle(CPU) is None
    assert runtime.compile_obstacle(CUDA) == "no triton"
    assert runtime.compile_obstacle(torch.device("mps")) is not None


def test_compile_auto_on_and_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "compile_obstacle", lambda device: None)
    assert [configure(device="cpu", compile=c).compile for c in ("auto", "on", "off")] == [True, True, False]
    monkeypatch.setattr(runtime, "compile_obstacle", lambda device: "no compiler")
    assert [configure(device="cpu", compile=c).compile for c in ("auto", "off")] == [False, False]


# --- describe ---


@pytest.fixture
def zen3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_name", lambda: "AMD EPYC")
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset({"avx2"}))
    monkeypatch.setattr(machine, "available_cores", lambda: 2)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(runtime, "compile_obstacle", lambda device: None)


def test_describe_says_what_and_why(zen3: None) -> None:
    assert describe(a_runtime(threads=2)) == (
        "runtime: cpu (AMD EPYC, AVX2), 2 threads, fp32 (no AVX512-BF16 or AMX), channels_last, Winograd, "
        "compiled, allocator tuned"
    )


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"threads": 1}, ", 1 thread, "),
        ({"threads": 8}, ", 8 threads (slow: more than the 2 cores here), "),
        ({"precision": "bf16"}, ", bf16 (slow: no bf16 instructions here), "),
        ({"memory_format": torch.contiguous_format}, ", contiguous, "),
        ({"winograd": False}, ", channels_last, compiled, "),
        ({"compile": False}, ", not compiled, "),
        ({"allocator": "stock (no glibc)"}, ", allocator stock (no glibc)"),
    ],
)
def test_describe_each_part(zen3: None, changes: dict[str, Any], part: str) -> None:
    line = describe(a_runtime(**changes))
    assert part in line
    assert "\n" not in line


def test_describe_names_the_obstacle_and_native_bf16(zen3: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "compile_obstacle", lambda device: "no triton")
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset({"avx512bf16"}))
    assert ", fp32 (bf16 not asked for), " in describe(a_runtime(compile=False))
    assert ", bf16, channels_last, Winograd, not compiled (no triton), " in describe(
        a_runtime(precision="bf16", compile=False)
    )


def test_describe_cuda(cuda: None) -> None:
    line = describe(configure(threads=1))
    assert line.startswith("runtime: cuda (Tesla T4), 1 thread, fp32 (TF32 off), channels_last, compiled, ")


def test_describe_this_machine() -> None:
    line = describe(configure())
    assert line.startswith("runtime: c")
    assert "\n" not in line


# --- allocator ---


class FakeLibc:
    def __init__(self, answer: int = 1) -> None:
        self.calls: list[tuple[int, int]] = []
        self.answer = answer

    def mallopt(self, parameter: int, value: int) -> int:
        self.calls.append((parameter, value))
        return self.answer


@pytest.fixture
def libc(monkeypatch: pytest.MonkeyPatch) -> FakeLibc:
    fake = FakeLibc()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake)
    monkeypatch.setattr(runtime, "_is_glibc", lambda: True)
    return fake


def test_allocator_is_tuned_by_four_settings(libc: FakeLibc) -> None:
    assert tune_allocator() == tune_allocator() == "tuned"
    # malloc.h: M_MMAP_MAX is -4, M_TRIM_THRESHOLD -1, M_TOP_PAD -2, M_ARENA_MAX -8
    assert libc.calls[:4] == libc.calls[4:] == [(-4, 0), (-1, 2147483647), (-2, 268435456), (-8, 1)]


def test_allocator_refused(libc: FakeLibc) -> None:
    libc.answer = 0
    assert tune_allocator() == "stock (mallopt refused)"


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        (runtime.ALLOCATOR_VARIABLE, "stock", "stock (RESNET_FUNC_ALLOCATOR=stock)"),
        ("LD_PRELOAD", "/usr/lib/libtcmalloc_minimal.so.4", "tcmalloc"),
        ("LD_PRELOAD", "/x.so:/usr/lib/libjemalloc.so.2", "jemalloc"),
    ],
)
def test_allocator_left_alone(
    monkeypatch: pytest.MonkeyPatch, libc: FakeLibc, variable: str, value: str, said: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert tune_allocator() == said
    assert libc.calls == []


def test_allocator_variable_must_be_known(monkeypatch: pytest.MonkeyPatch, libc: FakeLibc) -> None:
    monkeypatch.setenv(runtime.ALLOCATOR_VARIABLE, "off")
    with pytest.raises(
        ValueError, match=r'RESNET_FUNC_ALLOCATOR must be "tuned" or "stock"; got \'off\'\. Unset'
    ):
        tune_allocator()
    assert libc.calls == []


@pytest.mark.parametrize("answer", [ValueError("unrecognized configuration name"), None, "musl 1.2"], ids=str)
def test_allocator_elsewhere_than_on_glibc(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    def confstr(name: str) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(os, "confstr", confstr)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("no mallopt here"))
    assert tune_allocator() == "stock (no glibc)"


PAGE_FAULTS = """
import resource, torch
from resnet_func.app.runtime import tune_allocator

def new_pages(count):
    # Of the memory of so many tensors, the share that the kernel handed out anew.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.ones(2**24)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return faults * resource.getpagesize() / (count * 2**26)

print(new_pages(16))  # all of it, or one in 512 where the kernel takes huge pages
assert tune_allocator() == "tuned"
new_pages(8)
print(new_pages(16))
try:
    torch.empty(2**60)
except RuntimeError:
    print(new_pages(16))
"""


@pytest.mark.skipif(not runtime._is_glibc(), reason="glibc only")
def test_tuned_memory_is_reused_without_page_faults_even_after_a_failed_allocation() -> None:
    environment = {key: value for key, value in os.environ.items() if key != runtime.ALLOCATOR_VARIABLE}
    shares = subprocess.check_output([sys.executable, "-c", PAGE_FAULTS], text=True, env=environment).split()
    assert len(shares) == 3
    # Now and then a small object lands in the freed block and the heap grows once more: one tensor of 16.
    stock, *tuned = map(float, shares)
    assert all(share < stock / 4 for share in tuned)
