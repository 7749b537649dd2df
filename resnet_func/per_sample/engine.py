"""One pass over a batch: capture by the chosen method, then every quantity, leaf by leaf."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from resnet_func import tree
from resnet_func.autodiff import can_read
from resnet_func.numerics import without_autocast
from resnet_func.per_sample.capture import Captured, Pending, capture, losses_of
from resnet_func.per_sample.layers import contract
from resnet_func.per_sample.layers.contract import Way
from resnet_func.per_sample.layers.factors import Derived, Direct, Factors, sample_slices
from resnet_func.per_sample.options import Settings, refuse_batch_statistics
from resnet_func.per_sample.plan import check_plan, plan_factors
from resnet_func.per_sample.quantities.quantity import Quantity
from resnet_func.per_sample.reference import reference
from resnet_func.per_sample.task import Batch, leaves_like, make_task
from resnet_func.types import Params, State

# --------------------------------------------------------------------------- batches


def fold_batch(settings: Settings, x: Any, y: Any) -> Batch:
    """A checked batch with its views folded into the samples, views first.

    Raises:
        ValueError: the leaves of x and y do not lead with the same number of samples, or have no views.
    """
    inputs, targets = tree.leaves(x), tree.leaves(y)
    first = inputs[0]
    if settings.model.config is not None and first.ndim not in (4, 5):
        raise ValueError(
            f"expected images [N, C, H, W], or [N, views, C, H, W] for augmentation multiplicity; "
            f"got {list(first.shape)}. Add a batch dimension with x[None]"
        )
    n = first.shape[0] if first.ndim else -1
    odd = [list(leaf.shape) for leaf in (*inputs, *targets) if leaf.ndim == 0 or leaf.shape[0] != n]
    if odd:
        raise ValueError(
            f"expected inputs that lead with N, and one target per sample, [{n}, ...]; got {odd[0]}. "
            "Views of a sample share its target"
        )
    by_shape = settings.model.config is not None and first.ndim == 5
    if not (by_shape if settings.views is None else settings.views):
        return Batch(x, y, n, 1)
    views = first.shape[1]
    if views == 0 or any(leaf.ndim < 2 or leaf.shape[1] != views for leaf in inputs):
        raise ValueError(
            f"expected at least one view of each sample, [N, views, ...]; got {list(first.shape)}"
        )
    if views == 1:
        return Batch(tree.map(lambda leaf: leaf[:, 0], x), y, n, 1)
    x = tree.map(lambda leaf: leaf.transpose(0, 1).flatten(0, 1), x)
    return Batch(x, tree.map(lambda leaf: leaf.repeat(views, *[1] * (leaf.ndim - 1)), y), n, views)


def take(batch: Any, start: int, stop: int) -> Any:
    """The samples `start:stop` of every leaf."""
    return tree.map(lambda leaf: leaf[start:stop], batch)


def parts(settings: Settings, x: Any, y: Any) -> list[tuple[Any, Any]]:
    """A batch cut into microbatches; an empty one is one part."""
    n = tree.leaves(x)[0].shape[0]
    size = settings.microbatch or max(n, 1)
    if size >= n:
        return [(x, y)]
    return [(take(x, start, start + size), take(y, start, start + size)) for start in range(0, n, size)]


def refuse_unstated_statistics(settings: Settings, state: State) -> None:
    """Refuse a state with running statistics where nobody said that they are to be used."""
    if not settings.running_statistics and any(path.endswith("running_mean") for path in tree.flatten(state)):
        refuse_batch_statistics(None)


def capture_batch(settings: Settings, params: Params, state: State, x: Any, y: Any) -> Captured:
    """One pass over a batch by the chosen method."""
    refuse_unstated_statistics(settings, state)
    batch = fold_batch(settings, x, y)
    task = make_task(settings.model, settings.loss_fn, settings.trainable, params, state)
    if batch.samples == 0:
        factors: dict[str, Factors] = {
            path: Direct(leaf.new_zeros((0, *leaf.shape))) for path, leaf in task.trained.items()
        }
        empty = tree.leaves(x)[0].new_zeros(0, dtype=_float_dtype(params))
        return Captured(empty, empty.new_zeros((0, 0)), batch.y, batch.views, [empty.dtype], factors)
    if settings.method != "contract":
        return reference(task, batch, how=settings.method)
    captured = capture(task, batch)
    settings.checks.after(task, batch, captured)
    return captured


def _float_dtype(params: Params) -> torch.dtype:
    leaves = [leaf for leaf in tree.leaves(params) if leaf.is_floating_point()]
    return leaves[0].dtype if leaves else torch.float32


# --------------------------------------------------------------------------- evaluation


def evaluate(
    settings: Settings, quantities: Sequence[Quantity], params: Params, state: State, x: Any, y: Any
) -> list[Any]:
    """Every quantity of one batch, microbatch by microbatch, joined but not yet final."""
    found = [_evaluate_part(settings, quantities, params, state, *part) for part in parts(settings, x, y)]
    if len(found) == 1:
        return found[0]
    return [quantity.join([part[i] for part in found]) for i, quantity in enumerate(quantities)]


def _evaluate_part(
    settings: Settings, quantities: Sequence[Quantity], params: Params, state: State, x: Any, y: Any
) -> list[Any]:
    captured = capture_batch(settings, params, state, x, y)
    device_type = captured.losses.device.type
    answers: list[dict[str, Any]] = [{} for _ in quantities]
    names = tuple([quantity.name for quantity in quantities])
    paths = captured.paths()
    if any(names):  # the others look at logits only
        ways = None if captured.pending is None else _plan_ahead(settings, names, captured.pending)
        if captured.pending is None or ways is None:
            leaves = captured.factors()
            ways = [plan_ways(settings, name, leaves) for name in names]
            _answer(quantities, ways, answers, device_type, leaves)
        else:
            visit = partial(_answer, quantities, ways, answers, device_type)
            captured.pending.visit_leaves(visit)
    in_order = [{path: answer[path] for path in paths if path in answer} for answer in answers]
    with without_autocast(device_type):
        return [quantity.finish(in_order[i], captured) for i, quantity in enumerate(quantities)]


def _plan_ahead(settings: Settings, names: tuple[str, ...], pending: Pending) -> list[dict[str, Way]] | None:
    """The ways of each quantity before the backward pass, once for batches of a size; None where a call of
    the network does not run on the meta device."""
    key = names, pending.signature()
    if key not in settings.planned:
        shapes = pending.shapes()
        settings.planned[key] = (
            None if shapes is None else [plan_ways(settings, name, shapes) for name in names]
        )
    return settings.planned[key]


def _answer(
    quantities: Sequence[Quantity],
    ways: list[dict[str, Way]],
    answers: list[dict[str, Any]],
    device_type: str,
    factors: dict[str, Factors],
) -> None:
    """Add what every quantity says of these leaves, whose factors are taken out of `factors`."""
    # autocast is for the network: what is summed here keeps the parameters' dtype
    with without_autocast(device_type):
        for together in _derived_together(factors):
            leaves = {path: factors.pop(path) for path in together}  # the last references, unless kept
            _answer_together(quantities, ways, answers, leaves)


def _answer_together(
    quantities: Sequence[Quantity],
    ways: list[dict[str, Way]],
    answers: list[dict[str, Any]],
    leaves: dict[str, Factors],
) -> None:
    """Of leaves that make one tensor together, or of a single one."""
    as_captured = [i for i, quantity in enumerate(quantities) if quantity.name and quantity.as_captured]
    others = [i for i, quantity in enumerate(quantities) if quantity.name and not quantity.as_captured]
    for i in as_captured:
        for path, leaf in leaves.items():
            answers[i][path] = quantities[i].leaf(path, leaf, ways[i].get(path, "materialize"))
    if not others:
        return
    leaves = contract.form_derived(leaves)
    for path in list(leaves):
        leaf = leaves.pop(path)
        wanted: list[tuple[int, Way]] = [(i, ways[i].get(path, "materialize")) for i in others]
        if sum(way != "ghost" for _, way in wanted) > 1 and len(sample_slices(leaf)) == 1:
            leaf = Direct(contract.grads(leaf))  # formed once for all, where that is small enough
        for i, way in wanted:
            answers[i][path] = quantities[i].leaf(path, leaf, way)
        del leaf


def _derived_together(factors: dict[str, Factors]) -> list[list[str]]:
    """The leaves by what is looked at together: those that the same tensor derives from, else one by one."""
    groups: dict[int | str, list[str]] = {}
    for path, leaf in factors.items():
        key = id(leaf.factors) if isinstance(leaf, Derived) else path
        groups.setdefault(key, []).append(path)
    return list(groups.values())


def directional_derivatives(
    settings: Settings, params: Params, state: State, x: Any, y: Any, direction: Params
) -> Tensor:
    """`<gradient_i, direction>` `[N]`, by one forward-mode pass."""
    refuse_unstated_statistics(settings, state)
    batch = fold_batch(settings, x, y)
    task = make_task(settings.model, settings.loss_fn, settings.trainable, params, state)
    if batch.samples == 0:
        return tree.leaves(x)[0].new_zeros(0, dtype=_float_dtype(params))
    along = leaves_like(task.trained, direction, "direction")
    settings.checks.before(task, batch)
    keeps_graph = torch.is_grad_enabled()  # where it does not, a network's own no_grad still counts
    try:
        # the fused kernels of attention have no forward mode
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            found = torch.func.jvp(partial(losses_of, task, batch), (task.trained,), (along,))[1]
    except NotImplementedError as error:
        raise ValueError(
            f"dot is a forward-mode pass, which a call of this network has not ({str(error)[:80]}...). "
            "Take the products of per_sample.grads"
        ) from error
    return found if keeps_graph else found.detach()


def plan_ways(
    settings: Settings, quantity: str, factors: dict[str, Factors], other: dict[str, Factors] | None = None
) -> dict[str, Way]:
    """The way of every leaf that has a choice; `other` are the factors of a second batch."""
    if settings.method != "contract":
        return {}
    if settings.plan is not None:
        check_plan(settings.plan, factors)
        return settings.plan.ways
    return plan_factors(factors, quantity, other=other, speeds=settings.speeds).ways


def detect_nonfinite(norms: Tensor) -> None:
    """Raise where a sample's gradient holds NaN or Inf, naming the samples.

    Values cannot be read in compiled code and under `vmap`: it is silent there.

    Raises:
        ValueError: a norm is not finite.

    >>> import torch
    >>> detect_nonfinite(torch.tensor([1.0, 0.0]))
    """
    wrong = _indices(~norms.isfinite())
    if wrong:
        shown = ", ".join(map(str, wrong[:10])) + (", ..." if len(wrong) > 10 else "")
        raise ValueError(
            f"{len(wrong)} of {norms.shape[0]} samples have a NaN or infinite gradient: {shown}. "
            "Drop them, or pass nonfinite='zero' to leave them out of the sum"
        )


def _indices(mask: Tensor) -> list[int]:
    if not can_read(mask):
        return []
    return mask.nonzero().flatten().tolist()
