"""Scores of every sample of a data set: how hard, how odd, how likely wrongly labelled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Unpack

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from resnet_func.attribution import quantities
from resnet_func.attribution.fisher import diagonal_fisher, sampled_ekfac
from resnet_func.attribution.quantities import Checkpoint
from resnet_func.curvature import KroneckerEstimate
from resnet_func.per_sample import over_dataset
from resnet_func.per_sample.dataset import Batches
from resnet_func.per_sample.options import Options
from resnet_func.per_sample.quantities.quantity import Quantity
from resnet_func.types import LossFn, Model

# The scores there are, and whether a large value or a small one is suspicious.
SUSPICIOUS: dict[str, int] = {
    "loss": 1,
    "margin": -1,
    "el2n": 1,
    "grand": 1,
    "self_influence": 1,
    "self_influence_diagonal": 1,
    "self_influence_ekfac": 1,
    "forgetting": 1,
}
FROM_NETWORKS = tuple(name for name in SUSPICIOUS if name != "forgetting")
DEFAULT = ("loss", "margin", "el2n", "grand", "self_influence")


class Scores(NamedTuple):
    """Scores of N samples, on the CPU, in the data set's order.

    Attributes:
        values: Every score `[N]`, by name, averaged over checkpoints.
        predictions: The likeliest class by the last checkpoint.
        suggestions: The likeliest class other than the given label, by the last checkpoint.
    """

    values: dict[str, Float[Tensor, "n"]]
    predictions: Int64[Tensor, "n"]
    suggestions: Int64[Tensor, "n"]


def score_dataset(
    model: Model,
    loss_fn: LossFn,
    names: Sequence[str] = DEFAULT,
    *,
    damping: float | None = None,
    progress: bool = False,
    **options: Unpack[Options],
) -> Callable[[Sequence[Checkpoint], Batches], Scores]:
    """Any scores of every sample, in one pass over the data for each checkpoint.

    Args:
        model, loss_fn, **options: As in `per_sample.grads`.
        names: Of the scores. "loss". "margin": logit of the given label minus the largest other (Pleiss et
            al. 2020). "el2n": length of the error of the probabilities (Paul et al. 2021,
            https://arxiv.org/abs/2107.07075). "grand": length of the gradient (the same paper):
            the error times how strongly the network reacts to the sample. The reaction is weak where the
            network is sure, as it is of most samples with a wrong label: for those take another score.
            "self_influence": its square (TracIn of a sample on itself; Pruthi et al. 2020,
            https://arxiv.org/abs/2002.08484). "self_influence_diagonal": the same by the inverse of the
            diagonal Fisher matrix (Koh and Liang 2017, https://arxiv.org/abs/1703.04730), which takes one
            more pass; "self_influence_ekfac": by EKFAC's inverse (Grosse et al. 2023), which takes two more,
            of random signs in the place of labels.
        damping: Added to the curvature's eigenvalues; None is a tenth of their mean, of EKFAC in each layer.
        progress: Show a progress bar.

    Returns:
        `fn(checkpoints, batches) -> Scores`: checkpoints are pairs `(params, state)`, at least one, over
        whose scores the mean is taken; batches are pairs `(x, y)` with class indices `y`, in an iterable that
        can be gone through once for each pass, such as a list.

    Raises:
        ValueError: an unknown name, no checkpoint, or as in `per_sample.over_dataset`.

    >>> import resnet_func as rf
    >>> model = rf.resnet20(depths=(1, 1, 1), norm="group")
    >>> checkpoint = model.init(torch.Generator().manual_seed(0))
    >>> batches = [(torch.ones(2, 3, 8, 8), torch.tensor([0, 1]))]
    >>> scores = score_dataset(model, rf.losses.cross_entropy, ["loss", "grand"])([checkpoint], batches)
    >>> list(scores.values), scores.predictions.shape
    (['loss', 'grand'], torch.Size([2]))
    """
    unknown = [name for name in names if name not in FROM_NETWORKS]
    if unknown or not names:
        raise ValueError(
            f"expected scores among {', '.join(FROM_NETWORKS)}; got {', '.join(map(str, unknown)) or 'none'}"
        )
    return _ScoreDataset(model, loss_fn, tuple(names), damping, progress, options)


class _ScoreDataset(NamedTuple):
    """`score_dataset`, bound to its arguments."""

    model: Model
    loss_fn: LossFn
    names: tuple[str, ...]
    damping: float | None
    progress: bool
    options: Options

    def __call__(self, checkpoints: Sequence[Checkpoint], batches: Batches) -> Scores:
        if not checkpoints:
            raise ValueError("expected at least one checkpoint, a pair (params, state); got none")
        total: dict[str, Tensor] = {}
        found: dict[str, Any] = {}
        for checkpoint in checkpoints:
            wanted = _quantities(self.names) | self._by_curvature(checkpoint, batches)
            run = over_dataset(self.model, self.loss_fn, wanted, progress=self.progress, **self.options)
            found = run(*checkpoint, batches)
            for name in self.names:
                value = _value(name, found)
                total[name] = total[name] + value if name in total else value
        means = {name: value / len(checkpoints) for name, value in total.items()}
        return Scores(means, found["prediction"], found["suggestion"])

    def _by_curvature(self, checkpoint: Checkpoint, batches: Batches) -> dict[str, Quantity]:
        """The quantities that need passes of their own first: estimates of the curvature."""
        wanted, task = {}, (self.model, self.loss_fn)
        if "self_influence_diagonal" in self.names:
            fisher = diagonal_fisher(*task, progress=self.progress, **self.options)(*checkpoint, batches)
            weights = fisher.inverse(self.damping)
            wanted["self_influence_diagonal"] = quantities.weighted_squared_norms(weights)
        if "self_influence_ekfac" in self.names:
            estimate = sampled_ekfac(*task, **self.options)(*checkpoint, batches)
            wanted["self_influence_ekfac"] = quantities.self_products(_by_block(estimate, self.damping))
        return wanted


def _by_block(estimate: KroneckerEstimate, damping: float | None) -> Callable[[str, Tensor], Tensor]:
    return partial(_inverse_product, estimate, estimate.dampings(damping))


def _inverse_product(
    estimate: KroneckerEstimate, dampings: Mapping[str, float | Tensor], path: str, leaf: Tensor
) -> Tensor:
    quantities.check_covered("the curvature", estimate.blocks, [path])
    return estimate.blocks[path].inverse_product(leaf, dampings[path])


def _quantities(names: Sequence[str]) -> dict[str, str | Quantity]:
    """What a pass has to compute for these scores."""
    wanted: dict[str, str | Quantity] = {
        "prediction": quantities.prediction(),
        "suggestion": quantities.suggestion(),
    }
    wanted |= {name: name for name in names if name in ("loss", "el2n")}
    if "margin" in names:
        wanted["margin"] = quantities.margin()
    if {"grand", "self_influence"} & set(names):
        wanted["norms"] = "norms"
    return wanted


def _value(name: str, found: Mapping[str, Tensor]) -> Tensor:
    match name:
        case "grand":
            return found["norms"]
        case "self_influence":
            return found["norms"].square()
    return found[name]


def forgetting(correct: Bool[Tensor, "epochs n"]) -> Float[Tensor, "n"]:
    """How often each sample was forgotten in training: right after one epoch, wrong after the next.

    A sample that was never right counts as forgotten in every epoch (Toneva et al. 2019,
    https://arxiv.org/abs/1812.05159, who look at each sample when its batch comes).

    Args:
        correct: Whether each sample was right after each epoch, at least one.

    >>> forgetting(torch.tensor([[True, True, False], [False, True, False], [True, True, False]]))
    tensor([1., 0., 3.])
    """
    events = (correct[:-1] & ~correct[1:]).sum(0).to(torch.float32)
    return torch.where(correct.any(0), events, float(len(correct)))


def ranks(values: Float[Tensor, "n"], name: str) -> Int64[Tensor, "n"]:
    """The place of every sample, from 1, the most suspicious first; NaN is the most suspicious of all.

    Args:
        values: A score of `Scores.values`.
        name: Its name, which says whether large or small is suspicious.

    >>> ranks(torch.tensor([0.1, 3.0, 0.2]), "loss"), ranks(torch.tensor([0.1, 3.0, 0.2]), "margin")
    (tensor([3, 1, 2]), tensor([1, 3, 2]))
    """
    order = suspicion_order(values, name)
    places = torch.empty_like(order)
    places[order] = torch.arange(1, len(order) + 1, dtype=torch.int64, device="cpu")
    return places


def suspicion_order(values: Float[Tensor, "n"], name: str) -> Int64[Tensor, "n"]:
    """The samples' indices, the most suspicious first; equal scores keep the data set's order.

    >>> suspicion_order(torch.tensor([0.1, 2.0, 0.5]), "loss").tolist()
    [1, 2, 0]
    """
    signed = (SUSPICIOUS[name] * values.double()).nan_to_num(nan=torch.inf)
    return signed.argsort(descending=True, stable=True)
