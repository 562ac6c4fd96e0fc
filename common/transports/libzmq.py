"""The libzmq that pyzmq uses, for the few calls around which pyzmq puts more than they cost.

    library().zmq_msg_send(message, socket.underlying, flags)
    readable = Readable(socket);  readable()
    opening = Opening(router);    opening()

Its functions return at once, so nobody else need have the interpreter meanwhile. Why one failed, `ctypes.get_errno()`
tells; where it was a signal (EINTR), it is called again, as pyzmq does.
"""

from __future__ import annotations

import ctypes
import errno
import functools
from typing import Any

import zmq
from zmq.backend.cython import _zmq

_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)
_NOBLOCK = int(zmq.NOBLOCK)
NAME_BYTES = 255
"""Of a routing id, at most."""


@functools.cache
def library() -> Any:
    """Called with the interpreter's lock held."""
    made = ctypes.PyDLL(_zmq.__file__, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    made.zmq_msg_init_data.argtypes = (pointer, pointer, size, pointer, pointer)
    made.zmq_msg_send.argtypes = (pointer, pointer, number)
    made.zmq_msg_close.argtypes = (pointer,)
    made.zmq_getsockopt.argtypes = (pointer, number, pointer, pointer)
    made.zmq_recv.argtypes = (pointer, pointer, size, number)
    return made


class Opening:
    """Takes the first frame of the next message of a ROUTER, whom it is from; what follows it is there, too.

    pyzmq raises where there is none, which is how most looks end, and costs as much as a message.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._name = ctypes.create_string_buffer(NAME_BYTES)
        self._take = library().zmq_recv
        self._asked = socket.underlying, ctypes.addressof(self._name), NAME_BYTES, _NOBLOCK

    def __call__(self) -> bytes | None:
        """The peer, or None where nothing waits; raises ZMQError for anything else, and of a closed socket."""
        if self._socket.closed:
            raise zmq.ZMQError(errno.ENOTSOCK)
        while (size := self._take(*self._asked)) < 0:
            if (error := ctypes.get_errno()) == errno.EAGAIN:
                return None
            if error != errno.EINTR:
                raise zmq.ZMQError(error)
        return self._name.raw[:size]


class Readable:
    """Whether a socket has a message; of one that is closed, never. To be told before it is closed."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._value, self._size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
        self._ask = library().zmq_getsockopt
        self._asked = socket.underlying, _EVENTS, ctypes.addressof(self._value), ctypes.addressof(self._size)
        self.closed = False

    def __call__(self) -> bool:
        """Whether `receive` would find something now; raises ZMQError where the socket cannot tell."""
        if self.closed:
            return False
        while self._ask(*self._asked) != 0:
            if (error := ctypes.get_errno()) != errno.EINTR:
                raise zmq.ZMQError(error)
        return bool(self._value.value & _POLLIN)
