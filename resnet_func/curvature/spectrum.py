"""Eigenvalues of the Hessian or the Gauss-Newton matrix of a data set: extremes, density, trace."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, Unpack

import numpy as np
import torch
from rich.progress import track
from scipy.sparse.linalg import LinearOperator

from resnet_func import tree
from resnet_func.curvature.lanczos import Estimate, Spectrum, Vector, estimate, lanczos, quadrature
from resnet_func.curvature.products import Options, check_curvature_options, ggn_vp, hvp
from resnet_func.numerics import to_float64, widen
from resnet_func.train.trainable import trained_leaves
from resnet_func.types import LossFn, Model, Params, State

Matrix: TypeAlias = Literal["hessian", "ggn"]
Batches: TypeAlias = Collection[tuple[Any, Any]]


def spectrum(
    model: Model,
    loss_fn: LossFn,
    *,
    matrix: Matrix = "hessian",
    steps: int = 40,
    starts: int = 1,
    progress: bool = False,
    compiled: bool = False,
    **options: Unpack[Options],
) -> Callable[..., Spectrum]:
    """The spectrum of the mean loss's Hessian or Gauss-Newton matrix over a data set.

    Args:
        model, loss_fn: A network in evaluation mode, and a per-sample loss.
        matrix: "hessian", or "ggn" for the Gauss-Newton matrix, which has no negative eigenvalue where the
            loss is convex in the logits.
        steps: Products from each start; each of them passes over the data. As many vectors of the size of the
            parameters are held. 40 find the few largest eigenvalues and the shape of the rest.
        starts: Random starts, over which the density is averaged.
        progress: Show a progress bar.
        compiled: Put `torch.compile` around the product of a batch; pays in long runs over batches of one
            size.
        **options: `trainable`, `microbatch`, `train`: see `products.Options`.

    Returns:
        `fn(params, state, batches, *, generator) -> Spectrum`, for batches `(x, y)` that can be gone through
        again and again, such as a list. No more steps are taken than there are parameters.

    Raises:
        ValueError: an unknown matrix, steps or starts below 1, no samples, an iterator, or as in `hvp`.

    >>> import torch, resnet_func as rf
    >>> model, params, state = rf.from_module(torch.nn.Linear(2, 1, bias=False))
    >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
    >>> found = spectrum(model, rf.losses.squared_error)(
    ...     params, state, batches, generator=torch.Generator().manual_seed(0)
    ... )
    >>> found.nodes.round(decimals=4)
    tensor([[0.5000, 2.0000]], dtype=torch.float64)
    """
    _check_counts(steps=steps, starts=starts)
    operator = _Operator.of(model, loss_fn, matrix, compiled, options)
    return partial(_spectrum, operator, steps, starts, progress)


def trace(
    model: Model,
    loss_fn: LossFn,
    *,
    matrix: Matrix = "hessian",
    probes: int = 10,
    progress: bool = False,
    compiled: bool = False,
    **options: Unpack[Options],
) -> Callable[..., Estimate]:
    """The trace by Hutchinson's method: the mean of `<v, A v>` over random signs v, a product for each.

    Args:
        model, loss_fn, matrix, progress, compiled, **options: As in `spectrum`.
        probes: How many; the error falls as their root.

    Returns:
        `fn(params, state, batches, *, generator) -> Estimate`.

    Raises:
        ValueError: as in `spectrum`.

    >>> import torch, resnet_func as rf
    >>> model, params, state = rf.from_module(torch.nn.Linear(2, 1, bias=False))
    >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
    >>> run = trace(model, rf.losses.squared_error)
    >>> run(params, state, batches, generator=torch.Generator().manual_seed(0))  # exact: it is diagonal
    Estimate(value=2.5, error=0.0)
    """
    _check_counts(probes=probes)
    return partial(_trace, _Operator.of(model, loss_fn, matrix, compiled, options), probes, progress)


def linear_operator(
    model: Model,
    loss_fn: LossFn,
    *,
    matrix: Matrix = "hessian",
    compiled: bool = False,
    **options: Unpack[Options],
) -> Callable[[Params, State, Batches], LinearOperator]:
    """The matrix as a scipy `LinearOperator`, for `scipy.sparse.linalg`: `eigsh`, `cg`, ...

    Args:
        model, loss_fn, matrix, compiled, **options: As in `spectrum`.

    Returns:
        `fn(params, state, batches) -> LinearOperator [D, D]` over the trainable entries, in the order of
        `tree.flatten(params)`.

    Raises:
        ValueError: as in `spectrum`.

    >>> import torch, resnet_func as rf
    >>> model, params, state = rf.from_module(torch.nn.Linear(2, 1, bias=False))
    >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
    >>> linear_operator(model, rf.losses.squared_error)(params, state, batches) @ np.array([1.0, 1.0])
    array([0.5, 2. ], dtype=float32)
    """
    return partial(_scipy, _Operator.of(model, loss_fn, matrix, compiled, options))


# --------------------------------------------------------------------------- products over a data set


class _Operator(NamedTuple):
    """A product of a batch, and which leaves it is over."""

    product: Callable[..., Params]
    trainable: Callable[[str], bool]

    @classmethod
    def of(cls, model: Model, loss_fn: LossFn, matrix: str, compiled: bool, options: Options) -> _Operator:
        if matrix not in ("hessian", "ggn"):
            raise ValueError(f"matrix must be 'hessian' or 'ggn'; got {matrix!r}")
        product = (hvp if matrix == "hessian" else ggn_vp)(model, loss_fn, **options)
        trainable = check_curvature_options(model, loss_fn, options).trainable
        return cls(torch.compile(product) if compiled else product, trainable)

    def over(
        self, params: Params, state: State, batches: Batches
    ) -> tuple[Callable[[Vector], Vector], Vector]:
        """The product with a flat vector over all batches, and a vector of zeros like it."""
        if iter(batches) is batches:
            raise ValueError("the batches are gone through many times; got an iterator. Pass list(batches)")
        counts = [tree.leaves(x)[0].shape[0] for x, _ in batches]
        if sum(counts) == 0:
            raise ValueError("expected at least one batch (x, y) with samples; got none")
        leaves = trained_leaves(params, self.trainable)
        zeros = torch.cat([torch.zeros_like(widen(leaf)).flatten() for leaf in leaves.values()])
        sizes = [leaf.numel() for leaf in leaves.values()]

        def apply(vector: Vector) -> Vector:
            pieces = zip(leaves.items(), vector.split(sizes), strict=True)
            direction = tree.select(
                params, {path: piece.reshape(leaf.shape).to(leaf.dtype) for (path, leaf), piece in pieces}
            )
            total = torch.zeros_like(vector)
            for (x, y), count in zip(batches, counts, strict=True):
                found = tree.flatten(self.product(params, state, x, y, direction))
                flat = torch.cat([widen(found[path]).flatten() for path in leaves])
                total = total + flat * (count / sum(counts))
            return total

        return apply, zeros


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be 1 or more; got {count}")


def _scipy(operator: _Operator, params: Params, state: State, batches: Batches) -> LinearOperator:
    apply, zeros = operator.over(params, state, batches)

    def multiply(vector: np.ndarray) -> np.ndarray:
        return apply(torch.as_tensor(vector.reshape(-1)).to(zeros)).cpu().numpy()

    size, dtype = zeros.numel(), zeros.cpu().numpy().dtype
    return LinearOperator((size, size), matvec=multiply, rmatvec=multiply, dtype=dtype)  # type: ignore[call-arg]


# --------------------------------------------------------------------------- probes and runs


def _trace(
    operator: _Operator,
    probes: int,
    progress: bool,
    params: Params,
    state: State,
    batches: Batches,
    *,
    generator: torch.Generator,
) -> Estimate:
    apply, zeros = operator.over(params, state, batches)
    products = []
    for _ in track(range(probes), "trace", disable=not progress):
        coins = torch.randint(0, 2, zeros.shape, generator=generator, device=generator.device)
        signs = coins.to(zeros) * 2 - 1
        products.append(to_float64(signs * apply(signs)).sum().cpu())
    return estimate(torch.stack(products))


def _spectrum(
    operator: _Operator,
    steps: int,
    starts: int,
    progress: bool,
    params: Params,
    state: State,
    batches: Batches,
    *,
    generator: torch.Generator,
) -> Spectrum:
    apply, zeros = operator.over(params, state, batches)
    steps = min(steps, zeros.numel())

    def draw() -> Vector:
        return torch.randn(zeros.shape, generator=generator, device=generator.device, dtype=zeros.dtype).to(
            zeros
        )

    runs = []
    for start in range(starts):
        turns = track(range(steps), f"spectrum {start + 1}/{starts}", total=steps, disable=not progress)
        runs.append(quadrature(*lanczos(apply, draw, turns)))
    return Spectrum(*[torch.stack(column) for column in zip(*runs, strict=True)], dim=zeros.numel())
