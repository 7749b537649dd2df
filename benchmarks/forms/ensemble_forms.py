"""A training step of K networks, each with parameters and a batch of its own, in every form that might win.

`vmap` over stacked parameters turns every convolution into one of K groups, which CPUs are slow at; so there
are also K steps one after another, K steps unrolled into one graph, convolutions as batched matrix products,
and K steps side by side, each on one core.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.forms.networks import Case
from benchmarks.forms.step import FORMATS, changes, make_optimizer
from benchmarks.harness.conditions import compiled
from benchmarks.harness.measure import Outcome, Skipped, Variant
from resnet_func import tree
from resnet_func.app import runtime
from resnet_func.losses import cross_entropy
from resnet_func.train import init_train_state, make_train_step, to_memory_format
from resnet_func.types import Metrics, TrainState

BASELINE, AGAIN = "one after another, eager", "one after another again, eager"
FORMS = (
    BASELINE,
    AGAIN,
    "one after another, compiled",
    "side by side, eager",
    "side by side, compiled",
    "unrolled, compiled",
    "vmap, eager",
    "vmap, compiled",
    "vmap in pairs, eager",
    "vmap of matrix products, eager",
)
UNROLLED_AT_MOST = 4
Carried = tuple[Any, ...]  # params, state, opt_state: a TrainState's Nones are nothing to vmap over
Core = Callable[[Carried, Tensor, Tensor], tuple[Carried, Metrics]]


class Work(NamedTuple):
    """One form of one ensemble."""

    form: str
    layout: str
    cases: tuple[Case, ...]
    threads: int
    backend: str


def make_variant(work: Work) -> Variant:
    """The ensemble's step in that form.

    Raises:
        Skipped: it cannot run here.
    """
    obstacle = runtime.compile_obstacle(work.cases[0].x.device)
    if "compiled" in work.form and obstacle:
        raise Skipped(obstacle)
    if work.form.startswith("unrolled") and len(work.cases) > UNROLLED_AT_MOST:
        raise Skipped(f"{len(work.cases)} networks in one graph compile {len(work.cases)} times as long")
    if work.form.startswith("vmap"):
        return _stacked(work)
    return _separate(work)


def make_core(case: Case) -> Core:
    """The library's step of one network, on what of a TrainState is tensors."""
    train_step = make_train_step(case.model, cross_entropy, make_optimizer())

    def core(carried: Carried, x: Tensor, y: Tensor) -> tuple[Carried, Metrics]:
        train_state, metrics = train_step(TrainState(*carried), x, y)
        return tuple(train_state[:3]), metrics

    return core


# --------------------------------------------------------------------------- K separate steps


def _separate(work: Work) -> Variant:
    core = make_core(work.cases[0])
    members = [_member(case, work.layout) for case in work.cases]
    xs = [_images(case, work.layout) for case in work.cases]
    ys = [case.y for case in work.cases]
    advance = _advance(work, core)
    metrics: list[Metrics] = []

    def step() -> None:
        results = advance(members, xs, ys)
        members[:], metrics[:] = map(list, zip(*results, strict=True))

    return Variant(
        step,
        lambda: _outcome([m["loss"] for m in metrics], [carried[0] for carried in members], work.cases),
        "fp32",
    )


def _advance(work: Work, core: Core) -> Callable[..., Sequence[tuple[Carried, Metrics]]]:
    """A function of all members, images and targets that takes one step of each."""

    def loop(members: Any, xs: Any, ys: Any) -> list[tuple[Carried, Metrics]]:
        return [core(*one) for one in zip(members, xs, ys, strict=True)]

    if work.form.startswith("unrolled"):
        return compiled(loop, work.backend)
    if "compiled" in work.form:
        core = compiled(core, work.backend)
    if work.form.startswith("side"):
        # a thread of Python for each core, and in it operations of one thread: torch keeps that apart
        pool = ThreadPoolExecutor(work.threads, initializer=torch.set_num_threads, initargs=(1,))
        case = work.cases[0]  # the first call alone: two that compile at once would wait for each other
        pool.submit(core, _member(case, work.layout), _images(case, work.layout), case.y).result()
        return lambda members, xs, ys: list(pool.map(core, members, xs, ys))
    return loop


def _images(case: Case, layout: str) -> Tensor:
    return case.x.contiguous(memory_format=FORMATS[layout])


def _member(case: Case, layout: str) -> Carried:
    params = to_memory_format(case.params, FORMATS[layout])
    return tuple(init_train_state(params, case.state, make_optimizer())[:3])


# --------------------------------------------------------------------------- one step of stacked parameters


def _stacked(work: Work) -> Variant:
    core = make_core(work.cases[0])
    chunk = 2 if "pairs" in work.form else None
    together: Callable[..., Any] = torch.func.vmap(core, chunk_size=chunk)
    if "compiled" in work.form:
        together = compiled(together, work.backend)
    if "matrix products" in work.form:
        together = _by_matrix_products(together)
    members = [_member(case, "NCHW") for case in work.cases]
    carried = tree.map(lambda *leaves: torch.stack(leaves), *members)
    carried = tree.map(lambda leaf: _grouped(leaf, 0, work.layout) if leaf.ndim == 5 else leaf, carried)
    x = _grouped(torch.stack([case.x for case in work.cases], 1), 1, work.layout).transpose(0, 1)
    y = torch.stack([case.y for case in work.cases])
    losses: list[Tensor] = []

    def step() -> None:
        nonlocal carried
        carried, metrics = together(carried, x, y)
        losses[:] = [metrics["loss"]]

    def outcome() -> Outcome:
        params = [tree.map(lambda leaf, k=k: leaf[k], carried[0]) for k in range(len(work.cases))]
        return _outcome(list(losses[0]), params, work.cases)

    return Variant(step, outcome, "fp32")


def _grouped(leaf: Tensor, dim: int, layout: str) -> Tensor:
    """A stacked tensor in the layout that a convolution of K groups sees once `dim` and the next are one."""
    flat = leaf.flatten(dim, dim + 1).contiguous(memory_format=FORMATS[layout])
    return flat.unflatten(dim, leaf.shape[dim : dim + 2])


class _MatrixProducts(TorchFunctionMode):
    """Convolutions as products of the weights and the unfolded images: batched ones, under vmap."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.conv2d:
            return func(*args, **(kwargs or {}))
        x, weight, _, stride, padding, dilation, _ = args
        columns = F.unfold(x, weight.shape[-2:], dilation, padding, stride)
        sides = [
            (size + 2 * padding - dilation * (weight.shape[-1] - 1) - 1) // stride + 1 for size in x.shape[2:]
        ]
        return (weight.flatten(1) @ columns).unflatten(2, sides)


def _by_matrix_products(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with _MatrixProducts():
            return function(*arguments)

    return call


def _outcome(losses: Sequence[Tensor], params: Sequence[Any], cases: Sequence[Case]) -> Outcome:
    """Every network's loss and update, one after the other."""
    each = [
        changes(loss, tree.flatten(now), tree.flatten(case.params))
        for loss, now, case in zip(losses, params, cases, strict=True)
    ]
    return {
        "loss": torch.stack([one["loss"] for one in each]),
        "update": torch.cat([one["update"] for one in each]),
    }
