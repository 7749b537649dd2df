"""`python -m parity audit`: a true claim stands, a false one falls."""

from __future__ import annotations

import pytest

from parity.__main__ import main

pytest.importorskip("dp_accounting")
SMALL = ("audit", "--canaries", "300", "--steps", "2")


def test_a_true_claim_stands_and_a_false_one_falls(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL]) == 0
    assert "not refuted" in capsys.readouterr().out
    assert main([*SMALL, "--noise", "0.05"]) == 1
    assert "REFUTED" in capsys.readouterr().out


def test_what_cannot_be_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--rate", "2"]) == 2
    assert capsys.readouterr().err.startswith("Error: sampling_rate must be in (0, 1]")
