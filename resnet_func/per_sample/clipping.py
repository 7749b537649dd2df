"""The clipped sum as a function that states what a sample can do to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from resnet_func.per_sample.engine import detect_nonfinite, evaluate
from resnet_func.per_sample.options import Settings
from resnet_func.per_sample.quantities import quantity
from resnet_func.per_sample.quantities.quantity import Clipping
from resnet_func.types import Logits, LossFn, Params, PerSample, State

NonFinite = Literal["raise", "zero"]


@dataclass(frozen=True)
class ClippedSum:
    """What `per_sample.clipped_sum` returns, and documents; `bound` is the most that one sample adds.

    >>> import resnet_func as rf
    >>> model = rf.resnet20(norm="group")
    >>> rf.per_sample.clipped_sum(model, rf.losses.cross_entropy, max_norm={"": 3.0, "fc": 4.0}).bound
    5.0
    """

    settings: Settings
    max_norm: float | Mapping[str, float]
    clipping: Clipping
    nonfinite: NonFinite
    # made once: a loss is compared with a loop over samples the first time it is met
    masked: Settings = field(init=False)

    def __post_init__(self) -> None:
        check_clipping(self.max_norm, self.clipping, self.nonfinite)
        loss_fn = partial(_loss_without_mask, self.settings.loss_fn)
        object.__setattr__(self, "masked", self.settings._replace(loss_fn=loss_fn))

    @property
    def bound(self) -> float:
        """The largest L2 norm, over all leaves, of what one sample adds: the sensitivity to adding one."""
        return math.hypot(*self.max_norm.values()) if isinstance(self.max_norm, Mapping) else self.max_norm

    def __call__(
        self,
        params: Params,
        state: State,
        x: Any,
        y: Any,
        mask: Tensor | None = None,
        *,
        max_norm: Tensor | None = None,
    ) -> tuple[Params, Tensor]:
        chosen = self.max_norm if max_norm is None else max_norm
        wanted = quantity.clipped_sum(chosen, self.clipping, masked_targets=mask is not None)
        settings = self.settings
        if mask is not None:  # it goes where the targets go: into microbatches and views
            if mask.dtype != torch.bool or mask.ndim != 1:
                raise ValueError(f"mask must be bools [N]; got {mask.dtype} {list(mask.shape)}")
            settings, y = self.masked, (y, mask)
        (joined,) = evaluate(settings, [wanted], params, state, x, y)
        total, norms = wanted.result(joined, params)
        if self.nonfinite == "raise":
            detect_nonfinite(norms)
        return total, norms


def check_clipping(max_norm: float | Mapping[str, float], clipping: str, nonfinite: str) -> None:
    """Refuse bounds and names that cannot be.

    Raises:
        ValueError: says which.
    """
    for bound in max_norm.values() if isinstance(max_norm, Mapping) else (max_norm,):
        if not bound >= 0 or (math.isinf(bound) and clipping == "automatic"):
            raise ValueError(f"max_norm must be 0 or more (and finite for 'automatic'); got {bound}")
    if isinstance(max_norm, Mapping) and clipping != "flat":
        raise ValueError(f"max_norm by prefix clips each part flat; got clipping={clipping!r}. Leave one out")
    for name, value, allowed in (
        ("clipping", clipping, get_args(Clipping)),
        ("nonfinite", nonfinite, get_args(NonFinite)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _loss_without_mask(loss_fn: LossFn, logits: Logits, targets: tuple[Any, Tensor]) -> PerSample:
    return loss_fn(logits, targets[0])
