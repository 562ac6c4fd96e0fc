"""Updates on their way up: Begin, Grant, Chunk, Commit, until each is complete or refused. Pure.

Laws
* A slot is reserved before the first byte moves; slots are given in order of arrival, and die with the connection.
* The sender may have at most a window of chunks under way.
* What lies whole in shared memory is taken on the kernels' threads when its turn comes: until then nothing of it moves.
* A decided number is never decided again: a repeat gets the original answer, and is no strike.
* A push that breaks a rule is decided as rejected, leaves nothing behind, and is counted; three new ones within a
  minute put the worker in quarantine, each time for twice as long.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

from common.codecs.base import F32
from common.errors import Code, PeerError
from common.messages import Begin, Buffer, Chunk, Commit, Grant, More, Push, Scalars
from paramserver import intake
from paramserver.downlink import Downlink
from paramserver.initial import InitialWeights
from paramserver.session import Decision, Session, Transfer
from paramserver.shard import Work
from paramserver.slots import Slot
from paramserver.state import Outbox, ServerState

QUARANTINE_S = 60.0
QUARANTINE_DOUBLINGS = 10


class Uplink:
    """All transfers that are not complete. `complete` takes over one that is, `decided` tells a session its decision,
    `again` answers one whose answer was lost."""

    def __init__(
        self,
        state: ServerState,
        out: Outbox,
        initial: InitialWeights,
        downlink: Downlink,
        complete: Callable[[Session, Transfer], None],
        decided: Callable[[Session], None],
        again: Callable[[Session], None],
    ) -> None:
        self._state = state
        self._out = out
        self._initial = initial
        self._downlink = downlink
        self._complete_push = complete
        self._decided = decided
        self._again = again
        self.waiting: deque[tuple[Session, Transfer]] = deque()
        self._whole: dict[str, Push] = {}
        """Whole pushes that wait for a slot: at most one per session, each at most a chunk or in shared memory."""
        self.drained = 0
        """Chunks of transfers that are over."""

    def push(self, session: Session, push: Push) -> None:
        """A whole transfer in one message."""
        transfer = self._start(session, push.begin)
        if transfer is None:
            return
        if transfer.begin.kind == "init":
            self._take_whole(session, transfer, push)
        else:
            self._whole[session.token] = push
            self.give_slots()

    def begin(self, session: Session, begin: Begin) -> None:
        """A transfer of several chunks asks to be let in."""
        transfer = self._start(session, begin)
        if transfer is None:
            return
        if begin.kind == "init":
            self._open_window(session, transfer)
            return
        self.give_slots()
        if transfer.slot is None:
            sentence = f"All {self._state.hosted.slots.limit} transfer slots are taken; they are given in order."
            self._grant(session, begin.number, "wait", 0, Code.BUSY, sentence)

    def chunk(self, session: Session, chunk: Chunk) -> None:
        """One piece of a transfer."""
        transfer = session.transfer
        if transfer is None or transfer.begin.number != chunk.transfer or transfer.committed:
            self.drained += 1
            return
        if chunk.index >= transfer.until:
            self._fail(session, transfer, PeerError(Code.LIMIT, "More chunks were sent than were granted."))
            return
        if not self._take(session, transfer, chunk.index, chunk.payload):
            return
        arrived, window = sum(transfer.received), self._state.settings.window_chunks
        if transfer.until < len(transfer.received) and transfer.until - arrived <= window // 2:
            transfer.until = arrived + window
            self._out.tell(session, More(session.token, session.connection, chunk.transfer, transfer.until))

    def commit(self, session: Session, commit: Commit) -> None:
        """The last chunk was sent."""
        transfer = session.transfer
        if transfer is None or transfer.begin.number != commit.number or transfer.committed:
            self.drained += 1
            return
        self._complete(session, transfer, commit.scalars)

    def reassure(self, session: Session) -> None:
        """Tell a session that waits for its push to be let in or applied that it does not wait in vain."""
        transfer = session.transfer
        if transfer is not None and transfer.begin.kind == "push" and (transfer.slot is None or transfer.committed):
            sentence = "Others come first; this push has its place."
            self._grant(session, transfer.begin.number, "wait", 0, Code.BUSY, sentence)
        elif transfer is None and session.decision.outcome == "held":
            sentence = f"It is held until these have pushed: {', '.join(self._state.waited_for) or 'nobody'}."
            self._grant(session, session.decision.number, "wait", 0, Code.BUSY, sentence)

    def refusal(self, session: Session, begin: Begin) -> PeerError | None:
        """Why this push, or any of this session, is not taken at present; None where it is."""
        state = self._state
        if not session.anchored:
            return PeerError(Code.UNEXPECTED, "This worker has not pulled the center it would start from.")
        if state.keeps_replicas and (session.owed is not None or begin.merged not in session.holds):
            sentence = "This update does not start from the last reply that its worker was given."
            return PeerError(Code.BASE_VERSION, sentence, fix="Pull the center, and go on from there.")
        if state.finished:
            return PeerError(Code.FINISHED, f"Training is over: {state.finished}.")
        if state.diverged:
            fix = "Restart from a checkpoint with a lower learning rate."
            return PeerError(Code.DIVERGED, state.diverged, fix=fix)
        if state.now < session.quarantined_until:
            left_s = session.quarantined_until - state.now
            return PeerError(Code.QUARANTINED, f"Too many rejected updates; quarantined for {left_s:.0f} s more.")
        if state.unsaved_since is not None and state.now - state.unsaved_since > state.settings.max_unsaved_age_s:
            return PeerError(Code.DEGRADED, "Nothing could be saved for too long; updates are refused until it can.")
        return None

    def give_slots(self) -> None:
        """Slots to those who wait, in order of arrival."""
        if self._state.model is None:
            return
        while self.waiting:
            session, transfer = self.waiting[0]
            if session.transfer is transfer:
                transfer.slot = self._state.model.slots.take()
                if transfer.slot is None:
                    return
            self.waiting.popleft()
            if session.transfer is not transfer:
                continue
            if push := self._whole.pop(session.token, None):
                self._take_whole(session, transfer, push)
            else:
                self._open_window(session, transfer)

    def drop(self, session: Session) -> None:
        """Forget the session's transfer, and free what it holds."""
        transfer, session.transfer = session.transfer, None
        self._whole.pop(session.token, None)
        if transfer is not None and transfer.slot is not None:
            self.give(transfer.slot)

    def give(self, slot: Slot) -> None:
        """A slot is free again."""
        self._state.hosted.slots.give(slot)

    def take_work(self, transfer: Transfer) -> Work:
        """Take what lies in shared memory, each block checked as it is copied; what comes of it is for `taken`."""
        assert transfer.slot is not None and transfer.lying is not None
        plan, lying, update = transfer.plan, transfer.lying, transfer.slot.update

        def take(first: int, last: int, scratch: F32) -> PeerError | None:
            span = plan.span(first, last)
            try:
                plan.take(span, lying[span.offset : span.offset + span.size], update)
            except PeerError as error:
                return error
            return None

        return Work(len(plan.blocks), plan.elements, take)

    def taken(self, session: Session, transfer: Transfer, results: Sequence[PeerError | None]) -> bool:
        """Whether all of it is taken; else the transfer broke a rule, and is over."""
        assert transfer.lying is not None
        session.counters.bytes_up += transfer.lying.nbytes
        transfer.lying = None
        for error in results:
            if error is not None:
                self._fail(session, transfer, error)
                return False
        return True

    def decide(self, session: Session, decision: Decision) -> None:
        """Decide a push without applying it, and say so."""
        session.decision = decision
        self._out.count(decision.code)
        self._decided(session)

    def turn_down(self, session: Session, transfer: Transfer, error: PeerError) -> None:
        """A complete push is not taken, though it breaks no rule of the exchange: rejected, and no strike."""
        self.drop(session)
        if error.code != Code.FINISHED:
            self._note_rejected(session, transfer.begin.number, error)
        self.decide(session, Decision(transfer.begin.number, "rejected", error.code, str(error), self._state.version))

    def _start(self, session: Session, begin: Begin) -> Transfer | None:
        """A new transfer, in line for a slot; None where `begin` is answered already."""
        if begin.kind == "init":
            try:
                return self._initial.begin(session, begin)
            except PeerError as error:
                self._out.fault(session.peer, error, session=session, number=begin.number)
                return None
        if begin.number <= session.decision.number:
            if begin.number == session.decision.number and session.answered_connection != session.connection:
                session.merged = begin.merged
                self._again(session)
            return None
        if (under_way := session.transfer) is not None:
            if under_way.committed or begin.number <= under_way.begin.number:
                return None  # it will be answered when it is decided
            self.drop(session)  # withdrawn
        if self._state.stopping:
            self._grant(session, begin.number, "refuse", 0, Code.DRAINING, "The server is stopping.")
            return None
        session.named(begin.merged)
        if refusal := self.refusal(session, begin):
            self._refuse(session, begin, refusal)
            return None
        shard = self._state.hosted.shard
        try:
            plan = intake.check_begin(begin, shard.ups, shard.version)
        except PeerError as error:
            self._reject(session, begin.number, error)
            return None
        session.merged = begin.merged
        session.go_on()  # so it has its reply
        self._downlink.cancel(session.token, of_push=True)  # it goes on, so it waits for no older reply
        transfer = Transfer(begin, plan, session.connection, self._state.now, received=bytearray(len(plan.chunks)))
        session.transfer = transfer
        self.waiting.append((session, transfer))
        return transfer

    def _refuse(self, session: Session, begin: Begin, refusal: PeerError) -> None:
        """No before a byte has moved: the number stays undecided, except where training is over for good."""
        if refusal.code == Code.FINISHED:
            version = self._state.version
            self.decide(session, Decision(begin.number, "rejected", refusal.code, refusal.sentence, version))
            return
        self._out.count(refusal.code)
        self._grant(session, begin.number, "refuse", 0, refusal.code, str(refusal))

    def _take_whole(self, session: Session, transfer: Transfer, push: Push) -> None:
        tried = transfer.begin.kind == "push" and self._state.hosted.shard.tries(transfer.plan)
        if len(transfer.plan.chunks) == 1 and not tried:
            if self._take(session, transfer, 0, push.payload):
                self._complete(session, transfer, push.scalars)
            return
        try:
            transfer.lying = intake.check_whole(transfer.plan, push.payload)
        except PeerError as error:
            self._fail(session, transfer, error)
            return
        transfer.scalars = push.scalars
        self._complete_push(session, transfer)

    def _take(self, session: Session, transfer: Transfer, index: int, payload: Buffer) -> bool:
        """Check one chunk into its place; False where it broke a rule and the transfer is over."""
        try:
            if transfer.begin.kind == "init":
                intake.take_chunk(transfer, self._initial.buffer(), index, payload)
            else:
                assert transfer.slot is not None
                intake.take_chunk(transfer, transfer.slot.update, index, payload)
        except PeerError as error:
            self._fail(session, transfer, error)
            return False
        session.counters.bytes_up += len(payload)
        return True

    def _complete(self, session: Session, transfer: Transfer, scalars: Scalars) -> None:
        try:
            intake.check_complete(transfer)
        except PeerError as error:
            self._fail(session, transfer, error)
            return
        transfer.scalars = scalars
        if transfer.begin.kind == "init":
            self._initial.load(session)
        else:
            self._complete_push(session, transfer)

    def _fail(self, session: Session, transfer: Transfer, error: PeerError) -> None:
        """A transfer broke a rule on its way: nothing of it remains."""
        if transfer.begin.kind == "init":
            self._out.fault(session.peer, error, session=session, number=transfer.begin.number)
            self._initial.give_up(session, back_in_line=False)
            return
        self.drop(session)
        self._reject(session, transfer.begin.number, error)

    def _reject(self, session: Session, number: int, error: PeerError) -> None:
        now = self._state.now
        self._note_rejected(session, number, error)
        session.rejections.append(now)
        if sum(now - at < 60.0 for at in session.rejections) >= self._state.settings.rejected_per_minute:
            session.rejections.clear()
            session.quarantined_until = now + QUARANTINE_S * 2 ** min(session.quarantines, QUARANTINE_DOUBLINGS)
            session.quarantines += 1
        self.decide(session, Decision(number, "rejected", error.code, str(error), self._state.version))

    def _note_rejected(self, session: Session, number: int, error: PeerError) -> None:
        session.counters.rejected += 1
        self._out.say("warning", f"{session.worker}: update {number} rejected ({error.code}): {error}")
        self._out.record("reject", worker=session.worker, number=number, code=str(error.code), sentence=str(error))

    def _open_window(self, session: Session, transfer: Transfer) -> None:
        transfer.until = self._state.settings.window_chunks
        self._grant(session, transfer.begin.number, "go", transfer.until, "", "")

    def _grant(
        self,
        session: Session,
        number: int,
        decision: Literal["go", "wait", "refuse"],
        until: int,
        code: str,
        sentence: str,
    ) -> None:
        self._out.tell(session, Grant(session.token, session.connection, number, decision, until, str(code), sentence))
