"""The libzmq that pyzmq uses, for the few calls around which pyzmq puts more than they cost.

    library().zmq_msg_send(message, socket.underlying, flags)
    readable = Readable(socket);  readable()

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


@functools.cache
def library() -> Any:
    """Called with the interpreter's lock held."""
    made = ctypes.PyDLL(_zmq.__file__, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    made.zmq_msg_init_data.argtypes = (pointer, pointer, size, pointer, pointer)
    made.zmq_msg_send.argtypes = (pointer, pointer, number)
    made.zmq_msg_close.argtypes = (pointer,)
    made.zmq_getsockopt.argtypes = (pointer, number, pointer, pointer)
    return made


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
