"""torchvision and back: state_dicts, modules and pretrained weights as `(params, state)`.

A leaf's dotted path is its `state_dict` key, so most of this file checks that two lists of names agree.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.error import URLError

import torch
from torch import Tensor, nn

from resnet_func import tree
from resnet_func.models import zoo
from resnet_func.models.resnet import build
from resnet_func.types import Logits, Model, Params, State

WRAPPERS = ("module", "_orig_mod", "_module")  # what DataParallel, torch.compile and Opacus put before names


def to_state_dict(model: Model, params: Params, state: State) -> dict[str, Tensor]:
    """The `state_dict` of a network: torchvision's keys, in the module's order.

    Returns:
        A dict that `module.load_state_dict` takes as it is (strictly). Its tensors are the leaves of `params`
        and `state` themselves, as those of `module.state_dict()` are the module's.

    Raises:
        ValueError: `params` and `state` are not this model's; every difference is listed.
    """
    layout = _layout(model)
    leaves = {**tree.flatten(params), **tree.flatten(state)}
    lines = _differences(leaves, layout.leaves)
    if lines:
        raise ValueError(_listed("these params and state do not fit the model", lines))
    return {key: leaves[path] for key, path in layout.paths.items()}


def from_state_dict(
    model: Model,
    state_dict: Mapping[str, Tensor],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Params, State]:
    """Parameters and state from a `state_dict`; strict, and nothing is shared with it.

    Prefixes that wrappers leave (`module.`, `_orig_mod.`, `_module.`, also stacked or inside a name) are
    dropped from keys the model does not have, with one UserWarning. A missing `num_batches_tracked`
    (checkpoints older than torch 0.4.1) is 0, as in torch.

    Args:
        model: The network the tensors are for.
        state_dict: Tensors by dotted name, such as `torchvision.models.resnet18().state_dict()`.
        device: Where the result lives; None leaves every tensor where it is.
        dtype: Of floating leaves; None keeps each tensor's own.

    Raises:
        ValueError: names or shapes differ. Every difference is listed, and the network of the zoo that would
            fit is named where there is one.
    """
    layout = _layout(model)
    expected = {key: layout.leaves[path] for key, path in layout.paths.items()}
    given = _unwrap(_check_tensors(state_dict), expected)
    given = {**_untracked(given, expected), **given}
    lines = _differences(given, expected)
    if lines:
        raise ValueError(_listed("this state_dict does not fit the model", lines) + _advice(given))
    _check_complete_and_tied(layout, given)

    def place(leaf: Tensor, like: Tensor) -> Tensor:
        wanted = (dtype or leaf.dtype) if like.is_floating_point() else like.dtype
        return leaf.detach().to(device=device or leaf.device, dtype=wanted, copy=True)

    leaves = {path: place(given[key], expected[key]) for key, path in layout.paths.items()}
    return layout.split(leaves)


def from_module(module: nn.Module) -> tuple[Model, Params, State]:
    """Any module as a pure function of its parameters and buffers, by `torch.func.functional_call`.

    `train=True` runs the module as `module.train()` would, `train=False` as `module.eval()`; its own mode
    does not matter. The module is neither changed nor kept: only its structure is copied, on the meta
    device. Tied parameters are one leaf, under their first name.

    `model.config` is None. `model.init` raises: a module's initialisation is in its constructor and draws
    from the global generator. A module that draws random numbers (dropout) still draws them there.

    Returns:
        `(model, params, state)`: all parameters (also those that do not require gradients) and all buffers,
        detached copies.
    """
    params = {name: leaf.detach().clone() for name, leaf in module.named_parameters()}
    state = {name: leaf.detach().clone() for name, leaf in module.named_buffers()}
    model = Model(None, _refuse_init, ModuleApply(module))
    return model, tree.unflatten(params), tree.unflatten(state)


class Pretrained(NamedTuple):
    """A network with trained weights, and torchvision's entry for them.

    `weights.transforms()` is the preprocessing the network expects, `weights.meta["categories"]` its classes.
    """

    model: Model
    params: Params
    state: State
    weights: Any


def pretrained(name: str, weights: str = "DEFAULT") -> Pretrained:
    """One of torchvision's ten networks with its trained weights, downloaded once into torch's cache.

    Args:
        name: A key of `zoo.IMAGENET`, such as "resnet50".
        weights: torchvision's name for the weights: "DEFAULT" (the best), "IMAGENET1K_V1", ...

    Returns:
        `(model, params, state, weights)`.

    Raises:
        ValueError: no such network or weights.
        ConnectionError: the weights are not in the cache and could not be downloaded.
    """
    from torchvision.models import get_model_weights  # takes a second, and nothing else needs it

    if name not in zoo.IMAGENET:
        raise ValueError(f"torchvision has no weights for {name!r}; it has {', '.join(zoo.IMAGENET)}")
    available = get_model_weights(name)
    if weights not in available.__members__:
        raise ValueError(f"{name} has no weights {weights!r}; it has {', '.join(available.__members__)}")
    entry = available[weights]
    try:
        state_dict = entry.get_state_dict(progress=False, check_hash=True)
    except URLError as error:
        raise ConnectionError(
            f"could not download {entry.url} ({error.reason}). Connect to the network, or put the file in "
            f"{torch.hub.get_dir()}/checkpoints"
        ) from error
    model = zoo.by_name(name, num_classes=len(entry.meta["categories"]))
    return Pretrained(model, *from_state_dict(model, state_dict), entry)


# --------------------------------------------------------------------------- modules


class ModuleApply:
    """The `apply` of a module, whose structure lives on as two copies on the meta device."""

    def __init__(self, module: nn.Module) -> None:
        self.training, self.evaluating = _skeleton(module).train(), _skeleton(module).eval()

    def __call__(self, params: Params, state: State, x: Tensor, *, train: bool) -> tuple[Logits, State]:
        """The module's output, and its buffers afterwards."""
        # functional_call lets in-place updates through to the tensors it is given: hand it copies
        buffers = {path: leaf.clone() for path, leaf in tree.flatten(state).items()}
        leaves = {**tree.flatten(params), **buffers}
        skeleton = self.training if train else self.evaluating
        logits = torch.func.functional_call(skeleton, leaves, (x,), strict=True)
        return logits, tree.unflatten({path: leaves[path] for path in buffers})


