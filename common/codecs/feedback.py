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

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Vector: TypeAlias = Any
"""float32, an array of numpy's or a tensor: all of one memory are of one kind."""


class Piece(NamedTuple):
    """Some elements of an update, and what was sent of them."""

    part: slice
    decode: Callable[[Vector], None]
    """Into a vector of so many elements."""
    start: Vector | None
    """uint8: what the next update of these elements starts from, where it does."""


class Memory:
    """What one sender has not got across yet. zeros(n): (n,) zeros, of the kind and in the place that updates are."""

    def __init__(self, elements: int, zeros: Callable[[int], Vector] = lambda n: np.zeros(n, np.float32)) -> None:
        self._e = zeros(elements)
        self._next = zeros(elements)
        self._under_way: list[slice] = []
        self._before: dict[int, Vector] = {}
        self._before_next: dict[int, Vector] = {}

    def __repr__(self) -> str:
        return f"<Memory of {len(self._e):,} elements, {'an update' if self._under_way else 'nothing'} under way>"

    @property
    def e(self) -> Vector:
        """(elements,) what was lost of all that was taken; to be read."""
        view = self._e[:]
        if isinstance(view, np.ndarray):
            view.flags.writeable = False
        return view

    @property
    def before(self) -> Mapping[int, Vector]:
        """By first element: what a block was encoded to in the last update that was taken, where its next one starts
        from there."""
        return self._before

    def add(self, update: Vector, first: int, last: int) -> None:
        """update: (elements,) p <- D + e, on elements [first, last)."""
        update[first:last] += self._e[first:last]

    def remember(self, update: Vector, pieces: Iterable[Piece]) -> None:
        """What e will be, should this update be taken. update: (elements,) p, from which `pieces` were encoded."""
        self._forget()
        for part, decode, start in pieces:
            lost = self._next[part]
            decode(lost)
            if isinstance(lost, np.ndarray):
                np.subtract(update[part], lost, out=lost)
            else:  # the same bits: a - b is -b + a
                lost.neg_().add_(update[part])
            self._under_way.append(part)
            if start is not None:
                self._before_next[part.start] = start.copy() if isinstance(start, np.ndarray) else start.clone()

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
