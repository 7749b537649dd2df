"""Learning-rate schedules: functions of the number of updates done, for `lr` in `resnet_func.optim`.

A schedule takes a tensor of any shape, element by element (`schedule(torch.arange(100))` is the curve),
computes in float64, and stays at its last value for good. No value is branched on, so it compiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from resnet_func.numerics import to_float64

# Updates done -> learning rate of the next one. The optimizers pass and expect a 0-d float64 tensor.
Schedule: TypeAlias = Callable[[Tensor], Tensor]


def constant(lr: float | Tensor) -> Schedule:
    """The same learning rate for ever.

    Args:
        lr: Learning rate, finite and >= 0; or a 0-d tensor, unchecked, to differentiate or map over.

    Raises:
        ValueError: `lr` is out of range.

    >>> constant(0.1)(torch.arange(2))
    tensor([0.1000, 0.1000], dtype=torch.float64)
    """
    require_finite(lr=lr)
    return partial(_constant, lr)


def _constant(lr: float | Tensor, step: Tensor) -> Tensor:
    t = to_float64(step)
    if isinstance(lr, Tensor):
        return to_float64(lr).to(t.device).expand(t.shape)
    return torch.full_like(t, lr)


def cosine(peak_lr: float, total_steps: int, warmup_steps: int = 0, final_lr: float = 0.0) -> Schedule:
    """Half a cosine from `peak_lr` down to `final_lr`, after a linear warm-up.

    Step t of the warm-up has `peak_lr * (t + 1) / (warmup_steps + 1)`, so none is wasted at 0; from there on
    it is `torch.optim.lr_scheduler.CosineAnnealingLR` with `T_max = total_steps - warmup_steps`.

    Args:
        peak_lr: Learning rate at step `warmup_steps`, the highest.
        total_steps: The step at which `final_lr` is reached.
        warmup_steps: Steps before the peak, fewer than `total_steps`.
        final_lr: Learning rate from `total_steps` on.

    Raises:
        ValueError: An argument is out of range.

    Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983; warm-up: Goyal et al. 2017,
    https://arxiv.org/abs/1706.02677.

    >>> cosine(1.0, total_steps=5, warmup_steps=1)(torch.tensor([0, 1, 3, 5, 9]))
    tensor([0.5000, 1.0000, 0.5000, 0.0000, 0.0000], dtype=torch.float64)
    """
    require_finite(peak_lr=peak_lr, final_lr=final_lr)
    require("warmup_steps", warmup_steps, warmup_steps >= 0, ">= 0", "warmup_steps=0")
    need = f"above warmup_steps={warmup_steps}"
    require("total_steps", total_steps, total_steps > warmup_steps, need, "epochs * batches per epoch")
    return partial(_cosine, peak_lr, total_steps, warmup_steps, final_lr)


def _cosine(peak_lr: float, total_steps: int, warmup_steps: int, final_lr: float, step: Tensor) -> Tensor:
    t = to_float64(step)
    warmup = peak_lr * (t + 1) / (warmup_steps + 1)
    progress = ((t - warmup_steps) / (total_steps - warmup_steps)).clamp(0, 1)
    decay = final_lr + (peak_lr - final_lr) * (1 + torch.cos(math.pi * progress)) / 2
    return torch.where(t < warmup_steps, warmup, decay)


def one_cycle(
    peak_lr: float,
    total_steps: int,
    warmup_fraction: float = 0.3,
    start_div: float = 25.0,
    final_lr: float = 0.0,
    anneal: Literal["linear", "cos"] = "linear",
) -> Schedule:
    """Up from `peak_lr / start_div` to `peak_lr`, down to `final_lr`: a triangle, or two half cosines.

    The turning points are those of `torch.optim.lr_scheduler.OneCycleLR` (`three_phase=False`): the peak at
    step `warmup_fraction * total_steps - 1`, the end at step `total_steps - 1`.

    Args:
        peak_lr: The highest learning rate.
        total_steps: Number of steps, >= 2.
        warmup_fraction: Share of the steps that go up, in [0, 1). Where that is one step or less, step 0
            has the peak.
        start_div: `peak_lr` over the learning rate of step 0; `math.inf` starts at 0.
        final_lr: Learning rate of the last step, and after it.
        anneal: "linear" or "cos".

    Raises:
        ValueError: An argument is out of range.

    Smith and Topin 2018, https://arxiv.org/abs/1708.07120.

    >>> one_cycle(1.0, total_steps=5, warmup_fraction=0.6)(torch.arange(5)).tolist()
    [0.04, 0.52, 1.0, 0.5, 0.0]
    """
    require_finite(peak_lr=peak_lr, final_lr=final_lr)
    require("total_steps", total_steps, total_steps >= 2, ">= 2", "epochs * batches per epoch")
    require("warmup_fraction", warmup_fraction, 0 <= warmup_fraction < 1, "in [0, 1)", "warmup_fraction=0.3")
    require("start_div", start_div, start_div > 0, "> 0", "start_div=25")
    require("anneal", anneal, anneal in ("linear", "cos"), '"linear" or "cos"', 'anneal="linear"')
    last, top = total_steps - 1, max(warmup_fraction * total_steps - 1, 0)
    return partial(_one_cycle, (peak_lr / start_div, peak_lr, final_lr), top, last, anneal)


def _one_cycle(
    rates: tuple[float, float, float], top: float, last: int, anneal: Literal["linear", "cos"], step: Tensor
) -> Tensor:
    t = to_float64(step)
    start, peak, final = rates
    up = _between(start, peak, t / max(top, 1e-9), anneal)
    down = _between(peak, final, (t - top) / (last - top), anneal)
    return torch.where(t < top, up, down)


def _between(start: float, end: float, progress: Tensor, anneal: Literal["linear", "cos"]) -> Tensor:
    share = progress.clamp(0, 1)
    share = share if anneal == "linear" else (1 - torch.cos(math.pi * share)) / 2
    return start * (1 - share) + end * share  # exact at both ends


def step(lr: float, milestones: Sequence[int], gamma: float = 0.1) -> Schedule:
    """`lr * gamma**k` once k of the milestones are reached: `torch.optim.lr_scheduler.MultiStepLR`.

    Args:
        lr: Learning rate before the first milestone.
        milestones: Steps >= 0, in any order; one given twice counts twice.
        gamma: Factor at each milestone, > 0.

    Raises:
        ValueError: An argument is out of range.

    >>> step(1.0, milestones=(2, 3))(torch.arange(4))
    tensor([1.0000, 1.0000, 0.1000, 0.0100], dtype=torch.float64)
    """
    require_finite(lr=lr)
    at = tuple(milestones)
    require("milestones", at, all(m >= 0 for m in at), "steps >= 0", "milestones=(3000, 6000)")
    require("gamma", gamma, 0 < gamma < math.inf, "finite and > 0", "gamma=0.1")
    return partial(_step, lr, at, gamma)


def _step(lr: float, milestones: tuple[int, ...], gamma: float, step: Tensor) -> Tensor:
    t = to_float64(step)
    passed = torch.zeros_like(t)
    for milestone in milestones:
        passed = passed + (t >= milestone)
    return lr * gamma**passed


def require(name: str, value: object, ok: bool, expected: str, remedy: str) -> None:
    """Raise the ValueError of a hyper-parameter outside its domain, unless `ok`."""
    if not ok:
        raise ValueError(f"{name} must be {expected}; got {value!r}. Try {remedy}")


def require_finite(**values: float | Tensor) -> None:
    """Raise a ValueError for the first that is negative, infinite or NaN; or a tensor that is no scalar."""
    for name, value in values.items():
        check_scalar(name, value, lambda v: 0 <= v < math.inf, "finite and >= 0", f"{name}=1e-3")


def check_scalar(
    name: str, value: float | Tensor, in_domain: Callable[[float], bool], expected: str, remedy: str
) -> None:
    """Raise the ValueError of a number outside its domain; of a tensor only shape and dtype are looked at."""
    if isinstance(value, Tensor):
        ok = value.ndim == 0 and value.is_floating_point()
        got = f"{list(value.shape)} of {value.dtype}"
        if not ok:
            raise ValueError(f"{name} must be a number or a 0-d floating tensor; got {got}. Try {remedy}")
    else:
        require(name, value, in_domain(value), expected, remedy)
