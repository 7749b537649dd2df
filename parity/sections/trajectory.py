"""Trained alike: after every step, parameters and buffers are those of the stock loop, to the bit.

The stock loop is the module, `nn.CrossEntropyLoss` and `torch.optim.SGD`, with momentum, weight decay and a
schedule; the images are scikit-learn's digits. (The loss a step reports may differ by an ULP: it is a sum
divided by N, the stock loop's a mean. Their gradients do not.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from parity.cell import Cell
from parity.reference import module as reference
from parity.steps import loaded
from resnet_func import tree
from resnet_func.losses import cross_entropy
from resnet_func.models import zoo
from resnet_func.optim import sgd
from resnet_func.optim.schedules import step as drops
from resnet_func.testing import assert_trees_equal, generator
from resnet_func.train import init_train_state, make_train_step

LR, MOMENTUM, WEIGHT_DECAY, BATCH = 0.1, 0.9, 5e-4, 32


def cells(quick: bool) -> list[Cell]:
    lengths = {"resnet20": 30, "resnet18": 5} if quick else {"resnet20": 1000, "resnet18": 100}
    return [
        Cell("trajectory", f"{name}/{steps}-steps", partial(check, name, steps))
        for name, steps in lengths.items()
    ]


def check(name: str, steps: int) -> str:
    model = zoo.by_name(name)
    params, state = model.init(generator(0))
    module = loaded(partial(reference, name), tree.map(torch.clone, params), state).train()
    optimizer = sgd(drops(LR, milestones(steps)), momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    train_state = init_train_state(params, state, optimizer)
    step = make_train_step(model, cross_entropy, optimizer)
    stock = make_stock_step(module, steps)
    size = 8 if name in zoo.CIFAR else 32
    for index, (x, y) in enumerate(digits(size, steps), start=1):
        train_state, _ = step(train_state, x, y)
        stock(x, y)
        want = module.state_dict()
        got = {**tree.flatten(train_state.params), **tree.flatten(train_state.state)}
        try:
            assert_trees_equal(got, want, finite=True)
        except AssertionError as failure:
            raise AssertionError(f"step {index} of {steps}: {failure}") from None
    return f"0 ULP in {len(module.state_dict())} leaves after each of {steps} steps"


def milestones(steps: int) -> list[int]:
    return [steps // 2, steps * 3 // 4]


def make_stock_step(module: nn.Module, steps: int) -> Callable[[Tensor, Tensor], None]:
    optimizer = torch.optim.SGD(module.parameters(), LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones(steps))
    criterion = nn.CrossEntropyLoss()

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        criterion(module(x), y).backward()
        optimizer.step()
        scheduler.step()

    return step


def digits(size: int, batches: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of digits in colour, `size` pixels wide, in an order of their own."""
    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 8 - 1
    x, y = F.interpolate(x, size=size).expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(labels)
    source = generator(1)
    for _ in range(batches):
        chosen = torch.randint(len(x), (BATCH,), generator=source)
        yield x[chosen], y[chosen]
