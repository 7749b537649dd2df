"""An exhibit: a bug, a way to put it into the running library, and the check of the suite that kills it."""

from __future__ import annotations
import __future__

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType
from typing import Any, TypeAlias
from unittest import mock

from hypothesis import Phase, settings

import resnet_func as rf
from parity import properties
from parity.cell import Cell
from parity.sections import bitwise, privacy, trajectory
from resnet_func.privacy import accounting

REIMPLEMENTATIONS = "reimplementations"

# Enter one, and the bug is there; leave it, and it is gone.
Mutation: TypeAlias = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Exhibit:
    """One bug.

    Args:
        name: Unique in the museum, with dashes.
        bug: What is wrong, in a line.
        seen: Where: a project, or the kind of code that makes the mistake.
        killer: Path of the check that must fail: "properties/running-statistics-move-by-a-tenth".
        mutation: Puts the bug into the library.
    """

    name: str
    bug: str
    seen: str
    killer: str
    mutation: Mutation


@dataclass(frozen=True)
class Proof:
    """Whether the killer failed for the bug's sake, and what it said."""

    exhibit: Exhibit
    killed: bool
    said: str


# --------------------------------------------------------------------------- mutations


def edit(function: Callable[..., Any], *changes: tuple[str, str]) -> Mutation:
    """The function compiled anew with pieces of its source exchanged, `(old, new)`.

    The code object is exchanged, not the function: whoever holds it (a table, a partial, another module that
    imported its name) runs the mutant.
    """
    assert isinstance(function, FunctionType)
    return partial(_edited, function, changes)


def constant(module: Any, name: str, value: Any) -> Mutation:
    """A module's constant with another value."""
    return partial(mock.patch.object, module, name, value)


def both(*mutations: Mutation) -> Mutation:
    """Several mutations as one: a bug that takes two lines."""
    return partial(_all, mutations)


@contextmanager
def _edited(function: FunctionType, changes: tuple[tuple[str, str], ...]) -> Iterator[None]:
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes:
        found = source.count(old)
        if found != 1:  # else a change of the library would quietly make the mutant harmless
            raise LookupError(
                f"{function.__qualname__} has {old!r} {found} times, not once: renew the exhibit"
            )
        source = source.replace(old, new)
    made: dict[str, Any] = {}
    flags = __future__.annotations.compiler_flag
    code = compile(source, f"<mutant of {function.__qualname__}>", "exec", flags=flags, dont_inherit=True)
    exec(code, dict(function.__globals__), made)
    original = function.__code__
    function.__code__ = made[function.__name__].__code__
    try:
        yield
    finally:
        function.__code__ = original


@contextmanager
def _all(mutations: tuple[Mutation, ...]) -> Iterator[None]:
    with ExitStack() as stack:
        for mutation in mutations:
            stack.enter_context(mutation())
        yield


@contextmanager
def applied(mutation: Mutation) -> Iterator[None]:
    """The library with the bug: nothing built without it stays, nothing built with it is left."""
    _forget()
    try:
        with mutation():
            yield
    finally:
        _forget()


def _forget() -> None:
    """Empty the caches whose values a mutation changes."""
    bitwise.pair.cache_clear()
    accounting._epsilon.cache_clear()


# --------------------------------------------------------------------------- proofs


@cache
def checks() -> dict[str, Cell]:
    """The quick checks of the suite by their paths; properties do not shrink what kills a mutant."""
    for name in rf.__all__:  # imported when first asked for: a bug must not be what is kept
        getattr(rf, name)
    profile = settings(settings.get_profile("ci"), phases=(Phase.generate,))
    cells = [
        *bitwise.cells(quick=True),
        *trajectory.cells(quick=True),
        *privacy.cells(quick=True),
        *(Cell("properties", n, partial(p.check, profile)) for n, p in properties.PROPERTIES.items()),
    ]
    return {cell.path: cell for cell in cells}


def prove(exhibit: Exhibit) -> Proof:
    """Whether the killer passes without the bug, and fails with it, by an assertion."""
    if exhibit.killer not in checks():
        return Proof(exhibit, False, f"no quick check is called {exhibit.killer}")
    check = checks()[exhibit.killer]
    clean = _innocent(check)
    if clean:
        return Proof(exhibit, False, f"the check fails without the bug too: {clean}")
    with applied(exhibit.mutation):
        failure = _failure(check)
    if failure is None:
        return Proof(exhibit, False, "the check passes with the bug")
    cause = _root(failure)
    if not isinstance(cause, AssertionError):
        return Proof(exhibit, False, f"the check breaks, with {type(cause).__name__}: {cause}")
    return Proof(exhibit, True, _first_line(failure))


@cache
def _innocent(check: Cell) -> str:
    """What the check says without any bug, if it fails then; once in a process."""
    bitwise.pair.cache_clear()
    failure = _failure(check)
    return _first_line(failure) if failure else ""


def _failure(check: Cell) -> Exception | None:
    try:
        check.check()
    except Exception as failure:
        return failure
    return None


def _root(failure: BaseException) -> BaseException:
    """What it came from: a property turns every error into an assertion's, and says from which."""
    return _root(failure.__cause__) if failure.__cause__ else failure


def _first_line(failure: Exception) -> str:
    """Without the entry that differs most and the example that Hypothesis adds, and fit for a table."""
    line = re.split(r"\n| \(at \[|; (?:Failing|Falsifying)", str(failure))[0]
    return textwrap.shorten(line, 200, placeholder=" ...")
