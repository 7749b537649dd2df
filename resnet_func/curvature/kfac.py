"""K-FAC and EKFAC: Kronecker-factored curvature, from what the per-sample engine captures.

Of a layer's input a and cotangent g, K-FAC takes the factors `E[a a']` and `E[g g']` (Martens and Grosse
2015, https://arxiv.org/abs/1503.05671; convolutions: Grosse and Martens 2016,
https://arxiv.org/abs/1602.01407), EKFAC the exact second moments of the gradient in their eigenbasis (George
et al. 2018, https://arxiv.org/abs/1806.03884).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeAlias, Unpack

import torch

from resnet_func import tree
from resnet_func.autodiff import detach_leaves
from resnet_func.curvature.factor_sums import (
    Approximation,
    Sums,
    Totals,
    factor_sums,
    squared_coordinates,
)
from resnet_func.curvature.fisher import Fisher, flat_logits, mixing_loss, mixtures
from resnet_func.curvature.kronecker import Factors, KroneckerEstimate, decompose
from resnet_func.curvature.products import Options, check_curvature_options
from resnet_func.per_sample.engine import evaluate
from resnet_func.per_sample.options import Settings
from resnet_func.per_sample.quantities.quantity import Quantity
from resnet_func.types import LossFn, Model, Params, State

Batches: TypeAlias = Iterable[tuple[Any, Any]]


# --------------------------------------------------------------------------- the transforms


def kfac(
    model: Model,
    loss_fn: LossFn,
    *,
    fisher: Fisher = "exact",
    approximation: Approximation = "expand",
    **options: Unpack[Options],
) -> Callable[..., KroneckerEstimate]:
    """The K-FAC estimate of the Gauss-Newton matrix of the mean loss, in one pass over the data.

    Weights of convolutions and linear layers have two factors, a pair for each group. Small leaves (biases,
    normalisation affine) have their exact block. A weight that is not used as it is (weight standardisation,
    tied weights, embeddings) has the second moments of its per-sample gradients' rows and columns as factors,
    whose product has the right trace. What is too large for either has its exact diagonal.

    Args:
        model, loss_fn: A network in evaluation mode, and a per-sample loss. Logits may be `[N]`, as for a
            binary cross-entropy.
        fisher: "exact" is the Gauss-Newton matrix, with a pass for every logit ("type-2" in other libraries);
            "sampled" estimates it in a single pass, by random signs ("mc"); "empirical" is the second moment
            of the loss's own gradients.
        approximation: What becomes of pixels and positions: "expand" takes each as a sample of its own,
            "reduce" adds them up first (Eschenhagen et al. 2023, https://arxiv.org/abs/2311.00636).
        **options: `trainable`, `microbatch`, `train`: see `products.Options`.

    Returns:
        `fn(params, state, batches, *, generator=None) -> KroneckerEstimate` for an iterable of `(x, y)`;
        "sampled" needs the generator. Sums over the data are in at least float32.

    Raises:
        ValueError: an unknown name, no samples, "sampled" without a generator, or as in `per_sample.grads`.

    >>> import torch, resnet_func as rf
    >>> model, params, state = rf.from_module(torch.nn.Linear(2, 1))
    >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))]
    >>> estimate = kfac(model, rf.losses.squared_error)(params, state, batches)
    >>> estimate.product({"weight": torch.tensor([[4.0, 2.0]]), "bias": torch.tensor([3.0])})
    {'weight': tensor([[2., 1.]]), 'bias': tensor([3.])}
    """
    passes = _Passes.of(model, loss_fn, fisher, options)
    _check_choice("approximation", approximation, ("expand", "reduce"))
    return partial(_kfac, passes, approximation)


def ekfac(
    model: Model,
    loss_fn: LossFn,
    *,
    fisher: Fisher = "exact",
    approximation: Approximation = "expand",
    **options: Unpack[Options],
) -> Callable[..., KroneckerEstimate]:
    """The EKFAC estimate: K-FAC's eigenbasis, with the gradients' exact second moments as eigenvalues.

    No estimate in that basis is nearer to the matrix in the Frobenius norm. It takes a second pass.

    Args:
        model, loss_fn, fisher, approximation, **options: As in `kfac`.

    Returns:
        As in `kfac`, for batches that can be gone through twice, such as a list or a DataLoader in a fixed
        order.

    Raises:
        ValueError: as in `kfac`; the batches are an iterator, which is used up after one pass.

    >>> import torch, resnet_func as rf
    >>> model, params, state = rf.from_module(torch.nn.Linear(2, 1))
    >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))]
    >>> ekfac(model, rf.losses.squared_error)(params, state, batches).trace()
    tensor(2.)
    """
    passes = _Passes.of(model, loss_fn, fisher, options)
    _check_choice("approximation", approximation, ("expand", "reduce"))
    return partial(_ekfac, passes, approximation)


def _kfac(
    passes: _Passes,
    approximation: Approximation,
    params: Params,
    state: State,
    batches: Batches,
    *,
    generator: torch.Generator | None = None,
) -> KroneckerEstimate:
    totals, repeats = passes.run(factor_sums(approximation), params, state, batches, generator)
    shapes = {path: tuple(leaf.shape) for path, leaf in tree.flatten(params).items()}
    return KroneckerEstimate(
        {
            path: decompose(shapes[path], _averages(sums, totals.samples, repeats))
            for path, sums in totals.leaves.items()
        }
    )


def _ekfac(
    passes: _Passes,
    approximation: Approximation,
    params: Params,
    state: State,
    batches: Batches,
    *,
    generator: torch.Generator | None = None,
) -> KroneckerEstimate:
    if iter(batches) is batches:
        raise ValueError("ekfac goes through the batches twice; got an iterator. Pass list(batches)")
    first = _kfac(passes, approximation, params, state, batches, generator=generator)
    totals, _ = passes.run(squared_coordinates(first), params, state, batches, generator)
    return KroneckerEstimate(
        {
            path: block._replace(eigenvalues=totals.leaves[path] / totals.samples)
            for path, block in first.blocks.items()
        }
    )


def _averages(sums: Sums, count: int, repeats: int) -> Factors:
    """Means over samples; every pass over a batch repeats its inputs."""
    if sums.by_gradients:  # both have the gradients' total variance as their trace, which counts once
        trace = sums.right.diagonal(dim1=-2, dim2=-1).sum()
        return Factors(sums.left / count, sums.right / torch.where(trace == 0, 1, trace))
    return Factors(sums.left / count, sums.right / (count * repeats))


# --------------------------------------------------------------------------- passes over the data


class _Passes(NamedTuple):
    """Whose gradients are looked at, and how often a batch is gone through."""

    settings: Settings
    fisher: Fisher

    @classmethod
    def of(cls, model: Model, loss_fn: LossFn, fisher: Fisher, options: Options) -> _Passes:
        _check_choice("fisher", fisher, ("exact", "sampled", "empirical"))
        settings = check_curvature_options(model, loss_fn, options)
        if fisher != "empirical":
            settings = settings._replace(loss_fn=mixing_loss(loss_fn))
        return cls(settings, fisher)

    def run(
        self,
        quantity: Quantity,
        params: Params,
        state: State,
        batches: Batches,
        generator: torch.Generator | None,
    ) -> tuple[Totals, int]:
        """The quantity of all batches, and how many times each was gone through."""
        if self.fisher == "sampled" and generator is None:
            raise ValueError(
                'fisher="sampled" draws random numbers; pass generator=torch.Generator().manual_seed(0)'
            )
        params, state = detach_leaves((params, state))
        total, repeats = None, 1
        for x, y in batches:
            if not len(tree.leaves(x)[0]):
                continue
            targets = list(self._targets(params, state, x, y, generator))
            repeats = len(targets)
            found = [evaluate(self.settings, [quantity], params, state, x, y)[0] for y in targets]
            found[1:] = [part._replace(samples=0) for part in found[1:]]
            total = quantity.join([*([] if total is None else [total]), *found])
        if total is None or total.samples == 0:
            raise ValueError("expected at least one batch (x, y) with samples; got none, or one used up")
        return total, repeats

    def _targets(
        self, params: Params, state: State, x: Any, y: Any, generator: torch.Generator | None
    ) -> Iterator[Any]:
        if self.fisher == "empirical":
            yield y
            return
        with torch.no_grad():
            first = tree.map(lambda leaf: leaf[:1], x)
            logits, _ = self.settings.model.apply(params, state, first, train=False)
        count = tree.leaves(x)[0].shape[0]
        like = flat_logits(logits).expand(count, -1)
        for mixture in mixtures(self.fisher, like, generator):
            yield y, mixture


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
