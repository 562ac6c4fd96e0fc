"""Room for a model and its workers: memory as long as the model, made before a Hello is answered. Pure.

    Hello -> fits -> room? -- yes -> welcomed
                       | no
                       waits -> one job makes what is missing -> its Hello is handled as if it came now

Laws
* Who is welcomed has room: the model, a slot for each worker (within the pool), and what the rule keeps for it.
* What is large is made on the kernels' threads, in the order of work: meanwhile everybody is heard, and no lease ends
  and nobody dials again because a big model is being joined.
* Of one instance only the latest Hello waits: the connections of those before are closed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from common import wire
from common.codecs.base import F32, U8
from common.errors import Code, ConfigError, PeerError
from common.layout import Layout
from common.messages import Hello
from paramserver import memory
from paramserver.order import Job, WorkOrder
from paramserver.shard import Kept, Shard, Work
from paramserver.slots import Slots
from paramserver.snapshots import Snapshots
from paramserver.state import Hosted, Outbox, ServerState

AT_ONCE_BYTES = 32 << 20
"""So much is made at once, on the loop: in a twentieth of a second, on a machine where page faults are slow."""
FLOAT_BYTES = 4


class Room:
    """What is being made, and the Hellos that wait for it. `hello(peer, hello)` handles one, and answers refusals."""

    def __init__(
        self, state: ServerState, out: Outbox, order: WorkOrder, hello: Callable[[bytes, Hello], None]
    ) -> None:
        self._state = state
        self._out = out
        self._order = order
        self._hello = hello
        self._waiting: dict[str, tuple[bytes, Hello]] = {}
        """By instance, in order of arrival."""
        self._making = False

    def __len__(self) -> int:
        return len(self._waiting)

    def host(self, layout: Layout) -> None:
        """Make center and pool for a model, now; raises PeerError where they do not fit."""
        self._plan(layout)
        self._host(self._make_model(layout))

    def made(self, layout: Layout, workers: int, arrays: int) -> bool:
        """Whether there is room for so many workers, of which so many have no arrays yet. What is small is made at
        once; raises PeerError where the model does not fit the pool."""
        if self._missing_bytes(layout, workers, arrays) == 0:
            return True
        if self._making or self._missing_bytes(layout, workers, arrays) > AT_ONCE_BYTES:
            return False
        finish = self._work(layout, workers, arrays)
        finish()
        return True

    def wait(self, peer: bytes, hello: Hello, layout: Layout, workers: int, arrays: int) -> None:
        """Have room made, and then handle this Hello; raises PeerError where too many wait already."""
        if hello.instance not in self._waiting and len(self._waiting) >= self._state.settings.max_sessions:
            sentence = f"{len(self._waiting)} workers wait to be taken in already."
            raise PeerError(Code.FULL, sentence, fix="Try again later, or raise `max_sessions` on the server.")
        self._waiting[hello.instance] = peer, hello
        if self._making:
            return
        self._making = True
        finishes: list[Callable[[], None]] = []

        def work(first: int, last: int, scratch: F32) -> bool:
            finishes.append(self._work(layout, workers, arrays))
            return True

        elements = self._missing_bytes(layout, workers, arrays) // FLOAT_BYTES

        def finish(results: Sequence[bool]) -> None:
            self._making = False
            finishes[0]()
            self._handle_waiting()

        self._order.add(Job(f"room for {hello.worker}", lambda: Work(1, elements, work), finish), pull=True)

    def _handle_waiting(self) -> None:
        """One after the other, until one needs more room."""
        while self._waiting and not self._making:
            peer, hello = self._waiting.pop(next(iter(self._waiting)))
            self._hello(peer, hello)

    # What is missing, and making it

    def _plan(self, layout: Layout) -> memory.MemoryPlan:
        try:
            return memory.plan(self._state.settings, layout)
        except ConfigError as error:
            raise PeerError(Code.FULL, error.sentence, fix=error.fix) from None

    def _missing_bytes(self, layout: Layout, workers: int, arrays: int) -> int:
        plan, model = self._plan(layout), self._state.model
        missing = 0 if model else plan.center + plan.second + plan.rule_state + plan.snapshots
        slots = model.slots.missing(workers) if model else min(workers, plan.slots)
        sets = max(arrays - model.shard.spare_arrays, 0) if model else arrays
        return missing + slots * plan.per_slot + sets * (plan.arrays + plan.replica)

    def _work(self, layout: Layout, workers: int, arrays: int) -> Callable[[], None]:
        """Make all that is missing, on any thread; what is returned takes it over, on the loop."""
        before = self._state.model
        model = before or self._make_model(layout)
        slots: list[tuple[U8, U8]] = [model.slots.make() for _ in range(model.slots.missing(workers))]
        sets: list[Kept] = [model.shard.make_arrays() for _ in range(arrays - model.shard.spare_arrays)]

        def finish() -> None:
            if self._state.model is not before:
                return  # the model was forgotten meanwhile
            if before is None:
                self._host(model)
            for pair in slots:
                model.slots.add(*pair)
            for made in sets:
                model.shard.keep_spare(made)

        return finish

    def _make_model(self, layout: Layout) -> Hosted:
        state, s = self._state, self._state.settings
        shard = Shard(
            layout,
            state.rule,
            state.config,
            s.terms(),
            codec=s.codec,
            reply_codec=s.reply_codec,
            replies=s.replies,
            epoch=state.epoch,
            shares=bool(state.machine),
        )
        slots = Slots(self._plan(layout).slots, shard.longest_update, shard.longest_reply)
        longest_payload = max(wire.PAYLOAD_BYTES, shard.longest_update)
        return Hosted(shard, slots, Snapshots(shard.down.bytes), longest_payload)

    def _host(self, model: Hosted) -> None:
        self._state.model = model
        layout, workers = model.shard.layout, max(len(self._state.members), 1)
        self._out.say("info", f"Model of {layout.parameters:,} parameters. {self._plan(layout).sentence(workers)}")
