"""Who may join, and as whom: Hello in, Welcome or a refusal out. Pure.

Laws
* A worker that comes back resumes its session: what was decided is told, what was cut off is freed.
* A worker that cannot fit (layout, codec, optimizer, memory, number of sessions) is refused before it has moved a
  byte, with the sentence that helps.
* A fresh server takes its model from the first worker, and forgets it when nobody stands for it any more.
* Two live workers never go by the same name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from common.errors import Code, ConfigError, PeerError
from common.layout import Layout
from common.messages import Hello, Scalar, Welcome
from common.rules.base import Member, OptimizerFacts
from paramserver import memory
from paramserver.downlink import Downlink
from paramserver.initial import InitialWeights
from paramserver.session import Session
from paramserver.shard import Shard
from paramserver.slots import Slots
from paramserver.snapshots import Snapshots
from paramserver.state import Hosted, Outbox, ServerState
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
        initial: InitialWeights,
        uplink: Uplink,
        downlink: Downlink,
    ) -> None:
        self._state = state
        self._out = out
        self._token = token
        self._initial = initial
        self._uplink = uplink
        self._downlink = downlink

    def hello(self, peer: bytes, hello: Hello) -> None:
        """Answer Hello; raises PeerError where the answer is no."""
        state = self._state
        if state.stopping:
            raise PeerError(Code.DRAINING, "The server is stopping.", fix="Try again when it is back.")
        session = self._known(hello)
        self._check_fit(hello, joined=session)
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
        if state.model is not None:
            state.model.slots.grow(len(state.members))
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
            "local_steps": state.local_steps_of(session),
            "overlap": s.overlap,
            "diversity_every_steps": s.diversity_every_steps,
            "schedules": state.rule.schedules,
            "fragments": state.rule.fragments(state.config),
            "confirm": state.rule.lost_reply == "resend",
            "buffers": s.buffers_policy(),
            "lease_s": s.lease_s,
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
        """Make center and pool for a model; raises PeerError where they do not fit."""
        state, s = self._state, self._state.settings
        try:
            plan = memory.plan(s, layout)
        except ConfigError as error:
            raise PeerError(Code.FULL, error.sentence, fix=error.fix) from None
        shard = Shard(
            layout,
            state.rule,
            state.config,
            s.terms(),
            codec=s.codec,
            reply_codec=s.reply_codec,
            epoch=state.epoch,
        )
        slots = Slots(plan.slots, max(up.bytes for up in shard.ups), max(down.bytes for down in shard.downs))
        state.model = Hosted(shard, slots, Snapshots(shard.down.bytes))
        workers = max(len(state.members), 1)
        self._out.say("info", f"Model of {layout.parameters:,} parameters. {plan.sentence(workers)}")

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
        if not session.live and self._name_taken(session.worker):
            session.worker = self._free_name(session.worker)
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

    def _check_fit(self, hello: Hello, *, joined: Session | None) -> None:
        """Codecs, optimizer, layout and memory; an observer names its layout only where it has one."""
        state = self._state
        if hello.role == "observer" and not hello.elements:
            return
        for codec in (state.settings.codec, state.settings.reply_codec):
            if codec not in hello.codecs:
                raise PeerError(
                    Code.UNKNOWN_CODEC,
                    f"The server uses codec '{codec}', which this worker does not know.",
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
        if hello.role == "worker":
            self._check_memory(layout, newcomers=joined is None or not joined.member)
            if joined is None or not joined.enrolled:
                self._check_group(hello)
            if state.model is None:
                self.host(layout)

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
            needed = memory.plan(self._state.settings, layout).total(len(self._state.members) + newcomers)
        except ConfigError as error:
            raise PeerError(Code.FULL, error.sentence, fix=error.fix) from None
        if needed > limit << 20:
            raise PeerError(
                Code.FULL,
                f"With one more worker the server would need {needed / 2**20:,.0f} MiB, its limit is {limit:,} MiB.",
                fix="Raise `memory_limit_mib`, lower `pool_mib`, or use fewer workers.",
            )
