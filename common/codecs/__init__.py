"""Codecs by name: what lies in this folder is what there is.

    [ef:|plain:]NAME[:PARAMETER ...]        such as int8, int8:256, topk:0.01, ef:int8, plain:int4

This one grammar serves settings, command line and wire. Parameters follow in the order in which the codec lists them,
and the last ones may be left out. `ef:` feeds back what encoding loses (`common.codecs.feedback`), `plain:` does not;
without either it is as the codec has it by default. A codec's own `name` is the shortest way to write it.

codecs.load("int8")    the codec of that name
codecs.names()         all there are
codecs.words(text)     the names that a peer has to know for it
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from common import discovery
from common.codecs.base import Codec
from common.errors import ConfigError

HELPERS = ("base", "draws", "feedback", "parts", "tensors")
FEEDBACK = "ef"
PLAIN = "plain"
DIFFERENCE = "difference"
"""A word of its own: whoever knows it can add a reply to what it holds."""
CHARACTERS = 64
"""Longest name with parameters."""


def names() -> tuple[str, ...]:
    """Names of all codecs, sorted."""
    return discovery.names(__name__, helpers=HELPERS)


def words(text: str) -> tuple[str, ...]:
    """The names in `text` that a peer has to know: of the codec, and of feedback where it is used."""
    codec = load(text)
    return (*((FEEDBACK,) if codec.remembers else ()), _split(codec.name)[1])


def known() -> tuple[str, ...]:
    """All that this side knows of `words`."""
    return (*names(), FEEDBACK, DIFFERENCE)


@functools.lru_cache(maxsize=256)
def load(text: str) -> Codec:
    """The codec of that name; raises ConfigError that lists what there is."""
    if len(text) > CHARACTERS:
        raise ConfigError(
            f"The name of a codec has at most {CHARACTERS} characters, not {len(text)}.",
            fix="`paramserver codecs` lists them.",
        )
    memory, name, given = _split(text)
    codec: Codec = discovery.load(__name__, name, attribute="CODEC", kind="codec", helpers=HELPERS)
    codec = _remembering(_with(codec, given), memory)
    return codec if codec.name == text else load(codec.name)  # so that there is one of each


def _split(text: str) -> tuple[str, str, list[str]]:
    """`ef`, `plain` or nothing; the name; the parameters."""
    first, *rest = text.split(":")
    return (first, rest[0], rest[1:]) if first in (FEEDBACK, PLAIN) and rest else ("", first, rest)


def _with(codec: Codec, given: Sequence[str]) -> Codec:
    """The codec with these parameters, and with the defaults of the others."""
    parameters = codec.parameters
    if not given:
        return codec
    if len(given) > len(parameters) or codec.make is None:
        takes = ", ".join(f"{each.name} ({each.meaning})" for each in parameters) or "no parameters"
        raise ConfigError(
            f"'{given[-1]}' is one parameter too many for codec '{codec.name}'.", fix=f"It takes {takes}."
        )
    values = [each.default for each in parameters]
    for place, (parameter, value) in enumerate(zip(parameters, given, strict=False)):
        try:
            values[place] = parameter.read(value)
        except ValueError:
            raise ConfigError(
                f"The {parameter.name} of codec '{codec.name}' cannot be '{value}'.", fix=f"It is {parameter.meaning}."
            ) from None
    texts = [each.write(value) for each, value in zip(parameters, values, strict=True)]
    while texts and values[len(texts) - 1] == parameters[len(texts) - 1].default:
        texts.pop()
    made: Codec = codec.make(*values) if texts else codec
    return made._replace(name=":".join([codec.name, *texts]))


def _remembering(codec: Codec, memory: str) -> Codec:
    """The codec with or without feedback, as asked for or as it is by default."""
    by_default = codec.feedback in ("default", "always")
    if memory == FEEDBACK and codec.feedback == "never":
        why = "loses nothing" if codec.lossless else "errs to both sides alike"
        raise ConfigError(f"Codec '{codec.name}' {why}, so there is nothing to feed back.", fix=f"Use {codec.name}.")
    remembers = memory == FEEDBACK or (by_default and memory != PLAIN)
    if not remembers and not by_default:
        return codec
    prefix = f"{FEEDBACK if remembers else PLAIN}:" if remembers != by_default else ""
    return (codec.unscaled or codec)._replace(name=prefix + codec.name, remembers=remembers)
