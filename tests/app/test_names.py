"""Names are printed as they are, and never break a line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_func.app.names import counted, printable


@pytest.mark.parametrize("name", ["cat", "[old]", "$x$", ":cat:", "Größe", "汉字", "два слова", "a\\b", ""])
def test_what_is_harmless_stays(name: str) -> None:
    assert printable(name) == name


@given(st.text(st.characters(exclude_categories=())))
def test_every_name_is_one_line_that_can_be_written(name: str) -> None:
    text = printable(name)
    assert text.isprintable() or not any(character < " " for character in text)
    assert len(text.splitlines()) <= 1
    text.encode()


def test_names_that_break_lines_or_steer_terminals_are_escaped() -> None:
    assert printable("a\nb\x1b[31m\udce9\u202ec") == r"a\nb\x1b[31m\udce9\u202ec"


def test_one_thing_is_one() -> None:
    assert [counted(n, "epoch") for n in (0, 1, 2)] == ["0 epochs", "1 epoch", "2 epochs"]
    assert [counted(n, "leaf", "leaves") for n in (1, 1000)] == ["1 leaf", "1,000 leaves"]
