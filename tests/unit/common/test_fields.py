"""The quick reader and the checkers have one opinion of every field; texts are clipped; unknown types are found."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import fields, messages
from common.errors import WireError
from common.fields import INTEGER_LIMIT, STRING_BYTES
from common.messages import Diversity, Fault, Optimizer, Place, Reply, Resume, Version

CLASSES = [cls for cls in vars(messages).values() if dataclasses.is_dataclass(cls)]
PARTS: dict[type[Any], Any] = {
    Optimizer: Optimizer("sgd", 0.1, 0.9, 1, True, 0.0),
    Resume: Resume("s", 3, 2, 1),
    Diversity: Diversity(-0.5, 2.0, 3),
    Place: Place(4, 5, 6, "ab"),
    Reply: Reply(7, 8, "fp32", Version(1, 9)),
}
"""What an optional part may be, where it is not None."""
ODD: list[Any] = [None, True, False, 0, -1, 1, INTEGER_LIMIT - 1, INTEGER_LIMIT, 2**63, 0.0, -0.5, float("inf")]
ODD += ["", "x", "push", "x" * 2000, b"", b"x", [], [1], [1, 2], [1, -1], [True, 2], [1, 2.0], [1, INTEGER_LIMIT]]
ODD += [[1, 2, 3], ["x"], ["x", "y"], ["x", 1], {}, {"a": None}, {"a": 1}, {1: 1}, {"x": "y", "z": 0.5}]
anything = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
every_class = pytest.mark.parametrize("cls", CLASSES, ids=[cls.__name__ for cls in CLASSES])


def example(hint: Any) -> Any:
    """Any one value of that type, always the same, with each part that may be there."""
    arguments = get_args(hint)
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return PARTS.get(hint) or hint(**{name: example(h) for name, h in hints.items() if name != "payload"})
    if type(None) in arguments:
        return example(arguments[0])
    plain = {int: 1, float: 0.5, str: "a", bool: True, Version: Version(1, 2)}
    known = {tuple[int, ...]: (3, 4), tuple[str, ...]: ("x", "y")}
    if hint in plain or hint in known:
        return (plain | known)[hint]
    return {"a": 1} if get_origin(hint) is dict else arguments[0]


def plain(cls: type[Any]) -> dict[str, Any]:
    """The example as it arrives."""
    packed = msgpack.packb(fields.writer(cls, {})(example(cls)))
    return dict(msgpack.unpackb(packed))


def verdict(read: fields.Reader, *arguments: Any) -> str:
    """What came of it, so that True is not 1 and not a number is itself."""
    try:
        return repr(read(*arguments))
    except WireError as error:
        return f"refused: {error}"


def nearly(header: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Maps that differ from `header`: in one field, or in one of a part."""
    yield from ({key: header[key] for key in header if key != name} for name in header)
    yield from ({key: header[key] for key in header if key != name} | {"odd": 1} for name in header)
    yield header | {"odd": 1}
    yield dict(reversed(header.items()))
    for name, value in itertools.product(header, ODD):
        yield header | {name: value}
    for name, part in header.items():
        if type(part) is dict:
            yield from (header | {name: other} for other in nearly(part))


@every_class
def test_the_reader_and_the_checkers_agree_on_every_field(cls: type[Any]) -> None:
    read, checked, header = fields.reader(cls), fields.checked(cls), plain(cls)
    assert read(header, "it") == example(cls)
    verdicts = [(verdict(read, other, "it"), verdict(checked, other, "it")) for other in [*ODD, *nearly(header)]]
    assert [quick for quick, _ in verdicts] == [slow for _, slow in verdicts]
    assert any(quick.startswith("refused") for quick, _ in verdicts)


@every_class
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_they_agree_on_several_wrong_fields(cls: type[Any], data: st.DataObject) -> None:
    header = plain(cls)
    header |= data.draw(st.dictionaries(st.sampled_from(sorted(header)), anything, max_size=4))
    assert verdict(fields.reader(cls), header, "it") == verdict(fields.checked(cls), header, "it")


@every_class
def test_what_a_writer_wrote_is_read_without_the_checkers(cls: type[Any]) -> None:
    read: Any = fields.reader(cls)

    def never(*_: object) -> None:
        raise AssertionError("an ordinary message took the slow way")

    read.__globals__["checked"] = never
    assert read(plain(cls), "it") == example(cls)


def test_constants_stand_behind_the_fields() -> None:
    header = fields.writer(Resume, {"protocol": 9, "type": "resume"})(PARTS[Resume])
    assert list(header) == ["session", "last_sent", "last_applied", "merged", "protocol", "type"]
    assert (header["protocol"], header["type"]) == (9, "resume")


@pytest.mark.parametrize("letter", ["x", "ü", "語", "😀"])
def test_a_long_text_is_clipped_between_two_letters(letter: str) -> None:
    write, size = fields.writer(Fault, {}), len(letter.encode())
    for count in (STRING_BYTES // 4, STRING_BYTES // 4 + 1, STRING_BYTES // size, STRING_BYTES // size + 1, 5000):
        sentence = write(Fault("s", 1, "code", letter * count, "", 0))["sentence"]
        assert sentence == letter * min(count, STRING_BYTES // size)


@dataclass(frozen=True, slots=True)
class Unknown:
    value: complex


def test_a_type_without_a_checker_is_a_mistake() -> None:
    with pytest.raises(TypeError, match="complex"):
        fields.reader(Unknown)
