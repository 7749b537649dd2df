"""Properties of every network, not only of those in the zoo: checked on generated configs.

The table is `PROPERTIES`; each file enters its own. On data whose sums are exact (`cases.exact`) the order of
a sum changes no bit, so that even what reassociates is proven to the bit.
"""

from __future__ import annotations

from functools import partial

from hypothesis import settings

from parity.cell import Cell
from parity.properties import (  # noqa: F401  (each enters its properties)
    any_network,
    calculus,
    comparisons,
    contractions,
    curvature,
    modules,
    normalisation,
    per_sample,
    purity,
    structure,
    sums,
    symmetries,
    training,
    variants,
)
from parity.properties.table import PROPERTIES, Property

__all__ = ["PROPERTIES", "Property", "cells", "describe"]


def cells(quick: bool) -> list[Cell]:
    """A cell for each property: a few examples if quick, else a hundred."""
    ci = settings.get_profile("ci")
    profile = ci if quick else settings(ci, max_examples=100)
    return [Cell("properties", name, partial(entry.check, profile)) for name, entry in PROPERTIES.items()]


def describe() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table of properties: what each states, how exactly it holds, and why no more can be asked for."""
    rows = [(name, entry.statement, entry.tolerance, entry.why) for name, entry in PROPERTIES.items()]
    return ("property", "statement", "tolerance", "why"), rows
