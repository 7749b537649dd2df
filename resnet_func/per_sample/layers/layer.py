"""A captured call as a layer: what the rules of all kinds take, return and ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from resnet_func.models.layer_calls import ARGUMENTS
from resnet_func.per_sample.layers.factors import Direct, Factors, split_views


class Layer(NamedTuple):
    """A call whose tensors are those of the caller's level, with the cotangents of its outputs.

    Args:
        func, args, kwargs: The layer.
        parameters: The tensors among its arguments that hang on trainable leaves.
        batched: Those that carry samples.
        indices: Which of what it returns are tensors.
        cotangents: Of those.
        statistics: Of its input, where the forward pass kept them (`intercept.kept_statistics`).
        samples, views: Of the batch.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parameters: list[Tensor]
    batched: list[Tensor]
    indices: list[int]
    cotangents: list[Tensor]
    statistics: list[Tensor]
    samples: int
    views: int

    @property
    def cotangent(self) -> Tensor:
        """Of the only output."""
        return self.cotangents[0]

    @property
    def name(self) -> str:
        return getattr(self.func, "__name__", str(self.func))


Found: TypeAlias = dict[Tensor, Factors]
Rule: TypeAlias = Callable[..., Found | None]


def arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, those left out left out."""
    return {**dict(zip(ARGUMENTS[name], args, strict=False)), **kwargs}


def is_one_of(tensor: Tensor, tensors: list[Tensor]) -> bool:
    return any(tensor is other for other in tensors)


def leads(tensor: Tensor, layer: Layer) -> bool:
    """Whether a tensor carries the samples, in front."""
    return is_one_of(tensor, layer.batched) and in_front([tensor, *layer.cotangents], layer)


def in_front(tensors: list[Tensor], layer: Layer) -> bool:
    total = layer.samples * layer.views
    return all(tensor.ndim > 0 and tensor.shape[0] == total for tensor in tensors)


def direct(by_view: Tensor, leaf: Tensor, views: int) -> Direct:
    return Direct(split_views(by_view, views).sum(0).to(leaf.dtype))
