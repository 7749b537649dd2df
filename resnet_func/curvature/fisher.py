"""Losses whose gradients have the Gauss-Newton matrix as their second moment: what K-FAC captures.

With `S S' = H`, the Hessian of a sample's loss in its logits, the gradients `J' S m` have the second moment
`J' H J` over mixtures m with `E[m m'] = 1`: summed over the unit vectors ("exact"), or for random signs
("sampled"). For cross-entropy and squared error that is the Fisher information.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from resnet_func import losses, tree
from resnet_func.types import Logits, LossFn, PerSample

Fisher: TypeAlias = Literal["exact", "sampled", "empirical"]
Mixture: TypeAlias = Float[Tensor, "n k"]

IGNORED = -100  # the class index that torch's cross-entropy leaves out


def mixing_loss(loss_fn: LossFn) -> LossFn:
    """A loss of targets `(y, mixture)` whose gradient in the logits is `S mixture`.

    >>> import torch
    >>> loss = mixing_loss(losses.squared_error)  # S = 1
    >>> y, mixture = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    >>> torch.func.grad(lambda logits: loss(logits, (y, mixture)).sum())(torch.ones(1, 2))
    tensor([[3., 4.]])
    """

    return partial(_mixed_loss, loss_fn)


def _mixed_loss(loss_fn: LossFn, logits: Logits, targets: tuple[Any, Mixture]) -> PerSample:
    cotangent = root_product(loss_fn, logits.detach(), *targets)
    return (flat_logits(logits) * cotangent).sum(1)


def flat_logits(logits: Logits) -> Float[Tensor, "n k"]:
    """As many columns as a sample has logits: one, where they are `[N]`.

    >>> flat_logits(torch.zeros(3)).shape
    torch.Size([3, 1])
    """
    return logits.reshape(len(logits), -1)


def root_product(loss_fn: LossFn, logits: Logits, y: Any, mixture: Mixture) -> Mixture:
    """`S mixture` for every sample, S a square root of the loss's Hessian in the logits; flat logits.

    Where the Hessian has negative eigenvalues, they count as zero.
    """
    if loss_fn is losses.cross_entropy and logits.ndim == 2:  # H = weight of the targets * (diag(p) - p p')
        p = logits.softmax(1)
        mixed = p.sqrt() * mixture
        weight = y.sum(1) if y.is_floating_point() else (y != IGNORED).to(p.dtype)
        return (mixed - p * mixed.sum(1, keepdim=True)) * weight.clamp(min=0).sqrt()[:, None]

    def one(flat: Tensor, y: Any) -> Tensor:
        alone = flat.reshape(1, *logits.shape[1:])
        return loss_fn(alone, tree.map(lambda leaf: leaf.unsqueeze(0), y)).sum()

    hessians = torch.vmap(torch.func.hessian(one))(flat_logits(logits), y)
    values, vectors = torch.linalg.eigh(hessians)
    # the symmetric root is the only one that does not hang on the eigenvectors' signs; rounding has no root
    rounding = torch.finfo(values.dtype).eps * values.shape[1] * values.abs().amax(1, keepdim=True)
    roots = torch.where(values > rounding, values, 0).sqrt()
    return torch.einsum("nck,nk,ndk,nd->nc", vectors, roots, vectors, mixture)


def mixtures(
    fisher: Literal["exact", "sampled"], like: Tensor, generator: torch.Generator | None
) -> Iterator[Mixture]:
    """The mixtures for flat logits like this `[N, K]`: the K unit vectors, or random signs."""
    if fisher == "exact":
        for index in range(like.shape[1]):
            mixture = torch.zeros_like(like)
            mixture[:, index] = 1
            yield mixture
    else:
        assert generator is not None
        coins = torch.randint(0, 2, like.shape, generator=generator, device=generator.device)
        yield coins.to(like) * 2 - 1
