"""From a complete update to its Ack: the rule decides, the shard computes, the reply leaves. Pure.

Laws
* The center changes here and nowhere else, once per decided push, in the order of work.
* A push is counted, logged and decided in the same event that saw its kernel done; its reply is the center of exactly
  that version (or of the one before, where the rule says so).
* An update whose budget ran out while it waited is refused, so a budget of updates is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from common.codecs.base import F32
from common.messages import Ack, Reply, Scalars, Version
from common.rules.base import Apply, Facts
from common.rules.base import Reply as ReplyWith
from paramserver.downlink import Downlink
from paramserver.order import Job, WorkOrder
from paramserver.session import Decision, Session, Transfer
from paramserver.shard import Work
from paramserver.slots import Slot
from paramserver.state import Outbox, ServerState
from paramserver.status import Throughput
from paramserver.uplink import Uplink

DETAILS_INTERVAL_S = 0.1
"""A rule's own figures are worked out at most this often."""


class Applying:
    """Complete pushes, one after the other."""

    def __init__(
        self, state: ServerState, out: Outbox, order: WorkOrder, downlink: Downlink, rates: Throughput
    ) -> None:
        self._state = state
        self._out = out
        self._order = order
        self._downlink = downlink
        self._rates = rates
        self._last_details = float("-inf")

    def add(self, session: Session, transfer: Transfer, uplink: Uplink) -> None:
        """Put a complete push into the order of work."""
        facts: list[tuple[Facts, float]] = []
        self._order.add(
            Job(
                f"push {transfer.begin.number} of {session.worker}",
                lambda: self._start(session, transfer, uplink, facts),
                lambda results: self._finish(session, transfer, uplink, *facts[0], results),
            )
        )

    def answer(self, session: Session, reply: Reply | None = None, payload: memoryview | bytes = b"") -> Ack:
        """The Ack for the session's last decided push."""
        d = session.decision
        return Ack(
            session.token,
            session.connection,
            d.number,
            d.outcome,
            d.code,
            d.sentence,
            d.version,
            self._state.durable,
            d.weight,
            bool(self._state.finished),
            reply,
            payload,
        )

    def tell_decision(self, session: Session) -> None:
        """Answer a push without a reply."""
        session.answered_connection = session.connection
        self._out.tell(session, self.answer(session))

    def diverge(self, session: Session) -> None:
        """The center is no longer finite: take nothing more, and keep the last checkpoint."""
        state = self._state
        if not state.diverged:
            state.diverged = (
                f"The center is not finite since version {state.version}, after an update of {session.worker}."
            )
            self._out.say(
                "error", f"{state.diverged} Updates are refused; the last checkpoint ({state.durable}) is kept."
            )
            self._out.record("diverged", worker=session.worker, version=state.version.version)

    def _start(
        self, session: Session, transfer: Transfer, uplink: Uplink, decided: list[tuple[Facts, float]]
    ) -> Work | None:
        if refusal := uplink.refusal(session):
            uplink.drop(session)
            version = self._state.version
            uplink.decide(session, Decision(transfer.begin.number, "rejected", refusal.code, str(refusal), version))
            return None
        state, shard = self._state, self._state.hosted.shard
        slot, scalars = _complete(transfer)
        facts = Facts(
            session.worker,
            transfer.begin.number,
            scalars.steps,
            self._lag(transfer.begin.base),
            scalars.loss,
            scalars.samples,
            scalars.lr,
        )
        shard.decisions, effects = state.rule.admit(state.config, shard.decisions, facts)
        weight = 1.0
        what: Literal["before", "after"] = "after"
        for effect in effects:
            match effect:
                case Apply(weight=given):
                    weight = given
                case ReplyWith(what=given_what):
                    what = given_what
        decided.append((facts, weight))
        return shard.apply_work(slot.update, session.arrays, weight, slot.reply, what, self._buffers(session))

    def _finish(
        self,
        session: Session,
        transfer: Transfer,
        uplink: Uplink,
        facts: Facts,
        weight: float,
        results: Sequence[bool],
    ) -> None:
        state, shard = self._state, self._state.hosted.shard
        slot, _ = _complete(transfer)
        shard.advance()
        session.transfer = None
        session.decision = Decision(facts.number, "applied", "", "", shard.version, weight)
        session.answered_connection = session.connection
        session.last_progress = state.now
        session.counters.applied(facts, shard.down.bytes)
        state.budget.updates += 1
        state.budget.samples += facts.samples
        self._rates.add(state.now, facts.samples)
        self._log(session, facts, weight)
        if not all(results):
            self.diverge(session)
            uplink.give(slot)
            self._out.tell(session, self.answer(session))
            return
        # finished is told with the Ack of the update that used the budget up
        state.end_if_used_up()
        self._out.add(
            self._downlink.offer(
                partial(self.answer, session),
                slot.reply,
                shard.down,
                shard.version,
                (session.token, session.connection, session.peer),
                lambda: uplink.give(slot),
                now=state.now,
                of_push=True,
            )
        )

    def _lag(self, base: Version) -> int:
        """Versions between what the worker started from and now; a base that a crash undid counts as recovered."""
        state = self._state
        start = base.version if base.epoch == state.epoch else min(base.version, state.recovered.version)
        return max(state.version.version - start, 0)

    def _buffers(self, session: Session) -> list[F32]:
        """The members' last float buffers, this session's first; none where buffers stay local."""
        size = self._state.hosted.shard.layout.buffers
        if self._state.settings.buffers == "local" or not size:
            return []
        if session.buffers is None:
            session.buffers = np.zeros(size, np.float32)
        others = [s.buffers for s in self._state.members if s is not session and s.buffers is not None]
        return [session.buffers, *others]

    def _log(self, session: Session, facts: Facts, weight: float) -> None:
        state, shard = self._state, self._state.hosted.shard
        values: dict[str, Any] = {
            "worker": session.worker,
            "number": facts.number,
            "version": shard.version.version,
            "lag": facts.lag_versions,
            "weight": weight,
            "loss": facts.loss,
            "samples": facts.samples,
            "steps": facts.steps,
            "bytes_up": shard.up.bytes,
            "bytes_down": shard.down.bytes,
        }
        if state.now - self._last_details >= DETAILS_INTERVAL_S:
            self._last_details = state.now
            values |= state.rule.details(state.config, shard.stats)
        self._out.record("apply", **values)


def _complete(transfer: Transfer) -> tuple[Slot, Scalars]:
    """What a complete transfer has."""
    assert transfer.slot is not None and transfer.scalars is not None
    return transfer.slot, transfer.scalars
