"""Second derivatives: forward-over-reverse of the function against double backward through the module.

Products of the mean cross-entropy's Hessian, and of its Gauss-Newton matrix J' H_L J (Schraudolph 2002),
with directions over all parameters, in float64. The module uses reverse mode alone: its Jacobian-vector
product is the derivative of `J' u` by `u`. Both give every leaf to `RTOL`, or to what rounding in every layer
moves the module's own product, where a deep network in training mode amplifies it beyond; and what linear
algebra says holds of the function's: `<u, H v> = <v, H u>` and `<u, J v> = <J' u, v>`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad as backward
from torch.func import grad, jvp, vjp

from parity.cell import Cell
from parity.reference import module as reference
from parity.rounding import LayerNoise, rounding_noise
from parity.steps import loaded, perturbed, with_small_branches
from resnet_func import tree
from resnet_func.losses import cross_entropy
from resnet_func.models import zoo
from resnet_func.testing import generator, randn
from resnet_func.types import Params

RTOL = 1e-10
SIZES = {"imagenet": (2, 3, 33, 32), "cifar": (2, 3, 13, 15)}
QUICK = ("resnet18", "resnet50", "resnext50_32x4d", "resnet20", "wrn_16_4")
QUICK_TRAIN_ONLY = ("resnet18", "resnet50", "resnext50_32x4d")


def cells(quick: bool) -> list[Cell]:
    return [
        Cell("second-order", f"{name}/{product}-{mode}", partial(check, name, product, mode))
        for name in zoo.ZOO
        for mode in ("train", "eval")
        for product in PRODUCTS
        if not quick or (name in QUICK and (mode == "train" or name not in QUICK_TRAIN_ONLY))
    ]


def check(name: str, product: str, mode: str) -> str:
    ours, theirs = PRODUCTS[product]
    case = drawn(name, train=mode == "train")
    got, identity, off = ours(case)
    want = theirs(case)
    worst, error = compared(tree.flatten(got), want)
    rounding = 0.0 if error <= RTOL else moved_by_rounding(case, want, theirs)
    allowed = max(RTOL, rounding)
    assert error <= allowed, f"worst {worst}: relative error {error:.3g}, allowed {allowed:.3g}"
    assert off <= RTOL, f"{identity} only to {off:.3g}, allowed {RTOL:.3g}"
    beside = f" (rounding moves the module's by {rounding:.1e})" if rounding else ""
    return f"{error:.1e}{beside} in {len(want)} leaves, {identity} to {off:.1e}"


def moved_by_rounding(
    case: Case, want: Mapping[str, Tensor], product: Callable[[Case], dict[str, Tensor]]
) -> float:
    """How far noise of the size of rounding, in every layer's output, moves the module's own product."""
    with LayerNoise(rounding_noise(case.params, torch.float64)):
        return compared(product(case), want)[1]


class Case(NamedTuple):
    """A network twice, and where and along what to differentiate it."""

    logits: Callable[[Params], Tensor]
    params: Params
    module: nn.Module
    x: Tensor
    y: Tensor
    u: Params
    v: Params


@lru_cache(maxsize=1)  # the products of one network come one after another
def drawn(name: str, *, train: bool) -> Case:
    model = zoo.by_name(name)
    assert model.config
    params, state = perturbed(*model.init(generator(0), dtype=torch.float64), seed=3)
    if not train:  # else deep networks saturate the softmax
        params = with_small_branches(params)
    module = loaded(partial(reference, name), params, state).train(train)
    x = randn(*SIZES[model.config.stem], seed=1, dtype=torch.float64)
    y = torch.randint(model.config.num_classes, (len(x),), generator=generator(2))
    u, v = (directions(params, seed) for seed in (4, 5))

    def logits(params: Params) -> Tensor:
        return model.apply(params, state, x, train=train)[0]

    return Case(logits, params, module, x, y, u, v)


def directions(params: Params, seed: int) -> Params:
    source = generator(seed)
    return tree.map(lambda p: torch.randn(p.shape, generator=source, dtype=p.dtype), params)


# --------------------------------------------------------------------------- the function


def loss(case: Case, logits: Tensor) -> Tensor:
    return cross_entropy(logits, case.y).mean()


def hessian_product(case: Case) -> tuple[Params, str, float]:
    """`H v`, and how far from symmetric H is along u and v."""

    def slopes(params: Params) -> Params:
        return grad(lambda p: loss(case, case.logits(p)))(params)

    hu, hv = (cast(Any, jvp(slopes, (case.params,), (along,)))[1] for along in (case.u, case.v))
    return hv, "<u,Hv> = <v,Hu>", apart(tree.dot(case.u, hv), tree.dot(case.v, hu))


def gauss_newton_product(case: Case) -> tuple[Params, str, float]:
    """`J' H_L J v`, and how far from adjoint the two modes are along `H_L J v` and v."""
    logits, jv = cast(Any, jvp(case.logits, (case.params,), (case.v,)))
    hjv = cast(Any, jvp(grad(partial(loss, case)), (logits,), (jv,)))[1]
    _, pullback = cast(Any, vjp(case.logits, case.params))
    (product,) = pullback(hjv)
    return product, "<u,Jv> = <J'u,v>", apart((hjv * jv).sum(), tree.dot(product, case.v))


def apart(a: Tensor, b: Tensor) -> float:
    """The relative difference of two numbers."""
    return ((a - b).abs() / torch.maximum(a.abs(), b.abs())).item()


# --------------------------------------------------------------------------- the module


def double_backward(case: Case) -> dict[str, Tensor]:
    """`H v` as the gradient of `<gradient, v>`."""
    params = dict(case.module.named_parameters())
    leaves = tuple(params.values())
    slopes = backward(F.cross_entropy(case.module(case.x), case.y), leaves, create_graph=True)
    v = tree.flatten(case.v)
    product = backward(slopes, leaves, tuple(v[name] for name in params))
    return dict(zip(params, product, strict=True))


def gauss_newton_by_backward(case: Case) -> dict[str, Tensor]:
    """`J' H_L J v` by three backward passes."""
    params = dict(case.module.named_parameters())
    leaves = tuple(params.values())
    logits = case.module(case.x)
    v = tree.flatten(case.v)
    u = torch.zeros_like(logits, requires_grad=True)
    transposed = backward(logits, leaves, u, create_graph=True)
    (jv,) = backward(transposed, u, tuple(v[name] for name in params))
    top = logits.detach().requires_grad_()
    (slope,) = backward(F.cross_entropy(top, case.y), top, create_graph=True)
    (hjv,) = backward(slope, top, jv)
    product = backward(logits, leaves, hjv)
    return dict(zip(params, product, strict=True))


PRODUCTS: dict[str, tuple[Callable[[Case], Any], Callable[[Case], dict[str, Tensor]]]] = {
    "hessian": (hessian_product, double_backward),
    "gauss-newton": (gauss_newton_product, gauss_newton_by_backward),
}


def compared(ours: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> tuple[str, float]:
    """The worst leaf and its relative error in the 2-norm."""
    assert ours.keys() == want.keys(), f"leaves {sorted(ours)} against {sorted(want)}"
    errors = {}
    for name, leaf in want.items():
        assert leaf.dtype == ours[name].dtype == torch.float64, f"{name} is not float64"
        assert leaf.isfinite().all(), f"{name} of the module is not finite: nothing is proven"
        assert leaf.any(), f"{name} of the module is zero: nothing is proven"
        errors[name] = ((ours[name] - leaf).norm() / leaf.norm()).item()
    worst = max(errors, key=lambda name: errors[name])
    return worst, errors[worst]
