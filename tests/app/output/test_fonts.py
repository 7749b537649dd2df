"""Characters that no font has are escaped, so that names stay distinct; others are drawn as they are."""

from __future__ import annotations

import pytest

from resnet_func.app.output import fonts


def test_matplotlibs_own_font_comes_first() -> None:
    assert fonts.fonts_of("abc é →") == [fonts.OWN_FONT]


def test_another_font_helps_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "font_with", lambda c: "Other" if c == "汉" else None)
    assert fonts.drawable("a汉字$\n") == r"a汉\u5b57$\n"
    assert fonts.fonts_of("a汉") == [fonts.OWN_FONT, "Other"]


def test_a_character_of_no_script_has_no_font() -> None:
    assert fonts.font_with("\U0010fffe") is None
