"""The worker's core against a server that is played by hand: what it says when, and what the trainer is told.

The other half of these laws, both cores together under faults, is `tests/simulation`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common import wire
from common.layout import Layout
from common.messages import (
    Ack,
    Beat,
    Begin,
    Bye,
    Chunk,
    Commit,
    Fault,
    Grant,
    Hello,
    Message,
    More,
    Offer,
    Place,
    Pull,
    Push,
    Reply,
    Resume,
    Scalars,
    Share,
    Shared,
    Version,
    Welcome,
)
from common.node import Received, Send, Tick
from common.transports.base import SERVER
from tests.cluster import LARGE, SMALL
from worker import events
from worker.core import WorkerCore

LONGEST_BYTES = 1 << 24
SETTINGS = {"rule": "downpour", "codec": "fp32", "reply_codec": "fp32", "local_steps": 1, "overlap": False}
SETTINGS |= {
    "schedules": False,
    "fragments": 1,
    "buffers": "average",
    "lease_s": 30.0,
    "window_chunks": 2,
    "finished": False,
    "machine": "here",
}
SCALARS = Scalars(0.5, 8, 1, 0.1)
SILENCE_S = 15.0
FIRST = Version(1, 0)
"""The center as it was supplied."""
BOTH = pytest.mark.parametrize("layout", [SMALL, LARGE], ids=["small", "large"])


class Bench:
    """One core; `told` is what it said to the server, `news` what it said to the trainer, both since the last look."""

    def __init__(self, layout: Layout = SMALL, role: Any = "worker") -> None:
        self.layout = layout
        self.core = WorkerCore(name="w", instance="i", library="test", layout=layout, optimizer=None, role=role)
        self.now = 50.0
        self.redials = 0
        self.attaches: list[Place] = []
        """Memory that it wants attached; whether it can be, the test says."""
        self._told: list[Message] = []
        self._news: list[Any] = []
        self.does(events.Dialled())

    def does(self, event: Any) -> None:
        actions = self.core.handle(event, self.now)
        self.core.validate()
        for action in actions:
            match action:
                case Send(_, frames):
                    self._told.append(wire.decode([bytes(frame) for frame in frames], payload_bytes=LONGEST_BYTES))
                case events.Redial():
                    self.redials += 1
                    self.does(events.Dialled())
                case events.Attach(place):
                    self.attaches.append(place)
                case events.Deliver(news):
                    self._news.append(news)

    def hears(self, *messages: Message) -> None:
        for message in messages:
            self.does(Received(SERVER, [bytes(frame) for frame in wire.encode(message)]))

    def ends_in(self, message: Any, payload: Any) -> None:
        """A message whose payload is what a pointer pointed at; nothing, where that was nowhere."""
        self.does(Received(SERVER, [bytes(wire.encode(replace(message, payload=b""))[0]), payload]))

    def told(self, kind: Any = object) -> list[Any]:
        told, self._told = self._told, []
        return [message for message in told if isinstance(message, kind)]

    def news(self, kind: Any = object) -> list[Any]:
        news, self._news = self._news, []
        return [one for one in news if isinstance(one, kind)]

    def wait(self, seconds: float, *, echo: bool = False) -> None:
        """Let time pass with Ticks; with `echo` the server answers each beat, and nothing else."""
        end = self.now + seconds
        while (deadline := self.core.deadline()) is not None and deadline <= end:
            self.now = max(deadline, self.now) + 1e-6
            before = len(self._told)
            self.does(Tick())
            if echo:
                self.hears(*(m for m in self._told[before:] if isinstance(m, Beat)))
        self.now = end

    def welcome(self, **changes: Any) -> Welcome:
        values: dict[str, Any] = {"session": "s", "connection": 1, "worker": "w", "version": Version(1, 0)}
        values |= {"settings": SETTINGS, "rule_settings": {}, "init": "have", "resumed": "new", "last_decided": 0}
        return Welcome(**(values | {"outcome": "none", "lost": ()} | changes))

    def reply(self, version: Version, number: int = 1) -> tuple[Reply, bytes]:
        plan = self.core.plan("fp32")
        data = np.zeros(plan.bytes, np.uint8)
        plan.encode(np.full(self.layout.elements, float(version.version), np.float32), data)
        return Reply(number, plan.bytes, "fp32", version), data.tobytes()

    def down(self, announce: Any, version: Version, reply_id: int, connection: int = 1) -> None:
        """An Ack or Offer with its reply, in one piece or in chunks."""
        reply, data = self.reply(version, reply_id)
        plan = self.core.plan("fp32")
        if len(plan.chunks) == 1:
            self.hears(announce(reply, data))
            return
        self.hears(announce(reply, b""))
        for index, chunk in enumerate(plan.chunks):
            piece = data[chunk.offset : chunk.offset + chunk.size]
            self.hears(Chunk("s", connection, reply_id, index, piece))

    def anchor(self, version: Version = FIRST, connection: int = 1) -> None:
        """The server's answer to a pull."""
        self.down(
            lambda reply, data: Offer("s", connection, "anchor", "", reply, False, data), version, 100, connection
        )

    def ack(self, number: int, version: Version, connection: int = 1, outcome: Any = "applied", code: str = "") -> None:
        def announce(reply: Reply | None, data: bytes) -> Ack:
            return Ack("s", connection, number, outcome, code, "", version, Version(1, 0), 1.0, False, 1, reply, data)

        if outcome == "applied":
            self.down(announce, version, 200 + number, connection)
        else:
            self.hears(announce(None, b""))

    def pushes(self, base: Version = FIRST, ready: int | None = None, spare: Any = None) -> None:
        plan = self.core.plan("fp32")
        data = np.zeros(plan.bytes, np.uint8)
        self.does(
            events.PushWanted(data, plan.codec, SCALARS, base, len(plan.chunks) if ready is None else ready, spare)
        )


