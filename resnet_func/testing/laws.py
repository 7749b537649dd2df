"""Laws that hold for any network given as a `Model`: ours, a module's, one written by hand.

    model, params, state = rf.from_module(torchvision.models.resnet18())
    testing.check_laws(model, params, state, [torch.randn(3, 3, 64, 64)])

Tolerances are measured, not chosen. The laws are checked in float64. How far rounding carries through this
network is read off the distance of its float32 results from those in float64, in units of float32's eps; as
many units of float64's eps, times `SLACK`, is what a law may be off by, leaf by leaf. A wrong answer is off
by millions of times that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias
from unittest import SkipTest

import torch
from torch import Tensor

from resnet_func import per_sample, tree
from resnet_func.models.interop.state_dicts import from_state_dict, to_state_dict
from resnet_func.testing.assertions import assert_pure, assert_trees_equal, named_leaves
from resnet_func.testing.seeded import generator
from resnet_func.testing.shadow import EPS, SLACK, Case, Shadow, bounded_loss, first_line
from resnet_func.types import LossFn, Model, Params, State


class LawResult(NamedTuple):
    """What came of a law: the figure of one that holds, what failed, or why it could not be checked."""

    law: str
    outcome: Literal["passed", "failed", "skipped"]
    said: str


# --------------------------------------------------------------------------- one call


def purity(case: Case) -> str:
    """`apply` mutates no input, returns no memory of one (but the state), draws no global random number."""
    for train in (False, True):
        try:
            assert_pure(case.model.apply, case.params, case.state, case.x, train=train, may_return=case.state)
        except AssertionError as failure:
            raise AssertionError(f"{'training' if train else 'evaluation'}: {failure}") from None
    return "evaluation and training"


def determinism(case: Case) -> str:
    """The same call gives the same bits, whatever was computed in between."""
    first = case.logits()
    case.logits(case.x.flip(0))
    case.model.apply(case.params, case.state, case.x, train=True)
    assert_trees_equal(case.logits(), first)
    return "bitwise"


def evaluation_state(case: Case) -> str:
    """Evaluation returns the state as it was."""
    assert_trees_equal(case.model.apply(case.params, case.state, case.x, train=False)[1], case.state)
    return "bitwise"


def dtype(case: Case) -> str:
    """The network runs in float64 and float32, and what comes out has the dtype of what goes in."""
    for wanted in (torch.float64, torch.float32):
        converted = case.converted(wanted)
        for train in (False, True):
            logits, after = converted.model.apply(converted.params, converted.state, converted.x, train=train)
            for name, leaf in named_leaves(logits).items():
                assert leaf.dtype == wanted, f"{name} is {leaf.dtype} where all that goes in is {wanted}"
            before = named_leaves(converted.state)
            for name, leaf in named_leaves(after).items():
                assert leaf.dtype == before[name].dtype, f"state {name} became {leaf.dtype}"
    return "float64 and float32"


# --------------------------------------------------------------------------- samples do not see each other


def batch_order(case: Case) -> str:
    """Permuted samples give permuted outputs."""
    _several(case)
    order = torch.randperm(len(case), generator=generator(0))
    order = order.roll(1) if torch.equal(order, torch.arange(len(case))) else order
    permuted = tree.map(lambda leaf: leaf[order], case.outputs.exact)
    return case.outputs.check(case.double.logits(case.double.x[order]), permuted)


def batch_of_one(case: Case) -> str:
    """A batch of N gives what N batches of one give."""
    _several(case)
    return case.outputs.check(_joined([case.double.logits(sample) for sample in case.double.x.split(1)]))


def chunks(case: Case) -> str:
    """Two chunks of a batch, of unequal size where they can be, give what the whole gives."""
    _several(case)
    parts = case.double.x.split(len(case) // 2 + 1)
    return case.outputs.check(_joined([case.double.logits(part) for part in parts]))


def vmap(case: Case) -> str:
    """`torch.vmap` over single samples gives what the batch gives."""

    def one(sample: Tensor) -> Any:
        return tree.map(lambda leaf: leaf[0], case.double.logits(sample[None]))

    return case.outputs.check(torch.vmap(one)(case.double.x))


def nan_stays(case: Case) -> str:
    """A NaN in one sample changes no other sample's output."""
    _several(case)
    if not case.x.is_floating_point():
        raise SkipTest("whole numbers have no NaN")
    broken = case.double.x.clone()
    broken[0] = torch.nan
    others = tree.map(lambda leaf: leaf[1:], (case.double.logits(broken), case.outputs.exact))
    return case.outputs.check(*others)


