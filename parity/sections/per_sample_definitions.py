"""What `per_sample` compares with: a backward pass for each sample, and what quantities are of gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parity.sections.per_sample_networks import Case
from resnet_func import losses, tree
from resnet_func.attribution.features import Sketch, sketch_tree
from resnet_func.per_sample.quantities import quantity
from resnet_func.per_sample.quantities.projections import Projection
from resnet_func.types import LossFn

loss_fn = losses.cross_entropy


class Gradients(NamedTuple):
    """Of single samples, by plain autograd: `{leaf: [N, *shape]}`, and the losses and logits."""

    grads: dict[str, Tensor]
    losses: Tensor
    logits: Tensor

    def products(self, paths: list[str]) -> Tensor:
        """Inner products of the samples' gradients over some leaves, `[N, N]`."""
        rows = [self.grads[path].flatten(1) for path in paths]
        return torch.stack([a @ a.T for a in rows]).sum(0)

    @property
    def layers(self) -> dict[str, list[str]]:
        return quantity.by_layer(self.grads)

    @property
    def norms(self) -> Tensor:
        return self.products(list(self.grads)).diagonal().sqrt()

    def layer_norms(self) -> dict[str, Tensor]:
        return {layer: self.products(paths).diagonal().sqrt() for layer, paths in self.layers.items()}

    def weighted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sum over samples, with every leaf's own weights `[N]`."""
        return {path: torch.einsum("n,n...->...", weights[path], g) for path, g in self.grads.items()}


def loop(case: Case, loss: LossFn = loss_fn) -> Gradients:
    """A backward pass for each sample."""
    leaves = {path: leaf.clone().requires_grad_() for path, leaf in tree.flatten(case.params).items()}
    grads: list[tuple[Tensor, ...]] = []
    values, logits = [], []
    for i in range(len(case.x)):
        out, _ = case.model.apply(tree.unflatten(leaves), case.state, case.x[i : i + 1], train=False)
        value = loss(out, case.y[i : i + 1])
        found = torch.autograd.grad(value.sum(), list(leaves.values()), materialize_grads=True)
        grads.append(found)
        values.append(value.detach())
        logits.append(out.detach())
    stacked = {path: torch.stack([one[k] for one in grads]) for k, path in enumerate(leaves)}
    return Gradients(stacked, torch.cat(values), torch.cat(logits))


def flat_clipping(of: Gradients, bound: float) -> Any:
    factor = (bound / of.norms).clamp(max=1)
    return of.weighted(dict.fromkeys(of.grads, factor)), of.norms


def layer_clipping(of: Gradients, bound: float) -> Any:
    norms, share = of.layer_norms(), bound / len(of.layers) ** 0.5
    factors = {p: (share / norms[layer]).clamp(max=1) for layer, ps in of.layers.items() for p in ps}
    return of.weighted(factors), of.norms


def automatic_clipping(of: Gradients, bound: float) -> Any:
    return of.weighted(dict.fromkeys(of.grads, bound / (of.norms + 0.01))), of.norms


def moments(of: Gradients) -> Any:
    """Mean and second moment; trace and squared norm of McCandlish et al. 2018, appendix A.1.

    Those two as one leaf: their quotient may cancel.
    """
    n, mean = len(of.losses), {path: g.mean(0) for path, g in of.grads.items()}
    big, small = torch.stack([g.square().sum() for g in mean.values()]).sum(), of.norms.square().mean()
    scales = torch.stack([(small - big) / (1 - 1 / n), (n * big - small) / (n - 1)])
    return mean, {path: g.square().mean(0) for path, g in of.grads.items()}, scales


def sketched(of: Gradients, projection: Projection, dim: int) -> Tensor:
    """Of the gradients as they are: the projection is linear in them."""
    return sketch_tree(of.grads, Sketch(dim, 0, projection))
