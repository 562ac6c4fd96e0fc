"""Processes that are forked: they share what was prepared, end as is said, and are never left behind."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import ParamserverError
from deploy import nursery
from deploy.nursery import Family
from tests.processes import until


class Member:
    """One member, and the line to it."""

    def __init__(self, family: Family) -> None:
        self.line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.number = family.fork(theirs.fileno())

    def ask(self, order: str) -> list[str]:
        """What it answers; nothing where it does not live any more."""
        self.line.send(order.encode())
        return self.line.recv(1000).decode().split()


@pytest.fixture
def family() -> Iterator[Family]:
    made = nursery.family("tests.members:prepare", word="hello")
    made.wait()
    yield made
    made.close()


def test_members_share_what_was_prepared_and_nothing_else(family: Family) -> None:
    one, two = (Member(family) for _ in range(2))
    (word, pid, parent), (same, other, alike) = one.ask("say"), two.ask("say")
    assert word == same == "['hello']"
    assert pid != other
    assert parent == alike != str(os.getpid())
    for member in (one, two):
        member.line.close()
        assert family.reap(member.number) == "ended with exit status 0"


@pytest.mark.parametrize(
    ("order", "end"),
    [("exit", "ended with exit status 7"), ("crash", "was ended by SIGSEGV"), ("raise", "ended with exit status 1")],
)
def test_how_a_member_ended_is_said_and_the_next_one_lives(family: Family, order: str, end: str) -> None:
    with Member(family).line, (first := Member(family)).line:
        assert first.ask(order) == []
        assert family.reap(first.number) == end
        assert family.reap(first.number) == "could not be started", "its number is forgotten"
    with (second := Member(family)).line:
        assert second.ask("say")


def test_a_member_that_is_killed_is_gone_and_so_are_all_with_their_family() -> None:
    family = nursery.family("tests.members:prepare", word="")
    family.wait()
    one, two = (Member(family) for _ in range(2))
    pids = [int(member.ask("say")[1]) for member in (one, two)]
    parent = int(two.ask("say")[2])
    family.kill(one.number)
    family.kill(one.number)
    assert one.line.recv(100) == b""
    until(lambda: not Path(f"/proc/{pids[0]}").exists(), "the first")
    family.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in (*pids, parent))
    assert two.line.recv(100) == b""
    for member in (one, two):
        member.line.close()


def test_a_family_that_cannot_be_prepared_is_told() -> None:
    family = nursery.family("tests.members:refuse")
    with pytest.raises(ParamserverError, match="before it was prepared"):
        family.wait()
    family.close()
