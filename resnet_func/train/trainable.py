"""Which leaves of a tree are trained, and which are constants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from resnet_func import tree
from resnet_func.types import Params, Trainable


def trained_leaves(params: Params, trainable: Trainable | None = None) -> dict[str, Tensor]:
    """The leaves that are trained, by their dotted paths.

    Args:
        params: Any tree of tensors: nested dicts, flat ones with dotted names, lists, tuples, a tensor alone.
            None is an empty branch. Leaves of whole numbers, such as counters, have no gradient, and are
            constants whatever `trainable` says.
        trainable: Dotted path -> whether that leaf is trained; None trains all.

    Raises:
        ValueError: a leaf is no tensor, a leaf to be trained is complex, or none is left to train.

    >>> import torch
    >>> params = {"fc": {"weight": torch.ones(2), "bias": torch.ones(1), "calls": torch.tensor(3)}}
    >>> list(trained_leaves(params)), list(trained_leaves(params, lambda path: path == "fc.bias"))
    (['fc.weight', 'fc.bias'], ['fc.bias'])
    """
    flat = tree.flatten(params)
    for path, leaf in flat.items():
        if not isinstance(leaf, Tensor):
            raise ValueError(
                f"parameters must be a tree of tensors; {path!r} is a {type(leaf).__name__}. "
                "Try torch.as_tensor, or close over it in rf.from_function"
            )
    wanted = {path: leaf for path, leaf in flat.items() if trainable is None or trainable(path)}
    for path, leaf in wanted.items():
        if leaf.is_complex():
            raise ValueError(
                f"the leaf {path!r} is complex, and cannot be trained here. Give torch.view_as_real of it, "
                "and take torch.view_as_complex in the network"
            )
    chosen = {path: leaf for path, leaf in wanted.items() if leaf.is_floating_point()}
    if flat and not chosen:
        shown = ", ".join(list(flat)[:3])
        kind = "" if not wanted else " of floating-point numbers"
        raise ValueError(f"trainable selects no leaf{kind}; the leaves are {shown}, ... ({len(flat)} in all)")
    return chosen


def select_trained(params: Params, leaves: Mapping[str, Tensor]) -> Params:
    """`trained_leaves` in the structure of the parameters; the very tree where all are trained.

    >>> import torch
    >>> params = [torch.ones(1), torch.tensor(3)]
    >>> select_trained(params, trained_leaves(params))
    [tensor([1.]), None]
    """
    return params if len(leaves) == len(tree.flatten(params)) else tree.select(params, leaves)


def put_trained(params: Params, moved: Params, trained: Params) -> Params:
    """The parameters with those in place that moved from `trained`; the very `moved` where that is all.

    >>> params = {"w": 1, "b": 2}
    >>> put_trained(params, {"w": 3}, {"w": 1})
    {'w': 3, 'b': 2}
    """
    return moved if trained is params else tree.replace(params, tree.flatten(moved))


def check_opt_state(opt_state: Any, params: Params, trained: Params) -> None:
    """Refuse an optimizer's state that holds leaves which are not trained.

    Raises:
        ValueError: names one.

    >>> params = {"w": 1, "b": 2}
    >>> check_opt_state(({"w": 0},), params, {"w": 1})
    """
    frozen = tree.flatten(params).keys() - tree.flatten(trained).keys()
    for field in opt_state if isinstance(opt_state, tuple) else (opt_state,):
        if isinstance(field, tuple):
            check_opt_state(field, params, trained)
        elif isinstance(field, Mapping | list) and (kept := frozen & tree.flatten(field).keys()):
            raise ValueError(
                f"the optimizer's state holds {min(kept)!r}, which trainable refuses; "
                "give init_train_state the same trainable"
            )