def joined(layout: Layout = SMALL) -> Bench:
    bench = Bench(layout)
    bench.hears(bench.welcome())
    bench.anchor()
    bench.told()
    bench.news()
    return bench


# Joining


@BOTH
def test_joining_a_server_that_has_weights(layout: Layout) -> None:
    bench = Bench(layout)
    [hello] = bench.told()
    assert isinstance(hello, Hello)
    assert hello.resume is None
    assert bytes(hello.payload) == layout.describe()
    bench.hears(bench.welcome())
    assert [type(one) for one in bench.news()] == [events.Joined]
    [pull] = bench.told()
    assert (pull.purpose, pull.session, pull.connection) == ("anchor", "s", 1)
    bench.anchor(Version(1, 7))
    [fetched] = bench.news()
    assert (fetched.purpose, fetched.base) == ("anchor", (1, 7))
    assert bench.core.phase == "joined"


@BOTH
def test_supplying_the_first_weights(layout: Layout) -> None:
    bench = Bench(layout)
    bench.hears(bench.welcome(init="wait"))
    bench.hears(bench.welcome(init="send"))
    assert bench.news(events.NeedWeights)
    plan = bench.core.plan("fp32")
    bench.told()
    bench.does(events.InitialWeights(np.zeros(plan.bytes, np.uint8)))
    if layout is LARGE:
        [begin] = bench.told()
        assert (begin.kind, begin.number, begin.bytes) == ("init", 0, plan.bytes)
        bench.hears(Grant("s", 1, 0, "go", 2, "", ""))
        assert [m.index for m in bench.told(Chunk)] == [0, 1]
        bench.hears(More("s", 1, 0, 4))
        *chunks, commit = bench.told()
        assert [m.index for m in chunks] == [2]
        assert isinstance(commit, Commit)
    else:
        [push] = bench.told()
        assert push.begin.kind == "init"
    bench.hears(Ack("s", 1, 0, "applied", "", "", Version(1, 0), Version(0, 0), 1.0, False, 1))
    assert [m.purpose for m in bench.told(Pull)] == ["anchor"]


@BOTH
def test_weights_of_another_are_adopted_also_in_the_middle_of_sending(layout: Layout) -> None:
    """It was too slow, and somebody else was asked."""
    bench = Bench(layout)
    bench.hears(bench.welcome(init="send"))
    bench.does(events.InitialWeights(np.zeros(bench.core.plan("fp32").bytes, np.uint8)))
    bench.hears(bench.welcome(init="have", version=Version(1, 0)))
    bench.anchor()
    assert bench.news(events.Fetched)
    bench.told()
    bench.pushes()
    for message in bench.told():
        begin = message.begin if isinstance(message, Push) else message
        assert begin.kind == "push", "the weights are no longer wanted"


def test_welcome_may_be_too_slow_and_then_another_is_asked_for() -> None:
    bench = Bench()
    times = []
    for _ in range(8):
        before, now = bench.redials, bench.now
        while bench.redials == before:
            bench.wait(0.01)
        times.append(round(bench.now - now, 1))
    assert times[0] <= 0.6
    assert max(times) <= 5.1
    assert times == sorted(times), "more patient each time"


def test_older_news_about_weights_does_not_undo_newer() -> None:
    bench = joined()
    bench.hears(bench.welcome(init="wait"))
    bench.pushes()
    assert bench.told((Push, Begin))


@pytest.mark.parametrize("init", ["wait", "send"])
def test_older_news_about_weights_does_not_undo_that_they_were_taken(init: str) -> None:
    """The Ack of the initial weights says that they are there, before any Welcome does."""
    bench = Bench()
    bench.hears(bench.welcome(init="send"))
    bench.does(events.InitialWeights(np.zeros(bench.core.plan("fp32").bytes, np.uint8)))
    bench.hears(Ack("s", 1, 0, "applied", "", "", Version(1, 0), Version(0, 0), 1.0, False, 1))
    bench.anchor()
    bench.told()
    bench.news()
    bench.hears(bench.welcome(init="wait"), bench.welcome(init=init))
    assert not bench.news()
    bench.pushes()
    assert bench.told((Push, Begin))


@pytest.mark.parametrize("code", ["layout_mismatch", "full", "unknown_codec", "optimizer", "of the future"])
def test_refusal_at_the_door_is_final_and_told(code: str) -> None:
    bench = Bench()
    bench.hears(Fault("", 0, code, "No.", "Do that.", 0))
    [failed] = bench.news(events.Failed)
    assert failed.error.sentence == "No."
    assert failed.error.fix == "Do that."
    assert bench.core.deadline() is None


