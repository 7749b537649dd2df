"""To the bit: one step of the function against the same step of the module, on every axis.

Logits, the input's gradient, every parameter's gradient and every buffer afterwards are equal in each bit,
for networks that were built and, with torchvision's ten, for modules that `from_module` took apart.
"""

from __future__ import annotations

from functools import lru_cache, partial
from itertools import product
from unittest import SkipTest

import torch
from torch import Tensor, nn

from parity.cell import Cell
from parity.reference import module as reference
from parity.steps import function_step, loaded, module_step, perturbed
from resnet_func.models import zoo
from resnet_func.models.interop import modules
from resnet_func.testing import assert_trees_equal, generator, randn
from resnet_func.train import to_memory_format
from resnet_func.types import Model, Params, State

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
SIZES = {"imagenet": (2, 3, 33, 47), "cifar": (3, 3, 15, 13)}
QUICK = ("resnet18", "resnet20", "wrn_16_4")  # in every variant; the others in one


def cells(quick: bool) -> list[Cell]:
    return [
        Cell("bitwise", f"{name}/{dtype}-{mode}-{layout}{suffix}", partial(check, name, *variant, device))
        for name in zoo.ZOO
        for device, suffix in {"cpu": "", "cuda": "-cuda"}.items()
        for variant in product(DTYPES, ("train", "eval"), FORMATS)
        for dtype, mode, layout in [variant]
        if not quick or (device == "cpu" and (name in QUICK or variant == ("fp32", "train", "nchw")))
    ]


def check(name: str, dtype: str, mode: str, layout: str, device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise SkipTest("no CUDA device here")
    model, params, state, module = pair(name, dtype, layout, device)
    shape = SIZES[model.config.stem] if model.config else SIZES["imagenet"]
    x = placed(randn(*shape, seed=1, dtype=DTYPES[dtype]), layout, device)
    cotangent = randn(shape[0], params["fc"]["weight"].shape[0], seed=2, dtype=DTYPES[dtype]).to(device)
    train = mode == "train"
    want = module_step(module, x, cotangent, train=train)
    assert_trees_equal(function_step(model, params, state, x, cotangent, train=train), want, finite=True)
    ways = "built"
    if name in zoo.IMAGENET:
        taken = modules.from_module(module)
        assert_trees_equal(function_step(*taken, x, cotangent, train=train), want, finite=True)
        ways = "built and from_module"
    return f"0 ULP in {len(want)} leaves, {ways}"


@lru_cache(maxsize=1)  # the cells of one network come one after another
def pair(name: str, dtype: str, layout: str, device: str) -> tuple[Model, Params, State, nn.Module]:
    """One network twice, with the same parameters."""
    model = zoo.by_name(name)
    params, state = perturbed(*model.init(generator(0), dtype=DTYPES[dtype], device=device), seed=3)
    params = to_memory_format(params, FORMATS[layout])
    return model, params, state, loaded(partial(reference, name), params, state)


def placed(x: Tensor, layout: str, device: str) -> Tensor:
    return x.to(device).contiguous(memory_format=FORMATS[layout])
