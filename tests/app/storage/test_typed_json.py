"""JSON against types, field by field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pytest

from resnet_func.app.storage.typed_json import FieldError, UnlikeFieldsError, from_json


class Inner(NamedTuple):
    pair: tuple[int, float]
    many: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    inner: Inner
    kind: Literal["a", 1]
    share: float | None = None
    rates: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if self.share == 2:
            raise ValueError("share must not be 2")


WHOLE: dict[str, Any] = {"inner": {"pair": [1, 2], "many": ["x"]}, "kind": "a", "rates": {"b": 0.5}}


def test_what_fits_comes_back() -> None:
    assert from_json(Outer, WHOLE, "it") == Outer(Inner((1, 2), ("x",)), "a", None, {"b": 0.5})
    assert from_json(Outer, {**WHOLE, "share": None, "rates": None, "kind": 1}, "it").kind == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"inner": 3}, "it.inner must be an object; got 3"),
        ({"inner": {"pair": [1]}}, r"it.inner.pair must be a list of 2; got \[1\]"),
        ({"inner": {"pair": [1.5, 2]}}, r"it.inner.pair\[0\] must be a whole number; got 1.5"),
        ({"inner": {"pair": [1, 2], "many": "x"}}, "it.inner.many must be a list; got 'x'"),
        ({"kind": True}, "it.kind must be one of 'a', 1; got True"),
        ({"share": "half"}, "it.share must be a number; got 'half'"),
        ({"share": 2.0}, "it: share must not be 2"),
        ({"rates": {"b": None}}, "it.rates.b must be a number; got None"),
        ({"rates": [1]}, r"it.rates must be an object; got \[1\]"),
        ({"kind": "k" * 999}, "k{50}[k]*[.]{3}$"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(FieldError, match=says):
        from_json(Outer, {**WHOLE, **changes}, "it")


def test_fields_of_another_version() -> None:
    with pytest.raises(UnlikeFieldsError, match="^more is unknown$"):
        from_json(Outer, {**WHOLE, "more": 1}, "")
    with pytest.raises(UnlikeFieldsError, match=r"^it.inner.pair is missing$"):
        from_json(Outer, {**WHOLE, "inner": {}}, "it")
    with pytest.raises(FieldError, match="^the whole must be an object"):
        from_json(Outer, [], "")
