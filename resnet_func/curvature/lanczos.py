"""Lanczos's method: eigenvalues of a symmetric matrix that is known by its products alone.

From a random start (Golub and Welsch 1969; for networks Ghorbani et al. 2019,
https://arxiv.org/abs/1901.10159) m products give a quadrature of the whole density of the eigenvalues, whose
outermost nodes are the extreme ones. Every new vector is made orthogonal to all before, so that no eigenvalue
comes twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from resnet_func.numerics import to_float64

Vector: TypeAlias = Float[Tensor, "d"]
# Of the largest eigenvalue in size. Nearer to zero, one node stands for many eigenvalues of either sign.
NEAR_ZERO = 0.01


class Estimate(NamedTuple):
    """A mean over random probes and its standard error; NaN from one probe."""

    value: float
    error: float


class Spectrum(NamedTuple):
    """A quadrature of the eigenvalues' density, from some random starts; all in float64 on the CPU.

    Args:
        nodes: `[starts, steps]`, each row ascending.
        weights: The share of all eigenvalues that each node stands for; each row sums to 1.
        residuals: Within so much of a node there is an eigenvalue.
        dim: The number of eigenvalues.
    """

    nodes: Float[Tensor, "starts steps"]
    weights: Float[Tensor, "starts steps"]
    residuals: Float[Tensor, "starts steps"]
    dim: int

    def largest(self, count: int = 1) -> Float[Tensor, "count"]:
        """The largest eigenvalues, in descending order, as the start saw them that saw the largest.

        The first come first: with too few steps the later ones are too small. `residuals` bounds the errors.
        """
        return self.nodes[self.nodes.amax(1).argmax()].flip(0)[:count]

    def smallest(self, count: int = 1) -> Float[Tensor, "count"]:
        """The smallest (most negative) eigenvalues, in ascending order; as `largest`."""
        return self.nodes[self.nodes.amin(1).argmin()][:count]

    def negative_part(self) -> Spectrum:
        """The eigenvalues clearly below zero alone: the weights of the others are zero.

        Clearly is by more than a hundredth of the largest in size: in the bulk around zero a node stands for
        many eigenvalues of either sign.
        """
        bound = NEAR_ZERO * self.nodes.abs().max()
        return self._replace(weights=torch.where(self.nodes < -bound, self.weights, 0))

    def negative_share(self) -> float:
        """The share of eigenvalues clearly below zero, as in `negative_part`."""
        return float(self.negative_part().weights.sum(1).mean())

    def trace(self) -> Estimate:
        """The sum of the eigenvalues, a probe for each start; `trace` gives more probes for less."""
        return estimate(self.dim * (self.weights * self.nodes).sum(1))

    def density(self, points: Float[Tensor, "p"], width: float) -> Float[Tensor, "p"]:
        """The density at some points, every node a normal distribution of this standard deviation.

        >>> spectrum = Spectrum(torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1, 1), dim=3)
        >>> spectrum.density(torch.zeros(1), width=1.0)
        tensor([0.3989])
        """
        distances = (points - self.nodes.unsqueeze(2)) / width
        bumps = torch.exp(-0.5 * distances.square()) / (width * (2 * torch.pi) ** 0.5)
        return (self.weights.unsqueeze(2) * bumps).sum(1).mean(0)


def estimate(probes: Float[Tensor, "p"]) -> Estimate:
    """The mean of some probes.

    >>> estimate(torch.tensor([1.0, 3.0]))
    Estimate(value=2.0, error=1.0)
    """
    count = len(probes)
    error = float(probes.std() / count**0.5) if count > 1 else float("nan")
    return Estimate(float(probes.mean()), error)


def lanczos(
    apply: Callable[[Vector], Vector], draw: Callable[[], Vector], turns: Iterable[int]
) -> tuple[list[float], list[float]]:
    """The tridiagonal form of a symmetric matrix from a random start: its diagonal, and what lies beside it.

    The last number beside it leads out of the space that was seen: it bounds the error. Where all that a
    start leads to has been seen, the run goes on with another start, across which that number is 0.

    >>> diagonal, beside = lanczos(lambda v: 2 * v, lambda: torch.ones(3), range(1))
    >>> [round(value, 4) for value in diagonal], round(beside[0], 4)
    ([2.0], 0.0)
    """
    basis: list[Vector] = []
    diagonal: list[float] = []
    beside: list[float] = []
    vector = draw()
    vector = vector / torch.linalg.vector_norm(vector)
    for _ in turns:
        basis.append(vector)
        product = apply(vector)
        size = float(torch.linalg.vector_norm(product))
        diagonal.append(float(to_float64(product * vector).sum()))
        product = _orthogonal(product, basis)
        beside.append(float(torch.linalg.vector_norm(product)))
        if not beside[-1] > torch.finfo(product.dtype).eps * size * len(basis) ** 0.5:
            beside[-1] = 0.0
            product = _orthogonal(draw(), basis)
        vector = product / torch.linalg.vector_norm(product)
    return diagonal, beside


def _orthogonal(vector: Vector, basis: list[Vector]) -> Vector:
    """Without its part in the basis: twice, since once leaves the rounding errors of what is taken away."""
    for _ in range(2):
        for one in basis:
            vector = vector - (vector * one).sum() * one
    return vector


def quadrature(
    diagonal: list[float], beside: list[float]
) -> tuple[Float[Tensor, "s"], Float[Tensor, "s"], Float[Tensor, "s"]]:
    """Nodes, weights and residuals of what `lanczos` returns.

    >>> quadrature([2.0], [0.0])[0]
    tensor([2.], dtype=torch.float64)
    """
    nodes, vectors = eigh_tridiagonal(np.array(diagonal), np.array(beside[:-1]))
    found = nodes, vectors[0] ** 2, np.abs(beside[-1] * vectors[-1])
    return tuple([torch.from_numpy(values) for values in found])  # type: ignore[return-value]
