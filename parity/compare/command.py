"""`python -m parity compare A B`: two networks with the same numbers in their leaves, on the same images.

One training step of each, without its update: outputs, all gradients, and the buffers afterwards, bit by bit;
the graphs of that step, for all images, where it can be traced. Where bits differ, how far each side is from
float64, and the first layer at which the forward passes part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from rich.console import Console
from torch import Tensor

from parity.compare.divergence import first_divergence, layer_options
from parity.compare.matching import NoMatchError, match_leaves, renamed
from parity.sections.graphs import trace
from parity.sections.isomorphism import assert_isomorphic
from parity.steps import function_step, perturbed
from resnet_func import tree
from resnet_func.app.names import printable
from resnet_func.models.interop.load import load_network
from resnet_func.models.layer_calls import record_values
from resnet_func.testing import randn
from resnet_func.testing.assertions import describe_difference
from resnet_func.testing.shadow import cast_floating, first_line
from resnet_func.types import Model, Params, State

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
MODES = {"eval": False, "train": True}


@dataclass(frozen=True)
class CompareOptions:
    """Whether two networks are one function. Exit status: 0 equal to the bit, 1 different, 2 bad usage."""

    a: Annotated[str, tyro.conf.Positional]
    """A name of the zoo, torchvision:NAME, timm:NAME, FILE.py:CALLABLE or pkg.mod:CALLABLE."""

    b: Annotated[str, tyro.conf.Positional]
    """The other network."""

    image_size: int = 64
    """Height and width of the images."""

    samples: int = 3
    """How many images."""


class Pair(NamedTuple):
    """Two networks that take the same params and state."""

    first: Model
    second: Model
    params: Params
    state: State
    matched: str


class Row(NamedTuple):
    """One variant: what was compared, whether it is equal, and how not."""

    variant: str
    equal: bool
    said: str


def compare(options: CompareOptions, console: Console, complaints: Console) -> int:
    """Prints the comparison; the exit status."""
    try:
        if options.image_size < 1 or options.samples < 1:
            raise ValueError(f"sizes must be 1 or more; got {options.image_size} and {options.samples}")
        networks = [load_network(spec) for spec in (options.a, options.b)]
    except (ValueError, TypeError, ImportError, OSError) as error:
        complaints.print(f"Error: {printable(str(error))}", markup=False)
        return 2
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    say(f"A, which is wanted, is {options.a}; B, which is got, is {options.b}")
    try:
        pair = make_pair(*networks)
    except NoMatchError as error:
        say(f"different: the leaves do not match: {error}")
        return 1
    say(pair.matched)
    x = randn(options.samples, 3, options.image_size, options.image_size, seed=1, dtype=torch.float64)
    rows = [compare_step(pair, x, dtype, mode) for dtype in DTYPES for mode in MODES]
    for row in [*rows, *(compare_graphs(pair, x, mode) for mode in MODES)]:
        say(f"{row.variant:12} {'equal' if row.equal else 'differs':8} {row.said}")
    differing = [row for row in rows if not row.equal]
    if not differing:
        say("equal to the bit")
        return 0
    say(f"different: {explain(pair, x, differing)}")
    return 1


def make_pair(first: tuple[Model, Params, State], second: tuple[Model, Params, State]) -> Pair:
    """Two networks under the first's names, with random affine parameters and statistics.

    Raises:
        NoMatchError: their leaves do not pair up.
    """
    (model, params, state), (other, other_params, other_state) = first, second
    matchings = [
        match_leaves(tree.flatten(ours), tree.flatten(theirs))
        for ours, theirs in ((params, other_params), (state, other_state))
    ]
    ways = " and ".join(dict.fromkeys(matching.how for matching in matchings))
    matched = f"{sum(len(matching.names) for matching in matchings)} leaves matched {ways}"
    return Pair(model, renamed(other, *matchings), *perturbed(params, state, seed=3), matched)


# --------------------------------------------------------------------------- bit by bit


def compare_step(pair: Pair, x: Tensor, dtype: str, mode: str) -> Row:
    """Outputs, all gradients and the buffers afterwards of one step of each."""
    variant = f"{dtype}-{mode}"
    params, state, images = (cast_floating(part, DTYPES[dtype]) for part in (pair.params, pair.state, x))
    try:
        cotangent = _cotangent(pair.first, params, state, images)
        first = _step(pair.first, params, state, images, cotangent, MODES[mode])
    except Exception as error:
        return Row(variant, False, f"A fails: {type(error).__name__}: {first_line(error)}")
    try:
        second = _step(pair.second, params, state, images, cotangent, MODES[mode])
    except Exception as error:
        return Row(variant, False, f"B fails: {type(error).__name__}: {first_line(error)}")
    wrong = {name: said for name, leaf in first.items() if (said := describe_difference(second[name], leaf))}
    if not wrong:
        return Row(variant, True, f"0 ULP in {len(first)} tensors: outputs, gradients, buffers afterwards")
    name, said = next(iter(wrong.items()))
    lines = [f"{len(wrong)} of {len(first)} tensors; {name}: {said}"]
    if dtype == "fp32":
        lines.append(_against_shadow(pair, x, first, second, MODES[mode]))
    return Row(variant, False, "; ".join(lines))


def _cotangent(model: Model, params: Params, state: State, x: Tensor) -> Tensor:
    logits, _ = model.apply(params, state, x, train=False)
    return randn(*logits.shape, seed=2, dtype=x.dtype)


def _step(
    model: Model, params: Params, state: State, x: Tensor, cotangent: Tensor, train: bool
) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for dropout
        return function_step(model, params, state, x, cotangent, train=train)


def _against_shadow(
    pair: Pair, x: Tensor, first: dict[str, Tensor], second: dict[str, Tensor], train: bool
) -> str:
    """How far each side is from A in float64, where they are not equal and that can be computed."""
    try:
        params, state, images = (cast_floating(part, torch.float64) for part in (pair.params, pair.state, x))
        shadow = _step(
            pair.first, params, state, images, _cotangent(pair.first, params, state, images), train
        )
    except Exception as error:
        return f"no shadow in float64: {first_line(error)}"
    ratios = {}
    for name, leaf in shadow.items():
        if leaf.is_floating_point() and second[name].shape == leaf.shape:
            errors = [(side[name].double() - leaf).abs().max().item() for side in (first, second)]
            least = torch.finfo(torch.float32).eps * leaf.abs().max().item()
            ratios[name] = errors[1] / (max(errors[0], least) or 1.0)
    if not ratios:
        return "no tensor has the shape of its shadow"
    worst = max(ratios, key=lambda name: ratios[name])
    return f"B is {ratios[worst]:.3g} times as far from float64 as A at worst ({worst})"


# --------------------------------------------------------------------------- all images


def compare_graphs(pair: Pair, x: Tensor, mode: str) -> Row:
    """Whether the steps trace to one graph; that they do not says nothing where bits are equal."""
    variant = f"graphs-{mode}"
    images = (len(x), x.shape[2], x.shape[3])
    try:
        params, state = (
            tree.map(lambda leaf: torch.empty_like(leaf, device="meta"), part)
            for part in (pair.params, pair.state)
        )
        classes = _cotangent(pair.first, pair.params, pair.state, x.float()).shape[1]
        traces = [
            trace(partial(function_step, model, train=MODES[mode]), params, state, images, classes=classes)
            for model in (pair.second, pair.first)
        ]
    except Exception as error:
        return Row(variant, False, f"cannot be traced: {type(error).__name__}: {first_line(error)}")
    try:
        return Row(variant, True, f"for all images: {assert_isomorphic(*traces)}")
    except AssertionError as failure:
        return Row(variant, False, f"B against A: {failure}")


# --------------------------------------------------------------------------- where they part


def explain(pair: Pair, x: Tensor, differing: list[Row]) -> str:
    """The first layer at which the networks part, in the first variant in which they do."""
    for row in sorted(differing, key=lambda row: row.variant.startswith("fp32")):  # float64 first: less noise
        dtype, mode = row.variant.split("-")
        params, state, images = (cast_floating(part, DTYPES[dtype]) for part in (pair.params, pair.state, x))
        try:
            calls = [
                _record(model, params, state, images, MODES[mode]) for model in (pair.first, pair.second)
            ]
        except Exception as error:
            return f"in {row.variant}, a forward pass fails: {type(error).__name__}: {first_line(error)}"
        said = first_divergence(*calls) or _backward_divergence(
            pair, params, state, images, MODES[mode], calls
        )
        if said:
            return f"first diverging layer, in {row.variant}: {said}"
    return "the recorded forward passes agree"


def _record(model: Model, params: Params, state: State, x: Tensor, train: bool) -> list[Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return record_values(model, params, state, x, train=train)


def _backward_divergence(
    pair: Pair, params: Params, state: State, x: Tensor, train: bool, calls: list[Any]
) -> str:
    """Where all forward calls agree: the first buffer that does not, or the gradient nearest the loss."""
    cotangent = _cotangent(pair.first, params, state, x)
    first, second = (_step(model, params, state, x, cotangent, train) for model in (pair.first, pair.second))
    wrong = {name: said for name, leaf in first.items() if (said := describe_difference(second[name], leaf))}
    order = list(dict.fromkeys(name for call in calls[0] for name in call.paths))
    buffers = [name for name in order if f"buffer {name}" in wrong]
    if buffers:
        why = layer_options(calls[0], calls[1], buffers[0]) or "the outputs are equal"
        return f"{buffers[0]}: {why}; afterwards {wrong[f'buffer {buffers[0]}']}"
    grads = [name for name in reversed(order) if f"gradient {name}" in wrong]
    if grads:
        return f"{grads[0]}, in the backward pass alone: gradient {wrong[f'gradient {grads[0]}']}"
    return next((f"{name}: {said}" for name, said in wrong.items()), "")


def main(arguments: list[str], console: Console, complaints: Console) -> int:
    """`python -m parity compare`: exit status 0 for equal, 1 for different, 2 for bad usage."""
    torch.set_num_threads(1)  # so that a sum has one order
    options = tyro.cli(CompareOptions, args=arguments, prog="python -m parity compare")
    return compare(options, console, complaints)
