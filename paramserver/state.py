"""Everything that is true of the server now, in one place; and the outbox in which its actions gather.

The parts of the core (`joining`, `initial`, `uplink`, `applying`, `pulls`, `durability`) are verbs over this state:
each is made with it and holds only what is its own business. None of them keeps a copy of anything in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common import rules, wire
from common.codecs import draws
from common.config import ServerSettings
from common.errors import Code, PeerError
from common.messages import NOWHERE, Fault, Message, Version
from common.node import Record, Say, Send
from common.rules.base import Config, Rule
from paramserver import diversity
from paramserver.budget import Budget
from paramserver.diversity import Averages, Load
from paramserver.session import Session
from paramserver.shard import Shard, keeps_replicas
from paramserver.slots import Slots
from paramserver.snapshots import Snapshots

CONNECTION_BITS = 32


@dataclass(frozen=True, slots=True)
class Hosted:
    """The model that is served, and the buffers its exchanges live in."""

    shard: Shard
    slots: Slots
    snapshots: Snapshots
    longest_payload: int
    """Of any message, bytes: in shared memory an update comes whole."""


@dataclass(slots=True)
class ServerState:
    """What the parts of the core share."""

    settings: ServerSettings
    epoch: int
    rule: Rule
    config: Config
    budget: Budget
    keeps_replicas: bool
    """Whether replies are differences to what each worker holds."""
    keeps_replies: bool
    """Whether a reply that is lost must be sent again as it was."""
    machine: str = ""
    """The one it runs on, for workers that may share memory; "": with nobody."""
    now: float = 0.0
    """Monotonic seconds of the event that is being handled."""
    sessions: dict[str, Session] = field(default_factory=dict)
    model: Hosted | None = None
    """None until the first worker has said what its model looks like."""
    initialised: bool = False
    """Whether the center holds weights."""
    durable: Version = NOWHERE
    unsaved_since: float | None = None
    """When saving began to fail (monotonic seconds)."""
    recovered: Version = NOWHERE
    """The version this life of the server started from."""
    finished: str = ""
    """Why training is over, once it is."""
    diverged: str = ""
    """Where the center ceased to be finite, once it did."""
    stopping: str = ""
    ordered_bytes: int = 0
    """Sent to workers that were ordered to pull, since the last line of the run log."""
    connections: int = 0
    """Connections so far in this life of the server."""
    diversity: Averages = field(default_factory=Averages)
    """Of the gradients, as the workers measured it."""

    @classmethod
    def of(cls, settings: ServerSettings, epoch: int, machine: str) -> ServerState:
        """The state of a server that has just started."""
        budget = Budget(settings.budget_updates, settings.budget_samples, settings.budget_s)
        rule = rules.load(settings.rule)
        replicas = keeps_replicas(rule, settings.replies)
        replies = replicas or rule.lost_reply == "resend"
        return cls(settings, epoch, rule, settings.rule_config(), budget, replicas, replies, machine)

    @property
    def version(self) -> Version:
        """The center now."""
        return self.model.shard.version if self.model else Version(self.epoch, 0)

    @property
    def members(self) -> list[Session]:
        """Live workers."""
        return [session for session in self.sessions.values() if session.member]

    def member(self, worker: str) -> Session | None:
        """The live worker of that name."""
        return next((session for session in self.members if session.worker == worker), None)

    @property
    def training_s(self) -> float:
        """Seconds of training so far, over all lives of the server: the rules' clock."""
        return self.budget.elapsed_s(self.now)

    def lag(self, base: Version) -> int:
        """Versions between what a worker started from and now; a base that a crash undid counts as recovered."""
        start = base.version if base.epoch == self.epoch else min(base.version, self.recovered.version)
        return max(self.version.version - start, 0)

    def lag_weight(self, lag_versions: int) -> float:
        """What an update is scaled by for its lag; raises PeerError where it is not taken at all."""
        s = self.settings
        weight = 1.0
        if s.lag_weight == "inverse":
            weight = 1.0 / (lag_versions + 1)
        elif s.lag_weight == "polynomial":
            weight = float((1.0 + lag_versions) ** -s.lag_exponent)
        if s.max_lag is not None and lag_versions > s.max_lag:
            if s.beyond_max_lag == "reject":
                raise PeerError(
                    Code.LAG,
                    f"The center moved {lag_versions} versions since this update's base, at most {s.max_lag} may be.",
                    fix="Push more often, or serve with a larger --max-lag or with --beyond-max-lag weight.",
                )
            weight *= (s.max_lag + 1) / (lag_versions + 1)
        return weight

    def too_far_ahead(self, session: Session) -> bool:
        """Whether this worker's clock is further ahead of the slowest than is allowed."""
        gap = self.settings.max_clock_gap
        if gap is None:
            return False
        clocks = [member.clock for member in self.members if member.enrolled]
        return session.clock > min(clocks, default=session.clock) + gap

    def local_steps_of(self, session: Session) -> int:
        """H of this worker: as set, in proportion to its speed, or as large as the gradients' diversity carries."""
        s = self.settings
        if s.local_steps_by == "fixed":
            return s.local_steps
        members = self.members
        if s.local_steps_by == "diversity":
            batch = session.counters.load.batch
            return diversity.local_steps(self.diversity, len(members), batch, s.diversity_delta, s.local_steps)
        fastest = max((member.pace.steps_per_s for member in members), default=0.0)
        if fastest == 0.0 or session.pace.steps_per_s == 0.0:
            return s.local_steps
        return max(round(s.local_steps * session.pace.steps_per_s / fastest), 1)

    def key(self, session: Session, number: int) -> int:
        """Of the reply to this push, where its codec rounds at random."""
        return draws.of_reply(self.settings.seed, session.worker, number)

    @property
    def sharing(self) -> int:
        """Workers with which memory is shared, or is about to be."""
        return sum(member.lent for member in self.members)

    @property
    def loads(self) -> list[Load]:
        """What the live workers have in flight."""
        return [member.counters.load for member in self.members]

    @property
    def waited_for(self) -> Sequence[str]:
        """Workers that others wait for: by the rule, or because those are too far ahead of them."""
        names = self.rule.waits(self.config, self.model.shard.decisions) if self.model else ()
        if names or self.settings.max_clock_gap is None:
            return names
        members = [member for member in self.members if member.enrolled]
        if not any(member.late for member in members):
            return ()
        slowest = min(member.clock for member in members)
        return [member.worker for member in members if member.clock == slowest]

    @property
    def mid_round(self) -> bool:
        """Whether updates were folded in whose round is not closed."""
        return any(member.decision.outcome == "held" and not member.late for member in self.members)

    def end_if_used_up(self, *, counted: bool = True) -> None:
        """Training is over once the budget is used up; it never goes on after that. Without `counted` only time is
        looked at: a round that is under way when updates or samples are used up is brought to its end."""
        used_up = self.budget.used_up(self.now) if counted else self.budget.time_is_up(self.now)
        if self.initialised and not self.finished and (reason := used_up):
            self.finished = reason
            self.budget.ended = self.now

    def next_connection(self) -> int:
        """A number for a new connection; unique over all lives of the server, so an old one never fits a new one."""
        self.connections += 1
        return (self.epoch << CONNECTION_BITS) + self.connections

    @property
    def hosted(self) -> Hosted:
        """The model, where there must be one."""
        assert self.model is not None
        return self.model


