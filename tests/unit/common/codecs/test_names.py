"""The grammar of a codec's name: one way to write each, and a sentence for whatever is none."""

from __future__ import annotations

import pytest

from common import codecs
from common.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "name", "remembers"),
    [
        ("int8", "int8", False),
        ("int8:1024", "int8", False),
        ("int8:256", "int8:256", False),
        ("ef:int8:256", "ef:int8:256", True),
        ("plain:int8", "int8", False),
        ("int4", "int4", True),
        ("ef:int4", "int4", True),
        ("plain:int4:32", "plain:int4:32", False),
        ("topk:.05", "topk:0.05", True),
        ("ef:topk:0.01:fp16", "topk", True),
        ("topk:0.01:int8", "topk:0.01:int8", True),
        ("plain:sign", "plain:sign", False),
        ("qsgd:127:64", "qsgd:127:64", False),
        ("randomk", "randomk", False),
        ("ef:randomk", "ef:randomk", True),
        ("bf16:stochastic", "bf16:stochastic", False),
        ("ef:bf16:nearest", "ef:bf16", True),
        ("powersgd:2", "powersgd", True),
        ("plain:powersgd:4", "plain:powersgd:4", False),
    ],
)
def test_every_codec_has_one_shortest_name(text: str, name: str, remembers: bool) -> None:
    codec = codecs.load(text)
    assert (codec.name, codec.remembers) == (name, remembers)
    assert codecs.load(name) is codec


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no codec named ''"),
        ("ef", "no codec named 'ef'"),
        ("ef:", "no codec named ''"),
        ("ef:ef:int8", "no codec named 'ef'"),
        ("int8:", "group of codec 'int8' cannot be ''"),
        ("int8:100", "group of codec 'int8' cannot be '100'"),
        ("int8:64:64", "one parameter too many"),
        ("fp32:1", "one parameter too many"),
        ("topk:0", "density of codec 'topk' cannot be '0'"),
        ("topk:nan", "density of codec 'topk' cannot be 'nan'"),
        ("topk:2", "density of codec 'topk' cannot be '2'"),
        ("topk:0.1:bf16", "values of codec 'topk' cannot be 'bf16'"),
        ("qsgd:128", "levels of codec 'qsgd' cannot be '128'"),
        ("powersgd:0", "rank of codec 'powersgd' cannot be '0'"),
        ("powersgd:65", "rank of codec 'powersgd' cannot be '65'"),
        ("randomk:0", "density of codec 'randomk' cannot be '0'"),
        ("bf16:up", "rounding of codec 'bf16' cannot be 'up'"),
        ("x" * 65, "at most 64 characters"),
        ("base", "no codec named 'base'"),
        ("draws", "no codec named 'draws'"),
    ],
)
def test_whatever_is_none_is_refused_in_words(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        codecs.load(text)
    assert sentence in caught.value.sentence
    assert caught.value.fix


def test_a_peer_has_to_know_the_codec_and_the_feedback() -> None:
    assert codecs.words("int8:256") == ("int8",)
    assert codecs.words("topk") == ("ef", "topk")
    assert codecs.words("plain:int4") == ("int4",)
    assert set(codecs.known()) == {*codecs.names(), "ef", "difference", "auto"}
