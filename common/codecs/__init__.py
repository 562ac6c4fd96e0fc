"""Codecs by name: what lies in this folder is what there is.

    [ef:|plain:]NAME[:PARAMETER ...]        such as int8, int8:256, topk:0.01, ef:int8, plain:int4
    auto[:CODEC]                            whichever is fastest on a worker's link, CODEC being the lossiest allowed

This one grammar serves settings, command line and wire. Parameters follow in the order in which the codec lists them,
and the last ones may be left out. `ef:` feeds back what encoding loses (`common.codecs.feedback`), `plain:` does not;
without either it is as the codec has it by default. A codec's own `name` is the shortest way to write it. `auto` is no
codec: it leaves the choice among a few to each worker.

codecs.load("int8")    the codec of that name
codecs.names()         all there are
codecs.setting(text)   the shortest way to write a codec, or auto
codecs.choices(text)   the codecs that may be used where that is the setting
codecs.words(text)     the names that a peer has to know for it
codecs.at_rows(*texts) whether, where these are the settings, all plans are cut at the rows of matrices
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from common import discovery
from common.codecs.base import BLOCK_ELEMENTS, Codec
from common.errors import ConfigError

HELPERS = ("base", "draws", "feedback", "parts", "tensors")
FEEDBACK = "ef"
PLAIN = "plain"
DIFFERENCE = "difference"
"""A word of its own: whoever knows it can add a reply to what it holds."""
AUTO = "auto"
ALLOWED = "int8"
"""The lossiest codec that auto may choose, where none is named."""
LADDER = ("fp32", "bf16", "int8")
"""What auto weighs beside that, as far as it is less lossy: sends more bytes."""
CHARACTERS = 64
"""Longest name with parameters."""


def names() -> tuple[str, ...]:
    """Names of all codecs, sorted."""
    return discovery.names(__name__, helpers=HELPERS)


def words(text: str) -> tuple[str, ...]:
    """The names in the setting `text` that a peer has to know: of codecs, and of feedback and auto if used."""
    found = [load(one) for one in choices(text)]
    extra = (AUTO if len(found) > 1 else "", FEEDBACK if any(codec.remembers for codec in found) else "")
    return (*filter(None, extra), *(_split(codec.name)[1] for codec in found))


def known() -> tuple[str, ...]:
    """All that this side knows of `words`."""
    return (*names(), FEEDBACK, DIFFERENCE, AUTO)


def setting(text: str) -> str:
    """The shortest way to write a codec, or auto; raises ConfigError for what is neither."""
    first, _, rest = text.partition(":")
    if first != AUTO:
        return load(text).name
    lossiest = load(rest or ALLOWED)
    if lossiest.of_columns is not None:
        raise ConfigError(
            f"'{text}' cannot be weighed: how long an update is in '{lossiest.name}' is up to the model, and each "
            f"starts from the one before.",
            fix=f"Use {lossiest.name}, or {AUTO}:int4.",
        )
    if lossiest.lossless:
        raise ConfigError(
            f"'{text}' leaves nothing to choose: '{lossiest.name}' is what every other codec is weighed against.",
            fix=f"Use {lossiest.name}, or {AUTO}:bf16.",
        )
    return AUTO if lossiest.name == ALLOWED else f"{AUTO}:{lossiest.name}"


def choices(text: str) -> tuple[str, ...]:
    """The codecs that may be used where the setting is `text`, from the least lossy on: one, or those of auto."""
    name = setting(text)
    first, _, rest = name.partition(":")
    if first != AUTO:
        return (name,)
    lossiest = load(rest or ALLOWED)
    fewest = lossiest.encoded_bytes(BLOCK_ELEMENTS)
    return (*(one for one in LADDER if load(one).encoded_bytes(BLOCK_ELEMENTS) > fewest), lossiest.name)


def at_rows(*texts: str) -> bool:
    """Whether plans are cut at the rows of matrices: all, where the codec of any of these settings asks for it."""
    return any(load(one).of_columns is not None for text in texts for one in choices(text))


@functools.lru_cache(maxsize=256)
def load(text: str) -> Codec:
    """The codec of that name; raises ConfigError that lists what there is."""
    if len(text) > CHARACTERS:
        raise ConfigError(
            f"The name of a codec has at most {CHARACTERS} characters, not {len(text)}.",
            fix="`paramserver codecs` lists them.",
        )
    memory, name, given = _split(text)
    if name == AUTO:
        raise ConfigError(
            f"'{AUTO}' is no codec: it leaves the choice of one to each worker.",
            fix=f"It is a value of `codec` alone: {AUTO}, or {AUTO}:CODEC with the lossiest codec that may be chosen.",
        )
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
