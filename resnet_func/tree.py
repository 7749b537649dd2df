"""Pytree helpers over optree. Leaves are tensors; None is an empty subtree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import optree
import torch
from torch import Tensor

from resnet_func.numerics import safe_sqrt, widen


def map(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Apply `fn` leaf by leaf to trees of the same structure; returns a tree of that structure.

    >>> map(lambda a, b: a + b, {"x": 1, "y": {"z": 2}}, {"x": 10, "y": {"z": 20}})
    {'x': 11, 'y': {'z': 22}}
    """
    return optree.tree_map(fn, tree, *rest)


def map_unzip(fn: Callable[..., tuple[Any, ...]], outputs: int, tree: Any, *rest: Any) -> tuple[Any, ...]:
    """Like `map`, for an `fn` that returns a tuple of `outputs` leaves: as many trees.

    Raises:
        ValueError: the trees do not have the same structure.

    >>> map_unzip(lambda n: (n, n * n), 2, {"x": 2, "y": 3})
    ({'x': 2, 'y': 3}, {'x': 4, 'y': 9})
    """
    results = map(fn, tree, *rest)
    return tuple(map(lambda _, result, i=i: result[i], tree, results) for i in range(outputs))


def leaves(tree: Any) -> list[Any]:
    """All leaves, in the order `map` visits them.

    >>> leaves({"x": 1, "y": {"z": 2, "none": None}})
    [1, 2]
    """
    return optree.tree_leaves(tree)


def dot(a: Any, b: Any) -> Tensor:
    """Sum over leaves of `<a, b>`: a 0-d tensor, in float32 for narrower leaves. Without leaves it is 0.

    >>> dot({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0])})
    tensor(11.)
    """
    products = leaves(map(lambda x, y: (widen(x) * widen(y)).sum(), a, b))
    return torch.stack(products).sum() if products else torch.zeros((), dtype=torch.float32, device="cpu")


def norm(tree: Any) -> Tensor:
    """The global L2 norm over all leaves: a 0-d tensor, in float32 for narrower leaves.

    Its derivatives where all leaves are zero count as zero.

    >>> norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5.)
    """
    return safe_sqrt(dot(tree, tree))


def size(tree: Any) -> int:
    """The number of scalars in all leaves together.

    >>> size({"w": torch.zeros(2, 3), "b": torch.zeros(2)})
    8
    """
    return sum(leaf.numel() for leaf in leaves(tree))


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts to `{dotted path: leaf}`, in insertion order.

    `{"conv1": {"weight": w}}` becomes `{"conv1.weight": w}`; empty dicts vanish.

    >>> flatten({"fc": {"weight": 1, "bias": 2}, "empty": {}})
    {'fc.weight': 1, 'fc.bias': 2}
    """
    return dict(_walk(tree, ""))


def _walk(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _walk(value, f"{path}.")
        else:
            yield path, value


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`.

    Raises:
        ValueError: a path is both a leaf and a branch, like `"a"` and `"a.b"`.

    >>> unflatten({"fc.weight": 1, "fc.bias": 2})
    {'fc': {'weight': 1, 'bias': 2}}
    """
    root: dict[str, Any] = {}
    for path, leaf in flat.items():
        *branches, name = path.split(".")
        node = root
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path!r} goes through {branch!r}, which is a leaf")
        if name in node:
            raise ValueError(f"{path!r} is both a leaf and a branch, or given twice")
        node[name] = leaf
    return root


def merge(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """The union of two nested dicts with disjoint leaves; neither input is changed.

    >>> merge({"fc": {"weight": 1}}, {"fc": {"bias": 2}})
    {'fc': {'weight': 1, 'bias': 2}}
    """
    return unflatten({**flatten(a), **flatten(b)})


def map_with_path(fn: Callable[[str, Any], Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Like `map`, with the leaf's dotted path as the first argument.

    >>> map_with_path(lambda path, leaf: f"{path}={leaf}", {"fc": {"bias": 2}})
    {'fc': {'bias': 'fc.bias=2'}}
    """
    return unflatten({path: fn(path, leaf) for path, leaf in flatten(tree).items()})


def prune(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict without its empty branches.

    >>> prune({"fc": {"bias": 2}, "layer1": {"0": {}}})
    {'fc': {'bias': 2}}
    """
    return unflatten(flatten(tree))
