"""Published snapshots: the center of one version, encoded once, shared by all pulls of that version.

Laws
* A published snapshot never changes while anybody reads it.
* There are two buffers: one that is read, one that the next version is written to. A pull that needs a third waits
  until a reader is done; that is the bound on memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.buffers import zeros
from common.codecs.base import U8
from common.messages import NOWHERE, Version

BUFFERS = 2


@dataclass(slots=True, eq=False)
class Snapshot:
    """One buffer: the encoded center at `version`."""

    data: U8
    version: Version = NOWHERE
    readers: int = 0


class Snapshots:
    """The two buffers and which of them is current."""

    def __init__(self, reply_bytes: int) -> None:
        self._buffers = [Snapshot(zeros(reply_bytes, np.uint8)) for _ in range(BUFFERS)]
        self.current: Snapshot | None = None

    @property
    def bytes(self) -> int:
        """Memory of both buffers."""
        return sum(snapshot.data.nbytes for snapshot in self._buffers)

    def at(self, version: Version) -> Snapshot | None:
        """The current snapshot, if it is of exactly that version."""
        return self.current if self.current and self.current.version == version else None

    def begin(self) -> Snapshot | None:
        """A buffer to publish into, or None while both are read."""
        for snapshot in self._buffers:
            if snapshot.readers == 0:
                if snapshot is self.current:
                    self.current = None
                return snapshot
        return None

    def publish(self, snapshot: Snapshot, version: Version) -> None:
        """`snapshot` now holds `version`."""
        snapshot.version = version
        self.current = snapshot

    def validate(self) -> None:
        """Readers are counted."""
        assert all(snapshot.readers >= 0 for snapshot in self._buffers)
