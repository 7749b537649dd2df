"""Modules and plain functions as models: `from_module`, `from_function`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from resnet_func import tree
from resnet_func.types import Init, Logits, Model, Params, State


class Construct(Protocol):
    """Makes a module anew, its random numbers from a seed."""

    def __call__(self, seed: int) -> nn.Module: ...


def from_module(module: nn.Module) -> tuple[Model, Params, State]:
    """Any module as a pure function of its parameters and buffers, by `torch.func.functional_call`.

    `train=True` runs the module as `module.train()` would, `train=False` as `module.eval()`; its own mode
    does not matter. The module is neither changed nor kept: only its structure is copied, on the meta
    device. Tied parameters are one leaf, under their first name. What DataParallel, DistributedDataParallel
    and torch.compile put around a module is taken off.

    `model.config` is None. `model.init` raises, but for `device="meta"`, which gives the shapes: a module's
    initialisation is in its constructor and draws from the global generator (`load_network` knows the
    constructor). A module that draws random numbers (dropout) still draws them there.

    Returns:
        `(model, params, state)`: all parameters (also those that do not require gradients) and all buffers,
        detached copies. The model can be pickled where the module can.

    Raises:
        TypeError: this is no module.
        ValueError: the module is scripted, quantised, or lazy and not initialised yet.

    >>> model, params, state = from_module(torch.nn.Linear(4, 2))
    >>> logits, state = model.apply(params, state, torch.zeros(3, 4), train=False)
    >>> list(logits.shape)
    [3, 2]
    """
    module = unwrap_module(module)
    check_module(module)
    params = {name: leaf.detach().clone() for name, leaf in module.named_parameters()}
    state = {name: leaf.detach().clone() for name, leaf in module.named_buffers()}
    return model_of(Structure(module)), tree.unflatten(params), tree.unflatten(state)


def from_function(apply: Callable[..., Any], *, init: Init | None = None) -> Model:
    """A function of your own as a model, for everything here that takes one.

    Args:
        apply: `apply(params, state, x, train=) -> (logits, state)`, or `f(params, x) -> logits`, whose state
            is empty. Parameters are nested dicts of tensors. It must be pure: nothing is mutated.
        init: `init(generator, device=, dtype=) -> (params, state)`; without it `model.init` raises.

    Returns:
        A model without a config. It can be pickled where the functions can.

    Raises:
        ValueError: the signature is neither of the two.

    >>> model = from_function(lambda params, x: x @ params["weight"])
    >>> model.apply({"weight": torch.ones(2, 1)}, {}, torch.ones(1, 2), train=True)
    (tensor([[2.]]), {})
    """
    init = _refuse_init if init is None else init
    try:
        inspect.signature(apply).bind({}, {}, None, train=False)
        return Model(None, init, apply)
    except TypeError:
        pass
    try:
        inspect.signature(apply).bind({}, None)
        return Model(None, init, WithoutState(apply))
    except TypeError:
        raise ValueError(
            "from_function takes apply(params, state, x, train=) or f(params, x); "
            f"got a function of {_signature(apply)}"
        ) from None


def _signature(function: Callable[..., Any]) -> str:
    return str(inspect.signature(function)) if callable(function) else f"type {type(function).__name__}"


class WithoutState:
    """The `apply` of a function `f(params, x)`: the state comes back as it went in."""

    def __init__(self, function: Callable[[Params, Tensor], Logits]) -> None:
        self.function = function

    def __call__(self, params: Params, state: State, x: Tensor, *, train: bool) -> tuple[Logits, State]:
        """The function's output, and the state."""
        return self.function(params, x), state


# --------------------------------------------------------------------------- which modules


