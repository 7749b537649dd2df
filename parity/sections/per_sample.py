"""Per-sample quantities of any network, against a loop of single backward passes, in float64.

The networks are torchvision's and timm's own modules and some written by hand: the fast path knows nothing of
them. Every sample's gradient is that of plain autograd on a batch of one; what a quantity is of gradients is
written out here. Each leaf of each quantity is right to `RTOL` of its largest entry, or of a thousandth of
the largest of all. What is `wrapped` computes something else than its network, and is compared with
`method="vmap"`: to as much again, in mixed precision as near as rounding every layer's output in float32
to bfloat16 allows. The figure is the worst error, and which quantity has it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import resnet_func as rf
from parity.cell import Cell
from parity.rounding import assert_rounded, rounding_noise
from parity.sections.per_sample_definitions import (
    Gradients,
    automatic_clipping,
    flat_clipping,
    layer_clipping,
    loop,
    loss_fn,
    moments,
    sketched,
)
from parity.sections.per_sample_networks import CLASSES, HAND_WRITTEN, SPECS, Case, case, double
from parity.steps import perturbed
from resnet_func import losses, tree
from resnet_func import per_sample as ps
from resnet_func.models import winograd
from resnet_func.testing import assert_trees_equal, generator, randn
from resnet_func.testing.assertions import relative_errors
from resnet_func.types import Apply, Model, Params, State

RTOL = 1e-10
QUICK = ("torchvision:resnet18-group", "wrapped-flips", "wrapped-autocast", *HAND_WRITTEN)
METHODS = ("auto", "vmap")
OPTIONS: dict[str, Any] = {"train": False, "check": False}


def cells(quick: bool) -> list[Cell]:
    checks = {
        **{name: partial(check_network, name) for name in (*SPECS, *HAND_WRITTEN)},
        **{f"wrapped-{name}": partial(check_wrapped, name) for name in WRAPPERS},
        "wrapped-autocast": check_autocast,
    }
    return [Cell("per-sample", name, check) for name, check in checks.items() if not quick or name in QUICK]


# --------------------------------------------------------------------------- every quantity


class Quantity(NamedTuple):
    """A transform of a case, with its options, and what it is of the gradients."""

    computed: Callable[..., Any]
    defined: Callable[[Case, Gradients], Any]


def clipping(defined: Callable[[Gradients, float], Any], **how: Any) -> Quantity:
    def computed(case: Case, bound: float, **options: Any) -> Any:
        return ps.clipped_sum(case.model, loss_fn, max_norm=bound, **how, **options)(*case[1:])

    return Quantity(computed, lambda case, of: defined(of, bound_of(of)))


def bound_of(of: Gradients) -> float:
    """A norm that some gradients exceed and some do not."""
    return float(of.norms.mean())


def directions(case: Case) -> Any:
    source = generator(4)
    return tree.map(lambda leaf: torch.randn(leaf.shape, generator=source, dtype=leaf.dtype), case.params)


def dots(case: Case, of: Gradients) -> Tensor:
    along = tree.flatten(directions(case))
    return torch.stack([(g * along[path]).flatten(1).sum(1) for path, g in of.grads.items()]).sum(0)


def batch_by_batch(case: Case, bound: float, **options: Any) -> Any:
    names = ("norms", "loss", "el2n", "correct")
    batches = [(case.x[part], case.y[part]) for part in (slice(1), slice(1, None))]
    found = ps.over_dataset(case.model, loss_fn, names, **options)(case.params, case.state, batches)
    return tuple(found[name] for name in names)


def of_the_data_set(case: Case, of: Gradients) -> Any:
    truth = torch.eye(CLASSES, dtype=of.logits.dtype)[case.y]
    el2n = (of.logits.softmax(1) - truth).square().sum(1).sqrt()
    return of.norms, of.losses, el2n, (of.logits.argmax(1) == case.y).to(of.logits.dtype)


def moments_of(case: Case, bound: float, **options: Any) -> Any:
    found = ps.moments(case.model, loss_fn, **options)(*case[1:])
    return found.mean, found.second_moment, torch.stack(found.noise_scale[1:])


def plain(name: str, defined: Callable[[Case, Gradients], Any], **more: Any) -> Quantity:
    def computed(case: Case, bound: float, **options: Any) -> Any:
        return getattr(ps, name)(case.model, loss_fn, **more, **options)(*case[1:])

    return Quantity(computed, defined)


def of_pairs(name: str, defined: Callable[[Case, Gradients], Any]) -> Quantity:
    def computed(case: Case, bound: float, **options: Any) -> Any:
        batch = (case.x, case.y)
        return getattr(ps, name)(case.model, loss_fn, **options)(case.params, case.state, batch)

    return Quantity(computed, defined)


QUANTITIES = {
    "grads": plain("grads", lambda case, of: of.grads),
    "norms": plain("norms", lambda case, of: of.norms),
    "layer_norms": plain("layer_norms", lambda case, of: of.layer_norms()),
    "clipped_sum": clipping(flat_clipping),
    "clipped_sum per_layer": clipping(layer_clipping, clipping="per_layer"),
    "clipped_sum automatic": clipping(automatic_clipping, clipping="automatic"),
    "moments": Quantity(moments_of, lambda case, of: moments(of)),
    "sketch factorized": plain("sketch", lambda case, of: sketched(of, "factorized", 16), dim=16),
    "sketch dense": plain("sketch", lambda case, of: sketched(of, "dense", 2), dim=2, projection="dense"),
    "gram": of_pairs("gram", lambda case, of: of.products(list(of.grads))),
    "layer_grams": of_pairs(
        "layer_grams", lambda case, of: {layer: of.products(paths) for layer, paths in of.layers.items()}
    ),
    "ntk": Quantity(
        lambda case, bound, **options: ps.ntk(case.model, 1, **options)(case.params, case.state, case.x),
        lambda case, of: (alone := loop(case, losses.logit(0))).products(list(alone.grads)),
    ),
    "dot": Quantity(
        lambda case, bound, **options: ps.dot(case.model, loss_fn, **options)(
            case.params, case.state, case.x, case.y, directions(case)
        ),
        dots,
    ),
    "over_dataset": Quantity(batch_by_batch, of_the_data_set),
}


def check_network(name: str) -> str:
    """Every quantity by the default method against its definition."""
    network = case(name)
    of = loop(network)
    assert all(g.isfinite().all() for g in of.grads.values()), "the loop is not finite: nothing is proven"
    bound = bound_of(of)
    return worst_of(
        lambda quantity: (quantity.computed(network, bound, **OPTIONS), quantity.defined(network, of))
    )


def worst_of(make: Callable[[Quantity], tuple[Any, Any]]) -> str:
    """The worst error of all quantities, and which has it; one after another, since each may be large.

    Raises:
        AssertionError: it is above `RTOL`.
    """
    errors = {}
    for name, quantity in QUANTITIES.items():
        got, want = make(quantity)
        for pair in zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]:
            errors |= {f"{name}, {leaf}": error for leaf, error in relative_errors(*pair).items()}
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    assert errors[worst] <= RTOL, f"worst {worst}: relative error {errors[worst]:.3g}, allowed {RTOL:.3g}"
    return f"{errors[worst]:.1e} ({worst})"


# --------------------------------------------------------------------------- wrapped networks


def squares_too(
    apply: Apply, params: Params, state: State, x: Tensor, *, train: bool
) -> tuple[Tensor, State]:
    """A wrapper of somebody's own: the network of the image and of its square."""
    logits, state = apply(params, state, x, train=train)
    return logits - 2 * apply(params, state, x.square(), train=train)[0], state


