"""Blocks in Kronecker eigenbases against the dense matrices that they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from resnet_func import tree
from resnet_func.curvature.kronecker import Block, Factors, KroneckerEstimate, decompose
from resnet_func.testing import generator
from tests.curvature.oracles import assert_close


def positive(groups: int, side: int, source: torch.Generator) -> Tensor:
    rows = torch.randn(groups, side + 2, side, generator=source, dtype=torch.float64)
    return rows.mT @ rows


def dense(factors: Factors) -> Tensor:
    """The block-diagonal of Kronecker products, over entries in the order of a weight."""
    groups = max(len(factors.left), len(factors.right))
    pairs = zip(factors.left.expand(groups, -1, -1), factors.right.expand(groups, -1, -1), strict=True)
    return torch.block_diag(*[torch.kron(left, right) for left, right in pairs])


@given(
    seed=st.integers(0, 2**16),
    groups=st.integers(1, 3),
    out=st.integers(1, 3),
    inputs=st.integers(1, 4),
    shared=st.booleans(),
)
def test_a_block_is_its_dense_matrix(seed: int, groups: int, out: int, inputs: int, shared: bool) -> None:
    source = generator(seed)
    factors = Factors(positive(groups, out, source), positive(1 if shared else groups, inputs, source))
    block = decompose((groups * out, inputs, 1), factors)
    v = torch.randn(2, groups * out, inputs, 1, generator=source, dtype=torch.float64)
    matrix, vectors = dense(factors), v.flatten(1).T
    assert_close(block.product(v).flatten(1), (matrix @ vectors).T, 1e-10)
    damped = matrix + 0.1 * torch.eye(len(matrix), dtype=torch.float64)
    assert_close(block.inverse_product(v, 0.1).flatten(1), torch.linalg.solve(damped, vectors).T, 1e-8)
    mean = torch.linalg.eigvalsh(matrix).mean()
    relative = matrix + 0.1 * mean * torch.eye(len(matrix), dtype=torch.float64)
    found = KroneckerEstimate({"w": block}).inverse_product({"w": v})["w"]
    assert_close(found.flatten(1), torch.linalg.solve(relative, vectors).T, 1e-8)
    assert torch.equal(block.product(v[0]), block.product(v)[0])


def estimate(source: torch.Generator) -> KroneckerEstimate:
    weight = decompose((2, 3), Factors(positive(1, 2, source), positive(1, 3, source)))
    diagonal = positive(1, 4, source).diagonal(dim1=1, dim2=2).reshape(4, 1, 1)
    bias = decompose((4,), Factors(diagonal, torch.ones(1, 1, 1, dtype=torch.float64)))
    return KroneckerEstimate({"fc.weight": weight, "fc.bias": bias})


def test_an_estimate_takes_trees_and_batches_of_trees() -> None:
    source = generator(0)
    ours = estimate(source)
    batch = {
        "fc": {
            "weight": torch.randn(5, 2, 3, generator=source, dtype=torch.float64),
            "bias": torch.randn(5, 4, generator=source, dtype=torch.float64),
        },
        "other": torch.ones(5),
    }
    there_and_back = ours.inverse_product(ours.product(batch), damping=0.0)
    assert list(tree.flatten(there_and_back)) == ["fc.weight", "fc.bias"]
    for path, leaf in tree.flatten(there_and_back).items():
        assert_close(leaf, tree.flatten(batch)[path], 1e-8)
    one = tree.map(lambda leaf: leaf[3], batch)
    each = ours.product(batch)
    for path, leaf in tree.flatten(ours.product(one)).items():
        assert_close(leaf, tree.flatten(each)[path][3], 1e-12)
    values = ours.eigenvalues()
    assert values.shape == (10,)
    assert torch.equal(values, values.sort().values)
    assert_close(ours.trace(), values.sum(), 1e-12)


def test_dtypes_and_singular_blocks() -> None:
    block = Block((2,), torch.eye(2)[None], torch.ones(1, 1, 1), torch.tensor([[[0.0], [1.0]]]))
    ours = KroneckerEstimate({"bias": block})
    found = ours.inverse_product({"bias": torch.ones(2, dtype=torch.bfloat16)}, damping=1.0)
    assert found["bias"].dtype == torch.bfloat16
    assert found["bias"].tolist() == [1.0, 0.5]
    assert ours.inverse_product({"bias": torch.ones(2)}, damping=0.0)["bias"].isinf().tolist()[0]
    # a block of zeros is damped by the others' mean
    both = KroneckerEstimate({"bias": block, "dead": block._replace(eigenvalues=torch.zeros(1, 2, 1))})
    found = both.inverse_product({"bias": torch.ones(2), "dead": torch.ones(2)})
    assert_close(found["dead"], torch.tensor([40.0, 40.0]), 1e-6)


def test_mistakes_are_told_in_one_line() -> None:
    ours = estimate(generator(0))
    weight = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"the tree has not: fc.bias. Take restrict"):
        ours.product({"fc": {"weight": weight}})
    with pytest.raises(ValueError, match=r"fc.weight of \[2, 3\] or \[N, ...\]; got \[3, 2\]"):
        ours.product({"fc": {"weight": weight.T, "bias": torch.ones(4)}})
    for damping in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="damping must be 0 or more"):
            ours.inverse_product({"fc": {"weight": weight, "bias": torch.ones(4)}}, damping=damping)
