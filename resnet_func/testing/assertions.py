"""Assertions on pytrees of tensors: equal to the bit, close to a float64 shadow, pure.

The only comparer of trees: the tests, the proofs in `parity/` and the benchmarks use it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import optree
import torch
from torch import Tensor

from resnet_func import tree

MOST = torch.iinfo(torch.int64).max


def ulp_distance(a: Tensor, b: Tensor) -> Tensor:
    """How many floating-point numbers apart two tensors are, entry by entry: int64, their common shape.

    0 for equal entries, +0 against -0, and NaN against NaN; 2^63 - 1 for NaN against a number, and where the
    count is larger than that. Infinity is one step beyond the largest number.

    >>> ulp_distance(torch.tensor([1.0]), torch.tensor([1 + 2**-22]))
    tensor([2])

    Raises:
        ValueError: shapes or dtypes differ, or the dtype is not floating.
    """
    if a.shape != b.shape or a.dtype != b.dtype or not a.is_floating_point():
        raise ValueError(
            "expected floating tensors of one shape and dtype; "
            f"got {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}. Convert one with b.to(a.dtype)"
        )
    i, j = _ordinals(a), _ordinals(b)
    apart = torch.where((i < 0) == (j < 0), (i - j).abs(), _saturating_sum(i.abs(), j.abs()))
    apart = torch.where(a.isnan() & b.isnan(), 0, apart)
    return torch.where(a.isnan() ^ b.isnan(), MOST, apart)


def assert_trees_equal(got: Any, want: Any, *, finite: bool = False) -> None:
    """Both trees have the same leaves, bit for bit.

    Leaf names (dotted paths), dtypes, shapes and bits must agree. So -0.0 is not 0.0, and a NaN equals a NaN
    of the same bits only. Devices, strides, empty branches and the kind of container (dict, list, tuple) do
    not count. Leaves that are not tensors are compared by type and `==`.

    Args:
        finite: Also require that all of `want` is finite: two broken computations may agree.

    >>> assert_trees_equal({"a": torch.ones(2)}, {"a": torch.ones(2)})

    Raises:
        AssertionError: naming missing, unexpected and mis-shaped leaves; or else how many differ, and for the
            worst of them its entries and its ULP distance.
    """
    a, b = named_leaves(got), named_leaves(want)
    if finite:
        endless = [name for name, leaf in b.items() if isinstance(leaf, Tensor) and not leaf.isfinite().all()]
        assert not endless, f"{', '.join(endless)} of the reference is not finite: nothing is proven"
    _check_alike(a, b)
    differing = {name: _difference(a[name], b[name]) for name in b}
    wrong = {name: found for name, found in differing.items() if found is not None}
    if wrong:
        worst = max(wrong, key=lambda name: wrong[name][0])
        raise AssertionError(f"{len(wrong)} of {len(b)} leaves differ; worst {worst}: {wrong[worst][1]}")


def assert_trees_close(got: Any, want: Any, shadow: Any, *, factor: float = 2.0) -> None:
    """`got` is about as near to the truth as `want` is: the tolerance is measured, not guessed.

    `shadow` is the same computation in float64. For every leaf, with errors in the largest entry,

        error(got, shadow) <= factor * max(error(want, shadow), eps * max|shadow|)

    where eps is that of the leaf's dtype: a `want` that happens to be exact counts as one rounding off.
    Leaves that are not floating must be equal. Example: two float32 ways to compute logits,

        assert_trees_close(fast(params, x), slow(params, x), slow(double(params), x.double()))

    Raises:
        AssertionError: naming leaves that do not fit, or the worst leaf with its error and the allowed one.
        ValueError: the shadow proves nothing: leaves that are missing, not float64 or not finite; or `want`
            is not finite.

    >>> x = torch.rand(9, generator=torch.Generator().manual_seed(0))
    >>> assert_trees_close(x.flip(0).sum(), x.sum(), x.double().sum())
    """
    a, b, truth = named_leaves(got), named_leaves(want), named_leaves(shadow)
    _check_alike(a, b)
    exact = [name for name in b if not b[name].is_floating_point()]
    assert_trees_equal({name: a[name] for name in exact}, {name: b[name] for name in exact})
    errors = {}
    for name in b.keys() - exact:
        if b[name].numel():
            _check_shadow(name, truth.get(name), b[name])
            largest = truth[name].abs().max().item()
            theirs, ours = ((leaf[name].double() - truth[name]).abs().max().item() for leaf in (b, a))
            allowed = factor * max(theirs, torch.finfo(b[name].dtype).eps * largest)
            if not ours <= allowed:  # NaN is not
                errors[name] = (ours / allowed if allowed and ours == ours else float("inf"), ours, allowed)
    if errors:
        worst = max(errors, key=lambda name: errors[name][0])
        _, ours, allowed = errors[worst]
        raise AssertionError(
            f"{len(errors)} of {len(b)} leaves are too far from the shadow; "
            f"worst {worst}: off by {ours:.3g}, allowed {allowed:.3g}"
        )


def assert_trees_near(got: Any, want: Any, rtol: float = 1e-10, *, floor: float = 1e-3) -> None:
    """Every leaf is within `rtol` of its own largest entry: for float64, where rounding is no matter.

    For every leaf, `max|got - want| <= rtol * max(max|want|, floor * largest)`, where `largest` is that of
    the whole tree; a tree of zeros allows `rtol` itself. Dtypes do not count. A NaN is near nothing.

    Args:
        got, want: Pytrees with the same names and shapes.
        rtol: Of a leaf's largest entry, for all entries of that leaf.
        floor: Leaves smaller than this share of the largest (a sum that cancels) are measured against it;
            0 measures each against itself.

    Raises:
        AssertionError: naming leaves that do not fit, or the worst leaf with its error and the allowed one.

    >>> assert_trees_near({"a": torch.ones(2) + 1e-6}, {"a": torch.ones(2)}, rtol=1e-5)
    """
    errors = relative_errors(got, want, floor=floor)
    order = {name: (errors[name] != errors[name], errors[name]) for name in errors}  # NaN is the worst
    worst = max(order, key=lambda name: order[name], default=None)
    assert worst is None or errors[worst] <= rtol, (
        f"worst {worst}: relative error {errors[worst]:.3g}, allowed {rtol:.3g}"
    )


def relative_errors(got: Any, want: Any, *, floor: float = 1e-3) -> dict[str, float]:
    """What `assert_trees_near` holds against its `rtol`: every leaf's error, by its name.

    Raises:
        AssertionError: the trees do not fit.

    >>> relative_errors({"a": torch.tensor([2.0, 4.5])}, {"a": torch.tensor([2.0, 4.0])})
    {'a': 0.125}
    """
    a, b = named_leaves(got), named_leaves(want)
    lines = _unlike_names(a, b) or [
        f"{name}: {list(a[name].shape)}, not {list(leaf.shape)}"
        for name, leaf in b.items()
        if a[name].shape != leaf.shape
    ]
    assert not lines, "; ".join(["the trees do not fit", *lines])
    sizes = {name: leaf.abs().max().item() for name, leaf in b.items() if leaf.numel()}
    least = floor * max(sizes.values(), default=0.0)
    return {
        name: (a[name] - b[name]).abs().max().item() / (max(size, least) or 1.0)
        for name, size in sizes.items()
    }


def assert_pure(fn: Callable[..., Any], *args: Any, may_return: Any = (), **kwargs: Any) -> Any:
    """`fn(*args, **kwargs)` leaves the world as it was, and gives the same bits again; returns its output.

    No input is changed (names, values, shapes, `requires_grad`, which tensor is which leaf); no output shares
    memory with an input; the global random generator is not read; a second call gives the same bits. What
    `fn` closes over is not seen: pass it as an argument.

    Args:
        fn: A function of pytrees; called twice.
        *args, **kwargs: Its arguments; leaves that are not tensors are compared by `==`.
        may_return: A tree of input tensors that may come back as they are, each the same object (not a view
            of it). `model.apply(train=False)` returns its state: `may_return=state`.

    Raises:
        AssertionError: one of these is not so; it says which leaf of which argument, by position or keyword
            ("0.conv1.weight").

    >>> assert_pure(torch.add, torch.ones(2), 1)
    tensor([2., 2.])
    """
    inputs = {**{str(index): value for index, value in enumerate(args)}, **kwargs}
    before, random = named_leaves(inputs), torch.get_rng_state()
    copies = {name: _copy(leaf) for name, leaf in before.items()}
    first = fn(*args, **kwargs)
    second = fn(*args, **kwargs)
    after = named_leaves(inputs)
    moved = sorted(name for name in {**before, **after} if after.get(name) is not before.get(name))
    assert not moved, f"inputs were replaced, added or removed: {', '.join(moved)}"
    _prefixed("an input was mutated", after, copies)
    graded = [n for n, leaf in after.items() if _requires_grad(leaf) != _requires_grad(copies[n])]
    assert not graded, f"requires_grad of inputs was changed: {', '.join(graded)}"
    assert torch.equal(random, torch.get_rng_state()), (
        "the global random generator was used; pass a generator"
    )
    for output in (first, second):
        _check_apart(named_leaves(output), before, {id(leaf) for leaf in tree.leaves(may_return)})
    _prefixed("a second call differs", named_leaves(second), named_leaves(first))
    return first


def named_leaves(values: Any) -> dict[str, Any]:
    """The leaves of any pytree by dotted path, fields of named tuples by name; a lone leaf is "leaf".

    >>> named_leaves({"conv1": {"weight": 1}, "fc": [2, 3]})
    {'conv1.weight': 1, 'fc.0': 2, 'fc.1': 3}
    """
    accessors, leaves, _ = optree.tree_flatten_with_accessor(values)
    names = [".".join(str(getattr(e, "field", e.entry)) for e in accessor) for accessor in accessors]
    return dict(zip((name or "leaf" for name in names), leaves, strict=True))


def describe_difference(got: Tensor, want: Tensor) -> str:
    """How two tensors differ, in words: dtype and shape, or how many entries by how many ULP; "" if not.

    >>> describe_difference(torch.ones(2), torch.ones(3))
    'torch.float32 [2], not torch.float32 [3]'
    """
    if _kind(got) != _kind(want):
        return f"{_kind(got)}, not {_kind(want)}"
    found = _difference(got, want)
    return found[1] if found else ""


def _check_alike(got: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    """The same names, and under each the same type, dtype and shape."""
    lines = _unlike_names(got, want)
    lines += [
        f"{name}: got {_kind(got[name])}, want {_kind(want[name])}"
        for name in want
        if name in got and _kind(got[name]) != _kind(want[name])
    ]
    if lines:
        raise AssertionError("; ".join(["the trees do not fit", *lines]))


def _unlike_names(got: Mapping[str, Any], want: Mapping[str, Any]) -> list[str]:
    missing = [f"missing {name}" for name in want if name not in got]
    return missing + [f"unexpected {name}" for name in got if name not in want]


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype} {list(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__


def _difference(got: Any, want: Any) -> tuple[float, str] | None:
    """How far apart two leaves of one kind are, in a number and in words; None for the same bits."""
    if not isinstance(want, Tensor):
        return None if got == want else (float(MOST), f"got {got!r}, want {want!r}")
    got, want = got.detach().cpu(), want.detach().cpu()
    wrong = _bits(got) != _bits(want)
    if not wrong.any():
        return None
    if want.is_floating_point():
        apart, unit = ulp_distance(got, want), " ULP"
    else:
        apart, unit = wrong.long() if want.is_complex() else (got.long() - want.long()).abs(), ""
    # where all distances are 0, point at a wrong entry all the same
    at = torch.where(wrong, apart, -1).argmax()
    most = int(apart.flatten()[at])
    said = {0: "0 ULP (the sign of a zero, or the bits of a NaN)", MOST: "NaN or more than 2^63 ULP"}
    where = [int(i) for i in torch.unravel_index(at, want.shape)]
    return most, (
        f"{int(wrong.sum())} of {want.numel()} entries, by up to {said.get(most, f'{most}{unit}')} "
        f"(at {where}: got {got.flatten()[at].item()!r}, want {want.flatten()[at].item()!r})"
    )


def _bits(leaf: Tensor) -> Tensor:
    """Integers that are equal where the bits are."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return leaf.view(sizes[leaf.element_size()]) if leaf.is_floating_point() else leaf


