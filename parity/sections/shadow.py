"""float64 shadows: where bits must differ, the error is no larger than the module's own.

A variant (channels_last, N batches of one, a compiled step) and its reference, the eager module, take one
float32 step from the same numbers; the shadow is that step in float64. A leaf's error (logits, gradients,
running statistics) is the 2-norm of its distance to the shadow over the shadow's norm, and at least one
rounding. (The largest entry's error would be an extreme value, which varies more.) Its typical error is the
median over batches. The certificate is typical error over typical error: its median and its worst over
leaves.

Three things keep out what is not rounding, or not the network's. The last weight of every residual branch
is small, as in trained networks: else depth amplifies rounding until some ReLU is open here and closed in
the shadow, an error thousands of times larger on the side where it happens; and where it happens all the
same, the median passes over that batch. There are ten classes: a sum over a thousand, in the last layer's
backward pass, has twice the error for one row that it has for four, by another kernel, and everything below
inherits it. And images are large enough for maps of 3x2 pixels at the end, since a convolution's backward
pass does so too for one sample of 2x1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import NamedTuple, TypeAlias
from unittest import SkipTest

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch._inductor.exc import InvalidCxxCompiler

from parity.cell import Cell
from parity.compare import (
    function_step,
    generator,
    loaded,
    module_step,
    perturbed,
    randn,
    with_small_branches,
)
from parity.reference import CifarResNet, WideResNet
from resnet_func import tree
from resnet_func.models import zoo
from resnet_func.models.config import ResNetConfig
from resnet_func.train import to_memory_format
from resnet_func.types import Model, Params, State

Leaves: TypeAlias = dict[str, Tensor]
Step: TypeAlias = Callable[[Tensor, Tensor], Leaves]

EPS = torch.finfo(torch.float32).eps
CLASSES = 10
SIZES = {"imagenet": (2, 3, 65, 64), "cifar": (4, 3, 15, 13)}


class Limits(NamedTuple):
    """What the ratios' median over leaves and the worst may be."""

    median: float
    worst: float


AS_GOOD = Limits(1.05, 2.0)
# torch's kernels: in NCHW its batch norm sums in float64, in channels_last in float32 (a hundredfold error);
# a convolution's backward pass adds up longer chains there (fourfold). The module's error in channels_last is
# the same: there the two are equal to the bit.
OTHER_LAYOUT = Limits(1.6, 8.0)


class Case(NamedTuple):
    """A network in float32, twice: as a function, and how to make its module."""

    model: Model
    config: ResNetConfig
    params: Params
    state: State
    construct: Callable[[], nn.Module]
    train: bool


class Claim(NamedTuple):
    """A variant, what it is measured against, and in which networks."""

    variant: Callable[[Case], Step]
    reference: Callable[[Case], Step]
    norm: str
    train: bool
    limits: Limits


def cells(quick: bool) -> list[Cell]:
    chosen = QUICK if quick else {name: claims_of(name) for name in zoo.ZOO}
    return [
        Cell("fp64-shadow", f"{name}/{claim}", partial(check, name, claim, batches=batches_of(name, quick)))
        for name, claims in chosen.items()
        for claim in claims
    ]


def claims_of(name: str) -> list[str]:
    """Those that compile, for the networks that do so in a minute or two."""
    return [claim for claim in CLAIMS if not claim.startswith("compiled") or name in COMPILED]


def batches_of(name: str, quick: bool) -> int:
    return 4 if quick or name in zoo.IMAGENET else 8


def check(name: str, claim: str, *, batches: int) -> str:
    if name in DROWNED and claim == "channels_last-train":
        raise SkipTest("in nearly every batch some ReLU opens on one side alone, which hides rounding")
    variant, reference, norm, train, limits = CLAIMS[claim]
    case = built(name, norm, train=train)
    return certified(ratios(case, variant(case), reference(case), batches), limits)


def certified(ratio: dict[str, float], limits: Limits) -> str:
    """The ratios' median and worst as a figure.

    Raises:
        AssertionError: one of them is above its limit.
    """
    worst = max(ratio, key=lambda name: ratio[name])
    middle = median(ratio.values())
    figure = f"errors' ratio: median {middle:.2f}, worst {ratio[worst]:.2f}"
    assert middle <= limits.median, f"{figure}; the median may be {limits.median}"
    assert ratio[worst] <= limits.worst, f"{figure} in {worst}, which may be {limits.worst}"
    return figure


def ratios(case: Case, variant: Step, reference: Step, batches: int) -> dict[str, float]:
    """Of every leaf, the typical error of the variant over that of the reference."""
    errors: dict[str, list[list[float]]] = {}
    shadow = float64(case)
    for x, cotangent in drawn(case, batches):
        truth, *steps = (step(x, cotangent) for step in (shadow, variant, reference))
        for name, leaf in truth.items():
            if leaf.is_floating_point() and (case.train or not name.startswith("buffer")):
                errors.setdefault(name, []).append([error(step[name], leaf) for step in steps])
    typical = {name: [median(of) for of in zip(*each, strict=True)] for name, each in errors.items()}
    assert all(theirs < float("inf") for _, theirs in typical.values()), "the reference is not finite"
    return {name: ours / theirs for name, (ours, theirs) in typical.items()}


