"""The bounded pool that all transfers live in.

Laws
* A slot is room for one exchange: the update going up and the reply coming down. It is taken before the first byte
  moves and given back when the last byte of the reply has left; so a granted push never waits for a buffer.
* The bound stands from the start; slots are made as workers join, and written to once: no allocation and no page
  fault on the path of an exchange.
* A slot has exactly one owner. Giving one back twice is a defect and raises.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.buffers import zeros
from common.codecs.base import U8
from common.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """Room for one exchange. update, reply: uint8, as long as the encoded vector each way."""

    index: int
    update: U8
    reply: U8


class Slots:
    """At most `limit` slots of `update_bytes + reply_bytes` each."""

    def __init__(self, limit: int, update_bytes: int, reply_bytes: int) -> None:
        self.limit = limit
        self._update_bytes = update_bytes
        self._reply_bytes = reply_bytes
        self._free: list[Slot] = []
        self._taken: set[int] = set()

    def __repr__(self) -> str:
        return f"<Slots {len(self._taken)} of {self.count} taken, at most {self.limit}>"

    @property
    def count(self) -> int:
        """Slots made so far."""
        return len(self._free) + len(self._taken)

    def missing(self, workers: int) -> int:
        """How many more slots are to be made until each of so many workers can have one, within the limit."""
        return max(min(workers, self.limit) - self.count, 0)

    def make(self) -> tuple[U8, U8]:
        """Room for an update and a reply, to be added. Changes nothing here, so any thread may do it."""
        return zeros(self._update_bytes, np.uint8), zeros(self._reply_bytes, np.uint8)

    def add(self, update: U8, reply: U8) -> None:
        """One more slot, of what `make` made."""
        self._free.append(Slot(self.count, update, reply))

    @property
    def taken(self) -> int:
        """Slots in use."""
        return len(self._taken)

    def take(self) -> Slot | None:
        """A free slot, or None where all are in use."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._taken.add(slot.index)
        return slot

    def give(self, slot: Slot) -> None:
        """Give `slot` back."""
        self._taken.remove(slot.index)
        self._free.append(slot)

    def validate(self) -> None:
        """Every slot is either free or taken."""
        assert self.count <= self.limit, repr(self)
        assert not self._taken & {slot.index for slot in self._free}, repr(self)


def slot_count(pool_bytes: int, slot_bytes: int, sessions: int) -> int:
    """How many slots a pool holds: no more than sessions can use at once; raises ConfigError where not one fits."""
    count = min(pool_bytes // slot_bytes, sessions)
    if count < 1:
        raise ConfigError(
            f"The pool of {pool_bytes / 2**20:.0f} MiB holds no exchange of this model ({slot_bytes / 2**20:.0f} MiB).",
            fix="Raise `pool_mib`.",
        )
    return int(count)
