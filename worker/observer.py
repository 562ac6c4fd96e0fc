"""Looking at a server without being a member of it: its status, and the center as it is now.

status("tcp://host:5555")                  what is going on, as plain values
with Observer(address, model) as observer: observer.fetch() loads the center into the model
"""

from __future__ import annotations

import json
import os
import secrets
import time
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from common import transports, wire
from common.buffers import zeros
from common.errors import NetworkError, Refused
from common.layout import Binding, Layout
from common.messages import Answer, Fault, Query, Version
from common.transports.base import SERVER
from worker import core
from worker.core import PullWanted, WorkerCore
from worker.driver import Driver
from worker.trainer import LIBRARY


def status(address: str, timeout_s: float = 5.0) -> dict[str, Any]:
    """What is going on at the server, as plain values; raises NetworkError where nobody answers in time."""
    endpoint = transports.dial(address)
    never = os.eventfd(0)
    try:
        endpoint.send(SERVER, wire.encode(Query()))
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            endpoint.wait(left, also=never)
            while (received := endpoint.receive()) is not None:
                match wire.decode(received[1]):
                    case Answer(payload=payload):
                        answer: dict[str, Any] = json.loads(bytes(payload))
                        return answer
                    case Fault() as fault:
                        raise Refused(core.code_of(fault.code), fault.sentence, fix=fault.fix)
    finally:
        endpoint.close()
        os.close(never)
    raise NetworkError(f"Nothing answers at {address} within {timeout_s:g} s.", fix="Is the server running there?")


class Observer:
    """Pulls the center of a server into a model; never pushes and is no member."""

    def __init__(self, address: str, model: torch.nn.Module, *, name: str = "observer") -> None:
        self._address = address
        self._layout = Layout.of(model)
        self._binding = Binding(model, self._layout)
        self._flat = zeros(self._layout.elements, np.float32)
        self._core = WorkerCore(
            name=name,
            instance=secrets.token_hex(8),
            library=LIBRARY,
            layout=self._layout,
            optimizer=None,
            role="observer",
        )
        self._driver = Driver(self._core, address)
        self._left = False
        self.finished = False

    def fetch(self, timeout_s: float = 30.0) -> Version:
        """The model <- the center as it is now; returns its version.

        Waits until the server has weights. Raises NetworkError where it has none to send within `timeout_s`, Refused
        where the model is not the server's.
        """
        self._driver.post(PullWanted("evaluate"))
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            match self._driver.news(left):
                case core.Fetched(base=version, data=data):
                    self._core.plan(str(self._settings("reply_codec"))).open(data, self._flat)
                    self._binding.scatter(self._flat)
                    return version
                case core.Finished():
                    self.finished = True
                case core.Failed(error):
                    self._left = True
                    raise Refused(error.code, error.sentence, fix=error.fix)
                case core.Left():
                    self._left = True
                    raise NetworkError(f"{self._address} ended the observer's session.", fix="Observe it again.")
        raise NetworkError(
            f"{self._address} sent no center within {timeout_s:g} s.", fix="Is it running, and has it weights?"
        )

    def close(self) -> None:
        """Say Bye. A second call does nothing."""
        if not self._left:
            self._left = True
            self._driver.post(core.Leave("has seen enough"))
            self._driver.close(2.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _settings(self, name: str) -> object:
        welcome = self._core.membership.welcome
        assert welcome is not None
        return welcome.settings[name]
