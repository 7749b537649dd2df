"""Block-diagonal curvature in Kronecker eigenbases: products, inverse products, traces.

A block belongs to one leaf. For a weight `[out, *rest]` it is `(U kron V) diag(s) (U kron V)'`: U are the
eigenvectors of the factor of the layer's outputs, V of its inputs, s the eigenvalues. Other leaves are the
same with other sizes: a bias has the one input 1, groups have a block each, and a diagonal is as many groups
as it has entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from resnet_func import tree
from resnet_func.types import Params, Trainable

# In units of a block's mean eigenvalue.
DEFAULT_DAMPING = 0.1


class Factors(NamedTuple):
    """The two Kronecker factors of a leaf, averaged: `left [groups, out, out]`, `right [groups, in, in]`.

    Where a factor is alike in all groups it has one group.
    """

    left: Float[Tensor, "g out out"]
    right: Float[Tensor, "g in in"]


class Block(NamedTuple):
    """One leaf's curvature: its shape, the eigenvectors of both factors (columns), and the eigenvalues."""

    shape: tuple[int, ...]
    left: Float[Tensor, "g out out"]
    right: Float[Tensor, "g in in"]
    eigenvalues: Float[Tensor, "g out in"]

    def to_basis(self, leaf: Float[Tensor, "*n *shape"]) -> Float[Tensor, "*n g out in"]:
        """A leaf, or a batch of them, in the eigenbasis."""
        batch = leaf.shape[: leaf.ndim - len(self.shape)]
        matrix = leaf.reshape(*batch, *self.eigenvalues.shape).to(self.eigenvalues.dtype)
        return self.left.mT @ matrix @ self.right

    def from_basis(self, coordinates: Float[Tensor, "*n g out in"]) -> Float[Tensor, "*n *shape"]:
        """The inverse of `to_basis`."""
        return (self.left @ coordinates @ self.right.mT).reshape(*coordinates.shape[:-3], *self.shape)

    def scale(self, leaf: Tensor, factors: Tensor) -> Tensor:
        """The leaf with its coordinates in the eigenbasis multiplied, in its own dtype."""
        return self.from_basis(self.to_basis(leaf) * factors).to(leaf.dtype)

    def product(self, leaf: Float[Tensor, "*n *shape"]) -> Float[Tensor, "*n *shape"]:
        """Curvature times a leaf, or a batch of them."""
        return self.scale(leaf, self.eigenvalues)

    def inverse_product(
        self, leaf: Float[Tensor, "*n *shape"], damping: float | Tensor
    ) -> Float[Tensor, "*n *shape"]:
        """`(curvature + damping * identity)^-1` times a leaf, or a batch of them."""
        return self.scale(leaf, 1 / (self.eigenvalues + damping))


def decompose(shape: tuple[int, ...], factors: Factors) -> Block:
    """The eigenbasis of both factors, and the products of their eigenvalues; none is negative."""
    left_values, left = _eigenbasis(factors.left)
    right_values, right = _eigenbasis(factors.right)
    return Block(shape, left, right, left_values.unsqueeze(2) * right_values.unsqueeze(1))


def _eigenbasis(factor: Float[Tensor, "g d d"]) -> tuple[Float[Tensor, "g d"], Float[Tensor, "g d d"]]:
    if factor.shape[-1] == 1:
        return factor[..., 0], torch.ones_like(factor)
    values, vectors = torch.linalg.eigh(factor)
    return values.clamp(min=0), vectors