def unwrap_module(module: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and torch.compile's wrappers."""
    while True:
        if isinstance(module, DataParallel | DistributedDataParallel):
            module = module.module
        elif "_orig_mod" in getattr(module, "_modules", {}):  # OptimizedModule, whose import takes seconds
            module = module._modules["_orig_mod"]  # pyright: ignore[reportAssignmentType]
        else:
            return module


def check_module(module: Any) -> None:
    """Refuse what `torch.func.functional_call` cannot run as a function of its parameters."""
    if not isinstance(module, nn.Module):
        hint = ". For a function use from_function" if callable(module) else ""
        raise TypeError(f"from_module takes an nn.Module; got {type(module).__name__}{hint}")
    for name, part in module.named_modules():
        where = f"{type(part).__name__}{f' at {name!r}' if name else ''}"
        if isinstance(part, torch.jit.ScriptModule):
            raise ValueError(f"from_module cannot run scripted modules ({where}). Give it the module before")
        if "quantized" in type(part).__module__.split("."):
            raise ValueError(f"from_module cannot run quantised modules ({where}). Give it the float module")
        leaves = (*part._parameters.values(), *part._buffers.values())
        if any(leaf is not None and is_lazy(leaf) for leaf in leaves):
            raise ValueError(
                f"a lazy module has no parameters yet ({where}). Run a batch through it first: module(x)"
            )


# --------------------------------------------------------------------------- a module's structure


class Structure:
    """What a module is without its tensors: two copies on the meta device, one in either mode.

    With `construct` it is pickled as that, and made anew where it is unpickled: the class of a module may
    come from a file that the other process cannot import.
    """

    def __init__(self, module: nn.Module, construct: Construct | None = None) -> None:
        self.training, self.evaluating = _skeleton(module).train(), _skeleton(module).eval()
        self.construct = construct

    def __reduce__(self) -> Any:
        if self.construct is None:
            return super().__reduce__()
        return constructed, (self.construct,)


def constructed(construct: Construct) -> Structure:
    """The structure of the module that `construct` makes."""
    return Structure(construct(0), construct)


def model_of(structure: Structure) -> Model:
    """The model of a module's structure."""
    return Model(None, ModuleInit(structure), ModuleApply(structure))


class ModuleApply:
    """The `apply` of a module: its structure run with the tensors it is given."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.training, self.evaluating = structure.training, structure.evaluating

    def __call__(self, params: Params, state: State, x: Tensor, *, train: bool) -> tuple[Logits, State]:
        """The module's output, and its buffers afterwards."""
        # functional_call lets in-place updates through to the tensors it is given: hand it copies
        buffers = {path: leaf.clone() for path, leaf in tree.flatten(state).items()}
        leaves = {**tree.flatten(params), **buffers}
        skeleton = self.training if train else self.evaluating
        logits = torch.func.functional_call(skeleton, leaves, (x,), strict=True)
        return logits, tree.unflatten({path: leaves[path] for path in buffers})

    def __reduce__(self) -> Any:
        return ModuleApply, (self.structure,)


class ModuleInit:
    """The `init` of a module: its constructor, where that is known, and its shapes in any case."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure

    def __call__(
        self,
        generator: torch.Generator,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Params, State]:
        """Fresh parameters and buffers: the module constructed anew, with a seed from the generator.

        The constructor runs on the CPU with torch's global generator seeded for it, and put back as it was.
        `device="meta"` gives the shapes alone and draws nothing.
        """
        device = torch.device(device or generator.device)
        if device.type == "meta":
            module: nn.Module = self.structure.evaluating
        elif self.structure.construct is None:
            return _refuse_init(generator)
        else:
            module = self.structure.construct(draw_seed(generator))

        def place(leaf: Tensor) -> Tensor:
            return leaf.detach().to(device, dtype if leaf.is_floating_point() else leaf.dtype)

        params = {name: place(leaf) for name, leaf in module.named_parameters()}
        state = {name: place(leaf) for name, leaf in module.named_buffers()}
        return tree.unflatten(params), tree.unflatten(state)


def draw_seed(generator: torch.Generator) -> int:
    """A seed from a generator, which moves on."""
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))


def copy_module(module: nn.Module, tensor_of: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy with other tensors in place of parameters and buffers, tied where the module's are."""
    memo: dict[int, Any] = {}
    for leaf in module.parameters():
        memo[id(leaf)] = nn.Parameter(tensor_of(leaf), leaf.requires_grad)
    for leaf in module.buffers():
        memo[id(leaf)] = tensor_of(leaf)
    return copy.deepcopy(module, memo)


def _skeleton(module: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are on the meta device, tied where the module's are."""
    return copy_module(module, lambda leaf: torch.empty_like(leaf, device="meta"))


def _refuse_init(
    generator: torch.Generator,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Params, State]:
    raise NotImplementedError(
        "this model cannot draw fresh parameters: its initialisation is in a module's constructor, or was "
        "not given. Use load_network('FILE.py:CALLABLE') or from_function(apply, init=...), or build the "
        "network from the zoo"
    )
