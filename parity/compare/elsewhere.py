"""The same networks elsewhere: torchvision's and timm's plain ResNets, against the zoo's, to the bit.

Unlike the section bitwise, nothing here is told how to read a module: leaves are matched as
`python -m parity compare` matches those of any two networks.
"""

from __future__ import annotations

from functools import lru_cache, partial
from unittest import SkipTest

import torch

from parity.cell import Cell
from parity.compare.command import Pair, compare_graphs, compare_step, make_pair
from parity.compare.matching import NoMatchError
from resnet_func.models import zoo
from resnet_func.models.interop.load import load_network
from resnet_func.testing import randn

IMAGE_SIZE, SAMPLES = 64, 2
QUICK = ("torchvision:resnet18", "timm:resnet18")
WAYS = ("fp64-eval", "fp64-train", "fp32-eval", "fp32-train", "graphs-eval", "graphs-train")


def cells(quick: bool) -> list[Cell]:
    """A cell for each package, network, and way to compare."""
    specs = [f"{package}:{name}" for package in ("torchvision", "timm") for name in zoo.IMAGENET]
    return [
        Cell("elsewhere", f"{spec}/{way}", partial(check, spec, way))
        for spec in specs
        if not quick or spec in QUICK
        for way in WAYS
    ]


def check(spec: str, way: str) -> str:
    """The network of a package is the zoo's of that name.

    Raises:
        AssertionError: it is not, and where it differs.
        SkipTest: the package is missing, or has no such network.
    """
    torch.set_num_threads(1)  # so that a sum has one order
    pair = make(spec)
    how, mode = way.split("-")
    x = randn(SAMPLES, 3, IMAGE_SIZE, IMAGE_SIZE, seed=1, dtype=torch.float64)
    row = compare_graphs(pair, x, mode) if how == "graphs" else compare_step(pair, x, how, mode)
    assert row.equal, f"{row.variant}: {row.said}"
    return f"{pair.matched}; {row.said}"


@lru_cache(maxsize=1)
def make(spec: str) -> Pair:
    """The zoo's network and the package's, with leaves of one name."""
    try:
        theirs = load_network(spec)
    except (ImportError, ValueError) as error:
        raise SkipTest(str(error)) from error
    try:
        return make_pair(load_network(spec.partition(":")[2]), theirs)
    except NoMatchError as error:
        raise AssertionError(f"the leaves do not match: {error}") from error
