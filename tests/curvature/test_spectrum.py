"""Spectra, traces and the linear operator against dense eigenvalues, scipy and curvlinops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn

import resnet_func as rf
from resnet_func import curvature
from resnet_func.testing import generator
from tests.curvature import oracles
from tests.curvature.oracles import assert_close

CROSS_ENTROPY = rf.losses.cross_entropy


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_extremes_and_trace_are_the_dense_ones(matrix) -> None:
    model, params, state = oracles.tiny()
    batches = [oracles.images(3, seed) for seed in (0, 1)]
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    dense = {"hessian": oracles.hessian, "ggn": oracles.ggn}[matrix](
        model, CROSS_ENTROPY, params, state, x, y
    )
    values = torch.linalg.eigvalsh(dense)
    run = curvature.spectrum(model, CROSS_ENTROPY, matrix=matrix, steps=40, starts=2)
    found = run(params, state, batches, generator=generator(0))
    assert found.dim == len(values)
    assert_close(found.largest(3), values.flip(0)[:3], 1e-8)
    if matrix == "hessian":
        assert_close(found.smallest(), values[:1], 1e-8)
    else:
        assert found.smallest() >= -1e-10 * values[-1]
    assert_close(found.weights.sum(1), torch.ones(2, dtype=torch.float64), 1e-12)
    # within its residual, every node has an eigenvalue
    distances = (found.nodes.unsqueeze(2) - values).abs().amin(2)
    assert (distances <= found.residuals + 1e-10 * values.abs().max()).all()
    probes = curvature.trace(model, CROSS_ENTROPY, matrix=matrix, probes=30)
    trace = probes(params, state, batches, generator=generator(1))
    assert trace.error > 0
    assert abs(trace.value - float(dense.trace())) <= 5 * trace.error


def test_a_run_that_has_seen_all_goes_on_elsewhere() -> None:
    model, params, state = rf.from_module(nn.Linear(5, 1).double())
    x = torch.ones(4, 5, dtype=torch.float64)  # one direction: rank 1, eigenvalues 6 and 0
    run = curvature.spectrum(model, rf.losses.squared_error, steps=6, starts=2)
    found = run(params, state, [(x, torch.zeros(4, 1, dtype=torch.float64))], generator=generator(0))
    assert_close(found.largest(6), torch.tensor([6.0, 0, 0, 0, 0, 0], dtype=torch.float64), 1e-10)
    assert found.negative_share() == 0
    assert_close(found.weights.sum(1), torch.ones(2, dtype=torch.float64), 1e-12)


def test_scipy_takes_the_operator() -> None:
    model, params, state = oracles.tiny()
    x, y = oracles.images(3)

    def last(path: str) -> bool:
        return path.startswith("fc.")

    operator = curvature.linear_operator(model, CROSS_ENTROPY, trainable=last)(params, state, [(x, y)])
    dense = oracles.hessian(model, CROSS_ENTROPY, params, state, x, y)[-operator.shape[0] :][
        :, -operator.shape[0] :
    ]
    assert operator.dtype == np.float64
    columns = operator @ np.eye(operator.shape[0])
    assert_close(torch.as_tensor(columns), dense, 1e-8)
    top = eigsh(operator, k=1, which="LA", v0=np.ones(operator.shape[0]), return_eigenvectors=False)
    assert_close(torch.as_tensor(top), torch.linalg.eigvalsh(dense)[-1:], 1e-8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_products_are_curvlinops(matrix) -> None:
    """On the same module, over the same batches."""
    curvlinops = pytest.importorskip("curvlinops")
    # theirs is forward over reverse mode, which torch's own GroupNorm has not
    model, params, state = oracles.tiny(norm="none")
    network = rf.to_module(model, params, state).double()
    batches = [oracles.images(3, 0), oracles.images(2, 1)]
    kind = curvlinops.HessianLinearOperator if matrix == "hessian" else curvlinops.GGNLinearOperator
    theirs = kind(network, nn.CrossEntropyLoss(), list(network.parameters()), batches)
    names = [name for name, _ in network.named_parameters()]
    v = oracles.random_like(params, 0)
    product = theirs @ [rf.tree.flatten(v)[name] for name in names]
    ours = curvature.linear_operator(model, CROSS_ENTROPY, matrix=matrix)(params, state, batches)
    mine = oracles.unflat(torch.as_tensor(ours @ oracles.flat(v).numpy()), params)
    for name, leaf in zip(names, product, strict=True):
        assert_close(rf.tree.flatten(mine)[name], leaf.detach(), 1e-6)


def test_mistakes_are_told_in_one_line() -> None:
    model, params, state = oracles.tiny()
    x, y = oracles.images(2)
    with pytest.raises(ValueError, match="matrix must be 'hessian' or 'ggn'; got 'fisher'"):
        curvature.spectrum(model, CROSS_ENTROPY, matrix="fisher")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps must be 1 or more; got 0"):
        curvature.spectrum(model, CROSS_ENTROPY, steps=0)
    with pytest.raises(ValueError, match="got an iterator"):
        curvature.trace(model, CROSS_ENTROPY)(params, state, iter([(x, y)]), generator=generator(0))
    with pytest.raises(ValueError, match="with samples; got none"):
        curvature.trace(model, CROSS_ENTROPY)(params, state, [], generator=generator(0))
