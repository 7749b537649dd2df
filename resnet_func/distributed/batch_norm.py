"""Batch normalisation over the samples of all ranks: of any network, by interception."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from resnet_func.distributed.ranks import Ranks, all_reduce
from resnet_func.types import Apply, Images, Logits, Model, Params, State


def sync_batch_norm(model: Model, ranks: Ranks) -> Model:
    """The model whose training-mode BatchNorm takes its statistics over the batches of all ranks.

    Every call of `F.batch_norm` in training is met, whatever wrote the network. Sums of pixels and of their
    squares are taken in float64 and added up over the ranks, one collective a layer in each direction, so
    that on exact data every world gives the same bits. The running statistics are those of the whole batch,
    the same on every rank. The gradients of weight and bias come whole, on rank 0, and are zero on the
    others: add gradients up over the ranks, as `make_train_step(..., ranks=)` does. First derivatives only.

    Args:
        model: Any network; one without BatchNorm stays what it is.
        ranks: Of `distributed.join`. All of them must call the network equally often.

    >>> import resnet_func as rf
    >>> model = sync_batch_norm(rf.resnet20(depths=(1, 1, 1)), Ranks(0, 1))
    >>> params, state = model.init(torch.Generator().manual_seed(0))
    >>> model.apply(params, state, torch.zeros(2, 3, 8, 8), train=True)[0].shape
    torch.Size([2, 10])
    """
    return model._replace(apply=partial(_apply_over_ranks, model.apply, ranks))


def _apply_over_ranks(
    apply: Apply, ranks: Ranks, params: Params, state: State, x: Images, *, train: bool
) -> tuple[Logits, State]:
    if not train:
        return apply(params, state, x, train=train)
    with _OverRanks(ranks):
        return apply(params, state, x, train=train)


class _OverRanks(TorchFunctionMode):
    """Answers the calls of `F.batch_norm` that take the batch's statistics."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        if not call.get("training", False):
            return func(*args, **kwargs)
        return batch_norm(
            call["input"],
            call.get("running_mean"),
            call.get("running_var"),
            call.get("weight"),
            call.get("bias"),
            call.get("momentum", 0.1),
            call.get("eps", 1e-5),
            self.ranks,
        )


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    ranks: Ranks,
) -> Tensor:
    """`F.batch_norm` in training over all ranks' `x [N, C, ...]`; moves the running statistics in place."""
    like: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    weight = torch.ones(x.shape[1], **like) if weight is None else weight
    bias = torch.zeros(x.shape[1], **like) if bias is None else bias
    y, mean, var, count = _BatchNorm.apply(x, weight, bias, eps, ranks)
    with torch.no_grad():
        unbiased = var * (count / (count - 1).clamp(min=1))
        for running, new in ((running_mean, mean), (running_var, unbiased)):
            if running is not None:
                running.lerp_(new.detach().to(running.dtype), momentum)
    return y


class _BatchNorm(torch.autograd.Function):
    """Forward and backward by sums over ranks, in float64: `(y, mean [C], biased variance [C], count)`."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, eps: float, ranks: Ranks
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.to(torch.float64)
        count = wide.new_full((1,), x.numel() // x.shape[1])
        sums = torch.cat([_over_pixels(wide), _over_pixels(wide.square()), count])
        total, squares, count = all_reduce(sums, ranks).split([x.shape[1], x.shape[1], 1])
        mean = total / count
        var = (squares / count - mean.square()).clamp(min=0)
        scale = torch.rsqrt(var + eps) * weight.to(torch.float64)
        shift = bias.to(torch.float64) - mean * scale
        y = (wide * _channels(scale, x) + _channels(shift, x)).to(x.dtype)
        return y, mean, var, count

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, ctx.eps, ctx.ranks = inputs
        _, mean, var, count = output
        ctx.mark_non_differentiable(mean, var, count)
        ctx.save_for_backward(x, weight, mean, var, count)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        x, weight, mean, var, count = ctx.saved_tensors
        cotangent, wide = cotangents[0].to(torch.float64), x.to(torch.float64)
        sums = torch.cat([_over_pixels(cotangent), _over_pixels(cotangent * wide)])
        total, products = all_reduce(sums, ctx.ranks).split([x.shape[1], x.shape[1]])
        inverse = torch.rsqrt(var + ctx.eps)
        along = (products - mean * total) * inverse  # the sum of cotangent times normalised input
        scale = inverse * weight.to(torch.float64)
        slope = -scale * inverse * along / count
        shift = -scale * total / count - slope * mean
        grad = cotangent * _channels(scale, x) + wide * _channels(slope, x) + _channels(shift, x)
        # already sums over all ranks: one rank's adding them up again gives them once
        own = 1.0 if ctx.ranks.rank == 0 else 0.0
        return grad.to(x.dtype), (own * along).to(weight.dtype), (own * total).to(weight.dtype), None, None


def _over_pixels(x: Tensor) -> Tensor:
    return x.sum([dim for dim in range(x.ndim) if dim != 1])


def _channels(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(1, -1, *(1 for _ in like.shape[2:]))
