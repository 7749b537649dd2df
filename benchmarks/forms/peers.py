"""Clipped sums as other libraries compute them, of the same network with the same parameters.

Needs the extra `bench`. Opacus gets the model as a plain module with `GroupNorm`, or somebody's own network
as it is, where it takes it; JAX gets a network of the zoo, its parameters as arrays. BackPACK is not here: it
passes over GroupNorm's parameters without a word, so that its norms lack them.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models import resnet

import resnet_func as rf
from benchmarks.forms.networks import Case
from benchmarks.harness.measure import Skipped
from parity.reference import CifarResNet
from parity.steps import loaded
from resnet_func import tree
from resnet_func.models.config import ResNetConfig
from resnet_func.types import Params

Step = Callable[[], tuple[Params, Tensor]]
PEERS = ("Opacus, hooks", "Opacus, expanded weights", "Opacus, ghost", "JAX, vmap")


class BasicBlock(resnet.BasicBlock):
    """torchvision's, with nothing in place: backward hooks refuse outputs that change afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + identity)


class Bottleneck(resnet.Bottleneck):
    """The same for the block of three convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        return torch.relu(self.bn3(self.conv3(out)) + identity)


def make_module(config: ResNetConfig, params: Params) -> nn.Module:
    """The network of a config with GroupNorm as a module that shares `params`."""

    def norm(channels: int) -> nn.Module:
        return nn.GroupNorm(config.norm_groups, channels)

    def construct() -> nn.Module:
        if config.widths != (64, 128, 256, 512):
            option = "A" if config.shortcut == "pad" else "B"
            return CifarResNet(config.depths[0], option, norm, config.num_classes, config.widths)
        block = BasicBlock if config.block == "basic" else Bottleneck
        module = resnet.ResNet(block, list(config.depths), config.num_classes, norm_layer=norm)
        if config.stem == "cifar":
            module.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
            module.maxpool = nn.Identity()  # type: ignore[assignment]
        module.relu = nn.ReLU()
        return module

    return loaded(construct, params, {})


def make_peer(name: str, case: Case, max_norm: float) -> Step:
    """The clipped sum and the norms of a batch by the peer of that name.

    Raises:
        ModuleNotFoundError: the extra `bench` is not installed.
        Skipped: JAX, for a network that is not of the zoo.
    """
    config, x, y = case.model.config, case.x, case.y
    if name == "JAX, vmap":
        if config is None:
            raise Skipped("in JAX there are the zoo's networks only")
        return _jax(config, case.params, x, y, max_norm)
    opacus = import_module("opacus.grad_sample")
    module = _own_module(case) if config is None else make_module(config, tree.map(_copied, case.params))
    if name == "Opacus, ghost":
        return _two_passes(module, x, y, max_norm)
    stored = name == "Opacus, hooks"
    wrap = opacus.GradSampleModule if stored else opacus.GradSampleModuleExpandedWeights
    return _stored(wrap(module, loss_reduction="sum"), x, y, max_norm)


def _copied(leaf: Tensor) -> Tensor:
    return leaf.detach().clone()


def _own_module(case: Case) -> nn.Module:
    """Somebody's module with nothing in place, since hooks refuse outputs that change.

    In training mode, without which Opacus sees no layer; what has statistics of the batch it refuses.
    """
    module = rf.to_module(case.model, case.params, case.state).train()
    for part in module.modules():
        if isinstance(getattr(part, "inplace", None), bool):
            part.inplace = False  # type: ignore[assignment]
    return module


def make_jax_plain(config: ResNetConfig, params: Params, x: Tensor, y: Tensor) -> Callable[[], Params]:
    """The ordinary step in JAX, `jit(grad)` of the mean loss: what its `vmap` is to be held against."""
    return _jax(config, params, x, y, None)


def _stored(wrapped: Any, x: Tensor, y: Tensor, max_norm: float) -> Step:
    """All per-sample gradients at once, then clipped and summed, as `DPOptimizer` does."""

    def step() -> tuple[Params, Tensor]:
        wrapped.zero_grad()
        cross_entropy(wrapped(x), y, reduction="sum").backward()
        each = {_plain(name): parameter.grad_sample for name, parameter in wrapped.named_parameters()}
        norms = torch.stack([leaf.flatten(1).norm(dim=1) for leaf in each.values()]).norm(dim=0)
        factors = (max_norm / (norms + 1e-6)).clamp(max=1)
        wrapped.zero_grad(set_to_none=True)  # peak memory is what a step adds to what stays
        return tree.unflatten(
            {k: torch.einsum("n,n...->...", factors, leaf) for k, leaf in each.items()}
        ), norms

    return step


def _two_passes(module: nn.Module, x: Tensor, y: Tensor, max_norm: float) -> Step:
    """Norms in a first backward pass, the weighted sum in a second, as `DPLossFastGradientClipping` does."""
    opacus = import_module("opacus.grad_sample")
    wrapped = opacus.GradSampleModuleFastGradientClipping(
        module, loss_reduction="sum", max_grad_norm=max_norm
    )

    def step() -> tuple[Params, Tensor]:
        wrapped.zero_grad()
        losses = cross_entropy(wrapped(x), y, reduction="none")
        losses.sum().backward(retain_graph=True)
        factors, norms = wrapped.get_clipping_coef(), wrapped.get_norm_sample()
        wrapped.zero_grad()
        wrapped.disable_hooks()
        (factors * losses).sum().backward()
        wrapped.enable_hooks()
        grads = {_plain(name): parameter.grad for name, parameter in wrapped.named_parameters()}
        wrapped.zero_grad(set_to_none=True)
        return tree.unflatten(grads), norms

    return step


def _plain(name: str) -> str:
    return name.removeprefix("_module.")


def _jax(
    config: ResNetConfig, params: Params, x: Tensor, y: Tensor, max_norm: float | None
) -> Callable[[], Any]:
    """`jit` of the clipped sum of `vmap(grad)`; without a bound, of the mean loss's gradient alone."""
    jax, jnp = import_module("jax"), import_module("jax.numpy")
    oracle_jax = import_module("parity.sections.oracle_jax")
    wide = jax.enable_x64(x.dtype == torch.float64)
    with wide:
        inputs = tree.map(lambda leaf: jnp.asarray(leaf.numpy()), (params, x, y))

    def mean_loss(params: Any, images: Any, labels: Any) -> Any:
        logits, _ = oracle_jax.apply(config, params, {}, images, train=False)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

    def clipped(params: Any, images: Any, labels: Any) -> tuple[Any, Any]:
        one_by_one = jax.vmap(jax.grad(mean_loss), (None, 0, 0))
        each = one_by_one(params, images[:, None], labels[:, None])
        norms = jnp.sqrt(
            sum(jnp.square(leaf).reshape(len(leaf), -1).sum(1) for leaf in jax.tree.leaves(each))
        )
        factors = jnp.minimum(1.0, max_norm / norms)
        return jax.tree.map(lambda leaf: jnp.tensordot(factors, leaf, 1), each), norms

    compiled = jax.jit(jax.grad(mean_loss) if max_norm is None else clipped)

    def step() -> Any:
        with wide:
            results = jax.block_until_ready(compiled(*inputs))
        return tree.map(lambda leaf: torch.from_numpy(np.array(leaf)), results)

    return step
