"""The nouns: what a network, its parameters, a loss and a training state are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from resnet_func.models.config import ResNetConfig

# Nested dicts of tensors. The dotted path of a leaf is its torchvision `state_dict` key.
Params: TypeAlias = dict[str, Any]
State: TypeAlias = dict[str, Any]

Images: TypeAlias = Float[Tensor, "n c h w"]
Logits: TypeAlias = Float[Tensor, "n classes"]
Targets: TypeAlias = Any  # a pytree of tensors with N first; most often class indices [N], int64
PerSample: TypeAlias = Float[Tensor, "n"]

# A loss is per-sample: the transform that uses it owns the reduction.
LossFn: TypeAlias = Callable[[Logits, Targets], PerSample]
# A metric is, too: the training step averages it over the batch.
MetricFn: TypeAlias = Callable[[Logits, Targets], PerSample]
# Says of a leaf's dotted path whether it is trained.
Trainable: TypeAlias = Callable[[str], bool]
Metrics: TypeAlias = dict[str, Tensor]


class Init(Protocol):
    """`init(generator, device=, dtype=) -> (params, state)`."""

    def __call__(
        self,
        generator: torch.Generator,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Params, State]: ...


class Apply(Protocol):
    """`apply(params, state, x, train=) -> (logits, state)`: pure, nothing is mutated."""

    def __call__(self, params: Params, state: State, x: Images, *, train: bool) -> tuple[Logits, State]: ...


class Model(NamedTuple):
    """A network as two pure functions.

    `config` is None for a network that came from a module (`from_module`) or a function
    (`from_function`).
    """

    config: ResNetConfig | None
    init: Init
    apply: Apply


class TrainState(NamedTuple):
    """All that a training step reads and writes; a pytree of tensors.

    `ema_params` and `ema_state` are `{}` when no moving average is kept. Every field is a tree of tensors, so
    that `torch.func.vmap` maps over stacked states.
    """

    params: Params
    state: State
    opt_state: Any
    ema_params: Params = {}  # noqa: RUF012 (nothing here is ever mutated)
    ema_state: State = {}  # noqa: RUF012
