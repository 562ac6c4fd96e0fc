"""From a complete update to its Ack: the rule decides, the shard computes, the reply leaves. Pure.

Laws
* The center changes here (and where rounds close, in `deciding`) and nowhere else, in the order of work.
* A push is counted, logged and decided in the same event that saw its kernel done; its reply is the center of exactly
  that version (or what else the rule says).
* A push whose reply the rule does not give at once is *held*: folded into the rule's state, its slot freed.
* An update whose budget ran out while it waited is refused, so a budget of updates is exact where updates are not held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.chunks import Plan
from common.codecs.base import F32, U8
from common.errors import PeerError
from common.messages import Ack, Reply, Scalars
from common.rules.base import Effect, Facts, changes_center, reply_to, weight_of, weighted
from common.rules.base import Reply as Answer
from paramserver.deciding import Deciding
from paramserver.downlink import Downlink
from paramserver.order import Job, WorkOrder
from paramserver.session import Decision, Owed, Session, Transfer
from paramserver.shard import CENTER, Work, source_of
from paramserver.slots import Slot
from paramserver.state import Outbox, ServerState
from paramserver.status import Throughput
from paramserver.uplink import Uplink

DETAILS_INTERVAL_S = 0.1
"""A rule's own figures are worked out at most this often."""


@dataclass(slots=True)
class _Push:
    """One push in the order of work, and what was decided of it when its turn came."""

    session: Session
    transfer: Transfer
    facts: Facts | None = None
    effects: Sequence[Effect] = ()
    answer: Answer | None = None
    late: bool = False
    trial: bool = False
    """Whether it is added before it is checked."""
    tried: bool = False
    """Whether that came to nothing."""
    memory: U8 | None = None
    """Shared with its worker when its turn came: the reply lies there. None: it lies in the slot."""


