"""Ctrl-C waits until what must be whole is whole, and is never lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from worker.interrupts import Interrupts


@pytest.fixture(autouse=True)
def _handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_it_waits_and_comes_once() -> None:
    interrupts = Interrupts()
    interrupts.hold()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupts.release()
    interrupts.hold()
    interrupts.release()
    interrupts.end()


def test_outside_it_is_as_ever() -> None:
    interrupts = Interrupts()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    interrupts.hold()
    interrupts.release()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    interrupts.end()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_sets_another_handler_has_it() -> None:
    interrupts, came = Interrupts(), []
    signal.signal(signal.SIGINT, lambda *_: came.append(1))
    interrupts.hold()
    signal.raise_signal(signal.SIGINT)
    assert came == [1]
    interrupts.release()
    interrupts.end()
    signal.raise_signal(signal.SIGINT)
    assert came == [1, 1]


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_where_nothing_would_raise_nothing_is_changed(handler: signal.Handlers) -> None:
    signal.signal(signal.SIGINT, handler)
    interrupts = Interrupts()
    assert signal.getsignal(signal.SIGINT) is handler
    interrupts.hold()
    interrupts.release()
    interrupts.end()
    assert signal.getsignal(signal.SIGINT) is handler


def test_two_of_them_end_in_any_order() -> None:
    for first_ends_first in (True, False):
        first, second = Interrupts(), Interrupts()
        for one in (first, second) if first_ends_first else (second, first):
            one.end()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_another_thread_holds_nothing() -> None:
    interrupts = Interrupts()
    thread = threading.Thread(target=interrupts.hold)
    thread.start()
    thread.join()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    interrupts.end()
