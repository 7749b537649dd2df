"""The bug museum: what broke other implementations, put into this one, and the check that kills it.

Every exhibit is a mutant of the running library. It is killed when a check of the suite that passes without
the bug fails with it, by an assertion. `python -m parity museum` shows them all.
"""

from __future__ import annotations

from functools import partial

from rich.markup import escape
from rich.table import Table

from parity.cell import Cell
from parity.museum import borders, curvature, layers, network, per_sample, privacy, training
from parity.museum.exhibit import Exhibit, Proof, prove

__all__ = ["EXHIBITS", "Exhibit", "Proof", "as_table", "cells", "chosen", "describe", "prove", "summary"]

EXHIBITS: dict[str, Exhibit] = {
    exhibit.name: exhibit
    for subject in (layers, network, training, per_sample, curvature, privacy, borders)
    for exhibit in subject.EXHIBITS
}


def cells(quick: bool) -> list[Cell]:
    """A cell for each exhibit, which passes if the bug is killed; all are quick."""
    return [Cell("museum", name, partial(_check, exhibit)) for name, exhibit in EXHIBITS.items()]


def _check(exhibit: Exhibit) -> str:
    proof = prove(exhibit)
    assert proof.killed, f"survived {exhibit.killer}: {proof.said}"
    return f"killed by {exhibit.killer}: {proof.said}"


def chosen(only: str) -> list[Exhibit]:
    """The exhibits whose name starts with `only`.

    Raises:
        ValueError: there is none.
    """
    found = [exhibit for name, exhibit in EXHIBITS.items() if name.startswith(only)]
    if not found:
        raise ValueError(f"no exhibit starts with {only!r}; without --only all {len(EXHIBITS)} are shown")
    return found


def as_table(proofs: list[Proof]) -> Table:
    columns = ("exhibit", "the bug", "where it was seen", "killed by", "what it said")
    table = Table(title="the bug museum", show_lines=True)
    for column in columns:
        table.add_column(column, overflow="fold")
    for proof in proofs:
        exhibit = proof.exhibit
        killer = exhibit.killer if proof.killed else f"SURVIVED {exhibit.killer}"
        cells = (exhibit.name, exhibit.bug, exhibit.seen, killer, proof.said)
        table.add_row(*map(escape, cells))  # tensors' shapes are in brackets
    return table


def summary(proofs: list[Proof]) -> str:
    killed = sum(proof.killed for proof in proofs)
    return f"{len(proofs)} exhibits: {killed} killed, {len(proofs) - killed} survived"


def describe() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table of exhibits."""
    return ("exhibit", "the bug", "where it was seen"), [(e.name, e.bug, e.seen) for e in EXHIBITS.values()]
