"""Typed config sections: checked when made, read from plain dicts, unknown keys refused with a suggestion."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin


class Range(NamedTuple):
    """Closed interval of legal values, used inside `Annotated`; `high=None` is unbounded."""

    low: float
    high: float | None = None

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the interval (NaN does not)."""
        return value >= self.low and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        return f">= {self.low}" if self.high is None else f"between {self.low} and {self.high}"


PositiveInt = Annotated[int, Range(1)]
Count = Annotated[int, Range(0)]
NonNegative = Annotated[float, Range(0.0)]
Fraction = Annotated[float, Range(0.0, 1.0)]

S = TypeVar("S", bound="Section")


class Section:
    """Base of the config dataclasses: types and ranges of all fields are checked when an object is made."""

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            _check_value(getattr(self, name), hint, _prefix(type(self)) + name)
        self.check()

    def check(self) -> None:
        """Conditions that a single field's type cannot state; raises ValueError."""

    def to_dict(self) -> dict[str, Any]:
        """Nested dict of JSON types (tuples become lists); `from_dict` is its inverse."""
        return {name: _plain(getattr(self, name)) for name in _hints(type(self))}

    @classmethod
    def from_dict(cls: type[S], values: Mapping[str, Any]) -> S:
        """Build from a dict; missing keys take defaults. Raises ValueError on unknown keys and bad values."""
        hints, prefix = _hints(cls), _prefix(cls)
        if not isinstance(values, Mapping):
            raise ValueError(
                f"config section {prefix.rstrip('.') or 'root'}: expected a table, got {values!r}"
            )
        for key in values:
            if key not in hints:
                raise ValueError(f"unknown config key {prefix}{key}{suggestion(key, hints)}")
        return cls(**{key: _convert(value, hints[key]) for key, value in values.items()})


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise ValueError `NAME = VALUE: expected EXPECTED` unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} = {value!r}: expected {expected}")


def suggestion(word: str, known: Iterable[str]) -> str:
    """Tail of an error message: the closest known word, or all of them where none is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else f" (known: {', '.join(known)})"


def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _prefix(cls: type) -> str:
    """`train.` for TrainConfig; nothing for the root, Config."""
    name = cls.__name__.removesuffix("Config").lower()
    return f"{name}." if name else ""


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


def _convert(value: Any, hint: Any) -> Any:
    """JSON/TOML types to field types: tables to sections, arrays to tuples, whole numbers to floats.

    TOML has no null: the word `none` stands for it in fields that may be None.
    """
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if isinstance(hint, type) and issubclass(hint, Section):
        return hint.from_dict(value)
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_convert(item, get_args(hint)[0]) for item in value)
    if value == "none" and type(None) in get_args(hint):
        return None
    return float(value) if hint is float and type(value) is int else value


def _check_value(value: Any, hint: Any, name: str) -> None:
    """Raise ValueError unless `value` is of the annotated type and range."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        _check_value(value, args[0], name)
        require(args[1].holds(value), name, value, f"a value {args[1]}")
    elif origin is Literal:
        require(value in args, name, value, f"one of {', '.join(args)}")
    elif origin is tuple:
        length = None if args[-1] is Ellipsis else len(args)
        require(isinstance(value, tuple), name, value, "a list")
        require(length in (None, len(value)), name, value, f"{length} values")
        for item in value:
            _check_value(item, args[0], name)
    elif origin in (typing.Union, types.UnionType):
        if value is not None:
            _check_value(value, args[0], name)
    else:
        expected = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
        kinds = (int, float) if hint is float else hint
        right = isinstance(value, kinds) and (hint is bool or not isinstance(value, bool))
        require(right, name, value, expected.get(hint, hint.__name__))
