"""All inputs at once: the function and the module trace to isomorphic graphs of ATen operations.

The whole step of either side (logits, all gradients of `<logits, cotangent>`, buffers afterwards) is traced
on fake tensors, with symbolic N, H and W and with mutations made values, and compared by `isomorphism`.

What this establishes. A trace sees no data: the two sides ask for the same ATen operations, on the same
operands, whatever the numbers in parameters, buffers, images and cotangent, and for every N, H and W of the
figure. As far as an ATen operation's result depends on its arguments alone (they choose the kernel, and the
kernel is deterministic), the results are equal to the bit on all of these inputs.

What it does not. That kernels are deterministic, or right: the cells of "bitwise" run them. Where the choice
of a kernel hangs on more than dtype, shape and strides (thread count, alignment, a flag changed in between)
it says nothing; nor of sizes other than the figure's, of dtypes other than float32, of layouts other than
contiguous, of CUDA, autocast or `torch.compile`.

Three things are not traced as they run, the same for both sides. Batch normalisation appears as
`_native_batch_norm_legit*`, the same kernel under the schema that admits to updating the statistics. Padding
by zero channels is spelled out (`zero_channels`). And oneDNN and NNPACK are off: the choice among kernels
is made inside `aten.convolution`, but guessing the strides of its result would split N at 1 and at 16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, TypeAlias, cast

import sympy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from parity.cell import Cell
from parity.reference import module as reference
from parity.sections.isomorphism import Trace, assert_isomorphic
from parity.steps import function_step
from resnet_func import tree
from resnet_func.models import zoo
from resnet_func.models.interop import modules
from resnet_func.testing import generator
from resnet_func.types import Params, State

Step: TypeAlias = Callable[[Params, State, Tensor, Tensor], dict[str, Tensor]]  # of images and cotangent
Images: TypeAlias = tuple[
    int, int, int
]  # example sizes N, H, W; they stand for all that take the same branches

LARGE: Images = (3, 67, 95)
ONE: Images = (1, 67, 95)
SMALL: dict[bool, Images] = {True: (3, 30, 32), False: (3, 3, 4)}  # the last stage is down to one pixel
QUICK = ("resnet18", "resnet20", "wrn_16_4")  # the full suite has these in three ranges of sizes


def cells(quick: bool) -> list[Cell]:
    made = []
    for name in zoo.ZOO:
        if quick and name not in QUICK:
            continue
        sizes = {"": LARGE}
        if not quick and name in QUICK:
            sizes |= {"-one": ONE, "-small": SMALL[name in zoo.IMAGENET]}
        for mode in ("train", "eval"):
            for suffix, images in sizes.items():
                made.append(Cell("graphs", f"{name}/{mode}{suffix}", partial(check, name, mode, images)))
                if name in zoo.IMAGENET:
                    taken = partial(check, name, mode, images, taken=True)
                    made.append(Cell("graphs", f"{name}/from_module-{mode}{suffix}", taken))
    return made


def check(name: str, mode: str, images: Images, *, taken: bool = False) -> str:
    """The network built, or taken from the module, against the module."""
    model = modules.from_module(_module(name))[0] if taken else zoo.by_name(name)
    got = trace(partial(function_step, model, train=mode == "train"), *_shapes(name), images)
    return assert_isomorphic(got, module_trace(name, mode, images))


@lru_cache(maxsize=1)  # the two cells that need it come one after the other
def module_trace(name: str, mode: str, images: Images) -> Trace:
    return trace(partial(module_step, _module(name), train=mode == "train"), *_shapes(name), images)


def _module(name: str) -> nn.Module:
    with torch.device("meta"):
        return reference(name)


def _shapes(name: str) -> tuple[Params, State]:
    return zoo.by_name(name).init(generator(0), device="meta")


def module_step(
    module: nn.Module, params: Params, state: State, x: Tensor, cotangent: Tensor, *, train: bool
) -> dict[str, Tensor]:
    """`steps.module_step` with the module's tensors given; it updates the buffers in place."""
    module.train(train)
    buffers = tree.flatten(state)
    own = {name: leaf.detach().requires_grad_() for name, leaf in tree.flatten(params).items()}
    x = x.detach().requires_grad_()
    logits = torch.func.functional_call(module, {**own, **buffers}, (x,), strict=True)
    grads = torch.autograd.grad(logits, [x, *own.values()], cotangent)
    return {
        "logits": logits.detach(),
        **{f"gradient {name}": leaf for name, leaf in zip(["x", *own], grads, strict=True)},
        **{f"buffer {name}": leaf for name, leaf in buffers.items()},
    }