class Outbox:
    """Actions gathered while one event is handled, in order."""

    def __init__(self) -> None:
        self._actions: list[Any] = []
        self.refusals: dict[str, int] = {}
        """How often each code was said, for `status`."""

    def __len__(self) -> int:
        return len(self._actions)

    def add(self, action: Any) -> None:
        """Any action."""
        self._actions.append(action)

    def take(self) -> list[Any]:
        """Everything gathered, once."""
        actions, self._actions = self._actions, []
        return actions

    def send(self, peer: bytes, message: Message) -> None:
        """A message to a connection."""
        self.add(Send(peer, wire.encode(message)))

    def tell(self, session: Session, message: Message) -> None:
        """A message to a session, if it is connected in this life of the server."""
        if session.peer:
            self.send(session.peer, message)

    def fault(self, peer: bytes, error: PeerError, *, session: Session | None = None, number: int = 0) -> None:
        """Tell a peer what it did wrong."""
        self.count(error.code)
        token, connection = (session.token, session.connection) if session else ("", 0)
        self.send(peer, Fault(token, connection, str(error.code), error.sentence, error.fix, number))
        self.record("fault", code=str(error.code), sentence=error.sentence, worker=session.worker if session else "")

    def count(self, code: Code | str) -> None:
        """One more refusal for this reason."""
        self.refusals[str(code)] = self.refusals.get(str(code), 0) + 1

    def record(self, kind: str, **values: Any) -> None:
        """One line for the run log."""
        self.add(Record(kind, values))

    def say(self, level: str, sentence: str) -> None:
        """One line for the person who watches."""
        self.add(Say(level, sentence))