def _skeleton(module: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are on the meta device, tied where the module's are."""
    memo: dict[int, Any] = {}
    for leaf in module.parameters():
        memo[id(leaf)] = nn.Parameter(torch.empty_like(leaf, device="meta"), leaf.requires_grad)
    for leaf in module.buffers():
        memo[id(leaf)] = torch.empty_like(leaf, device="meta")
    return copy.deepcopy(module, memo)


def _refuse_init(
    generator: torch.Generator,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Params, State]:
    raise NotImplementedError(
        "a model made from a module cannot draw fresh parameters: its initialisation is in the module's "
        "constructor. Construct the module again and call from_module, or build the network from the zoo"
    )


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


def _layout(model: Model) -> _Layout:
    if isinstance(model.apply, ModuleApply):
        module = model.apply.evaluating
        params, state = dict(module.named_parameters()), dict(module.named_buffers())
        path_of = {id(leaf): path for path, leaf in {**params, **state}.items()}
        # keep_vars: detached tensors would have other ids
        paths = {key: path_of[id(leaf)] for key, leaf in module.state_dict(keep_vars=True).items()}
        return _Layout(tree.unflatten(params), tree.unflatten(state), paths)
    params, state = model.init(torch.Generator(), device="meta")
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


def _check_tensors(state_dict: Mapping[str, Any]) -> Mapping[str, Tensor]:
    others = [key for key, value in state_dict.items() if not isinstance(value, Tensor)]
    if others:
        nested = [key for key in others if isinstance(state_dict[key], Mapping)]
        hint = f". Pass checkpoint[{nested[0]!r}]?" if nested else ""
        raise ValueError(f"expected a dict of tensors; these are none: {', '.join(map(str, others))}{hint}")
    return state_dict


def _unwrap(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict under the model's own names; says so where a wrapper's prefix went."""
    unwrapped: dict[str, Tensor] = {}
    found: set[str] = set()
    for key, leaf in state_dict.items():
        parts = key.split(".")
        bare = ".".join(part for part in parts if part not in WRAPPERS)
        if key in expected or bare in state_dict or bare in unwrapped:
            unwrapped[key] = leaf
        else:
            unwrapped[bare] = leaf
            found |= set(WRAPPERS) & set(parts)
    if found:
        names = ", ".join(f"'{wrapper}.'" for wrapper in WRAPPERS if wrapper in found)
        warnings.warn(f"dropped {names} from the names in the state_dict", UserWarning, stacklevel=3)
    return unwrapped


def _untracked(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A zero for every batch counter that an old checkpoint lacks."""
    device = next((leaf.device for leaf in given.values()), None)
    counters = [key for key in expected if key.rpartition(".")[2] == "num_batches_tracked"]
    return {key: torch.zeros((), dtype=torch.int64, device=device) for key in counters if key not in given}


def _check_complete_and_tied(layout: _Layout, given: Mapping[str, Tensor]) -> None:
    """For models made from modules: every leaf has a value, and only one."""
    unsaved = set(layout.leaves) - set(layout.paths.values())
    if unsaved:
        raise ValueError(
            f"no state_dict holds the non-persistent buffers {', '.join(sorted(unsaved))}. "
            "Load it into the module, and call from_module on that"
        )
    for key, path in layout.paths.items():
        if key != path and not torch.equal(given[key], given[path]):
            raise ValueError(f"{key} and {path} are one tied parameter of the model; the state_dict has two")


def _advice(given: Mapping[str, Tensor]) -> str:
    call = _resembling(given)
    return f"\nIt fits rf.{call}. To fine-tune, load it there and exchange params['fc']" if call else ""


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
                told = [f"{field}={v!r}" for field, v in chosen.items() if v != getattr(default, field)]
                return f"{name}({', '.join(told)})"
    return None


def _shapes(leaves: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name, without the batch counters that old checkpoints lack."""
    return {k: tuple(leaf.shape) for k, leaf in leaves.items() if not k.endswith("num_batches_tracked")}