def trace(step: Step, params: Params, state: State, images: Images, *, classes: int | None = None) -> Trace:
    """The graph of a step, for parameters and buffers of these shapes, and images of all sizes like these.

    Nothing is computed and no memory taken: the tensors are fake.
    """
    env = ShapeEnv(duck_shape=False)  # sizes equal by chance are not taken to be one size
    fake = FakeTensorMode(shape_env=env)
    leaves = _inputs(fake, params, state, images, classes or params["fc"]["weight"].shape[0])
    symbols = _symbols(leaves["x"])  # before the trace, which may find that a size has to be a number
    names: list[str] = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        given = dict(zip(leaves, tensors, strict=True))
        own, buffers = (
            tree.unflatten({path: given[path] for path in tree.flatten(nested)}) for nested in (params, state)
        )
        results = step(own, buffers, given["x"], given["cotangent"])
        names.extend(results)
        return list(results.values())

    functional = dispatch_functionalize(flat, FunctionalTensorMode())
    spelled_out = {torch.ops.aten.constant_pad_nd.default: zero_channels}
    with fake, _plain_convolutions():
        graph = make_fx(functional, decomposition_table=spelled_out)(*leaves.values()).graph
    return Trace(
        inputs=dict(zip(graph.find_nodes(op="placeholder"), leaves, strict=True)),
        outputs=dict(zip(names, cast(Any, graph.output_node().args[0]), strict=True)),
        images=images,
        symbols=symbols,
        guards=frozenset(guard.expr.xreplace(symbols) for guard in env.guards),
    )


def _inputs(
    fake: FakeTensorMode, params: Params, state: State, images: Images, classes: int
) -> dict[str, Tensor]:
    """Every input by name: parameters and buffers of fixed shapes, images and cotangent of symbolic ones."""
    n, h, w = images
    one = DimDynamic.STATIC if n == 1 else DimDynamic.DYNAMIC  # a single image is a case of its own
    context = StatelessSymbolicContext([one, DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.DYNAMIC])
    x = fake.from_tensor(torch.empty(n, 3, h, w), symbolic_context=context)
    fixed = {**tree.flatten(params), **tree.flatten(state)}
    with fake:
        leaves = {name: torch.empty(leaf.shape, dtype=leaf.dtype) for name, leaf in fixed.items()}
        return {**leaves, "x": x, "cotangent": torch.empty(x.shape[0], classes)}


def _symbols(x: Tensor) -> dict[Any, sympy.Symbol]:
    """The trace's symbols, and N, H and W for them; a size of one image is no symbol."""
    sizes = dict(zip("NCHW", cast(Any, x.shape), strict=True))
    return {
        size.node.expr: sympy.Symbol(name, integer=True, positive=True)
        for name, size in sizes.items()
        if isinstance(size, torch.SymInt)
    }


@contextmanager
def _plain_convolutions() -> Iterator[None]:
    # not torch.backends.mkldnn.flags, which warns of TF32 when it puts things back
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.backends.nnpack.flags(enabled=False):
            yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def zero_channels(x: Tensor, pad: list[int], value: float = 0) -> Tensor:
    """`F.pad` by channels of zeros, as the concatenation that the reference writes; its gradient is a slice.

    All of these only move bits.
    """
    *pixels, before, after = pad
    assert pixels == [0, 0, 0, 0], f"only channels are padded in these networks, not {pad}"
    assert value == 0
    if before < 0:
        return x.narrow(1, -before, x.shape[1] + before + after)
    n, _, h, w = x.shape
    return torch.cat([x.new_zeros(n, before, h, w), x, x.new_zeros(n, after, h, w)], 1)
