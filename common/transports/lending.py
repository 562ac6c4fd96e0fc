"""Payloads that ZeroMQ reads where they lie, and says when it has; without a thread that has to be woken for that.

    prepare()                           ahead of time, for whoever must not wait when it sends
    loan = lend(socket, payload)        as the last part of a message
    loan.returned                       whether it was read, or never will be

pyzmq lends, too; but what it has ZeroMQ call in the end wakes a thread of Python, which waits for the interpreter's
lock and takes it from others: once a message. Here that is a compiled function, which sets a flag.

Laws
* A payload stays where it is, and its flag too, until it is returned, whatever becomes of the loan, of the endpoint and
  of the interpreter: ZeroMQ's threads outlive them all.
* Nobody changes a payload before.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import itertools
from typing import Any

import numpy as np
import zmq

from common.kernels import callback
from common.messages import Buffer
from common.transports.libzmq import library

SWEEP_LOANS = 256
"""Each time so many were lent it is looked which of all were returned."""
_NOBLOCK = int(zmq.NOBLOCK)
_Message: Any = ctypes.c_int64 * 8
"""zmq_msg_t, of which libzmq tells no more than that it has 64 bytes."""


class Loan:
    """One payload, from when it was handed to ZeroMQ on."""

    __slots__ = ("_payload", "_set", "flag")

    def __init__(self, payload: Buffer) -> None:
        self._payload = payload
        self._set = ctypes.c_int64(0)
        self.flag = ctypes.addressof(self._set)
        """Address of what is set in the end."""

    @property
    def returned(self) -> bool:
        """Whether nobody reads it any more; it is not kept from then on."""
        if self._set.value == 0:
            return False
        _kept.pop(self.flag, None)
        return True


def prepare() -> None:
    """Compile, or load, what ZeroMQ calls."""
    _returned()


def lend(socket: zmq.Socket[bytes], payload: Buffer) -> Loan:
    """Send it, as the last part of a message, without waiting; raises what sending raises, and then nothing is lent."""
    zeromq, loan, message = library(), Loan(payload), _Message()
    _keep(loan)
    if zeromq.zmq_msg_init_data(message, _address(payload), len(payload), _returned(), loan.flag) != 0:
        del _kept[loan.flag]
        raise zmq.ZMQError(ctypes.get_errno())
    while zeromq.zmq_msg_send(message, socket.underlying, _NOBLOCK) < 0:
        if (error := ctypes.get_errno()) == errno.EINTR:
            continue
        zeromq.zmq_msg_close(message)
        del _kept[loan.flag]
        raise zmq.Again() if error == errno.EAGAIN else zmq.ZMQError(error)
    return loan


_kept: dict[int, Loan] = {}
"""By their flags: whatever is not known to be returned."""
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_kept))  # it is never freed, so nothing in it is when the interpreter ends
_lent = itertools.count()


def _keep(loan: Loan) -> None:
    if next(_lent) % SWEEP_LOANS == 0:
        for other in list(_kept.values()):
            _ = other.returned  # of those nobody asks for any more
    _kept[loan.flag] = loan


def _address(payload: Buffer) -> int:
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(payload))
    except TypeError:  # it cannot be written to
        return int(np.frombuffer(payload, np.uint8).ctypes.data)


@functools.cache
def _returned() -> int:
    """Address of what ZeroMQ calls, on a thread of its own: free(payload, flag)."""

    def free(payload: Any, flag: Any) -> None:
        flag[0] = 1

    return callback(free, "void(voidptr, CPointer(int64))")
