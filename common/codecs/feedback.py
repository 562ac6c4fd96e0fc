"""Error feedback, `ef:NAME`: what encoding loses of one update is added to the next. Stich et al., arXiv 1809.07599;
Karimireddy et al., arXiv 1901.09847.

    p = D + e        send C(p)        e <- p - C(p), C(p) as the receiver decodes it

So nothing is lost but time: the sum of what was decoded and e is the sum of all D, up to rounding. C is to contract;
it need not be unbiased. The receiver decodes as ever, and knows of nothing.

Laws
* e changes only when an update was taken, and then by this update alone: `settle(taken=False)`, for one that was
  refused, withdrawn or taken back, leaves every bit.
* One update at a time is under way; of a vector in fragments only the part that is pushed is touched.
* e is finite: what cannot be encoded never gets here.
* What a codec starts from that starts from its last update (`Codec.warm`) moves with e: the last update that was taken.

Left out: decay (e <- beta e, which conserves nothing); a memory for replies, where the worker's replica is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np

from common.codecs.base import F32, U8, Codec

Piece: TypeAlias = tuple[Codec, int, int, U8]
"""(codec, first element, last element, encoded bytes) of a block."""


class Memory:
    """What one sender has not got across yet."""

    def __init__(self, elements: int) -> None:
        self._e = np.zeros(elements, np.float32)
        self._next = np.zeros(elements, np.float32)
        self._under_way: list[slice] = []
        self._before: dict[int, U8] = {}
        self._before_next: dict[int, U8] = {}

    def __repr__(self) -> str:
        return f"<Memory of {self._e.size:,} elements, {'an update' if self._under_way else 'nothing'} under way>"

    @property
    def e(self) -> F32:
        """(elements,) what was lost of all that was taken; to be read."""
        view = self._e[:]
        view.flags.writeable = False
        return view

    @property
    def before(self) -> Mapping[int, U8]:
        """By first element: what a block was encoded to in the last update that was taken, where its next one starts
        from there."""
        return self._before

    def add(self, update: F32, first: int, last: int) -> None:
        """update: (elements,) p <- D + e, on elements [first, last)."""
        update[first:last] += self._e[first:last]

    def remember(self, update: F32, pieces: Iterable[Piece]) -> None:
        """What e will be, should this update be taken. update: (elements,) p, from which `pieces` were encoded."""
        self._forget()
        for codec, first, last, encoded in pieces:
            part = slice(first, last)
            lost = self._next[part]
            codec.decode(encoded, lost)
            np.subtract(update[part], lost, out=lost)
            self._under_way.append(part)
            if codec.warm is not None:
                self._before_next[first] = encoded.copy()

    def settle(self, *, taken: bool) -> None:
        """The update under way was taken, or not; without one under way nothing happens."""
        if taken:
            for part in self._under_way:
                self._e[part] = self._next[part]
            self._before |= self._before_next
        self._forget()

    def _forget(self) -> None:
        """Nothing is under way."""
        self._under_way.clear()
        self._before_next.clear()
