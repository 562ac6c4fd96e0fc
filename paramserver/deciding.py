"""What a rule decides when nothing is pushed: somebody joins, leaves or reports, or time passes. Pure.

Laws
* A decision is taken in the order of work, so its kernels never overtake those of an earlier one.
* Whoever was held is answered once the kernels of the effect that answers it are done.
* An order is remembered until the next one, and said again on a new connection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from common.messages import Order
from common.rules.base import Decided, Decisions, Effect, Member, Reply, changes_center, computes
from common.rules.base import Order as OrderEffect
from paramserver.order import Job, WorkOrder
from paramserver.session import Session
from paramserver.shard import CENTER, Work
from paramserver.state import CONNECTION_BITS, Outbox, ServerState


class Deciding:
    """Decisions of the rule, in the order of work. `answer(session)` sends a held push its reply."""

    def __init__(self, state: ServerState, out: Outbox, order: WorkOrder, answer: Callable[[Session], None]) -> None:
        self._state = state
        self._out = out
        self._order = order
        self._answer = answer
        self._ticking = False

    @property
    def deadline(self) -> float | None:
        """When the rule wants to be told that time has passed (monotonic seconds)."""
        state = self._state
        if state.model is None or not state.initialised or state.finished or self._ticking:
            return None
        at_s = state.rule.deadline(state.config, state.hosted.shard.decisions)
        return None if at_s is None else state.now + at_s - state.training_s

    def enrol(self, session: Session) -> None:
        """A worker was given a center to go on from: the rule gets to know it."""
        if session.enrolled:
            return
        session.enrolled = True
        clocks = [member.clock for member in self._state.members if member is not session and member.anchored]
        session.clock = min(clocks, default=0)
        member = Member(session.worker, session.host, -1 if session.group is None else session.group)
        rule, config = self._state.rule, self._state.config
        self._decide(
            f"{session.worker} joins", lambda decisions: rule.join(config, decisions, member, self._state.training_s)
        )

    def dismiss(self, session: Session) -> None:
        """A worker is gone."""
        if not session.enrolled:
            return
        session.enrolled = False
        rule, config = self._state.rule, self._state.config
        self._decide(
            f"{session.worker} leaves",
            lambda decisions: rule.leave(config, decisions, session.worker, self._state.training_s),
        )

    def report(self, session: Session, steps: int, loss: float) -> None:
        """A worker has done so many steps in all."""
        rule, config = self._state.rule, self._state.config
        self._decide(
            f"report of {session.worker}",
            lambda decisions: rule.report(config, decisions, session.worker, steps, loss, self._state.training_s),
        )

    def tick(self) -> None:
        """Time has passed, and the rule wanted to know."""
        deadline = self.deadline
        if deadline is None or self._state.now < deadline:
            return
        self._ticking = True
        rule, config = self._state.rule, self._state.config

        def decision(decisions: Decisions) -> Decided:
            self._ticking = False
            return rule.tick(config, decisions, self._state.training_s)

        self._decide("time", decision)

    def carry_out(self, effects: Sequence[Effect], pusher: Session | None) -> None:
        """Answer those who were held, and pass orders on; the kernels of `effects` are done."""
        state = self._state
        for effect in effects:
            match effect:
                case Reply(worker=worker, what=what, row=row) if pusher is None or worker != pusher.worker:
                    session = state.member(worker)
                    if session is not None and session.decision.outcome == "held":
                        session.decision = replace(session.decision, source=CENTER if what == "after" else (what, row))
                        self._answer(session)
                case OrderEffect(worker=worker):
                    if (session := state.member(worker)) is not None:
                        self._order_to(session, effect)

    def _decide(self, name: str, decision: Callable[[Decisions], Decided]) -> None:
        if self._state.model is not None:
            decided: list[Effect] = []
            self._order.add(Job(name, partial(self._start, decision, decided), partial(self._finish, decided)))

    def _start(self, decision: Callable[[Decisions], Decided], decided: list[Effect]) -> Work | None:
        shard = self._state.hosted.shard
        shard.decisions, effects = decision(shard.decisions)
        decided[:] = effects
        if computes(effects):
            return shard.close_work(effects)
        self.carry_out(effects, pusher=None)
        return None

    def _finish(self, effects: Sequence[Effect], results: Sequence[Any]) -> None:
        shard = self._state.hosted.shard
        shard.generation += 1
        if changes_center(effects):
            shard.advance()
        self._state.end_if_used_up()
        reasons = [effect.reason for effect in effects if not isinstance(effect, Reply)]
        figures = self._state.rule.figures(self._state.config, shard.decisions)
        self._out.record("close", version=shard.version.version, reasons=reasons, **figures)
        self.carry_out(effects, pusher=None)

    def _order_to(self, session: Session, effect: OrderEffect) -> None:
        # ids grow over all lives of the server: an order is not in the checkpoint
        last = session.order.id if session.order is not None else self._state.epoch << CONNECTION_BITS
        session.order = Order(
            session.token,
            session.connection,
            last + 1,
            effect.upload,
            effect.pull,
            effect.until,
            effect.reason,
        )
        self._out.tell(session, session.order)