def _several(case: Case) -> None:
    if len(case) < 2:
        raise SkipTest("one sample: give batches of two or more")


def _joined(parts: Sequence[Any]) -> Any:
    return tree.map(lambda *leaves: torch.cat(leaves), *parts)


# --------------------------------------------------------------------------- other ways to compute


def layout(case: Case) -> str:
    """Inputs and weights of other strides, channels_last where there is one, give the same outputs."""

    def transposed(leaf: Tensor) -> Tensor:
        backwards = tuple(reversed(range(leaf.ndim)))
        return leaf.permute(backwards).contiguous().permute(backwards)

    def channels_last(leaf: Tensor) -> Tensor:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return leaf.contiguous(memory_format=formats.get(leaf.ndim, torch.contiguous_format))

    case.outputs.check(case.double.logits(transposed(case.double.x)))
    return case.outputs.check(
        case.double.logits(channels_last(case.double.x), tree.map(channels_last, case.double.params))
    )


def compiled(case: Case) -> str:
    """`torch.compile` of the forward pass gives what it gives without."""
    double = case.double
    run = torch.compile(lambda params, state, x: double.model.apply(params, state, x, train=False)[0])
    return case.outputs.check(run(double.params, double.state, double.x))


def state_dict(case: Case) -> str:
    """`from_state_dict` takes back what `to_state_dict` gave, bit for bit, and shares no memory with it."""
    try:
        given = to_state_dict(case.model, case.params, case.state)
    except NotImplementedError as error:
        raise SkipTest(f"the model has no init to take names from: {first_line(error)}") from error
    again = assert_pure(lambda given: from_state_dict(case.model, given), given)
    assert_trees_equal(again, (case.params, case.state))
    return f"{len(given)} tensors"


# --------------------------------------------------------------------------- derivatives


def per_sample_sum(case: Case) -> str:
    """Per-sample gradients, one by one and by `per_sample.grads`, sum to the gradient of the summed loss."""
    double, exact = case.double, case.gradients

    def loss(params: Params, x: Tensor, y: Any) -> Tensor:
        logits, _ = double.model.apply(params, double.state, x[None], train=False)
        return double.loss_fn(logits, tree.map(lambda leaf: leaf[None], y)).sum()

    def summed(each: Params) -> Params:
        return tree.map(lambda leaf: leaf.sum(0), each)

    one_by_one = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    exact.check(summed(one_by_one(double.params, double.x, double.y)))
    grads = per_sample.grads(case.model, case.loss_fn, train=False)
    return exact.check(summed(grads(double.params, double.state, double.x, double.y)))


def adjoint(case: Case) -> str:
    """Forward and reverse mode are adjoint: `<u, J v> = <J' u, v>`."""
    double, roundings = case.double, max(case.outputs.worst, case.gradients.worst)

    def logits(params: Params) -> Any:
        return double.logits(params=params)

    v, u = _direction(double.params, 1), _direction(case.outputs.exact, 2)
    try:
        forward = torch.func.jvp(logits, (double.params,), (v,))[1]
    except NotImplementedError as error:
        raise SkipTest(f"torch has no forward mode for it: {first_line(error)}") from error
    (back,) = torch.func.vjp(logits, double.params)[1](u)
    return _agree(tree.dot(u, forward), tree.dot(back, v), tree.norm(back) * tree.norm(v), roundings)


def second_order(case: Case) -> str:
    """The Hessian of the summed loss is symmetric: `<u, H v> = <H u, v>`."""

    def product(case: Case, seed: int) -> Params:
        direction = _direction(case.params, seed)
        slope = torch.func.grad(case.total_loss)
        return torch.func.grad(lambda params: tree.dot(slope(params), direction))(case.params)

    shadow = Shadow.of(case, lambda case: product(case, 1))
    u, v = (_direction(case.double.params, seed) for seed in (2, 1))
    scale = tree.norm(shadow.exact) * tree.norm(u)
    return _agree(tree.dot(u, shadow.exact), tree.dot(product(case.double, 2), v), scale, shadow.worst)


def _direction(values: Any, seed: int) -> Any:
    source = generator(seed)

    def normal(leaf: Tensor) -> Tensor:
        return torch.randn(leaf.shape, generator=source, dtype=torch.float64).to(leaf)

    return tree.map(normal, values)


