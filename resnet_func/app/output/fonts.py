"""Fonts for names in any script: a name is drawn as it is where an installed font has its characters."""

from __future__ import annotations

import functools
from contextlib import suppress

from matplotlib import font_manager

from resnet_func.app.names import printable

OWN_FONT = "DejaVu Sans"  # comes with matplotlib


def drawable(name: str) -> str:
    """Escape what would break a line, and characters that no installed font has; the rest stays as it is.

    >>> drawable("$x$ é")
    '$x$ é'
    """
    return "".join(
        c if c.isascii() or font_with(c) else c.encode("unicode_escape").decode("ascii")
        for c in printable(name)
    )


def fonts_of(text: str) -> list[str]:
    """The fonts that together hold the characters of a text, matplotlib's own before all."""
    found = (font_with(c) for c in sorted(set(text)) if not c.isascii())
    return list(dict.fromkeys([OWN_FONT, *filter(None, found)]))


@functools.cache
def font_with(character: str) -> str | None:
    """A font that is installed and holds the character; None where there is none."""
    for name in (OWN_FONT, *sorted({entry.name for entry in font_manager.fontManager.ttflist} - {OWN_FONT})):
        # as when drawing: a family's name finds one file
        with suppress(OSError, RuntimeError, ValueError):
            file = font_manager.findfont(name, fallback_to_default=False)
            if font_manager.get_font(file).get_char_index(ord(character)):
                return name
    return None
