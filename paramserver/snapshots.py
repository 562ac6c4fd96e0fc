"""Published snapshots: what one source held at one moment, encoded once, shared by all who are given exactly that.

Laws
* A published snapshot never changes while anybody reads it.
* There are two buffers: one that is read, one that the next version is written to. A pull that needs a third waits
  until a reader is done; that is the bound on memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from common.buffers import zeros
from common.codecs.base import U8
from common.messages import NOWHERE, Version

BUFFERS = 2


class Moment(NamedTuple):
    """What a snapshot is of. `at`: the version of the center, or the generation of any other source."""

    source: tuple[str, int]
    fragment: int | None
    at: int


@dataclass(slots=True, eq=False)
class Snapshot:
    """One buffer. `of`: the source, its fragment and its moment; None until it holds anything."""

    data: U8
    of: Moment | None = None
    version: Version = NOWHERE
    readers: int = 0


class Snapshots:
    """The two buffers."""

    def __init__(self, reply_bytes: int) -> None:
        self._buffers = [Snapshot(zeros(reply_bytes, np.uint8)) for _ in range(BUFFERS)]
        self._latest: Snapshot | None = None

    def __contains__(self, snapshot: Snapshot) -> bool:
        return snapshot in self._buffers

    @property
    def bytes(self) -> int:
        """Memory of both buffers."""
        return sum(snapshot.data.nbytes for snapshot in self._buffers)

    def of(self, moment: Moment) -> Snapshot | None:
        """The snapshot of exactly that."""
        return next((snapshot for snapshot in self._buffers if snapshot.of == moment), None)

    def begin(self) -> Snapshot | None:
        """A buffer to publish into, or None while both are read."""
        free = [snapshot for snapshot in self._buffers if snapshot.readers == 0]
        if not free:
            return None
        chosen = next((snapshot for snapshot in free if snapshot is not self._latest), free[0])
        chosen.of = None
        return chosen

    def publish(self, snapshot: Snapshot, moment: Moment, version: Version) -> None:
        """`snapshot` now holds `moment`, and whoever is given it is at `version` of the center."""
        snapshot.of, snapshot.version = moment, version
        self._latest = snapshot

    def validate(self) -> None:
        """Readers are counted."""
        assert all(snapshot.readers >= 0 for snapshot in self._buffers)
