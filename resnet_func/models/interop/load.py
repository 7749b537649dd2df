"""Any network by a name: of the zoo, torchvision, timm, or from code of your own."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from resnet_func import tree
from resnet_func.models import zoo
from resnet_func.models.interop.modules import Structure, check_module, draw_seed, model_of, unwrap_module
from resnet_func.types import Model, Params, State

SPELLINGS = "a name of the zoo, torchvision:NAME, timm:NAME, FILE.py:CALLABLE or pkg.mod:CALLABLE"


class NetworkError(TypeError, ValueError):
    """A callable that makes no network: a wrong type to who calls it, a wrong value to who names it."""


def load_network(
    spec: str, *, generator: torch.Generator | None = None, **keywords: Any
) -> tuple[Model, Params, State]:
    """A network by name, freshly initialised.

    Args:
        spec: A name of the zoo ("resnet20"); "torchvision:NAME"; "timm:NAME" (needs timm); "FILE.py:CALLABLE"
            or "pkg.mod:CALLABLE", which returns an `nn.Module`, a `Model`, or `(model, params, state)`.
        generator: What parameters are drawn from; None takes one with torch's default seed. A callable's
            `(model, params, state)` comes back as it is.
        **keywords: For the constructor: fields of `ResNetConfig`, or whatever the callable takes.

    Returns:
        `(model, params, state)`. `model.init(generator, device=, dtype=)` constructs the module anew, with
        torch's generator of the CPU seeded from `generator`, and put back as it was: a seed gives the same
        network again. (What a constructor draws from numpy or `random` is not seeded.) The model can be
        pickled, as its name and keywords.

    Raises:
        ValueError: no such network; near matches are named.
        NetworkError: the callable returns something else, or takes other keywords.
        ImportError: timm, or the callable's package, is not installed.
        FileNotFoundError: there is no such file.

    >>> model, params, state = load_network("resnet20", num_classes=100)
    >>> model.apply(params, state, torch.zeros(1, 3, 32, 32), train=False)[0].shape
    torch.Size([1, 100])
    """
    generator = torch.Generator() if generator is None else generator
    if ":" not in spec:
        check_zoo_name(spec)
        model = zoo.by_name(spec, **keywords)
        return model, *model.init(generator)
    construct = Constructor(spec, keywords)
    before = generator.get_state()
    made = construct.make(draw_seed(generator))
    match made:
        case Model():
            generator.set_state(before)  # a seed gives the network that the Model's own init gives
            return made, *made.init(generator)
        case (Model() as model, dict() as params, dict() as state):
            return model, params, state
        case nn.Module():
            return _from_module(unwrap_module(made), construct)
        case _:
            raise NetworkError(
                f"{spec} must return an nn.Module, a Model or (model, params, state); "
                f"got {type(made).__name__}"
            )


def _from_module(module: nn.Module, construct: Constructor) -> tuple[Model, Params, State]:
    check_module(module)
    model = model_of(Structure(module, construct))
    params = {name: leaf.detach() for name, leaf in module.named_parameters()}
    state = {name: leaf.detach() for name, leaf in module.named_buffers()}
    return model, tree.unflatten(params), tree.unflatten(state)


class Constructor:
    """Constructs a network by its spec and keywords, its random numbers from a seed."""

    def __init__(self, spec: str, keywords: dict[str, Any]) -> None:
        source, _, name = spec.rpartition(":")
        if source.endswith(".py") and Path(source).is_file():
            spec = f"{Path(source).resolve()}:{name}"  # also where another process has another folder
        self.spec, self.keywords = spec, keywords

    def make(self, seed: int) -> Any:
        """What the callable returns; torch's global generator is as before afterwards."""
        function = find_callable(self.spec)
        self._check_keywords(function)
        # only the CPU's generator: torch.manual_seed would seed every device's
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            return function(**self.keywords)

    def _check_keywords(self, function: Callable[..., Any]) -> None:
        """Refuse a callable that cannot be called so; what it raises itself stays as it is."""
        try:
            signature = inspect.signature(function)
        except ValueError:  # some of C's have none
            return
        try:
            signature.bind(**self.keywords)
        except TypeError as error:
            given = ", ".join(self.keywords) or "no arguments"
            raise NetworkError(f"{self.spec} cannot be called with {given}: {error}") from error

    def __call__(self, seed: int) -> nn.Module:
        """The module."""
        return unwrap_module(self.make(seed))


# --------------------------------------------------------------------------- names


def find_callable(spec: str) -> Callable[..., Any]:
    """The constructor that a spec with a colon names; errors as of `load_network`."""
    source, _, name = spec.rpartition(":")
    match source:
        case "torchvision":
            return _torchvision(name)
        case "timm":
            return _timm(name)
        case "":
            raise ValueError(f"{spec!r} names no network; expected {SPELLINGS}")
    module = _import_file(Path(source)) if source.endswith(".py") else _import_module(source)
    function = getattr(module, name, None)
    if not callable(function):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{source} has no function or class {name!r}{_near(name, public)}")
    return function


def check_zoo_name(name: str) -> None:
    """Refuse what is no name of the zoo, with those near it."""
    if name not in zoo.ZOO:
        raise ValueError(f"no network of the zoo is called {name!r}{_near(name, zoo.ZOO)}. Give {SPELLINGS}")


def _near(name: str, names: Iterable[str]) -> str:
    """Names like it, as the end of a message."""
    near = difflib.get_close_matches(name, list(names), n=4, cutoff=0.5)
    return f"; near it are {', '.join(near)}" if near else ""


def _torchvision(name: str) -> Callable[..., Any]:
    import torchvision  # takes a second, and nothing else here needs it

    names = torchvision.models.list_models()
    if name not in names:
        raise ValueError(f"torchvision has no model {name!r}{_near(name, names)}")
    return torchvision.models.get_model_builder(name)


def _timm(name: str) -> Callable[..., Any]:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"timm:{name} needs timm ({error}): pip install 'resnet-func[timm]'") from error
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}{_near(name, timm.list_models())}")
    return timm.models.model_entrypoint(name)


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # found, but something that it imports is not
        raise ImportError(f"no package or module {name!r}. For a file write FILE.py:CALLABLE") from error


def _import_file(path: Path) -> ModuleType:
    """The module of a Python file, imported once, with the files beside it importable while it runs."""
    if not path.is_file():
        raise FileNotFoundError(f"no Python file at {path}")
    path = path.resolve()
    name = f"_resnet_func_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module
