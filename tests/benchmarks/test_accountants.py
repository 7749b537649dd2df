"""Opacus's accountants on the events of ours: as far apart as their errors, and no further."""

from __future__ import annotations

import pytest

from benchmarks.forms.accountants import EPSILON_ERROR, EVENTS, as_table, epsilons

pytest.importorskip("opacus", reason="needs the extra `bench`: uv sync --extra bench")
pytest.importorskip("dp_accounting")
ROUNDING = 5e-3  # of PLD's grid, upwards


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_renyi_is_looser_and_the_other_numerical_one_agrees(event) -> None:
    found = epsilons(event)
    assert found.pld <= found.rdp + ROUNDING
    # what PRV says is an estimate, within its error, plus that error
    assert -ROUNDING <= found.prv - found.pld <= 2 * EPSILON_ERROR


@pytest.mark.filterwarnings("ignore")
def test_the_table_has_a_row_for_each() -> None:
    assert as_table(EVENTS[:1]).row_count == 1
