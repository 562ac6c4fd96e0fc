"""Asking a server what is going on; needs no session, no model and no torch.

status("tcp://host:5555")
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from common import transports, wire
from common.errors import NetworkError, Refused, code_of
from common.messages import Answer, Fault, Query
from common.transports.base import SERVER


def status(address: str, timeout_s: float = 5.0) -> dict[str, Any]:
    """What is going on at the server, as plain values; raises NetworkError where nobody answers in time."""
    endpoint = transports.dial(address)
    never = os.eventfd(0)
    try:
        endpoint.send(SERVER, wire.encode(Query()))
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            while (received := endpoint.receive()) is not None:
                match wire.decode(received[1]):
                    case Answer(payload=payload):
                        answer: dict[str, Any] = json.loads(bytes(payload))
                        return answer
                    case Fault() as fault:
                        raise Refused(code_of(fault.code), fault.sentence, fix=fault.fix)
            endpoint.wait(left, also=never)
    finally:
        endpoint.close()
        os.close(never)
    raise NetworkError(f"Nothing answers at {address} within {timeout_s:g} s.", fix="Is the server running there?")
