"""Names that users gave (classes, files, run folders), made safe to print; and numbers of things."""

from __future__ import annotations

import unicodedata

# control characters, lone halves of UTF-16 (bytes of a file name that are no UTF-8), and line separators
ESCAPED_CATEGORIES = frozenset(("Cc", "Cs", "Zl", "Zp"))
# these turn the direction of all that follows on a line
DIRECTION_MARKS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(name: str) -> str:
    """Escape what would break a line or steer a terminal; every other character stays as it is.

    Newlines, tabs, escape sequences, marks that turn the direction of text, and bytes of a file name that are
    no text become their Python escapes.

    >>> printable("[old] Größe")
    '[old] Größe'
    >>> print(printable("two" + chr(10) + "lines"))
    two\\nlines
    """
    return "".join(_escape(character) if _is_unsafe(character) else character for character in name)


def counted(number: int, thing: str, things: str = "") -> str:
    """So many things, in words as there are one or more.

    >>> counted(1, "image"), counted(1200, "image"), counted(2, "class", "classes")
    ('1 image', '1,200 images', '2 classes')
    """
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


def _is_unsafe(character: str) -> bool:
    return unicodedata.category(character) in ESCAPED_CATEGORIES or character in DIRECTION_MARKS


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
