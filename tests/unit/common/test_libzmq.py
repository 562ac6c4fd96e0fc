"""The calls around pyzmq: what a socket has, whatever signals come meanwhile."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import zmq

from common.transports.lending import lend, prepare
from common.transports.libzmq import Opening, Readable

PERIOD_S = 5e-5
STORM_S = 0.7
TIMEOUT_S = 20.0
SIZE = 100_000


@contextmanager
def signals() -> Iterator[Callable[[], bool]]:
    """Signals as fast as they are handled; whether they still come."""
    came, end = 0, time.monotonic() + STORM_S

    def handler(*_: object) -> None:
        nonlocal came
        came += 1

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, PERIOD_S, PERIOD_S)
    try:
        yield lambda: time.monotonic() < end
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert came > 100


@pytest.fixture
def router() -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context.instance().socket(zmq.ROUTER) as made:
        made.bind("tcp://127.0.0.1:*")
        yield made


def test_it_tells_whether_there_is_a_message(pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes]]) -> None:
    sender, receiver = pair
    readable = Readable(receiver)
    assert not readable()
    sender.send(b"x")
    deadline = time.monotonic() + TIMEOUT_S
    while not readable():
        assert time.monotonic() < deadline
    receiver.recv()
    assert not readable()


def test_of_a_closed_socket_it_says_no(pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes]]) -> None:
    sender, receiver = pair
    sender.send(b"x")
    readable = Readable(receiver)
    readable.closed = True
    receiver.close(linger=0)
    assert not readable()


def test_a_signal_does_not_end_a_look(pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes]]) -> None:
    """As those of a profiler, or of the processes that load data, may come at any moment."""
    readable = Readable(pair[1])
    with signals() as coming:
        while coming():
            assert not any(readable() for _ in range(100))


def test_it_takes_whom_a_message_is_from_and_nothing_where_there_is_none(router: zmq.Socket[bytes]) -> None:
    with zmq.Context.instance().socket(zmq.DEALER) as dealer:
        dealer.routing_id = b"n" * 255  # the longest that there is
        dealer.connect(router.last_endpoint)
        opening = Opening(router)
        assert opening() is None
        dealer.send_multipart([b"header", b"payload"])
        assert router.poll(TIMEOUT_S * 1000)
        assert opening() == b"n" * 255
        assert router.recv_multipart(zmq.NOBLOCK) == [b"header", b"payload"]
        assert opening() is None


def test_of_a_closed_socket_nothing_is_taken(router: zmq.Socket[bytes]) -> None:
    opening = Opening(router)
    router.close(linger=0)
    with pytest.raises(zmq.ZMQError):
        opening()


def test_a_signal_does_not_end_a_look_for_a_message(router: zmq.Socket[bytes]) -> None:
    opening = Opening(router)
    with signals() as coming:
        while coming():
            assert not any(opening() for _ in range(100))


def test_a_signal_does_not_end_a_loan(pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes]]) -> None:
    prepare()
    sender, receiver = pair
    payload = np.zeros(SIZE, np.uint8)
    with signals() as coming:
        while coming():
            for _ in range(100):
                lend(sender, payload.data)
                receiver.recv(copy=False)
