"""Contractions of one layer against autograd, one sample at a time, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resnet_func.per_sample.layers import contract
from resnet_func.per_sample.layers.factors import (
    ConvFactors,
    Derived,
    Direct,
    LinearFactors,
    Several,
    has_ghost,
    masked,
    num_samples,
    sample_slices,
)
from resnet_func.per_sample.layers.ghost import ConvSpec
from tests.per_sample.cases import convolutions, generator

SEEDS = st.integers(0, 2**32 - 1)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def conv(
    c_in: int, c_out: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1
) -> ConvSpec:
    shape = (c_out, c_in // groups, kernel, kernel)
    return ConvSpec(shape, (stride, stride), (padding, padding), (dilation, dilation), groups)


def conv_factors(spec: ConvSpec, height: int, width: int, n: int, views: int, seed: int) -> ConvFactors:
    image, weight = torch.empty(1, spec.c_in, height, width), torch.empty(spec.weight_shape)
    outputs = F.conv2d(image, weight, None, spec.stride, spec.padding, spec.dilation, spec.groups).shape[2:]
    return ConvFactors(
        spec,
        random(seed, *spec.weight_shape),
        random(seed + 1, views * n, spec.c_in, height, width),
        random(seed + 2, views * n, spec.c_out, *outputs),
        views,
    )


def conv_oracle(factors: ConvFactors) -> Tensor:
    """Per-sample gradients by autograd, a sample and a view at a time."""
    spec, n = factors.spec, factors.inputs.shape[0] // factors.views
    total = []
    for i in range(n):
        weight = factors.weight.clone().requires_grad_()
        loss = torch.zeros((), dtype=torch.float64)
        for view in range(factors.views):
            a, g = factors.inputs[view * n + i], factors.cotangents[view * n + i]
            y = F.conv2d(a[None], weight, None, spec.stride, spec.padding, spec.dilation, spec.groups)
            loss = loss + (y[0] * g).sum()
        total.append(torch.autograd.grad(loss, weight)[0])
    return torch.stack(total)


def close(actual: Tensor, expected: Tensor) -> None:
    scale = max(expected.abs().max().item(), 1e-3)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max().item() <= 1e-11 * scale


@settings(max_examples=60, deadline=None)
@given(case=convolutions(), n=st.integers(1, 3), views=st.integers(1, 2), seed=SEEDS)
def test_conv_contractions_match_autograd(
    case: tuple[ConvSpec, int, int], n: int, views: int, seed: int
) -> None:
    factors = conv_factors(*case, n, views, seed)
    expected = conv_oracle(factors)
    flat = expected.flatten(1)
    close(contract.grads(factors), expected)
    close(contract.squared_norms(factors, "materialize"), flat.square().sum(1))
    weights = torch.rand(n, generator=generator(seed), dtype=torch.float64)
    close(contract.weighted_sum(factors, weights), torch.einsum("n,n...->...", weights, expected))
    gram = flat @ flat.T
    close(contract.inner_products(factors, factors, "materialize", max_elements=1), gram)
    close(contract.squared_norms(factors, "ghost"), flat.square().sum(1))
    close(contract.inner_products(factors, factors, "ghost"), gram)


@pytest.mark.parametrize(
    ("spec", "side"),
    [
        (conv(2, 8, kernel=3, padding=1), 2),
        (conv(3, 8, kernel=3, stride=2, padding=1), 4),
        (conv(2, 18, kernel=3, padding=2, dilation=2), 3),
        (conv(4, 16, kernel=3, padding=1, groups=2), 2),
        (conv(2, 8, kernel=3), 4),
        (conv(4, 2, kernel=1, stride=2, groups=2), 5),
    ],
)
def test_few_pixels_are_contracted_by_a_product(spec: ConvSpec, side: int) -> None:
    factors = conv_factors(spec, side, side, 3, 1, seed=0)
    assert contract._fits_product(factors)
    close(contract.grads(factors), conv_oracle(factors))


@settings(max_examples=20, deadline=None)
@given(case=convolutions(), n=st.integers(1, 3), m=st.integers(1, 3), seed=SEEDS)
def test_inner_products_of_two_batches(case: tuple[ConvSpec, int, int], n: int, m: int, seed: int) -> None:
    a, b = conv_factors(*case, n, 2, seed), conv_factors(*case, m, 2, seed + 7)
    b = b._replace(weight=a.weight)
    expected = conv_oracle(a).flatten(1) @ conv_oracle(b).flatten(1).T
    close(contract.inner_products(a, b, "materialize"), expected)
    close(contract.inner_products(a, b, "ghost"), expected)


@pytest.mark.parametrize("views", [1, 3])
def test_linear_contractions_match_autograd(views: int) -> None:
    n, c_in, c_out = 4, 5, 3
    factors = LinearFactors(
        random(0, c_out, c_in), random(1, views * n, c_in), random(2, views * n, c_out), views
    )
    outer = torch.einsum("so,si->soi", factors.cotangents, factors.inputs)
    expected = outer.reshape(views, n, c_out, c_in).sum(0)
    flat, weights = expected.flatten(1), torch.rand(n, generator=generator(3), dtype=torch.float64)
    close(contract.grads(factors), expected)
    close(contract.weighted_sum(factors, weights), torch.einsum("n,noi->oi", weights, expected))
    close(contract.inner_products(factors, factors, "ghost"), flat @ flat.T)
    for way in ("ghost", "materialize"):
        close(contract.squared_norms(factors, way), flat.square().sum(1))


def test_materialized_norms_do_not_depend_on_the_slices() -> None:
    factors = conv_factors(conv(2, 3, 3, padding=1), 5, 6, 7, 2, seed=0)
    whole = sample_slices(factors)
    slices = sample_slices(factors, max_elements=3 * factors.weight.numel())
    assert [num_samples(part) for part in whole] == [7]
    assert [num_samples(part) for part in slices] == [3, 3, 1]
    close(torch.cat([contract.grads(part) for part in slices]), contract.grads(factors))


@pytest.mark.parametrize(("groups", "most", "expected"), [(1, 2, 2), (3, 1, 2), (3, 5, 4), (1, 99, 6)])
def test_output_channel_slices_respect_groups(groups: int, most: int, expected: int) -> None:
    slices = contract.output_channel_slices(conv(3, 6, 3, groups=groups), most)
    assert slices[0] == (0, expected)
    assert [stop for _, stop in slices[:-1]] == [start for start, _ in slices[1:]]
    assert slices[-1][1] == 6


def test_what_has_no_ghost_norm_says_so() -> None:
    factors = conv_factors(conv(2, 3, 3), 5, 5, 2, 1, seed=0)
    derived = Derived(lambda weight: 2 * weight, factors.weight, factors)
    assert has_ghost(factors)
    assert not has_ghost(derived)
    with pytest.raises(ValueError, match="no ghost norm"):
        contract.squared_norms(derived, "ghost")


def test_a_derived_leaf_is_pulled_back_and_several_uses_add_up() -> None:
    factors = conv_factors(conv(2, 3, 3), 5, 5, 3, 1, seed=0)
    doubled = Derived(lambda weight: 2 * weight, factors.weight, factors)
    both = Several(factors.weight, (factors, doubled))
    weights = torch.rand(3, generator=generator(1), dtype=torch.float64)
    expected = 3 * conv_oracle(factors)
    close(contract.grads(both), expected)
    close(contract.squared_norms(both, "materialize"), expected.flatten(1).square().sum(1))
    close(contract.weighted_sum(both, weights), torch.einsum("n,n...->...", weights, expected))
    close(contract.inner_products(both, both, "materialize"), expected.flatten(1) @ expected.flatten(1).T)


def test_masked_zeroes_what_is_not_finite() -> None:
    factors = conv_factors(conv(2, 3, 3), 4, 4, 3, 2, seed=0)
    factors.inputs[1] = torch.nan
    factors.cotangents[1 + 3] = torch.inf
    keep = torch.tensor([True, False, True])
    weights = torch.ones(3, dtype=torch.float64)
    expected = conv_oracle(factors)[keep].sum(0)
    close(contract.weighted_sum(masked(factors, keep), weights), expected)
    direct = Direct(torch.tensor([[1.0], [torch.nan], [2.0]]))
    assert contract.weighted_sum(masked(direct, keep), torch.ones(3)).item() == 3.0
