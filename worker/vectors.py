"""The vectors that a session works on: where they lie, and what is worked out on them.

    x        the parameters, and the float buffers behind them, as last gathered     pushed   x at the last push
    anchor   what the last merge took from the server                                delta    what the last push sends
    sent     delta as the server decodes it, for a rule that tracks its anchor
    memory   what the codec lost of the pushes so far, where it feeds that back

Laws
* A merge is x <- reply + (x now - x at push), anchor <- reply; under a rule whose workers keep parameters of their own,
  the anchor is what the server knows of them.
* `Vectors` uses slices and operators in place, which numpy's arrays and torch's tensors share, so that there is one
  text of what is worked out. What differs, each kind has: how memory is got, and how bytes come and go.
* A vector that came from the server is kept, and one that is needed no longer is given away in its place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from common.binding import Binding
from common.buffers import zeros
from common.chunks import Plan
from common.codecs.base import F32, U8
from common.codecs.feedback import Memory
from common.messages import Scalars, Version
from common.rules.base import Config, OptimizerFacts, Rule
from worker.driver import Carrier

Vector: TypeAlias = Any
"""(elements,) float32, numpy's or torch's."""
Start: TypeAlias = Literal["here", "pushed", "anchor"]
"""Where progress is counted from: the model as it is, as it was pushed, or the anchor."""


def rule_facts(optimizer: torch.optim.Optimizer) -> OptimizerFacts:
    """What a rule may know of it."""
    group = optimizer.param_groups[0]
    return OptimizerFacts(
        type(optimizer).__name__,
        float(group["lr"]),
        float(group.get("momentum", 0.0) or 0.0),
        len(optimizer.param_groups),
        bool(group.get("nesterov", False)),
        float(group.get("dampening", 0.0) or 0.0),
    )


class Vectors(ABC):
    """What every kind does. The model is gathered when they are made."""

    _rule: Rule
    _config: Config
    _average_buffers: bool
    _sent: Vector

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._parameters, self._elements = binding.layout.parameters, binding.layout.elements
        self._x, self._pushed, self._anchor, self._scratch = (self._zeros(self._elements) for _ in range(4))
        self._delta = self._scratch
        self.memory: Memory | None = None
        binding.gather(self._x)

    # What each kind has

    @abstractmethod
    def _zeros(self, length: int) -> Vector:
        """(length,) zeros."""

    @abstractmethod
    def _stage(self, ups: Sequence[Mapping[str, Plan]], staging: U8) -> None:
        """Updates will be sent from `staging`."""

    @abstractmethod
    def _delta_of(self, up: Plan) -> Vector:
        """Where an update is worked out; free, because no push is under way."""

    @abstractmethod
    def _taken(self, values: F32, first: int, last: int) -> Vector:
        """What the server sent, (elements,), of which [first, last) will be read."""

    @abstractmethod
    def _give_away(self, vector: Vector) -> None:
        """A vector that is needed no longer; it was taken once, or took the place of one that was."""

    @abstractmethod
    def _in_host_memory(self, vector: Vector) -> F32:
        """Its values, to be read."""

    @abstractmethod
    def check(self) -> None:
        """Raise what went wrong in the background."""

    @abstractmethod
    def close(self) -> None:
        """Nothing will be worked out any more."""

    @abstractmethod
    def push(self, carrier: Carrier, up: Plan, scalars: Scalars, base: Version, fragment: int, key: int) -> None:
        """Encode the update that was worked out, and have it sent; raises CodecError where that cannot be."""

    # What all do

    def adopt(
        self, rule: Rule, config: Config, ups: Sequence[Mapping[str, Plan]], staging: U8, *, average_buffers: bool
    ) -> None:
        """What the server decided. ups: for each fragment, the plans of updates by codec; staging: for the longest."""
        self._rule, self._config, self._average_buffers = rule, config, average_buffers
        remembers = any(up.remembers for up in ups[0].values())
        self.memory = Memory(self._elements, self._zeros) if remembers else None
        self._sent = self._zeros(self._elements if rule.track is not None else 0)
        self._stage(ups, staging)

    def work_out(self, up: Plan, optimizer: torch.optim.Optimizer) -> None:
        """delta <- what the rule makes of x and anchor, and the float buffers as they are; x is what is pushed now."""
        n, delta = self._parameters, self._delta_of(up)
        self._binding.gather(self._x)
        x = self._x
        if self._rule.point is not None:
            x = self._pushed
            x[:] = self._x
            self._binding.gather_state(optimizer, "momentum_buffer", delta)
            self._rule.point(self._config, x[:n], delta[:n], rule_facts(optimizer))
        self._rule.update(self._config, x[:n], self._anchor[:n], delta[:n])
        delta[n:] = self._x[n:]
        if self.memory is not None:
            self.memory.add(delta, up.part.start, up.part.stop)
        self._delta = delta
        self._x, self._pushed = self._pushed, self._x

    def merge(self, values: F32, part: slice, *, moved: bool) -> None:
        """x <- merge(reply) + (x now - x at push), on `part` of the parameters; the anchor becomes what the rule says.

        moved: whether anything was trained since the push.
        """
        n, rule, start = self._parameters, self._rule, self._pushed
        reply = self._taken(values, part.start, self._elements if part.stop == n else part.stop)
        now, merged = (self._x, self._scratch) if moved else (start, start)  # x is where it was: merge in place
        if moved:
            self._binding.gather(now)
            if part == slice(0, n):
                merged[n:] = now[n:]
            else:
                merged[:] = now
            merged[part] = start[part]
        rule.merge(self._config, merged[part], reply[part])
        if moved:
            now[part] -= start[part]
            merged[part] += now[part]
        if part.stop == n and self._average_buffers:
            merged[n:] = reply[n:]
        if rule.track is not None:
            rule.track(self._config, self._anchor[part], self._sent[part], reply[part])
            self._give_away(reply)
        elif part == slice(0, n):
            self._anchor_at(reply)
        else:
            self._anchor[part] = reply[part]
            self._give_away(reply)
        self._binding.scatter(merged)
        if not self._binding.exact and rule.track is None:
            self._anchor_as_held(now, part, moved=moved)

    def go_on_from(self, values: F32, start: Start, *, moved: bool) -> None:
        """x <- c + (x - start), anchor <- c. moved: whether x is not at `start`."""
        n, now, merged = self._parameters, self._x, self._scratch
        center = self._taken(values, 0, self._elements)
        begun = {"here": now, "pushed": self._pushed, "anchor": self._anchor}[start]
        if moved or start == "here":
            self._binding.gather(now)
        else:
            now[:] = begun
        merged[:n] = center[:n]
        if moved:
            now[:n] -= begun[:n]
            merged[:n] += now[:n]
        merged[n:] = center[n:] if self._average_buffers else now[n:]
        self._anchor_at(center)
        self._binding.scatter(merged)
        if not self._binding.exact:
            self._anchor_as_held(now, slice(0, n), moved=moved)

    def anchor_at(self, values: F32) -> None:
        """anchor <- c; x stays."""
        self._anchor_at(self._taken(values, 0, self._elements))

    def pull(self, source: str, values: F32) -> None:
        """x <- what the rule makes of `source`, such as a leader."""
        assert self._rule.pull is not None
        n = self._parameters
        pulled = self._taken(values, 0, n)
        self._binding.gather(self._x)
        self._rule.pull(self._config, self._x[:n], source, pulled[:n])
        self._binding.scatter(self._x)
        self._give_away(pulled)

    def weights(self, exact: Plan) -> U8:
        """The model in a plan that loses nothing, and from here on the anchor; raises CodecError."""
        data = np.zeros(exact.bytes, np.uint8)
        self._binding.gather(self._x)
        exact.encode(self._in_host_memory(self._x), data)
        self._anchor[:] = self._x
        return data

    def settle(self, *, taken: bool) -> None:
        """The server took the last push, or did not."""
        if self.memory is not None:
            self.memory.settle(taken=taken)

    def _anchor_at(self, center: Vector) -> None:
        before, self._anchor = self._anchor, center
        self._give_away(before)

    def _anchor_as_held(self, progress: Vector, part: slice, *, moved: bool) -> None:
        """Half precision rounds what a merge writes; that is no training, so it goes into the anchor."""
        self._binding.gather(self._scratch)
        self._anchor[part] = self._scratch[part]
        if moved:
            self._anchor[part] -= progress[part]


class HostVectors(Vectors):
    """numpy's, in host memory: what the server sends is used where it landed."""

    _staging: U8
    _deltas: Mapping[str, F32]

    def __init__(self, binding: Binding) -> None:
        super().__init__(binding)
        self._outlived: F32 | None = None
        """Memory for the next reply."""

    def _zeros(self, length: int) -> F32:
        return zeros(length, np.float32)

    def _stage(self, ups: Sequence[Mapping[str, Plan]], staging: U8) -> None:
        """Where the bytes are the vector's own, it is worked out in its place."""
        self._staging = staging
        in_place = {codec: up.in_place(staging) if len(ups) == 1 else None for codec, up in ups[0].items()}
        self._deltas = {codec: self._scratch if delta is None else delta for codec, delta in in_place.items()}

    def _delta_of(self, up: Plan) -> F32:
        return self._deltas[up.codec]

    def _taken(self, values: F32, first: int, last: int) -> F32:
        return values

    def _give_away(self, vector: F32) -> None:
        self._outlived = vector

    def _in_host_memory(self, vector: F32) -> F32:
        return vector

    def check(self) -> None:
        """There is no background."""

    def close(self) -> None:
        """Nothing is to be given back."""

    def push(self, carrier: Carrier, up: Plan, scalars: Scalars, base: Version, fragment: int, key: int) -> None:
        """Block by block, while the first chunks are on their way."""
        data = self._staging[: up.bytes]
        outlived, self._outlived = self._outlived, None
        before = None if self.memory is None else self.memory.before
        carrier.push(self._delta, up, data, scalars, base, outlived, fragment, key=key, before=before)
        if self.memory is not None:
            self.memory.remember(self._delta, up.pieces(data))
        if self._rule.track is not None:
            up.decode(data, self._sent)