def test_server_of_another_protocol_is_final() -> None:
    bench = Bench()
    bench.does(Received(SERVER, [b"\x82\xa8protocol\x63\xa4type\xa5fault"]))
    [failed] = bench.news(events.Failed)
    assert failed.error.code == "protocol_version"


# Pushing


@BOTH
def test_push_is_sent_once_and_settled_once(layout: Layout) -> None:
    bench = joined(layout)
    for number in (1, 2, 3):
        bench.pushes(Version(1, number - 1))
        told = bench.told((Push, Begin, Chunk, Commit))
        begin = told[0].begin if layout is SMALL else told[0]
        assert (begin.kind, begin.number, begin.base) == ("push", number, (1, number - 1))
        if layout is LARGE:
            assert len(told) == 1, "nothing moves before the Grant"
            bench.hears(Grant("s", 1, number, "wait", 0, "busy", ""))
            assert not bench.told()
            bench.hears(Grant("s", 1, number, "go", 2, "", ""), More("s", 1, number, 9))
            assert [type(m) for m in bench.told()] == [Chunk, Chunk, Chunk, Commit]
        bench.ack(number, Version(1, number))
        [settled] = bench.news()
        assert (settled.number, settled.outcome, settled.base) == (number, "applied", (1, number))
        bench.ack(number, Version(1, number))
        assert not bench.news(), "once"


def test_windows_and_grants_that_repeat_change_nothing() -> None:
    bench = joined(LARGE)
    bench.pushes()
    bench.told()
    for _ in range(3):
        bench.hears(Grant("s", 1, 1, "go", 2, "", ""), More("s", 1, 1, 1))
    assert [m.index for m in bench.told(Chunk)] == [0, 1]
    bench.hears(More("s", 1, 1, 3), More("s", 1, 1, 3))
    assert [type(m) for m in bench.told()] == [Chunk, Commit]


@BOTH
@pytest.mark.parametrize("doubt", ["link", "silence", "stale", "nonsense", "server refuses"])
def test_whatever_raises_doubt_the_worker_comes_back_and_repeats_its_push(layout: Layout, doubt: str) -> None:
    bench = joined(layout)
    bench.pushes()
    bench.told()
    match doubt:
        case "link":
            bench.does(events.LinkLost())
        case "silence":
            bench.wait(SILENCE_S + 0.1)
        case "stale":
            bench.hears(Fault("", 0, "stale", "Unknown.", "Say Hello again.", 0))
        case "nonsense":
            bench.does(Received(SERVER, [b"\xc1"]))
        case "server refuses":
            bench.hears(Fault("s", 1, "unexpected", "No.", "", 0))
    bench.wait(1.1)
    assert bench.redials >= 1
    assert [type(one) for one in bench.news()] == [events.Away]
    hello = bench.told(Hello)[-1]
    assert hello.resume == Resume("s", 1, 0, 100)
    bench.hears(bench.welcome(connection=2, resumed="live"))
    assert [type(one) for one in bench.news()] == [events.Back]
    [again] = bench.told((Push, Begin))
    assert (again.begin if layout is SMALL else again).number == 1
    bench.hears(Grant("s", 2, 1, "go", 9, "", ""))
    bench.ack(1, Version(1, 1), connection=1)
    assert not bench.news(), "of the old connection"
    bench.ack(1, Version(1, 1), connection=2)
    [settled] = bench.news()
    assert (settled.number, settled.outcome) == (1, "applied")


def test_lost_ack_is_noticed_although_the_server_answers_beats() -> None:
    """A transport may fail to deliver a message and go on: whoever waits for an answer in vain must ask again."""
    bench = joined()
    bench.pushes()
    bench.wait(2 * SILENCE_S, echo=True)
    assert bench.redials, "waited for ever"


def test_lost_pull_is_noticed_although_the_server_answers_beats() -> None:
    bench = Bench()
    bench.hears(bench.welcome())
    bench.wait(2 * SILENCE_S, echo=True)
    assert bench.redials, "waited for ever"


def test_lost_word_that_the_weights_are_there_is_noticed_although_the_server_answers_beats() -> None:
    bench = Bench()
    bench.hears(bench.welcome(init="wait"))
    bench.wait(2 * SILENCE_S, echo=True)
    assert bench.redials, "waited for ever"


def test_who_waits_for_nothing_has_no_doubt() -> None:
    bench = joined()
    bench.wait(20 * SILENCE_S, echo=True)
    assert not bench.redials
    assert not bench.news()


@pytest.mark.parametrize(
    ("resumed", "decided", "pushed"), [("new", 0, True), ("record", 0, False), ("record", 1, True), ("record", 5, True)]
)
def test_push_of_a_session_that_is_gone_is_taken_back_only_if_it_was_never_applied(
    resumed: str, decided: int, pushed: bool
) -> None:
    bench = joined()
    bench.pushes()
    bench.does(events.LinkLost())
    bench.news()
    bench.told()
    token = "s" if resumed == "record" else "another"
    bench.hears(bench.welcome(session=token, connection=2, resumed=resumed, last_decided=decided, outcome="applied"))
    [orphaned] = bench.news(events.Orphaned)
    assert (orphaned.number, orphaned.pushed) == (1, pushed)
    assert [type(m) for m in bench.told()] == [Pull], "a new anchor first, and never the old push"
    assert not bench.news()


