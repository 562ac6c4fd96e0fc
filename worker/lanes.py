"""How work on a device keeps its order, and how bytes come and go while training goes on.

    with lane.aside(): ...      on the device, after all that it was told so far, and beside what it is told meanwhile
    lane.join()                 what it is told from here on comes after all that was told aside
    lane.copy(target, source)   between device and host memory, told aside; returns what to wait for

    lane_of(device)
    CudaLane    a stream of its own beside the one that trains; host memory is pinned, so that copies need no processor
    CpuLane     torch's CPU device: everything is done when it was told. There to be tested, and to test with

Laws
* Every call to CUDA that is about order, or about memory of the host, is here.
* Tensors that are made aside are used aside; what is used on both sides lives as long as the lane, and whoever lets it
  go has joined before. So torch's allocator has nothing to be told (`record_stream`).
* Only the thread that trains says `aside` and `join`; any may wait for what `copy` returned.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from common.buffers import zeros
from common.codecs.base import F32, U8
from common.errors import UsageError

log = logging.getLogger("paramserver.worker")


def lane_of(device: torch.device) -> Lane:
    """Raises UsageError for a device of another type."""
    match device.type:
        case "cuda":
            return CudaLane(device)
        case "cpu":
            return CpuLane(device)
    raise UsageError(f"There is no lane to a device of type {device.type}.", fix="Use one of type cuda or cpu.")


class Arrival(Protocol):
    """A copy that was told."""

    def synchronize(self) -> None:
        """Wait until it is done."""


class Lane(ABC):
    """To and from one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @abstractmethod
    def aside(self) -> AbstractContextManager[None]:
        """What is told inside comes after all that was told before, and holds up nothing that is told after."""

    @abstractmethod
    def join(self) -> None:
        """What is told from here on comes after all that was told aside; nothing waits here."""

    @abstractmethod
    def copy(self, target: Tensor, source: Tensor) -> Arrival:
        """target <- source, told aside. The one in host memory must stay as it is until the copy has arrived."""

    @abstractmethod
    def landing(self, memory: U8) -> Tensor:
        """Host memory, (bytes,) uint8, that copies from the device reach fast: `memory` itself where that can be."""

    @abstractmethod
    def reaches(self, vector: F32) -> bool:
        """Whether copies from there are as fast as from memory of `host_vector`."""

    @abstractmethod
    def host_vector(self, length: int) -> F32:
        """(length,) of host memory that copies to the device are fast from."""


class CudaLane(Lane):
    """A stream beside the one that the caller trains on."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._side = torch.cuda.Stream(device)

    @contextmanager
    def aside(self) -> Iterator[None]:
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            yield

    def join(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self._side)

    def copy(self, target: Tensor, source: Tensor) -> Arrival:
        target.copy_(source, non_blocking=True)
        arrival = torch.cuda.Event()
        arrival.record(self._side)
        return arrival

    def landing(self, memory: U8) -> Tensor:
        """Where `memory` cannot be pinned, other memory of its size."""
        with torch.cuda.device(self.device):
            if _pin(memory):
                return torch.from_numpy(memory)
            log.info("%.1f MiB of memory cannot be pinned: updates take one copy more", memory.nbytes / 2**20)
            return torch.zeros(memory.size, dtype=torch.uint8, device="cpu", pin_memory=True)

    def reaches(self, vector: F32) -> bool:
        return torch.from_numpy(vector).is_pinned()

    def host_vector(self, length: int) -> F32:
        with torch.cuda.device(self.device):
            found: F32 = torch.zeros(length, dtype=torch.float32, device="cpu", pin_memory=True).numpy()
        return found


class CpuLane(Lane):
    """No device at all, in the same words."""

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def join(self) -> None:
        return

    def copy(self, target: Tensor, source: Tensor) -> Arrival:
        target.copy_(source)
        return _Arrived()

    def landing(self, memory: U8) -> Tensor:
        return torch.from_numpy(memory)

    def reaches(self, vector: F32) -> bool:
        return True

    def host_vector(self, length: int) -> F32:
        return zeros(length, np.float32)


class _Arrived:
    def synchronize(self) -> None:
        return


def _pin(memory: U8) -> bool:
    """Have memory that torch did not make, such as memory shared with the server, pinned until it is gone."""
    cuda: Any = torch.cuda.cudart()
    if int(cuda.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)) == 0:
        weakref.finalize(memory, cuda.cudaHostUnregister, memory.ctypes.data).atexit = False
        return True
    with contextlib.suppress(RuntimeError):  # CUDA repeats a refusal to whoever asks next whether all is well
        torch.zeros(1, device="cuda")
    return False
