"""Trainings whose sums over samples are exact, so that no order of adding up can change a bit.

What is summed over samples lies on a grid of dyadic numbers. A network is applied sample by sample: kernels
choose their algorithms by the size of the batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import resnet_func as rf
from resnet_func import losses, optim, privacy, tree
from resnet_func.distributed import Ranks
from resnet_func.models import layers
from resnet_func.testing.shadow import cast_floating
from resnet_func.types import Model, Params, State, TrainState

BATCH, SAMPLES = 12, 40
FINE, COARSE = 2.0**-8, 2.0**-5


class _Rounded(torch.autograd.Function):
    """Values and cotangents on grids; 0 leaves them as they are."""

    @staticmethod
    def forward(x: Tensor, grid: float, cotangent_grid: float) -> Tensor:
        return (x / grid).round() * grid if grid else x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.cotangent_grid = inputs[2]

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return (cotangents[0] / ctx.cotangent_grid).round() * ctx.cotangent_grid, None, None


def rounded(x: Tensor, grid: float = COARSE) -> Tensor:
    result: Any = _Rounded.apply(x, grid, FINE)
    return result


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Row by row, and on the grid."""
    rows = [losses.cross_entropy(logits[i : i + 1], y[i : i + 1]) for i in range(len(y))]
    return rounded(torch.cat(rows), FINE)


def negative_logit(logits: Tensor, y: Tensor) -> Tensor:
    """Linear, so that gradients do not depend on the parameters."""
    return -logits.gather(1, y[:, None])[:, 0]


def sample_by_sample(model: Model) -> Model:
    """The network whose gradients, each sample's by itself, lie on the grid."""

    def apply(params: Params, state: State, x: Tensor, *, train: bool) -> tuple[Tensor, State]:
        rows = []
        for row in x.split(1):
            own = tree.map(lambda leaf: rounded(leaf, 0), params)
            rows.append(model.apply(own, state, row, train=train)[0])
        return torch.cat(rows), state

    return model._replace(apply=apply)


def network(num_classes: int = 10) -> Model:
    """A small ResNet with GroupNorm, sample by sample."""
    small = rf.ResNetConfig(
        block="basic", depths=(1,), widths=(8,), num_classes=num_classes, norm="group", norm_groups=4
    )
    return sample_by_sample(rf.build(small))


def with_batch_norm() -> Model:
    """Two convolutions with BatchNorm, all of whose inputs and cotangents lie on the grid."""
    blocks = [layers.Conv(3, 8, 3, padding=1), layers.Conv(8, 8, 3, 2, padding=1)]

    def init(generator: torch.Generator, **options: Any) -> tuple[Params, State]:
        params, state = {}, {}
        for i, conv in enumerate(blocks):
            weights, _ = layers.init_layer(conv, generator, torch.device("cpu"))
            norm, statistics = layers.init_layer(layers.BatchNorm(8), generator, torch.device("cpu"))
            params[f"block{i}"], state[f"block{i}"] = {"conv": weights, "norm": norm}, statistics
        params["fc"], _ = layers.init_layer(layers.Linear(8, 10), generator, torch.device("cpu"))
        return params, state

    def apply(params: Params, state: State, x: Tensor, *, train: bool) -> tuple[Tensor, State]:
        moved = {}
        for i, conv in enumerate(blocks):
            here = params[f"block{i}"]
            rows = [layers.conv2d(conv, here["conv"], rounded(row)) for row in x.split(1)]
            y, moved[f"block{i}"] = layers.batch_norm(
                here["norm"], state[f"block{i}"], rounded(torch.cat(rows)), train=train
            )
            x = F.relu(y)
        x = rounded(x).mean((2, 3))
        rows = [rounded(layers.linear(params["fc"], rounded(row)), 0) for row in x.split(1)]
        return torch.cat(rows), moved

    return Model(None, init, apply)


def train(
    ranks: Ranks | None, steps: int, *, batch_norm: bool = False, dtype: torch.dtype = torch.float32
) -> TrainState:
    """A network with GroupNorm, or with BatchNorm over all ranks."""
    draw = torch.Generator().manual_seed(0)
    model = with_batch_norm() if batch_norm else network()
    optimizer = optim.sgd(0.05, 0.9, weight_decay=1e-3)
    params, state = model.init(draw)
    start = cast_floating(params, dtype), cast_floating(state, dtype)
    train_state = rf.train.init_train_state(*start, optimizer, ema=True)
    step = rf.train.make_train_step(
        model, cross_entropy, optimizer, ema_decay=0.9, ranks=ranks, sync_batch_norm=batch_norm
    )
    x, y = torch.randn(SAMPLES, 3, 8, 8, generator=draw).to(dtype), torch.arange(SAMPLES) % 10
    mine = slice(None) if ranks is None else ranks.part(BATCH)
    for _ in range(steps):
        pick = torch.randperm(SAMPLES, generator=draw)[:BATCH][mine]
        train_state, _ = step(train_state, x[pick], y[pick])
    return train_state


def train_privately(ranks: Ranks, steps: int) -> TrainState:
    """Private steps of a linear network on rows of norm 2 and 4, the longer of which are clipped."""
    model = rf.from_function(lambda params, x: F.linear(x, params["w"]))
    optimizer, draw = optim.sgd(0.5, 0.5), torch.Generator().manual_seed(0)
    state = rf.train.init_train_state({"w": torch.zeros(10, 32)}, {}, optimizer)
    rule: dict[str, Any] = {"noise_multiplier": 0.7, "expected_batch_size": 10.0}
    summed = rf.per_sample.clipped_sum(model, negative_logit, max_norm=2.0, nonfinite="zero")
    step = privacy.make_private_parts(summed, optimizer, max_norm=2.0, **rule)
    signs = torch.randint(0, 2, (SAMPLES, 32), generator=draw) * 2.0 - 1
    signs[::2, 4:] = 0
    signs[1::2, 16:] = 0
    y = torch.arange(SAMPLES) % 10
    batches = privacy.poisson_batches(SAMPLES, sampling_rate=0.1, steps=steps, seed=1, capacity=7)
    for number, (indices, mask) in enumerate(batches):
        pick, own = privacy.part(indices, mask, ranks.rank, ranks.world)
        noise = privacy.gaussian_noise(state.params, seed=2, step=number)
        clipped = privacy.join_over_ranks(step.clip(state, signs[pick], y[pick], own), ranks)
        state = step.finish(state, clipped, noise)
    return state


def all_trainings(ranks: Ranks, steps: int) -> dict[str, TrainState]:
    return {
        "group-fp32": train(ranks, steps),
        "group-fp64": train(ranks, steps, dtype=torch.float64),
        "sync-batch-fp32": train(ranks, steps, batch_norm=True),
        "sync-batch-fp64": train(ranks, steps, batch_norm=True, dtype=torch.float64),
        "private": train_privately(ranks, steps),
    }