def test_push_that_is_not_encoded_was_never_sent_and_is_taken_back() -> None:
    """On a device all of it is encoded before any is sent; meanwhile the session may be lost."""
    bench = joined()
    bench.pushes(ready=0)
    assert not bench.told()
    bench.does(events.LinkLost())
    bench.news()
    bench.hears(bench.welcome(session="another", connection=2, resumed="new"))
    assert [(o.number, o.pushed) for o in bench.news(events.Orphaned)] == [(1, False)]


@pytest.mark.parametrize("layout", [SMALL, LARGE], ids=["whole", "chunks"])
def test_what_is_encoded_between_two_connections_is_sent_on_the_second(layout: Layout) -> None:
    """Sent before Welcome it would be of the first, and answered by a Fault that ends the second."""
    bench = joined(layout)
    chunks = len(bench.core.plan("fp32").chunks)
    bench.pushes(ready=0)
    if chunks > 1:
        bench.hears(Grant("s", 1, 1, "go", chunks, "", ""))
    bench.does(events.LinkLost())
    bench.told()
    bench.does(events.Encoded(chunks))
    assert not bench.told()
    bench.hears(bench.welcome(connection=2, resumed="live"))
    if chunks > 1:
        bench.hears(Grant("s", 2, 1, "go", chunks, "", ""))
    said = [type(message) for message in bench.told((Push, Begin, Chunk, Commit))]
    assert said == ([Push] if chunks == 1 else [Begin, *[Chunk] * chunks, Commit])


def test_numbers_go_on_in_a_session_and_start_anew_in_a_new_one() -> None:
    for resumed, token, expected in (("record", "s", 2), ("new", "other", 1)):
        bench = joined()
        bench.pushes()
        bench.ack(1, Version(1, 1))
        bench.does(events.LinkLost())
        welcome = bench.welcome(session=token, connection=2, resumed=resumed, last_decided=1 if token == "s" else 0)
        bench.hears(welcome)
        reply, data = bench.reply(Version(1, 1), 300)
        bench.hears(Offer(token, 2, "anchor", "", reply, False, data))
        bench.told()
        bench.pushes(Version(1, 1))
        [push] = bench.told()
        assert push.begin.number == expected


@pytest.mark.parametrize("resumed", ["new", "record", "live"])
def test_welcome_that_a_later_connection_overtook_changes_nothing(resumed: str) -> None:
    """Two Hellos were answered, and the older answer comes last: its numbers, and its connection, are no more."""
    bench = Bench()
    bench.hears(bench.welcome(connection=2))
    bench.anchor(connection=2)
    bench.pushes()
    bench.ack(1, Version(1, 1), connection=2)
    bench.pushes(Version(1, 1))
    bench.told()
    bench.news()
    bench.hears(bench.welcome(connection=1, resumed=resumed))
    assert not bench.told()
    assert not bench.news()
    bench.ack(2, Version(1, 2), connection=2)
    assert [settled.number for settled in bench.news(events.Settled)] == [2]
    bench.pushes(Version(1, 2))
    assert [(push.begin.number, push.begin.connection) for push in bench.told(Push)] == [(3, 2)]


@pytest.mark.parametrize("resumed", ["live", "record"])
def test_number_that_the_server_is_beyond_is_settled_and_never_used_again(resumed: str) -> None:
    """Whatever led to it: a push below the last decided number is never answered, so it must not be repeated."""
    bench = joined()
    bench.pushes()
    bench.does(events.LinkLost())
    bench.told()
    bench.news()
    bench.hears(bench.welcome(connection=2, resumed=resumed, last_decided=5, outcome="applied"))
    assert [(o.number, o.pushed) for o in bench.news(events.Orphaned)] == [(1, True)]
    assert [type(message) for message in bench.told()] == [Pull]
    bench.anchor(Version(1, 5), connection=2)
    bench.pushes(Version(1, 5))
    assert [push.begin.number for push in bench.told(Push)] == [6]


@pytest.mark.parametrize("resumed", ["new", "record"])
def test_numbers_of_another_session_say_nothing_of_this_one(resumed: str) -> None:
    """The first Welcome of a new session was lost; the second calls it known, by its instance. Nothing was decided in
    it, which does not show that the push of the old session was never applied."""
    bench = joined()
    bench.pushes()
    bench.does(events.LinkLost())
    bench.news()
    bench.hears(bench.welcome(session="another", connection=3, resumed=resumed))
    assert [(o.number, o.pushed) for o in bench.news(events.Orphaned)] == [(1, True)]


def test_push_that_crosses_the_news_of_an_anchor_is_taken_back() -> None:
    """The trainer pushed before it saw that it goes on from another center."""
    bench = joined()
    bench.does(events.LinkLost())
    bench.hears(bench.welcome(session="other", connection=2, resumed="new"))
    reply, data = bench.reply(Version(1, 7), 300)
    bench.hears(Offer("other", 2, "anchor", "", reply, False, data))
    bench.told()
    bench.news()
    bench.pushes()
    [orphaned] = bench.news()
    assert (type(orphaned), orphaned.pushed) == (events.Orphaned, False)
    assert not bench.told((Push, Begin))
    bench.pushes(Version(1, 7))
    assert bench.told(Push)


