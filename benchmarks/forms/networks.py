"""The networks that are measured, the zoo's or anybody's: as functions, and as modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import resnet_func as rf
from benchmarks.harness.options import TOY
from parity.steps import loaded
from resnet_func import tree
from resnet_func.models import summary, zoo
from resnet_func.types import Params, State


class Case(NamedTuple):
    """A network with its parameters, and one batch, all on one device."""

    name: str
    model: rf.Model
    params: Params
    state: State
    x: Tensor
    y: Tensor


def known() -> tuple[str, ...]:
    return (TOY, *zoo.ZOO)


def make_model(name: str, size: int, **changes: Any) -> rf.Model:
    """A network of the zoo; torchvision's get the CIFAR stem and ten classes for images up to 64 pixels.

    Raises:
        ValueError: no such network in the zoo.
    """
    if name == TOY:
        return zoo.by_name("resnet20", depths=(1, 1, 1), **changes)
    if name not in zoo.ZOO:
        raise ValueError(
            f"no network is called {name!r}; there are {', '.join(known())}, and torchvision:NAME, "
            "timm:NAME, FILE.py:CALLABLE and pkg.mod:CALLABLE"
        )
    if name in zoo.IMAGENET and size <= 64:
        changes = {"stem": "cifar", "num_classes": 10, **changes}
    return zoo.by_name(name, **changes)


def make_case(
    name: str, batch: int, size: int, device: torch.device | str = "cpu", *, seed: int = 0, **changes: Any
) -> Case:
    """The network with parameters drawn from a seed and a batch from the next.

    Args:
        name: Any spelling of `load_network`; what is not of the zoo is taken as it is, with 3 channels.
        batch, size: Images, and their side in pixels.
        changes: Fields of the config of a network of the zoo.

    Raises:
        ValueError: no such network, or sizes below 1; or the network refuses such images.
    """
    if batch < 1 or size < 1:
        raise ValueError(f"batch and size must be 1 or more; got {batch} and {size}")
    source, generator = (torch.Generator().manual_seed(seed + i) for i in (0, 1))
    x = torch.randn(batch, 3, size, size, generator=generator)
    if ":" in name:
        model, params, state = _load(name, source)
        classes = _count_classes(name, model, params, state, x[:1])
    else:
        model = make_model(name, size, **changes)
        assert model.config is not None
        params, state = model.init(source)
        classes = model.config.num_classes
    y = torch.randint(classes, (batch,), generator=generator)
    params, state, x, y = tree.map(lambda leaf: leaf.to(device), (params, state, x, y))
    return Case(name, model, params, state, x, y)


def _load(name: str, source: torch.Generator) -> tuple[rf.Model, Params, State]:
    try:
        return rf.load_network(name, generator=source)
    except (ImportError, FileNotFoundError, TypeError) as error:
        raise ValueError(str(error)) from error


def _count_classes(name: str, model: rf.Model, params: Params, state: State, x: Tensor) -> int:
    try:
        logits, _ = model.apply(params, state, x, train=False)
    except (RuntimeError, AssertionError, TypeError) as error:
        line = " ".join(str(error).split())
        raise ValueError(
            f"{name} does not take images {list(x.shape[1:])}: {line}. Try another --size"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ValueError(f"{name} must return logits [N, classes] to be measured")
    return logits.shape[1]


def slug(name: str) -> str:
    """A network's name as a part of a file's: "timm-resnet18", "mine-net" for `somewhere/mine.py:net`.

    >>> slug("somewhere/mine.py:net")
    'mine-net'
    """
    source, _, last = name.rpartition(":")
    return f"{Path(source).name.removesuffix('.py')}-{last}" if source else last


def make_module(case: Case) -> nn.Module:
    """The network as a plain module with copied parameters.

    torchvision's, or that of `parity.reference`; for what is not of the zoo, its own.
    """
    if case.model.config is None:
        return rf.to_module(case.model, case.params, case.state)
    # not at the top of the file: both take seconds to import, and the functions need neither
    import torchvision

    from parity import reference

    config = case.model.config
    assert config is not None

    def construct() -> nn.Module:
        if config.shortcut == "pad" or case.name in zoo.CIFAR:
            option = "A" if config.shortcut == "pad" else "B"
            return reference.CifarResNet(
                config.depths[0], option, num_classes=config.num_classes, widths=config.widths
            )
        if case.name in zoo.WIDE:
            return reference.module(case.name)
        module = getattr(torchvision.models, case.name)(num_classes=config.num_classes)
        if config.stem == "cifar":
            module.conv1 = nn.Conv2d(3, config.widths[0], 3, 1, 1, bias=False)
            module.maxpool = nn.Identity()
        return module

    params = tree.map(lambda leaf: leaf.detach().clone(), case.params)
    make: Callable[[], nn.Module] = construct
    return loaded(make, params, case.state)


def flops_per_image(case: Case, *, train: bool) -> int:
    """Model FLOPs of one image: two a multiply-accumulate, and a training step is three forward passes.

    The convention of the literature: what the mathematics needs, not what an implementation recomputes.
    """
    if case.model.config is None:
        rows = summary.summarize_network(case.model, case.params, case.state, case.x[:1])
    else:
        rows = summary.summarize(case.model, case.x.shape[-1])
    macs = summary.totals(rows).macs
    return (6 if train else 2) * macs
