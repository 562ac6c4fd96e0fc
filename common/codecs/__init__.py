"""Codecs by name: what lies in this folder is what there is.

codecs.load("int8")    the codec of that name
codecs.names()         all there are
"""

from __future__ import annotations

from common import discovery
from common.codecs.base import Codec

HELPERS = ("base", "feedback")


def names() -> tuple[str, ...]:
    """Names of all codecs, sorted."""
    return discovery.names(__name__, helpers=HELPERS)


def load(name: str) -> Codec:
    """The codec of that name; raises ConfigError that lists what there is."""
    codec: Codec = discovery.load(__name__, name, attribute="CODEC", kind="codec", helpers=HELPERS)
    return codec