def test_trainer_learns_that_it_must_anchor_anew_before_it_pushes_again() -> None:
    """The session was lost while nothing was under way. Pushed from the old anchor, the same progress would either be
    settled twice or not at all."""
    bench = joined()
    bench.does(events.LinkLost())
    bench.hears(bench.welcome(session="other", connection=1, resumed="new"))
    bench.news()
    bench.pushes()
    before = bench.news()
    reply, data = bench.reply(Version(1, 3), 300)
    bench.hears(Offer("other", 1, "anchor", "", reply, False, data))
    news = before + bench.news()
    kinds = [type(one) for one in news]
    assert events.Fetched in kinds
    sent = [m.begin for m in bench.told(Push)]
    settled_first = events.Orphaned in kinds[: kinds.index(events.Fetched)]
    assert settled_first != bool(sent), "either taken back before the anchor comes, or pushed; and told which"
    if sent:
        pytest.fail("the trainer took the new anchor as the end of its push, which is then pushed and settled")


def test_rejection_and_refusal_are_told_with_their_code() -> None:
    bench = joined()
    bench.pushes()
    bench.ack(1, Version(1, 0), outcome="rejected", code="non_finite")
    [settled] = bench.news()
    assert (settled.number, settled.outcome, settled.code, settled.values) == (1, "rejected", "non_finite", None)
    bench.pushes()
    bench.hears(Grant("s", 1, 2, "refuse", 0, "quarantined", "Too many."))
    [settled] = bench.news()
    assert (settled.number, settled.outcome, settled.code) == (2, "rejected", "quarantined")


@BOTH
def test_a_push_is_answered_when_the_server_first_says_what_becomes_of_it(layout: Layout) -> None:
    """Also where that is `held`; what the others take then, and the reply, do not count."""
    bench = joined(layout)
    bench.pushes()
    bench.wait(1.5, echo=True)
    at = bench.now
    bench.ack(1, FIRST, outcome="held")
    bench.wait(2.0, echo=True)
    bench.ack(1, Version(1, 1))
    [settled] = bench.news(events.Settled)
    assert settled.answered_s == at


@BOTH
def test_what_two_connections_took_is_no_time_of_an_exchange(layout: Layout) -> None:
    bench = joined(layout)
    bench.pushes()
    bench.does(events.LinkLost())
    bench.hears(bench.welcome(connection=2, resumed="live"))
    bench.ack(1, Version(1, 1), connection=2)
    [settled] = bench.news(events.Settled)
    assert settled.answered_s is None


def test_held_is_not_settled() -> None:
    bench = joined()
    bench.pushes()
    bench.hears(Ack("s", 1, 1, "held", "", "", Version(1, 0), Version(1, 0), 1.0, False, 1))
    assert not bench.news()
    bench.ack(1, Version(1, 1))
    assert bench.news(events.Settled)


def test_crash_that_undid_updates_is_told() -> None:
    bench = joined()
    for number in (1, 2, 3):
        bench.pushes()
        bench.ack(number, Version(1, number))
    bench.does(events.LinkLost())
    assert bench.told(Hello)[-1].resume == Resume("s", 3, 3, 203)
    bench.news()
    bench.hears(bench.welcome(connection=2, resumed="live", version=Version(2, 1), last_decided=1, lost=(2, 3)))
    assert [(one.first, one.last) for one in bench.news(events.Undone)] == [(2, 3)]
    bench.does(events.LinkLost())
    assert bench.told(Hello)[-1].resume.last_applied == 1, "it is told once"


# Encoding while sending


def test_chunks_leave_as_they_are_encoded_and_commit_comes_last() -> None:
    bench = joined(LARGE)
    chunks = len(bench.core.plan("fp32").chunks)
    bench.pushes(ready=0)
    bench.hears(Grant("s", 1, 1, "go", chunks, "", ""))
    assert bench.told(Chunk) == []
    for ready in range(1, chunks + 1):
        bench.does(events.Encoded(ready))
        told = bench.told()
        assert [m.index for m in told if isinstance(m, Chunk)] == [ready - 1]
        assert any(isinstance(m, Commit) for m in told) == (ready == chunks)
    bench.does(events.Encoded(chunks))
    assert bench.told() == [], "committed once"


def test_on_a_new_connection_only_what_is_encoded_is_sent_again() -> None:
    bench = joined(LARGE)
    chunks = len(bench.core.plan("fp32").chunks)
    bench.pushes(ready=1)
    bench.hears(Grant("s", 1, 1, "go", chunks, "", ""))
    bench.does(events.LinkLost())
    bench.hears(bench.welcome(connection=2, resumed="live"))
    bench.told()
    bench.hears(Grant("s", 2, 1, "go", chunks, "", ""))
    assert [m.index for m in bench.told(Chunk)] == [0]
    bench.does(events.Encoded(chunks))
    assert [m.index for m in bench.told(Chunk)] == list(range(1, chunks))


