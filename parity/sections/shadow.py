"""float64 shadows: where bits may differ, the error is no larger than the module's under the same change.

The change is another layout, N batches of one, or a compiled step. The function under the change, and the
module under the same change, take one float32 step from the same numbers; the shadow is that step in float64.
A leaf's error (logits, gradients, running statistics) is the 2-norm of its distance to the shadow over the
shadow's norm, and at least one rounding. (The largest entry's error would be an extreme value, which varies
more.) Its typical error is the median over batches. The certificate is typical error over typical error: its
median and its worst over leaves.

No limit is a constant: what a kernel rounds differs between processors by factors, and the module changes its
kernels where the function does. How far two ratios may be from 1 follows from how much the module's own error
varies from batch to batch in the same run (`limits_of`); the figure says what it came to, and beside it what
the change costs against the plain module, in ours and in the module.

A change that is no mere rearrangement (an instance norm, a wrong sum) would give both sides the same large
error. So it is also made in float64, where the function has to agree with the shadow in half of all digits.

Two things keep out what is not the network's. The last weight of every residual branch is small, as in
trained networks: else depth amplifies rounding until some ReLU is open here and closed in the shadow, an
error thousands of times larger on the side where it happens. And there are ten classes: a sum over a
thousand, in the last layer's backward pass, goes by another kernel for one row than for four, and everything
below inherits its error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import exp, log, pi, sqrt
from statistics import NormalDist, median
from typing import Any, NamedTuple, TypeAlias
from unittest import SkipTest

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch._inductor.exc import InvalidCxxCompiler

from parity.cell import Cell
from parity.reference import WideResNet, cifar_resnet
from parity.steps import function_step, loaded, module_step, perturbed, with_small_branches
from resnet_func import tree
from resnet_func.models import zoo
from resnet_func.models.config import ResNetConfig
from resnet_func.testing import generator, randn
from resnet_func.train import to_memory_format
from resnet_func.types import Model, Params, State

Leaves: TypeAlias = dict[str, Tensor]
Step: TypeAlias = Callable[[Tensor, Tensor], Leaves]

CLASSES = 10
SIZES = {"imagenet": (2, 3, 65, 64), "cifar": (4, 3, 15, 13)}


FALSE_ALARM = 1e-6  # the chance that a cell fails where the two sides round equally well
MAD_OF_NORMAL = NormalDist().inv_cdf(0.75)  # median absolute deviation of a normal distribution, in sigmas


# For a median absolute deviation of so few values: Croux and Rousseeuw 1992, Time-efficient algorithms for
# two highly robust estimators of scale.
FEW_VALUES = {2: 1.196, 3: 1.495, 4: 1.363, 5: 1.206, 6: 1.200, 7: 1.140, 8: 1.129}


class Errors(NamedTuple):
    """Of one leaf, batch by batch: the function's, the module's under the same change, the plain module's."""

    ours: list[float]
    module: list[float]
    plain: list[float]


class Limits(NamedTuple):
    """What the ratios' median over leaves may be, and the ratio of each leaf."""

    median: float
    leaf: dict[str, float]


class Case(NamedTuple):
    """A network in float32, twice: as a function, and how to make its module."""

    model: Model
    config: ResNetConfig
    params: Params
    state: State
    construct: Callable[[], nn.Module]
    train: bool


class Claim(NamedTuple):
    """A change of the function, the same change of the module, and the networks that it is made in."""

    variant: Callable[[Case], Step]
    module: Callable[[Case], Step]
    norm: str
    train: bool


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
    variant, changed_module, norm, train = CLAIMS[claim]
    case = built(name, norm, train=train)
    errors = errors_of(case, (variant(case), changed_module(case), module_nchw(case)), batches)
    figure = certified(errors)
    assert_exact_in_float64(case, variant)
    return figure


def certified(errors: dict[str, Errors]) -> str:
    """The ratios' median and worst with their limits, as a figure.

    Raises:
        AssertionError: one of them is above its limit, or the module's error is not finite.
    """
    typical = {name: Errors(*([median(of)] for of in each)) for name, each in errors.items()}
    assert all(each.module[0] < float("inf") for each in typical.values()), "the module is not finite"
    limits = limits_of({name: each.module for name, each in errors.items()})
    ratio = {name: each.ours[0] / each.module[0] for name, each in typical.items()}
    worst = max(ratio, key=lambda name: ratio[name] / limits.leaf[name])
    middle, allowed = median(ratio.values()), limits.leaf[worst]
    figure = f"errors' ratio to the module's: median {middle:.2f}, worst {ratio[worst]:.2f}"
    assert middle <= limits.median, f"{figure}; the median may be {limits.median:.2f}"
    assert ratio[worst] <= allowed, f"{figure} in {worst}, which may be {allowed:.2f}"
    ours, module = (median(each[side][0] / each.plain[0] for each in typical.values()) for side in (0, 1))
    bounds = f"(by its spread they may be {limits.median:.2f} and {allowed:.2f})"
    return f"{figure} {bounds}; to the plain module's: {ours:.2f}, the module's own {module:.2f}"


