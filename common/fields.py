"""Dataclasses to plain maps and back: functions without a loop, written once for each class from its fields.

    write = writer(Beat)    write(beat) -> {"session": "s", "connection": 3, "steps": 7}
    read = reader(Beat)     read({"session": "s", "connection": 3, "steps": 7}, "Beat") -> Beat("s", 3, 7)

A reader tests all fields in one expression; a list of checkers, called one by one, takes three times as long. As
`dataclasses` does, source is written and run when a class is met: it is made of the names and types of fields alone,
and nothing that was received is ever part of it.

Laws
* One table says how a type is written, tested and checked; a type that is not in it is a TypeError at import.
* Only the checkers refuse. A reader takes what is plainly right and leaves everything else to them, and they take it as
  well or say what is wrong; so there are not two opinions on what is allowed.
* Every field must be there, of its type, within its range; a field nobody knows is refused with a WireError.
* The field `payload` is in no map: `write` leaves it out, `read` is given it.

Left out: what is packed, and how long it may be (`common.wire`).
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Union, cast, get_args, get_origin, get_type_hints

from common.errors import WireError
from common.messages import Version

STRING_BYTES = 1024
INTEGER_LIMIT = 1 << 53

Writer = Callable[[Any], dict[str, Any]]
Reader = Callable[..., Any]
"""(map, what an error calls it, payload if there is one) -> an instance."""
Checker = Callable[[Any, str], Any]
"""(value, what an error calls it) -> the value of the field; raises WireError."""


def writer(cls: type[Any], constants: dict[str, object]) -> Writer:
    """Writes an instance of `cls` as msgpack's own types, fields in their order, and `constants` behind them."""
    fields = _written_fields(cls, "part") + [f"{name!r}: {value!r}" for name, value in constants.items()]
    source = f"def write(part):\n return {{{', '.join(fields)}}}\n"
    return cast(Writer, _defined("write", cls, source, {"clipped": _clipped}))


def reader(cls: type[Any]) -> Reader:
    """Reads an instance of `cls` from what `writer` wrote, in any order and without the constants."""
    kinds = _kinds(cls)
    payload = ", payload" if any(field.name == "payload" for field in dataclasses.fields(cls)) else ""
    given = [f"{name}_ = fields[{name!r}]" for name in kinds]  # the underscore keeps names like `bytes` apart
    tests = [f"len(fields) == {len(kinds)}", *(kind.test.format(f"{name}_") for name, kind in kinds.items())]
    values = [
        kind.read.format(f"{name}_", check=f"check_{name}", where=f"'{cls.__name__}.{name}'")
        for name, kind in kinds.items()
    ]
    source = f"""
def read(fields, where{payload and ", payload=b''"}):
    try:
        {"; ".join(given)}
    except (KeyError, TypeError):
        return checked(fields, where{payload})
    if {" and ".join(tests)}:
        return cls({", ".join(values)}{payload})
    return checked(fields, where{payload})
"""
    names = {"cls": cls, "checked": checked(cls), "Version": Version}
    checks = {f"check_{name}": kind.check for name, kind in kinds.items()}
    return cast(Reader, _defined("read", cls, source, names | checks))


def checked(cls: type[Any]) -> Reader:
    """The checkers, one by one: a reader that takes all that is allowed, and names the field that it refuses."""
    checkers = {name: (kind.check, f"{cls.__name__}.{name}") for name, kind in _kinds(cls).items()}

    def read(fields: object, where: str, *payload: object) -> object:
        if type(fields) is not dict:
            raise WireError(f"{where} is no map.")
        if fields.keys() != checkers.keys():
            odd = ", ".join(sorted(str(name) for name in fields.keys() ^ checkers.keys()))
            raise WireError(f"{cls.__name__} lacks or does not know: {odd[:200]}.")
        return cls(*(check(fields[name], where) for name, (check, where) in checkers.items()), *payload)

    return read


def _defined(name: str, cls: type[Any], source: str, names: dict[str, object]) -> object:
    """The function `name` that `source` defines, which sees `names`."""
    exec(compile(source, f"<{name} of {cls.__name__}>", "exec"), names)
    return names[name]


# How a type is written


def _written_fields(cls: type[Any], instance: str) -> list[str]:
    """The fields of the object that the expression `instance` stands for, as the items of a dict display."""
    hints = get_type_hints(cls).items()
    return [f"{name!r}: {_written(hint, f'{instance}.{name}')}" for name, hint in hints if name != "payload"]