def _ordinals(leaf: Tensor) -> Tensor:
    """Floating-point numbers counted from zero: neighbours are one apart."""
    bits = _bits(leaf)
    return torch.where(bits < 0, torch.iinfo(bits.dtype).min - bits.long(), bits.long())


def _saturating_sum(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a > MOST - b, MOST, a + b)


def _check_shadow(name: str, shadow: Any, want: Tensor) -> None:
    if not isinstance(shadow, Tensor) or shadow.dtype != torch.float64 or shadow.shape != want.shape:
        raise ValueError(
            f"the shadow of {name} must be torch.float64 {list(want.shape)}; got {_kind(shadow)}. "
            "Compute it from parameters and data in float64"
        )
    for tensor, whose in ((shadow, "the shadow"), (want, "the wanted value")):
        if not tensor.isfinite().all():
            raise ValueError(f"{whose} of {name} is not finite: nothing can be proven with it")


def _check_apart(outputs: dict[str, Any], inputs: dict[str, Any], allowed: set[int]) -> None:
    owner = {_memory(leaf): name for name, leaf in inputs.items() if _memory(leaf)}
    for name, leaf in outputs.items():
        shared = owner.get(_memory(leaf))
        assert shared is None or id(leaf) in allowed, (
            f"output {name} shares memory with input {shared}: changing one would change the other. "
            "Return a new tensor, or name the input in may_return"
        )


def _memory(leaf: Any) -> int:
    """Where a tensor's storage starts; 0 where there is none."""
    return leaf.untyped_storage().data_ptr() if isinstance(leaf, Tensor) else 0


def _copy(leaf: Any) -> Any:
    return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _requires_grad(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _prefixed(prefix: str, got: dict[str, Any], want: dict[str, Any]) -> None:
    try:
        assert_trees_equal(got, want)
    except AssertionError as failure:
        raise AssertionError(f"{prefix}: {failure}") from None
