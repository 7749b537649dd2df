"""A Laplace approximation of the last layer: predictions that know how sure the last layer may be.

The last layer's posterior is taken for a normal distribution around its trained weights, whose precision is
the Gauss-Newton matrix of the summed loss plus that of the prior (Daxberger et al. 2021,
https://arxiv.org/abs/2106.14806). Logits are linear in the last layer: for cross-entropy this matrix is the
Hessian itself, and the posterior of the logits is normal, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from resnet_func import tree
from resnet_func.curvature.products import check_curvature_options
from resnet_func.losses import check_per_sample
from resnet_func.numerics import to_float64
from resnet_func.per_sample.engine import refuse_unstated_statistics
from resnet_func.types import Logits, LossFn, Model, Params, PerSample, State

Structure: TypeAlias = Literal["auto", "full", "kronecker"]
Batches: TypeAlias = Iterable[tuple[Any, Any]]

# "auto" takes the full matrix up to this side: its eigenvectors take seconds
FULL_SIDE = 2048
PRECISIONS = (1e-10, 1e10)  # where a prior's precision is looked for


class LastLayer(NamedTuple):
    """What the last layer, `logits = features @ weights.T`, made of a batch.

    Attributes:
        logits: `[N, classes]`.
        features: Its input `[N, D]`; with a bias, a column of ones beside it.
        weights: `[classes, D]`; with a bias, it is the last column.
    """

    logits: Logits
    features: Float[Tensor, "n d"]
    weights: Float[Tensor, "c d"]


class Full(NamedTuple):
    """The matrix by its eigenvalues `[P]` and eigenvectors `[classes, D, P]`."""

    eigenvalues: Tensor
    vectors: Tensor

    def covariance(self, features: Tensor, precision: float) -> Float[Tensor, "n c c"]:
        """Of the logits, for a precision of the prior."""
        along = torch.einsum("nd,cdp->ncp", features, self.vectors)
        return (along / (self.eigenvalues + precision)) @ along.mT


class Kronecker(NamedTuple):
    """The matrix by eigenvalues `[classes, D]`, and eigenvectors of its factors: of logits, of features."""

    eigenvalues: Tensor
    left: Tensor
    right: Tensor

    def covariance(self, features: Tensor, precision: float) -> Float[Tensor, "n c c"]:
        """Of the logits, for a precision of the prior."""
        variances = (features @ self.right).square() @ (1 / (self.eigenvalues + precision)).T
        return (self.left * variances.unsqueeze(1)) @ self.left.T


@dataclass(frozen=True)
class Posterior:
    """What `laplace` returns: the last layer's posterior.

    Args:
        curvature: The Gauss-Newton matrix of the summed loss in its eigenbasis, float64.
        weights: The trained weights `[classes, D]`, float64.
        loss: The summed loss.
        prior_precision: Of the normal prior around 0.

    >>> import torch, resnet_func as rf
    >>> model, params, state = rf.from_module(torch.nn.Linear(1, 2, bias=False))
    >>> batches = [(torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]))]
    >>> posterior = laplace(model, rf.losses.cross_entropy, prior_precision=1.0)(params, state, batches)
    >>> far = last_layer(model, params, state, torch.tensor([[99.0]]))
    >>> bool(posterior.probabilities(far).amax() < far.logits.softmax(1).amax())  # less sure of it
    True
    """

    curvature: Full | Kronecker
    weights: Tensor
    loss: float
    prior_precision: float

    def log_marginal_likelihood(self, prior_precision: float | None = None) -> float:
        """Laplace's estimate of the log probability of the labels, for the losses' being log likelihoods."""
        precision = self.prior_precision if prior_precision is None else prior_precision
        values = self.curvature.eigenvalues
        penalty = precision * self.weights.square().sum() - values.numel() * math.log(precision)
        return -self.loss - 0.5 * float(penalty + (values + precision).log().sum())

    def logit_covariance(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n c c"]:
        """Covariance of each sample's logits, float64."""
        return self.curvature.covariance(to_float64(features), self.prior_precision)

    def probabilities(
        self, layer: LastLayer, *, samples: int = 0, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n c"]:
        """Class probabilities of a batch, averaged over the posterior.

        Args:
            layer: What `last_layer` says of the batch; its weights are not looked at.
            samples: 0 scales the logits by the probit approximation, `1 / sqrt(1 + pi / 8 variance)` (MacKay
                1992); a number averages the softmax over as many draws of the logits.
            generator: What to draw from.

        Raises:
            ValueError: samples are below 0, or wanted without a generator.
        """
        if samples < 0 or (samples and generator is None):
            raise ValueError(
                f"samples must be 0 (probit), or 1 or more with a generator; got {samples} and {generator}"
            )
        logits, covariance = to_float64(layer.logits), self.logit_covariance(layer.features)
        if generator is None or not samples:
            variances = covariance.diagonal(dim1=1, dim2=2)
            return (logits / (1 + math.pi / 8 * variances).sqrt()).softmax(1)
        values, vectors = torch.linalg.eigh(covariance)
        roots = vectors * values.clamp(min=0).sqrt().unsqueeze(1)
        total = torch.zeros_like(logits)
        for _ in range(samples):
            noise = torch.randn(
                logits.shape, generator=generator, device=generator.device, dtype=logits.dtype
            )
            total += (logits + (roots @ noise.to(logits).unsqueeze(2)).squeeze(2)).softmax(1)
        return total / samples


# --------------------------------------------------------------------------- the transform


def laplace(
    model: Model,
    loss_fn: LossFn,
    *,
    structure: Structure = "auto",
    prior_precision: float | None = None,
    train: bool | None = None,
) -> Callable[[Params, State, Batches], Posterior]:
    """The Laplace approximation of the last layer, in one pass over the training data.

    Args:
        model: Any network that ends in a linear layer, evaluated as it is.
        loss_fn: Per-sample loss, the negative log likelihood of a sample: `losses.cross_entropy`.
        structure: "full" holds the matrix of all the layer's entries; "kronecker" the factors of logits and
            features; "auto" is "full" where that has at most 2048 rows.
        prior_precision: Of the prior around 0; None is the one with the largest marginal likelihood.
        train: As in `products.Options`.

    Returns:
        `fn(params, state, batches) -> Posterior`, for the batches `(x, y)` that the network was trained on.

    Raises:
        ValueError: an option is out of range; there are no samples; the network does not end in a linear
            layer; the model has BatchNorm and `train` is not False.

    >>> import torch, resnet_func as rf
    >>> model, params, state = rf.from_module(torch.nn.Linear(2, 3))
    >>> batches = [(torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1]))]
    >>> posterior = laplace(model, rf.losses.cross_entropy)(params, state, batches)
    >>> posterior.probabilities(last_layer(model, params, state, torch.zeros(4, 2))).shape
    torch.Size([4, 3])
    """
    check_curvature_options(model, loss_fn, {"train": train})
    if structure not in ("auto", "full", "kronecker"):
        raise ValueError(f"structure must be 'auto', 'full' or 'kronecker'; got {structure!r}")
    if prior_precision is not None and not 0 < prior_precision < math.inf:
        raise ValueError(f"prior_precision must be above 0 and finite; got {prior_precision}")
    return partial(_laplace, model, loss_fn, structure, prior_precision, train)


def last_layer(model: Model, params: Params, state: State, x: Any) -> LastLayer:
    """The last layer's input and output for a batch, in evaluation mode; nothing is differentiated.

    Raises:
        ValueError: the logits are not the output of a linear layer whose weight is a parameter.

    >>> import torch, resnet_func as rf
    >>> model = rf.resnet20()
    >>> params, state = model.init(torch.Generator().manual_seed(0))
    >>> last_layer(model, params, state, torch.zeros(2, 3, 32, 32)).features.shape
    torch.Size([2, 65])
    """
    with torch.no_grad(), _LinearCalls() as calls:
        logits, _ = model.apply(params, state, x, train=False)
    leaves = tree.leaves(params)
    found = [call for call in calls.calls if call.output is logits]
    if not found or found[0].input.ndim != 2 or not _among(found[0], leaves):
        raise ValueError(
            "expected a network that ends in a linear layer, with a weight (and bias) among its parameters, "
            "and logits [N, classes] as that layer leaves them. Take off what comes after it, such as "
            "averaged flips or another precision"
        )
    call = found[0]
    features, weights = call.input, call.weight
    if call.bias is not None:
        features = torch.cat([features, features.new_ones(len(features), 1)], 1)
        weights = torch.cat([weights, call.bias.unsqueeze(1)], 1)
    return LastLayer(logits, features, weights)


class _Linear(NamedTuple):
    output: Tensor
    input: Tensor
    weight: Tensor
    bias: Tensor | None = None


class _LinearCalls(TorchFunctionMode):
    """Keeps the linear layers that a network calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Linear] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            self.calls.append(_Linear(result, *args, **(kwargs or {})))
        return result


def _among(call: _Linear, leaves: list[Tensor]) -> bool:
    parameters = [call.weight] if call.bias is None else [call.weight, call.bias]
    return all(any(parameter is leaf for leaf in leaves) for parameter in parameters)


# --------------------------------------------------------------------------- one pass over the data


class _Sums(NamedTuple):
    """Over the samples so far: their number, the loss, and the curvature, whole or by factors."""

    samples: int
    loss: Tensor
    parts: tuple[Tensor, ...]


def _laplace(
    model: Model,
    loss_fn: LossFn,
    structure: Structure,
    prior_precision: float | None,
    train: bool | None,
    params: Params,
    state: State,
    batches: Batches,
) -> Posterior:
    refuse_unstated_statistics(check_curvature_options(model, loss_fn, {"train": train}), state)
    sums, weights, full = None, torch.empty(0), structure == "full"
    for x, y in batches:
        layer = last_layer(model, params, state, x)
        if not len(layer.logits):
            continue
        weights = layer.weights
        full = full or (structure == "auto" and weights.numel() <= FULL_SIDE)
        found = _sums_of(layer, loss_fn, y, full=full)
        sums = found if sums is None else _Sums(*[_add(a, b) for a, b in zip(sums, found, strict=True)])
    if sums is None or sums.samples == 0:
        raise ValueError("expected at least one batch (x, y) with samples; got none")
    curvature = _full(sums, weights.shape) if full else _kronecker(sums)
    posterior = Posterior(curvature, to_float64(weights.detach()), float(sums.loss), prior_precision or 1.0)
    if prior_precision is not None:
        return posterior
    best = _best_precision(curvature.eigenvalues.flatten(), float(posterior.weights.square().sum()))
    return Posterior(curvature, posterior.weights, posterior.loss, best)


def _add(a: Any, b: Any) -> Any:
    return tuple([x + y for x, y in zip(a, b, strict=True)]) if isinstance(a, tuple) else a + b


def _sums_of(layer: LastLayer, loss_fn: LossFn, y: Any, *, full: bool) -> _Sums:
    logits, features = to_float64(layer.logits), to_float64(layer.features)
    losses = loss_fn(logits, y)
    check_per_sample(losses, len(logits))
    curvatures = torch.vmap(torch.func.hessian(partial(_loss_of_one, loss_fn)))(logits, y)
    if full:
        scaled = torch.einsum("nab,nj->nabj", curvatures, features)
        parts = ((features.T @ scaled.flatten(1)).reshape(-1, *scaled.shape[1:]),)
    else:
        parts = curvatures.sum(0), features.T @ features
    return _Sums(len(logits), losses.sum(), parts)


def _loss_of_one(loss_fn: LossFn, logits: Tensor, target: Any) -> PerSample:
    return loss_fn(logits.unsqueeze(0), tree.map(lambda leaf: leaf.unsqueeze(0), target)).squeeze(0)


def _full(sums: _Sums, shape: torch.Size) -> Full:
    """`parts` is `[D, classes, classes, D]`."""
    matrix = sums.parts[0].permute(1, 0, 2, 3).reshape(shape.numel(), shape.numel())
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return Full(values.clamp(min=0), vectors.reshape(*shape, -1))


def _kronecker(sums: _Sums) -> Kronecker:
    """The mean of the logits' curvature times the sum of the features' products."""
    (left_values, left), (right_values, right) = (
        torch.linalg.eigh(part) for part in (sums.parts[0] / sums.samples, sums.parts[1])
    )
    values = left_values.clamp(min=0).unsqueeze(1) * right_values.clamp(min=0)
    return Kronecker(values, left, right)


def _best_precision(values: Tensor, squared_norm: float) -> float:
    """The precision of the prior with the largest marginal likelihood, by bisection.

    There the weights' `precision * |weights|^2` is the number of directions that the data determine, `sum
    value / (value + precision)`; the first grows with the precision, and the second falls.
    """
    low, high = map(math.log, PRECISIONS)
    for _ in range(100):
        middle = (low + high) / 2
        precision = math.exp(middle)
        if precision * squared_norm < float((values / (values + precision)).sum()):
            low = middle
        else:
            high = middle
    return math.exp(high)