def test_withdrawn_push_is_forgotten_and_the_next_has_a_number_of_its_own() -> None:
    bench = joined(LARGE)
    bench.pushes(ready=0)
    bench.does(events.Withdrawn())
    bench.hears(Grant("s", 1, 1, "go", 8, "", ""))
    assert bench.news() == []
    bench.told()
    bench.pushes()
    assert [m.number for m in bench.told(Begin)] == [2]


@BOTH
def test_reply_lands_in_the_vector_that_the_trainer_gave_up(layout: Layout) -> None:
    bench = joined(layout)
    spare = np.full(layout.elements, np.nan, np.float32)
    bench.pushes(spare=spare)
    bench.ack(1, Version(1, 1))
    [settled] = bench.news()
    assert settled.values is spare
    assert (spare == 1.0).all()


@BOTH
def test_reply_that_is_not_finite_raises_doubt_and_is_not_merged(layout: Layout) -> None:
    bench = joined(layout)
    bench.does(events.PullWanted("evaluate"))
    reply, data = bench.reply(Version(1, 4), 7)
    broken = data[:-8] + b"\xff" * 8
    if layout is SMALL:
        bench.hears(Offer("s", 1, "evaluate", "", reply, False, broken))
    else:
        bench.hears(Offer("s", 1, "evaluate", "", reply, False))
        for index, chunk in enumerate(bench.core.plan("fp32").chunks):
            bench.hears(Chunk("s", 1, 7, index, broken[chunk.offset : chunk.offset + chunk.size]))
    assert bench.news(events.Fetched) == []
    assert bench.core.phase == "greeting"


# Pulls


@BOTH
def test_pull_is_answered_once_and_asked_again_after_doubt(layout: Layout) -> None:
    bench = joined(layout)
    bench.does(events.PullWanted("evaluate"))
    bench.does(events.PullWanted("evaluate"))
    assert len(bench.told(Pull)) == 1
    bench.does(events.LinkLost())
    bench.hears(bench.welcome(connection=2, resumed="live"))
    assert [m.purpose for m in bench.told(Pull)] == ["evaluate"]
    bench.news()
    bench.down(lambda reply, data: Offer("s", 2, "evaluate", "", reply, False, data), Version(1, 4), 7, 2)
    bench.down(lambda reply, data: Offer("s", 2, "evaluate", "", reply, False, data), Version(1, 4), 8, 2)
    [fetched] = bench.news()
    assert (fetched.purpose, fetched.base) == ("evaluate", (1, 4))


def test_window_down_is_kept_open_and_never_wider_than_agreed() -> None:
    big = Layout((LARGE.tensors[0]._replace(shape=(3000, 1000)),))
    bench = joined(big)
    bench.does(events.PullWanted("evaluate"))
    bench.told()
    reply, data = bench.reply(Version(1, 1), 9)
    bench.hears(Offer("s", 1, "evaluate", "", reply, False))
    until = 0
    for index, chunk in enumerate(bench.core.plan("fp32").chunks):
        for more in bench.told(More):
            assert until < more.until <= index + SETTINGS["window_chunks"]  # type: ignore[operator]
            until = more.until
        assert index < until
        bench.hears(Chunk("s", 1, 9, index, data[chunk.offset : chunk.offset + chunk.size]))
    [fetched] = bench.news()
    assert fetched.values.tobytes() == data


@pytest.mark.parametrize("wrong", ["length", "chunk", "index", "codec"])
def test_reply_that_does_not_fit_raises_doubt_and_not_an_exception(wrong: str) -> None:
    bench = joined(LARGE)
    bench.does(events.PullWanted("evaluate"))
    reply, data = bench.reply(Version(1, 1), 9)
    match wrong:
        case "length":
            reply = replace(reply, bytes=reply.bytes + 8)
        case "codec":
            reply = replace(reply, codec="of the future")
    bench.hears(Offer("s", 1, "evaluate", "", reply, False))
    if wrong == "chunk":
        bench.hears(Chunk("s", 1, 9, 0, data[:100]))
    if wrong == "index":
        bench.hears(Chunk("s", 1, 9, 1000, data[:100]))
    assert not bench.news(events.Fetched)
    assert bench.core.phase == "greeting"


# Time and ends


def test_beats_carry_progress_and_the_lease_is_kept_with_room_to_come_back() -> None:
    bench = joined()
    bench.does(events.Progress(17))
    bench.wait(10.0, echo=True)
    beats = bench.told(Beat)
    assert len(beats) >= 3
    assert {beat.steps for beat in beats} == {17}
    bench.wait(SETTINGS["lease_s"] * 0.6)  # type: ignore[operator]
    assert bench.redials >= 1


def test_persistent_refusal_does_not_become_a_storm() -> None:
    """Say Hello, be refused something, come back, be refused again: at most a few times a second."""
    bench = joined()
    bench.does(events.PullWanted("evaluate"))
    connection = 1
    end = bench.now + 10.0
    for _ in range(1000):
        if bench.now >= end or bench.core.phase == "ended":
            break
        for message in bench.told():
            match message:
                case Hello():
                    connection += 1
                    bench.hears(bench.welcome(connection=connection, resumed="live"))
                case Pull():
                    bench.hears(Fault("s", connection, "unexpected", "No.", "", 0))
        bench.wait(0.01)
    assert bench.redials <= 30


