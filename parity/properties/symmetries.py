"""What can be done to parameters and images without changing a logit, or changing it by a known factor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import resnet_func as rf
from parity.properties.cases import SEEDS, Exact, batches, exact_cases, networks, same
from parity.properties.sums import WHY
from parity.properties.table import needs, prop
from resnet_func import testing, tree
from resnet_func.testing import Batch, Network, assert_trees_equal, generator
from resnet_func.types import Params

POWERS = "a power of two goes through every rounding of float32 unchanged"
EXPONENTS = st.sampled_from([-5, -2, -1, 1, 3, 6])

# Where a block's inner channels come from, what normalises them, and where they go.
INNER = {
    "basic": ("conv1", "bn1", "conv2"),
    "bottleneck": ("conv2", "bn2", "conv3"),
    "preact": ("conv1", "bn2", "conv2"),
}


def rotation(size: int, seed: int) -> Tensor:
    """A permutation that leaves nothing where it was."""
    return torch.arange(size).roll(1 + seed % (size - 1))


def map_weights(fn: Callable[[str, Tensor], Tensor], params: Params) -> Params:
    """`fn(path, weight)` on every convolution's weight."""
    return tree.map_with_path(lambda path, leaf: fn(path, leaf) if leaf.ndim == 4 else leaf, params)


# --------------------------------------------------------------------------- orders and reflections


