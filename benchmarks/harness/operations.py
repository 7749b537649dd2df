"""What a training step does: every operation of a network's forward and backward pass, from its layers.

An operation knows its FLOPs, the least bytes that it moves, and how to run alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import peaks
from resnet_func.app import runtime
from resnet_func.models.config import ResNetConfig
from resnet_func.models.layers import (
    BatchNorm,
    Conv,
    GroupNorm,
    LayerSpec,
    Linear,
    Pad,
    apply_layer,
    global_average_pool,
    init_layer,
)
from resnet_func.models.resnet import layer_specs

KINDS = ("forward", "input gradient", "weight gradient", "normalisation", "elementwise")
NAMES = {BatchNorm: "batch norm", GroupNorm: "group norm", Pad: "pad"}
# For points on the picture alone: no one counts them to a model's FLOPs. Forward: the mean, the variance
# about it, and y = x * scale + shift; backward: two sums over g, and dx from g, x and the two.
NORM_FLOPS = {"forward": 6, "backward": 8}

Phase = Literal["forward", "backward", "input gradient", "weight gradient"]


class Operation(NamedTuple):
    """What one layer does in one phase, for an input `shape`; equal ones are timed once."""

    layer: LayerSpec | Literal["relu", "add", "max pool", "average pool", "cast"]
    shape: tuple[int, ...]
    phase: Phase


Steps = Iterator[tuple[str, Operation]]  # each with the dotted path of its layer


def operations(
    config: ResNetConfig, batch: int, size: int, *, casts: bool = False
) -> list[tuple[str, Operation]]:
    """Every operation of forward and backward pass with its layer's path; the loss is left out.

    With `casts` the weights' casts, which autocast makes once a step, and those of their gradients.
    """
    specs = layer_specs(config)
    preact, x = config.block == "preact", (batch, config.in_channels, size, size)
    steps = _trained("conv1", specs["conv1"], x)
    found = [(path, op) for path, op in steps if op.phase != "input gradient"]  # nobody asks for the images'
    x = _after(specs["conv1"], x)
    found += [] if preact else _norm_relu("bn1", specs, x)
    if config.stem == "imagenet":
        found += _both("conv1.pool", "max pool", x)
        x = _after_pool(x)
    for stage in (name for name in specs if name.startswith("layer")):
        for index, block in specs[stage].items():
            found += _block(f"{stage}.{index}", block, x, preact)
            x = _after(block["conv2"], _after(block["conv1"], x))
            x = _after(block["conv3"], x) if "conv3" in block else x
    found += _norm_relu("bn1", specs, x) if preact else []
    found += [*_both("fc.pool", "average pool", x), *_trained("fc", specs["fc"], x[:2])]
    return [(path, op) for path, op in found if casts or op.layer != "cast"]


def _block(path: str, block: dict[str, Any], x: tuple[int, ...], preact: bool) -> Steps:
    y, last = x, "conv3" if "conv3" in block else "conv2"
    for name, spec in block.items():
        at = f"{path}.{name}"
        if isinstance(spec, dict):
            yield from _trained(f"{at}.0", spec["0"], x)
            yield from _both(f"{at}.1", spec["1"], y) if "1" in spec else ()
        elif isinstance(spec, Conv):
            yield from _both(f"{at}.relu", "relu", y) if preact else ()
            yield from _trained(at, spec, y)
            y = _after(spec, y)
            yield from _both(f"{at}.relu", "relu", y) if name != last and not preact else ()
        else:
            yield from _both(at, spec, x if isinstance(spec, Pad) else y)
    yield f"{path}.add", Operation("add", y, "forward")
    # its own gradient is the cotangent as it is; but the two of the block's input are added up
    yield f"{path}.branch", Operation("add", x, "forward")
    yield from () if preact else _both(f"{path}.relu", "relu", y)


def _norm_relu(name: str, specs: dict[str, Any], x: tuple[int, ...]) -> Steps:
    yield from _both(name, specs[name], x) if name in specs else ()
    yield from _both(f"{name}.relu", "relu", x)


def _trained(path: str, spec: Conv | Linear, x: tuple[int, ...]) -> Steps:
    weight = spec.weight_shape if isinstance(spec, Conv) else (spec.c_out, spec.c_in)
    for phase in ("forward", "input gradient", "weight gradient"):
        yield path, Operation(spec, x, phase)
    yield from _both(f"{path}.cast", "cast", weight)


def _both(path: str, layer: Any, x: tuple[int, ...]) -> Steps:
    yield path, Operation(layer, x, "forward")
    yield path, Operation(layer, x, "backward")


def _after(spec: Conv, x: tuple[int, ...]) -> tuple[int, ...]:
    return (x[0], spec.c_out, spec.output_size(x[2]), spec.output_size(x[3]))


def _after_pool(x: tuple[int, ...]) -> tuple[int, ...]:
    return (*x[:2], (x[2] - 1) // 2 + 1, (x[3] - 1) // 2 + 1)  # 3x3, stride 2, padding 1


def kind_of(op: Operation) -> str:
    """One of `KINDS`; pooling, padding and casts count as elementwise."""
    if isinstance(op.layer, BatchNorm | GroupNorm):
        return "normalisation"
    return op.phase if isinstance(op.layer, Conv | Linear) else "elementwise"


def flops_of(op: Operation) -> int:
    """Two for each multiply-accumulate of convolutions and linear layers; else a nominal few an element."""
    match op.layer:
        case Conv() as spec:
            return 2 * prod(_after(spec, op.shape)) * prod(spec.weight_shape[1:])
        case Linear() as spec:
            return 2 * op.shape[0] * spec.c_in * spec.c_out
        case BatchNorm() | GroupNorm():
            return NORM_FLOPS[op.phase] * prod(op.shape)
        case _:
            return prod(op.shape)


def bytes_of(op: Operation, itemsize: int) -> int:
    """The least bytes that move: inputs, outputs and weights once; pixels that a stride skips do not."""
    x = prod(op.shape)
    match op.layer:
        case Conv() as spec:
            y, weight = prod(_after(spec, op.shape)), prod(spec.weight_shape)
            read = min(x, y // spec.c_out * spec.c_in * spec.kernel**2)
            return itemsize * (weight + y + (x if op.phase == "input gradient" else read))
        case Linear() as spec:
            return itemsize * (x + op.shape[0] * spec.c_out + spec.c_in * spec.c_out)
        case BatchNorm() | GroupNorm():  # x and y; x, the cotangent and dx; affine parameters are fp32
            return (
                2 * itemsize * x + 8 * op.shape[1]
                if op.phase == "forward"
                else 3 * itemsize * x + 12 * op.shape[1]
            )
        case Pad() as spec:
            kept = x // spec.stride**2
            return itemsize * (kept + (kept * spec.c_out // spec.c_in if op.phase == "forward" else x))
        case "max pool":  # keeps the index of each maximum, in 8 bytes
            return itemsize * x + (itemsize + 8) * prod(_after_pool(op.shape))
        case "average pool":
            return itemsize * (x + prod(op.shape[:2]))
        case "cast":
            return (4 + itemsize) * x
        case "relu":
            return itemsize * x * (2 if op.phase == "forward" else 3)
        case _:
            return itemsize * x * 3


def what_of(op: Operation) -> str:
    """The layer and its input in a few words, such as `conv 3x3/2 64→128, 32 px`."""
    side = f", {op.shape[2]} px" if len(op.shape) == 4 else ""
    match op.layer:
        case Conv() as spec:
            stride = f"/{spec.stride}" if spec.stride > 1 else ""
            return f"conv {spec.kernel}x{spec.kernel}{stride} {spec.c_in}→{spec.c_out}{side}"
        case Linear() as spec:
            return f"linear {spec.c_in}→{spec.c_out}"
        case "cast":
            return f"cast of a weight {'x'.join(map(str, op.shape))}"
        case str() as name:
            return f"{name} {op.shape[1]}{side}"
        case spec:
            return f"{NAMES[type(spec)]} {op.shape[1]}{side}"


# --------------------------------------------------------------------------- one alone


def make_call(op: Operation, dtype: str, machine: runtime.Runtime) -> Callable[[], Any]:
    """One operation on random tensors; a backward phase computes the gradients that it names."""
    generator = torch.Generator().manual_seed(0)

    def place(leaf: Tensor, dtype: torch.dtype) -> Tensor:
        leaf = leaf.to(machine.device, dtype)
        leaf = leaf.contiguous(memory_format=machine.memory_format) if leaf.ndim == 4 else leaf
        return leaf.requires_grad_()

    narrow = peaks.DTYPES[dtype]
    x = torch.randn(op.shape, generator=generator)
    if op.layer == "cast":
        source, target = (torch.float32, narrow) if op.phase == "forward" else (narrow, torch.float32)
        x = place(x, source).detach()
        return lambda: x.to(target)
    x, params, state = place(x, narrow), {}, {}
    if not isinstance(op.layer, str):
        # autocast leaves the parameters of normalisation as they are
        wide = isinstance(op.layer, BatchNorm | GroupNorm)
        params, state = init_layer(op.layer, generator, generator.device)
        params = {name: place(leaf, torch.float32 if wide else narrow) for name, leaf in params.items()}
        state = {name: leaf.to(machine.device) for name, leaf in state.items()}
    run = make_forward(op, params, state, x)
    if op.phase == "forward":
        return (lambda: F.relu_(x.detach())) if op.layer == "relu" else run  # in place, as in the network
    y = run()
    leaves = {"input gradient": [x], "weight gradient": [*params.values()]}.get(
        op.phase, [x, *params.values()]
    )
    cotangent = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, leaves, cotangent, retain_graph=True)


def make_forward(op: Operation, params: Any, state: Any, x: Tensor) -> Callable[[], Tensor]:
    match op.layer:
        case "relu":
            return lambda: F.relu(x)
        case "add":
            other = torch.randn_like(x)
            return lambda: x + other
        case "max pool":
            return lambda: F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        case "average pool":
            return lambda: global_average_pool(x)
        case spec:
            assert not isinstance(spec, str)
            return lambda: apply_layer(spec, params, state, x, train=True)[0]