class Applying:
    """Complete pushes, one after the other. `give_late` answers those who are no longer too far ahead."""

    def __init__(
        self,
        state: ServerState,
        out: Outbox,
        order: WorkOrder,
        downlink: Downlink,
        rates: Throughput,
        deciding: Deciding,
        give_late: Callable[[], None],
    ) -> None:
        self._state = state
        self._out = out
        self._order = order
        self._downlink = downlink
        self._rates = rates
        self._deciding = deciding
        self._give_late = give_late
        self._last_details = float("-inf")

    def add(self, session: Session, transfer: Transfer, uplink: Uplink) -> None:
        """Put a complete push into the order of work."""
        push = _Push(session, transfer)
        self._order.add(
            Job(
                f"push {transfer.begin.number} of {session.worker}",
                lambda: self._start(push, uplink),
                lambda results: self._go_on(push, uplink, results),
                of_push=True,
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
            self._state.local_steps_of(session),
            reply,
            payload,
        )

    def tell_decision(self, session: Session) -> None:
        """Answer a push without a reply."""
        session.answered_connection = session.connection
        self._out.tell(session, self.answer(session))

    def send_owed(self, session: Session) -> None:
        """The very same reply, once more or for the first time."""
        owed = session.owed
        assert owed is not None
        owed.readers += 1

        def announce(reply: Reply, payload: memoryview | bytes) -> Ack:
            owed.replies.add(reply.id)
            return self.answer(session, reply, payload)

        session.answered_connection = session.connection
        session.pace.since = self._state.now
        plan = self._state.hosted.shard.downs[session.decision.fragment]
        self._out.add(
            self._downlink.offer(
                announce,
                owed.reply[: plan.bytes],
                plan,
                owed.version,
                (session.token, session.connection, session.peer),
                owed.read,
                now=self._state.now,
                of_push=True,
                whole=owed.reply is session.memory,
            )
        )

    def confirmed(self, session: Session, reply_id: int) -> None:
        """The worker has all of this reply: it is owed no longer, and its slot is free before the next push."""
        session.named(reply_id)

    def _go_on(self, push: _Push, uplink: Uplink, results: Sequence[Any]) -> Work | None:
        """After the update was tried, taken, or applied."""
        session, transfer = push.session, push.transfer
        if push.trial:
            push.trial = False
            if not all(results):  # it is not finite, or the center no longer: what is taken first tells which
                session.clock -= 1
                push.tried = True
                return uplink.take_work(transfer)
            self._state.hosted.shard.adopt()
            uplink.taken(session, transfer, ())
        elif transfer.lying is not None:
            return self._start(push, uplink) if uplink.taken(session, transfer, results) else None
        self._finish(push, uplink, results)
        return None

    def _start(self, push: _Push, uplink: Uplink) -> Work | None:
        """The rule decides; the work that follows, or None where the push is refused."""
        session, transfer = push.session, push.transfer
        try:
            if refusal := uplink.refusal(session, transfer.begin):
                raise refusal
            state, shard = self._state, self._state.hosted.shard
            slot, scalars = _complete(transfer)
            facts = Facts(
                session.worker,
                transfer.begin.number,
                scalars.steps,
                state.lag(transfer.begin.base),
                scalars.loss,
                scalars.samples,
                scalars.lr,
                state.training_s,
                transfer.begin.fragment,
            )
            weight = state.lag_weight(facts.lag_versions)
            decisions, effects = state.rule.admit(state.config, shard.decisions, facts)
        except PeerError as error:
            uplink.turn_down(session, transfer, error)
            return None
        push.facts, push.effects, push.memory = facts, weighted(effects, weight), session.memory
        session.pace.pushed(facts.steps, transfer.since)
        session.clock += 1
        push.answer = reply_to(session.worker, effects)
        push.late = push.answer is not None and state.too_far_ahead(session)
        if push.late:
            push.answer = None
        out = slot.reply if push.memory is None else push.memory
        if transfer.lying is not None:
            undecided = decisions is shard.decisions and not push.tried
            work = (
                shard.trial_work(transfer.plan, transfer.lying, push.effects, push.answer, out) if undecided else None
            )
            push.trial = work is not None
            if work is None:
                session.clock -= 1
            return work or uplink.take_work(transfer)
        shard.decisions = decisions
        buffers = self._buffers(session, facts.fragment)
        return shard.push_work(
            facts.fragment,
            transfer.plan,
            slot.update,
            session.arrays,
            push.effects,
            push.answer,
            out,
            buffers,
            session.replica,
            state.key(session, facts.number),
        )

    def _finish(self, push: _Push, uplink: Uplink, results: Sequence[bool]) -> None:
        state, shard, session = self._state, self._state.hosted.shard, push.session
        facts = push.facts
        assert facts is not None
        slot, _ = _complete(push.transfer)
        before = shard.version
        shard.generation += 1
        if changed := changes_center(push.effects):
            shard.advance()
        weight = weight_of(push.effects)
        session.transfer = None
        session.late = push.late
        held = push.answer is None
        answered = push.answer or next((e for e in push.effects if isinstance(e, Answer)), None)
        silent = answered is not None and answered.what == "nothing"
        source = None if silent else source_of(answered) or CENTER
        session.decision = Decision(
            facts.number, "held" if held else "applied", "", "", shard.version, weight, facts.fragment, source
        )
        session.answered_connection = session.connection
        session.last_progress = state.now
        silent |= held
        bytes_down = 0 if silent else shard.downs[facts.fragment].bytes
        reported = state.rule.schedules
        session.counters.applied(facts, bytes_down, counted=reported)
        state.budget.updates += 0 if reported else 1  # where steps are reported, each of them is one
        state.budget.samples += 0 if reported else facts.samples
        self._rates.add(state.now, 0 if reported else facts.samples)
        self._log(session, push.transfer.plan, facts, weight, bytes_down)
        if push.transfer.scalars is not None:
            self._deciding.measured(push.transfer.scalars.diversity, facts.steps)
        if not all(results):
            self._deciding.diverge(session.worker)
            uplink.give(slot)
            self._out.tell(session, self.answer(session))
            return
        # finished is told with the Ack of the update that used the budget up, and never in the middle of a round
        if changed or not held:
            state.end_if_used_up()
        if silent:
            uplink.give(slot)
            self._out.tell(session, self.answer(session))
        else:
            version = before if push.answer is not None and push.answer.what == "before" else shard.version
            if push.memory is None:
                session.owed = Owed(slot.reply, slot, version, uplink.give)
            else:
                session.owed = Owed(push.memory, None, version, uplink.give)
                uplink.give(slot)
            self.send_owed(session)
            if not state.keeps_replies:
                session.go_on()
        self._deciding.carry_out(push.effects, pusher=session)
        if state.settings.max_clock_gap is not None:
            self._give_late()

    def _buffers(self, session: Session, fragment: int) -> list[F32]:
        """The members' last float buffers, this session's first; none where buffers stay local."""
        shard = self._state.hosted.shard
        size = shard.layout.buffers
        policy = self._state.settings.buffers_policy()
        if policy == "local" or not size or fragment != len(shard.ups) - 1:
            return []
        if session.buffers is None:
            session.buffers = np.zeros(size, np.float32)
        if policy == "leader":
            return [session.buffers]
        others = [s.buffers for s in self._state.members if s is not session and s.buffers is not None]
        return [session.buffers, *others]

    def _log(self, session: Session, plan: Plan, facts: Facts, weight: float, bytes_down: int) -> None:
        state, shard = self._state, self._state.hosted.shard
        values: dict[str, Any] = {
            "worker": session.worker,
            "number": facts.number,
            "version": shard.version.version,
            "updates": state.budget.updates,
            "lag": facts.lag_versions,
            "weight": weight,
            "loss": facts.loss,
            "samples": facts.samples,
            "steps": facts.steps,
            "bytes_up": plan.bytes,
            "bytes_down": bytes_down,
            "bytes_pulled": state.ordered_bytes,
        }
        state.ordered_bytes = 0
        if state.now - self._last_details >= DETAILS_INTERVAL_S:
            self._last_details = state.now
            values |= state.rule.details(state.config, shard.stats)
        self._out.record("apply", **values, **state.rule.figures(state.config, shard.decisions))


def _complete(transfer: Transfer) -> tuple[Slot, Scalars]:
    """What a complete transfer has."""
    assert transfer.slot is not None and transfer.scalars is not None
    return transfer.slot, transfer.scalars
