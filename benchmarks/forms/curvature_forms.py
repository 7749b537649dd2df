"""Products of a batch's Hessian or Gauss-Newton matrix with a direction: ours, curvlinops's, JAX's.

All are of the mean cross-entropy of the same network in evaluation mode, in float32, along one direction.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import import_module, util
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.forms import networks
from benchmarks.forms.networks import Case
from benchmarks.forms.step import NOISE_DRAWS
from benchmarks.harness.conditions import compiled
from benchmarks.harness.measure import Skipped, Variant, relative_distance
from parity.rounding import LayerNoise, rounding_noise
from resnet_func import curvature, tree
from resnet_func.app import runtime
from resnet_func.losses import cross_entropy
from resnet_func.types import Params

PRODUCTS: dict[str, Callable[..., Any]] = {"hessian": curvature.hvp, "ggn": curvature.ggn_vp}
BASELINE, AGAIN = "ours, eager", "ours again, eager"
FORMS = (BASELINE, AGAIN, "ours, compiled", "curvlinops, eager", "JAX, jit")


class Work(NamedTuple):
    """One form of one product."""

    form: str
    product: str
    case: Case
    direction: Params
    backend: str


def make_direction(case: Case) -> Params:
    """A tree of normal numbers like the parameters."""
    source = torch.Generator().manual_seed(2)
    return tree.map(lambda leaf: torch.randn(leaf.shape, generator=source).to(leaf.device), case.params)


def make_variant(work: Work) -> Variant:
    """The product in that form.

    Raises:
        Skipped: it cannot run here.
    """
    if work.form.startswith("curvlinops"):
        make = _curvlinops(work)
    elif work.form.startswith("JAX"):
        make = _jax(work)
    else:
        make = _ours(work)
    found: list[Params] = []

    def step() -> None:
        found[:] = [make()]

    return Variant(step, lambda: {"product": as_vector(found[0])}, "fp32")


def make_gradient(case: Case) -> Callable[[], Any]:
    """The gradient of the mean loss by `torch.func`: what the price of a product is told in."""

    def loss(params: Params) -> Tensor:
        return cross_entropy(case.model.apply(params, case.state, case.x, train=False)[0], case.y).mean()

    return partial(torch.func.grad(loss), case.params)


def as_vector(product: Params) -> Tensor:
    """All entries, by the leaves' paths."""
    return torch.cat([leaf.detach().flatten() for _, leaf in sorted(tree.flatten(product).items())])


def allowed_distances(work: Work) -> Callable[[str], Mapping[str, float]]:
    """How far rounding may lead, measured: our product again with noise of its size on every layer."""
    make = _ours(work._replace(form=BASELINE))

    @cache
    def allowed(dtype: str) -> dict[str, float]:
        exact, size = as_vector(make()), rounding_noise(work.case.params, torch.float32) / 2
        moved = [size]
        for seed in range(NOISE_DRAWS):
            with LayerNoise(size, seed):
                moved.append(relative_distance(as_vector(make()), exact))
        return {"product": max(moved)}

    return allowed


# --------------------------------------------------------------------------- the forms


def _ours(work: Work) -> Callable[[], Params]:
    case = work.case
    product = PRODUCTS[work.product](case.model, cross_entropy, train=False)
    if "compiled" in work.form:
        obstacle = runtime.compile_obstacle(case.x.device)
        if obstacle:
            raise Skipped(obstacle)
        product = compiled(product, work.backend)
    return partial(product, case.params, case.state, case.x, case.y, work.direction)


def _curvlinops(work: Work) -> Callable[[], Params]:
    """Its linear operator of the module, on one batch, without its checks."""
    if util.find_spec("curvlinops") is None:
        raise Skipped("curvlinops is not installed; the extra `bench` has it")
    with warnings.catch_warnings():  # BackPACK's, at import
        warnings.simplefilter("ignore")
        curvlinops = import_module("curvlinops")
    module, case = networks.make_module(work.case).eval(), work.case
    named = dict(module.to(case.x.device).named_parameters())
    kind = {"hessian": curvlinops.HessianLinearOperator, "ggn": curvlinops.GGNLinearOperator}[work.product]
    operator = kind(
        module,
        nn.CrossEntropyLoss(),
        list(named.values()),
        [(case.x, case.y)],
        check_deterministic=False,
        num_data=len(case.x),
    )
    flat = tree.flatten(work.direction)
    direction = [flat[name] for name in named]
    return lambda: dict(zip(named, operator @ direction, strict=True))


def _jax(work: Work) -> Callable[[], Params]:
    """`jit` of `jvp(grad)`, or of `jvp` and `vjp` around the loss's own Hessian."""
    if util.find_spec("jax") is None:
        raise Skipped("JAX is not installed; the extra `bench` has it")
    os.environ.setdefault("NPROC", str(torch.get_num_threads()))  # as many threads as torch; read once
    jax, jnp = import_module("jax"), import_module("jax.numpy")
    case = work.case
    if case.x.is_cuda and jax.default_backend() != "gpu":
        raise Skipped("JAX sees no GPU: its CUDA build is not installed")
    oracle = import_module("parity.sections.oracle_jax")
    params, state, x, y, direction = tree.map(
        lambda leaf: jnp.asarray(leaf.detach().cpu().numpy()),
        (case.params, case.state, case.x, case.y, work.direction),
    )

    def network(params: Any) -> Any:
        return oracle.apply(case.model.config, params, state, x, train=False)[0]

    def loss(logits: Any) -> Any:
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    def hessian(params: Any, direction: Any) -> Any:
        return jax.jvp(jax.grad(lambda params: loss(network(params))), (params,), (direction,))[1]

    def ggn(params: Any, direction: Any) -> Any:
        logits, tangent = jax.jvp(network, (params,), (direction,))
        back = jax.jvp(jax.grad(loss), (logits,), (tangent,))[1]
        return jax.vjp(network, params)[1](back)[0]

    run = jax.jit({"hessian": hessian, "ggn": ggn}[work.product])

    def step() -> Params:
        product = jax.block_until_ready(run(params, direction))
        return tree.map(lambda leaf: torch.from_numpy(np.array(leaf)), product)

    return step
