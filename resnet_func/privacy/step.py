"""One private training step: clip every sample, add up, add noise once, divide by what was expected."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.distributed import Ranks, sum_over_ranks
from resnet_func.numerics import accumulation_dtype, to_float64
from resnet_func.optim import Optimizer, ema
from resnet_func.per_sample import clipped_sum
from resnet_func.per_sample.options import Method
from resnet_func.per_sample.quantity import Clipping
from resnet_func.privacy.accounting import Neighbours, check_calibrated_for, check_neighbours
from resnet_func.types import LossFn, Metrics, Model, Params, TrainState

MaxNorm: TypeAlias = float | Mapping[str, float]
PrivateStep: TypeAlias = Callable[[TrainState, Any, Any, Tensor, Params], tuple[TrainState, Metrics]]

QUANTILES = {"norm_lower_quartile": 0.25, "norm_median": 0.5, "norm_upper_quartile": 0.75}


def sensitivity(
    max_norm: MaxNorm, clipping: Clipping = "flat", neighbours: Neighbours = "add-or-remove-one"
) -> float:
    """How far, in L2 norm over all leaves, neighbouring data sets can move the clipped sum.

    Every clipping bounds a sample's whole contribution by `max_norm`: "per_layer" gives each of L layers
    `max_norm / sqrt(L)`, and "automatic" normalises to below `max_norm`. Bounds by prefix add up as squares.
    Replacing a sample takes one contribution away and adds another: twice that.

    >>> from resnet_func import privacy
    >>> privacy.sensitivity({"": 3.0, "fc": 4.0}), privacy.sensitivity(1.0, neighbours="replace-one")
    (5.0, 2.0)
    """
    check_neighbours(neighbours)
    if isinstance(max_norm, Mapping) and clipping != "flat":
        raise ValueError(f"max_norm by prefix clips each part flat; got clipping={clipping!r}. Leave one out")
    bound = math.hypot(*max_norm.values()) if isinstance(max_norm, Mapping) else float(max_norm)
    return 2 * bound if neighbours == "replace-one" else bound


def gaussian_noise(params: Params, *, seed: int, step: int) -> Params:
    """Independent standard normal numbers like `params`: the noise of one step, the same whenever it is
    drawn.

    Leaf by leaf from NumPy's Philox4x64-10, keyed by 128 bits of the seed's SHA-256 and counted by step and
    leaf: no two steps or leaves share a number, a step repeated after a crash is the same release and not a
    second one, and no other random stream is read or advanced. They are drawn on the CPU, in at least
    float32, then moved. (`torch.Generator` on a CPU keeps 32 bits of its seed: noise that could be found by
    trying.)

    Whoever has the seed can subtract the noise: take `secrets.randbits(128)`, and keep it secret. The
    generator is not cryptographic, and floating-point normals are not exactly Gaussian (Mironov 2012,
    https://doi.org/10.1145/2382196.2382264): the guarantee is that of the idealised mechanism.

    Args:
        params: Nested dicts of floating-point tensors; only their shapes, dtypes and devices are looked at.
        seed: Any integer.
        step: The number of the step, 0 to 2^64 - 1, each used once.

    >>> import torch
    >>> from resnet_func import privacy
    >>> noise = privacy.gaussian_noise({"w": torch.zeros(2, 3)}, seed=0, step=0)
    >>> noise["w"].shape, noise["w"].dtype
    (torch.Size([2, 3]), torch.float32)
    """
    if not 0 <= step < 2**64:
        raise ValueError(f"step must be 0 to 2^64 - 1; got {step}")
    digest = hashlib.sha256(f"resnet_func.privacy noise {operator.index(seed)}".encode()).digest()
    key = int.from_bytes(digest[:16], "big")

    def draw(number: int, leaf: Tensor) -> Tensor:
        dtype = accumulation_dtype(leaf.dtype)
        # the lowest of the counter's four words count the numbers of a leaf
        counter = np.array([0, 0, step, number], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
        values = generator.standard_normal(
            tuple(leaf.shape), dtype=np.float64 if dtype == torch.float64 else np.float32
        )
        return torch.as_tensor(values).to(leaf.device)

    leaves = tree.flatten(params)
    return tree.unflatten({path: draw(number, leaves[path]) for number, path in enumerate(sorted(leaves))})


def make_private_step(
    model: Model,
    loss_fn: LossFn,
    optimizer: Optimizer,
    *,
    max_norm: MaxNorm,
    noise_multiplier: float,
    expected_batch_size: float,
    clipping: Clipping = "flat",
    neighbours: Neighbours = "add-or-remove-one",
    ema_decay: float | None = None,
    microbatch: int | None = None,
    views: bool | None = None,
    method: Method = "auto",
    check: bool | None = None,
    ranks: Ranks | None = None,
) -> PrivateStep:
    """A pure function of one step of DP-SGD (Abadi et al. 2016, https://arxiv.org/abs/1607.00133), or of DP
    with any other optimizer, which sees nothing but the noisy mean.

    `torch.compile(step, fullgraph=True)` makes it one graph: the noise is an argument, drawn outside.

    Args:
        model: A network whose samples do not meet: no BatchNorm.
        loss_fn: Per-sample loss.
        optimizer: Of `resnet_func.optim`.
        max_norm, clipping: As in `per_sample.clipped_sum`; max_norm must be finite where there is noise.
        noise_multiplier: Standard deviation of the noise over `sensitivity(max_norm, clipping)`, a sample's
            largest contribution: that of `privacy.noise_multiplier`, for the same neighbours. 0 adds nothing,
            and is not private.
        expected_batch_size: Sampling rate times number of samples, which the sum is divided by; the size of a
            batch as drawn is private.
        neighbours: What the noise multiplier was calibrated for. The noise is the same for both: the
            accountant knows that replacing a sample moves the sum twice as far.
        ema_decay: As in `make_train_step`, of parameters that are private already.
        microbatch: Samples at a time, to bound memory; noise is added once all the same.
        views: As in `per_sample.Options`: views of a sample are averaged before its gradient is clipped.
        method, check: As in `per_sample.Options`.
        ranks: Of `distributed.join`: the processes that each take their `privacy.part` of every batch.
            Clipped sums are added up in one all-reduce; then every rank adds the same noise, once.

    Returns:
        `step(train_state, x, y, mask, noise) -> (train_state, metrics)`. `x`, `y` and `mask [N]` are a batch
        of `poisson_batches`; where the mask is False, a sample is padding and counts exactly nothing. `noise`
        is `gaussian_noise(params, seed=, step=)`, a fresh one each step. A sample with NaN or Inf in its
        gradient counts nothing, either.

        Parameters, optimizer state and moving average are private. The metrics are NOT: they are computed
        from the samples without noise, for your eyes while you develop on public data. "share_clipped": of
        the samples whose gradient is longer than the bound; "norm_lower_quartile", "norm_median",
        "norm_upper_quartile" of the gradients' norms; "signal_to_noise": norm of the clipped sum
        over the expected norm of the noise; "share_nonfinite": of the samples left out. Of an empty batch
        they are 0.

    Raises:
        ValueError: an option is out of range, the noise multiplier was calibrated for other neighbours, the
            model has BatchNorm; in the step, noise that is not like the parameters, or a batch that does not
            fit together.

    >>> import torch, resnet_func as rf
    >>> model, optimizer = rf.resnet20(norm="group"), rf.optim.sgd(0.5)
    >>> rule = dict(max_norm=1.0, noise_multiplier=1.1, expected_batch_size=64)
    >>> step = rf.privacy.make_private_step(model, rf.losses.cross_entropy, optimizer, **rule)
    """
    bound = sensitivity(max_norm, clipping)
    _check(noise_multiplier, expected_batch_size, bound, neighbours, ema_decay)
    # not 0 * inf
    std = float(noise_multiplier) * bound if noise_multiplier else 0.0
    summed = clipped_sum(
        model,
        loss_fn,
        max_norm=max_norm,
        clipping=clipping,
        nonfinite="zero",
        method=method,
        microbatch=microbatch,
        views=views,
        check=check,
    )

    def step(
        train_state: TrainState, x: Any, y: Any, mask: Tensor, noise: Params
    ) -> tuple[TrainState, Metrics]:
        params, state = train_state.params, train_state.state
        check_noise(noise, params)
        total, norms = summed(params, state, x, y, mask)
        if ranks is not None:
            total, norms, mask = _over_ranks(total, norms, mask, ranks)
        noisy = add_noise(total, noise, std)
        mean = tree.map(lambda leaf, like: (leaf / expected_batch_size).to(like.dtype), noisy, params)
        params, opt_state = optimizer.step(mean, train_state.opt_state, params)
        ema_params = train_state.ema_params
        if ema_decay is not None and ema_params:
            steps = to_float64(opt_state.step)
            ema_params = ema(ema_params, params, torch.clamp((1 + steps) / (10 + steps), max=ema_decay))
        metrics = _metrics(total, norms, mask, bound, std)
        return TrainState(params, state, opt_state, ema_params, train_state.ema_state), metrics

    return step


def _over_ranks(total: Params, norms: Tensor, mask: Tensor, ranks: Ranks) -> tuple[Params, Tensor, Tensor]:
    """The clipped sum over all ranks, and all ranks' norms and masks, in one collective."""
    mine = torch.arange(ranks.world, dtype=torch.int64, device=norms.device)[:, None] == ranks.rank
    flat = tree.flatten(total)
    rows = [torch.where(mine, row[None].to(norms.dtype), 0) for row in (norms, mask)]
    *leaves, norms, mask = sum_over_ranks([*flat.values(), *rows], ranks)
    return tree.unflatten(dict(zip(flat, leaves, strict=True))), norms.flatten(), mask.flatten() > 0


def add_noise(total: Params, noise: Params, std: float) -> Params:
    """`total + std * noise`, in at least float32."""
    if not std:
        return total
    return tree.map(lambda leaf, z: leaf.to(z.dtype) + std * z, total, noise)


def check_noise(noise: Params, params: Params) -> None:
    """Refuse noise of another tree or other shapes: it would broadcast, and one number would hide nothing.

    Raises:
        ValueError: a leaf is missing, or has another shape or less precision.
    """
    given, wanted = tree.flatten(noise), tree.flatten(params)
    for path in {**wanted, **given}:
        leaf, like = given.get(path), wanted.get(path)
        got = None if leaf is None else (leaf.shape, leaf.dtype)
        need = None if like is None else (like.shape, accumulation_dtype(like.dtype))
        if got != need:
            raise ValueError(
                f"noise must be like the parameters, in at least float32: {path!r} must be {need}; got {got}."
                " Try privacy.gaussian_noise(params, seed=, step=)"
            )


def _metrics(total: Params, norms: Tensor, mask: Tensor, bound: float, std: float) -> Metrics:
    with torch.no_grad():
        finite = mask & norms.isfinite()
        count = mask.sum().clamp(min=1)
        usable = finite.sum()
        ordered = torch.where(finite, norms, math.inf).sort().values
        found = {
            "share_clipped": (finite & (norms > bound)).sum() / count,
            "share_nonfinite": (mask & ~finite).sum() / count,
            "signal_to_noise": tree.norm(total) / (std * math.sqrt(tree.size(total))),
        }
        for name, level in QUANTILES.items():  # nearest rank
            place = (level * (usable - 1)).round().clamp(min=0).to(torch.int64)
            found[name] = torch.where(usable > 0, ordered.take(place), 0)
        return found


def _check(
    noise_multiplier: float,
    expected_batch_size: float,
    bound: float,
    neighbours: Neighbours,
    ema_decay: float | None,
) -> None:
    check_neighbours(neighbours)
    check_calibrated_for(noise_multiplier, neighbours)
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier must be 0 or more and finite; got {noise_multiplier}")
    if not 0 < expected_batch_size < math.inf:
        raise ValueError(
            f"expected_batch_size must be above 0; got {expected_batch_size}. It is the sampling rate times "
            "the number of samples"
        )
    if noise_multiplier and not 0 < bound < math.inf:
        raise ValueError(f"max_norm must be above 0 and finite where there is noise; got a bound of {bound}")
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1); got {ema_decay}. Use None for no average")
