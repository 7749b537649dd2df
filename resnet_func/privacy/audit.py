"""An audit of private training in one run: what its parameters betray of canaries bounds epsilon from below.

Steinke, Nasr and Jagielski 2023 (https://arxiv.org/abs/2305.08846). Each of many canaries is in the data by a
coin of its own; after training, who sees the parameters guesses the coins that he is surest of. Under
(epsilon, delta)-differential privacy each guess is right with probability at most 1 / (1 + exp(-epsilon)), so
that too many right ones refute the claim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from resnet_func import tree
from resnet_func.models.interop.modules import from_function
from resnet_func.types import Apply, LossFn, Model, Params, State, TrainState

CANARY_LOSS = 1e3  # times an output: its gradient is longer than any bound that is used
SHARES = (0.02, 0.05, 0.1, 0.2, 0.5)  # of the canaries, to guess


class Canaries(NamedTuple):
    """A network with canaries beside it: samples whose gradient is one coordinate of a leaf of their own.

    Attributes:
        model: Takes `{"x": images, "canary": [N] index, -1 for a true sample}`; its logits have one more
            column.
        loss_fn: Yours for true samples; for a canary the output of its coordinate, many times over.
        params: The network's, and "zz_canaries", the last leaf.
        state: The network's.
    """

    model: Model
    loss_fn: LossFn
    params: Params
    state: State

    def scores(self, params: Params) -> Float[Tensor, "canaries"]:
        """How far training moved each canary's coordinate: the higher, the likelier it was in."""
        return -params["zz_canaries"]["weight"][0].detach()


def insert_canaries(model: Model, loss_fn: LossFn, params: Params, state: State, count: int) -> Canaries:
    """The network with `count` canaries, white-box: their gradients are at right angles to all others.

    Args:
        model, loss_fn, params, state: What is to be audited; its samples do not meet.
        count: Canaries; a thousand give a bound of up to about 4.

    >>> import resnet_func as rf
    >>> model = rf.resnet20(depths=(1, 1, 1), norm="group")
    >>> params, state = model.init(torch.Generator().manual_seed(0))
    >>> canaries = insert_canaries(model, rf.losses.cross_entropy, params, state, 4)
    >>> x = {"x": torch.zeros(2, 3, 8, 8), "canary": torch.tensor([-1, 3])}
    >>> canaries.model.apply(canaries.params, canaries.state, x, train=True)[0].shape
    torch.Size([2, 11])
    """
    if count < 1:
        raise ValueError(f"an audit needs a canary or more; got {count}. A thousand give a sharp bound")
    leaf = tree.leaves(params)[0]
    weight = torch.zeros(1, count, dtype=leaf.dtype, device=leaf.device)
    return Canaries(
        model=from_function(partial(_apply_with_canaries, model.apply, count)),
        loss_fn=partial(_losses_with_canaries, loss_fn),
        params={**params, "zz_canaries": {"weight": weight}},
        state=state,
    )


def _apply_with_canaries(
    apply: Apply, count: int, params: Params, state: State, x: Any, *, train: bool
) -> tuple[Tensor, State]:
    own = {name: value for name, value in params.items() if name != "zz_canaries"}
    logits, state = apply(own, state, x["x"], train=train)
    index = x["canary"]
    place = F.one_hot(index.clamp(min=0), count).to(logits.dtype) * (index >= 0).to(logits.dtype)[:, None]
    return torch.cat([logits, F.linear(place, params["zz_canaries"]["weight"])], 1), state


def _losses_with_canaries(loss_fn: LossFn, logits: Tensor, targets: Any) -> Tensor:
    y, index = targets
    own, canary = loss_fn(logits[:, :-1], y), logits[:, -1] * CANARY_LOSS
    return torch.where(index >= 0, canary, own)


class Audit(NamedTuple):
    """What an audit found: `lower_bound` on epsilon, of `guesses` so many `right`."""

    lower_bound: float
    guesses: int
    right: int