def _written(hint: Any, value: str) -> str:
    if hint is str:
        short = STRING_BYTES // 4  # a character has at most 4 bytes
        return f"{value} if len({value}) <= {short} else clipped({value})"
    if (inner := _inner_of_optional(hint)) is not None:
        return f"None if {value} is None else {_written(inner, value)}"
    if dataclasses.is_dataclass(hint):
        return f"{{{', '.join(_written_fields(cast(type[Any], hint), value))}}}"
    return value


def _clipped(text: str) -> str:
    """A long text as far as the other side takes it: a sentence may end early, a connection must not."""
    return text.encode("utf-8", "replace")[:STRING_BYTES].decode("utf-8", "ignore")


# How a type is read


class _Kind(NamedTuple):
    """How a field of one type is read. In the expressions `{0}` stands for what was received."""

    check: Checker
    test: str = "True"
    """Holds only for what `check` takes as well, unless `read` calls it."""
    read: str = "{check}({0}, {where})"
    """The field's value, once the test holds."""


def _kinds(cls: type[Any]) -> dict[str, _Kind]:
    return {name: _kind(hint) for name, hint in get_type_hints(cls).items() if name != "payload"}


@functools.cache
def _kind(hint: Any) -> _Kind:
    """How a field of type `hint` is read; an unknown type is a mistake in `common.messages`."""
    if hint in _PLAIN:
        return _PLAIN[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return _Kind(_one_of(args), f"{{0}} in {args!r}", "{0}")
    if origin is tuple:
        return _Kind(_tuple_of(_kind(args[0]).check))
    if origin is dict:
        return _Kind(_scalar_map)
    if (inner := _inner_of_optional(hint)) is not None:
        kind = _kind(inner)
        return _Kind(
            _optional(kind.check), f"({{0}} is None or {kind.test})", f"None if {{0}} is None else {kind.read}"
        )
    if dataclasses.is_dataclass(hint):
        return _Kind(reader(cast(type[Any], hint)))
    raise TypeError(f"no checker for {hint}")


def _inner_of_optional(hint: Any) -> Any:
    """X of `X | None`, else None."""
    args = get_args(hint)
    return args[0] if get_origin(hint) in (Union, types.UnionType) and args[1:] == (type(None),) else None


def _integer(value: object, where: str) -> int:
    if type(value) is not int or not 0 <= value < INTEGER_LIMIT:
        raise WireError(f"{where} is no integer from 0 to 2^53.")
    return value


def _float(value: object, where: str) -> float:
    if type(value) not in (float, int):
        raise WireError(f"{where} is no number.")
    return float(cast(float, value))


def _string(value: object, where: str) -> str:
    if type(value) is not str:
        raise WireError(f"{where} is no string.")
    return value


def _boolean(value: object, where: str) -> bool:
    if type(value) is not bool:
        raise WireError(f"{where} is neither true nor false.")
    return value


def _version(value: object, where: str) -> Version:
    if type(value) is not list or len(value) != 2:
        raise WireError(f"{where} is no (epoch, version).")
    return Version(_integer(value[0], where), _integer(value[1], where))


def _scalar_map(value: object, where: str) -> dict[str, Any]:
    if type(value) is not dict or not all(type(v) in (bool, int, float, str) for v in value.values()):
        raise WireError(f"{where} is no map of plain values.")
    if not all(type(key) is str for key in value):
        raise WireError(f"{where} has a key that is no string.")
    return value


def _tuple_of(item: Checker) -> Checker:
    def check(value: object, where: str) -> tuple[Any, ...]:
        if type(value) is not list:
            raise WireError(f"{where} is no list.")
        return tuple(item(element, where) for element in value)

    return check


def _one_of(allowed: tuple[object, ...]) -> Checker:
    def check(value: object, where: str) -> object:
        if type(value) is not str or value not in allowed:
            raise WireError(f"{where} is none of {', '.join(map(str, allowed))}.")
        return value

    return check


def _optional(inner: Checker) -> Checker:
    return lambda value, where: None if value is None else inner(value, where)


_INTEGER = f"type({{0}}) is int and 0 <= {{0}} < {INTEGER_LIMIT}"
_PAIR = " and ".join(["type({0}) is list and len({0}) == 2", *(_INTEGER.replace("{0}", f"{{0}}[{i}]") for i in (0, 1))])
_PLAIN: dict[object, _Kind] = {
    int: _Kind(_integer, _INTEGER, "{0}"),
    float: _Kind(_float, "type({0}) is float", "{0}"),
    str: _Kind(_string, "type({0}) is str", "{0}"),
    bool: _Kind(_boolean, "type({0}) is bool", "{0}"),
    Version: _Kind(_version, _PAIR, "Version({0}[0], {0}[1])"),
}
