"""The table of properties: one entry each, checked with as many generated examples as a profile says.

No property is silently vacuous. Where an example gives it nothing to say (a permutation that is the
identity), it calls `needs`, which counts the example; 1 % of such examples is a failure.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

MOST_VACUOUS = 0.01  # of the examples

_COMMON: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "phases": (Phase.generate, Phase.shrink),
    "report_multiple_bugs": False,
    "print_blob": False,  # Hypothesis turns it on where it sees CI; the example says it all
    "suppress_health_check": (HealthCheck.too_slow,),
}
# The same examples at every run, so that nobody's change fails for somebody else's reason.
settings.register_profile("ci", max_examples=8, derandomize=True, **_COMMON)
settings.register_profile("nightly", max_examples=10_000, **_COMMON)


class Vacuous(Exception):  # noqa: N818
    """An example that the property has nothing to say about."""


def needs(condition: object, what: str) -> None:
    """Count the example as vacuous unless the condition holds."""
    if not condition:
        raise Vacuous(what)


@dataclass(frozen=True)
class Property:
    """One statement about the library, for every example its strategies draw.

    Args:
        name: Of the test's function, with dashes.
        statement: Its docstring.
        tolerance: How exactly it holds: "bitwise", "fp64 1e-10", "fp64 formula", ...
        why: Why that is what can be asked for.
        test: Raises AssertionError where the statement is false.
        strategies: What `test` takes, by name.
    """

    name: str
    statement: str
    tolerance: str
    why: str
    test: Callable[..., None]
    strategies: dict[str, SearchStrategy]

    def check(self, profile: settings) -> str:
        """Try as many examples as the profile says; returns "bitwise, 8 examples, 0 vacuous".

        Raises:
            AssertionError: the statement is false, with the smallest example found; or says too little.
        """
        examples, vacuous = 0, 0

        def counted(**drawn: Any) -> None:
            nonlocal examples, vacuous
            examples += 1
            try:
                self.test(**drawn)
            except Vacuous:
                vacuous += 1

        counted.__name__ = counted.__qualname__ = self.test.__name__
        try:
            profile(given(**self.strategies)(counted))()
        except Exception as failure:
            raise AssertionError(_told(failure)) from failure
        figure = f"{self.tolerance}, {examples} examples, {vacuous} vacuous"
        assert vacuous < MOST_VACUOUS * examples, f"says too little: {figure}"
        return figure


def _told(failure: Exception) -> str:
    """What went wrong and with which example, in one line."""
    notes = (note for note in getattr(failure, "__notes__", ()) if "test case" in note or "example" in note)
    kind = "" if isinstance(failure, AssertionError) else f"{type(failure).__name__}: "
    return re.sub(r"\s+", " ", "; ".join([f"{kind}{failure}", *notes]))


PROPERTIES: dict[str, Property] = {}


def prop(
    *, tolerance: str, why: str, **strategies: SearchStrategy
) -> Callable[[Callable[..., None]], Property]:
    """Enter a function into the table; its docstring is the statement, `strategies` draw its arguments."""

    def enter(test: Callable[..., None]) -> Property:
        name = test.__name__.replace("_", "-")
        assert name not in PROPERTIES, f"two properties are called {name}"
        assert test.__doc__, f"{name} states nothing"
        statement = " ".join(test.__doc__.split())
        PROPERTIES[name] = Property(name, statement, tolerance, why, test, strategies)
        return PROPERTIES[name]

    return enter