@prop(tolerance="bitwise", why=WHY, case=exact_cases(), seed=SEEDS)
def inner_channels_have_no_order(case: Exact, seed: int) -> None:
    """Permuting the channels inside a block, with all that belongs to them, changes no logit."""
    config = case.config
    source, norm, target = (f"layer1.0.{layer}." for layer in INNER[config.block])
    width = config.inner_width(config.widths[0])
    # a grouped convolution's filters keep to their group
    inside = rotation(width // config.groups, seed)
    order = torch.cat([inside + first for first in range(0, width, len(inside))])

    def reorder(path: str, leaf: Tensor) -> Tensor:
        if path.startswith(target):
            return leaf[:, order]
        return leaf[order] if path.startswith((source, norm)) and leaf.ndim else leaf

    params, state = (tree.map_with_path(reorder, values) for values in (case.params, case.state))
    logits, _ = case.model.apply(params, state, case.x, train=False)
    same(logits, case.logits(case.params, case.x))


@prop(tolerance="bitwise", why=WHY, case=exact_cases(), seed=SEEDS)
def image_channels_have_no_order(case: Exact, seed: int) -> None:
    """Permuting the images' channels, and the first convolution's, changes no logit."""
    order = rotation(3, seed)
    stem = {"weight": case.params["conv1"]["weight"][:, order]}
    same(case.logits({**case.params, "conv1": stem}, case.x[:, order]), case.logits(case.params, case.x))


@prop(tolerance="bitwise", why=WHY, case=exact_cases(), seed=SEEDS)
def classes_have_no_order(case: Exact, seed: int) -> None:
    """Permuting the rows of the last layer permutes the logits."""
    order = rotation(3, seed)
    head = {name: leaf[order] for name, leaf in case.params["fc"].items()}
    logits = case.logits(case.params, case.x)
    same(case.logits({**case.params, "fc": head}, case.x), logits[:, order])


@prop(tolerance="bitwise", why=WHY, case=exact_cases(width=st.sampled_from([9, 17])))
def mirrored_kernels_see_mirrored_images_alike(case: Exact) -> None:
    """Flipping images and kernels changes no logit, where every stride meets an odd width."""
    params = map_weights(lambda _, weight: weight.flip(3), case.params)
    same(case.logits(params, case.x.flip(3)), case.logits(case.params, case.x))


@prop(tolerance="bitwise", why=WHY, case=exact_cases())
def rows_and_columns_can_be_exchanged(case: Exact) -> None:
    """Transposing images and kernels changes no logit."""
    params = map_weights(lambda _, weight: weight.transpose(2, 3), case.params)
    same(case.logits(params, case.x.transpose(2, 3)), case.logits(case.params, case.x))


# --------------------------------------------------------------------------- scales

PLAIN = networks(torch.float32, norms=["none"], weight_standardization=False)


@prop(tolerance="bitwise", why=POWERS, network=PLAIN, batch=batches(torch.float32), exponent=EXPONENTS)
def scales_pass_through_a_relu(network: Network, batch: Batch, exponent: int) -> None:
    """Without norms, a block's scale can move from one convolution to the next."""
    model, params, state = network
    source, _, target = (f"layer1.0.{layer}.weight" for layer in INNER[network.config.block])
    factors = {source: 2.0**exponent, target: 2.0**-exponent}
    moved = map_weights(lambda path, weight: weight * factors.get(path, 1.0), params)
    logits, _ = model.apply(params, state, batch.x, train=True)
    assert_trees_equal(model.apply(moved, state, batch.x, train=True)[0], logits)


@prop(tolerance="bitwise", why=POWERS, network=PLAIN, batch=batches(torch.float32), exponent=EXPONENTS)
def without_norms_a_network_is_homogeneous(network: Network, batch: Batch, exponent: int) -> None:
    """Without norms, scaling the images and the last bias scales the logits."""
    model, params, state = network
    head = {**params["fc"], "bias": params["fc"]["bias"] * 2.0**exponent}
    logits, _ = model.apply(params, state, batch.x, train=False)
    scaled, _ = model.apply({**params, "fc": head}, state, batch.x * 2.0**exponent, train=False)
    assert_trees_equal(scaled, logits * 2.0**exponent)


@prop(
    tolerance="bitwise",
    why=POWERS,
    network=networks(torch.float32),
    batch=batches(torch.float32),
    exponent=EXPONENTS,
)
def a_scaled_loss_has_scaled_gradients(network: Network, batch: Batch, exponent: int) -> None:
    """2^k times a loss has 2^k times its gradient, in training mode too."""
    model, params, state = network

    def grad(factor: float) -> Params:
        def loss(params: Params) -> Tensor:
            logits, _ = model.apply(params, state, batch.x, train=True)
            return factor * logits.square().sum()

        return torch.func.grad(loss)(params)

    assert_trees_equal(grad(2.0**exponent), tree.map(lambda g: 2.0**exponent * g, grad(1.0)))


@prop(
    tolerance="bitwise",
    why=POWERS + ", and eps=0 leaves Adam nothing of another scale",
    network=PLAIN,
    seed=SEEDS,
    exponent=EXPONENTS,
)
def adam_without_eps_does_not_see_the_scale_of_gradients(network: Network, seed: int, exponent: int) -> None:
    """`adam(eps=0)` moves parameters alike for gradients times any power of two."""
    optimizer = rf.optim.adam(0.01, eps=0.0)
    source = generator(seed)
    steps = [tree.map(lambda p: torch.randn(p.shape, generator=source), network.params) for _ in range(3)]

    def run(factor: float) -> Params:
        params, opt_state = network.params, optimizer.init(network.params)
        for grads in steps:
            updates, opt_state = optimizer.update(tree.map(lambda g: g * factor, grads), opt_state, params)
            params = rf.optim.apply_updates(params, updates)
        return params

    assert_trees_equal(run(2.0**exponent), run(1.0))


# --------------------------------------------------------------------------- shortcuts

TWO_STAGES = {"widths": (4, 8), "depths": (2, 1), "replace_stride_with_dilation": ()}


@prop(
    tolerance="bitwise",
    why="a product with 0 or 1 and a sum with 0 round nothing",
    network=networks(
        torch.float32, norms=["none"], shortcut="pad", weight_standardization=False, **TWO_STAGES
    ),
    batch=batches(torch.float32),
)
def padding_is_a_projection_of_zeros_and_ones(network: Network, batch: Batch) -> None:
    """An option-A shortcut is the projection whose kernel copies channels into the middle."""
    model, params, state = network
    projecting = rf.build(replace(network.config, shortcut="projection"))
    shapes, flat = tree.flatten(projecting.init(generator(0), device="meta")[0]), tree.flatten(params)

    def copying(c_out: int, c_in: int) -> Tensor:
        before = (c_out - c_in) // 2
        return F.pad(torch.eye(c_in), (0, 0, before, c_out - c_in - before))[:, :, None, None]

    copies = {path: copying(*leaf.shape[:2]) for path, leaf in shapes.items() if path not in flat}
    needs(copies, "a shortcut that pads")
    logits, _ = projecting.apply(tree.unflatten({**flat, **copies}), state, batch.x, train=True)
    same(logits, model.apply(params, state, batch.x, train=True)[0])


@prop(
    tolerance="bitwise",
    why="a sum with 0 rounds nothing",
    config=testing.configs().map(
        lambda c: replace(c, zero_init_residual=True, scale_norm=False, **TWO_STAGES)
    ),
    batch=batches(torch.float32),
    seed=SEEDS,
)
def a_zero_initialised_block_is_not_there(config: rf.ResNetConfig, batch: Batch, seed: int) -> None:
    """A block that starts with a zero last weight is its shortcut: without it the logits are the same."""
    model, without = rf.build(config), rf.build(replace(config, depths=(1, 1)))
    params, state = model.init(generator(seed))

    def drop(values: Params) -> Params:
        flat = {path: leaf for path, leaf in tree.flatten(values).items() if not path.startswith("layer1.1.")}
        return tree.unflatten(flat)

    logits, _ = model.apply(params, state, batch.x, train=True)
    needs((logits[0] != logits[1]).any(), "logits that depend on the image")
    same(without.apply(drop(params), drop(state), batch.x, train=True)[0], logits)
