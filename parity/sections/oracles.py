"""Two networks that share no code with torch: NumPy for logits and statistics, JAX for all gradients too.

In float64. The figure is the worst relative error, in the 2-norm, of any leaf: logits, gradients of
`<logits, cotangent>` by the images and by every parameter, buffers afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from importlib import import_module
from typing import Any, TypeAlias
from unittest import SkipTest

import numpy as np
import torch
from torch import Tensor

from parity.cell import Cell
from parity.sections import oracle_numpy
from parity.steps import function_step, perturbed
from resnet_func import tree
from resnet_func.app.names import counted
from resnet_func.models import zoo
from resnet_func.models.config import ResNetConfig
from resnet_func.models.resnet import build
from resnet_func.testing import generator, randn
from resnet_func.types import Params, State

Leaves: TypeAlias = dict[str, Tensor]

RTOL = 1e-10
SIZES = {"imagenet": (2, 3, 33, 32), "cifar": (2, 3, 13, 15)}
SMALL: dict[str, Any] = {
    "block": "bottleneck",
    "depths": (1, 2, 2),
    "widths": (8, 16, 8),
    "norm_groups": 4,
    "num_classes": 5,
}


def _small(**changes: Any) -> ResNetConfig:
    return ResNetConfig(**{**SMALL, **changes})


OTHERS = {
    "group-norm": _small(norm="group"),
    "no-norm": _small(norm="none", block="basic"),
    "dilated": _small(replace_stride_with_dilation=(True, True)),
    "dilated-groups": _small(replace_stride_with_dilation=(False, True), groups=4, width_per_group=32),
    "standardized": _small(norm="group", block="preact", stem="cifar", weight_standardization=True),
    "relu-norm-conv": _small(
        norm="group",
        activation_order="relu-norm-conv",
        weight_standardization=True,
        standardization_affine=True,
        scale_norm=True,
    ),
    "conv-relu-norm": _small(block="basic", stem="cifar", activation_order="conv-relu-norm"),
    "norm-relu-conv": _small(activation_order="norm-relu-conv", shortcut="pad", widths=(8, 16, 16)),
    "scale-norm": _small(  # by groups: batches would take the biases before them away
        block="preact",
        norm="group",
        activation_order="conv-norm-relu",
        scale_norm=True,
        weight_standardization=True,
        standardization_affine=True,
    ),
    "preact-pad": _small(block="preact", stem="cifar", widths=(8, 13, 32), shortcut="pad"),
    "option-b": zoo.config("resnet20", shortcut="projection"),
}
"""What the zoo leaves out."""

# XLA computes a grouped convolution in float64 as a dense one: half a minute for each step of a ResNeXt.
QUICK = {
    "numpy": ("resnet18", "resnet20", "wrn_16_4", "resnext50_32x4d", *OTHERS),
    "jax": ("resnet18", "resnet20", "wrn_16_4", *OTHERS),
}
QUICK_TRAIN_ONLY = ("resnet18", "wrn_16_4", "option-b")


def cells(quick: bool) -> list[Cell]:
    return [
        Cell("oracles", f"{name}/{oracle}-{mode}", partial(check, name, oracle, mode))
        for name in (*zoo.ZOO, *OTHERS)
        for mode in modes(name)
        for oracle in ORACLES
        if not quick
        or (name in QUICK[oracle] and not (oracle == "jax" and mode == "eval" and name in QUICK_TRAIN_ONLY))
    ]


def modes(name: str) -> tuple[str, ...]:
    """Without batch norm both are the same."""
    return ("train", "eval") if config_of(name).norm == "batch" else ("train",)


def config_of(name: str) -> ResNetConfig:
    return OTHERS[name] if name in OTHERS else zoo.config(name)


def check(name: str, oracle: str, mode: str) -> str:
    config = config_of(name)
    inputs, got = ours(config, train=mode == "train")
    return compared(got, ORACLES[oracle](config, *inputs, train=mode == "train"))


@lru_cache(maxsize=1)  # both oracles of a network come one after another
def ours(config: ResNetConfig, *, train: bool) -> tuple[tuple[Params, State, Tensor, Tensor], Leaves]:
    """Parameters, state, images and a cotangent, and what `apply` and `vjp` make of them."""
    model = build(config)
    params, state = perturbed(*model.init(generator(0), dtype=torch.float64), seed=3)
    shape = SIZES[config.stem]
    x = randn(*shape, seed=1, dtype=torch.float64)
    cotangent = randn(shape[0], config.num_classes, seed=2, dtype=torch.float64)
    inputs = (params, state, x, cotangent)
    return inputs, function_step(model, *inputs, train=train)


def compared(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> str:
    """The worst relative error as a figure.

    Raises:
        AssertionError: a leaf is missing, not float64 or not finite, or is further off than `RTOL`.
    """
    alike = want.keys() <= got.keys() and all(got[name].shape == leaf.shape for name, leaf in want.items())
    assert alike, f"leaves {sorted(want)} against {sorted(got)}, or their shapes, do not fit"
    for name, leaf in [*want.items(), *((name, got[name]) for name in want)]:
        wanted = torch.int64 if name.endswith("num_batches_tracked") else torch.float64
        assert leaf.dtype == wanted, f"{name} is {leaf.dtype}: the comparison needs {wanted}"
        assert leaf.isfinite().all(), f"{name} is not finite: nothing is proven"
    errors = {name: relative_error(got[name], leaf) for name, leaf in want.items()}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= RTOL, f"worst {worst}: relative error {errors[worst]:.3g}, allowed {RTOL:.3g}"
    return f"{errors[worst]:.1e} in {counted(len(want), 'leaf', 'leaves')}"


def relative_error(got: Tensor, want: Tensor) -> float:
    """In the 2-norm; absolute where `want` is zero."""
    scale = want.double().norm().item() or 1.0
    return (got - want).double().norm().item() / scale


def by_numpy(
    config: ResNetConfig, params: Params, state: State, x: Tensor, cotangent: Tensor, *, train: bool
) -> Leaves:
    """Logits and buffers."""
    arrays = tree.map(lambda leaf: leaf.numpy(), (params, state, x))
    logits, after = oracle_numpy.apply(config, *arrays, train=train)
    buffers = {f"buffer {name}": torch.from_numpy(np.asarray(leaf)) for name, leaf in after.items()}
    return {"logits": torch.from_numpy(logits), **buffers}


def by_jax(
    config: ResNetConfig, params: Params, state: State, x: Tensor, cotangent: Tensor, *, train: bool
) -> Leaves:
    """Logits, all gradients and buffers."""
    jax, oracle = jax_and_oracle()

    def step(params: Params, state: State, x: Any, cotangent: Any) -> Any:
        def forward(x: Any, params: Params) -> Any:
            return oracle.apply(config, params, state, x, train=train)

        logits, pullback, after = jax.vjp(forward, x, params, has_aux=True)
        return logits, pullback(cotangent), after

    with float64(jax), jax.default_device(jax.devices("cpu")[0]):
        inputs = tree.map(lambda leaf: jax.numpy.asarray(leaf.numpy()), (params, state, x, cotangent))
        logits, (grad_x, grads), after = compiled(jax, step, inputs)(*inputs)
    named = {
        "logits": logits,
        **{f"gradient {name}": leaf for name, leaf in {"x": grad_x, **tree.flatten(grads)}.items()},
        **{f"buffer {name}": leaf for name, leaf in tree.flatten(after).items()},
    }
    return {name: torch.from_numpy(np.array(leaf)) for name, leaf in named.items()}


ORACLES: dict[str, Callable[..., Leaves]] = {"numpy": by_numpy, "jax": by_jax}


def jax_and_oracle() -> tuple[Any, Any]:
    try:
        import jax

        from parity.sections import oracle_jax
    except ImportError as missing:
        raise SkipTest(f"no JAX here: {missing}") from None
    return jax, oracle_jax


def float64(jax: Any) -> AbstractContextManager[Any]:
    """Without it JAX makes float32 of everything, and says nothing."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return import_module("jax.experimental").enable_x64()  # before jax 0.8


def compiled(jax: Any, step: Callable[..., Any], inputs: tuple[Any, ...]) -> Callable[..., Any]:
    """Compiled in a hurry: it runs once, and XLA's optimisation would take five times as long."""
    hurry = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    lowered = jax.jit(step).lower(*inputs)
    try:
        return lowered.compile(compiler_options=hurry)
    except jax.errors.JaxRuntimeError:  # a release without one of the options
        return lowered.compile()
