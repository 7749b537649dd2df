"""Curvature of generated networks, in float64: products, and the blocks of K-FAC and EKFAC."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from parity.properties.cases import batches, networks, normal_like
from parity.properties.per_sample import ROUNDING, bounded_loss
from parity.properties.table import needs, prop
from resnet_func import curvature, per_sample, tree
from resnet_func.testing import Batch, Network, assert_trees_near
from resnet_func.types import Params

NETWORKS, BATCHES = networks(), batches(samples=st.integers(2, 3))
SEEDS = st.integers(0, 2**16)


def assert_products_near(a: Tensor, b: Tensor, scale: Tensor) -> None:
    """Two inner products are near, relative to what they could be at most."""
    error = (a - b).abs() / scale.clamp(min=torch.finfo(scale.dtype).tiny)
    assert error <= 1e-8, f"{float(a):.6g} and {float(b):.6g} are {float(error):.2g} of their bound apart"


@prop(tolerance="fp64 1e-8", why=ROUNDING, network=NETWORKS, batch=BATCHES, seed=SEEDS)
def products_with_curvature_are_symmetric_and_linear(network: Network, batch: Batch, seed: int) -> None:
    """`<u, A v> = <A u, v>` and `A (2 u - 3 v) = 2 A u - 3 A v`: Hessian and Gauss-Newton products."""
    model, params, state = network
    u, v = normal_like(params, seed), normal_like(params, seed + 1)
    for transform in (curvature.hvp, curvature.ggn_vp):

        def product(w: Params, transform=transform) -> Params:
            return transform(model, bounded_loss, train=False)(params, state, batch.x, batch.y, w)

        au, av = product(u), product(v)
        scale = tree.norm(u) * tree.norm(av) + tree.norm(v) * tree.norm(au)
        assert_products_near(tree.dot(u, av), tree.dot(au, v), scale)
        mixed = product(tree.map(lambda a, b: 2 * a - 3 * b, u, v))
        assert_trees_near(mixed, tree.map(lambda a, b: 2 * a - 3 * b, au, av), 1e-8)


@prop(tolerance="fp64 1e-8", why=ROUNDING, network=NETWORKS, batch=BATCHES, seed=SEEDS)
def hessian_products_are_slopes_of_the_gradient(network: Network, batch: Batch, seed: int) -> None:
    """`hvp` is the derivative of the mean loss's gradient, by forward mode over reverse mode."""
    model, params, state = network
    v = normal_like(params, seed)

    def mean_loss(params: Params) -> Tensor:
        return bounded_loss(model.apply(params, state, batch.x, train=False)[0], batch.y).mean()

    found = curvature.hvp(model, bounded_loss, train=False)(params, state, batch.x, batch.y, v)
    slope = torch.func.jvp(torch.func.grad(mean_loss), (params,), (v,))[1]
    assert_trees_near(found, slope, 1e-8)


@prop(tolerance="fp64 1e-8", why=ROUNDING, network=NETWORKS, batch=BATCHES, seed=SEEDS)
def gauss_newton_forms_are_of_the_logits(network: Network, batch: Batch, seed: int) -> None:
    """`<u, G v>` is the mean over samples of `<J u, H J v>`, H the loss's own Hessian in the logits."""
    model, params, state = network
    u, v = normal_like(params, seed), normal_like(params, seed + 1)

    def logits(params: Params) -> Tensor:
        return model.apply(params, state, batch.x, train=False)[0]

    z = logits(params)
    ju, jv = (torch.func.jvp(logits, (params,), (w,))[1] for w in (u, v))
    hessian = torch.func.hessian(lambda z: bounded_loss(z, batch.y).sum())(z)
    form = torch.einsum("nc,ncmd,md->", ju, hessian, jv) / len(z)
    product = curvature.ggn_vp(model, bounded_loss, train=False)(params, state, batch.x, batch.y, v)
    assert_products_near(tree.dot(u, product), form, tree.norm(u) * tree.norm(product))


@prop(tolerance="fp64 1e-8", why=ROUNDING, network=NETWORKS, batch=BATCHES)
def traces_of_curvature_are_squared_gradients(network: Network, batch: Batch) -> None:
    """A leaf's block of the empirical EKFAC has the trace of its mean squared gradient; so has K-FAC's
    where the block is exact, as those of biases and affine weights are."""
    model, params, state = network
    grads = per_sample.grads(model, bounded_loss, train=False, check=False)(params, state, *batch)
    squares = {path: leaf.square().sum() / len(leaf) for path, leaf in tree.flatten(grads).items()}
    # a leaf's own may be zero, and then its traces are, too
    needs(any(square > 0 for square in squares.values()), "gradients")
    for transform, exact in ((curvature.ekfac, list(squares)), (curvature.kfac, one_dimensional(params))):
        run = transform(model, bounded_loss, fisher="empirical", train=False)
        blocks = run(params, state, [tuple(batch)]).blocks
        for path in exact:
            assert_trees_near(blocks[path].eigenvalues.sum(), squares[path], 1e-8)


def one_dimensional(params: Params) -> list[str]:
    return [path for path, leaf in tree.flatten(params).items() if leaf.ndim == 1]


@prop(tolerance="fp64 1e-8", why=ROUNDING, network=NETWORKS, batch=BATCHES, share=st.floats(0.01, 1))
def inverse_products_undo_products(network: Network, batch: Batch, share: float) -> None:
    """`(K + d)^-1 (K v + d v) = v` for EKFAC, whatever the tree v and the damping d."""
    model, params, state = network
    v = normal_like(params, 0)
    run = curvature.ekfac(model, bounded_loss, fisher="empirical", train=False)
    estimate = run(params, state, [tuple(batch)])
    damping = share * float(estimate.eigenvalues()[-1])
    needs(damping > 0, "curvature")
    damped = tree.map(lambda product, leaf: product + damping * leaf, estimate.product(v), v)
    assert_trees_near(estimate.inverse_product(damped, damping=damping), v, 1e-8)
