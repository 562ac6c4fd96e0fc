"""Looking at a server without being a member of it: its status, and the center as it is now.

status("tcp://host:5555")                  what is going on, as plain values
with Observer(address, model) as observer: observer.fetch() loads the center into the model
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch

from common import LIBRARY
from common.binding import Binding, layout_of
from common.errors import NetworkError, Refused
from common.messages import Version
from worker import events
from worker.core import WorkerCore
from worker.driver import Machine
from worker.events import PullWanted


class Observer:
    """Pulls the center of a server into a model; never pushes and is no member."""

    def __init__(
        self, address: str, model: torch.nn.Module, *, name: str = "observer", machine: Machine | None = None
    ) -> None:
        machine = machine or Machine.this()
        self._now = machine.now
        self._address = address
        self._layout = layout_of(model)
        self._binding = Binding(model, self._layout)
        self._core = WorkerCore(
            name=name,
            instance=machine.instance,
            library=LIBRARY,
            layout=self._layout,
            optimizer=None,
            role="observer",
        )
        self._driver = machine.carry(self._core, address)
        self._left = False
        self.finished = False

    def fetch(self, timeout_s: float = 30.0) -> Version:
        """The model <- the center as it is now; returns its version.

        Waits until the server has weights. Raises NetworkError where it has none to send within `timeout_s`, Refused
        where the model is not the server's.
        """
        self._driver.post(PullWanted("evaluate"))
        deadline = self._now() + timeout_s
        while (left := deadline - self._now()) > 0:
            match self._driver.news(left):
                case events.Fetched(base=version, values=values):
                    self._binding.scatter(values)
                    return version
                case events.Finished():
                    self.finished = True
                case events.Failed(error):
                    self._left = True
                    raise Refused(error.code, error.sentence, fix=error.fix)
                case events.Left():
                    self._left = True
                    raise NetworkError(f"{self._address} ended the observer's session.", fix="Observe it again.")
        raise NetworkError(
            f"{self._address} sent no center within {timeout_s:g} s.", fix="Is it running, and has it weights?"
        )

    def close(self) -> None:
        """Say Bye. A second call does nothing."""
        if not self._left:
            self._left = True
            self._driver.post(events.Leave("has seen enough"))
            self._driver.close(2.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
