"""Vectors on a device: updates are worked out, encoded and merged where the model is, and only bytes come and go.

    device   x, anchor, delta, memory ...    delta -> outbox, encoded       reply -> merge
    lane                                       | piece by piece               ^ as values
    host                                     landing (-> staging) -> sent   where the reply landed

Laws
* The bytes sent and the model after a merge are those of `HostVectors`, as far as a codec promises the same bytes.
* Nothing is sent before all of an update is encoded: what cannot be encoded is found on the device.
* The caller waits for no copy. A courier does, on a thread of its own: it has each piece sent once that is in host
  memory. Where only one thread may carry, as in virtual time, that one does it.
* The staging is not written to while the courier has a piece of an earlier push.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from common import chunks_on_device
from common.binding import Binding
from common.chunks import Plan
from common.codecs.base import F32, U8
from common.messages import Scalars, Version
from worker.driver import Carrier
from worker.events import Encoded, PushWanted
from worker.lanes import Arrival, Lane, lane_of
from worker.vectors import HostVectors, Vectors

PIECE_CHUNKS = 8
"""So many chunks are copied, and then sent, at once."""
log = logging.getLogger("paramserver.worker")


def vectors_of(binding: Binding, device: torch.device | None = None) -> Vectors:
    """Where a session's vectors are: on the CUDA device that all of the model lies on, else in host memory.

    device: have them there, wherever the model is.
    """
    if device is not None:
        return DeviceVectors(binding, lane_of(device))
    match binding.device:
        case None:
            log.info("the model lies on several devices: its updates are worked out in host memory")
        case torch.device(type="cuda"):
            log.info("updates are worked out on %s", binding.device)
            return DeviceVectors(binding, lane_of(binding.device))
        case torch.device(type=kind) if kind != "cpu":
            log.info("the model lies on a device of type %s: its updates are worked out in host memory", kind)
    return HostVectors(binding)


class DeviceVectors(Vectors):
    """torch's, on the device of a lane."""

    _staging: U8
    _landing: Tensor
    _outbox: Tensor

    def __init__(self, binding: Binding, lane: Lane) -> None:
        self._lane = lane
        super().__init__(binding)
        self._inbox: Tensor | None = self._zeros(self._elements)
        """Where the next reply goes."""
        self._landed: F32 | None = None
        """The memory that the last reply came in, and will go up from."""
        self._up: Arrival | None = None
        """The last way up."""
        self._courier = ThreadPoolExecutor(1, "paramserver-courier")
        self._errands: deque[Future[None]] = deque()

    def _zeros(self, length: int) -> Tensor:
        return torch.zeros(length, dtype=torch.float32, device=self._lane.device)

    def _stage(self, ups: Sequence[Mapping[str, Plan]], staging: U8) -> None:
        self._staging, self._landing = staging, self._lane.landing(staging)
        self._outbox = torch.zeros(len(staging), dtype=torch.uint8, device=self._lane.device)

    # Going up

    def _delta_of(self, up: Plan) -> Tensor:
        self._lane.join()
        delta: Tensor = self._scratch
        return delta

    def push(self, carrier: Carrier, up: Plan, scalars: Scalars, base: Version, fragment: int, key: int) -> None:
        """All of it is encoded, and on its way to host memory, when this returns."""
        self._run_errands()
        arrivals: list[tuple[int, slice, Arrival]] = []
        before = None if self.memory is None else self.memory.before
        with self._lane.aside():
            for first in range(0, len(up.chunks), PIECE_CHUNKS):
                end = min(first + PIECE_CHUNKS, len(up.chunks))
                piece = up.span(up.chunks[first].first, up.chunks[end - 1].last)
                chunks_on_device.encode(up, self._delta, self._outbox, piece.first, piece.last, key=key, before=before)
                part = slice(piece.offset, piece.offset + piece.size)
                arrivals.append((end, part, self._lane.copy(self._landing[part], self._outbox[part])))
            if self.memory is not None:
                self.memory.remember(self._delta, chunks_on_device.pieces(up, self._outbox))
            if self._rule.track is not None:
                chunks_on_device.decode(up, self._outbox, self._sent)
        spare = self._spare()
        carrier.post(PushWanted(self._staging[: up.bytes], up.codec, scalars, base, 0, spare, fragment))
        for arrival in arrivals:
            if carrier.on_any_thread:
                self._errands.append(self._courier.submit(self._carry, carrier, *arrival))
            else:
                self._carry(carrier, *arrival)

    def _carry(self, carrier: Carrier, chunks: int, part: slice, arrival: Arrival) -> None:
        """A piece, with which so many chunks are ready, is sent once it is there."""
        arrival.synchronize()
        landed = self._landing.numpy()[part]
        if landed.ctypes.data != self._staging[part].ctypes.data:
            self._staging[part] = landed
        carrier.post(Encoded(chunks))

    def _spare(self) -> F32 | None:
        """Memory for the next reply: nothing goes up from it any more."""
        self._wait_until_up()
        spare, self._landed = self._landed, None
        return spare

    def _wait_until_up(self) -> None:
        if self._up is not None:
            self._up.synchronize()

    def check(self) -> None:
        """Raise what the courier failed at."""
        while self._errands and self._errands[0].done():
            self._errands.popleft().result()

    def _run_errands(self) -> None:
        """Until the courier has nothing left to do."""
        while self._errands:
            self._errands.popleft().result()

    # Coming down

    def _taken(self, values: F32, first: int, last: int) -> Tensor:
        vector, self._inbox = self._inbox, None
        assert vector is not None, "for each vector that is taken, one is given away"
        self._wait_until_up()
        with self._lane.aside():
            self._up = self._lane.copy(vector[first:last], torch.from_numpy(values)[first:last])
        self._lane.join()
        self._landed = values if self._lane.reaches(values) else self._lane.host_vector(self._elements)
        return vector

    def _give_away(self, vector: Tensor) -> None:
        self._inbox = vector

    def _in_host_memory(self, vector: Tensor) -> F32:
        found: F32 = vector.cpu().numpy()
        return found

    def weights(self, exact: Plan) -> U8:
        """As ever; nothing is left of a push that was under way."""
        self._run_errands()
        return super().weights(exact)

    def settle(self, *, taken: bool) -> None:
        """As ever, after what was told aside."""
        self._lane.join()
        super().settle(taken=taken)

    def close(self) -> None:
        """Wait for the courier; others may have the memory."""
        self._courier.shutdown()
        self._wait_until_up()
        self._lane.join()
