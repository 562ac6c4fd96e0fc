"""A payload that is lent is read where it lies, stays until it was, and says when."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import zmq

from common.transports import lending
from common.transports.lending import lend

SIZE = 100_000
TIMEOUT_S = 20.0


def until(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not done():
        assert time.monotonic() < deadline, f"{what}: not within {TIMEOUT_S:g} s"
        time.sleep(0.001)


@pytest.mark.parametrize("writable", [True, False])
def test_it_is_returned_when_nobody_reads_it_any_more(
    pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes]], writable: bool
) -> None:
    sender, receiver = pair
    payload = np.arange(SIZE, dtype=np.uint8)
    payload.flags.writeable = writable
    loan = lend(sender, payload.data)
    assert not loan.returned
    frame = receiver.recv(copy=False)
    assert frame.bytes == payload.tobytes()
    assert np.shares_memory(np.frombuffer(frame.buffer, np.uint8), payload), "it was copied"
    assert not loan.returned
    del frame
    until(lambda: loan.returned, "the return")


def test_what_is_refused_is_not_lent() -> None:
    with zmq.Context() as context, context.socket(zmq.PUSH) as alone:
        payload = np.zeros(SIZE, np.uint8)
        seen = weakref.ref(payload)
        with pytest.raises(zmq.Again):
            lend(alone, payload.data)
        del payload
        gc.collect()
        assert seen() is None


def test_a_socket_of_another_kind_of_error_says_so() -> None:
    with zmq.Context() as context, context.socket(zmq.SUB) as deaf, pytest.raises(zmq.ZMQError, match="not supported"):
        lend(deaf, bytearray(SIZE))


def test_it_outlives_its_socket_for_as_long_as_it_may_be_read(
    pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes]],
) -> None:
    sender, receiver = pair
    payload = np.full(SIZE, 7, np.uint8)
    seen = weakref.ref(payload)
    loan = lend(sender, payload.data)
    frame = receiver.recv(copy=False)
    sender.close(linger=0)
    del loan, payload
    gc.collect()
    assert seen() is not None
    assert set(frame.bytes) == {7}
    del frame

    for _ in range(lending.SWEEP_LOANS + 1):
        with zmq.Context() as context, context.socket(zmq.PUSH) as alone, pytest.raises(zmq.Again):
            lend(alone, b"x")
    assert seen() is None


def test_what_may_still_be_read_outlives_the_interpreter() -> None:
    """ZeroMQ's threads end after it."""
    script = """
import os, zmq
from common.transports.lending import lend

class Payload(bytearray):
    def __del__(self, write=os.write):
        write(1, b"freed")

context = zmq.Context.instance()
sender, receiver = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
sender.bind("inproc://exit")
receiver.connect("inproc://exit")
lend(sender, memoryview(Payload(100_000)))
os.write(1, b"lent ")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=True)
    assert done.stdout == b"lent "
