"""Who may join, and as whom: Hello in, Welcome or a refusal out. Pure.

Laws
* A worker that comes back resumes its session: what was decided is told, what was cut off is freed.
* A worker that cannot fit (layout, codec, optimizer, memory, number of sessions) is refused before it has moved a
  byte, with the sentence that helps.
* Nobody is welcomed before there is room for it (`paramserver.room`); its Hello waits for that, and nothing else does.
* A fresh server takes its model from the first worker, and forgets it when nobody stands for it any more.
* Two live workers never go by the same name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from common import codecs
from common.errors import Code, ConfigError, PeerError
from common.layout import Layout
from common.messages import Fault, Hello, Scalar, Welcome
from common.rules.base import Member, OptimizerFacts
from paramserver import memory
from paramserver.downlink import Downlink
from paramserver.initial import InitialWeights
from paramserver.order import WorkOrder
from paramserver.room import Room
from paramserver.session import Session
from paramserver.sharing import Sharing
from paramserver.state import Outbox, ServerState
from paramserver.uplink import Uplink

NAME_CHARACTERS = 64
"""More of a worker's name is not kept."""
SUFFIX = "#"
"""Set between a worker's own name and a number, where a live worker has that name already."""


class Joining:
    """Takes in workers and observers. `token()` draws an unguessable session token."""

    def __init__(
        self,
        state: ServerState,
        out: Outbox,
        token: Callable[[], str],
        order: WorkOrder,
        initial: InitialWeights,
        uplink: Uplink,
        downlink: Downlink,
        sharing: Sharing,
    ) -> None:
        self._state = state
        self._out = out
        self._token = token
        self._sharing = sharing
        self._initial = initial
        self._uplink = uplink
        self._downlink = downlink
        self._room = Room(state, out, order, self._again)

    def hello(self, peer: bytes, hello: Hello) -> None:
        """Answer Hello, once there is room; raises PeerError where the answer is no."""
        state = self._state
        if state.stopping:
            raise PeerError(Code.DRAINING, "The server is stopping.", fix="Try again when it is back.")
        session = self._known(hello)
        layout = self._check_fit(hello, joined=session)
        if layout is not None and not self._has_room(peer, hello, session, layout):
            return
        resumed: Literal["new", "live", "record"] = "new"
        how = "joined"
        if session is None:
            session = self._admit(peer, hello)
        else:
            resumed = "live" if session.live and session.anchored else "record"
            how = "is back" if session.live else "is back after its lease had ended"
            if not session.live:
                self._check_room()
            self._reconnect(session, peer)
        lost = self._lost(hello, session)
        if not state.initialised:
            self._initial.enqueue(session)
        self.welcome(session, resumed, lost)
        self._out.record("join", worker=session.worker, role=session.role, resumed=resumed, lost=list(lost))
        if session.role == "worker":
            self._out.say("info", f"{session.worker} {how}; {len(state.members)} workers.")

    def welcome(
        self, session: Session, resumed: Literal["new", "live", "record"] = "new", lost: tuple[int, ...] = ()
    ) -> None:
        """Tell a session how things stand: settings, versions, numbers, and what to do about initial weights."""
        state, s = self._state, self._state.settings
        decision = session.decision
        # a push that waits to be applied will be: a worker that re-anchors must not take it back
        pending = session.transfer.begin.number if session.transfer and session.transfer.committed else 0
        surely_decided = max(pending, decision.number) if resumed == "record" else decision.number
        settings: dict[str, Scalar] = {
            "rule": s.rule,
            "codec": s.codec,
            "reply_codec": s.reply_codec,
            "seed": s.seed,
            "local_steps": state.local_steps_of(session),
            "overlap": s.overlap,
            "diversity_every_steps": s.diversity_every_steps,
            "schedules": state.rule.schedules,
            "fragments": state.rule.fragments(state.config),
            "confirm": state.keeps_replies,
            "replica": state.keeps_replicas,
            "buffers": s.buffers_policy(),
            "lease_s": s.lease_s,
            "machine": state.machine,
            "window_chunks": s.window_chunks,
            "finished": bool(state.finished),
        }
        self._out.tell(
            session,
            Welcome(
                session.token,
                session.connection,
                session.worker,
                state.version,
                settings,
                dict(s.rule_settings),
                self._initial.part_of(session),
                resumed,
                surely_decided,
                decision.outcome if surely_decided == decision.number else "applied",
                lost,
            ),
        )

    def host(self, layout: Layout) -> None:
        """Make center and pool for a model, at once; raises PeerError where they do not fit."""
        self._room.host(layout)

    # Room

    def _has_room(self, peer: bytes, hello: Hello, session: Session | None, layout: Layout) -> bool:
        """Whether there is room for this worker beside the others; if not, its Hello waits until it is made."""
        members = self._state.members
        newcomer = session is None or not session.member
        arrays = newcomer + sum(member.arrays is None for member in members)
        workers = len(members) + newcomer
        if self._room.made(layout, workers, arrays):
            return True
        self._check_room()
        self._room.wait(peer, hello, layout, workers, arrays)
        return False

    def _again(self, peer: bytes, hello: Hello) -> None:
        """A Hello that waited."""
        try:
            self.hello(peer, hello)
        except PeerError as error:
            self._out.fault(peer, error)

    # Coming back

    def _known(self, hello: Hello) -> Session | None:
        """The session a worker comes back to; None where it is gone or there never was one."""
        for session in self._state.sessions.values():
            if session.live and session.instance == hello.instance:
                return session  # its first Welcome was too slow, or got lost
        if hello.resume is None:
            return None
        if not self._state.initialised and not self._state.settings.adopt:
            raise PeerError(
                Code.EMPTY_SERVER,
                "This server has no weights, but the worker has trained before: the server lost its state.",
                fix="Restore its directory, or start it with --adopt to let this worker's weights refill it.",
            )
        return self._state.sessions.get(hello.resume.session)

    def _reconnect(self, session: Session, peer: bytes) -> None:
        """A new connection of a known session: what the old one had under way is freed."""
        self._downlink.cancel(session.token)
        if session.transfer is not None and not session.transfer.committed:
            self._uplink.drop(session)
        if session.live and session.peer not in (b"", peer):
            # mostly gone; but if this Hello was late and that connection the newer one, its worker must say Hello again
            sentence = "This session goes on on another connection."
            self._out.send(session.peer, Fault("", 0, str(Code.STALE), sentence, "Say Hello again.", 0))
        if not session.live and self._name_taken(session.worker):
            session.worker = self._free_name(session.worker)
        self._sharing.stop(session)
        session.peer = peer
        session.connection = self._state.next_connection()
        session.ended = None
        session.lease_end = self._state.now + self._state.settings.lease_s
        session.last_seen = self._state.now

    def _lost(self, hello: Hello, session: Session) -> tuple[int, ...]:
        """Numbers that this worker was told are applied and that a crash undid."""
        if hello.resume is None:
            return ()
        first, last = session.decision.number + 1, hello.resume.last_applied
        if hello.resume.session != session.token:
            # a session of an earlier life that no checkpoint knows began after the last one: all of it is undone
            if hello.resume.session.split(".")[0] == str(self._state.epoch):
                return ()
            first = 1
        if last < first:
            return ()
        self._out.say("warning", f"{session.worker}: updates {first} to {last} were applied but lost in the crash.")
        return (first, last)

    # Coming new

    def _admit(self, peer: bytes, hello: Hello) -> Session:
        state = self._state
        self._check_room()
        session = Session(
            token=f"{state.epoch}.{self._token()}",
            instance=hello.instance,
            worker=self._free_name(hello.worker[:NAME_CHARACTERS] or "worker"),
            role=hello.role,
            peer=peer,
            connection=state.next_connection(),
            lease_end=state.now + state.settings.lease_s,
            joined=state.now,
            host=hello.host,
            group=hello.group,
            last_seen=state.now,
            last_progress=state.now,
        )
        state.sessions[session.token] = session
        return session

    def _check_room(self) -> None:
        live = sum(session.live for session in self._state.sessions.values())
        if live >= self._state.settings.max_sessions:
            raise PeerError(
                Code.FULL,
                f"The server has {live} sessions, which is its limit.",
                fix="Raise `max_sessions` on the server, or wait until a worker leaves.",
            )

    def _name_taken(self, name: str) -> bool:
        return any(session.live and session.worker == name for session in self._state.sessions.values())

    def _free_name(self, wanted: str) -> str:
        name, count = wanted, 1
        while self._name_taken(name):
            count += 1
            name = f"{wanted.split(SUFFIX)[0]}{SUFFIX}{count}"
        return name

    # Fitting

    def _check_fit(self, hello: Hello, *, joined: Session | None) -> Layout | None:
        """Codecs, optimizer, layout and memory; an observer names its layout only where it has one. The layout of a
        worker, for which there must be room."""
        state = self._state
        if hello.role == "observer" and not hello.elements:
            return None
        adds = (codecs.DIFFERENCE,) if state.keeps_replicas else ()
        for codec in (state.settings.codec, state.settings.reply_codec):
            if not {*codecs.words(codec), *adds} <= set(hello.codecs):
                more = " for differences" if adds else ""
                raise PeerError(
                    Code.UNKNOWN_CODEC,
                    f"The server uses codec '{codec}'{more}, which this worker does not know.",
                    fix="Install the same version of paramserver on both sides.",
                )
        if hello.optimizer is not None:
            o = hello.optimizer
            facts = OptimizerFacts(o.name, o.lr, o.momentum, o.groups, o.nesterov, o.dampening)
            if refusal := state.rule.accept(state.config, facts):
                raise PeerError(Code.OPTIMIZER, refusal)
        layout = Layout.parse(hello.payload, elements_limit=state.settings.max_elements)
        if state.model is not None and layout != state.model.shard.layout:
            raise PeerError(
                Code.LAYOUT_MISMATCH,
                f"This worker's model is not the one on the server. {state.model.shard.layout.difference(layout)}",
                fix="Build the same model in every worker, or start a server of its own for this one.",
            )
        if hello.role != "worker":
            return None
        self._check_memory(layout, newcomers=joined is None or not joined.member)
        if joined is None or not joined.enrolled:
            self._check_group(hello)
        return layout

    def _check_group(self, hello: Hello) -> None:
        """Whether the rule would take it as a member: tried, and thrown away."""
        state = self._state
        decisions = (
            state.model.shard.decisions if state.model else state.rule.start(state.config, state.settings.terms())
        )
        if hello.group is not None and "groups" not in type(state.config).model_fields:
            sentence = (
                f"Worker '{hello.worker}' asks for group {hello.group}, but rule '{state.rule.name}' has no groups."
            )
            raise PeerError(Code.RULE, sentence, fix="Start it without --group.")
        member = Member(hello.worker, hello.host, -1 if hello.group is None else hello.group)
        try:
            state.rule.join(state.config, decisions, member, state.training_s)
        except ConfigError as error:
            raise PeerError(Code.RULE, error.sentence, fix=error.fix) from None

    def _check_memory(self, layout: Layout, *, newcomers: bool) -> None:
        limit = self._state.settings.memory_limit_mib
        if limit is None:
            return
        try:
            workers = len(self._state.members) + newcomers
            needed = memory.plan(self._state.settings, layout).total(workers, self._state.sharing)
        except ConfigError as error:
            raise PeerError(Code.FULL, error.sentence, fix=error.fix) from None
        if needed > limit << 20:
            raise PeerError(
                Code.FULL,
                f"With one more worker the server would need {needed / 2**20:,.0f} MiB, its limit is {limit:,} MiB.",
                fix="Raise `memory_limit_mib`, lower `pool_mib`, use fewer workers, or serve with --no-shared-memory.",
            )
