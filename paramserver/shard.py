"""The state of one shard: the center, the rule's state, the version; and the block work that changes or reads it.

    center   [ parameters | float buffers ]     (elements,) float32

Laws
* All arithmetic is float32 (half precision exists only on the wire), block by block, in place.
* `version` counts changes of the center. An update is applied whole: between two jobs the center is one version.
* Work is handed out as functions over a range of blocks; ranges of one job may run on any threads at once, because
  blocks are disjoint. The shard never runs two jobs at once; the core sees to that.
* A reply is encoded in the same pass that applies the update, while the block is in cache.
* A part of a job reports whether what it wrote is finite: training that diverges is noticed at the version where it
  happens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from common.buffers import zeros
from common.chunks import Plan, plan
from common.codecs.base import F32, U8
from common.errors import CodecError
from common.layout import Layout
from common.messages import Version
from common.rules.base import Arrays, Config, Rule

Work = Callable[[int, int, F32], bool]
"""work(first, last, scratch): blocks [first, last); False where a value it wrote or read is not finite."""

LOSSLESS = "fp32"
"""Codec of initial weights: everybody starts from the same bits."""


class Shard:
    """The center of one model under one rule. Sessions' arrays are made here and kept by the sessions."""

    def __init__(
        self, layout: Layout, rule: Rule, config: Config, *, overlap: bool, codec: str, reply_codec: str, epoch: int
    ) -> None:
        self.layout = layout
        self.rule = rule
        self.config = config
        self.overlap = overlap
        self.version = Version(epoch, 0)
        self.center = zeros(layout.elements, np.float32)
        self.state: Arrays = rule.state(config, overlap, layout.parameters, np.float32)
        self.decisions: Any = None
        self.up: Plan = plan(layout, codec)
        self.down: Plan = plan(layout, reply_codec)
        self.exact: Plan = plan(layout, LOSSLESS)
        self.stats = np.zeros((self.up.parameter_blocks, rule.stats_width))

    def __repr__(self) -> str:
        return f"<Shard {self.rule.name} at {self.version}, {self.layout.parameters:,} parameters>"

    def session_arrays(self) -> Arrays:
        """What the rule keeps for one session, all zero: a named tuple of (parameters,) float32."""
        return self.rule.session(self.config, self.overlap, self.layout.parameters, np.float32)

    def advance(self) -> None:
        """The center has changed once more."""
        self.version = Version(self.version.epoch, self.version.version + 1)

    # Work over blocks

    def load_work(self, data: U8) -> Work:
        """center <- data: initial weights, as checked, in the lossless codec."""

        def work(first: int, last: int, scratch: F32) -> bool:
            self.exact.decode(data, self.center, first, last)
            return True

        return work

    def apply_work(
        self,
        update: U8,
        session: Arrays,
        weight: float,
        reply: U8 | None,
        what: Literal["before", "after"],
        buffers: Sequence[F32],
    ) -> Work:
        """Decode, apply, and encode the reply, block by block.

        update: (up.bytes,) as checked; reply: (down.bytes,) or None; buffers: (buffers,) float32 each, the last values
        of all members, the first of them this worker's own, which is written here; none where buffers stay local.
        """

        def work(first: int, last: int, scratch: F32) -> bool:
            finite = True
            for index in range(first, last):
                block, below = self.up.blocks[index], self.down.blocks[index]
                d = self.up.values(block, update, scratch)
                if what == "before" and reply is not None:
                    finite &= self._encode(reply, index)
                if index >= self.up.parameter_blocks:
                    self._average(below.first, below.last, d, buffers)
                else:
                    part = slice(block.first, block.last)
                    self.rule.apply(
                        self.config,
                        self.center[part],
                        _part(self.state, part),
                        _part(session, part),
                        d,
                        weight,
                        self.stats[index],
                    )
                if what == "after" and reply is not None:
                    finite &= self._encode(reply, index)
            return finite

        return work

    def anchor_work(self, session: Arrays | None, reply: U8) -> Work:
        """Encode the center as it is; with a session's arrays, its worker goes on from here."""

        def work(first: int, last: int, scratch: F32) -> bool:
            finite = True
            for index in range(first, last):
                if session is not None and index < self.down.parameter_blocks:
                    block = self.down.blocks[index]
                    part = slice(block.first, block.last)
                    self.rule.anchor(self.config, self.center[part], _part(session, part))
                finite &= self._encode(reply, index)
            return finite

        return work

    def copy_work(self, sources: Sequence[F32], targets: Sequence[F32]) -> Work:
        """targets <- sources: the snapshot of a checkpoint; each (parameters,) or (elements,) float32."""

        def work(first: int, last: int, scratch: F32) -> bool:
            start, end = self.up.blocks[first].first, self.up.blocks[last - 1].last
            for source, target in zip(sources, targets, strict=True):
                target[start:end] = source[start:end]
            return True

        return work

    def _encode(self, reply: U8, index: int) -> bool:
        try:
            self.down.encode(self.center, reply, index, index + 1)
        except CodecError:
            return False
        return True

    def _average(self, first: int, last: int, own: F32, buffers: Sequence[F32]) -> None:
        """Float buffers of the center: the mean of the members' last values."""
        if not buffers:
            return
        part = slice(first - self.layout.parameters, last - self.layout.parameters)
        buffers[0][part] = own
        center = self.center[first:last]
        center[:] = 0.0
        for values in buffers:
            center += values[part]
        center /= np.float32(len(buffers))

    def validate(self) -> None:
        """The plans cut the same blocks."""
        assert len(self.up.blocks) == len(self.down.blocks) == len(self.exact.blocks)


def _part(arrays: Arrays, part: slice) -> Arrays:
    return type(arrays)(*(array[part] for array in arrays))
