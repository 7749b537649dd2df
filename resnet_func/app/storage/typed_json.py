"""Dataclasses and NamedTuples from JSON, every field checked against its type."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


class FieldError(ValueError):
    """A field has a value of another type; the message names it."""


class UnlikeFieldsError(FieldError):
    """A field is missing, or is none of the type's: the file is of another version."""


def from_json(kind: type[T], value: Any, where: str) -> T:
    """Make a dataclass or NamedTuple of what JSON holds.

    Args:
        kind: Its type. Fields are texts, numbers, booleans, `Literal`s, tuples, `dict[str, ...]`, classes,
            or one of these or None. A field with a default may be absent.
        value: From `json.loads`.
        where: What to call `value` in messages; "" calls it by its fields alone.

    Returns:
        The instance; lists have become tuples. A whole number where a float is expected stays one.

    Raises:
        FieldError: a field has another type, or a class refuses its values; the field is named.
        UnlikeFieldsError: a field is missing or unknown.

    >>> from typing import NamedTuple
    >>> class Size(NamedTuple):
    ...     sides: tuple[int, int]
    >>> from_json(Size, {"sides": [3, 4]}, "size")
    Size(sides=(3, 4))
    >>> from_json(Size, {"sides": [3, "four"]}, "size")
    Traceback (most recent call last):
    resnet_func.app.storage.typed_json.FieldError: size.sides[1] must be a whole number; got 'four'
    """
    if not isinstance(value, Mapping):
        raise FieldError(f"{where or 'the whole'} must be an object; got {_shown(value)}")
    optional, hints = _optional(kind), get_type_hints(kind)
    hints = {name: hints[name] for name in _names(kind)}
    for name in value:
        if name not in hints:
            raise UnlikeFieldsError(f"{_inside(where, name):.80} is unknown")
    for name in hints:
        if name not in value and name not in optional:
            raise UnlikeFieldsError(f"{_inside(where, name)} is missing")
    given = {name: _checked(hints[name], item, _inside(where, name)) for name, item in value.items()}
    try:
        return kind(**given)
    except ValueError as error:
        raise FieldError(f"{where}: {error}" if where else str(error)) from error


def _inside(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _names(kind: Any) -> list[str]:
    return [field.name for field in fields(kind)] if is_dataclass(kind) else list(kind._fields)


def _optional(kind: Any) -> set[str]:
    """The fields with a default."""
    if not is_dataclass(kind):
        return set(kind._field_defaults)
    return {f.name for f in fields(kind) if (f.default, f.default_factory) != (MISSING, MISSING)}


def _checked(kind: Any, value: Any, where: str) -> Any:
    """The value as its type has it."""
    match get_origin(kind):
        case origin if origin in (types.UnionType, Union):
            return _optional_value(get_args(kind), value, where)
        case origin if origin is Literal:
            if not any(value == choice and type(value) is type(choice) for choice in get_args(kind)):
                choices = ", ".join(map(repr, get_args(kind)))
                raise FieldError(f"{where} must be one of {choices}; got {_shown(value)}")
            return value
        case origin if origin is tuple:
            return _tuple(get_args(kind), value, where)
        case origin if origin is dict:
            if not isinstance(value, dict):
                raise FieldError(f"{where} must be an object; got {_shown(value)}")
            of = get_args(kind)[1]
            return {name: _checked(of, item, f"{where}.{name}") for name, item in value.items()}
    if kind not in NAMES:
        return from_json(kind, value, where)
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise FieldError(f"{where} must be {NAMES[kind]}; got {_shown(value)}")
    return value


def _optional_value(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """None, or the value as the one other type that it may have."""
    if value is None:
        return None
    (kind,) = (each for each in kinds if each is not type(None))
    return _checked(kind, value, where)


def _tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise FieldError(f"{where} must be a list; got {_shown(value)}")
    if kinds[-1] is ...:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise FieldError(f"{where} must be a list of {len(kinds)}; got {_shown(value)}")
    return tuple(
        _checked(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
