"""The state of one shard: the center, the rule's state, the version; and the block work that changes or reads it.

    center    [ parameters | float buffers ]    (elements,) float32
    replica   [ parameters ]                    of each session, where replies are differences: what its worker holds

    q <- C(center - replica),  replica <- replica + q           q: the reply, as its worker decodes it and adds it too

Laws
* All arithmetic is float32 (half precision exists only on the wire), block by block, in place.
* `version` counts changes of the center. An update is applied whole: between two jobs the center is one version.
* Work is handed out as functions over a range of blocks; ranges of one job may run on any threads at once, because
  blocks are disjoint. The shard never runs two jobs at once; the core sees to that.
* Where an update is only added, to the center or to a vector of the rule, it is decoded in the pass that adds it:
  nothing lies in between. Where neither it nor the reply are encoded, it may be added before it is checked, into a
  second center that only then becomes the center.
* A reply is encoded in the same pass that applies the update, while the block is in cache.
* A replica moves in the pass that encodes the reply, by what that decodes to: whoever merges it holds these very bits.
* A part of a job reports whether what it wrote is finite: training that diverges is noticed at the version where it
  happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from common.buffers import zeros
from common.chunks import Plan, plan
from common.codecs import at_rows, choices
from common.codecs.base import F32, U8
from common.errors import CodecError
from common.layout import Layout
from common.messages import Version
from common.rules.base import (
    Accumulate,
    Apply,
    Arrays,
    Config,
    Effect,
    Exchange,
    Reply,
    Rule,
    Terms,
    add_update,
    changes_center,
    perform,
    sum_of,
)


class Work(NamedTuple):
    """A job over `parts` blocks; run(first, last, scratch) does those in [first, last), and says of the center whether
    all that it wrote or read is finite."""

    parts: int
    elements: int
    run: Callable[[int, int, F32], Any]


Source = tuple[str, int]
"""(name of an array of the rule's state, row in it); "" is the center."""

CENTER: Source = ("", 0)

_NOWHERE = np.zeros(0, np.float32)
"""Where a copy goes that nobody wants."""

LOSSLESS = "fp32"
"""Codec of initial weights, and of whole centers where replies are differences: everybody starts from the same bits."""


class Kept(NamedTuple):
    """What is kept for one session, each vector (parameters,) float32. arrays: the rule's; replica: what its worker
    holds of the center, where replies are differences to that."""

    arrays: Arrays
    replica: F32 | None


class Shard:
    """The center of one model under one rule. Sessions' arrays are made here and kept by the sessions."""

    def __init__(
        self,
        layout: Layout,
        rule: Rule,
        config: Config,
        terms: Terms,
        *,
        codec: str,
        reply_codec: str,
        epoch: int,
        replies: str = "whole",
        shares: bool = False,
    ) -> None:
        self.layout = layout
        self.rule = rule
        self.config = config
        self.overlap = terms.overlap
        self.version = Version(epoch, 0)
        self.generation = 0
        """Changes of the center or of the rule's state in this life of the server."""
        self.center = zeros(layout.elements, np.float32)
        self.state: Arrays = rule.state(config, terms.overlap, layout.parameters, np.float32)
        self.decisions: Any = rule.start(config, terms)
        cut = partial(plan, layout, rows=at_rows(codec, reply_codec))
        self.exact: Plan = cut(LOSSLESS)
        self.down: Plan = cut(reply_codec if replies == "whole" else LOSSLESS)
        self.keeps_replicas = keeps_replicas(rule, replies)
        parts = rule.fragments(config)
        self.ups = tuple({one: cut(one, part, parts) for one in choices(codec)} for part in range(parts))
        """Of each fragment, by codec: where workers choose, there are several."""
        self.downs = tuple(cut(reply_codec, part, parts) for part in range(parts))
        tries = tries_updates(rule, config, self.ups[0].values(), self.downs[0], layout, shares=shares)
        self._second = zeros(layout.elements, np.float32) if tries else None
        """Where the next center may be made."""
        self.longest_update = max(up.bytes for ups in self.ups for up in ups.values())
        """Bytes of the longest fragment of an update, in any codec."""
        self.longest_reply = max(down.bytes for down in self.downs)
        self._spare: list[Kept] = []
        self.stats = np.zeros((max(down.parameter_blocks for down in self.downs), rule.stats_width))

    def __repr__(self) -> str:
        return f"<Shard {self.rule.name} at {self.version}, {self.layout.parameters:,} parameters>"

    def reply_plan(self, fragment: int | None) -> Plan:
        """How a reply to a push of a fragment travels; None: all of a source, for whoever pulls it."""
        return self.down if fragment is None else self.downs[fragment]

    @property
    def spare_arrays(self) -> int:
        """Sets of arrays that were made ahead."""
        return len(self._spare)

    def session_arrays(self) -> Kept:
        """What is kept for one session, all zero; made ahead, where any was."""
        return self._spare.pop() if self._spare else self.make_arrays()

    def keep_spare(self, kept: Kept) -> None:
        """For a session that is about to need it."""
        self._spare.append(kept)

    def make_arrays(self) -> Kept:
        """The same, fresh. Changes nothing here, so any thread may do it."""
        n = self.layout.parameters
        arrays = self.rule.session(self.config, self.overlap, n, np.float32)
        return Kept(arrays, zeros(n, np.float32) if self.keeps_replicas else None)

    def advance(self) -> None:
        """The center has changed once more."""
        self.version = Version(self.version.epoch, self.version.version + 1)

    # Work over blocks

    def load_work(self, data: U8) -> Work:
        """center <- data: initial weights, as checked, in the lossless codec."""

        def work(first: int, last: int, scratch: F32) -> bool:
            self.exact.decode(data, self.center, first, last)
            if self.rule.load is not None:
                for block in self.exact.blocks[first : min(last, self.exact.parameter_blocks)]:
                    part = slice(block.first, block.last)
                    self.rule.load(self.config, self.center[part], _part(self.state, part))
            return True

        return _over(self.exact, work)

    def push_work(
        self,
        fragment: int,
        up: Plan,
        update: U8,
        session: Arrays,
        effects: Sequence[Effect],
        reply: Reply | None,
        out: U8,
        buffers: Sequence[F32],
        replica: F32 | None = None,
        key: int = 0,
    ) -> Work:
        """Decode, run the kernels of `effects`, and encode the reply into `out`, block by block.

        up: the fragment's plan in the update's codec; update: (up.bytes or more,) as checked; out: (down.bytes,),
        written where there is a `reply`; buffers: (buffers,) float32 each, the last values of all members, the first of
        them this worker's own, which is written here; none where the center's buffers stay as they are; replica:
        (parameters,) what the worker holds, where the reply is the difference to it; key: of the reply, where its codec
        rounds at random.
        """
        down = self.downs[fragment]
        exchange = next((effect for effect in effects if isinstance(effect, Exchange)), None)
        source = source_of(reply)
        unseen = changes_center(effects) and exchange is None and source != CENTER
        added = _only_added(self.rule, effects) if reply is None or source == CENTER else None
        summed = self._only_summed(effects)
        plain = _NOWHERE if reply is None else down.in_place(out)
        if plain is not None and reply is not None:
            out[plain.nbytes : down.bytes] = 0

        def work(first: int, last: int, scratch: F32) -> bool:
            finite = True
            made = scratch if exchange is None and replica is None else np.empty(scratch.size, np.float32)
            if added is not None and plain is not None:
                first, finite = self._add_and_copy(up, first, last, update, added, plain, self.center)
            elif added is not None:
                encode = partial(self._encode, down, out, source=CENTER, made=made, replica=replica, key=key)
                first, finite = self._add_and_encode(up, first, last, update, added, encode)
            elif summed is not None:
                total, weight = summed
                first, _ = self._add_and_copy(up, first, last, update, weight, _NOWHERE, total)
            for index in range(first, last):
                block = up.blocks[index]
                d = up.values(block, update, scratch)
                if reply is not None and reply.what == "before":
                    finite &= self._encode(down, out, index, CENTER, made, replica, key)
                if index >= up.parameter_blocks:
                    self._average(block.first, block.last, d, buffers)
                    if exchange is not None:
                        finite &= self._encode(down, out, index, CENTER, made)
                else:
                    part = slice(block.first, block.last)
                    c, state, kept = self.center[part], _part(self.state, part), _part(session, part)
                    perform(self.rule, self.config, effects, c, state, kept, d, self.stats[index])
                    if exchange is not None:
                        finite &= self._exchange(exchange, down, index, c, state, kept, d, made[: d.size], out, key)
                if source is not None:
                    finite &= self._encode(down, out, index, source, made, replica, key)
                if unseen:  # no encoder looks at what was written
                    finite &= bool(np.isfinite(self.center[block.first : block.last]).all())
            return finite

        return _over(up, work)

    def tries(self, up: Plan) -> bool:
        """Whether updates of this plan may be added before they are checked: then `trial_work` is worth asking for."""
        return self._second is not None and up.verbatim

    def trial_work(self, up: Plan, update: U8, effects: Sequence[Effect], reply: Reply | None, out: U8) -> Work | None:
        """Add an update that nobody has checked: it may change while it is read. Where all that comes of it is finite,
        `adopt` makes that the center; else nothing has happened. None where that cannot be.

        update: (up.bytes,); out: (down.bytes,), written where there is a `reply`.
        """
        added, second, plain = _only_added(self.rule, effects), self._second, self.center.nbytes
        if added is None or second is None or not self.tries(up) or source_of(reply) not in (None, CENTER):
            return None
        if plain < up.bytes and update[plain:].any():
            return None
        d, copy = update[:plain].view(np.float32), _NOWHERE if reply is None else out[:plain].view(np.float32)
        assert copy.size in (0, self.center.size), "kernels look at no bounds"
        out[plain : self.downs[0].bytes] = 0
        blocks = self.exact.blocks

        def work(first: int, last: int, scratch: F32) -> bool:
            part = slice(blocks[first].first, blocks[last - 1].last)
            return sum_of(self.center[part], d[part], added, second[part], copy[part], plain)

        return _over(self.exact, work)

    def adopt(self) -> None:
        """The second center becomes the center."""
        assert self._second is not None
        self.center, self._second = self._second, self.center

    def _add_and_copy(
        self, up: Plan, first: int, last: int, update: U8, weight: np.float32, copy: F32, total: F32
    ) -> tuple[int, bool]:
        """total: (parameters or more,) += the leading blocks of [first, last) whose codec can add, and copy <- total
        there, many blocks in one pass: (the first block that is left, whether all is finite). copy: (elements,), or
        (0,) where nobody wants it."""
        finite, end = True, min(last, up.parameter_blocks)
        for start, stop in up.runs(first, end):
            if up.blocks[start].codec.add is None:
                return start, finite
            finite &= up.add(start, stop, update, total, weight, copy)
        return end, finite

    def _add_and_encode(
        self, up: Plan, first: int, last: int, update: U8, weight: np.float32, encode: Callable[..., bool]
    ) -> tuple[int, bool]:
        """The same, each block of the center encoded while it is in the cache."""
        finite, end = True, min(last, up.parameter_blocks)
        for index in range(first, end):
            if up.blocks[index].codec.add is None:
                return index, finite
            finite &= up.add(index, index + 1, update, self.center, weight, _NOWHERE)
            finite &= encode(index=index)
        return end, finite

    def _only_summed(self, effects: Sequence[Effect]) -> tuple[F32, np.float32] | None:
        """The vector of the rule's state that the update is added to, and the weight, where nothing else is done; else
        None."""
        match effects:
            case [Accumulate(weight=weight, args=args)]:
                total = self.rule.total(self.config, self.state, args)
                return None if total is None else (total, np.float32(weight))
        return None

    def close_work(self, effects: Sequence[Effect]) -> Work:
        """Run the kernels of `effects` where no update is pushed."""
        nothing = np.zeros(0, np.float32)
        stats = np.zeros(self.rule.stats_width)
        changes = changes_center(effects)

        def work(first: int, last: int, scratch: F32) -> bool:
            finite = True
            for block in self.exact.blocks[first : min(last, self.exact.parameter_blocks)]:
                part = slice(block.first, block.last)
                c = self.center[part]
                perform(self.rule, self.config, effects, c, _part(self.state, part), None, nothing, stats)
                finite &= not changes or bool(np.isfinite(c).all())
            return finite

        return _over(self.exact, work)

    def read_work(
        self,
        out: U8,
        source: Source,
        fragment: int | None,
        session: Arrays | None,
        how: Literal["anchor", "given"],
        replica: F32 | None = None,
        key: int = 0,
    ) -> Work:
        """Encode a source; with a session's arrays, its worker is given it: to go on from, or late.

        A rule whose worker half tracks what the server knows of it goes on from what the worker decodes. replica:
        (parameters,) an anchor is what it starts from; a late reply is the difference to it, with the key of the reply.
        """
        down = self.reply_plan(fragment)
        kernel = self.rule.anchor if how == "anchor" else self.rule.given
        late = replica if how == "given" else None

        def work(first: int, last: int, scratch: F32) -> bool:
            finite = True
            for index in range(first, last):
                finite &= self._encode(down, out, index, source, scratch, late, key)
                if replica is not None and how == "anchor" and index < down.parameter_blocks:
                    part = slice(down.blocks[index].first, down.blocks[index].last)
                    replica[part] = self.center[part]
                if session is not None and kernel is not None and index < down.parameter_blocks:
                    block = down.blocks[index]
                    part = slice(block.first, block.last)
                    given = self.center[part]
                    if self.rule.track is not None and finite:
                        given = scratch[: given.size]
                        down.decode_block(block, out, given)
                    kernel(self.config, given, _part(session, part))
            return finite

        return _over(down, work)

    def copy_work(self, sources: Sequence[F32], targets: Sequence[F32]) -> Work:
        """targets <- sources: the snapshot of a checkpoint; the last axis of each is (parameters,) or (elements,)."""

        def work(first: int, last: int, scratch: F32) -> bool:
            start, end = self.exact.blocks[first].first, self.exact.blocks[last - 1].last
            for source, target in zip(sources, targets, strict=True):
                target[..., start:end] = source[..., start:end]
            return True

        return _over(self.exact, work)

    def _exchange(
        self,
        exchange: Exchange,
        down: Plan,
        index: int,
        c: F32,
        state: Arrays,
        session: Arrays,
        d: F32,
        made: F32,
        out: U8,
        key: int,
    ) -> bool:
        """The rule makes the reply; what the worker will decode of it is what the rule settles. made: (block,)."""
        assert self.rule.propose is not None
        assert self.rule.settle is not None
        block = down.blocks[index]
        if block.codec.view is not None:  # made where it will lie
            made = block.codec.view(out[block.offset : block.end])
        self.rule.propose(self.config, c, state, session, d, exchange.weight, exchange.args, made)
        try:
            down.encode_block(block, made, out, key)
        except CodecError:
            return False
        self.rule.settle(self.config, c, state, session, down.values(block, out, made))
        return True

    def _encode(
        self,
        down: Plan,
        out: U8,
        index: int,
        source: Source,
        made: F32,
        replica: F32 | None = None,
        key: int = 0,
    ) -> bool:
        """A block of a source into `out`: as it is, or, but for buffers, as the difference to a replica, which moves by
        what that decodes to. made: at least (block,), room for the difference."""
        name, row = source
        block = down.blocks[index]
        vector = self.center
        if name and index < down.parameter_blocks:
            array = getattr(self.state, name)
            vector = array[row] if array.ndim > 1 else array
        part = slice(block.first, block.last)
        try:
            if replica is None or index >= down.parameter_blocks:
                down.encode_block(block, vector[part], out)
                return True
            q = np.subtract(vector[part], replica[part], out=made[: block.last - block.first])
            down.encode_block(block, q, out, key)
        except CodecError:
            return False
        down.decode_block(block, out, q)
        replica[part] += q
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
        assert len(self.down.blocks) == len(self.exact.blocks)
        for ups, down in zip(self.ups, self.downs, strict=True):
            assert all(len(up.blocks) == len(down.blocks) for up in ups.values())


def tries_updates(rule: Rule, config: Config, ups: Iterable[Plan], down: Plan, layout: Layout, *, shares: bool) -> bool:
    """Whether updates may be added before they are checked: the rule only adds them, their bytes, as those of replies,
    to pushes (`down`), may be the vector's own, and they come whole, in one message or in memory that is shared."""
    plain = any(up.verbatim for up in ups) and down.verbatim and not layout.buffers and rule.fragments(config) == 1
    return plain and rule.apply is add_update and (shares or len(down.chunks) == 1)


def _only_added(rule: Rule, effects: Sequence[Effect]) -> np.float32 | None:
    """The weight with which the update is added to the center, where that is all that is done with it; else None."""
    if rule.apply is not add_update:
        return None
    weight = None
    for effect in effects:
        if isinstance(effect, Apply) and weight is None:
            weight = np.float32(effect.weight)
        elif not isinstance(effect, Reply):
            return None
    return weight


def _over(plan: Plan, run: Callable[[int, int, F32], bool]) -> Work:
    """A job over the blocks of `plan`."""
    return Work(len(plan.blocks), plan.travels, run)


def keeps_replicas(rule: Rule, replies: str) -> bool:
    """Whether the server keeps what each worker holds of the center. A rule whose worker half tracks what the server
    knows of it has differences for replies, and a replica of its own, anyway."""
    return replies == "difference" and rule.track is None


def source_of(reply: Reply | None) -> Source | None:
    """What is encoded once the kernels have run; None where nothing is, or it was encoded before or by them."""
    if reply is None or reply.what in ("before", "made", "nothing"):
        return None
    return CENTER if reply.what == "after" else (reply.what, reply.row)


def _part(arrays: Arrays, part: slice) -> Arrays:
    return None if arrays is None else type(arrays)(*(array[..., part] for array in arrays))
