"""What a push does to a shard, whichever passes it takes, has the bits of decoding it and running the rule on whole
vectors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from common.buffers import zeros
from common.codecs.base import BLOCK_ELEMENTS, F32, U8
from common.config import ServerSettings
from common.layout import Layout, Tensor
from common.rules import load
from common.rules.base import Accumulate, Apply, Close, Effect, Exchange, Reply, perform, reply_to
from paramserver.shard import Kept, Shard

PARAMETERS, BUFFERS = 2 * BLOCK_ELEMENTS + 4321, 17
LAYOUT = Layout(
    (Tensor("weight", (PARAMETERS,), "float32", "parameter"), Tensor("mean", (BUFFERS,), "float32", "buffer"))
)
WORKER = "w"
AFTER = Reply(WORKER, "after", "the center after this update")
PUSHES: dict[str, tuple[str, list[Effect]]] = {
    "added": ("downpour", [Apply(0.7, "")]),
    "added, answered": ("downpour", [Apply(0.7, ""), AFTER]),
    "summed": ("local_sgd", [Accumulate(0.3, "", (0.0,))]),
    "summed, answered": ("fedbuff", [Accumulate(0.3, ""), AFTER]),
    "summed, closed, answered": ("fedbuff", [Accumulate(0.3, ""), Close(""), AFTER]),
    "exchanged": ("easgd", [Exchange(0.5, "", (0.4,)), Reply(WORKER, "made", "")]),
}


@pytest.mark.parametrize("cuts", [[], [1, 3]], ids=["at once", "in ranges"])
@pytest.mark.parametrize("reply_codec", ["fp32", "bf16"])
@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "natural", "qsgd"])
@pytest.mark.parametrize("push", PUSHES)
def test_a_push_has_the_bits_of_whole_vectors(push: str, codec: str, reply_codec: str, cuts: list[int]) -> None:
    rule, effects = PUSHES[push]
    settings = ServerSettings(rule=rule, codec=codec, reply_codec=reply_codec)
    (shard, kept), (other, others) = _made(settings), _made(settings)
    up, down = shard.ups[0][codec], shard.downs[0]
    out = zeros(down.bytes, np.uint8)
    for seed in (1, 2):
        update = zeros(up.bytes, np.uint8)
        up.encode(_values(seed), update)
        work = shard.push_work(0, up, update, kept.arrays, effects, reply_to(WORKER, effects), out, ())
        bounds = [0, *cuts, work.parts]
        for first, last in reversed(list(pairwise(bounds))):
            assert work.run(first, last, np.full(BLOCK_ELEMENTS, np.nan, np.float32))
        reply = _on_whole_vectors(other, update, effects, others)
        assert shard.center.tobytes() == other.center.tobytes()
        assert not np.array_equal(shard.center, _values(0)) or push.startswith("summed"), "the center has moved"
        for mine, theirs in zip((*shard.state, *kept.arrays), (*other.state, *others.arrays), strict=True):
            assert mine.tobytes() == theirs.tobytes()
        if reply_to(WORKER, effects):
            assert out.tobytes() == reply.tobytes()


def _made(settings: ServerSettings) -> tuple[Shard, Kept]:
    """A shard with weights, and the arrays of a worker that starts from them."""
    shard = Shard(
        LAYOUT,
        load(settings.rule),
        settings.rule_config(),
        settings.terms(),
        codec=settings.codec,
        reply_codec=settings.reply_codec,
        epoch=0,
    )
    shard.center[:] = _values(0)
    kept = shard.session_arrays()
    if shard.rule.anchor is not None:
        shard.rule.anchor(shard.config, shard.center[:PARAMETERS], kept.arrays)
    return shard, kept


def _values(seed: int) -> F32:
    return np.asarray(np.random.default_rng(seed).normal(size=LAYOUT.elements), np.float32)


def _on_whole_vectors(shard: Shard, update: U8, effects: Sequence[Effect], kept: Kept) -> U8:
    """Change the shard by hand; the reply, encoded."""
    rule, config, down = shard.rule, shard.config, shard.downs[0]
    decoded, answered = zeros(LAYOUT.elements, np.float32), shard.center.copy()
    next(iter(shard.ups[0].values())).decode(update, decoded)
    c, d, reply = shard.center[:PARAMETERS], decoded[:PARAMETERS], zeros(down.bytes, np.uint8)
    perform(rule, config, effects, c, shard.state, kept.arrays, d, np.zeros(rule.stats_width))
    match effects[0]:
        case Exchange(weight=weight, args=args):
            assert rule.propose is not None
            assert rule.settle is not None
            rule.propose(config, c, shard.state, kept.arrays, d, weight, args, answered[:PARAMETERS])
            down.encode(answered, reply)
            down.decode(reply, answered)
            rule.settle(config, c, shard.state, kept.arrays, answered[:PARAMETERS])
        case _:
            down.encode(shard.center, reply)
    return reply
