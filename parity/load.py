"""Networks by the spelling that commands take: `load_network("torchvision:resnet18")`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resnet_func.models import interop, zoo
from resnet_func.testing import generator
from resnet_func.types import Model, Params, State


def load_network(spec: str, **options: Any) -> tuple[Model, Params, State]:
    """A network with fresh parameters, from seed 0: `(model, params, state)`.

    Args:
        spec: A name of the zoo, "torchvision:NAME", "timm:NAME", "FILE.py:CALLABLE" or "pkg.mod:CALLABLE". A
            callable returns an `nn.Module` or `(model, params, state)`.
        **options: For the constructor, such as `num_classes=10`.

    Raises:
        ValueError: there is no such network; one line says what there is.
    """
    try:  # the library's own resolver, where there is one, knows more spellings
        library = importlib.import_module("resnet_func.models.load")
    except ModuleNotFoundError:
        return _load(spec, options)
    return library.load_network(spec, **options)


def _load(spec: str, options: dict[str, Any]) -> tuple[Model, Params, State]:
    source, colon, name = spec.rpartition(":")
    if not colon:
        if spec not in zoo.ZOO:
            raise ValueError(
                f"no network is called {spec!r}. Give one of {', '.join(zoo.ZOO)}; or torchvision:NAME, "
                "timm:NAME, FILE.py:CALLABLE, pkg.mod:CALLABLE"
            )
        model = zoo.by_name(spec, **options)
        return model, *model.init(generator(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = _constructor(source, name)(**options)
    return interop.from_module(made) if isinstance(made, nn.Module) else made


def _constructor(source: str, name: str) -> Callable[..., Any]:
    try:
        if source == "timm":
            create = importlib.import_module("timm").create_model
            return lambda **options: create(name, pretrained=False, **options)
        if source.endswith(".py"):
            return getattr(_module_of_file(Path(source)), name)
        return getattr(
            importlib.import_module("torchvision.models" if source == "torchvision" else source), name
        )
    except ModuleNotFoundError as error:
        raise ValueError(f"{source}:{name} needs the package {error.name}, which is not installed") from error
    except AttributeError as error:
        raise ValueError(f"{source} has no network {name!r}") from error


def _module_of_file(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"no file {path} to take a network from")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