def epsilon_lower_bound(
    scores: Float[Tensor, "canaries"],
    included: Bool[Tensor, "canaries"],
    *,
    delta: float,
    confidence: float = 0.95,
    shares: Sequence[float] = SHARES,
) -> Audit:
    """The largest epsilon that the guesses refute.

    The canaries of the highest scores are guessed to be in, as many of the lowest to be out. Several numbers
    of guesses are tried, and the confidence is shared among them (Bonferroni).

    Args:
        scores: The higher, the likelier that a canary was in.
        included: Whether it was, by a fair coin of its own.
        delta: Of the claim.
        confidence: That the bound holds, over the coins and the noise.
        shares: Of the canaries, how many are guessed.

    Raises:
        ValueError: scores and coins of different lengths, or none; a delta or confidence outside its range.

    >>> coins = torch.arange(400) % 2 == 0
    >>> round(epsilon_lower_bound(coins.float(), coins, delta=1e-5).lower_bound, 1)
    3.7
    >>> epsilon_lower_bound(torch.zeros(400), coins, delta=1e-5).lower_bound
    0.0
    """
    m = len(scores)
    if scores.shape != included.shape or scores.ndim != 1 or not m:
        raise ValueError(f"expected a score and a coin for each canary; got {scores.shape}, {included.shape}")
    if not 0 <= delta < 1 or not 0 < confidence < 1:
        raise ValueError(f"delta must be in [0, 1), confidence in (0, 1); got {delta} and {confidence}")
    order = scores.sort(stable=True).indices
    allowed, best = (1 - confidence) / len(shares), Audit(0.0, 0, 0)
    for share in shares:
        half = max(1, int(share * m / 2))
        right = int(included[order[m - half :]].sum()) + int((~included[order[:half]]).sum())
        bound = _refuted(m, 2 * half, right, delta, allowed)
        if bound > best.lower_bound or not best.guesses:
            best = Audit(bound, 2 * half, right)
    return best


def _refuted(m: int, guesses: int, right: int, delta: float, allowed: float) -> float:
    """The largest epsilon under which so many right guesses have at most the allowed probability."""
    low, high = 0.0, 1.0
    if p_value(m, guesses, right, low, delta) > allowed:
        return 0.0
    while p_value(m, guesses, right, high, delta) <= allowed:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        if p_value(m, guesses, right, middle, delta) <= allowed:
            low = middle
        else:
            high = middle
    return low


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The probability, at most, of so many right guesses under (epsilon, delta)-DP: theorem 5.2 of the paper.

    >>> round(p_value(100, 10, 10, epsilon=0.0, delta=0.0), 6)  # ten fair coins
    0.000977
    """
    from scipy.stats import binom  # takes a second to import

    q = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(right - 1, guesses, q))
    alpha, total = 0.0, 0.0
    for i, mass in enumerate(binom.pmf(range(right - 1, -1, -1), guesses, q), start=1):
        total += float(mass)
        alpha = max(alpha, total / i)
    return min(1.0, beta + 2 * canaries * delta * alpha)


PrivateTraining = Callable[[Canaries, Any, Any], TrainState]


def run_audit(
    canaries: Canaries,
    train: PrivateTraining,
    x: Tensor,
    y: Tensor,
    *,
    delta: float,
    generator: torch.Generator,
    confidence: float = 0.95,
) -> Audit:
    """Train once, with about half of the canaries in the data, and bound epsilon from below.

    Args:
        canaries: Of `insert_canaries`.
        train: `train(canaries, x, y)` trains privately on the samples of `x` and `y`, trees of tensors, and
            returns the state, as whatever is released.
        x, y: The true samples.
        delta, confidence: As in `epsilon_lower_bound`.
        generator: Draws the coins.

    >>> model = from_function(lambda params, x: x @ params["w"])
    >>> loss_fn = lambda logits, y: (logits[:, 0] - y) ** 2
    >>> canaries = insert_canaries(model, loss_fn, {"w": torch.zeros(3, 1)}, {}, 100)
    >>> def without_noise(canaries, x, y):
    ...     def loss(params):
    ...         return canaries.loss_fn(canaries.model.apply(params, {}, x, train=True)[0], y).sum()
    ...     return TrainState(tree.map(torch.neg, torch.func.grad(loss)(canaries.params)), {}, None)
    >>> source = torch.Generator().manual_seed(0)
    >>> x, y = torch.zeros(4, 3), torch.zeros(4)
    >>> audit = run_audit(canaries, without_noise, x, y, delta=1e-5, generator=source)
    >>> audit.right == audit.guesses, audit.lower_bound > 1
    (True, True)
    """
    count = canaries.params["zz_canaries"]["weight"].shape[1]
    included = torch.rand(count, generator=generator) < 0.5
    index = included.nonzero().flatten().to(x.device)
    none = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
    where = torch.cat([none, index])
    images = torch.cat([x, x.new_zeros(len(index), *x.shape[1:])])
    labels = torch.cat([y, y.new_zeros(len(index), *y.shape[1:])])
    after = train(canaries, {"x": images, "canary": where}, (labels, where))
    scores = canaries.scores(after.ema_params or after.params).cpu()
    return epsilon_lower_bound(scores, included, delta=delta, confidence=confidence)