def limits_of(errors: dict[str, list[float]]) -> Limits:
    """How far apart the typical errors of two equally good sides may be, from one side's spread over batches.

    Logarithms of errors are taken as normal. Their spread is estimated by the median absolute deviation from
    the leaf's median, over all leaves and for each leaf alone: the larger counts (a leaf of few entries
    varies more). The median of B values varies by sqrt(pi / 2B) of it, the difference of two by sqrt(2) of
    that. All leaves together have the chance `FALSE_ALARM`; their median, as they depend on each other, too.
    """
    deviations = {name: [abs(log(one / median(each))) for one in each] for name, each in errors.items()}
    pooled = median(one for each in deviations.values() for one in each)

    batches = len(next(iter(errors.values())))

    def limit(deviation: float, chances: int) -> float:
        sigma = deviation * FEW_VALUES[batches] / MAD_OF_NORMAL
        deviation_of_difference = sigma * sqrt(2) * sqrt(pi / (2 * batches))
        return exp(NormalDist().inv_cdf(1 - FALSE_ALARM / chances) * deviation_of_difference)

    leaf = {name: limit(max(pooled, median(each)), len(errors)) for name, each in deviations.items()}
    return Limits(limit(pooled, 1), leaf)


def errors_of(case: Case, steps: tuple[Step, Step, Step], batches: int) -> dict[str, Errors]:
    """Of every leaf the errors of the three steps, batch by batch."""
    errors: dict[str, Errors] = {}
    shadow = float64(case)
    for x, cotangent in drawn(case, batches):
        truth, *results = (step(x, cotangent) for step in (shadow, *steps))
        for name, leaf in truth.items():
            if leaf.is_floating_point() and (case.train or not name.startswith("buffer")):
                of_leaf = errors.setdefault(name, Errors([], [], []))
                for to, result in zip(of_leaf, results, strict=True):
                    to.append(error(result[name], leaf))
    return errors


def assert_exact_in_float64(case: Case, variant: Callable[[Case], Step]) -> None:
    """In float64 the changed function has half of the shadow's digits, of which rounding takes a few."""
    x, cotangent = next(drawn(case, 1))
    truth = float64(case)(x, cotangent)
    params, state = in_float64(case.params, case.state)
    got = variant(case._replace(params=params, state=state))(x.double(), cotangent.double())
    limit = sqrt(torch.finfo(torch.float64).eps)
    for name, leaf in truth.items():
        if name in got and leaf.is_floating_point():
            distance = error(got[name], leaf)
            assert distance <= limit, f"another function: {name} is off by {distance:.1e} in float64"


def error(got: Tensor, truth: Tensor) -> float:
    """Relative, in the 2-norm, and at least one rounding; infinite where `got` is not finite."""
    assert truth.dtype == torch.float64, f"a shadow of {truth.dtype} proves nothing"
    size = truth.norm().item()
    assert 0 < size < float("inf"), "a shadow that is zero or not finite proves nothing"
    distance = (got.double() - truth).norm().item() / size
    return max(distance, torch.finfo(got.dtype).eps) if distance == distance else float("inf")


# --------------------------------------------------------------------------- networks and batches


def built(name: str, norm: Any, *, train: bool) -> Case:
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
    return cifar_resnet(name, norm=layer)


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

    params, state = in_float64(case.params, case.state)
    return lambda x, cotangent: function_step(
        case.model, params, state, x.double(), cotangent.double(), train=case.train
    )


def in_float64(params: Params, state: State) -> tuple[Params, State]:
    return tree.map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, (params, state))


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


def module_singles(case: Case) -> Step:
    """The module's batches of one; the gradients added one after another, as `backward` adds them."""
    step = module_nchw(case)

    def run(x: Tensor, cotangent: Tensor) -> Leaves:
        total: Leaves = {}
        for one, of_one in zip(x.split(1), cotangent.split(1), strict=True):
            for name, leaf in step(one, of_one).items():
                if name not in total:
                    total[name] = leaf
                elif name in ("logits", "gradient x"):
                    total[name] = torch.cat([total[name], leaf])
                else:
                    total[name] = total[name] + leaf
        return {name: leaf for name, leaf in total.items() if not name.startswith("buffer")}

    return run


def sum_of(leaves: Iterator[Tensor]) -> Tensor:
    return torch.stack(list(leaves)).sum(0)


def compiled(case: Case) -> Step:
    """Forward and backward as one graph."""
    step = torch.compile(partial(function_step, case.model, train=case.train), fullgraph=True)
    return needing_a_compiler(partial(step, case.params, case.state))


def module_compiled(case: Case) -> Step:
    """The module's forward pass as one graph, and its backward pass as another."""
    stock = loaded(case.construct, case.params, case.state)
    stock.compile(fullgraph=True)
    return needing_a_compiler(partial(module_step, stock, train=case.train))


def needing_a_compiler(step: Step) -> Step:
    def run(x: Tensor, cotangent: Tensor) -> Leaves:
        try:
            return step(x, cotangent)
        except InvalidCxxCompiler as missing:
            raise SkipTest(f"no C++ compiler for torch.compile: {missing}") from None

    return run


COMPILED = ("resnet20", "wrn_16_4", "resnet18", "resnet50")
CLAIMS = {
    "channels_last-train": Claim(channels_last, module_channels_last, "batch", True),
    "channels_last-eval": Claim(channels_last, module_channels_last, "batch", False),
    "singles-eval": Claim(singles, module_singles, "batch", False),
    "singles-group_norm": Claim(singles, module_singles, "group", True),
    "compiled-train": Claim(compiled, module_compiled, "batch", True),
}
QUICK = {
    "resnet18": ("channels_last-train",),
    "resnet20": ("channels_last-train", "channels_last-eval", "singles-eval", "singles-group_norm"),
    "resnet56": ("channels_last-train", "singles-eval"),
    "wrn_16_4": ("channels_last-train", "singles-group_norm"),
    "resnext50_32x4d": ("singles-eval",),
}
