"""What a rule decides when nothing is pushed: somebody joins, leaves or reports, or time passes. Pure.

Laws
* A decision is taken in the order of work, so its kernels never overtake those of an earlier one.
* Whoever was held is answered once the kernels of the effect that answers it are done.
* An order is remembered until the next one, and said again on a new connection.
* A session is `enrolled` exactly while the rule knows it: both change in the same job, so that a checkpoint, which is a
  job itself, never has the one without the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from common.errors import Code, ConfigError, PeerError
from common.messages import Diversity, Order
from common.rules.base import Decided, Decisions, Effect, Member, Reply, changes_center, computes, has_own
from common.rules.base import Order as OrderEffect
from paramserver import diversity
from paramserver.order import Job, WorkOrder
from paramserver.session import Session
from paramserver.shard import CENTER, Work
from paramserver.state import CONNECTION_BITS, Outbox, ServerState


class Deciding:
    """Decisions of the rule, in the order of work. `answer(session)` sends a held push its reply; `turn_away(session,
    reason)` ends one that the rule does not take."""

    def __init__(
        self,
        state: ServerState,
        out: Outbox,
        order: WorkOrder,
        answer: Callable[[Session], None],
        turn_away: Callable[[Session, str], None],
    ) -> None:
        self._state = state
        self._out = out
        self._order = order
        self._answer = answer
        self._turn_away = turn_away
        self._ticking = False
        self._timed = has_own(state.rule, "deadline")

    @property
    def deadline(self) -> float | None:
        """When the rule wants to be told that time has passed (monotonic seconds)."""
        state = self._state
        if not self._timed or state.model is None or not state.initialised or state.finished or self._ticking:
            return None
        at_s = state.rule.deadline(state.config, state.hosted.shard.decisions)
        return None if at_s is None else state.now + at_s - state.training_s

    def enrol(self, session: Session) -> None:
        """A worker was given a center to go on from: the rule gets to know it."""
        state = self._state
        member = Member(session.worker, session.host, -1 if session.group is None else session.group)

        def decision(decisions: Decisions) -> Decided:
            if session.enrolled or not session.live:
                return decisions, []
            try:
                decided = state.rule.join(state.config, decisions, member, state.training_s)
            except ConfigError as error:  # when it said Hello there was still room
                self._out.fault(session.peer, PeerError(Code.RULE, error.sentence, fix=error.fix), session=session)
                self._turn_away(session, "the rule has no place for it")
                return decisions, []
            session.clock = min((other.clock for other in state.members if other.enrolled), default=0)
            session.enrolled = True
            return decided

        self._decide(f"{session.worker} joins", decision)

    def dismiss(self, session: Session) -> None:
        """A worker is gone."""
        state, worker = self._state, session.worker  # by the time of the decision it may be back under another name

        def decision(decisions: Decisions) -> Decided:
            if not session.enrolled:
                return decisions, []
            session.enrolled = False
            return state.rule.leave(state.config, decisions, worker, state.training_s)

        self._decide(f"{worker} leaves", decision)

    def report(self, session: Session, steps: int, loss: float) -> None:
        """A worker has done so many steps in all."""
        rule, config = self._state.rule, self._state.config
        self._decide(
            f"report of {session.worker}",
            lambda decisions: rule.report(config, decisions, session.worker, steps, loss, self._state.training_s),
        )

    def measured(self, found: Diversity | None, steps: int) -> None:
        """A worker has measured the diversity of its gradients within so many steps."""
        state, s = self._state, self._state.settings
        if found is None:
            return
        before, state.diversity = state.diversity, state.diversity.after(found, steps, s.diversity_horizon_measurements)
        if state.diversity is not before:
            values = diversity.describe(state.diversity, state.loads, s.diversity_delta)
            self._out.record("diversity", updates=state.budget.updates, **values)

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
                        source = None if what == "nothing" else CENTER if what == "after" else (what, row)
                        session.decision = replace(session.decision, source=source)
                        self._answer(session)
                case OrderEffect(worker=worker):
                    if (session := state.member(worker)) is not None:
                        self._order_to(session, effect)

    def diverge(self, worker: str) -> None:
        """The center is no longer finite: take nothing more, and keep the last checkpoint. `worker`: the last cause."""
        state = self._state
        if not state.diverged:
            state.diverged = f"The center is not finite since version {state.version}, after an update of {worker}."
            self._out.say(
                "error", f"{state.diverged} Updates are refused; the last checkpoint ({state.durable}) is kept."
            )
            self._out.record("diverged", worker=worker, version=state.version.version)

    def _decide(self, name: str, decision: Callable[[Decisions], Decided]) -> None:
        if self._state.model is not None:
            decided: list[Effect] = []
            self._order.add(Job(name, partial(self._start, decision, decided), partial(self._finish, decided)))

    def _start(self, decision: Callable[[Decisions], Decided], decided: list[Effect]) -> Work | None:
        if self._state.model is None:  # forgotten since, and its members with it
            return None
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
        if not all(results):
            self.diverge("several workers")
        self._state.end_if_used_up()
        reasons = [effect.reason for effect in effects if not isinstance(effect, Reply)]
        figures = self._state.rule.figures(self._state.config, shard.decisions)
        self._out.record("close", version=shard.version.version, reasons=reasons, **figures)
        self.carry_out(effects, pusher=None)

    def _order_to(self, session: Session, effect: OrderEffect) -> None:
        # ids grow over all lives of the server and of the session: a worker takes no order older than its last
        session.last_order = max(session.last_order, self._state.epoch << CONNECTION_BITS) + 1
        session.order = Order(
            session.token,
            session.connection,
            session.last_order,
            effect.upload,
            effect.pull,
            effect.until,
            effect.reason,
        )
        self._out.tell(session, session.order)
