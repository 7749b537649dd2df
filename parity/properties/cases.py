"""What the properties draw: networks and images on which every sum is exact, and random ones in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import resnet_func as rf
from resnet_func import testing, tree
from resnet_func.models.layers import NORM_EPS
from resnet_func.per_sample.intercept import Calls, Interception
from resnet_func.testing import generator
from resnet_func.testing.assertions import named_leaves
from resnet_func.types import Model, Params, State

SEEDS = st.integers(0, 2**32 - 1)
EXACT_BITS = 53  # of a float64
# As He et al., Zagoruyko and Komodakis and torchvision have them
AS_PUBLISHED: dict[str, Any] = {
    "activation_order": None,
    "standardization_affine": False,
    "scale_norm": False,
}

# --------------------------------------------------------------------------- exact data


class _Exact(NamedTuple):
    model: Model
    params: Params
    state: State
    x: Tensor
    y: Tensor


class Exact(_Exact):
    """A network and a batch whose logits and gradients are exact in float64; `y [N, classes]` are cotangents.

    It prints as the call it came from.
    """

    config: rf.ResNetConfig
    made_by: str

    def __repr__(self) -> str:
        return self.made_by

    def grads(self, x: Tensor, y: Tensor) -> Params:
        """The gradient of `<logits, y>` with respect to the parameters."""
        return torch.func.grad(lambda params: linear_loss(self.logits(params, x), y).sum())(self.params)

    def logits(self, params: Params, x: Tensor) -> Tensor:
        return self.model.apply(params, self.state, x, train=False)[0]


def linear_loss(logits: Tensor, y: Tensor) -> Tensor:
    """A per-sample loss that rounds nothing."""
    return (logits * y).sum(1)


def exact(config: rf.ResNetConfig, shape: tuple[int, ...], seed: int) -> Exact:
    """The first case from a seed that is alive: whose logits and gradients depend on the images.

    Every other network of such weights is dead somewhere, and would make any property trivial.
    """
    source = generator(seed)
    drawn = next((case for case in (_draw(config, shape, source) for _ in range(100)) if alive(case)), None)
    assert drawn is not None, f"{config}: no network is alive"
    drawn.config = config
    drawn.made_by = f"exact({config}, {shape}, {seed})"
    assert bits(drawn) <= EXACT_BITS, f"{drawn}: sums of {bits(drawn)} bits are not exact"
    return drawn


def _draw(config: rf.ResNetConfig, shape: tuple[int, ...], source: torch.Generator) -> Exact:
    """Weights -1, 0, 1; small integers elsewhere; running variances with a root that is a power of two."""
    model = rf.build(config)

    def integers(leaf: Tensor, *values: int) -> Tensor:
        choice = torch.randint(len(values), leaf.shape, generator=source)
        return torch.tensor(values, dtype=torch.float64)[choice]

    def parameter(path: str, leaf: Tensor) -> Tensor:
        affine = leaf.ndim == 1 and path.endswith("weight")
        return integers(leaf, -1, 1) if affine else integers(leaf, -1, 0, 0, 1)

    def statistic(path: str, leaf: Tensor) -> Tensor:
        if path.endswith("num_batches_tracked"):
            return leaf + 3
        return integers(leaf, 1, 4) - NORM_EPS if path.endswith("var") else integers(leaf, -2, -1, 1, 2)

    params, state = model.init(source, dtype=torch.float64)
    x, y = torch.empty(shape), torch.empty(shape[0], config.num_classes)
    return Exact(
        model,
        tree.map_with_path(parameter, params),
        tree.map_with_path(statistic, state),
        integers(x, -2, -1, 0, 1, 2),
        integers(y, -2, -1, 1, 2),
    )


def alive(case: Exact) -> bool:
    """Whether the first weight has a gradient and the samples have logits of their own."""
    distinct = len(case.logits(case.params, case.x).unique(dim=0)) == len(case.x)
    return distinct and bool(case.grads(case.x, case.y)["conv1"]["weight"].any())


def bits(case: Exact) -> int:
    """A bound on the bits of any partial sum, forward and backward.

    Without signs nothing cancels and no ReLU closes, so the largest number of that network bounds all partial
    sums of the real one. The smallest step is halved by each BatchNorm, and by the final mean over pixels.
    """
    params = tree.map(torch.abs, case.params)
    state = tree.map_with_path(lambda p, s: -s.abs() if p.endswith("mean") else s, case.state)
    unsigned = Exact(case.model, params, state, case.x.abs(), case.y.abs())
    calls = Calls(tree.flatten(params), tree.leaves(state), len(unsigned.x), edges=False)
    with Interception(calls):
        logits, _ = case.model.apply(params, state, unsigned.x, train=False)
    inputs = [call.args[0] for call in calls.calls if call.func in (torch.conv2d, F.linear)]
    grads = unsigned.grads(unsigned.x, unsigned.y)
    largest = max(leaf.max().item() for leaf in [logits, *inputs, *tree.leaves(grads)])
    halvings = sum(path.endswith("running_var") for path in named_leaves(state))
    pixels = case.x.shape[2] * case.x.shape[3]
    # one more: what a BatchNorm halves was twice as large before
    return 1 + int(largest * pixels).bit_length() + halvings


@st.composite
def exact_cases(
    draw: st.DrawFn,
    *,
    samples: st.SearchStrategy[int] = st.integers(2, 4),  # noqa: B008
    width: st.SearchStrategy[int] = st.sampled_from([8, 16]),  # noqa: B008
    **configs: Any,
) -> Exact:
    """Exact cases; one block in each stage, since every further one needs ten more bits."""
    config = draw(testing.configs(**{"norms": ("none", "batch"), **configs}))
    config = replace(config, depths=(1,) * len(config.widths), weight_standardization=False, **AS_PUBLISHED)
    height = draw(st.sampled_from([8, 16]))  # powers of two, so that the mean over pixels is exact
    return exact(config, (draw(samples), config.in_channels, height, draw(width)), draw(SEEDS))


# --------------------------------------------------------------------------- random data


def networks(dtype: torch.dtype = torch.float64, /, **fields: Any) -> st.SearchStrategy[testing.Network]:
    """Random networks; `blocks` and `norms` restrict the configs, other fields are set in each."""
    choice = {name: fields.pop(name) for name in ("blocks", "norms") if name in fields}
    if fields.get("weight_standardization") is False:
        fields = {"standardization_affine": False, **fields}
    return testing.models(
        testing.configs(**choice).map(lambda config: replace(config, **fields)), dtype=dtype
    )


def batches(dtype: torch.dtype = torch.float64, /, **sizes: Any) -> st.SearchStrategy[testing.Batch]:
    return testing.batches(dtype=dtype, **sizes)


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def normal_like(values: Any, seed: int) -> Any:
    """A tree of the same structure with normal leaves."""
    source = generator(seed)
    return tree.map(lambda leaf: torch.randn(leaf.shape, generator=source, dtype=leaf.dtype), values)


# --------------------------------------------------------------------------- comparison


def same(got: Any, want: Any) -> None:
    """Equal to the bit, but for the sign of a zero: that depends on the order even of an exact sum."""
    unsigned = (tree.map(lambda leaf: leaf + 0, values) for values in (got, want))
    testing.assert_trees_equal(*unsigned)