def _agree(a: Tensor, b: Tensor, scale: Tensor, roundings: float) -> str:
    error, allowed = (a - b).abs().item(), SLACK * EPS * roundings * (scale.item() or 1.0)
    said = f"{a.item():.6g} and {b.item():.6g} are {error:.2g} apart, allowed {allowed:.2g}"
    assert error <= allowed, said
    return f"at most {error:.2g}, allowed {allowed:.2g}"


# --------------------------------------------------------------------------- all of them

Law: TypeAlias = Callable[[Case], str]

LAWS: dict[str, Law] = {
    "purity": purity,
    "determinism": determinism,
    "evaluation-state": evaluation_state,
    "dtype": dtype,
    "batch-order": batch_order,
    "batch-of-one": batch_of_one,
    "chunks": chunks,
    "vmap": vmap,
    "nan-stays": nan_stays,
    "layout": layout,
    "per-sample-sum": per_sample_sum,
    "adjoint": adjoint,
    "second-order": second_order,
    "state-dict": state_dict,
    "compiled": compiled,
}


def check_laws(
    model: Model,
    params: Params,
    state: State,
    batches: Iterable[Tensor | tuple[Tensor, Any]],
    *,
    loss_fn: LossFn | None = None,
    laws: Iterable[str] | None = None,
    raise_on_failure: bool = True,
) -> list[LawResult]:
    """Checks every law that holds for any network, on each of some batches.

    A law that is broken tells the first batch that breaks it, in one line: which leaf, how far off, and what
    was allowed (see this file's head for how that is measured). `LAWS` lists the laws by name.

    Args:
        model, params, state: A network, `apply(params, state, x, train=) -> (outputs, state)`, whose outputs
            lead with the batch's dimension; a tensor or a pytree of them.
        batches: Inputs `[N, ...]`, or `(inputs, targets)`. With one sample, laws of samples are skipped.
        loss_fn: Per-sample loss `(outputs, targets) -> [N]`; None takes a smooth one that needs no targets.
        laws: Names to check; None checks all but "compiled", which takes up to a minute.
        raise_on_failure: False only returns the results.

    Returns:
        A result for each law, in order.

    Raises:
        AssertionError: a law is broken; one line for each.
        ValueError: no batch was given, or there is no such law.

    >>> from resnet_func import from_module
    >>> results = check_laws(*from_module(torch.nn.Linear(3, 2)), [torch.ones(2, 3)], laws=["purity", "vmap"])
    >>> [result.outcome for result in results]
    ['passed', 'passed']
    """
    chosen = [name for name in LAWS if name != "compiled"] if laws is None else list(laws)
    unknown = [name for name in chosen if name not in LAWS]
    if unknown:
        raise ValueError(f"no law is called {', '.join(unknown)}; there are {', '.join(LAWS)}")
    cases = [_case(model, params, state, batch, loss_fn) for batch in batches]
    if not cases:
        raise ValueError(
            "expected at least one batch; got none. Give a list, such as [torch.randn(3, 3, 64, 64)]"
        )
    results = [check_law(name, LAWS[name], cases) for name in chosen]
    broken = [f"{result.law}: {result.said}" for result in results if result.outcome == "failed"]
    if broken and raise_on_failure:
        raise AssertionError("\n".join([f"{len(broken)} of {len(results)} laws are broken", *broken]))
    return results


def _case(
    model: Model, params: Params, state: State, batch: Tensor | tuple[Tensor, Any], loss_fn: LossFn | None
) -> Case:
    x, y = (batch, torch.zeros(len(batch))) if isinstance(batch, Tensor) else batch
    return Case(model, params, state, x, y, loss_fn or bounded_loss)


def check_law(name: str, law: Law, cases: Sequence[Case]) -> LawResult:
    """Checks one law on each case, and tells the first that breaks it."""
    said, skipped = "", ""
    for index, case in enumerate(cases):
        where = f"batch {index}: " if len(cases) > 1 else ""
        try:
            said = law(case)
        except SkipTest as reason:
            skipped = f"{where}{reason}"
        except AssertionError as failure:
            return LawResult(name, "failed", f"{where}{failure}")
        except Exception as error:
            return LawResult(name, "failed", f"{where}{type(error).__name__}: {first_line(error)}")
    return LawResult(name, "passed", said) if said else LawResult(name, "skipped", skipped)