def test_diverged_server_is_the_end() -> None:
    bench = joined()
    bench.does(events.PullWanted("anchor"))
    bench.hears(Fault("s", 1, "diverged", "Not finite.", "", 0))
    assert bench.news(events.Failed)


@pytest.mark.parametrize("how", ["bye", "ack", "offer", "welcome"])
def test_end_of_training_is_told_once(how: str) -> None:
    bench = Bench() if how == "welcome" else joined()
    match how:
        case "bye":
            bench.hears(Bye("s", 1, "finished"), Bye("s", 1, "finished"))
        case "ack":
            bench.hears(Ack("s", 1, 9, "rejected", "finished", "", Version(1, 0), Version(1, 0), 1.0, True, 1))
        case "offer":
            reply, data = bench.reply(Version(1, 1))
            bench.hears(Offer("s", 1, "evaluate", "", reply, True, data))
        case "welcome":
            bench.hears(bench.welcome(settings=SETTINGS | {"finished": True}))
    assert len(bench.news(events.Finished)) == 1
    assert bench.core.finished


@pytest.mark.parametrize("server", ["answers", "is silent", "was never there"])
def test_leaving_ends_within_a_second_whether_heard_or_not(server: str) -> None:
    bench = Bench() if server == "was never there" else joined()
    if server == "was never there":
        bench.told()
    bench.does(events.Leave("done"))
    if server == "answers":
        [bye] = bench.told(Bye)
        bench.hears(replace(bye, reason="as you wish"))
    bench.wait(1.01)
    assert bench.news(events.Left)
    assert bench.core.deadline() is None
    bench.does(events.Dialled())
    assert not bench.told(Hello)


def test_leaving_ends_also_where_a_welcome_crosses_the_goodbye() -> None:
    bench = Bench()
    bench.hears(bench.welcome(init="wait"))
    bench.does(events.Leave("done"))
    bench.told()
    bench.hears(bench.welcome(init="have"))
    assert not bench.told()
    bench.wait(1.01)
    assert bench.news(events.Left)


def test_server_that_stops_is_away_until_it_is_back() -> None:
    bench = joined()
    bench.hears(Bye("s", 1, "draining"))
    assert [type(one) for one in bench.news()] == [events.Away]
    bench.pushes()
    assert bench.core.phase == "joined"
    bench.does(events.LinkLost())
    bench.hears(bench.welcome(connection=2, resumed="live", version=Version(2, 0)))
    assert [type(one) for one in bench.news()] == [events.Back]


def test_observer_never_resumes_nor_anchors() -> None:
    bench = Bench(role="observer")
    bench.does(events.PullWanted("evaluate"))
    bench.told()
    bench.hears(bench.welcome())
    assert [m.purpose for m in bench.told(Pull)] == ["evaluate"]
    bench.does(events.LinkLost())
    assert bench.told(Hello)[-1].resume is None


@pytest.mark.parametrize("resumed", ["live", "record", "new"])
def test_a_server_that_comes_back_with_another_codec_is_sent_nothing(resumed: Any) -> None:
    """The trainer encodes by what it adopted: taken for bf16, half of its bytes would pass, and mean nothing."""
    bench = joined(LARGE)
    bench.pushes()
    bench.does(events.LinkLost())
    bench.told()
    bench.news()
    session = "s" if resumed != "new" else "other"
    settings = SETTINGS | {"codec": "bf16", "lease_s": 20.0}
    bench.hears(bench.welcome(connection=2, resumed=resumed, session=session, settings=settings))
    [failed] = bench.news()
    assert isinstance(failed, events.Failed)
    assert "come back with codec bf16" in failed.error.sentence
    assert "joined it with codec fp32" in failed.error.sentence
    assert failed.error.fix
    bench.pushes()
    bench.wait(60.0)
    assert not bench.told()


@pytest.mark.parametrize(("codec", "other"), [("bf16", False), ("plain:powersgd", True)])
def test_another_codec_of_replies_is_another_server_where_plans_are_cut_by_it(codec: str, other: bool) -> None:
    """Cut at the rows of matrices, updates have other blocks, and perhaps as many bytes."""
    bench = joined(LARGE)
    bench.does(events.LinkLost())
    bench.told()
    bench.news()
    bench.hears(bench.welcome(connection=2, resumed="live", settings=SETTINGS | {"reply_codec": codec}))
    refused = [one.error.sentence for one in bench.news() if isinstance(one, events.Failed)]
    assert (
        refused
        == [f"The server has come back with reply_codec {codec}; this worker joined it with reply_codec fp32."][
            : int(other)
        ]
    )


# Shared memory

MINE, THEIRS = Place(1, 2, 3, "aa"), Place(4, 5, 6, "bb")


def sharing(layout: Layout = SMALL) -> Bench:
    """A worker that joined a server on its machine, and offered it memory."""
    bench = joined(layout)
    bench.does(events.Staged(MINE))
    assert bench.told() == [Share("s", 1, MINE)]
    bench.hears(Shared("s", 1, THEIRS, ""))
    assert bench.attaches == [THEIRS]
    return bench


def test_memory_is_offered_on_every_connection_before_anything_else_is_said() -> None:
    bench = sharing()
    bench.does(events.LinkLost())
    bench.told()
    bench.hears(bench.welcome(connection=2, resumed="live"))
    assert bench.told()[0] == Share("s", 2, MINE)
    bench.hears(bench.welcome(connection=2, resumed="live"))
    assert not bench.told(Share), "once"