def error(got: Tensor, truth: Tensor) -> float:
    """Relative, in the 2-norm, and at least one rounding; infinite where `got` is not finite."""
    assert truth.dtype == torch.float64, f"a shadow of {truth.dtype} proves nothing"
    size = truth.norm().item()
    assert 0 < size < float("inf"), "a shadow that is zero or not finite proves nothing"
    distance = (got.double() - truth).norm().item() / size
    return max(distance, EPS) if distance == distance else float("inf")


# --------------------------------------------------------------------------- networks and batches


def built(name: str, norm: str, *, train: bool) -> Case:
    model = zoo.by_name(name, norm=norm, num_classes=CLASSES)
    assert model.config
    params, state = perturbed(*model.init(generator(0)), seed=3)
    construct = partial(module, name, norm)
    return Case(model, model.config, with_small_branches(params), state, construct, train)


def module(name: str, norm: str) -> nn.Module:
    """The network as a plain module, with either norm."""
    config = zoo.config(name)
    layer = nn.BatchNorm2d if norm == "batch" else partial(nn.GroupNorm, config.norm_groups)
    if name in zoo.IMAGENET:
        return getattr(torchvision.models, name)(norm_layer=layer, num_classes=CLASSES)
    if name in zoo.WIDE:
        return WideResNet(config.depths[0], config.widths[0] // 16, layer)
    return CifarResNet(config.depths[0], "A", layer)


def drawn(case: Case, batches: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images, and the gradient of their cross-entropy by the logits."""
    shape = SIZES[case.config.stem]
    for seed in range(batches):
        x = randn(*shape, seed=10 + seed)
        y = torch.randint(CLASSES, shape[:1], generator=generator(100 + seed))
        logits, _ = case.model.apply(case.params, case.state, x, train=case.train)
        yield x, logits.softmax(1) - F.one_hot(y, CLASSES)


# --------------------------------------------------------------------------- steps


def float64(case: Case) -> Step:
    """The shadow: the same float32 numbers, and every operation in float64."""

    def double(leaf: Tensor) -> Tensor:
        return leaf.double() if leaf.is_floating_point() else leaf

    params, state = tree.map(double, (case.params, case.state))
    return lambda x, cotangent: function_step(
        case.model, params, state, x.double(), cotangent.double(), train=case.train
    )


def module_nchw(case: Case) -> Step:
    return partial(module_step, loaded(case.construct, case.params, case.state), train=case.train)


def module_channels_last(case: Case) -> Step:
    stock = loaded(case.construct, to_memory_format(case.params, torch.channels_last), case.state)
    return lambda x, cotangent: module_step(stock, in_channels_last(x), cotangent, train=case.train)


def channels_last(case: Case) -> Step:
    params = to_memory_format(case.params, torch.channels_last)
    return lambda x, cotangent: function_step(
        case.model, params, case.state, in_channels_last(x), cotangent, train=case.train
    )


def in_channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def singles(case: Case) -> Step:
    """Every sample by itself; the gradients added up."""

    def step(x: Tensor, cotangent: Tensor) -> Leaves:
        pairs = zip(x.split(1), cotangent.split(1), strict=True)
        each = [function_step(case.model, case.params, case.state, *p, train=case.train) for p in pairs]
        apart = ("logits", "gradient x")
        return {
            name: torch.cat([s[name] for s in each]) if name in apart else sum_of(s[name] for s in each)
            for name in each[0]
            if not name.startswith("buffer")
        }

    return step


def sum_of(leaves: Iterator[Tensor]) -> Tensor:
    return torch.stack(list(leaves)).sum(0)


def compiled(case: Case) -> Step:
    """Forward and backward as one graph."""
    step = torch.compile(partial(function_step, case.model, train=case.train), fullgraph=True)

    def run(x: Tensor, cotangent: Tensor) -> Leaves:
        try:
            return step(case.params, case.state, x, cotangent)
        except InvalidCxxCompiler as missing:
            raise SkipTest(f"no C++ compiler for torch.compile: {missing}") from None

    return run


COMPILED = ("resnet20", "wrn_16_4", "resnet18", "resnet50")
# Of so many ReLUs some input rounds across zero in nearly every batch, on one side or the other: the errors
# are those of another branch, a thousandth, not of rounding, a millionth.
DROWNED = ("resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2", "wrn_28_10")
CLAIMS = {
    "channels_last-train": Claim(channels_last, module_nchw, "batch", True, OTHER_LAYOUT),
    "channels_last-eval": Claim(channels_last, module_nchw, "batch", False, OTHER_LAYOUT),
    "singles-eval": Claim(singles, module_nchw, "batch", False, AS_GOOD),
    "singles-group_norm": Claim(singles, module_nchw, "group", True, AS_GOOD),
    # compiled, convolutions are channels_last
    "compiled-train": Claim(compiled, module_channels_last, "batch", True, AS_GOOD),
}
QUICK = {
    "resnet18": ("channels_last-train",),
    "resnet20": ("channels_last-train", "channels_last-eval", "singles-eval", "singles-group_norm"),
    "resnet56": ("channels_last-train", "singles-eval"),
    "wrn_16_4": ("channels_last-train", "singles-group_norm"),
    "resnext50_32x4d": ("singles-eval",),
}