@dataclass(frozen=True)
class KroneckerEstimate:
    """An estimate of the curvature of the mean loss, a block for each trainable leaf.

    Args:
        blocks: By the leaves' dotted paths, in the order of the parameters.

    >>> import torch
    >>> eye, values = torch.eye(2)[None], torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    >>> estimate = KroneckerEstimate({"weight": Block((2, 2), eye, eye, values)})
    >>> estimate.product({"weight": torch.ones(2, 2)})
    {'weight': tensor([[1., 2.],
            [3., 4.]])}
    >>> estimate.inverse_product({"weight": torch.ones(2, 2)}, damping=1.0)["weight"][1]
    tensor([0.2500, 0.2000])
    """

    blocks: dict[str, Block]

    def restrict(self, trainable: Trainable) -> KroneckerEstimate:
        """The blocks of some leaves alone, by their dotted paths; exact, for no block looks at another.

        Raises:
            ValueError: there is no such block.

        >>> import torch
        >>> one = Block((1,), *[torch.ones(1, 1, 1)] * 3)
        >>> list(KroneckerEstimate({"conv.bias": one, "fc.bias": one}).restrict(lambda p: "fc" in p).blocks)
        ['fc.bias']
        """
        chosen = {path: block for path, block in self.blocks.items() if trainable(path)}
        if not chosen:
            raise ValueError(f"trainable selects no block; they are of {', '.join(self.blocks)}")
        return KroneckerEstimate(chosen)

    def product(self, of: Params) -> Params:
        """Curvature times a tree.

        Args:
            of: Like the trainable parameters, or a batch of such trees: leaves `[*shape]` or
                `[N, *shape]`, as `per_sample.grads` returns them. Leaves that have no block do not count.

        Returns:
            The product for the leaves that have a block, in the tree's structure and dtypes.

        Raises:
            ValueError: a block's leaf is missing, or has another shape.
        """
        return self._by_block(of, lambda path, leaf: self.blocks[path].product(leaf))

    def inverse_product(self, of: Params, *, damping: float | None = None) -> Params:
        """`(curvature + damping * identity)^-1` times a tree.

        Args:
            of: As in `product`.
            damping: Added to every eigenvalue. None takes a tenth of each block's mean eigenvalue (of all,
                where a block is zero), as is the custom for influence functions (Grosse et al. 2023,
                https://arxiv.org/abs/2308.03296). 0 gives infinite or NaN entries where a block is singular,
                as it is with fewer samples than inputs.

        Returns:
            As in `product`.

        Raises:
            ValueError: as in `product`; the damping is negative or not finite.
        """
        added = self.dampings(damping)
        return self._by_block(of, lambda path, leaf: self.blocks[path].inverse_product(leaf, added[path]))

    def dampings(self, damping: float | None = None) -> dict[str, float | Tensor]:
        """What `inverse_product` adds to the eigenvalues of each block, by its path.

        Raises:
            ValueError: the damping is negative or not finite.
        """
        if damping is not None and not 0 <= damping < float("inf"):
            raise ValueError(f"damping must be 0 or more, and finite; got {damping}")
        if damping is not None:
            return dict.fromkeys(self.blocks, damping)
        mean = self.trace() / sum(block.eigenvalues.numel() for block in self.blocks.values())
        means = {path: block.eigenvalues.mean() for path, block in self.blocks.items()}
        return {path: DEFAULT_DAMPING * torch.where(own == 0, mean, own) for path, own in means.items()}

    def eigenvalues(self) -> Float[Tensor, "d"]:
        """All eigenvalues in ascending order, one for each trainable entry."""
        return torch.cat([block.eigenvalues.flatten() for block in self.blocks.values()]).sort().values

    def trace(self) -> Tensor:
        """The sum of the eigenvalues, 0-d."""
        return torch.stack([block.eigenvalues.sum() for block in self.blocks.values()]).sum()

    def _by_block(self, of: Params, apply: Callable[[str, Tensor], Tensor]) -> Params:
        flat = tree.flatten(of)
        if missing := [path for path in self.blocks if path not in flat]:
            raise ValueError(
                f"the curvature has blocks of leaves that the tree has not: {', '.join(missing[:3])}"
                f"{', ...' if len(missing) > 3 else ''}. Take restrict(trainable) of it"
            )
        for path, block in self.blocks.items():
            shape = tuple(flat[path].shape)
            if shape[max(len(shape) - len(block.shape), 0) :] != block.shape:
                raise ValueError(
                    f"expected a tree like the trainable parameters, or a batch of them, with {path} of "
                    f"{list(block.shape)} or [N, ...]; got {list(shape)}"
                )
        return tree.select(of, {path: apply(path, flat[path]) for path in self.blocks})