def test_memory_that_is_there_before_the_welcome_is_offered_with_it() -> None:
    bench = Bench()
    bench.does(events.Staged(MINE))
    assert not bench.told(Share)
    bench.hears(bench.welcome())
    assert bench.told(Share) == [Share("s", 1, MINE)]


def test_a_server_that_shares_with_nobody_is_offered_none() -> None:
    bench = Bench()
    bench.hears(bench.welcome(settings=SETTINGS | {"machine": ""}))
    bench.does(events.Staged(MINE))
    assert not bench.told(Share)


@pytest.mark.parametrize("phase", ["greeting", "leaving", "ended"])
def test_who_is_on_the_way_offers_nothing(phase: str) -> None:
    bench = joined()
    match phase:
        case "greeting":
            bench.does(events.LinkLost())
        case "leaving":
            bench.does(events.Leave("done"))
        case _:
            bench.hears(Bye("s", 1, "over"))
    bench.told()
    bench.does(events.Staged(MINE))
    assert not bench.told(Share)


def test_memory_of_an_old_connection_is_not_attached() -> None:
    bench = sharing()
    bench.does(events.LinkLost())
    bench.hears(bench.welcome(connection=2, resumed="live"))
    bench.hears(Shared("s", 1, THEIRS, ""), Shared("other", 2, THEIRS, ""))
    assert bench.attaches == [THEIRS], "as before"
    bench.hears(Shared("s", 2, THEIRS, ""))
    assert bench.attaches == [THEIRS, THEIRS]


def test_what_cannot_be_attached_is_never_offered_again_and_training_goes_on() -> None:
    """The server reads this worker's memory and writes replies where it cannot look: the connection is given up."""
    bench = sharing()
    bench.pushes()
    before = bench.redials
    bench.does(events.CannotAttach("It is elsewhere."))
    assert bench.redials == before + 1
    assert [type(news) for news in bench.news()] == [events.Away]
    bench.told()
    bench.hears(bench.welcome(connection=2, resumed="live"))
    assert not bench.told(Share)
    bench.ack(1, Version(1, 1), connection=2)
    [settled] = bench.news(events.Settled)
    assert settled.outcome == "applied"
    bench.pushes(Version(1, 1))
    assert bench.told(Push)[-1].begin.number == 2


def test_a_server_that_cannot_is_left_in_peace() -> None:
    bench = joined()
    bench.does(events.Staged(MINE))
    bench.hears(Shared("s", 1, None, "It cannot be opened."))
    assert (bench.attaches, bench.redials) == ([], 0)
    assert not bench.news()


@BOTH
def test_a_whole_reply_is_decoded_as_it_arrives(layout: Layout) -> None:
    """However many chunks it would have made: what lies there is the server's to write again after the next push."""
    bench = sharing(layout)
    bench.pushes()
    bench.told()
    reply, data = bench.reply(Version(1, 7))
    lying = bytearray(data)
    announced = Ack("s", 1, 1, "applied", "", "", Version(1, 7), Version(1, 0), 1.0, False, 1, reply)
    bench.ends_in(announced, memoryview(lying).toreadonly())
    lying[:] = b"\xff" * len(lying)
    [settled] = bench.news(events.Settled)
    assert set(settled.values) == {7.0}
    assert not bench.told(More)


@BOTH
@pytest.mark.parametrize("wrong", ["too short", "too long", "one chunk", "NaN", "nothing"])
def test_a_whole_reply_that_is_wrong_raises_doubt(layout: Layout, wrong: str) -> None:
    """At once, or where it could be the announcement of chunks, when none come; and the push is repeated."""
    bench = sharing(layout)
    bench.pushes()
    bench.news()
    reply, data = bench.reply(Version(1, 7))
    payload = {
        "too short": data[:-1],
        "too long": data + b"0",
        "one chunk": data[: bench.core.plan("fp32").chunks[0].size - 8],
        "NaN": data[:-8] + b"\xff" * 8,
        "nothing": b"",
    }[wrong]
    announced = Ack("s", 1, 1, "applied", "", "", Version(1, 7), Version(1, 0), 1.0, False, 1, reply)
    before = bench.redials
    bench.ends_in(announced, payload)
    assert not bench.news(events.Settled)
    bench.wait(SILENCE_S + 1.0, echo=True)
    assert bench.redials > before
    bench.told()
    bench.hears(bench.welcome(connection=2, resumed="live"))
    bench.ack(1, Version(1, 7), connection=2)
    [settled] = bench.news(events.Settled)
    assert set(settled.values) == {7.0}


def test_a_payload_no_reply_could_have_is_refused_before_it_is_read() -> None:
    bench = sharing()
    reply, _ = bench.reply(Version(1, 7))
    announced = Ack("s", 1, 1, "applied", "", "", Version(1, 7), Version(1, 0), 1.0, False, 1, reply)
    bench.ends_in(announced, bytes(wire.PAYLOAD_BYTES + 1))
    assert bench.core.phase == "greeting"
    bench.wait(2.0)
    assert bench.redials >= 1