WRAPPERS: dict[str, Callable[[Model], Model]] = {
    "flips": rf.train.average_flips,
    "winograd": rf.winograd.wrap,
    "flips-of-winograd": lambda model: rf.train.average_flips(rf.winograd.wrap(model)),
    "somebodys-own": lambda model: model._replace(apply=partial(squares_too, model.apply)),
}


def small_network(dtype: torch.dtype) -> Case:
    config = {"widths": (8, 16), "norm": "group", "norm_groups": 4, "shortcut": "projection"}
    model = rf.resnet20(depths=(1, 1), num_classes=CLASSES, **config)
    params, state = perturbed(*model.init(generator(0), dtype=dtype), seed=2)
    return Case(model, params, state, randn(3, 3, 9, 8, seed=1, dtype=dtype), torch.arange(3) % CLASSES)


def check_wrapped(name: str) -> str:
    """Every quantity of a wrapped network by the default method and by `vmap`."""
    network = small_network(torch.float64)
    network = network._replace(model=WRAPPERS[name](network.model))
    with (  # as if tiles and products paid for every convolution
        mock.patch.object(winograd, "cheapest_tile", return_value=4),
        mock.patch.object(winograd, "product_pays", return_value=True),
    ):
        bound = bound_of(loop(network))

        def both(quantity: Quantity) -> tuple[Any, Any]:
            fast, slow = (quantity.computed(network, bound, **OPTIONS, method=method) for method in METHODS)
            return fast, slow

        return worst_of(both)


def check_autocast() -> str:
    """Gradients and norms in mixed precision by the default method and by `vmap`, and the very losses."""
    exact = small_network(torch.float32)
    narrow = exact._replace(model=rf.train.autocast(exact.model, "cpu", torch.bfloat16))
    logits, _ = narrow.model.apply(*narrow[1:4], train=False)
    found = ps.over_dataset(narrow.model, loss_fn, ["loss"], **OPTIONS)(*narrow[1:3], [narrow[3:]])
    assert_trees_equal(found["loss"], loss_fn(logits, narrow.y))
    fast, slow = (
        tree.flatten(ps.grads(narrow.model, loss_fn, method=method, **OPTIONS)(*narrow[1:]))
        for method in METHODS
    )
    exact = Case(exact.model, *tree.map(double, tuple(exact[1:])))
    noise = rounding_noise(exact.params, torch.bfloat16)
    for of_one_way in (slow, fast):
        share = assert_rounded(of_one_way, lambda: loop(exact).grads, noise)
    apart = max(relative_errors(fast, slow).values())
    return f"grads are {share}, {apart:.1e} from vmap's; losses bitwise"
