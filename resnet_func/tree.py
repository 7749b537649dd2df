"""Pytree helpers over optree. Leaves are tensors; None is an empty subtree."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
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


def flatten(tree: Any) -> dict[str, Any]:
    """Any tree to `{dotted path: leaf}`: nested dicts in insertion order, lists and tuples by their indices.

    `{"conv1": {"weight": w}}` becomes `{"conv1.weight": w}`, and so does `{"conv1.weight": w}`. Named tuples
    go by their fields; None and empty branches vanish; a leaf alone has the path "".

    Raises:
        ValueError: two leaves have the same path.

    >>> flatten({"fc": {"weight": 1, "bias": 2}, "empty": {}, "none": None})
    {'fc.weight': 1, 'fc.bias': 2}
    >>> flatten([{"w": 1}, (2, 3)])
    {'0.w': 1, '1.0': 2, '1.1': 3}
    """
    flat: dict[str, Any] = {}
    _collect(tree, "", flat)
    return flat


def _collect(tree: Any, path: str, flat: dict[str, Any]) -> None:
    branches = _branches(tree)
    if branches is None:
        if path in flat:
            raise ValueError(f"two leaves have the path {path!r}: rename one, so that no name holds a dot")
        flat[path] = tree
        return
    for key, value in branches:
        _collect(value, f"{path}.{key}" if path else str(key), flat)


def _branches(tree: Any) -> Iterable[tuple[Any, Any]] | None:
    """Names and subtrees of a node; None for a leaf."""
    kind = type(tree)
    if kind is dict:  # these two are nearly all there are, and asking for an abstract class takes longer
        return tree.items()
    if kind is Tensor:
        return None
    if tree is None:
        return ()
    if isinstance(tree, Mapping):
        return tree.items()
    fields = getattr(tree, "_fields", None)
    if isinstance(tree, tuple) and fields is not None:
        return zip(fields, tree, strict=True)
    return enumerate(tree) if kind in (list, tuple) else None


def replace(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """The tree with other leaves in the places of these dotted paths; the rest is as it was.

    >>> replace({"fc.weight": 1, "fc.bias": 2}, {"fc.bias": 3})
    {'fc.weight': 1, 'fc.bias': 3}
    """
    return _rebuilt(tree, "", lambda path, leaf: leaves.get(path, leaf))


def select(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """These leaves alone, by their dotted paths, in the structure of a tree that has them all.

    In a dict the other leaves are left out; in a list or a tuple None takes their places.

    >>> select({"fc.weight": 1, "fc.bias": 2}, {"fc.bias": 3}), select([1, 2], {"1": 3})
    ({'fc.bias': 3}, [None, 3])
    """
    chosen = _rebuilt(tree, "", lambda path, leaf: leaves.get(path, _LEFT_OUT))
    return {} if chosen is _LEFT_OUT else chosen


_LEFT_OUT = object()


def _rebuilt(tree: Any, path: str, fn: Callable[[str, Any], Any]) -> Any:
    """A tree of the same structure, without what `fn` leaves out."""
    branches = _branches(tree)
    if branches is None:
        return fn(path, tree)
    built = {key: _rebuilt(value, f"{path}.{key}" if path else str(key), fn) for key, value in branches}
    kept = {key: value for key, value in built.items() if value is not _LEFT_OUT}
    if built and not kept:
        return _LEFT_OUT
    if isinstance(tree, Mapping):
        return OrderedDict(kept) if isinstance(tree, OrderedDict) else kept
    values = [kept.get(key) for key in built]
    if isinstance(tree, list):
        return values
    return None if tree is None else type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)


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


def map_with_path(fn: Callable[[str, Any], Any], tree: Any) -> Any:
    """Like `map`, with the leaf's dotted path as the first argument.

    >>> map_with_path(lambda path, leaf: f"{path}={leaf}", {"fc": {"bias": 2}})
    {'fc': {'bias': 'fc.bias=2'}}
    """
    return _rebuilt(tree, "", fn)


def prune(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict without its empty branches.

    >>> prune({"fc": {"bias": 2}, "layer1": {"0": {}}})
    {'fc': {'bias': 2}}
    """
    return unflatten(flatten(tree))
