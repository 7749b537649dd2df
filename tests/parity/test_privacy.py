"""The checks of private training pass, and are those that the museum's bugs are killed by."""

from __future__ import annotations

import pytest

from parity import museum
from parity.cell import run
from parity.sections import privacy

pytest.importorskip("dp_accounting")
CELLS = {cell.path: cell for cell in privacy.cells(quick=True)}


@pytest.mark.parametrize("path", CELLS)
def test_cell(path: str) -> None:
    result = run(CELLS[path])
    assert result.outcome == "passed", result.said
    assert result.said


def test_every_check_kills_a_bug() -> None:
    killers = {exhibit.killer for exhibit in museum.EXHIBITS.values()}
    assert not CELLS.keys() - killers
    assert sum(killer in CELLS for killer in (e.killer for e in museum.EXHIBITS.values())) >= 12
