"""state_dicts and back: `(params, state)` under the names and in the order of a module.

A leaf's dotted path is its `state_dict` key, so most of this file checks that two lists of names agree.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.models import zoo
from resnet_func.models.interop.checkpoint_files import find_state_dict, read_checkpoint
from resnet_func.models.interop.checkpoint_names import translate
from resnet_func.models.interop.modules import ModuleInit
from resnet_func.models.resnet import build
from resnet_func.types import Model, Params, State


def to_state_dict(model: Model, params: Params, state: State) -> dict[str, Tensor]:
    """The `state_dict` of a network: torchvision's keys, in the module's order.

    Returns:
        A dict that `module.load_state_dict` takes as it is (strictly). Its tensors are the leaves of `params`
        and `state` themselves, as those of `module.state_dict()` are the module's.

    Raises:
        ValueError: `params` and `state` are not this model's; every difference is listed.

    >>> from resnet_func import resnet20
    >>> model = resnet20()
    >>> list(to_state_dict(model, *model.init(torch.Generator())))[:2]
    ['conv1.weight', 'bn1.weight']
    """
    leaves = {**tree.flatten(params), **tree.flatten(state)}
    layout = _layout(model, params, state)
    lines = _differences(leaves, layout.leaves)
    if lines:
        raise ValueError(_listed("these params and state do not fit the model", lines))
    return {key: leaves[path] for key, path in layout.paths.items()}


def from_state_dict(
    model: Model,
    source: Mapping[str, Any] | str | Path,
    *,
    head: Literal["strict", "new"] = "strict",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Params, State]:
    """Parameters and state from a `state_dict`, or from a file that others wrote; nothing is shared with it.

    Where names are others', one UserWarning says what was done about it. Prefixes that wrappers leave
    (`module.`, `_orig_mod.`, `_module.`, also stacked or inside a name) and attributes (`model.`, `net.`,
    `encoder.`, `backbone.`) are dropped from names the model does not have; `linear`, `classifier`, `head`
    and `shortcut` are read as `fc` and `downsample` where the shapes fit; an averaged model's `n_averaged` is
    left out; of a checkpoint with several dicts of tensors the one that fits best is taken. After that,
    names and shapes must be the model's. A missing `num_batches_tracked` (checkpoints older than torch
    0.4.1) is 0, as in torch.

    Args:
        model: The network the tensors are for.
        source: Tensors by dotted name, such as `torchvision.models.resnet18().state_dict()`; a checkpoint
            with such a dict in it; or the path of a `.safetensors` file or of one `torch.save` wrote, which
            is read with `weights_only=True`.
        head: "strict" takes every layer. "new" leaves out the head (the last layer) and draws a fresh one, of
            whatever size the model's has, to fine-tune.
        generator: What the fresh head is drawn from.
        device: Where the result lives; None leaves every tensor where it is (a file's on the CPU).
        dtype: Of floating leaves; None keeps each tensor's own, or the widest of several where the model has
            one.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: `source` is neither, such as a module.
        ValueError: names or shapes differ: every difference is listed, and the network of the zoo that would
            fit is named where there is one. Or integers are where floating-point numbers belong, or the file
            is no file of weights.

    >>> from resnet_func import resnet20
    >>> theirs = resnet20(num_classes=100)
    >>> weights = to_state_dict(theirs, *theirs.init(torch.Generator()))
    >>> params, state = from_state_dict(resnet20(), weights, head="new", generator=torch.Generator())
    """
    _check_head(head, generator)
    layout = _layout(model)
    expected = {key: layout.leaves[path] for key, path in layout.paths.items()}
    checkpoint = read_checkpoint(source) if isinstance(source, str | Path) else source
    found, place = find_state_dict(checkpoint, expected)
    given, notes = translate(found, expected, any_head=head == "new")
    notes = [f"took checkpoint{place}", *notes] if place else notes
    if head == "new":
        assert generator is not None
        given |= _fresh_head(model, given, expected, generator)
    given = {**_untracked(given, expected), **given}
    lines = _differences(given, expected)
    if lines:
        raise ValueError(_listed("this state_dict does not fit the model", lines) + _advice(given))
    _check_complete_and_tied(layout, given)
    common = dtype or _common_dtype(given, expected, notes)
    if notes:
        warnings.warn(f"from_state_dict: {'; '.join(notes)}", UserWarning, stacklevel=2)

    def place_leaf(leaf: Tensor, like: Tensor) -> Tensor:
        wanted = (common or leaf.dtype) if like.is_floating_point() else like.dtype
        return leaf.detach().to(device=device or leaf.device, dtype=wanted, copy=True)

    leaves = {path: place_leaf(given[key], expected[key]) for key, path in layout.paths.items()}
    return layout.split(leaves)


# --------------------------------------------------------------------------- a fresh head


def _check_head(head: str, generator: torch.Generator | None) -> None:
    if head not in ("strict", "new"):
        raise ValueError(f"head must be 'strict' or 'new'; got {head!r}")
    if head == "new" and generator is None:
        raise ValueError("head='new' draws a fresh head: pass generator=torch.Generator().manual_seed(0)")


def _fresh_head(
    model: Model, given: dict[str, Tensor], expected: Mapping[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """The head's tensors, freshly drawn, like the others in dtype and device."""
    head = "fc" if model.config else list(expected)[-1].rpartition(".")[0]
    like = next((leaf for leaf in given.values() if leaf.is_floating_point()), torch.zeros(()))
    params, state = model.init(generator)
    drawn = {**tree.flatten(params), **tree.flatten(state)}
    return {key: drawn[key].to(like) for key in expected if key.rpartition(".")[0] == head and key in drawn}


# --------------------------------------------------------------------------- names and shapes


class _Layout(NamedTuple):
    """What a model's `state_dict` looks like."""

    params: Params  # meta tensors, as are the state's
    state: State
    paths: dict[str, str]  # state_dict key -> the dotted path of its leaf, in the module's order

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {**tree.flatten(self.params), **tree.flatten(self.state)}

    def split(self, leaves: Mapping[str, Tensor]) -> tuple[Params, State]:
        """Leaves by dotted path, as params and state."""
        params = {path: leaves[path] for path in tree.flatten(self.params)}
        state = {path: leaves[path] for path in tree.flatten(self.state)}
        return tree.unflatten(params), tree.unflatten(state)


def _layout(model: Model, params: Params | None = None, state: State | None = None) -> _Layout:
    """The model's layout, by its `init`: whatever was put around `apply` does not change it.

    A model without an `init` has the layout of the params and state, where they are given.
    """
    if isinstance(model.init, ModuleInit):
        module = model.init.structure.evaluating
        leaves = dict(module.named_parameters()), dict(module.named_buffers())
        path_of = {id(leaf): path for path, leaf in {**leaves[0], **leaves[1]}.items()}
        # keep_vars: detached tensors would have other ids
        paths = {key: path_of[id(leaf)] for key, leaf in module.state_dict(keep_vars=True).items()}
        return _Layout(tree.unflatten(leaves[0]), tree.unflatten(leaves[1]), paths)
    try:
        params, state = model.init(torch.Generator(), device="meta")
    except NotImplementedError:
        if params is None or state is None:
            raise ValueError(
                "this model cannot tell the names and shapes of its parameters. "
                "Give it an init: from_function(apply, init=...)"
            ) from None
    by_layer: dict[str, list[str]] = {}
    for path in (*tree.flatten(params), *tree.flatten(state)):
        by_layer.setdefault(path.rpartition(".")[0], []).append(path)
    return _Layout(params, state, {path: path for paths in by_layer.values() for path in paths})


def _differences(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    have = {key: list(leaf.shape) for key, leaf in given.items()}
    want = {key: list(leaf.shape) for key, leaf in expected.items()}
    missing = [f"missing {key} {shape}" for key, shape in want.items() if key not in have]
    unexpected = [f"unexpected {key} {shape}" for key, shape in have.items() if key not in want]
    mis_shaped = [
        f"mis-shaped {key}: expected {shape}, got {have[key]}"
        for key, shape in want.items()
        if key in have and have[key] != shape
    ]
    return missing + unexpected + mis_shaped


def _listed(message: str, lines: list[str]) -> str:
    return "\n  ".join([f"{message}; {len(lines)} difference{'s' if len(lines) > 1 else ''}:", *lines])


def _untracked(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A zero for every batch counter that an old checkpoint lacks."""
    device = next((leaf.device for leaf in given.values()), None)
    counters = [key for key in expected if key.rpartition(".")[2] == "num_batches_tracked"]
    return {key: torch.zeros((), dtype=torch.int64, device=device) for key in counters if key not in given}


def _common_dtype(
    given: Mapping[str, Tensor], expected: Mapping[str, Tensor], notes: list[str]
) -> torch.dtype | None:
    """The widest floating dtype given, where several are and the model has one; None leaves them."""
    floating = [key for key, leaf in expected.items() if leaf.is_floating_point()]
    dtypes = {given[key].dtype for key in floating}
    if len(dtypes) < 2 or len({expected[key].dtype for key in floating}) > 1:
        return None
    widest = reduce(torch.promote_types, dtypes)
    notes.append(f"made {', '.join(sorted(map(str, dtypes - {widest})))} {widest}, as other tensors are")
    return widest


def _check_complete_and_tied(layout: _Layout, given: Mapping[str, Tensor]) -> None:
    """Every leaf has a value of its kind; of a module's tied parameters only one."""
    unsaved = set(layout.leaves) - set(layout.paths.values())
    if unsaved:
        raise ValueError(
            f"no state_dict holds the non-persistent buffers {', '.join(sorted(unsaved))}. "
            "Load it into the module, and call from_module on that"
        )
    for key, path in layout.paths.items():
        if layout.leaves[path].is_floating_point() and not given[key].is_floating_point():
            raise ValueError(
                f"{key} holds {given[key].dtype}, where floating-point numbers belong. Convert it with "
                ".float(), or, of a quantised network, take the weights before quantisation"
            )
        if key != path and not torch.equal(given[key], given[path]):
            raise ValueError(f"{key} and {path} are one tied parameter of the model; the state_dict has two")


def _advice(given: Mapping[str, Tensor]) -> str:
    call = _resembling(given)
    return f"\nIt fits rf.{call}. To fine-tune another head, pass head='new'" if call else ""


def _resembling(given: Mapping[str, Tensor]) -> str | None:
    """The call of the zoo that builds the network these shapes belong to, if there is one."""
    stem, head = given.get("conv1.weight"), given.get("fc.weight")
    if stem is None or head is None or stem.ndim != 4 or head.ndim != 2:
        return None
    batch, affine = (any(key.endswith(end) for key in given) for end in (".running_var", "bn1.weight"))
    changes: dict[str, Any] = {
        "num_classes": head.shape[0],
        "in_channels": stem.shape[1],
        "stem": "cifar" if stem.shape[-1] == 3 else "imagenet",
        "norm": "batch" if batch else "group" if affine else "none",
    }
    for name in zoo.ZOO:
        default = zoo.config(name)
        for shortcut in ("projection", "pad"):
            config = zoo.config(name, shortcut=shortcut, **changes)
            if _shapes(_layout(build(config)).leaves) == _shapes(given):
                chosen = {field: getattr(config, field) for field in (*changes, "shortcut")}
                arguments = [f"{field}={v!r}" for field, v in chosen.items() if v != getattr(default, field)]
                return f"{name}({', '.join(arguments)})"
    return None


def _shapes(leaves: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name, without the batch counters that old checkpoints lack."""
    return {k: tuple(leaf.shape) for k, leaf in leaves.items() if not k.endswith("num_batches_tracked")}
